"""Rungs between the enumerated GPT-2 and the built-in task: posts of few facts, short responses.

The task of summaries.py cut down and grown again: facts a post, tokens a response, prompts in all.
The real job, train.py, runs on files of such posts, and the panel itself is asked (studies/
panel_of_texts.py): no preference model's errors stand between. Every checkpoint's residual of eq 12
is taken on 20 of the prompts it was trained on. One tau, one seed.
Left out: the solved point, which is not known here; held-out prompts.
Run: python -m studies.middle                   (25 min on 2 cores)
     python -m studies.middle --from-results    (the table from the lines of results/ alone)
"""

import json
import os
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import equilibrium
import job.folder
import job.judged
import job.options
import job.stages
import policy as policies
import summaries
from studies import longer, runs

TAU = 0.1
# Facts a post, tokens a response at most, prompts to align on, in all.
SMALL, MIDDLE, LARGE = (1, 4, 100), (2, 8, 100), (6, 32, 100)
# size, loss, steps of PAIRS pairs: the short runs of all sizes first.
CELLS = (
    (SMALL, "ipo", 300),
    (MIDDLE, "ipo", 300),
    (LARGE, "ipo", 300),
    (SMALL, "ipo", 1000),
    (MIDDLE, "ipo", 1000),
    (LARGE, "ipo", 1000),
    (SMALL, "nash_md", 1000),
    (MIDDLE, "nash_md", 1000),
    (SMALL, "ipo", 3000),
    (MIDDLE, "ipo", 3000),
)
PAIRS = 32
DEMOS = 4000
PANEL = os.path.join(os.path.dirname(__file__), "panel_of_texts.py")
PROMPTS = 20  # of a residual


def write_records(path, records):
    """Writes records as JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def files_of(folder):
    """train.py's options for the files of a folder."""
    demos, prompts = os.path.join(folder, "demos.jsonl"), os.path.join(folder, "prompts.jsonl")
    tokenizer = os.path.join(folder, "tokenizer")
    return ["--demos", demos, "--prompts", prompts, "--tokenizer", tokenizer, "--preference", PANEL]


def write_files(folder, facts, prompts):
    """The files of a size: demos, prompts and the tokenizer.

    folder:
        where they go; files that are there are the same and stay.
    facts, prompts:
        of a size.
    """
    os.makedirs(folder, exist_ok=True)
    _, demos, _, asked, _, tokenizer, *_ = files_of(folder)
    if not os.path.exists(tokenizer):
        told = []
        for seed in range(DEMOS):
            post = summaries.post(seed, facts)
            told.append(dict(prompt=post, completion=summaries.summary(post, seed)))
        write_records(demos, told)
        # A fifth of them are validation's and test's (data.choose_prompts).
        seeds = range(10**9, 10**9 + prompts * 5 // 4)
        write_records(asked, [dict(prompt=summaries.post(seed, facts)) for seed in seeds])
        summaries.tokenizer().save_pretrained(tokenizer)


def cell(study, size, loss, steps):
    """A run to do."""
    facts, tokens, prompts = size
    if study.scale != "full":
        steps = study.steps
    folder = os.path.join(study.folder, f"middle-{facts}-{prompts}")
    argv = files_of(folder)
    argv += ["--max-response-tokens", str(tokens), "--max-prompt-tokens", "64"]
    argv += ["--supervised-steps", "900", *study.stages, "--loss", loss, "--tau", str(TAU)]
    argv += ["--steps", str(steps), "--batch-size", str(PAIRS), "--eval-prompts", "10"]
    argv += ["--save-every", str(max(1, steps // 2)), "--keep", "99"]
    if runs.samples_mixture(loss):
        argv += ["--beta", "0"]
    name = f"middle: {facts} facts {tokens} tokens {prompts} prompts "
    name += f"{loss} {steps} steps"
    said = dict(facts=facts, tokens=tokens, prompts=prompts, loss=loss, steps=steps)
    where = dict(runs.where(study, PROMPTS), files=folder)
    return dict(name=name, **said, tau=TAU, argv=argv, where=where)


def cells(study):
    """What is to do."""
    return [cell(study, *which) for which in CELLS]


def run_to_residuals(todo):
    """Runs a cell. Returns its line: of every checkpoint the residual of eq 12 on training prompts,
    and their number."""
    there = todo["where"]
    write_files(there["files"], todo["facts"], todo["prompts"])
    out, seconds = runs.run_by_train(todo, runs.folder_of(todo["name"]))
    stages = os.path.join(there["folder"], "stages")
    options = job.options.parse([*todo["argv"], "--stages", stages, "--device", "cpu"])
    task, start, data_hash = data.open_task(options)
    reference, _ = job.stages.supervised(options, task, start, data_hash)
    panel = job.judged.asked_file(options, task.tokenizer)
    line = runs.line_of(todo)
    del line["argv"]  # it names files of this machine
    line["trained_on"] = task.most("align")
    line["seconds"] = seconds
    line["points"] = []
    for path in job.folder.checkpoints(out):
        policy = policies.load(path)[0]
        rows = equilibrium.measure(
            policy, reference, panel, task, TAU, split="align", count=there["prompts"]
        )
        line["points"].append(dict(equilibrium.summarise(rows), step=int(path[-6:])))
    return line


def middle(study):
    """The table of all ends."""
    names = ("slope", "slope_back", "r2", "exploitability")
    print("| facts, tokens, prompts | method | steps | p on tau d | tau d on p | R2 ", end="")
    print("| exploitable by at least | seconds |")
    print("|---" * 8 + "|")
    for line in runs.gather(study, run_to_residuals, cells(study)):
        end = line["points"][-1]
        print(f"| {line['facts']}, {line['tokens']}, {line['trained_on']} ", end="")
        print(f"| {runs.NAMES[line['loss']]} | {line['steps']} ", end="")
        print("| " + " | ".join(longer.residual(end, name) for name in names), end="")
        print(f" | {line['seconds']:.0f} |")


def main(argv=None):
    """The command; returns the exit status."""
    torch.set_num_threads(1)
    return runs.main("studies.middle", __doc__, dict(middle=middle), argv)


if __name__ == "__main__":
    sys.exit(main())
