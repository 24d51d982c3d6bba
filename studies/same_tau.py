"""Do two methods with one equilibrium meet? Online IPO and Nash-MD-PG, IPO-MD and Nash-MD-PG.

All at one tau, for twice the steps of Table 2: at beta = 0 the first two have the Nash equilibrium
in common, at beta = 0.125 the second two the point of eq 13. Two seeds of each, so that the
distance of two methods can be held beside that of two seeds of one.
Run: python -m studies.same_tau --scale smoke
     python -m studies.same_tau --from-results    (draws from the lines of results/ alone)
"""

import sys

from studies import runs

TAU = 0.1
METHODS = (("ipo", 0.0), ("nash_md", 0.0), ("ipo_md", 0.125), ("nash_md", 0.125))  # loss and beta
# Two pairs of methods with one equilibrium, and two of seeds of one method.
PAIRS = (
    ("IPO 0 seed 0", "Nash-MD-PG 0 seed 0"),
    ("IPO-MD 0.125 seed 0", "Nash-MD-PG 0.125 seed 0"),
    ("IPO 0 seed 0", "IPO 0 seed 1"),
    ("Nash-MD-PG 0 seed 0", "Nash-MD-PG 0 seed 1"),
)


def all_runs(study):
    """The lines of all methods and seeds, {label: line}."""
    cells = {}
    for loss, beta in METHODS:
        for seed in (0, 1):
            label = f"{runs.NAMES[loss]} {beta:g} seed {seed}"
            cells[label] = runs.cell(study, loss, TAU, beta, seed, steps=study.long)
    lines = runs.gather(study, runs.run_cell, list(cells.values()))
    return dict(zip(cells, lines, strict=True))


def distance(study, line, other):
    """(KL(a, b) + KL(b, a))/2 of two runs' policies, nats, at every checkpoint, [checkpoints]."""
    numbers = range(len(line["points"]))
    there = [(runs.checkpoint(line, k), runs.checkpoint(other, k)) for k in numbers]
    back = [(runs.checkpoint(other, k), runs.checkpoint(line, k)) for k in numbers]
    kl = runs.column(runs.against(study, there), "kl")
    kl_back = runs.column(runs.against(study, back), "kl")
    return (kl + kl_back) / 2


def same_tau(study):
    """Win rate and KL over the steps, and how far the policies are from one another."""
    lines = all_runs(study)
    first = next(iter(lines.values()))
    steps = runs.column(first["points"], "step")  # the same for every run
    wins, kls, far = {}, {}, {}
    for label, line in lines.items():
        wins[label] = steps, runs.column(line["points"], "win_rate")
        kls[label] = steps, runs.column(line["points"], "kl")
    for one, two in PAIRS:
        far[f"{one} / {two}"] = steps, distance(study, lines[one], lines[two])
    panels = [
        ("win rate against SFT", "step", "p (panel)", wins),
        ("KL to SFT", "step", "nats", kls),
        ("distance of two policies, (KL + KL back)/2", "step", "nats", far),
    ]
    runs.plot(study, "same_tau", panels)


PARTS = dict(same_tau=same_tau)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.same_tau", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
