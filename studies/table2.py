"""The paper's Table 2 in form: six methods against one another, on the built-in task.

RL is tuned against the supervised policy (SFT); tau, beta and checkpoint of every other method are
chosen against that RL policy on validation prompts, with one budget. Then several seeds of each,
every seed against every seed on test prompts, under the panel and under the learned preference
model that they trained on.
Run: python -m studies.table2 --scale smoke
     python -m studies.table2 --from-results    (draws from the lines of results/ alone)
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np

from studies import runs

# Student's t of 2 (seeds - 1) degrees of freedom, 97.5 %, by the number of seeds.
STUDENT = {2: 4.303, 3: 2.776}


class Choice(NamedTuple):
    """A method's best checkpoint on validation prompts."""

    win_rate: float  # over the rival it was chosen against
    number: int  # of the checkpoint, from 0
    run: dict  # the line of its run
    tried: int = 0  # runs that it was chosen from


def tune(study, losses, rival):
    """Each method's best checkpoint against a rival on validation prompts, {loss: Choice}.

    Over GRID, extended while the best tau is at its edge, then with beta = 0.25 at the best tau of
    the methods that sample a mixture.
    """
    cells = {}
    for loss in losses:
        taus = runs.GRID[loss][: study.taus]
        cells[loss] = [runs.cell(study, loss, tau) for tau in taus]
    for _ in range(study.extend):
        for loss, choice in best_checkpoints(study, cells, rival).items():
            taus = runs.column(cells[loss], "tau")
            tau = choice.run["tau"]
            if tau == taus.min():
                cells[loss].append(runs.cell(study, loss, tau / 2))
            elif tau == taus.max():
                cells[loss].append(runs.cell(study, loss, tau * 2))
    for loss, choice in best_checkpoints(study, cells, rival).items():
        if runs.samples_mixture(loss):
            cells[loss].append(runs.cell(study, loss, choice.run["tau"], beta=0.25))
    return best_checkpoints(study, cells, rival)


def best_checkpoints(study, cells, rival):
    """The checkpoint of the highest win rate over rival, {loss: Choice}. Of equals the first."""
    todos = list(itertools.chain.from_iterable(cells.values()))
    found = []
    for run in runs.gather(study, runs.run_cell, todos):
        for number in range(len(run["points"])):
            found.append((run, number))
    pairs = [(runs.checkpoint(run, number), rival) for run, number in found]
    best = {}
    for (run, number), line in zip(found, runs.against(study, pairs), strict=True):
        loss = run["loss"]
        if loss not in best or line["win_rate"] > best[loss].win_rate:
            best[loss] = Choice(line["win_rate"], number, run, len(cells[loss]))
    return best


def choose(study):
    """Table 2's selection, {loss: Choice}, and the RL checkpoint it was made against."""
    rl = tune(study, ["rl"], "SFT")
    rival = runs.checkpoint(rl["rl"].run, rl["rl"].number)
    others = [loss for loss in runs.NAMES if loss != "rl"]
    return tune(study, others, rival) | rl, rival


def seeds_of(study, chosen):
    """The chosen checkpoint of every seed, {loss: [checkpoint by seed]}."""
    found = {}
    for loss, choice in chosen.items():
        tau = choice.run["tau"]
        beta = choice.run["beta"]
        todos = [runs.cell(study, loss, tau, beta, seed) for seed in range(study.seeds)]
        lines = runs.gather(study, runs.run_cell, todos)
        found[loss] = [runs.checkpoint(line, choice.number) for line in lines]
    return found


def play(study, seeds):
    """Every seed against every seed on test prompts, {(loss, other loss or "SFT"): lines}.

    seeds:
        {loss: [checkpoint by seed]}, as seeds_of returns it.

    Lines of two methods come by the first one's seed, then by the second one's.
    """
    matches = {}
    for first, second in itertools.combinations(runs.NAMES, 2):
        pairs = list(itertools.product(seeds[first], seeds[second]))
        matches[first, second] = runs.against(study, pairs, "test")
    for loss in runs.NAMES:
        pairs = [(checkpoint, "SFT") for checkpoint in seeds[loss]]
        matches[loss, "SFT"] = runs.against(study, pairs, "test")
    return matches


def entries(matches, judge):
    """Table 2's numbers: mean and standard deviation over the comparisons, row against column.

    matches:
        {(loss, other loss or "SFT"): lines}, each pair in one order, as play returns it.
    judge:
        "win_rate" for the panel, "learned" for the learned model.

    Returns two arrays [methods, methods + 1], SFT last; 1/2 and 0 on the diagonal.
    """
    order = [*runs.NAMES, "SFT"]
    mean = np.full((len(runs.NAMES), len(order)), 0.5)
    deviation = np.zeros_like(mean)
    for (first, second), lines in matches.items():
        values = runs.column(lines, judge)
        row, column = order.index(first), order.index(second)
        mean[row, column] = values.mean()
        deviation[row, column] = values.std(ddof=1)
        if second != "SFT":
            mean[column, row] = (1 - values).mean()  # p(y' > y) = 1 - p(y > y')
            deviation[column, row] = values.std(ddof=1)
    return mean, deviation


def verdict(pair, values):
    """A line: is the mean of a pair's comparisons away from 1/2, at 95 %?

    pair:
        two methods.
    values:
        [seeds, seeds] win rates of the first over the second, a row for each seed of the first.

    The comparisons share seeds, so their deviation is no standard error. That of the mean is
    se^2 = (var(row means) + var(column means))/seeds, with 2 (seeds - 1) degrees of freedom.
    """
    seeds = len(values)
    mean = values.mean()
    rows = values.mean(1)
    columns = values.mean(0)
    variance = rows.var(ddof=1) + columns.var(ddof=1)
    se = np.sqrt(variance / seeds)
    limit = STUDENT[seeds] * se
    first = runs.NAMES[pair[0]]
    second = runs.NAMES[pair[1]]
    if abs(mean - 0.5) <= limit:
        what = "not separated"
    elif mean > 0.5:
        what = f"{first} wins"
    else:
        what = f"{second} wins"
    return f"{first} over {second}: {mean:.3f} +- {limit:.3f} (95 %): {what}"


def print_choice(chosen):
    """A row for each method: what was chosen, and from how many runs."""
    print("| method | tau | beta | steps | runs tried | validation: against RL (RL: SFT) |")
    print("|---|---|---|---|---|---|")
    for loss, name in runs.NAMES.items():
        rate, number, run, tried = chosen[loss]
        tau = run["tau"]
        beta = run["beta"]
        steps = run["points"][number]["step"]
        print(f"| {name} | {tau:g} | {beta:g} | {steps} | {tried} | {rate:.3f} |")


def print_entries(title, mean, deviation):
    """Table 2 under one judge: mean (standard deviation)."""
    names = list(runs.NAMES.values())
    print()
    print(f"| {title} | {' | '.join(names)} | SFT |")
    print("|---" * (len(names) + 2) + "|")
    for row, name in enumerate(names):
        numbers = zip(mean[row], deviation[row], strict=True)
        texts = [f"{m:.3f} ({s:.3f})" for m, s in numbers]
        texts[row] = "0.500"  # by definition: no method played against itself
        print(f"| {name} | {' | '.join(texts)} |")


def table2(study):
    """Prints what was chosen, Table 2 under both judges, and which pairs are separated."""
    chosen, _ = choose(study)
    matches = play(study, seeds_of(study, chosen))
    print_choice(chosen)
    print_entries("panel", *entries(matches, "win_rate"))
    print_entries("learned model", *entries(matches, "learned"))
    print()
    for pair in itertools.combinations(runs.NAMES, 2):
        values = runs.column(matches[pair], "win_rate")
        print(verdict(pair, values.reshape(study.seeds, study.seeds)))


PARTS = dict(table2=table2)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.table2", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
