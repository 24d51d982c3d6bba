"""Every loss of the project on the built-in task: one run each at its defaults.

A look at what each does in the default's 200 steps, not a comparison: one seed, and nothing but the
paper's six was tuned for it. Offline runs learn from recorded pairs of the start's responses.
Each is judged on 500 validation prompts, one sample each.
Run: python -m studies.survey                  (about 25 min on 2 cores)
     python -m studies.survey --from-results   (prints the table from the lines of results/ alone)
"""

import sys

import job.options
from studies import runs


def cell(study, loss, offline):
    """A run to do at a method's defaults; what the built-in stages are is the study's."""
    tau = job.options.find_method(loss).TAU
    argv = ["--loss", loss, *(["--offline"] if offline else [])]
    name = f"survey: {loss}{' offline' if offline else ''}"
    return runs.short_cell(study, name, argv, loss=loss, tau=tau, offline=offline)


def cells(study):
    """What is to do."""
    found = []
    for loss in job.options.method_names():
        found.append(cell(study, loss, offline=False))
        if job.options.find_method(loss).OFFLINE:
            found.append(cell(study, loss, offline=True))
    return found


def survey(study):
    """All methods, online and, where that is a method's, offline."""
    print("| method | tau | pairs | win rate (se) | KL | length | distinct | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for line in runs.gather(study, runs.run_to_end, cells(study)):
        pairs = "recorded" if line["offline"] else "own"
        rate = f"{line['win_rate']:.3f} ({line['win_rate_se']:.3f})"
        print(
            f"| {line['loss']} | {line['tau']:g} | {pairs} | {rate} | {line['kl']:.2f} "
            f"| {line['length']:.1f} | {line['distinct']:.3f} | {line['seconds']:.0f} |"
        )


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.survey", __doc__, dict(survey=survey), argv)


if __name__ == "__main__":
    sys.exit(main())
