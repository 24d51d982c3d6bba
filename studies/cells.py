"""What the studies plan to run, what of it was run, and what it cost: a row a study.

Seconds are of one processor, from the committed lines; the rest is estimated from the study's own
mean second a step. A cell that two studies share is counted by the first.
Left out: the comparisons of finished policies, which cost a tenth of the runs; bench, memory,
processes and gpu, which measure a machine.
Run: python -m studies.cells    (reads results/, runs nothing)
"""

import argparse
import sys
from itertools import chain
from types import SimpleNamespace

import job.versions
from job.options import fail
from studies import (
    capacity,
    exploitability,
    figures,
    lengthening,
    lengths,
    longer,
    middle,
    responder,
    rungs,
    runs,
    same_tau,
    survey,
    table2,
)


def planned(study):
    """Yields (study, its cells), in the order in which they are to be run."""
    yield "rungs", rungs.cells("full", 1)
    yield "same_tau enumerated", same_tau.enumerated_cells(study)
    yield "same_tau, posts of one fact", same_tau.small_cells(study)
    yield "lengths", lengths.cells(study)
    yield "capacity", capacity.cells(study)
    yield "middle", middle.cells(study)
    yield "longer", longer.cells(study)
    yield "table2, the sweeps", runs.sweep_cells(study, runs.NAMES)
    yield from of_choice(study)
    yield "figures, recorded pairs", runs.sweep_cells(study, figures.offline_losses(), offline=True)
    yield "same_tau, built-in task", same_tau.task_cells(study)
    yield "exploitability, tau 0.1", exploitability.cells(study)
    yield "responder", responder.cells(study)
    yield "survey, once", survey.cells(study)
    yield "survey, other taus", survey.tau_cells(study)
    yield "survey, more seeds", more_seeds(study)
    yield "lengthening", lengthening.cells(study)


def more_seeds(study):
    """The survey's runs with other seeds than 0, once its taus are known; before, without a name:
    how many there are is known now."""
    seeds = range(1, survey.SEEDS)
    try:
        chosen = survey.choose(study)
    except ValueError:  # lines are missing
        count = len(seeds) * len(survey.kinds())
        return [dict(name=f"survey, later {number}", steps=study.steps) for number in range(count)]
    return list(chain.from_iterable(survey.seed_cells(study, chosen, seed) for seed in seeds))


def of_choice(study):
    """What Table 2 does with its best taus, once they are known; before, cells without a name."""
    try:
        chosen, _ = table2.choose(study)
    except ValueError:  # lines are missing
        unnamed = dict(steps=study.steps)
        later = [dict(unnamed, name=f"later {number}") for number in range(100)]
        yield "table2, the seeds", later[: (study.seeds - 1) * len(runs.NAMES)]
        yield "figures, other betas", later[-len(figures.BETAS) :]
        return
    yield "table2, the seeds", table2.seed_cells(study, chosen)
    yield "figures, other betas", figures.beta_cells(study, chosen["ipo_md"].run["tau"])


def table(study):
    """Prints the rows, and the total."""
    seen, totals = set(), [0, 0, 0.0, 0.0]
    print("| study | cells | run | seconds | left, estimated seconds |")
    print("|---|---|---|---|---|")
    for name, cells in planned(study):
        own = [cell for cell in cells if cell["name"] not in seen]
        seen |= {cell["name"] for cell in own}
        lines = [study.lines[cell["name"]] for cell in own if cell["name"] in study.lines]
        seconds = sum(line.get("seconds", 0.0) for line in lines)
        left, steps = 0, 0
        for cell in own:
            line = study.lines.get(cell["name"])
            if line is None:
                left += cell["steps"]
            elif "seconds" in line:
                steps += cell["steps"]
        # Nothing of the study was timed: a step of the default's size, with its evaluations.
        rest = left * (seconds / steps if steps else 0.35)
        print(f"| {name} | {len(own)} | {len(lines)} | {seconds:.0f} | {rest:.0f} |")
        row = (len(own), len(lines), seconds, rest)
        totals = [total + number for total, number in zip(totals, row, strict=True)]
    print(f"| all | {totals[0]} | {totals[1]} | {totals[2]:.0f} | {totals[3]:.0f} |")


def main(argv=None):
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.cells",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail  # one line without the usage
    parser.add_argument("--results", default="results", help="folder of the lines")
    options = parser.parse_args(argv)
    study = SimpleNamespace(**runs.SCALES["full"], scale="full", shared={}, folder="runs")
    study.results, study.from_results = options.results, False
    try:
        found = {}
        for name, version in (("full", job.versions.version()), ("rungs", rungs.VERSION)):
            study.path, study.version = f"{options.results}/{name}.jsonl", version
            found |= runs.read_lines(study)  # those of other versions would be made again
        study.lines, study.from_results = found, True
        table(study)
    except (ValueError, OSError) as error:
        print(f"studies.cells: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
