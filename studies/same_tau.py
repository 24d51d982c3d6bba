"""Same tau, same equilibrium? Do two methods with one fixed point end where noise cannot part them?

Online IPO and Nash-MD-PG at beta = 0 share the Nash equilibrium, IPO-MD and Nash-MD-PG at beta =
0.125 the point of eq 13. Several seeds of each, at two taus, on three rungs: enumerated.py's GPT-2,
where sampled training arrives (studies.rungs); posts of one fact at one tau (studies.middle), where
it nearly does; and the built-in task, where it does not.
The distance of two policies is KL + KL back, nats: exact on the first two rungs, on the second of
laws conditioned on what the start says, from fresh samples on the third. The statistic is the mean
distance between the methods less the mean within them. It is 0 in expectation for equal laws of
ends, whatever their spread; its error is jackknifed over seeds.
  equal      its upper 95 % limit is below half the mean within, both slopes of eq 12's regression
             are within 0.1 of 1, and the win rate of one over the other has 1/2 in its interval
  different  its lower limit is above 0
  undecided  else
Beside them controls: a run of another method that went as far from the start as IPO did. If the
distance only said how far two policies went, theirs would be as small.
Run: python -m studies.same_tau                   (1 h on 2 cores)
     python -m studies.same_tau enumerated        (the first rung alone: 7 min)
     python -m studies.same_tau small             (the second: 15 min; and so task, controls)
     python -m studies.same_tau --from-results    (the tables from the lines of results/ alone)
"""

import sys
import time

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch

import bandit
import data
import enumerated
import equilibrium
import preference_model
from enumerated import per_token_mixture
from job.options import find_method
from studies import middle, rungs, runs, tournament

TAUS = (0.1, 0.3)
# Two methods with one fixed point, and their beta.
PAIRS = (("ipo", "nash_md", 0.0), ("ipo_md", "nash_md", 0.125))
SAMPLES = dict(pairs=64, steps=600, crossed=True)  # of the first rung
SMALL = 5e-4, 1000  # rate and steps of the second rung
NEAR = 0.1  # a slope within this of 1 counts as arrived
PROMPTS = 40  # of a residual on the built-in task


# ---- the statistic ----


def between_less_within(distances, first, second):
    """Mean distance between two methods less the mean within them, nats, and both means.

    distances:
        [N, N], symmetric.
    first, second:
        rows of the policies of each method: lists of two or more.
    """
    between = distances[np.ix_(first, second)].mean()
    within = []
    for rows in (first, second):
        for number, row in enumerate(rows):
            within += [distances[row, other] for other in rows[:number]]
    return between - np.mean(within), between, np.mean(within)


def jackknife(distances, first, second):
    """Half the width of the 95 % interval of between_less_within, over seeds. Arguments: the same.

    Delete-one, each method's seeds in turn; methods of three seeds or more.
    """
    variances = []
    for rows, other in ((first, second), (second, first)):
        without = []
        for row in rows:
            rest = [kept for kept in rows if kept != row]
            without.append(between_less_within(distances, rest, other)[0])
        variances.append(np.var(without) * (len(rows) - 1))
    variance = sum(variances)
    if variance == 0:
        return 0.0
    freedom = (len(first) - 1) * variance**2 / sum(part**2 for part in variances)
    return runs.STUDENT[int(freedom)] * np.sqrt(variance)


def verdict(statistic, half, within, slopes, win_rate, win_half):
    """ "equal", "different" or "undecided", by the rule of this file's head.

    statistic, half, within:
        nats: between_less_within, its interval's half width, the mean within.
    slopes:
        those of all the policies, both ways.
    win_rate, win_half:
        of the first method over the second, and its interval's half width.
    """
    arrived = all(abs(slope - 1) < NEAR for slope in slopes)
    if statistic + half < within / 2 and arrived and abs(win_rate - 0.5) <= win_half:
        return "equal"
    if statistic - half > 0:
        return "different"
    return "undecided"


# ---- the first rung: everything by enumeration ----


def train_enumerated(todo):
    """Trains a cell on enumerated.py's GPT-2. Returns its line: log pi [2, 85] and distances."""
    w, beta, tau = enumerated.world(0), todo["beta"], todo["tau"]
    target = enumerated.solve(w, tau, beta, per_token_mixture)
    begun = time.process_time()
    how = {name: todo[name] for name in ("pairs", "steps", "crossed", "seed")}
    *_, log_pi = enumerated.train(w, find_method(todo["loss"]), tau, beta, **how)
    seconds = time.process_time() - begun
    ends = rungs.distances(w, log_pi, beta, target, tau)
    line = runs.line_of(todo)
    return line | dict(seconds=seconds, log_pi=log_pi.tolist(), **ends)


def enumerated_cells(study):
    """What is to do on the first rung: every cell with the first seed before any with a second."""
    how = SAMPLES if study.scale == "full" else dict(pairs=8, steps=20, crossed=True)
    found = []
    for seed, tau, loss, beta in all_cells(study):
        name = f"same tau, enumerated: {loss} tau {tau:g} beta {beta:g} seed {seed}"
        found.append(dict(name=name, loss=loss, beta=beta, tau=tau, seed=seed, **how))
    return found


def all_cells(study):
    """Yields (seed, tau, loss, beta) of every cell of a rung."""
    for seed in range(study.seeds):
        for tau in TAUS:
            for first, second, beta in PAIRS:
                for loss in (first, second):
                    yield seed, tau, loss, beta


def compare_enumerated(lines):
    """(distances [N, N] nats, win rates [N, N]) of the policies of lines, prompts averaged."""
    w = enumerated.world(0)
    laws = [torch.tensor(line["log_pi"], dtype=torch.float64) for line in lines]
    size = len(laws)
    kl, wins = np.zeros((size, size)), np.zeros((size, size))
    for row, one in enumerate(laws):
        for column, other in enumerate(laws):
            kl[row, column] = (one.exp() * (one - other)).sum(1).mean()
            against = bandit.win_rate(w.preferences, other)
            wins[row, column] = (one.exp() * against).sum(1).mean()
    return kl + kl.T, wins


def on_enumerated(study):
    """The first rung's table."""
    lines = runs.gather(study, train_enumerated, enumerated_cells(study))
    print_head("enumerated GPT-2", "slope, back (least to most)")
    for tau in TAUS:
        for first, second, beta in PAIRS:
            own = group_of(lines, tau, first, second, beta)
            slopes = [line[name] for line in own for name in ("slope", "slope_back")]
            print_row(tau, first, second, beta, slopes, *compare_enumerated(own))


def group_of(lines, tau, first, second, beta):
    """The lines of two methods at one tau and beta, the first one's before the second one's."""
    found = []
    for loss in (first, second):
        for line in lines:
            if (line["loss"], line["tau"], line["beta"]) == (loss, tau, beta):
                found.append(line)
    return found


# ---- the second rung: posts of one fact ----


def small_cells(study):
    """What is to do on the second rung, at middle.TAU alone."""
    found = []
    for seed, tau, loss, beta in all_cells(study):
        if tau == middle.TAU:
            found.append(middle.cell(study, middle.SMALL, loss, beta, *SMALL, seed))
    return found


def on_small(study):
    """The second rung's table."""
    cells = small_cells(study)
    lines = runs.gather(study, middle.run_to_residuals, cells)
    print_head("posts of one fact", "slope, back (least to most)")
    for first, second, beta in PAIRS:
        own = group_of(lines, middle.TAU, first, second, beta)
        todo = dict(name=f"small posts: {first}, {second} beta {beta:g}")
        todo["runs"] = group_of(cells, middle.TAU, first, second, beta)
        met = runs.gather(study, middle.meet, [todo])[0]
        kl = np.array(met["kl"])
        ends = [line["points"][-1] for line in own]
        slopes = [end[name] for end in ends for name in ("slope", "slope_back")]
        given = middle.TAU, first, second, beta, slopes
        print_row(*given, kl + kl.T, np.array(met["win_rate"]))


# ---- the third rung: the built-in task ----


def residual_of(study, policy, tau, beta, judge="learned", drawn_from="policy"):
    """What residual is asked of a policy, as runs.load_policy names it.

    judge:
        whose game: "learned", the preference model that it was trained on, or "panel".
    drawn_from:
        whose responses it is asked of, as equilibrium.measure takes it.
    """
    where = runs.where(study, min(PROMPTS, study.prompts))
    name = f"residual beta {beta:g}: {policy}"
    if judge == "panel":
        name = f"panel's {name}"
    found = dict(policy=policy, tau=tau, beta=beta, judge=judge, where=where)
    if drawn_from == "reference":
        name = f"start's responses, {name}"
        found["drawn_from"] = drawn_from
    return dict(name=name, **found)


def residual(todo):
    """The line of a policy's residual of eq 12 or 13 on validation prompts."""
    there, task = todo["where"], data.BuiltIn()
    judge = task.judge
    if todo["judge"] == "learned":
        judge = preference_model.load(there["shared"]["learned"])
    policy, start = runs.load_policy(there, todo["policy"]), runs.load_policy(there, "SFT")
    rows = equilibrium.measure(
        policy,
        start,
        judge,
        task,
        todo["tau"],
        todo["beta"],
        split="validation",
        count=there["prompts"],
        drawn_from=todo.get("drawn_from", "policy"),
    )
    line = runs.line_of(todo)
    return line | equilibrium.summarise(rows)


def task_cells(study):
    """What is to do on the built-in task. Some of it may be Table 2's, too, and is done once."""
    found = []
    for seed, tau, loss, beta in all_cells(study):
        found.append(runs.cell(study, loss, tau, beta, seed))
    return found


def on_task(study):
    """The third rung's table."""
    lines = runs.gather(study, runs.run_cell, task_cells(study))
    print_head("built-in task", "slope, back (least to most)")
    for tau in TAUS:
        for first, second, beta in PAIRS:
            own = group_of(lines, tau, first, second, beta)
            players = [runs.checkpoint(line) for line in own]
            todos = [residual_of(study, player, tau, beta) for player in players]
            runs.run_again(study, todos, own)
            found = runs.gather(study, residual, todos)
            slopes = [line[name] for line in found for name in ("slope", "slope_back")]
            key = f"at tau {tau:g} beta {beta:g}"
            line = tournament.tournament(study, key, players, own, "validation", kl=True)
            kl = np.array(line["kl"])
            print_row(tau, first, second, beta, slopes, kl + kl.T, np.array(line["win_rate"]))


def nearest(lines, kl):
    """Of some runs the one whose KL to the start is nearest to kl, nats."""
    return min(lines, key=lambda line: abs(line["points"][-1]["kl"] - kl))


def controls(study):
    """The controls' table: the run of each sweep whose KL is nearest to that of IPO's seeds."""
    sweeps = runs.sweep(study, ("dpo", "rl"))
    sweeps = {runs.NAMES[loss]: lines for loss, lines in sweeps.items()}
    sweeps["offline IPO"] = runs.sweep(study, ("ipo",), offline=True)["ipo"]
    print(
        "\n| built-in task: IPO's tau, KL | beside | its tau, KL | distance to IPO's seeds ", end=""
    )
    print("(least to most) | within IPO | win rate of IPO (least to most) |")
    print("|---" * 6 + "|")
    for tau in TAUS:
        cells = [runs.cell(study, "ipo", tau, 0.0, seed) for seed in range(study.seeds)]
        seeds = runs.gather(study, runs.run_cell, cells)
        kl = np.mean([line["points"][-1]["kl"] for line in seeds])
        others = {name: nearest(lines, kl) for name, lines in sweeps.items()}
        lines = [*seeds, *others.values()]
        players = [runs.checkpoint(line) for line in lines]
        key = f"of controls at tau {tau:g}"
        line = tournament.tournament(study, key, players, lines, "validation", kl=True)
        distances = np.array(line["kl"]) + np.array(line["kl"]).T
        wins, count = np.array(line["win_rate"]), len(seeds)
        within = distances[:count, :count][np.triu_indices(count, 1)].mean()
        for column, (name, other) in enumerate(others.items(), count):
            away, won = distances[:count, column], wins[:count, column]
            print(f"| {tau:g}, {kl:.2f} | {name} | {other['tau']:g}", end="")
            print(f", {other['points'][-1]['kl']:.2f} | {away.mean():.2f} ", end="")
            print(
                f"({away.min():.2f} to {away.max():.2f}) | {within:.2f} | {won.mean():.3f} ", end=""
            )
            print(f"({won.min():.3f} to {won.max():.3f}) |")


# ---- the table ----


def print_head(title, slopes):
    """The table's head."""
    print(f"\n| {title}: methods | tau | beta | between | within ", end="")
    print(f"| between less within (95 %) | {slopes} | win rate of the first (95 %) | verdict |")
    print("|---" * 9 + "|")


def print_row(tau, first, second, beta, slopes, distances, wins):
    """A pair of methods at one tau.

    slopes:
        of all policies, each followed by its slope back.
    distances, wins:
        [N, N], nats and win rates, the first method's policies before the second one's.
    """
    seeds = len(distances) // 2
    rows, others = list(range(seeds)), list(range(seeds, 2 * seeds))
    statistic, between, within = between_less_within(distances, rows, others)
    half = jackknife(distances, rows, others)
    win_rate, win_half = runs.crossed_interval(wins[np.ix_(rows, others)])
    found = verdict(statistic, half, within, slopes, win_rate, win_half)
    print(f"| {runs.NAMES[first]}, {runs.NAMES[second]} | {tau:g} | {beta:g} ", end="")
    print(f"| {between:.4f} | {within:.4f} | {statistic:+.4f} +- {half:.4f} ", end="")
    forth, back = slopes[::2], slopes[1::2]
    print(f"| {min(forth):.2f} to {max(forth):.2f}, {min(back):.2f} to {max(back):.2f} ", end="")
    print(f"| {win_rate:.4f} +- {win_half:.4f} | {found} |")


def same_tau(study):
    """The rungs and the controls."""
    on_enumerated(study)
    on_small(study)
    on_task(study)
    controls(study)


PARTS = dict(enumerated=on_enumerated, small=on_small, task=on_task, controls=controls)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.same_tau", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
