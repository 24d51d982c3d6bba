"""Which losses lengthen? Every method that learns from preferences, under two panels known exactly.

On the task as it is the readers like brevity a little more than length; the other panel has a
fourth reader who likes length (likes_length.py). One run each at the method's defaults, labelled by
the panel itself and no learned model, so that what is longer is not the model's error.
A method's length is given beside the start's, and its win rate under the panel that it learned.
Left out: methods that learn from a reward, which a --preference file does not give; other seeds.
Run: python -m studies.lengthening                  (40 min on 2 cores)
     python -m studies.lengthening --from-results   (the table from the lines of results/ alone)
"""

import os
import sys

import job.options  # before torch: it sets how torch's threads wait

# isort: split

import data
import evaluate
from job import judged
from studies import likes_length, panel_of_texts, runs

PANELS = {"as it is": panel_of_texts, "likes length": likes_length}


def losses():
    """The methods that learn from preferences, by name."""
    names = job.options.method_names()
    return [loss for loss in names if job.options.find_method(loss).LABEL == "preference"]


def cells(study):
    """What is to do: both panels of a method before the next method."""
    found = []
    for loss in losses():
        method = job.options.find_method(loss)
        for panel, module in PANELS.items():
            # Relative, for the line: from the project's folder, where studies are run.
            path = f"studies/{os.path.basename(module.__file__)}"
            argv = ["--loss", loss, "--preference", path]
            said = dict(loss=loss, tau=method.TAU, panel=panel)
            found.append(runs.short_cell(study, f"lengthening: {loss}, {panel}", argv, **said))
    return found


def run_cell(todo):
    """Runs a cell. Returns its line: the final policy against the start on validation prompts,
    under the panel that it learned from."""
    there = todo["where"]
    folder = runs.folder_of(todo["name"]).replace(",", "")
    _, seconds = runs.run_by_train(todo, folder)
    task = data.BuiltIn()
    policy = runs.load_policy(there, f"{folder}/policy")
    start = runs.load_policy(there, "SFT")
    asked = judged.Asked("--preference", PANELS[todo["panel"]].__file__, task.tokenizer)
    numbers, _ = evaluate.measure(policy, start, asked, task, "validation", there["prompts"])
    return runs.line_of(todo) | dict(seconds=seconds) | numbers


def lengthening(study):
    """The table, a row a method: win rate, KL, length under each panel."""
    print("| method | tau ", end="")
    for panel in PANELS:
        print(f"| panel {panel}: win rate, KL, length (of the start's) ", end="")
    print("|")
    print("|---" * (2 + len(PANELS)) + "|")
    lines = runs.gather(study, run_cell, cells(study))
    for number in range(0, len(lines), len(PANELS)):
        own = lines[number : number + len(PANELS)]
        print(f"| {own[0]['loss']} | {own[0]['tau']:g} ", end="")
        for line in own:
            ratio = line["length"] / line["length_other"]
            print(f"| {line['win_rate']:.3f}, {line['kl']:.2f}, ", end="")
            print(f"{line['length']:.1f} ({ratio:.2f}) ", end="")
        print("|")


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.lengthening", __doc__, dict(lengthening=lengthening), argv)


if __name__ == "__main__":
    sys.exit(main())
