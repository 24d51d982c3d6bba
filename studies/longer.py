"""Does the built-in task's policy arrive at the equilibrium, given more steps or more pairs?

Online IPO and Nash-MD-PG (beta 0) at one tau, by total steps and prompts a step, one seed each; of
every checkpoint the residual of eq 12 under the learned preference model, which is what was trained
on (equilibrium.py): at the equilibrium both slopes and R2 are 1. The rate falls to 0 over each
run's own steps, so a long run's early checkpoints are no short runs.
Left out: other taus, more seeds; see studies.rungs for the rung where the point is known.
Run: python -m studies.longer                   (45 min on 2 cores; results/longer.png)
     python -m studies.longer --from-results    (the table and picture from the lines alone)
"""

import os
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import equilibrium
import job.folder
import preference_model
from studies import runs

TAU = 0.1
# loss, steps, prompts a step
CELLS = (
    ("ipo", 300, 32),
    ("nash_md", 300, 32),
    ("ipo", 1000, 32),
    ("nash_md", 1000, 32),
    ("ipo", 300, 128),
    ("ipo", 3000, 32),
)
PROMPTS = 40  # validation prompts of a residual


def cell(study, loss, steps, pairs):
    """A run to do."""
    if study.scale != "full":
        steps = study.steps
    argv = ["--loss", loss, "--tau", str(TAU), "--steps", str(steps), "--batch-size", str(pairs)]
    argv += ["--save-every", str(max(1, steps // 4)), "--keep", "99", "--eval-prompts", "20"]
    argv += study.stages
    if runs.samples_mixture(loss):
        argv += ["--beta", "0"]
    return dict(
        name=f"rung: {loss} {steps} steps of {pairs}",
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
        rows = equilibrium.measure(
            policy, start, learned, task, todo["tau"], split="validation", count=count
        )
        pair = dict(name=name, a=name, b="SFT", split="validation", where=there)
        point = runs.compare(pair) | equilibrium.summarise(rows)
        line["points"].append(dict(point, step=int(path[-6:])))
    return line


def residual(point, name):
    """A number with its standard error, as text."""
    return f"{point[name]:.2f} ({point[f'{name}_se']:.2f})"


def longer(study):
    """The table of all ends, and the picture over the steps."""
    lines = runs.gather(study, run_to_residuals, cells(study))
    names = ("slope", "slope_back", "r2", "exploitability")
    print(
        "| method | steps | prompts a step | win rate | KL | p on tau d | tau d on p | R2 ", end=""
    )
    print("| exploitable by at least |")
    print("|---" * 9 + "|")
    panels = []
    for line in lines:
        end = line["points"][-1]
        print(f"| {runs.NAMES[line['loss']]} | {line['steps']} | {line['pairs']} ", end="")
        print(f"| {end['win_rate']:.3f} | {end['kl']:.2f} ", end="")
        print("| " + " | ".join(residual(end, name) for name in names) + " |")
    for name, title in (("slope_back", "slope of tau d on p"), ("r2", "R2")):
        series = {}
        for line in lines:
            label = f"{runs.NAMES[line['loss']]}, {line['steps']} steps of {line['pairs']}"
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
