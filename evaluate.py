"""Side-by-side evaluation: two policies' responses to the same prompts, under a judge.

The judge gives p(y > y' | x) for two responses: the panel of the built-in task, exact, a preference
model's folder, or a FILE.py of one's own (job/judged.py).
Left out: ties, confidence beyond the standard error over prompts.
Run: python evaluate.py A B [--judge panel|FOLDER|FILE.py] [--prompts FILE]
     (A, B: policy or run folders)
"""

import argparse
import os
import sys
from functools import partial

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split

import torch

import data
import policy as policies
import preference_model
import sampler
import side_by_side
import stopping
from job import judged, parallel, report, terminal
from job.options import fail, positive_whole, seed, size, text
from policy import Tokens


@torch.no_grad()
def measure(policy, other, judge, task, split="test", count=500, seed=0, chunk=100):
    """Both policies answer the prompts of a split, and the judge compares them.

    policy, other:
        two models with one tokenizer.
    judge:
        judge(prompt, y, y_other) -> p(y > y_other | x), [B].
    task:
        where the prompts come from (data.py).
    split:
        "validation" or "test".
    count:
        number of prompts, at most; records may hold fewer.
    seed:
        of the responses.
    chunk:
        prompts at a time. The responses depend on it: a chunk is a step of the generators.

    Returns (numbers, kept). kept is a list of (prompt, y, y_other), Tokens each. numbers has

    win_rate, win_rate_se:
        mean of p(y > y') over prompts, y of policy and y' of other, and its standard error, None
        of one prompt.
    win_rate_equal, equal_length:
        of records alone: the mean over the pairs of about equal length, which differ by at most 2
        tokens or a tenth of the longer, None if there is no such pair; and their number.
    kl:
        mean of log pi(y)/pi_other(y) over policy's responses, nats.
    length, length_other:
        mean tokens of a response, end-of-text included.
    unfinished, distinct:
        shares of policy's responses: cut at the limit; different from one another.
    prompts:
        their number.
    """
    count = min(count, task.most(split))
    rows, texts, kept = [], [], []
    for step in range(-(-count // chunk)):  # rounded up
        prompt = task.prompts(split, step, chunk).rows(slice(0, count - step * chunk))
        mine = parallel.share(len(prompt.ids), least=0)
        if mine.start == mine.stop:  # the last chunk may be smaller than the processes are many
            continue
        answers = answer_both(
            policy, other, task, prompt.to(policy.device), mine, seed, split, step
        )
        prompt, y, finished, y_other = answers
        win = judge(prompt, y, y_other)
        ratio = log_ratio(policy, other, prompt, y)
        columns = [win, ratio, y.lengths(), y_other.lengths(), finished]
        rows.append(torch.stack([column.double().cpu() for column in columns], 1))
        texts += [tuple(row) for row in y.lists()]
        kept.append((prompt, y, y_other))
    # Of records: a judge that was trained may know little more than lengths.
    of_records = isinstance(task, (data.Records, data.Prompts))
    return summarise(parallel.gather((rows, texts)), by_length=of_records), kept


def summarise(parts, by_length=False):
    """The numbers that measure returns.

    parts:
        a list of (rows, texts), one a process: a list of [B, 5], win, log-ratio, both lengths and
        whether it ended; and the policy's responses as tuples.
    by_length:
        True for the win rate among responses of about equal length, too.
    """
    rows, texts = [], set()
    for its_rows, its_texts in parts:
        rows += its_rows
        texts.update(its_texts)
    win, log_ratio, length, length_other, ended = torch.cat(rows).unbind(1)
    equal = {}
    if by_length:
        apart = (length - length_other).abs()
        near = apart <= torch.clamp(0.1 * torch.maximum(length, length_other), min=2)
        won = win[near].mean().item() if near.any() else None  # None: null in a .json file
        equal = dict(win_rate_equal=won, equal_length=near.sum().item())
    return dict(
        win_rate=win.mean().item(),
        # Of one prompt there is none: null in a .json file, where NaN would be no number.
        win_rate_se=(win.std() / len(win) ** 0.5).item() if len(win) > 1 else None,
        **equal,
        kl=log_ratio.mean().item(),
        length=length.mean().item(),
        length_other=length_other.mean().item(),
        unfinished=1 - ended.mean().item(),
        distinct=len(texts) / len(win),
        prompts=len(win),
    )


def validate(policy, reference, judge, task):
    """A run's numbers now and then, on validation prompts, which are not the test prompts."""
    numbers, _ = measure(policy, reference, judge, task, "validation", count=100)
    names = ("win_rate", "kl", "length", "unfinished", "distinct")
    return {name: numbers[name] for name in names}


def answer_both(policy, other, task, prompt, mine, seed, split, step):
    """Both models' responses to a process's share of the prompts.

    prompt:
        Tokens of all processes.
    mine:
        a slice of its rows, this process's.

    Returns these prompts, policy's Tokens, finished [B], and the other's Tokens.
    """
    most, count = task.max_response, len(prompt.ids)
    prompt = prompt.rows(mine)

    def answer(model, name):
        # Two streams: with the same uniforms equal policies would give equal responses, and
        # p = 1/2 for free.
        rng = data.generator(seed, f"{split} {name}", step)
        drawn = data.uniforms(rng, most, 1, count)[:, 0, mine]
        ids, mask, finished = sampler.sample(model, None, prompt, 0.0, None, most, drawn)
        return Tokens(ids, mask), finished

    works = [partial(answer, policy, "policy"), partial(answer, other, "other")]
    (y, finished), (y_other, _) = side_by_side.run(works, policy.device)
    return prompt, y, finished, y_other


def log_ratio(policy, other, prompt, y):
    """log pi(y)/pi_other(y) of responses, nats, [B]."""
    works = [partial(policies.log_prob, model, prompt, y) for model in (policy, other)]
    log_pi, log_other = side_by_side.run(works, policy.device)
    return log_pi - log_other


def parse(argv):
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail  # one line without the usage
    parser.add_argument("a", type=text, help="policy folder, or a run's folder")
    parser.add_argument("b", type=text, help="the policy it is compared with")
    add_options(parser.add_argument, count=500)
    return parser.parse_args(argv)


def add_options(add, count):
    """The options that open_both reads, but for the folders a and b; count: of prompts."""
    add(
        "--judge",
        type=text,
        default="panel",
        help="panel (the built-in task's annotators), a preference model's folder, or a FILE.py: "
        "code of yours, which is run, with a function preference(prompts, ys, ys_other) on texts",
    )
    add(
        "--prompts",
        type=text,
        help="records prompt, or messages: a .jsonl, .json, .csv, .tsv (or .gz) or .parquet file, "
        "a folder saved by datasets or a hub name, these two also as NAME:SPLIT "
        "(default: the built-in task's test posts)",
    )
    add(
        "--count",
        type=positive_whole,
        default=count,
        help=f"prompts to compare on (default {count})",
    )
    add("--seed", type=seed, default=0, help="of the samples (default 0)")
    add(
        "--max-prompt-tokens",
        type=size,
        help="longer prompts are cut from the left (default: what the models' positions leave)",
    )
    add(
        "--max-response-tokens",
        type=size,
        default=48,
        help="of a response (default 48; the built-in task has its own)",
    )


def policy_folder(path):
    """The policy's folder of a run's folder; any other path as it is."""
    inside = os.path.join(path, "policy")
    return inside if os.path.isdir(inside) else path


def open_judge(options, policy, tokenizer):
    """--judge's FILE.py or preference model. Raises ValueError if it cannot read the policies."""
    if options.judge.endswith(".py"):
        return judged.Asked("--judge", options.judge, tokenizer)
    judge = preference_model.load(options.judge)
    if judge.body.config.vocab_size != policy.config.vocab_size:
        raise ValueError(
            f"--judge {options.judge}: give a judge that reads the policies' own tokens"
        )
    return judge


def own_prompts(options, policy, other, tokenizer):
    """(task, judge) for --prompts. Raises ValueError naming the option."""
    if options.judge == "panel":
        raise ValueError(
            "--judge panel reads only the built-in task's posts; "
            "give a preference model's folder or a FILE.py with --prompts"
        )
    judge = open_judge(options, policy, tokenizer)
    models = [policy, other]
    if not isinstance(judge, judged.Asked):  # which reads texts, of any length
        models.append(judge.body)
    positions = min(policies.context(model) for model in models)
    room = positions - options.max_response_tokens
    limit = options.max_prompt_tokens or room
    if not 1 <= limit <= room:
        raise ValueError(
            "--max-prompt-tokens and --max-response-tokens: "
            f"the models leave {room} tokens for a prompt; lower one"
        )
    records = data.read("prompts", options.prompts, tokenizer)
    task = data.Prompts(records, tokenizer, limit, options.max_response_tokens)
    return task, judge


def open_both(options):
    """What a command line names: (policy, other, task, judge, tokenizer).

    Raises ValueError naming the option and what to do.
    """
    policy, tokenizer = policies.load(policy_folder(options.a))
    other, other_tokenizer = policies.load(policy_folder(options.b))
    if tokenizer.get_vocab() != other_tokenizer.get_vocab():
        raise ValueError(
            f"{options.a} and {options.b} have different tokenizers; "
            "only policies with one tokenizer can be compared"
        )
    if options.prompts:
        task, judge = own_prompts(options, policy, other, tokenizer)
    else:
        task = data.BuiltIn()
        if tokenizer.get_vocab() != task.tokenizer.get_vocab():
            raise ValueError(
                f"{options.a}: does not speak the built-in task's words; "
                "give --prompts FILE and --judge FOLDER or FILE.py"
            )
        judge = task.judge
        if options.judge != "panel":
            judge = open_judge(options, policy, tokenizer)
    return policy, other, task, judge, tokenizer


def compare(options):
    """The comparison that a command line asks for: (numbers, kept, judge, tokenizer)."""
    policy, other, task, judge, tokenizer = open_both(options)
    numbers, kept = measure(policy, other, judge, task, "test", options.count, options.seed)
    return numbers, kept, judge, tokenizer


def main(argv=None):
    """Compares two policy folders; returns the exit status."""
    stopping.begun()
    policies.quiet()
    try:
        with terminal.shown():
            show(*compare(parse(argv)))
    except report.EXPECTED as error:
        status, line = report.ending(error, saves=False)
        print(f"evaluate.py: {line}", file=sys.stderr)
        return status
    return 0


def show(numbers, kept, judge, tokenizer):
    """Prints what compare returns."""
    print(report.samples(kept, judge, tokenizer, 3))
    for name, value in numbers.items():
        print(f"{name:14s} {'none' if value is None else format(value, '.4g')}")


if __name__ == "__main__":
    sys.exit(main())
