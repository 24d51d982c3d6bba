"""Every loss of the project on the built-in task, beside the paper's six.

once: one run each at its defaults, a look at what each does in the default's 200 steps.
best: two more taus, a third and three times the default; more seeds of the tau whose win rate is
best on validation prompts under the learned model, which is all that a user has; then, on test
prompts, each seed against the start and against Table 2's six, and the bound of its exploitability
in the game of tau 0.1, asked of the start's responses. The panel is the truth. From the lines alone
the table is of the seeds that have all of theirs.
Offline runs learn from recorded pairs of the start's responses.
Left out: a rate of each one's own; nothing but the paper's six was tuned for this task.
Run: python -m studies.survey once            (about 25 min on 2 cores)
     python -m studies.survey                 (5 h on 2 cores)
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
LEAST_KL = 0.1  # of the picture: an estimate of next to nothing may be below 0
CROWD = 0.73  # from this win rate on the picture shows the methods once more, larger


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


def seed_cells(study, chosen, seed):
    """The chosen runs with a seed; those of 0 are there already."""
    found = []
    for line in chosen:
        # None where it is the default: the name of a run says what was given.
        own = job.options.find_method(line["loss"]).TAU
        tau = None if line["tau"] == own else line["tau"]
        found.append(cell(study, line["loss"], line["offline"], tau, seed))
    return found


@functools.cache
def models(folder, start, learned, names):
    """The learned model and the others, the start and some rivals, all kept by a process.

    folder, start, learned, names:
        of the runs; of the supervised policy; of the preference model; the rivals', as
        runs.load_policy has them.
    """
    there = dict(folder=folder, shared=dict(SFT=start))
    others = [runs.load_policy(there, name) for name in ("SFT", *names)]
    return preference_model.load(learned), others


@functools.cache
@torch.no_grad()
def said_by_others(folder, start, learned, names, step, size):
    """What the others say to a chunk of test prompts, kept by a process: the same to every policy.

    The first four arguments are those of models.

    step, size:
        the chunk's number, and how many prompts it has.

    Returns a list of (answer, what the learned model reads in it).
    """
    task = data.BuiltIn()
    model, others = models(folder, start, learned, names)
    prompt = task.prompts("test", step, CHUNK).rows(slice(0, size))
    found = []
    for place, player in enumerate(others):
        said = tournament.answer(player, task, prompt, "test", step, place)
        found.append((said, model.read(prompt, said)))
    return found


@torch.no_grad()
def meet(todo):
    """A policy's line: the win rate over each rival under the panel and the learned model, from one
    response of each to each test prompt, its KL, length and share of different responses."""
    there, task = todo["where"], data.BuiltIn()
    shared = there["shared"]
    given = there["folder"], shared["SFT"], shared["learned"], tuple(todo["rivals"])
    learned, (start, *_) = models(*given)
    policy = runs.load_policy(there, todo["policy"])
    wins = dict(win_rate=[], learned=[])
    log_ratios, kept = [], []
    for step in range(-(-there["prompts"] // CHUNK)):  # rounded up
        size = min(CHUNK, there["prompts"] - step * CHUNK)
        prompt = task.prompts("test", step, CHUNK).rows(slice(0, size))
        said = said_by_others(*given, step, size)
        # The policy is the last player of all: no rival's uniforms are its own.
        place = len(said) + 1
        answer = tournament.answer(policy, task, prompt, "test", step, place)
        own = learned.read(prompt, answer)
        won = [task.judge(prompt, answer, other).double() for other, _ in said]
        wins["win_rate"].append(torch.stack(won, 1))
        won = [torch.sigmoid(learned.compare_vectors(own, read)).double() for _, read in said]
        wins["learned"].append(torch.stack(won, 1))
        log_ratios.append(evaluate.log_ratio(policy, start, prompt, answer).double())
        kept += answer.lists()
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


def meetings(study, cells_or_lines, sixth):
    """What is to do with the policies of some runs: their meetings and their bounds."""
    met, bounds = [], []
    for one in cells_or_lines:
        policy = runs.end_of(one)
        where = runs.where(study, study.test)
        names = [runs.end_of(rival) for rival in sixth]
        met.append(dict(name=f"met: {policy}", policy=policy, rivals=names, where=where))
        # Among its own responses a policy that has lost its support seems at rest.
        game = exploitability.TAU, 0.0, "learned", "reference"
        bounds.append(same_tau.residual_of(study, policy, *game))
    return met, bounds


def row(name, own, met, bounds):
    """A method's numbers over its seeds, as best prints them."""
    wins = np.array([line["win_rate"] for line in met])
    least = wins[:, 1:].mean(0)
    worst = int(least.argmin())
    return dict(
        name=name,
        tau=own["tau"],
        pairs=pairs_of(own),
        wins=wins[:, 0],
        learned=np.array([line["learned"][0] for line in met]),
        kl=runs.column(met, "kl"),
        length=runs.column(met, "length"),
        distinct=runs.column(met, "distinct").mean(),
        worst=least[worst],
        rival=list(runs.NAMES.values())[worst],
        gaps=runs.column(bounds, "exploitability"),
    )


def best(study):
    """Three taus, the best one's three seeds, and what they are worth: table and picture."""
    chosen, sixth = choose(study), six(study)
    met, bounds = [], []
    for seed in range(SEEDS):  # all that there is of one before any of the next
        asked = seed_cells(study, chosen, seed)
        their_met, their_bounds = meetings(study, asked, sixth)
        wanted = [*asked, *their_met, *their_bounds]
        if study.from_results and not all(one["name"] in study.lines for one in wanted):
            break  # not run yet: the table says of how many seeds it is
        lines = runs.gather(study, runs.run_to_end, asked)
        runs.run_again(study, [*their_met, *their_bounds], [*lines, *sixth])
        met += runs.gather(study, meet, their_met)
        bounds += runs.gather(study, same_tau.residual, their_bounds)
    if not met:
        raise ValueError(f"{study.path}: no seed has all of its lines")
    rows = []
    for number, own in enumerate(chosen):
        seeds = slice(number, None, len(chosen))
        rows.append(row(own["loss"], own, met[seeds], bounds[seeds]))
    print_best(rows)
    print(f"\nSeeds: {len(met) // len(chosen)} of {SEEDS}.")
    plot(study, rows)


def over_seeds(values, digits=3):
    """The mean of a number of each seed, and of several seeds the least and the most: where a run
    in three collapses, the mean is of nothing that one would see."""
    mean, least, most = (f"{f(values):.{digits}f}" for f in (np.mean, np.min, np.max))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def print_best(rows):
    """The table of best."""
    print("| method | tau | pairs | win rate, panel | learned | KL | length | distinct ", end="")
    print("| worst of the six | exploitability |")
    print("|---" * 10 + "|")
    for one in rows:
        length = one["length"].mean()
        print(
            f"| {one['name']} | {one['tau']:g} | {one['pairs']} | {over_seeds(one['wins'])} "
            f"| {over_seeds(one['learned'])} | {over_seeds(one['kl'], 2)} | {length:.1f} "
            f"| {one['distinct']:.3f} | {one['worst']:.3f}, {one['rival']} "
            f"| {over_seeds(one['gaps'])} |"
        )


def plot(study, rows):
    """survey.png: win rate over KL, a mark a seed, the larger the longer the responses; beside it,
    larger, those that win most."""
    from matplotlib.figure import Figure  # here: only the picture needs it

    figure = Figure(figsize=(13, 6))
    everyone, crowd = figure.subplots(1, 2)
    for axis in (everyone, crowd):
        scatter(axis, rows)
        axis.set_xlabel("KL(pi, start), nats")
    everyone.set_xscale("log")
    everyone.axhline(0.5, color="grey", linewidth=0.5)
    everyone.set_title("best of three taus; a mark a seed, joined; its area is the length")
    everyone.set_ylabel("win rate over the start (panel)")
    everyone.legend()
    wins = np.concatenate([one["wins"] for one in rows])
    kl = np.concatenate([one["kl"] for one in rows])
    if (wins >= CROWD).any():  # a small scale may have nobody there: then it is the same again
        crowd.set_ylim(CROWD, wins.max() + 0.01)
        crowd.set_xlim(kl[wins >= CROWD].min() - 0.5, kl[wins >= CROWD].max() + 0.5)
    crowd.set_title(f"the runs that win {CROWD:g} and more")
    figure.tight_layout()
    figure.savefig(f"{study.results}/survey{runs.suffix(study.scale)}.png", dpi=110)


def scatter(axis, rows):
    """A mark for each seed of each row, joined, and a name at the one that wins most."""
    colours = dict(own="tab:blue", recorded="tab:orange")
    for pairs, colour in colours.items():
        axis.scatter([], [], color=colour, alpha=0.5, label=f"{pairs} pairs")
    for one in rows:
        kl = one["kl"].clip(LEAST_KL)
        colour = colours[one["pairs"]]
        axis.scatter(kl, one["wins"], 8 * one["length"], color=colour, alpha=0.5)
        axis.plot(kl, one["wins"], color=colour, alpha=0.3, linewidth=0.8)
        best = one["wins"].argmax()
        axis.annotate(one["name"], (kl[best], one["wins"][best]), fontsize=7)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.survey", __doc__, dict(once=once, best=best), argv)


if __name__ == "__main__":
    sys.exit(main())
