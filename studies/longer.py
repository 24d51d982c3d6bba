"""Does the built-in task's policy arrive at the equilibrium, given more steps or more pairs?

Online IPO and Nash-MD-PG (beta 0) at one tau, by total steps, prompts a step and rate, one seed
each; of every checkpoint the residual of eq 12 under the learned preference model, which is what
was trained on (studies/residuals.py): at the equilibrium slopes and R2 are 1. The rate falls to 0
over each run's own steps, so a long run's early checkpoints are no short runs.
Left out: other taus, more seeds; see studies.rungs for the rung where the point is known.
Run: python -m studies.longer                   (1 h on 2 cores; results/longer.png)
     python -m studies.longer --from-results    (the table and picture from the lines alone)
"""

import os
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import job.folder
import job.options
import preference_model
from studies import residuals, runs

TAU = 0.1
# loss, steps, prompts a step, rate: None for the method's own (studies/rates.py)
CELLS = (
    ("ipo", 300, 32, None),
    ("nash_md", 300, 32, None),
    ("ipo", 1000, 32, None),
    ("nash_md", 1000, 32, None),
    ("ipo", 300, 128, None),
    ("ipo", 3000, 32, None),
    ("ipo", 1000, 32, 5e-4),
    ("ipo", 3000, 32, 5e-4),
)
PROMPTS = 40  # validation prompts of a residual


def cell(study, loss, steps, pairs, rate):
    """A run to do."""
    if study.scale != "full":
        steps = study.steps
    argv = ["--loss", loss, "--tau", str(TAU), "--steps", str(steps), "--batch-size", str(pairs)]
    argv += ["--save-every", str(max(1, steps // 4)), "--keep", "99", "--eval-prompts", "20"]
    argv += study.stages
    if runs.samples_mixture(loss):
        argv += ["--beta", "0"]
    name = f"rung: {loss} {steps} steps of {pairs}"
    if rate is not None:
        argv += ["--lr", str(rate)]
        name += f" rate {rate:g}"
    return dict(
        name=name,
        loss=loss,
        tau=TAU,
        steps=steps,
        pairs=pairs,
        argv=argv,
        where=runs.where(study, study.prompts),
    )


def cells(study):
    """What is to do."""
    return [cell(study, *which) for which in CELLS]


def run_to_residuals(todo):
    """Runs a cell. Returns its line: the residual of eq 12 and the numbers against SFT of every
    checkpoint."""
    there = todo["where"]
    out, seconds = runs.run_by_train(todo, runs.folder_of(todo["name"]))
    learned = preference_model.load(there["shared"]["learned"])
    start, task = runs.load_policy(there, "SFT"), data.BuiltIn()
    line = runs.line_of(todo)
    line |= dict(seconds=seconds, points=[])
    for path in job.folder.checkpoints(out):
        name = os.path.relpath(path, there["folder"])
        policy = runs.load_policy(there, name)
        count = min(PROMPTS, there["prompts"])
        pair = dict(name=name, a=name, b="SFT", split="validation", where=there)
        given = policy, start, learned, task, todo["tau"]
        size = dict(split="validation", count=count)
        point = runs.compare(pair) | residuals.measure(*given, **size)
        line["points"].append(dict(point, step=int(path[-6:])))
    return line


def rate_of(line):
    """The learning rate of a line's run at its peak."""
    argv = line["argv"]
    if "--lr" in argv:
        return float(argv[argv.index("--lr") + 1])
    return job.options.find_method(line["loss"]).RATE


def longer(study):
    """The table of all ends, and the picture over the steps."""
    lines = runs.gather(study, run_to_residuals, cells(study))
    print(f"| method | rate | steps | prompts a step | win rate | KL | {residuals.HEAD} |")
    print("|---" * (6 + residuals.COLUMNS) + "|")
    for line in lines:
        end = line["points"][-1]
        print(f"| {runs.NAMES[line['loss']]} | {rate_of(line):g} | {line['steps']} ", end="")
        print(f"| {line['pairs']} | {end['win_rate']:.3f} | {end['kl']:.2f} ", end="")
        print(f"| {residuals.cells(end)} |")
    panels = []
    for name, title in (("slope_back", "slope of tau d on p"), ("r2", "R2")):
        series = {}
        for line in lines:
            label = f"{runs.NAMES[line['loss']]}, {line['steps']} steps of {line['pairs']}"
            label += f", rate {rate_of(line):g}"
            steps = runs.column(line["points"], "step")
            series[label] = steps, runs.column(line["points"], name)
        panels.append((f"{title}, tau {TAU:g}", "step", "", series))
    runs.plot(study, "longer", panels)


PARTS = dict(longer=longer)


def main(argv=None):
    """The command; returns the exit status."""
    torch.set_num_threads(1)
    return runs.main("studies.longer", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
