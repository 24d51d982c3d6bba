"""Rungs between the enumerated GPT-2 and the built-in task: posts of few facts, short responses.

The task of summaries.py cut down and grown again: facts a post, tokens a response, prompts in all.
The real job, train.py, runs on files of such posts, and the panel itself is asked (studies/
panel_of_texts.py): no preference model's errors stand between. Every checkpoint's residual of eq 12
(eq 13 where beta is above 0) is taken on 20 of the prompts it was trained on, among its own and
among the start's responses. One tau, one seed; the rate is the method's own (studies/rates.py, for
the built-in task) or lower.
Where the start's own draws hold most of its probability, the game among them is solved for
some prompts, and the policy's total variation from that point is told beside the start's.
Left out: the solved point of longer responses, which is not known; held-out prompts.
Run: python -m studies.middle                   (1 h on 2 cores)
     python -m studies.middle --from-results    (the table from the lines of results/ alone)
"""

import json
import os
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import bandit
import data
import equilibrium
import job.folder
import job.judged
import job.options
import job.stages
import policy as policies
import sampler
import summaries
from studies import residuals, runs

TAU = 0.1
# Facts a post, tokens a response at most, prompts to align on, in all.
SMALL, MIDDLE, LARGE = (1, 4, 100), (2, 8, 100), (6, 32, 100)
# size, loss, beta, rate, steps of PAIRS pairs: the short runs of all sizes first.
CELLS = (
    (SMALL, "ipo", 0.0, 2e-3, 1000),
    (SMALL, "ipo", 0.0, 5e-4, 1000),
    (MIDDLE, "ipo", 0.0, 2e-3, 1000),
    (MIDDLE, "ipo", 0.0, 5e-4, 1000),
    (MIDDLE, "ipo_group", 0.0, 5e-4, 1000),
    (LARGE, "ipo", 0.0, 2e-3, 1000),
    (LARGE, "ipo", 0.0, 5e-4, 1000),
    (LARGE, "ipo_group", 0.0, 5e-4, 1000),
    (SMALL, "nash_md", 0.0, 5e-4, 1000),
    (SMALL, "ipo", 0.0, 5e-4, 3000),
    (SMALL, "nash_md", 0.0, 5e-4, 3000),
    (SMALL, "ipo_md", 0.125, 5e-4, 3000),
    (MIDDLE, "ipo", 0.0, 5e-4, 3000),
    (LARGE, "ipo", 0.0, 5e-4, 3000),
)
PAIRS = 32
GROUP = 8  # samples of a prompt, if all are compared with each other
DEMOS = 4000
PANEL = os.path.join(os.path.dirname(__file__), "panel_of_texts.py")
PROMPTS = 20  # of a residual
SOLVED = 6  # prompts whose game is solved
DRAWS = 2000  # of the start, to a prompt: those that differ are the game's actions
SHARE = 0.8  # of the start's probability, that these must have for the game to stand for the whole


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


def cell(study, size, loss, beta, rate, steps, seed=0):
    """A run to do."""
    facts, tokens, prompts = size
    if study.scale != "full":
        steps = study.steps
    folder = os.path.join(study.folder, f"middle-{facts}-{prompts}")
    argv = files_of(folder)
    argv += ["--max-response-tokens", str(tokens), "--max-prompt-tokens", "64"]
    argv += ["--supervised-steps", "900", *study.stages, "--loss", loss, "--tau", str(TAU)]
    argv += ["--lr", str(rate), "--steps", str(steps), "--seed", str(seed)]
    if loss == "ipo_group":  # as many samples a step, compared each with all of its prompt
        argv += ["--batch-size", str(2 * PAIRS // GROUP), "--responses", str(GROUP)]
    else:
        argv += ["--batch-size", str(PAIRS)]
    argv += ["--eval-prompts", "10", "--save-every", str(max(1, steps // 4)), "--keep", "99"]
    if runs.samples_mixture(loss):
        argv += ["--beta", str(beta)]
    name = f"middle: {facts} facts {tokens} tokens {prompts} prompts "
    name += f"{loss} beta {beta:g} rate {rate:g} {steps} steps{f' seed {seed}' if seed else ''}"
    said = dict(facts=facts, tokens=tokens, prompts=prompts, loss=loss, beta=beta, rate=rate)
    where = dict(runs.where(study, PROMPTS), files=folder)
    return dict(name=name, **said, steps=steps, tau=TAU, argv=argv, where=where)


def cells(study):
    """What is to do."""
    return [cell(study, *which) for which in CELLS]


def opened(todo):
    """What a cell's run was trained on: (task, start, panel)."""
    stages = os.path.join(todo["where"]["folder"], "stages")
    options = job.options.parse([*todo["argv"], "--stages", stages, "--device", "cpu"])
    task, start, data_hash = data.open_task(options)
    reference, _ = job.stages.supervised(options, task, start, data_hash)
    return task, reference, job.judged.asked_file(options, task.tokenizer)


def run_to_residuals(todo):
    """Runs a cell. Returns its line: of every checkpoint the residual of eq 12 or 13 on training
    prompts, their number, and how far the last one is from the solved point."""
    there = todo["where"]
    write_files(there["files"], todo["facts"], todo["prompts"])
    out, seconds = runs.run_by_train(todo, runs.folder_of(todo["name"]))
    task, reference, panel = opened(todo)
    line = runs.line_of(todo)
    del line["argv"]  # it names files of this machine
    line["trained_on"] = task.most("align")
    line["seconds"] = seconds
    line["points"] = []
    for path in job.folder.checkpoints(out):
        policy = policies.load(path)[0]
        given = policy, reference, panel, task, TAU, todo["beta"]
        size = dict(split="align", count=there["prompts"])
        line["points"].append(dict(residuals.measure(*given, **size), step=int(path[-6:])))
    if todo["beta"] == 0:  # the sampler's per-token mixture is not one of whole responses
        line |= from_solved(policy, reference, panel, task)
    return line


def start_cells(study):
    """The start of every size, each with the options of a cell of its size."""
    found = {}
    for todo in cells(study):
        name = f"middle, the start: {todo['facts']} facts {todo['tokens']} tokens"
        found.setdefault(name, dict(todo, name=name))
    return list(found.values())


def measure_start(todo):
    """The line of a start: how exploitable it is."""
    there = todo["where"]
    write_files(there["files"], todo["facts"], todo["prompts"])
    task, reference, panel = opened(todo)
    given = reference, reference, panel, task, TAU, 0.0, "align", there["prompts"]
    numbers = equilibrium.summarise(equilibrium.measure(*given))
    line = {key: todo[key] for key in ("name", "facts", "tokens", "prompts", "tau")}
    names = ("exploitability", "exploitability_se")
    return line | {name: numbers[name] for name in names}


# ---- the solved point, where the start's own draws are most of what it can say ----


@torch.no_grad()
def actions(reference, task, prompt):
    """The different ones among DRAWS responses of the start to one prompt, Tokens."""
    drawn = data.uniforms(data.generator(0, "solved", 0), task.max_response, DRAWS, 1)
    given = (0.0,) * DRAWS, None, task.max_response, drawn.flatten(1)
    ids, mask, _ = sampler.sample(reference, None, prompt, *given)
    first = {}
    for row in range(DRAWS):
        first.setdefault(tuple(ids[row][mask[row].bool()].tolist()), row)
    rows = torch.tensor(list(first.values()))
    return policies.Tokens(ids[rows], mask[rows])


def matrix(panel, asked, y):
    """p(y_i > y_j) of all of one prompt's responses, [n, n] float64.

    asked, y:
        Tokens of n rows, the prompt again and again, and the responses.
    """
    count = len(y.ids)
    preferences = torch.full((count, count), 0.5, dtype=torch.float64)
    for column in range(count - 1):  # each pair once: exchanged it has one minus its p
        below = slice(column + 1, count)
        one, rival = asked.rows(below), y.rows(slice(column, column + 1))
        p = panel(one, y.rows(below), rival.repeat(len(one.ids))).double()
        preferences[below, column], preferences[column, below] = p, 1 - p
    return preferences


@torch.no_grad()
def from_solved(policy, reference, panel, task):
    """The total variation of a policy from the solved point among the start's own responses.

    Returns {} where these have less than SHARE of the start's probability in some prompt, else
    a dict of means over SOLVED training prompts:

    away, away_start:
        of the policy and of the start, each conditioned on these responses, in [0, 1].
    share, share_start:
        how much of the policy's and the start's probability these responses have.
    """
    rows = []
    prompts = task.prompts("align", 0, SOLVED)
    for number in range(SOLVED):
        prompt = prompts.rows(slice(number, number + 1))
        y = actions(reference, task, prompt)
        asked = prompt.repeat(len(y.ids))
        log_ref = policies.log_prob(reference, asked, y).double()
        if log_ref.exp().sum() < SHARE:
            return {}
        log_pi = policies.log_prob(policy, asked, y).double()
        ref, law = log_ref.log_softmax(0), log_pi.log_softmax(0)
        point = bandit.fixed_point(matrix(panel, asked, y), ref, TAU)
        away = [bandit.total_variation(one, point) for one in (law, ref)]
        rows.append(torch.stack([*away, log_pi.exp().sum(), log_ref.exp().sum()]))
    means = torch.stack(rows).mean(0).tolist()
    return dict(zip(("away", "away_start", "share", "share_start"), means, strict=True))


@torch.no_grad()
def meet(todo):
    """The line of how the policies of some runs meet, conditioned on the start's own responses to
    SOLVED training prompts, so exactly: kl, of each row to each column in nats, and win_rate, of
    each row over each column.

    todo:
        runs is a list of cells of one size.
    """
    task, reference, panel = opened(todo["runs"][0])
    models = []
    for run in todo["runs"]:
        out, _ = runs.run_by_train(run, runs.folder_of(run["name"]))
        models.append(policies.load(os.path.join(out, "policy"))[0])
    size = len(models)
    kl, wins = torch.zeros(2, size, size, dtype=torch.float64)
    prompts = task.prompts("align", 0, SOLVED)
    for number in range(SOLVED):
        prompt = prompts.rows(slice(number, number + 1))
        y = actions(reference, task, prompt)
        asked = prompt.repeat(len(y.ids))
        laws = [policies.log_prob(model, asked, y).double().log_softmax(0) for model in models]
        laws = torch.stack(laws)
        kl += bandit.kl(laws[:, None], laws[None]) / SOLVED
        wins += laws.exp() @ matrix(panel, asked, y) @ laws.exp().T / SOLVED
    names = [run["name"] for run in todo["runs"]]
    return dict(name=todo["name"], players=names, kl=kl.tolist(), win_rate=wins.tolist())


# ---- the table ----


def middle(study):
    """The table of all ends, and of the starts."""
    print("| facts, tokens, prompts | method | beta | rate | steps ", end="")
    print(f"| {residuals.HEAD} | TV (start's) | seconds |")
    print("|---" * (7 + residuals.COLUMNS) + "|")
    for line in runs.gather(study, run_to_residuals, cells(study)):
        print(f"| {line['facts']}, {line['tokens']}, {line['trained_on']} ", end="")
        name = runs.NAMES.get(line["loss"], f"IPO, all pairs of {GROUP}")
        print(f"| {name} | {line['beta']:g} | {line['rate']:g} | {line['steps']} ", end="")
        print(f"| {residuals.cells(line['points'][-1])} ", end="")
        away = f"{line['away']:.3f} ({line['away_start']:.3f})" if "away" in line else "-"
        print(f"| {away} | {line['seconds']:.0f} |")
    print("\n| facts, tokens | the start is exploitable by at least |\n|---|---|")
    for line in runs.gather(study, measure_start, start_cells(study)):
        gap = residuals.number(line, "exploitability")
        print(f"| {line['facts']}, {line['tokens']} | {gap} |")


def main(argv=None):
    """The command; returns the exit status."""
    torch.set_num_threads(1)
    return runs.main("studies.middle", __doc__, dict(middle=middle), argv)


if __name__ == "__main__":
    sys.exit(main())
