"""What the built-in task, its preference model and the default runs must hold, measured.

The default runs of ipo and ipo_md, each of several seeds, with one thread and with two: threads add
in another order, which after some steps flips a token, so they count as other runs of the same law.
Run: python -m studies.gates    (30 min on 2 cores)
"""

import argparse
import itertools
import os
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import files
import job.options
import job.stages
import policy as policies
import sampler
import summaries
import train


def supervised_samples(task, reference, count=1000, responses=3):
    """Texts of validation posts and of responses to them: [(post, [response, ...]), ...]."""
    prompt = task.prompts("validation", 1, count)
    generator = data.generator(0, "gates", 0)
    beta = (0.0,) * responses
    ids, mask, _ = sampler.sample(reference, None, prompt, beta, generator, task.max_response)
    texts = task.judge.read(policies.Tokens(ids, mask))
    posts = task.judge.read(prompt)
    # All first responses come before all second ones.
    return [(post, texts[row::count]) for row, post in enumerate(posts)]


def panel(post, response, other):
    """The panel's p(response > other)."""
    return sum(summaries.votes(post, response, other)) / len(summaries.ANNOTATORS)


# ---- what is measured ----


def cyclic_share(samples):
    """Share of triples of different responses of which each beats the next by more than 0.1."""
    cyclic = []
    for post, responses in samples:
        if len(set(responses)) < 3:
            continue
        margins = []
        for k in range(3):
            other = responses[(k + 1) % 3]
            margins.append(panel(post, responses[k], other) - 0.5)
        # Either way around: each beats the next, or each is beaten by it.
        cyclic.append(min(margins) > 0.1 or max(margins) < -0.1)
    return sum(cyclic) / len(cyclic)


def least_against_degenerate(samples):
    """The least p(response > degenerate) of real responses: degenerate is empty or repetitive."""
    least = []
    for post, responses in samples:
        word = summaries.mentions(post)[0]
        degenerate = ("", f"{word} , {word}", " ".join([word] * 9))
        for response in responses:
            if summaries.qualities(post, response)["real"]:
                least.append(min(panel(post, response, bad) for bad in degenerate))
    return min(least)


def shorter_share(samples):
    """Share of pairs of unequal length, no draw, in which the shorter response is preferred."""
    shorter = []
    for post, responses in samples:
        for response, other in itertools.combinations(responses, 2):
            words_less = len(other.split()) - len(response.split())
            preference = panel(post, response, other)
            if words_less and preference != 0.5:
                shorter.append((words_less > 0) == (preference > 0.5))
    return sum(shorter) / len(shorter)


# ---- the gates: (name, value, least or None, most or None) ----


def task_gates(samples):
    """The task's: there are cycles, nothing degenerate wins, and both length biases for a look."""
    shorter = shorter_share(samples)
    yield "cyclic triples, margins above 0.1", cyclic_share(samples), 0.05, None
    yield "least p(real > empty or repetitive)", least_against_degenerate(samples), 0.9, None
    yield "pairs in which the shorter is preferred", shorter, None, None
    yield "pairs in which the longer is preferred", 1 - shorter, None, None


def model_gates(numbers):
    """The preference model's: better than either rule of length. numbers: its accuracy.json."""
    baseline = max(numbers["shorter_wins"], numbers["longer_wins"])
    least = max(0.75, baseline + 0.05)
    yield "preference model: right signs", numbers["accuracy"], least, None
    yield "preference model: mean |p_hat - p|", numbers["error"], None, 0.20


def run_gates(name, summary):
    """A default run's: it has moved, and has neither collapsed nor rambled. summary: its own."""
    length = summary["length"] / summary["length_other"]
    yield f"{name}: win rate (se {summary['win_rate_se']:.3f})", summary["win_rate"], None, None
    yield "  KL to the reference, nats", summary["kl"], 0.5, None
    yield "  KL to the reference, nats", summary["kl"], None, 10
    yield "  unfinished", summary["unfinished"], None, 0.02
    yield "  length over the start's", length, 0.6, None
    yield "  length over the start's", length, None, 1.5
    yield "  distinct responses", summary["distinct"], 0.5, None


def all_runs_gates(win_rates):
    """Of all default runs together: they win, and none is far behind the others."""
    mean = sum(win_rates) / len(win_rates)
    yield f"mean win rate of {len(win_rates)} runs", mean, 0.81, None
    yield "the worst run's, below the mean by", mean - min(win_rates), None, 0.05
    yield "the best run's, above the mean by", max(win_rates) - mean, None, None


def show(rows):
    """Prints gates with their measured values and bounds. Returns how many are missed."""
    missed = 0
    for name, value, least, most in rows:
        bound = ""
        fails = False
        if least is not None:
            bound = f">= {least:g}"
            fails = value < least
        elif most is not None:
            bound = f"<= {most:g}"
            fails = value > most
        missed += fails
        word = "MISSED" if fails else ""
        print(f"{name:44s} {value:8.3f}  {bound:8s} {word}", flush=True)
    return missed


def gates(options):
    """Measures and prints every gate. Returns the exit status: 1 if one is missed."""
    chosen = job.options.parse(["--stages", options.stages])
    task, start, data_hash = data.open_task(chosen)
    reference, path = job.stages.supervised(chosen, task, start, data_hash)
    _, model_path = job.stages.preference(chosen, task, reference, path, "preference")
    missed = show(task_gates(supervised_samples(task, reference)))
    numbers = files.read_object(os.path.join(model_path, "accuracy.json"))
    missed += show(model_gates(numbers))
    win_rates = []
    for threads, loss, seed in itertools.product((1, 2), ("ipo", "ipo_md"), range(options.seeds)):
        name = f"{loss}, seed {seed}, {threads} threads"
        summary = default_run(options, loss, seed, threads)
        if summary is None:
            return 2
        missed += show(run_gates(name, summary))
        win_rates.append(summary["win_rate"])
    missed += show(all_runs_gates(win_rates))
    return int(missed > 0)


def default_run(options, loss, seed, threads):
    """The summary of a default run, judged on --prompts test prompts; None after an error."""
    out = os.path.join(os.path.dirname(options.stages), f"{loss}-seed{seed}-threads{threads}")
    argv = ["--loss", loss, "--seed", str(seed), "--stages", options.stages, "--out", out]
    torch.set_num_threads(threads)
    if train.main([*argv, "--eval-prompts", str(options.prompts), "--resume"]):
        return None
    return files.read_object(os.path.join(out, "summary.json"))


def main(argv=None):
    """Prints the gates; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="alignment seeds of each method (default 5)")
    add("--prompts", type=int, default=2000, help="test prompts of a run (default 2000)")
    add(
        "--stages",
        default="runs/stages",
        help="the shared stages (default runs/stages); runs go beside them",
    )
    return gates(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
