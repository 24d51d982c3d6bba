"""Does sampled training arrive? The first rung: enumerated.py's GPT-2, where the point is known.

Each cell trains by a method's real loss on responses of the real sampler, its rate falling: each y
with a y' of its own, or with every y' (enumerated.sampled_loss: crossed). It is held against the
solved point of eq 12 (eq 13 with the sampler's per-token mixture) by enumeration: the regression of
equilibrium.py, weighted by pi, without noise, and the total variation. Where it arrives, slopes and
R2 are 1 and the total variation is 0. Seconds are of a processor, whatever else it had to do.
A cell is a line of results/rungs.jsonl, appended as it finishes: the same command goes on where it
was stopped.
Left out: rungs above this one, where the point is not known.
Run: python -m studies.rungs                   (10 min on 2 cores; results/rungs.png)
     python -m studies.rungs --scale long      (also 512 pairs a prompt: half an hour)
     python -m studies.rungs --scale smoke     (half a minute)
     python -m studies.rungs --from-results    (the table and picture from the lines alone)
"""

import argparse
import os
import sys
import time
from types import SimpleNamespace

import job  # before torch: it sets how torch's threads wait

# isort: split

import torch

import bandit
import enumerated
import equilibrium
import job.report
import stopping
from enumerated import per_token_mixture
from job.options import fail, find_method, positive_whole
from studies import runs

# Of a line. Raise it when a number of enumerated.train changes; job/versions.py is about train.py.
VERSION = 2
TAU = 0.1
METHODS = (("ipo", 0.0), ("nash_md", 0.0), ("ipo_md", 0.125), ("nash_md", 0.125))  # and beta
# Samples of y (and as many of y') a prompt and step, steps, whether each y meets every y'.
SCALES = {
    "smoke": ((8, 40, False), (8, 40, True)),
    "full": ((64, 600, False), (64, 3000, False), (64, 600, True), (64, 3000, True)),
    "long": (
        (64, 600, False),
        (64, 3000, False),
        (64, 600, True),
        (64, 3000, True),
        (512, 1500, False),
    ),
}
POINTS = 30  # of a line, about


def pair_noise(method, log_pi, log_ref, preferences, tau):
    """The variance of a sampled gradient on the logits of one prompt, y and y' both from pi.

    method:
        PAIR and loss, such as ipo.
    log_pi, log_ref:
        [n], nats.
    preferences:
        [n, n].
    tau:
        above 0.

    Returns (of one pair, the part of it that is of y alone, the part that is of y' alone), three
    numbers. K pairs have a K-th of the first; each of K y with each of K y' has a K-th of the other
    two and a K^2-th of the rest.
    """
    size = len(log_pi)
    logp = log_pi[:, None].repeat(1, size).requires_grad_(True)
    logp_other = log_pi[None].repeat(size, 1).requires_grad_(True)
    value = method.loss(logp, logp_other, log_ref[:, None], log_ref[None], preferences, tau).sum()
    slopes = torch.autograd.grad(value, (logp, logp_other), materialize_grads=True)
    pi = log_pi.exp()
    scores = torch.eye(size, dtype=pi.dtype) - pi  # of each response, on the logits
    gradient = slopes[0][..., None] * scores[:, None] + slopes[1][..., None] * scores[None]
    gradient = gradient - torch.einsum("i,j,ijk->k", pi, pi, gradient)
    whole = torch.einsum("i,j,ijk->", pi, pi, gradient**2)
    of_y = (torch.einsum("j,ijk->ik", pi, gradient) ** 2).sum(1) @ pi
    of_other = (torch.einsum("i,ijk->jk", pi, gradient) ** 2).sum(1) @ pi
    return whole.item(), of_y.item(), of_other.item()


def noise_table():
    """How much of a pair's noise is of one response alone, at the solved point, first prompt."""
    w = enumerated.world(0)
    target = enumerated.solve(w, TAU)[0]
    print("| at Nash, tau 0.1 | of one response alone | 64 x 64 crossed over 64 pairs |")
    print("|---|---|---|")
    for name in ("ipo", "nash_md"):
        given = find_method(name), target, w.log_ref[0], w.preferences[0], TAU
        whole, *alone = pair_noise(*given)
        crossed = sum(alone) / 64 + (whole - sum(alone)) / 64**2
        share = sum(alone) / whole
        print(f"| {runs.NAMES[name]} | {share:.3f} | {crossed / (whole / 64):.3f} |")
    print()


def cells(scale, seeds):
    """What is to do: every cell with the first seed before any with a second."""
    found = []
    for seed in range(seeds):
        for pairs, steps, crossed in SCALES[scale]:
            for method, beta in METHODS:
                name = f"enumerated: {method} beta {beta:g} {pairs}x{steps}"
                name += f"{' crossed' if crossed else ''} seed {seed}"
                how = dict(pairs=pairs, steps=steps, crossed=crossed, seed=seed)
                found.append(dict(name=name, method=method, beta=beta, **how))
    return found


def distances(w, log_pi, beta, target, tau=TAU):
    """How far a policy [2, 85] is from the solved point, by enumeration, both prompts together."""
    opponent = per_token_mixture(log_pi, w.log_ref, beta)
    p = bandit.win_rate(w.preferences, opponent)
    # Exact p twice: there is no noise that two sets of opponents would have to average out.
    moments = equilibrium.moments(p, p, log_pi - w.log_ref, tau, log_pi.exp())
    gaps = []
    for preferences, log_ref, law in zip(w.preferences, w.log_ref, log_pi, strict=True):
        gaps.append(bandit.duality_gap(law, preferences, log_ref, tau))
    row = torch.cat([moments.mean(0), torch.stack(gaps).mean(0, keepdim=True)])
    slope, slope_back, r2, gap = equilibrium.statistics(row).tolist()
    away = bandit.total_variation(log_pi, target).mean().item()
    return dict(slope=slope, slope_back=slope_back, r2=r2, total_variation=away, gap=gap)


def run_cell(todo):
    """Trains a cell. Returns its line: its distances over the steps, and its seconds."""
    w = enumerated.world(0)
    beta = todo["beta"]
    # The sampler draws the per-token mixture, whose point is not the sequence-level one's.
    target = enumerated.solve(w, TAU, beta, per_token_mixture)
    how = {name: todo[name] for name in ("steps", "pairs", "crossed", "seed")}
    begun = time.process_time()
    path = enumerated.train(w, find_method(todo["method"]), TAU, beta, **how)
    points = []
    every = max(1, todo["steps"] // 20 // POINTS)
    for number, log_pi in enumerate(path, 1):
        step = min(20 * number, todo["steps"])  # train yields every 20 steps and at the end
        if number % every == 0 or step == todo["steps"]:
            points.append(dict(step=step, **distances(w, log_pi, beta, target)))
    return dict(todo, tau=TAU, seconds=time.process_time() - begun, points=points)


def compared(line):
    """How many pairs a prompt and step a line's samples make."""
    return line["pairs"] ** 2 if line["crossed"] else line["pairs"]


def table(lines):
    """Prints where each cell ended, a row a cell."""
    print("| method | beta | samples | pairs | steps ", end="")
    print("| seed | slope | back | R2 | TV | gap | seconds |")
    print("|---" * 12 + "|")
    for line in lines:
        end = line["points"][-1]
        cell = f"| {runs.NAMES[line['method']]} | {line['beta']:g} "
        cell += f"| {line['pairs']} | {compared(line)} | {line['steps']} | {line['seed']} "
        slopes = f"| {end['slope']:.3f} | {end['slope_back']:.3f} | {end['r2']:.3f} "
        away = f"| {end['total_variation']:.3f} | {end['gap']:.4f} "
        print(f"{cell}{slopes}{away}| {line['seconds']:.0f} |")


def panels(lines):
    """Slopes, R2 and total variation over the steps, for job.report.plot: the longest runs, of the
    first seed."""
    longest = max(line["steps"] for line in lines)
    shown = [line for line in lines if (line["steps"], line["seed"]) == (longest, 0)]
    found = []
    for title, key in (
        ("slope of p on tau d", "slope"),
        ("slope of tau d on p", "slope_back"),
        ("R2", "r2"),
        ("total variation", "total_variation"),
    ):
        series = {}
        for line in shown:
            label = f"{runs.NAMES[line['method']]} {line['beta']:g}, {compared(line)} pairs"
            steps = runs.column(line["points"], "step")
            series[label] = steps, runs.column(line["points"], key)
        found.append((title, "step", key, series))
    return found


def lines_path(study):
    """The file of this study's lines: full's are long's, too."""
    return os.path.join(study.results, f"rungs{runs.suffix(study.scale)}.jsonl")


def parse(argv):
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.rungs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail  # one line without the usage
    add = parser.add_argument
    add("--scale", default="full", choices=list(SCALES), help="(default full)")
    add("--seeds", type=positive_whole, default=1, help="of each cell (default 1)")
    add("--from-results", action="store_true", help="use the lines that are there; run nothing")
    add("--jobs", type=positive_whole, default=2, help="processes of one thread (default 2)")
    add("--results", default="results", help="folder of lines and picture (default results)")
    return parser.parse_args(argv)


def main(argv=None):
    """The command; returns the exit status."""
    stopping.begun()
    pool = None
    try:
        study = SimpleNamespace(**vars(parse(argv)), version=VERSION)
        study.path = lines_path(study)
        study.lines = runs.read_lines(study)
        pool = study.pool = runs.pool(study.jobs)
        lines = runs.gather(study, run_cell, cells(study.scale, study.seeds))
        noise_table()
        table(lines)
        picture = os.path.join(study.results, f"rungs{runs.suffix(study.scale)}.png")
        job.report.plot(picture, panels(lines))
    except (ValueError, OSError) as error:
        print(f"studies.rungs: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studies.rungs: stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        if pool is not None:  # what runs is waited for, what has not begun is dropped
            pool.shutdown(cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
