"""What the studies of the built-in task share: runs and comparisons, their lines, the processes.

A study needs runs (cells: a method, tau, beta, seed) and comparisons of the policies they leave.
Each is a line of results/SCALE.jsonl, found by its name and appended as it finishes: the same
command goes on where it was stopped, and --from-results draws from the lines alone.
Left out: a learning rate and batch size of each method's own.
No command of its own: see table2.py, figures.py, same_tau.py, everything.py.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import job  # before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import job.folder
import job.options
import job.report
import job.stages
import job.versions
import policy as policies
import preference_model
import stopping
import train

# steps: by studies/lengths.py; prompts: validation prompts of a comparison; test: those of Table 2;
# taus: how many of a method's GRID; stages: options of the stages
SCALES = {
    "smoke": dict(
        steps=8,
        seeds=2,
        prompts=30,
        test=30,
        taus=2,
        stages=["--supervised-steps", "60", "--preference-steps", "60"],
    ),
    "full": dict(steps=200, seeds=4, prompts=300, test=600, taus=6, stages=[]),
}
# Student's t, 97.5 %, by the degrees of freedom, rounded down where they are no whole number.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
# The paper's rows, in its order.
NAMES = {
    "ipo": "IPO",
    "ipo_md": "IPO-MD",
    "dpo": "DPO",
    "nash_md": "Nash-MD-PG",
    "slic": "SLiC",
    "rl": "RL",
}
# The taus of a sweep, the likely best first: --scale smoke takes two of them. All methods have one
# budget of runs: the two that have a beta, too, spend the sixth on another one (table2.tune).
GRID = {
    "ipo": (0.05, 0.02, 0.1, 0.01, 0.2, 0.5),
    "ipo_md": (0.05, 0.02, 0.1, 0.01, 0.2),
    "dpo": (0.2, 0.1, 0.05, 0.5, 0.02, 1.0),
    "nash_md": (0.05, 0.02, 0.1, 0.01, 0.2),
    "slic": (0.1, 0.2, 0.05, 0.5, 0.02, 1.0),
    "rl": (0.2, 0.1, 0.05, 0.5, 0.02, 1.0),
}


# ---- what a study does: runs and comparisons, each in a process, each a line ----


def samples_mixture(loss):
    """Whether a method draws from the mixture of policy and reference, and so has a beta."""
    return hasattr(job.options.find_method(loss), "BETA")


def cell(study, loss, tau, beta=None, seed=0, offline=False, steps=None):
    """A run to do: what its line says of it, train.py's options, and where it goes.

    beta:
        None for the method's own default.
    steps:
        alignment steps, None for the scale's.
    """
    if beta is None:
        beta = getattr(job.options.find_method(loss), "BETA", 0.0)
    if steps is None:
        steps = study.steps
    mode = "-offline" if offline else ""
    argv = ["--loss", loss, "--tau", str(tau), "--seed", str(seed), "--steps", str(steps)]
    # Only the end counts: the rate falls to 0 there, and a checkpoint on the way is no short run.
    argv += ["--save-every", str(steps), "--keep", "1", "--eval-prompts", "20", *study.stages]
    if offline:
        argv += ["--offline"]
    if samples_mixture(loss):
        argv += ["--beta", str(beta)]
    return dict(
        name=f"{loss}{mode}-tau{tau:g}-beta{beta:g}-seed{seed}-steps{steps}",
        loss=loss,
        tau=tau,
        beta=beta,
        seed=seed,
        offline=offline,
        steps=steps,
        argv=argv,
        where=where(study, study.prompts),
    )


def where(study, prompts):
    """What a process must know of the study: its folder, the shared models, how many prompts."""
    return dict(folder=study.folder, shared=study.shared, prompts=prompts)


def prepare(study):
    """Makes the stages that every cell shares. Returns the folders of SFT and the learned model."""
    stages = ["--stages", os.path.join(study.folder, "stages"), "--device", "cpu", *study.stages]
    options = job.options.parse(stages)
    task, start, data_hash = data.open_task(options)
    reference, path = job.stages.supervised(options, task, start, data_hash)
    _, learned = job.stages.preference(options, task, reference, path, "preference")
    return dict(SFT=path, learned=learned)


def run_by_train(todo, folder):
    """Runs a cell's options by train.py, silently, in a folder of the study's.

    Returns (the run's path, the seconds of a processor that it took, whatever else that had to do):
    of a resumed run its last start's, of one that was finished about none.
    """
    there = todo["where"]
    out = os.path.join(there["folder"], folder)
    stages = os.path.join(there["folder"], "stages")
    argv = [*todo["argv"], "--out", out, "--stages", stages, "--device", "cpu", "--resume"]
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        train.run_job(job.options.parse(argv))
    return out, time.process_time() - begun


def line_of(todo):
    """The beginning of an entry's line: all that it says but where it is run."""
    return {name: value for name, value in todo.items() if name != "where"}


def folder_of(name):
    """The folder of a line's name, such as "survey: ipo offline"."""
    return name.replace(": ", "-").replace(" ", "-")


def run_cell(todo):
    """Runs a cell. Returns its line: the validation curve, its checkpoints against SFT, the last
    one is the run's end, and seconds as run_by_train has them."""
    there = todo["where"]
    out, seconds = run_by_train(todo, todo["name"])
    line = line_of(todo) | dict(seconds=seconds, points=[])
    for path in job.folder.checkpoints(out):
        pair = dict(a=os.path.relpath(path, there["folder"]), b="SFT", split="validation")
        point = compare(dict(name=todo["name"], **pair, where=there))
        point["step"] = int(path[-6:])
        line["points"].append(point)
        with contextlib.suppress(FileNotFoundError):
            # The run is finished: nothing will go on from its optimiser, two thirds of the bytes.
            os.unlink(os.path.join(path, "optimizer.pt"))
    return line | dict(curve=curve(out))


def curve(out):
    """The evaluations of a run's metrics, a list of dicts. out: the run's path."""
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(text) for text in file]
    return [line for line in lines if "win_rate" in line]


def short_cell(study, name, argv, steps=None, **said):
    """A run of which only the end is wanted, for run_to_end: no checkpoint but the last, judged on
    500 validation prompts.

    name:
        its line's.
    argv:
        train.py's options beyond the study's own.
    steps:
        alignment steps, None for the scale's.
    said:
        what its line says of it.
    """
    if steps is None:
        steps = study.steps
    own = ["--steps", str(steps), "--save-every", str(steps), "--keep", "1"]
    own += ["--eval-prompts", "20", *study.stages]
    prompts = 500 if study.scale == "full" else study.prompts
    return dict(name=name, steps=steps, **said, argv=[*argv, *own], where=where(study, prompts))


def run_to_end(todo):
    """Runs a cell. Returns its line: the final policy against SFT on validation prompts, and its
    seconds as run_by_train has them."""
    there = todo["where"]
    folder = folder_of(todo["name"])
    _, seconds = run_by_train(todo, folder)
    pair = dict(name=todo["name"], a=f"{folder}/policy", split="validation", b="SFT", where=there)
    return line_of(todo) | dict(seconds=seconds) | compare(pair)


@torch.no_grad()
def compare(todo):
    """The line of policy a against b: evaluate.measure's numbers under the panel, and, of the same
    responses, the learned model's p(a > b)."""
    there = todo["where"]
    policy = load_policy(there, todo["a"])
    other = load_policy(there, todo["b"])
    task = data.BuiltIn()
    learned = preference_model.load(there["shared"]["learned"])
    numbers, kept = evaluate.measure(
        policy, other, task.judge, task, todo["split"], there["prompts"]
    )
    preferences = [learned(prompt, y, y_other) for prompt, y, y_other in kept]
    return dict(name=todo["name"], **numbers, learned=torch.cat(preferences).mean().item())


def load_policy(there, name):
    """The policy that a comparison names: "SFT", RUN/checkpoint-STEP or RUN/policy."""
    path = there["shared"]["SFT"] if name == "SFT" else os.path.join(there["folder"], name)
    return policies.load(path)[0]


# ---- lines: those that there are, and those that are missing ----


def gather(study, work, todos):
    """The lines of all that is to do, in its order; what has none yet is worked off first.

    work:
        run_cell, compare or another function of one entry that returns its line.
    todos:
        list of dicts with a name each, the line's.

    Raises ValueError if lines are missing and the study is to be drawn from the lines alone.
    """
    missing = {todo["name"]: todo for todo in todos if todo["name"] not in study.lines}
    if missing and study.from_results:
        raise ValueError(
            f"{study.path}: {len(missing)} lines are missing, first {next(iter(missing))!r}; "
            "leave --from-results out to make them"
        )
    if missing:
        work_off(study, work, missing.values())
    return [study.lines[todo["name"]] for todo in todos]


def work_off(study, work, todos):
    """Gives the work to the processes and appends each line as it comes."""
    with open(study.path, "a", encoding="utf-8", newline="") as file:
        futures = [study.pool.submit(work, todo) for todo in todos]
        finished = concurrent.futures.as_completed(futures)
        for future in tqdm(finished, desc=work.__name__, total=len(futures)):
            line = dict(future.result(), version=study.version)
            study.lines[line["name"]] = line
            job.folder.append_line(file, line)


def pool(jobs):
    """Processes of one thread each, which use two cores better than one of two threads does. The
    first piece of work starts them."""
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(jobs, spawn, begin_process)


def begin_process():
    """The beginning of each of the pool's processes: one thread, and an end with the study's own.

    Ctrl-C is the study's: it waits for what runs and drops the rest. A study that is killed cannot
    say good-bye: its processes would finish their runs, and hold their folders' locks meanwhile,
    against the same command started anew.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_study, daemon=True).start()


def end_with_the_study():
    multiprocessing.parent_process().join()
    os._exit(1)  # at once: a run that is cut off so goes on from its last checkpoint


def read_lines(study):
    """The file's lines by name. A kill may have cut the last one: what is left of it goes."""
    os.makedirs(study.results, exist_ok=True)
    # newline="": a line's end is one byte on every system, or the file would be cut too short
    with open(study.path, "a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        file.truncate(len(whole.encode()))
    lines = {}
    for text in whole.splitlines():
        line = json.loads(text)
        if study.from_results or line["version"] == study.version:  # others are made again
            lines[line["name"]] = line
    return lines


# ---- what the studies read from lines ----


def checkpoint(run):
    """A run's last checkpoint, as compare names it."""
    return f"{run['name']}/checkpoint-{run['points'][-1]['step']:06d}"


def end_of(line):
    """The policy that a run ended in, as load_policy names it: its last checkpoint where it has
    some to look at, else the run's policy (short_cell)."""
    if "points" in line:
        return checkpoint(line)
    return f"{folder_of(line['name'])}/policy"


def against(study, pairs, split="validation", lines=()):
    """The lines of comparisons.

    pairs:
        a list of (checkpoint, checkpoint or "SFT").
    split:
        "validation" or "test".
    lines:
        of the runs whose checkpoints they are.
    """
    prompts = study.test if split == "test" else study.prompts
    todos = []
    for a, b in pairs:
        name = f"{split}: {a} : {b}"
        todos.append(dict(name=name, a=a, b=b, split=split, where=where(study, prompts)))
    run_again(study, todos, lines)
    return gather(study, compare, todos)


def run_again(study, todos, lines):
    """Makes the policies that lines tell of and this machine does not have, if they are wanted.

    todos:
        comparisons, with a name each. If all have their lines nothing is wanted.
    lines:
        of runs.

    So results/ is enough to go on from on another machine. Weights are the same up to rounding.
    """
    if study.from_results or all(todo["name"] in study.lines for todo in todos):
        return
    missing = []
    for line in lines:
        if not os.path.isdir(os.path.join(study.folder, end_of(line))):
            missing.append(dict(line, where=where(study, study.prompts)))
    futures = []
    for todo in missing:
        folder = os.path.dirname(end_of(todo))
        futures.append(study.pool.submit(run_by_train, todo, folder))
    for future in futures:
        future.result()


def win_rates(study, runs, rival):
    """Win rates of the runs' last checkpoints, [runs], over rival: the line of a run, or "SFT"."""
    lines, name = list(runs), rival
    if rival != "SFT":
        lines.append(rival)
        name = checkpoint(rival)
    pairs = [(checkpoint(run), name) for run in runs]
    return column(against(study, pairs, lines=lines), "win_rate")


def crossed_interval(values):
    """Mean of comparisons of every seed of one method with every seed of another, and the half
    width of its 95 % interval over seeds.

    values:
        [seeds, other's seeds], two or more of each, a row for each seed of the first.

    The comparisons share seeds, so their deviation is no standard error. That of the mean is
    se^2 = var(row means)/rows + var(column means)/columns, a little too large, with the degrees of
    freedom of Satterthwaite: of two methods one may have all the spread.
    """
    counts = np.array(values.shape)
    variances = np.array([values.mean(1).var(ddof=1), values.mean(0).var(ddof=1)]) / counts
    se = np.sqrt(variances.sum())
    if se == 0:
        return values.mean(), 0.0
    freedom = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    return values.mean(), STUDENT[int(freedom)] * se


def interval(values):
    """Mean of a number of several seeds, two or more, and half the width of its 95 % interval."""
    se = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), STUDENT[len(values) - 1] * float(se)


def sweep_cells(study, losses, offline=False):
    """What a tau sweep runs, by method and rising tau."""
    todos = []
    for loss in losses:
        for tau in sorted(GRID[loss][: study.taus]):
            todos.append(cell(study, loss, tau, offline=offline))
    return todos


def sweep(study, losses, offline=False):
    """The runs of a tau sweep, {loss: [line by rising tau]}."""
    found = {loss: [] for loss in losses}
    for line in gather(study, run_cell, sweep_cells(study, losses, offline)):
        found[line["loss"]].append(line)
    return found


def column(lines, key):
    """One number of every line, [lines]: of runs, points, curves or comparisons."""
    return np.array([line[key] for line in lines])


def suffix(scale):
    """What a scale's files have behind their names: full's, and rungs' long's, nothing."""
    return "-smoke" if scale == "smoke" else ""


def plot(study, name, panels):
    """Writes results/NAME.png, and its numbers to the screen.

    panels:
        list of (title, x label, y label, {label: (xs, ys)}), as job.report.plot's.
    """
    for title, _, _, series in panels:
        for label, (xs, ys) in series.items():
            points = [f"{x:.3g}: {y:.3f}" for x, y in zip(xs, ys, strict=True)]
            print(f"{name}, {title}, {label}: {', '.join(points)}")
    job.report.plot(os.path.join(study.results, f"{name}{suffix(study.scale)}.png"), panels)


# ---- the command line of a study ----


def parse(module, doc, names, argv):
    """The options of a study. names: its parts; a study of one part is not asked which."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if len(names) > 1:
        add("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all of them)")
    add(
        "--scale",
        default="full",
        choices=list(SCALES),
        help="(default full: 1 hour 30 min on 2 cores for everything)",
    )
    add(
        "--from-results",
        action="store_true",
        help="draw from the lines that are there; run nothing",
    )
    add(
        "--jobs",
        type=job.options.positive_whole,
        default=2,
        help="processes of one thread each (default 2)",
    )
    add("--results", default="results", help="folder of the lines and pictures (default results)")
    add(
        "--runs",
        default="runs/experiments",
        help="folder of the policies (default runs/experiments)",
    )
    options = parser.parse_args(argv)
    options.names = getattr(options, "names", None) or list(names)
    for name in options.names:
        if name not in names:
            parser.error(f"{name}: no such part; take one of {', '.join(names)}")
    for option in ("results", "runs"):
        path = getattr(options, option)
        if os.path.exists(path) and not os.path.isdir(path):
            parser.error(f"--{option} {path}: is no folder; give another")
    return options


def main(module, doc, parts, argv=None):
    """Runs a study's parts, all or those that the command line names; returns the exit status.

    module:
        the study's name, such as studies.table2.
    doc:
        what --help says of it.
    parts:
        {name: function of the study}.
    """
    stopping.begun()
    study = SimpleNamespace(**vars(parse(module, doc, parts, argv)))
    vars(study).update(SCALES[study.scale], version=job.versions.version(), shared={})
    study.path = os.path.join(study.results, f"{study.scale}.jsonl")
    study.folder = os.path.join(study.runs, f"{study.scale}-{study.version}")
    policies.quiet()
    study.pool = pool(study.jobs)
    try:
        study.lines = read_lines(study)
        if not study.from_results:
            study.shared = prepare(study)
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")  # in those processes
        for name in study.names:
            parts[name](study)
    except (ValueError, OSError) as error:
        print(f"{module}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{module}: stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        # What runs is waited for, what has not begun is dropped.
        study.pool.shutdown(cancel_futures=True)
    return 0
