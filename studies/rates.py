"""Which learning rate: how much is its peak, how much its fall, how much the warm-up?

  factors    IPO-MD at every combination of peak, fall and warm-up
  seeds      IPO-MD at the default's rate and with one factor changed at a time, five seeds each
  methods    every method at the same peaks, falling in a line after ten steps of warm-up
Each run has the default's steps and tau and is judged on 500 validation prompts, one sample each:
the default is chosen here, and the gates (studies/gates.py) hold it on test prompts of new seeds.
Run: python -m studies.rates                  (about an hour on 2 cores)
     python -m studies.rates --from-results   (prints the tables from the lines of results/ alone)
"""

import statistics
import sys

from studies import runs

PEAKS = (5e-4, 1e-3, 2e-3, 4e-3)
WARM_UP = 10
# The default, then no warm-up, no fall, and the constant rate that did best on one seed.
SEEDS_RATES = (
    (2e-3, "linear", WARM_UP),
    (2e-3, "linear", 0),
    (2e-3, "none", WARM_UP),
    (1e-3, "none", WARM_UP),
)


def cell(study, loss, peak, decay, warm_up, seed=0):
    """A run to do, by its rate; tau, beta and the stages are the defaults."""
    argv = ["--loss", loss, "--lr", str(peak), "--decay", decay, "--warm-up", str(warm_up)]
    argv += ["--seed", str(seed)]
    name = f"rate: {loss} {peak:g} {decay} warm-up {warm_up} seed {seed}"
    rate = dict(peak=peak, decay=decay, warm_up=warm_up)
    return runs.short_cell(study, name, argv, loss=loss, **rate, seed=seed)


def table(lines):
    """Prints the lines, a row a run."""
    print("| method | peak | decay | warm-up | seed | win rate (se) | KL | length | distinct |")
    print("|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        where = f"| {runs.NAMES[line['loss']]} | {line['peak']:g} | {line['decay']} "
        where += f"| {line['warm_up']} | {line['seed']} "
        rate = f"| {line['win_rate']:.3f} ({line['win_rate_se']:.3f}) "
        print(f"{where}{rate}| {line['kl']:.2f} | {line['length']:.1f} | {line['distinct']:.3f} |")


def factors(study):
    """IPO-MD: each factor of the rate against the others."""
    cells = []
    for decay in ("none", "linear"):
        for warm_up in (0, WARM_UP):
            for peak in PEAKS:
                cells.append(cell(study, "ipo_md", peak, decay, warm_up))
    for peak in PEAKS:
        cells.append(cell(study, "ipo_md", peak, "cosine", WARM_UP))
    table(runs.gather(study, runs.run_to_end, cells))


def seeds(study):
    """IPO-MD: the default's rate against its neighbours, beyond one seed's luck."""
    print("| peak | decay | warm-up | win rate, mean of 5 seeds | least to most | KL | length |")
    print("|---|---|---|---|---|---|---|")
    cells = []
    for rate in SEEDS_RATES:
        for seed in range(5):
            cells.append(cell(study, "ipo_md", *rate, seed=seed))
    lines = runs.gather(study, runs.run_to_end, cells)
    for start in range(0, len(lines), 5):
        same = lines[start : start + 5]
        wins = [line["win_rate"] for line in same]
        kl = statistics.mean(line["kl"] for line in same)
        length = statistics.mean(line["length"] for line in same)
        rate = f"| {same[0]['peak']:g} | {same[0]['decay']} | {same[0]['warm_up']} "
        won = f"| {statistics.mean(wins):.3f} | {min(wins):.3f} to {max(wins):.3f} "
        print(f"{rate}{won}| {kl:.2f} | {length:.1f} |")


def methods(study):
    """Every method at the same four peaks: an equal budget of runs."""
    cells = []
    for loss in runs.NAMES:
        for peak in PEAKS:
            cells.append(cell(study, loss, peak, "linear", WARM_UP))
    table(runs.gather(study, runs.run_to_end, cells))


PARTS = dict(factors=factors, seeds=seeds, methods=methods)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.rates", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
