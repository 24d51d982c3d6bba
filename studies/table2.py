"""The paper's Table 2 in form: six methods against one another, on the built-in task.

RL's tau is tuned against the supervised policy (SFT); tau and beta of every other method are chosen
against that RL policy on validation prompts, each from six runs. Then several seeds of each, every
seed against every seed on test prompts, under the panel and under the learned preference model that
they trained on. The rate falls to 0 over each run, and only ends are compared.
Run: python -m studies.table2 --scale smoke
     python -m studies.table2 --from-results    (draws from the lines of results/ alone)
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np

from studies import runs, tournament


class Choice(NamedTuple):
    """A method's best run on validation prompts."""

    win_rate: float  # over the rival it was chosen against
    run: dict  # its line
    tried: int  # runs that it was chosen from
    at_edge: bool  # whether its tau is the smallest or largest that was tried


def tune(study, losses, rival):
    """Each method's best run against a rival on validation prompts, {loss: Choice}.

    Over GRID, then with beta = 0.25 at the best tau of the methods that sample a mixture.
    """
    cells = {}
    for loss in losses:
        taus = runs.GRID[loss][: study.taus]
        cells[loss] = [runs.cell(study, loss, tau) for tau in taus]
    for loss, choice in best_runs(study, cells, rival).items():
        if runs.samples_mixture(loss):
            cells[loss].append(runs.cell(study, loss, choice.run["tau"], beta=0.25))
    return best_runs(study, cells, rival)


def best_runs(study, cells, rival):
    """The run of the highest win rate over rival, {loss: Choice}. Of equals the first."""
    todos = list(itertools.chain.from_iterable(cells.values()))
    found = runs.gather(study, runs.run_cell, todos)
    wins = runs.win_rates(study, found, rival)
    best = {}
    for run, win_rate in zip(found, wins, strict=True):
        loss = run["loss"]
        if loss not in best or win_rate > best[loss].win_rate:
            taus = runs.column(cells[loss], "tau")
            at_edge = run["tau"] in (taus.min(), taus.max())
            best[loss] = Choice(float(win_rate), run, len(cells[loss]), at_edge)
    return best


def choose(study):
    """Table 2's selection, {loss: Choice}, and the line of the RL run it was made against."""
    rl = tune(study, ["rl"], "SFT")
    rival = rl["rl"].run
    others = [loss for loss in runs.NAMES if loss != "rl"]
    return tune(study, others, rival) | rl, rival


def seed_cells(study, chosen):
    """The chosen runs of every seed, all methods of a seed before any of the next."""
    todos = []
    for seed in range(study.seeds):
        for loss in runs.NAMES:
            run = chosen[loss].run
            todos.append(runs.cell(study, loss, run["tau"], run["beta"], seed))
    return todos


def seeds_of(study, chosen):
    """The chosen run of every seed, {loss: [line by seed]}."""
    found = {loss: [] for loss in runs.NAMES}
    for line in runs.gather(study, runs.run_cell, seed_cells(study, chosen)):
        found[line["loss"]].append(line)
    return found


def play(study, seeds):
    """Every seed against every seed and SFT on test prompts.

    seeds:
        {loss: [line by seed]}, as seeds_of returns it.

    Returns {judge: {(loss, other loss or "SFT"): [seeds, seeds or 1] win rates}}, the judges
    "win_rate", the panel, and "learned".
    """
    lines = list(itertools.chain(*(seeds[loss] for loss in runs.NAMES)))
    players = [*map(runs.checkpoint, lines), "SFT"]
    line = tournament.tournament(study, "of table 2", players, lines)
    places = {}
    for number, loss in enumerate(runs.NAMES):
        places[loss] = range(number * study.seeds, (number + 1) * study.seeds)
    places["SFT"] = [len(players) - 1]
    matches = {}
    for judge in ("win_rate", "learned"):
        matrix = np.array(line[judge])
        matches[judge] = {}
        for first, second in itertools.combinations(places, 2):
            matches[judge][first, second] = matrix[np.ix_(places[first], places[second])]
    return matches


def entries(matches):
    """Table 2's numbers: mean and standard deviation over the comparisons, row against column.

    matches:
        {(loss, other loss or "SFT"): win rates}, each pair in one order, one judge's of play.

    Returns two arrays [methods, methods + 1], SFT last; 1/2 and 0 on the diagonal.
    """
    order = [*runs.NAMES, "SFT"]
    mean = np.full((len(runs.NAMES), len(order)), 0.5)
    deviation = np.zeros_like(mean)
    for (first, second), values in matches.items():
        row, column = order.index(first), order.index(second)
        mean[row, column] = values.mean()
        deviation[row, column] = values.std(ddof=1)
        if second != "SFT":
            mean[column, row] = (1 - values).mean()  # p(y' > y) = 1 - p(y > y')
            deviation[column, row] = values.std(ddof=1)
    return mean, deviation


def verdict(pair, values):
    """A line: is the mean of a pair's comparisons away from 1/2, at 95 % over seeds?

    pair:
        two methods.
    values:
        [seeds, seeds] win rates of the first over the second, a row for each seed of the first.
    """
    mean, limit = runs.crossed_interval(values)
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
    print("| method | tau | beta | runs tried | validation: against RL (RL: SFT) |")
    print("|---|---|---|---|---|")
    for loss, name in runs.NAMES.items():
        rate, run, tried, at_edge = chosen[loss]
        tau = f"{run['tau']:g}{', the edge' if at_edge else ''}"
        print(f"| {name} | {tau} | {run['beta']:g} | {tried} | {rate:.3f} |")


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


def whole_seeds(seeds):
    """The seeds of each method that did not collapse, {loss: [number]}.

    Collapsed: fewer than nine in ten of the answers to validation prompts are different.
    """
    found = {}
    for loss, lines in seeds.items():
        found[loss] = []
        for number, line in enumerate(lines):
            if line["points"][-1]["distinct"] >= 0.9:
                found[loss].append(number)
    return found


def print_whole(matches, kept, count):
    """The verdicts without the seeds that collapsed, if there are any: chosen by a look at the
    runs' ends, so no test of the protocol."""
    gone = []
    for loss, numbers in kept.items():
        missing = [str(number) for number in range(count) if number not in numbers]
        if missing:
            gone.append(f"{runs.NAMES[loss]} seed {', '.join(missing)}")
    if not gone or min(map(len, kept.values())) < 2:
        return
    print(f"\nwithout the collapsed ({'; '.join(gone)}):")
    for pair in itertools.combinations(runs.NAMES, 2):
        print(verdict(pair, matches[pair][np.ix_(kept[pair[0]], kept[pair[1]])]))


def table2(study):
    """Prints what was chosen, Table 2 under both judges, and which pairs are separated."""
    chosen, _ = choose(study)
    seeds = seeds_of(study, chosen)
    matches = play(study, seeds)
    print_choice(chosen)
    print_entries("panel", *entries(matches["win_rate"]))
    print_entries("learned model", *entries(matches["learned"]))
    print()
    for pair in itertools.combinations(runs.NAMES, 2):
        print(verdict(pair, matches["win_rate"][pair]))
    print_whole(matches["win_rate"], whole_seeds(seeds), study.seeds)


PARTS = dict(table2=table2)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.table2", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
