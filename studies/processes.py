"""What several processes gain on one machine: the default alignment's wall time, and what adding
the gradients costs.

One process with all threads against N with their share of them, by turns; stages are kept, so that
what is timed is the alignment and its evaluations. Then job/parallel.py's sum of the gradients
alone, for the default policy and for GPT-2 124M.
Left out: several machines, whose network decides.
Run: python -m studies.processes [--count 2] [--steps 200]    (10 min on 2 cores)
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import torch

import policy as policies
from job import parallel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A vocabulary of a size: build asks a tokenizer for no more than this.
WORDS = {"tiny": 69, "gpt2-124m": 50256}


def launch(count, threads, *command):
    """Runs a python command by count processes of so many threads. Returns its standard output."""
    python = [sys.executable]
    if count > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1")
    done = subprocess.run(
        [*python, *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def alignment_seconds(options, count, threads):
    """The seconds that a run of train.py says it took, and its win rate."""
    out = os.path.join(options.runs, f"by-{count}")
    shutil.rmtree(out, ignore_errors=True)
    argv = ["--loss", "ipo_md", "--device", "cpu", "--steps", str(options.steps)]
    launch(count, threads, "train.py", *argv, "--out", out, "--stages", f"{options.runs}/stages")
    with open(os.path.join(out, "summary.json"), encoding="utf-8") as file:
        summary = json.load(file)
    return summary["seconds"], summary["win_rate"]


def sum_seconds(repeats=20):
    """Inside several processes: median seconds of a sum of the gradients, by policy size."""
    found = {}
    with parallel.joined():
        for size, words in WORDS.items():
            tokenizer = policies.word_tokenizer([f"w{word}" for word in range(words)])
            weights = list(policies.build(size, tokenizer, 128, 0).parameters())
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            times = []
            for _ in range(repeats):
                begun = time.perf_counter()
                parallel.add_gradients(weights)
                times.append(time.perf_counter() - begun)
            found[size] = statistics.median(times)
        if parallel.rank() == 0:
            print(json.dumps(found))


def main(argv=None):
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--count", type=int, default=2, help="processes (default 2)")
    add("--steps", type=int, default=200, help="of the alignment (default 200)")
    add("--repeats", type=int, default=3, help="(default 3)")
    add("--runs", default="runs/processes", help="folder of the runs (default runs/processes)")
    add("--sum", action="store_true", help="what the processes of this command run")
    options = parser.parse_args(argv)
    if options.sum:
        sum_seconds()
        return 0
    threads = torch.get_num_threads()
    cases = {1: threads, options.count: max(1, threads // options.count)}
    taken = {count: [] for count in cases}
    alignment_seconds(argparse.Namespace(runs=options.runs, steps=1), 1, threads)  # the stages
    for _ in range(options.repeats):
        for count, each in cases.items():
            taken[count].append(alignment_seconds(options, count, each))
    print("| processes x threads | seconds, median | each | win rate |")
    print("|---|---|---|---|")
    for count, each in cases.items():
        seconds = [spent for spent, _ in taken[count]]
        every = ", ".join(f"{spent:.1f}" for spent in seconds)
        rate = taken[count][-1][1]
        print(f"| {count} x {each} | {statistics.median(seconds):.1f} | {every} | {rate:.4f} |")
    said = launch(options.count, cases[options.count], "-m", "studies.processes", "--sum")
    for size, spent in json.loads(said).items():
        print(f"a sum of the gradients, {size}: {1000 * spent:.1f} ms a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
