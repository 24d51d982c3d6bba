"""How long must a run be? Each of the paper's six methods at 100 to 400 steps, all else default.

The rate falls to 0 over each run's own steps, so every length is a run of its own, and the end of
one is not the middle of another. A curve counts as flat from a length on if doubling it changes the
win rate over the start (500 validation prompts) by less than twice the standard error of the
difference. Table 2 and the figures take the shortest length from which most curves are flat.
Left out: more than one seed, other taus; a flat win rate is no equilibrium (see studies.longer).
Run: python -m studies.lengths                   (20 min on 2 cores)
     python -m studies.lengths --from-results    (prints from the lines of results/ alone)
"""

import math
import sys

from studies import runs

DOUBLINGS = (1 / 2, 1, 2)  # of the scale's steps


def cell(study, loss, steps):
    """A run to do."""
    name = f"length: {loss} {steps} steps"
    argv = ["--loss", loss]
    return runs.short_cell(study, name, argv, steps=steps, loss=loss)


def cells(study):
    """What is to do, the longest last: what is stopped then lacks the dear ones."""
    steps = [round(study.steps * times) for times in DOUBLINGS]
    return [cell(study, loss, count) for count in steps for loss in runs.NAMES]


def is_flat(short, long):
    """Whether doubling a run's steps changed its win rate by less than twice the difference's
    standard error. Two lines; they share their prompts, which makes this error too large."""
    error = math.hypot(short["win_rate_se"], long["win_rate_se"])
    return abs(long["win_rate"] - short["win_rate"]) < 2 * error


def lengths(study):
    """The table: win rate and KL by length, and from which length on a method's curve is flat."""
    steps = [round(study.steps * times) for times in DOUBLINGS]
    lines = runs.gather(study, runs.run_to_end, cells(study))
    heads = [f"{count} steps: win rate (se), KL" for count in steps]
    print(f"| method | {' | '.join(heads)} | flat from |")
    print("|---" * (len(steps) + 2) + "|")
    for loss in runs.NAMES:
        own = [line for line in lines if line["loss"] == loss]
        texts = []
        for line in own:
            rate = f"{line['win_rate']:.3f} ({line['win_rate_se']:.3f})"
            texts.append(f"{rate}, {line['kl']:.2f}")
        flat = "-"
        for number in reversed(range(len(own) - 1)):
            if not is_flat(own[number], own[number + 1]):
                break
            flat = str(own[number]["steps"])
        print(f"| {runs.NAMES[loss]} | {' | '.join(texts)} | {flat} |")


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.lengths", __doc__, dict(lengths=lengths), argv)


if __name__ == "__main__":
    sys.exit(main())
