"""Every loss of the project on the built-in task, beside the paper's six.

once: one run each at its defaults, a look at what each does in the default's 200 steps.
best: two more taus, a third and three times the default; two more seeds of the tau whose win rate
is best on validation prompts under the learned model, which is all that a user has; then, on test
prompts, each of the three seeds against the start and against Table 2's six, and the bound of its
exploitability in the game of tau 0.1. The panel is the truth.
Offline runs learn from recorded pairs of the start's responses.
Left out: a rate of each one's own; nothing but the paper's six was tuned for this task.
Run: python -m studies.survey once            (about 25 min on 2 cores)
     python -m studies.survey                 (6 h on 2 cores)
     python -m studies.survey --from-results  (the tables from the lines of results/ alone)
"""

import functools
import sys

import job.options  # before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch

import data
import evaluate
import preference_model
from studies import exploitability, runs, same_tau, table2, tournament

FACTORS = (1 / 3, 3)  # of the default tau
SEEDS = 3
CHUNK = 100  # prompts at a time


# ---- one run each ----


def cell(study, loss, offline, tau=None, seed=0):
    """A run to do at a method's defaults; what the built-in stages are is the study's.

    tau:
        None for the method's own.
    """
    argv = ["--loss", loss, *(["--offline"] if offline else [])]
    name = f"survey: {loss}{' offline' if offline else ''}"
    if tau is None:
        tau = job.options.find_method(loss).TAU
    else:
        argv += ["--tau", str(tau)]
        name += f" tau {tau:g}"
    if seed:
        argv += ["--seed", str(seed)]
        name += f" seed {seed}"
    return runs.short_cell(study, name, argv, loss=loss, tau=tau, offline=offline, seed=seed)


def kinds():
    """(loss, offline) of every row: all methods, and offline where that is a method's."""
    found = []
    for loss in job.options.method_names():
        found.append((loss, False))
        if job.options.find_method(loss).OFFLINE:
            found.append((loss, True))
    return found


def cells(study):
    """What once does."""
    return [cell(study, *kind) for kind in kinds()]


def pairs_of(line):
    """What a run learned from, as its row says it."""
    return "recorded" if line["offline"] else "own"


def once(study):
    """All methods at their defaults."""
    print("| method | tau | pairs | win rate (se) | KL | length | distinct | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for line in runs.gather(study, runs.run_to_end, cells(study)):
        rate = f"{line['win_rate']:.3f} ({line['win_rate_se']:.3f})"
        print(
            f"| {line['loss']} | {line['tau']:g} | {pairs_of(line)} | {rate} | {line['kl']:.2f} "
            f"| {line['length']:.1f} | {line['distinct']:.3f} | {line['seconds']:.0f} |"
        )


# ---- three taus, then three seeds of the best ----


def tau_cells(study):
    """The runs at other taus than the defaults, of one seed."""
    found = []
    for loss, offline in kinds():
        own = job.options.find_method(loss).TAU
        for factor in FACTORS:
            found.append(cell(study, loss, offline, float(f"{own * factor:.2g}")))
    return found


def choose(study):
    """The best of each row's three taus by the learned model, lines in kinds()' order."""
    tried = runs.gather(study, runs.run_to_end, [*cells(study), *tau_cells(study)])
    best = {}
    for line in tried:
        kind = line["loss"], line["offline"]
        if kind not in best or line["learned"] > best[kind]["learned"]:
            best[kind] = line
    return list(best.values())


def seed_cells(study, chosen):
    """The chosen runs' further seeds, all rows with one before any with the next."""
    found = []
    for seed in range(1, SEEDS):
        for line in chosen:
            # None where it is the default: the name of a run says what was given.
            own = job.options.find_method(line["loss"]).TAU
            tau = None if line["tau"] == own else line["tau"]
            found.append(cell(study, line["loss"], line["offline"], tau, seed))
    return found


@functools.cache
def rivals(folder, names):
    """The models of some policies, kept by a process. folder, names: as runs.load_policy has."""
    return [runs.load_policy(dict(folder=folder, shared={}), name) for name in names]


@torch.no_grad()
def meet(todo):
    """A policy's line: the win rate over each rival under the panel and the learned model, from one
    response of each to each test prompt, its KL, length and share of different responses."""
    there, task = todo["where"], data.BuiltIn()
    learned = preference_model.load(there["shared"]["learned"])
    policy, start = runs.load_policy(there, todo["policy"]), runs.load_policy(there, "SFT")
    players = [policy, start, *rivals(there["folder"], tuple(todo["rivals"]))]
    wins = dict(win_rate=[], learned=[])
    log_ratios, kept = [], []
    for step in range(-(-there["prompts"] // CHUNK)):  # rounded up
        size = min(CHUNK, there["prompts"] - step * CHUNK)
        prompt = task.prompts("test", step, CHUNK).rows(slice(0, size))
        # The policy is the last player of all: no rival's uniforms are its own.
        places = [len(players), *range(len(players) - 1)]
        answers = []
        for model, place in zip(players, places, strict=True):
            answers.append(tournament.answer(model, task, prompt, "test", step, place))
        own, *read = [learned.read(prompt, answer) for answer in answers]  # each once
        won = [task.judge(prompt, answers[0], other).double() for other in answers[1:]]
        wins["win_rate"].append(torch.stack(won, 1))
        won = [torch.sigmoid(learned.compare_vectors(own, other)).double() for other in read]
        wins["learned"].append(torch.stack(won, 1))
        log_ratios.append(evaluate.log_ratio(policy, start, prompt, answers[0]).double())
        kept += answers[0].lists()
    line = runs.line_of(todo)
    for name, parts in wins.items():
        line[name] = torch.cat(parts).mean(0).tolist()  # over the start, then over each rival
    line["kl"] = torch.cat(log_ratios).mean().item()
    line["length"] = float(np.mean([len(ids) for ids in kept]))
    line["distinct"] = len(set(map(tuple, kept))) / len(kept)
    return line


def six(study):
    """Table 2's runs of seed 0, lines in the order of runs.NAMES."""
    chosen = table2.choose(study)[0]
    return [table2.seeds_of(study, chosen)[loss][0] for loss in runs.NAMES]


def meetings(study, lines, sixth):
    """What is to do with the policies of some runs: their meetings and their bounds."""
    met, bounds = [], []
    for line in lines:
        policy = runs.end_of(line)
        where = runs.where(study, study.test)
        names = [runs.end_of(rival) for rival in sixth]
        met.append(dict(name=f"met: {policy}", policy=policy, rivals=names, where=where))
        bounds.append(same_tau.residual_of(study, policy, exploitability.TAU, 0.0))
    return met, bounds


def row(name, own, met, bounds):
    """A method's numbers over its seeds, as best prints them."""
    wins = np.array([line["win_rate"] for line in met])
    least = wins[:, 1:].mean(0)
    worst = int(least.argmin())
    gap, half = runs.interval([line["exploitability"] for line in bounds])
    return dict(
        name=name,
        tau=own["tau"],
        pairs=pairs_of(own),
        win=wins[:, 0].mean(),
        low=wins[:, 0].min(),
        high=wins[:, 0].max(),
        learned=np.mean([line["learned"][0] for line in met]),
        kl=runs.column(met, "kl").mean(),
        length=runs.column(met, "length").mean(),
        distinct=runs.column(met, "distinct").mean(),
        worst=least[worst],
        rival=list(runs.NAMES.values())[worst],
        gap=gap,
        half=half,
    )


def best(study):
    """Three taus, the best one's three seeds, and what they are worth: table and picture."""
    chosen = choose(study)
    more = runs.gather(study, runs.run_to_end, seed_cells(study, chosen))
    lines, sixth = [*chosen, *more], six(study)
    met, bounds = meetings(study, lines, sixth)
    runs.run_again(study, [*met, *bounds], [*lines, *sixth])
    met = runs.gather(study, meet, met)
    bounds = runs.gather(study, same_tau.residual, bounds)
    rows = []
    for number, own in enumerate(chosen):
        seeds = slice(number, None, len(chosen))
        rows.append(row(own["loss"], own, met[seeds], bounds[seeds]))
    print_best(rows)
    plot(study, rows)


def print_best(rows):
    """The table of best."""
    print(
        "| method | tau | pairs | win rate, panel (least to most) | learned | KL | length ", end=""
    )
    print("| distinct | worst of the six | exploitability |")
    print("|---" * 10 + "|")
    for one in rows:
        print(
            f"| {one['name']} | {one['tau']:g} | {one['pairs']} | {one['win']:.3f} "
            f"({one['low']:.3f} to {one['high']:.3f}) | {one['learned']:.3f} | {one['kl']:.2f} "
            f"| {one['length']:.1f} | {one['distinct']:.3f} | {one['worst']:.3f}, {one['rival']} "
            f"| {one['gap']:.3f} +- {one['half']:.3f} |"
        )


def plot(study, rows):
    """survey.png: win rate over KL, a mark the larger the longer the responses."""
    from matplotlib.figure import Figure  # here: only the picture needs it

    figure = Figure(figsize=(9, 6))
    axis = figure.subplots()
    for pairs, colour in (("own", "tab:blue"), ("recorded", "tab:orange")):
        part = [one for one in rows if one["pairs"] == pairs]
        sizes = [8 * one["length"] for one in part]
        x, y = [one["kl"] for one in part], [one["win"] for one in part]
        axis.scatter(x, y, sizes, color=colour, alpha=0.5, label=f"{pairs} pairs")
        for one in part:
            axis.annotate(one["name"], (one["kl"], one["win"]), fontsize=7)
    axis.axhline(0.5, color="grey", linewidth=0.5)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlabel("KL(pi, start), nats")
    axis.set_ylabel("win rate over the start (panel)")
    axis.set_title("every loss, three seeds; the area of a mark is its length")
    axis.legend()
    figure.tight_layout()
    figure.savefig(f"{study.results}/survey{runs.suffix(study.scale)}.png", dpi=110)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.survey", __doc__, dict(once=once, best=best), argv)


if __name__ == "__main__":
    sys.exit(main())
