"""What is a preference model worth that was trained on recorded comparisons?

A file's comparisons are split five times by their prompts: a fold is tested on, and of the other
four a fifth says when to stop (job/recorded.py). Each recipe of training is tried on every fold;
its accuracy is held beside the rule by length that does best on the same pairs, before and after:
with the weights of the last step, as without stopping, and with those kept.
Each fold of each recipe is a line of the results, found by its name and appended as it finishes:
the same command goes on where it was stopped.
Run: python -m studies.judge --comparisons FILE [--demos FILE] [--policy FOLDER] ...
     python -m studies.judge --from-results    (the table of results/judge.jsonl)
What else train.py takes may be given: --preference-steps, --max-prompt-tokens, --tokenizer, ...
"""

import argparse
import hashlib
import json
import os
import statistics
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import job.folder
import job.options
import job.stages
import policy as policies
import stopping
from job import recorded
from job.versions import RECORDED, VERSIONS

VERSION = f"{VERSIONS['supervised']}.{VERSIONS['preference']}.{RECORDED}"
FOLDS = 5
RECIPES = {
    "whole body, 2e-3": dict(lr=2e-3, finetune=True, weight_decay=0.0),
    "whole body, 5e-4": dict(lr=5e-4, finetune=True, weight_decay=0.0),
    "last layer, 2e-3": dict(lr=2e-3, finetune=True, weight_decay=0.0),
    "frozen body, 2e-3": dict(lr=2e-3, finetune=False, weight_decay=0.0),
    "frozen body, 5e-4": dict(lr=5e-4, finetune=False, weight_decay=0.0),
    "frozen body, 2e-3, decay 1": dict(lr=2e-3, finetune=False, weight_decay=1.0),
}


def fold_parts(comparisons, fold):
    """The parts of one split, as data.Records has them for the role preference.

    comparisons:
        dicts of prompt, chosen and rejected.
    fold:
        from 0 to FOLDS - 1, the one that is tested on. A prompt is in one fold only.
    """
    parts = {"preference training": [], "preference validation": [], "preference unseen": []}
    for record in comparisons:
        part = "preference training"
        # Bytes of the hash that neither split_of nor parts_of reads.
        if int(data.digits(record["prompt"], 12) * FOLDS) == fold:
            part = "preference unseen"
        elif data.digits(record["prompt"], 6) < data.VALIDATION:
            part = "preference validation"
        parts[part].append(record)
    return parts


def remembered(features, known):
    """model.features of a frozen body that computes each batch once.

    features:
        the model's own.
    known:
        {hash of the ids: features}, which all models of one body share.
    """

    def look_up(prompt, response):
        key = hashlib.sha256()
        for part in (prompt, response):
            key.update(part.ids.numpy().tobytes())
            key.update(part.mask.numpy().tobytes())
        if key.digest() not in known:
            with torch.no_grad():
                known[key.digest()] = features(prompt, response)
        return known[key.digest()]

    return look_up


def run_fold(options, task, reference, recipe, known):
    """Trains and tests one recipe on the parts that the task has now: job/recorded.py's numbers."""
    model = job.stages.empty_model(options, reference, "preference", True)
    if recipe.startswith("last"):
        for parameter in model.body.parameters():
            parameter.requires_grad_(False)
        # The blocks are the longest list of modules, whatever the architecture calls them.
        lists = [part for part in model.body.modules() if isinstance(part, torch.nn.ModuleList)]
        max(lists, key=len)[-1].requires_grad_(True)
    if not RECIPES[recipe]["finetune"]:
        model.features = remembered(model.features, known)
    given = options, task, reference, model, "preference", recipe
    return recorded.train_and_test(*given, RECIPES[recipe], spy=True)


def work_off(options, choice, lines):
    """Trains what has no line yet, and appends a line for each."""
    task, start, data_hash = data.open_task(options)
    own_steps = "preference_steps" not in options.from_data
    recorded.choose_sizes(options, task, pretrained=start is not None)
    comparisons = data.read("comparisons", options.comparisons, task.tokenizer)
    if not own_steps:
        training = len(fold_parts(comparisons, 0)["preference training"])
        options.preference_steps = recorded.steps_for(training)
    source = os.path.basename(options.comparisons)
    reference, path = job.stages.supervised(options, task, start, data_hash)
    setting = f"{source}, {options.preference_steps} steps, prompts of {task.max_prompt}"
    # The body's folder is named by all that decides its weights, the data among it.
    setting += f", {os.path.basename(path)}"
    for fold in range(FOLDS):
        task.parts = fold_parts(comparisons, fold)
        task.orders.clear()
        known = {}
        for recipe in choice.recipes:
            name = f"{setting}: {recipe}: fold {fold}"
            if name in lines:
                continue
            numbers = run_fold(options, task, reference, recipe, known)
            line = dict(name=name, setting=setting, recipe=recipe, fold=fold, version=VERSION)
            line |= numbers
            lines[name] = line
            os.makedirs(os.path.dirname(choice.results) or ".", exist_ok=True)
            with open(choice.results, "a", encoding="utf-8", newline="") as file:
                job.folder.append_line(file, line)


def read_lines(path, of_any_version):
    """The file's lines by name. A kill may have cut the last one: what is left of it goes.

    Those of another version are made again, but where any is wanted.
    """
    lines = {}
    if os.path.exists(path):
        with open(path, "r+", encoding="utf-8", newline="") as file:
            text = file.read()
            whole = text[: text.rfind("\n") + 1]
            file.truncate(len(whole.encode()))
        for line in map(json.loads, whole.splitlines()):
            if of_any_version or line["version"] == VERSION:
                lines[line["name"]] = line
    return lines


def table(lines):
    """Prints a row a setting and recipe: means over the folds, with the least and the most."""
    print(
        "| comparisons | recipe | folds | pairs | right signs: last step | kept | best rule |",
        end="",
    )
    print(" kept - rule | loss: last, kept | passes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    groups = {}
    for line in lines.values():
        groups.setdefault((line["setting"], line["recipe"]), []).append(line)
    for (setting, recipe), group in groups.items():
        print(f"| {setting} | {recipe} | {row(group)} |")


def row(group):
    """The cells of the folds of one recipe."""
    pairs = sum(line["pairs"] for line in group)
    rule = spread([line["rule_accuracy"] for line in group])
    kept = spread([line["accuracy"] for line in group])
    gain = spread([line["gain"] for line in group])
    last = spread([line["looks"][-1]["unseen_accuracy"] for line in group])
    last_loss = statistics.mean(line["looks"][-1]["unseen_loss"] for line in group)
    losses = f"{last_loss:.3f}, {mean(group, 'loss'):.3f}"
    passes = f"{mean(group, 'passes'):.1f}"
    return f"{len(group)} | {pairs} | {last} | {kept} | {rule} | {gain} | {losses} | {passes}"


def mean(group, key):
    return statistics.mean(line[key] for line in group)


def spread(values):
    """A mean and its standard error over the folds, as text."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ({error:.3f})"


def parse(argv):
    """(the study's own options, the rest: train.py's)."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    add("--results", default="results/judge.jsonl", help="(default results/judge.jsonl)")
    add("--from-results", action="store_true", help="print the table of the lines that are there")
    return parser.parse_known_args(argv)


def main(argv=None):
    """The command; returns the exit status."""
    stopping.begun()
    policies.quiet()
    choice, rest = parse(argv)
    try:
        lines = read_lines(choice.results, of_any_version=choice.from_results)
        if not choice.from_results:
            options = job.options.parse(rest)
            if not options.comparisons:
                raise ValueError("--comparisons: give a file of prompt, chosen, rejected")
            work_off(options, choice, lines)
        table(lines)
    except (ValueError, OSError) as error:
        print(f"studies.judge: error: {policies.first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("studies.judge: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
