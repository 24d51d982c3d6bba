"""The options of train.py: what may be given, what is refused, and which file is a method.

A single value is checked where argparse reads it, combinations by the plain ifs below. A method is
found by its file's name, at the top of the tree or in losses/: no table lists them.
Left out: configuration files. A run's folder holds its options in config.json.
"""

import argparse
import contextlib
import importlib
import inspect
import os
import re
from pathlib import Path

import torch

import policy as policies
from job import parallel

ROOT = Path(__file__).resolve().parent.parent
# What is chosen from recorded data where it is not given (job/stages.py: choose_sizes), with the
# built-in task's values: they are the most that is chosen, too.
SIZES = dict(supervised_steps=900, preference_steps=2000, steps=200, max_prompt_tokens=448)
# Of a method's RATE, which was chosen for the tiny policy. GPT-2 124M, IPO-MD on the built-in task:
# 2e-3 and 5e-4 are at two tokens by step 20, 1e-4 by step 40, 3e-5 learns (docs/speed.md).
RATE_OF_LARGE = 0.015
LARGEST = 1e12  # of tau, rates and weights
MOST = 10**9  # of steps and prompts
LARGE = 2**20  # of rows of a batch, or tokens of a row; most memories hold less
SMALL = "; with your own data, what is enough for it, if that is less"


def method_names():
    """The methods, by name: the files at the top and in losses/ that set TAU."""
    names = []
    for folder in (ROOT, ROOT / "losses"):
        for path in folder.glob("*.py"):
            if re.search(r"^TAU = ", path.read_text(encoding="utf-8"), re.MULTILINE):
                names.append(path.stem)
    return sorted(names)


def find_method(name):
    """The module of a method by its name.

    name:
        one of method_names(), such as "ipo_md".

    Returns the module; its contract is in losses/README.md.
    """
    return importlib.import_module(name if is_the_papers(name) else f"losses.{name}")


def is_the_papers(name):
    """Whether a method is one of the paper's: its file is at the top of the tree."""
    return (ROOT / f"{name}.py").exists()


def constants(method):
    """A method's constants that --set may change.

    {name: default}, the keyword defaults of its loss.
    """
    found = {}
    for name, parameter in inspect.signature(method.loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            found[name] = parameter.default
    return found


def requests(method):
    """What a method's loss asks the trainer for: its keywords without a default, a set of names."""
    found = set()
    for name, parameter in inspect.signature(method.loss).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            found.add(name)
    return found


def requested(method, policy, reference, prompt, y, *others):
    """The values of a method's requests for a batch of pairs, or of groups of K responses.

    policy, reference:
        the models, for the method's own extra(policy, reference, prompt, response) -> [B].
    prompt, y, others:
        Tokens with a row a pair: y' is the other.

    Returns {name: [B]}, for groups {name: [B, K]}, empty for most methods; extra has the gradient
    that its file gives it. Raises ValueError for a request that is none of length, length_other,
    extra, extra_other, nor a number of the whole batch, which of_batch has.
    """
    found = {}
    for name in sorted(requests(method) - set(getattr(method, "OF_BATCH", ()))):
        responses = others[:1] if name.endswith("_other") else (y,)
        if is_group(method):
            responses = (y, *others)
        if name in ("length", "length_other"):
            values = [response.lengths() for response in responses]
        elif name in ("extra", "extra_other"):
            values = [method.extra(policy, reference, prompt, response) for response in responses]
        else:
            fail(f"{method.__name__}: its loss asks for {name}, which no trainer has; see losses/")
        found[name] = torch.stack(values, 1) if is_group(method) else values[0]
    return found


def of_batch(options, method, policy, drawer, reference, *batch):
    """What a method's loss asks for that is of the whole batch, of all its parts and processes.

    policy, drawer, reference:
        the models; the drawer is who drew the batch, the policy itself unless --refresh is given.
    batch:
        prompt, y, y_other, label: Tokens with a row a pair, and [B]; this process's rows.

    Returns {name: [B]} without gradient, a value for each of the rows; empty for most methods.
    """
    if not hasattr(method, "OF_BATCH"):
        return {}
    with torch.no_grad():
        given = parallel, options.micro_batch_size, policy, drawer, reference
        return method.of_batch(*given, *batch)


def is_group(method):
    """Whether a method compares K responses, --responses, of a prompt, not a pair."""
    return hasattr(method, "RESPONSES")


def drawn_by(options, method):
    """Who draws each response to a prompt, as PAIR names it; of a group, any more as the last."""
    names = list(method.PAIR)
    return names + names[-1:] * ((options.responses or len(names)) - len(names))


def own(method, function):
    """The function of the same name that a method's file brings in its place, if it brings one."""
    return getattr(method, function.__name__, function)


def positive(text):
    """A number above 0 whose square and inverse float32 still has."""
    advice = f"give a number above 0, from {1 / LARGEST:g} to {LARGEST:g}"
    return number(text, float, advice, lambda value: 1 / LARGEST <= value <= LARGEST)


def not_negative(text):
    """A number, 0 or more, whose square float32 still has."""
    advice = f"give a number, 0 or more, up to {LARGEST:g}"
    return number(text, float, advice, lambda value: 0 <= value <= LARGEST)


def size(text):
    """A whole number above 0, of what is in memory at once: rows, tokens, responses."""
    advice = f"give a whole number above 0, up to {LARGE}"
    return number(text, int, advice, lambda value: 0 < value <= LARGE)


def positive_whole(text):
    """A whole number above 0: prompts, steps between."""
    advice = f"give a whole number above 0, up to {MOST}"
    return number(text, int, advice, lambda value: 0 < value <= MOST)


def whole(text):
    """A whole number, 0 or more: steps."""
    advice = f"give a whole number, 0 or more, up to {MOST}"
    return number(text, int, advice, lambda value: 0 <= value <= MOST)


def seed(text):
    """A whole number, 0 or more, of which the judge's seed, one more, is one, too."""
    advice = "give a whole number, 0 or more, below 2^63 - 1"
    return number(text, int, advice, lambda value: 0 <= value < 2**63 - 1)


def text(value):
    """A text that says something: an empty one is not the same as none."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the option out")
    if not value.isprintable():  # nor bytes that are no letters: libraries cannot write such names
        raise argparse.ArgumentTypeError(f"{ascii(value)}: give a name of letters that are shown")
    return value


def weight(text):
    """A number from 0 to 1."""
    advice = "give a weight from 0 (policy) to 1 (reference)"
    return number(text, float, advice, lambda value: 0 <= value <= 1)


def number(text, kind, advice, holds):
    """text as a kind of number for which holds(number); argparse prints the advice otherwise."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if holds(value):  # NaN fails every comparison
            return value
    raise argparse.ArgumentTypeError(f"{text[:40]}: {advice}")


def assignment(text):
    """NAME=VALUE as (name, number)."""
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if abs(float(value)) <= LARGEST:  # no comparison holds for NaN
            return name.strip(), float(value)
    raise argparse.ArgumentTypeError(f"{text[:40]}: give NAME=NUMBER")


def fail(message):
    raise ValueError(message)


def parse(argv):
    """The options of a command line, checked, with the defaults that depend on others filled in.

    argv:
        the words after train.py, or None for those of the process.

    Returns the options as an argparse.Namespace. Raises ValueError naming the option and what to
    do.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Aligns a policy with preferences, online, by any of the methods.",
        allow_abbrev=False,
    )
    parser.error = fail  # one line without the usage, like every other error
    add_method_options(parser.add_argument_group("the method").add_argument)
    add_lag_options(parser.add_argument_group("what lags behind the policy").add_argument)
    add = parser.add_argument_group("data and models").add_argument
    add_data_options(add)
    add_judge_options(add)
    add_stage_options(parser.add_argument_group("the stages before the alignment").add_argument)
    add_run_options(parser.add_argument_group("the run").add_argument)
    options = parser.parse_args(argv)
    complete(options)
    return options


def add_method_options(add):
    add("--loss", default="ipo_md", choices=method_names(), help="which method (default ipo_md)")
    add("--tau", type=positive, help="regularisation strength, above 0; default: the method's TAU")
    add("--beta", type=weight, help="weight of the reference in the mixture, 0 to 1 (its BETA)")
    add(
        "--set",
        type=assignment,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="another value for a constant of the loss; may be repeated",
    )
    add("--offline", action="store_true", help="learn from the recorded comparisons")
    add(
        "--length-average",
        action="store_true",
        help="the loss takes log-probabilities a token, not of whole responses: not the theory's, "
        "but what the paper's taus suggest; for contrastive losses of pairs",
    )
    add("--steps", type=whole, help=f"alignment steps (default 200{SMALL})")
    add(
        "--lr",
        type=positive,
        help="alignment's highest learning rate (default: the method's RATE for --policy tiny, "
        f"{RATE_OF_LARGE:g} of it for any other: 3e-5 of IPO and IPO-MD)",
    )
    add(
        "--decay",
        default="linear",
        choices=("linear", "cosine", "none"),
        help="how the rate falls towards 0, behind the last step; none: it stays (default linear)",
    )
    add(
        "--warm-up",
        type=whole,
        default=10,
        help="steps in which the rate rises in a line to --lr (default 10)",
    )
    add(
        "--responses",
        type=size,
        help="responses to a prompt, for a method that compares groups (default: its RESPONSES)",
    )
    add("--batch-size", type=size, default=32, help="prompts a step (default 32)")
    add(
        "--micro-batch-size",
        type=size,
        help="pairs a backward pass: less memory, the same result (default: the whole batch)",
    )
    help_seed = "of the draws; of --offline which recorded pairs, or in which order (default 0)"
    add("--seed", type=seed, default=0, help=help_seed)


def add_lag_options(add):
    add(
        "--refresh",
        type=positive_whole,
        default=1,
        metavar="N",
        help="who draws the pairs is the policy of up to N - 1 steps before, renewed every N: "
        "more than 1 is iterative, --steps offline on own samples (default 1: online)",
    )
    add(
        "--renew-reference",
        type=whole,
        default=0,
        metavar="N",
        help="every N steps the loss's reference becomes the policy; evaluations compare with the "
        "start (default 0: it stays the start)",
    )
    add(
        "--epochs",
        type=positive_whole,
        default=1,
        metavar="N",
        help="optimiser steps on each batch of pairs (default 1)",
    )
    add(
        "--ptx",
        type=not_negative,
        default=0.0,
        metavar="WEIGHT",
        help="adds WEIGHT times the demos' loss a token, PPO-ptx's term, to any loss (default 0)",
    )


def add_data_options(add):
    add(
        "--demos",
        type=text,
        metavar="DATA",
        help="records prompt, completion, or messages: a .jsonl, .json, .csv, .tsv (or .gz) or "
        ".parquet file, a folder saved by datasets or a hub name, these two also as NAME:SPLIT "
        "(default: the built-in task)",
    )
    add(
        "--comparisons",
        type=text,
        metavar="DATA",
        help="records prompt, chosen, rejected, or the last two alone, whose common beginning is "
        "the prompt; without --demos the chosen responses are the demos",
    )
    add(
        "--prompts",
        type=text,
        metavar="DATA",
        help="records prompt, or messages, to align and evaluate on "
        "(default: the demos' or comparisons')",
    )
    add(
        "--policy",
        type=text,
        default="tiny",
        help="tiny or gpt2-124m from scratch, or a folder or hub name such as gpt2 (default tiny)",
    )
    add(
        "--tokenizer",
        type=text,
        help="folder or hub name, for a policy from scratch on your own data "
        "(default: a byte-level BPE trained on it)",
    )
    add("--data-seed", type=seed, default=0, help="of the shared stages (default 0)")
    add(
        "--max-prompt-tokens",
        type=size,
        help=f"longer prompts are cut from the left (default 448{SMALL})",
    )
    add(
        "--max-response-tokens",
        type=size,
        default=48,
        help="(default 48; the built-in task has its own)",
    )
    add("--eval-prompts", type=positive_whole, default=500, help="test prompts (default 500)")


def add_judge_options(add):
    add(
        "--preference",
        type=text,
        metavar="FILE.py",
        help="code of yours, which is run: its function preference(prompts, ys, ys_other) takes "
        "lists of texts and returns probabilities; in place of a trained preference model, "
        "and of the judge but on the built-in task, whose panel stays",
    )
    add(
        "--preference-model",
        type=text,
        metavar="FOLDER",
        help="a preference model that was trained before, kept under --stages or by python -m "
        "studies.preference, in place of training one; without --comparisons it judges, too",
    )


def add_stage_options(add):
    add("--supervised-steps", type=whole, help=f"(default 900{SMALL})")
    add("--supervised-lr", type=positive, help="(default 3e-3 for tiny, 1e-4 else)")
    add("--preference-steps", type=whole, help=f"(default 2000{SMALL})")
    add(
        "--stages",
        type=text,
        default="runs/stages",
        help="where they are kept (default runs/stages)",
    )


def add_run_options(add):
    add("--out", type=text, help="run folder (default runs/LOSS-seedSEED)")
    add(
        "--save-every",
        type=positive_whole,
        default=50,
        help="steps from checkpoint to checkpoint (default 50)",
    )
    add("--keep", type=positive_whole, default=2, help="checkpoints to keep (default 2)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out from its last checkpoint, or begin it",
    )
    add(
        "--show",
        action="store_true",
        help="print two pairs of step 0 in text and numbers, and every step's numbers",
    )
    add(
        "--table1",
        action="store_true",
        help="print the paper's Table 1 by the methods' files, and run nothing",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16: autocast; weights and losses stay float32",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="keep no layer's inside for the backward pass, compute it again: less memory, slower",
    )


def complete(options):
    """Fills the defaults that depend on other options.

    Raises ValueError for what cannot be combined.
    """
    method = find_method(options.loss)
    options.set = checked_constants(options, method)
    check_method(options, method)
    if options.responses is not None:
        check_responses(options, method)
    if options.preference:
        check_preference(options, method)
    if options.preference_model:
        check_preference_model(options)
    check_data(options)
    if options.batch_size < parallel.size():
        fail(
            f"--batch-size {options.batch_size}: fewer than the {parallel.size()} processes; "
            "raise it or start fewer"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is available; take --device cpu")

    not_given = [name for name in SIZES if getattr(options, name) is None]
    for name in not_given:
        setattr(options, name, SIZES[name])
    if options.demos or options.comparisons or options.prompts:
        options.from_data = not_given
    if options.tau is None:
        options.tau = method.TAU
    if options.responses is None:
        options.responses = getattr(method, "RESPONSES", None)
    if options.lr is None:
        options.lr = method.RATE * (1.0 if options.policy == "tiny" else RATE_OF_LARGE)
    if options.beta is None:
        options.beta = getattr(method, "BETA", 0.0)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.out is None:
        kind = f"{options.loss}-offline" if options.offline else options.loss
        options.out = f"runs/{kind}-seed{options.seed}"


def check_method(options, method):
    """Raises ValueError for an option that the method, or another option, does not go with."""
    if options.beta is not None and not hasattr(method, "BETA"):
        others = [name for name in method_names() if hasattr(find_method(name), "BETA")]
        fail(
            f"--beta {options.beta}: --loss {options.loss} samples no mixture; "
            f"leave --beta out or take one of {', '.join(others)}"
        )
    if options.offline and not method.OFFLINE:
        others = [name for name in method_names() if find_method(name).OFFLINE]
        fail(
            f"--offline: --loss {options.loss} learns from its own samples; "
            f"take one of {', '.join(others)}"
        )
    if options.offline and options.refresh > 1:
        fail(f"--refresh {options.refresh}: --offline draws no pairs; leave one of them out")
    alone = method.CONTRASTIVE and not hasattr(method, "OF_BATCH") and not is_group(method)
    if options.length_average and not alone:
        fail(
            f"--length-average: --loss {options.loss} takes log-probabilities as its paper does; "
            "take a contrastive loss of pairs, such as ipo"
        )
    if options.ptx and not (options.demos or options.comparisons) and options.prompts:
        fail(f"--ptx {options.ptx:g}: there is nothing to imitate; give --demos too")


def check_responses(options, method):
    """Raises ValueError for a --responses that the method does not take."""
    if not is_group(method):
        others = [name for name in method_names() if is_group(find_method(name))]
        fail(
            f"--responses {options.responses}: --loss {options.loss} compares two; "
            f"leave --responses out or take one of {', '.join(others)}"
        )
    least = len(method.PAIR)
    if options.responses < least:
        fail(f"--responses {options.responses}: --loss {options.loss} takes {least} or more")


def check_preference(options, method):
    """Raises ValueError for what --preference does not go with, or if there is no such file."""
    option = f"--preference {options.preference}"
    if not os.path.isfile(options.preference):
        fail(f"{option}: no such file; give a .py file")
    if options.offline:
        fail(f"{option}: --offline learns from recorded votes and asks nobody; leave one out")
    if method.LABEL != "preference":
        others = [name for name in method_names() if find_method(name).LABEL == "preference"]
        fail(
            f"{option}: --loss {options.loss} learns from a reward, the file gives preferences; "
            f"take one of {', '.join(others)}"
        )


def check_preference_model(options):
    """Raises ValueError for what --preference-model does not go with."""
    option = f"--preference-model {options.preference_model}"
    if options.preference:
        fail(f"{option}: --preference {options.preference} takes its place; leave one out")
    if options.offline:
        fail(f"{option}: --offline learns from recorded votes and asks no model; leave one out")


def check_data(options):
    """Raises ValueError for records that are not enough, or a tokenizer that is not wanted."""
    from_scratch = options.policy in policies.SIZES
    if not (options.demos or options.comparisons):
        if (options.preference or options.preference_model) and options.prompts:
            # Nothing to imitate, nothing to learn a preference from: the policy is the start.
            if from_scratch or options.supervised_steps != 0:
                fail(
                    "--prompts: there is nothing to imitate; "
                    "give --demos too, or a --policy FOLDER with --supervised-steps 0"
                )
        elif options.prompts or options.tokenizer:
            fail("--prompts and --tokenizer go with your own data; give --comparisons too")
        else:
            return
    elif not (options.comparisons or options.preference or options.preference_model):
        fail(
            "--demos: needs --comparisons to learn a preference model from, or a --preference "
            "file, or a --preference-model"
        )
    if options.tokenizer and not from_scratch:
        fail(f"--tokenizer: the policy {options.policy} brings its own; leave --tokenizer out")


def checked_constants(options, method):
    """--set's values by name, of the default's kind.

    Raises ValueError for a name that there is not.
    """
    known, values = constants(method), {}
    for name, value in options.set:
        if name not in known:
            its_own = ", ".join(f"{key}={value:g}" for key, value in known.items()) or "none"
            fail(f"--set {name}: --loss {options.loss} has no such constant; it has: {its_own}")
        kind = type(known[name])
        if kind(value) != value:
            fail(f"--set {name}={value:g}: give a whole number")
        values[name] = kind(value)
    return values


def precision(options):
    """Autocast to bfloat16 where --dtype asks for it; else a context that does nothing.

    Without autocast's cache, which keeps the first cast of every weight until the context ends: a
    step inside would not be seen, so that a model goes on learning as if it had never moved, and
    what was scored without a gradient before would have none afterwards.
    """
    if options.dtype == "bfloat16":
        return torch.autocast(options.device, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
