"""What a run shows: one step in text and numbers, the samples, the pictures, the results."""

import json
import os
import signal

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import files
import policy as policies
from job import folder
from job.folder import write_json
from job.options import (
    drawn_by,
    find_method,
    is_group,
    is_the_papers,
    method_names,
    requested,
    requests,
)

# What may end a run that is no mistake of the program.
EXPECTED = (
    KeyboardInterrupt,
    ValueError,
    FloatingPointError,
    MemoryError,
    OSError,
    SafetensorError,
    RuntimeError,  # the CPU's memory is full; any other is raised again
)
GOES_ON = "nothing finished is lost: the same command with --resume goes on"
KEPT = "what is finished is kept, --resume goes on"
OUT_OF_MEMORY = (
    "the device's memory is full; lower --micro-batch-size, --batch-size or --max-prompt-tokens, "
    "or take --gradient-checkpointing or --dtype bfloat16, and give another --out: the stages are "
    "kept"
)
MEMORY_IS_FULL = (
    "the device's memory is full; lower --max-prompt-tokens or --max-response-tokens, or take "
    "smaller models"
)
CURVES = {
    "win_rate": "win rate against the start",
    "kl": "KL to the reference (nats)",
    "length": "length (tokens)",
    "loss": "loss",
}


def kind_of(method, offline):
    """A method's row of the paper's Table 1, "yes" or "no" each.

    Returns whether it is contrastive, online, and with regularised sampling: a part of the pair is
    drawn from the mixture with the reference.
    """
    of_mixture = "mixture" in method.PAIR
    holds = (method.CONTRASTIVE, not offline, of_mixture and not offline)
    return ["yes" if answer else "no" for answer in holds]


def print_table1():
    """The paper's Table 1, by the constants of the methods' files: of those at the top of the tree,
    the paper's own, first those that may learn from recorded pairs, as they do so."""
    methods = [find_method(name) for name in method_names() if is_the_papers(name)]
    rows = [(method, True) for method in methods if method.OFFLINE]
    rows += [(method, False) for method in methods]
    print("method         contrastive  online  regularised sampling  y, y' from")
    for method, offline in rows:
        name = f"{method.__name__} {'offline' if offline else ''}"
        contrastive, online, regularised = kind_of(method, offline)
        drawers = "records" if offline else ", ".join(method.PAIR)
        print(f"{name:<15}{contrastive:<13}{online:<8}{regularised:<22}{drawers}")


def print_method(options, method):
    """A line a run: the paper's Table 1 for its method, and the convention of its tau."""
    contrastive, online, _ = kind_of(method, options.offline)
    drawers = ("records", "records") if options.offline else drawn_by(options, method)
    drawn = f"y from the {drawers[0]}, y' from the {drawers[1]}"
    if is_group(method):
        names = [f"{name} ({drawers.count(name)})" for name in dict.fromkeys(drawers)]
        drawn = f"a group from the {', the '.join(names)}"
    scored = "means over tokens" if options.length_average else "sums"
    print(
        f"{options.loss}: contrastive {contrastive}, online {online}, "
        f"{drawn}; "
        f"log-probabilities are {scored}, tau = {options.tau}, beta = {options.beta}"
    )
    whole = set(getattr(method, "OF_BATCH", ()))
    for names, of in ((requests(method) - whole, "a response"), (whole, "the whole batch")):
        if names:
            print(f"{options.loss}: its loss also takes of {of}: {', '.join(sorted(names))}")


def means(share, label, responses):
    """The means of a step's labels, of equal pairs of y and y', and of y's length.

    share:
        of this process's rows in all rows, so that the processes' numbers add up.
    label, responses:
        of its rows.
    """
    y, y_other = responses[:2]
    return dict(
        label=label.mean().item() * share,
        same=policies.same_rows(y, y_other).float().mean().item() * share,
        length=y.lengths().float().mean().item() * share,
    )


def show(options, method, *models_and_batch, **whole):
    """Prints the first two rows of a batch: show_group where the method compares groups, else
    show_pairs."""
    shown = show_group if is_group(method) else show_pairs
    shown(options, method, *models_and_batch, **whole)


@torch.no_grad()
def show_group(options, method, tokenizer, policy, reference, *batch, **whole):
    """Prints the first two prompts of a batch with all responses, before the step is taken.

    Arguments as show_pairs, with K responses in the batch; label is [B, K, K] p(y_i > y_j | x), of
    which each response's mean is shown, or [B, K] r(y), or [B] p(y_1 > y_2 | x).
    """
    rows = slice(0, 2)
    prompt, *responses, label = batch
    prompt, responses = prompt.rows(rows), [response.rows(rows) for response in responses]
    label = label[rows]
    asked = requested(method, policy, reference, prompt, *responses)
    asked.update({name: numbers[rows] for name, numbers in whole.items()})
    given = options, method, policy, reference, prompt, *responses, label
    loss, _ = method.pair_losses(*given, **asked)
    name, shown = "r(y)", label
    if label.ndim == 3:
        name, shown = "p(y > the group)", label.mean(2)
    if label.ndim == 1:
        name, shown = "p(y1 > y2)", label[:, None].expand(-1, len(responses))
    text, drawers = tokenizer.batch_decode(prompt.lists()), drawn_by(options, method)
    for row in range(len(loss)):
        tqdm.write(f"\nprompt {row + 1}: {text[row]}")
        for number, response in enumerate(responses):
            one = response.rows(slice(row, row + 1))
            asker = prompt.rows(slice(row, row + 1))
            logp = policies.log_prob(policy, asker, one).item()
            ref_logp = policies.log_prob(reference, asker, one).item()
            said = tokenizer.batch_decode(one.lists())[0]
            tqdm.write(f"  y{number + 1} ({drawers[number]}): {said}")
            tqdm.write(f"    {name:23s} {shown[row, number]:12.6f}")
            tqdm.write(f"    log pi, log pi_ref      {logp:12.6f} {ref_logp:12.6f}")
            for request, value in asked.items():
                # One number a response, or one for each of its tokens.
                of_response = value[row, number].flatten().tolist()
                values = " ".join(f"{entry:12.6f}" for entry in of_response)
                tqdm.write(f"    {request:23s} {values}")
        tqdm.write(f"  loss                      {loss[row]:12.6f}")


@torch.no_grad()
def show_pairs(options, method, tokenizer, policy, reference, prompt, y, y_other, label, **whole):
    """Prints the first two pairs of a batch as the paper writes them, before the step is taken.

    options:
        of the run: names, tau, beta and the loss's constants.
    method:
        the method's file.
    tokenizer:
        of the policy.
    policy, reference:
        the models that the pairs are scored with.
    prompt, y, y_other:
        Tokens with a row a pair.
    label:
        [B] p(y > y' | x), or r(y) - r(y') where the method's LABEL is "reward".
    whole:
        [B] each, what the loss takes of the whole batch.
    """
    rows = slice(0, 2)
    prompt, y, y_other, label = prompt.rows(rows), y.rows(rows), y_other.rows(rows), label[rows]
    log_prob = policies.scoring(options)
    logp = log_prob(policy, prompt, y)
    ref_logp = log_prob(reference, prompt, y)
    logp_other = log_prob(policy, prompt, y_other)
    ref_logp_other = log_prob(reference, prompt, y_other)
    h = (logp - ref_logp) - (logp_other - ref_logp_other)
    asked = requested(method, policy, reference, prompt, y, y_other)
    asked.update({name: numbers[rows] for name, numbers in whole.items()})
    target = method.target_gap(label, options.tau, **options.set, **asked)
    sides = logp, logp_other, ref_logp, ref_logp_other
    loss = method.loss(*sides, label, options.tau, **options.set, **asked)
    rewards = method.LABEL == "reward"
    drawers = method.PAIR
    if options.offline:
        drawers = ("recorded", "recorded")
    text = [tokenizer.batch_decode(part.lists()) for part in (prompt, y, y_other)]
    for row in range(len(h)):
        tqdm.write(f"\nprompt {row + 1}: {text[0][row]}")
        tqdm.write(f"  y  ({drawers[0]}): {text[1][row]}")
        tqdm.write(f"  y' ({drawers[1]}): {text[2][row]}")
        name = "r(y) - r(y')" if rewards else "p(y > y')"
        tqdm.write(f"  {name:25s} {label[row]:12.6f}")
        tqdm.write(f"  log pi(y),  log pi_ref(y)  {logp[row]:12.6f} {ref_logp[row]:12.6f}")
        other = f"{logp_other[row]:12.6f} {ref_logp_other[row]:12.6f}"
        tqdm.write(f"  log pi(y'), log pi_ref(y') {other}")
        for name, value in asked.items():
            tqdm.write(f"  {name:25s} {value[row]:12.6f}")
        if target is None:  # a pair alone has none: the method's file says why
            tqdm.write(f"  h, without a target        {h[row]:12.6f}")
        elif method.LEARNS_FROM == 2:
            tqdm.write(f"  h, its target              {h[row]:12.6f} {target[row]:12.6f}")
        else:
            ratio = logp[row] - ref_logp[row]
            tqdm.write(f"  log pi(y)/pi_ref(y), target {ratio:11.6f} {target[row]:12.6f}")
        tqdm.write(f"  loss                       {loss[row]:12.6f}")


def samples(kept, judge, tokenizer, count=5):
    """Text of the first prompts with both responses, and what the judge says of them.

    kept:
        a list of (prompt, y, y_other), Tokens each, as evaluate.measure returns it; the first is
        shown.
    judge:
        judge(prompt, y, y_other) -> [B]; with votes and ANNOTATORS, as the panel has, each vote is
        shown.
    tokenizer:
        of the policies.
    count:
        number of prompts.
    """
    # No more than are shown: a judge may be slow, or a person.
    prompt, y, y_other = (part.rows(slice(0, count)) for part in kept[0])
    preference = judge(prompt, y, y_other)
    votes = None
    if hasattr(judge, "votes"):
        votes = judge.votes(prompt, y, y_other).tolist()
    asked, result, start = (
        tokenizer.batch_decode(part.lists(), skip_special_tokens=True)
        for part in (prompt, y, y_other)
    )
    lines = []
    for row in range(len(preference)):
        lines.append(f"prompt: {asked[row]}")
        lines.append(f"  start:  {start[row]}")
        lines.append(f"  result: {result[row]}")
        lines.append(f"  p(result > start) = {preference[row]:.3f}")
        if votes is not None:
            named = zip(judge.ANNOTATORS, votes[row], strict=True)
            lines.append("  " + ", ".join(f"{name} {vote:.2f}" for name, vote in named))
        lines.append("")
    return files.escaped("\n".join(lines))


def held_out(numbers):
    """How well a model does on pairs that it has not seen, in a line or two.

    numbers:
        preference_model.accuracy's, or worth's and where it stopped (job/recorded.py).
    """
    rules = f"shorter wins {numbers['shorter_wins']:.3f}, longer wins {numbers['longer_wins']:.3f}"
    if "low" not in numbers:
        return (
            f"  on {numbers['pairs']} held-out pairs: right sign {numbers['accuracy']:.3f} "
            f"({rules}), mean |p_hat - p| {numbers['error']:.3f}"
        )
    interval = f"95 % {numbers['low']:.3f} to {numbers['high']:.3f}"
    trained = ""
    if "stopped" in numbers:
        trained = (
            f"  {numbers['training']} pairs to learn from, {numbers['validation']} to stop by: "
            f"best after {numbers['stopped']} of {numbers['steps']} steps "
            f"({numbers['passes']:.1f} passes)\n"
        )
    return (
        f"{trained}  on {numbers['pairs']} pairs that it has no part in: right sign "
        f"{numbers['accuracy']:.3f} ({interval}; {rules}, chance 0.500), correlation of p with the "
        f"length difference {numbers['length_correlation']:.2f}"
    )


def judge_worth(numbers):
    """What a summary says of a judge that was trained, before the numbers that it gives.

    numbers:
        preference_model.worth's, or {} where none are known.

    Returns a dict: warning, if the judge is not shown to beat the best of the rules that read
    nothing, then its accuracy, the 95 % interval's ends, and that rule's accuracy; {} for {}.
    """
    if "gain_low" not in numbers:
        return {}
    found = {}
    if not numbers["gain_low"] > 0:
        found["warning"] = (
            f"the judge is right on {numbers['accuracy']:.3f} of {numbers['pairs']} pairs that it "
            f"has no part in, the rule '{numbers['rule']}' on {numbers['rule_accuracy']:.3f}: it "
            f"is not shown to beat the rule (difference {numbers['gain']:+.3f}, 95 % "
            f"{numbers['gain_low']:+.3f} to {numbers['gain_high']:+.3f}), and a win rate that it "
            "gives may say no more"
        )
    return found | dict(
        judge_accuracy=numbers["accuracy"],
        judge_low=numbers["low"],
        judge_high=numbers["high"],
        judge_rule=numbers["rule_accuracy"],
    )


def plot(path, panels):
    """Writes a picture of panels side by side.

    path:
        of the .png.
    panels:
        a list of (title, x label, y label, {label: (xs, ys)}). An x label "tau" makes that axis
        logarithmic, one that begins with "KL" leaves the points unconnected.
    """
    try:
        from matplotlib.figure import Figure  # here: only pictures need it
    except ImportError:  # a run of hours must not end in an error for a picture's sake
        print(f"warning: no {os.path.basename(path)}: matplotlib is not installed")
        return
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, x, y, series) in zip(axes, panels, strict=True):
        style = "o" if x.startswith("KL") else "o-"
        for label, (xs, ys) in series.items():
            axis.plot(xs, ys, style, markersize=4, label=label, alpha=0.8)
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log" if x == "tau" else "linear")
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=7)
    with folder.whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)


def curves(metrics):
    """A run's panels for plot, from the path of its metrics.jsonl."""
    with open(metrics, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    panels = []
    for name, title in CURVES.items():
        # A step's line has a length, too: that of one batch. The evaluations' is drawn.
        wanted = "loss" if name == "loss" else "win_rate"
        shown = [line for line in lines if wanted in line]
        xs = [line["step"] for line in shown]
        ys = [line[name] for line in shown]
        panels.append((title, "step", "", {name: (xs, ys)}))
    return panels


def write_results(options, task, policy, numbers, kept, judge, seconds):
    """Writes what a finished run leaves: samples.txt, curves.png, policy/ and, last, summary.json.

    options:
        of the run.
    task:
        its prompts.
    policy:
        as the last step left it.
    numbers, kept:
        of the test prompts, as evaluate.measure returns them.
    judge:
        who judged them.
    seconds:
        that the run took.

    Returns the summary.
    """
    out = options.out
    with folder.whole_file(os.path.join(out, "samples.txt")) as file:
        file.write(samples(kept, judge, task.tokenizer))
    plot(os.path.join(out, "curves.png"), curves(os.path.join(out, "metrics.jsonl")))
    with folder.whole(os.path.join(out, "policy")) as unfinished:
        policy.save_pretrained(unfinished)
        task.tokenizer.save_pretrained(unfinished)
        hashes = folder.hashes(unfinished)
    write_json(os.path.join(out, folder.MANIFEST), hashes)
    cut = getattr(task, "cut", None)
    if cut:
        print(
            f"warning: {len(cut)} prompts are longer than {task.max_prompt} tokens "
            "and were cut from the left"
        )
    summary = dict(
        numbers,
        loss=options.loss,
        tau=options.tau,
        beta=options.beta,
        steps=options.steps,
        seconds=seconds,
    )
    # Last: its presence says that the run is finished.
    write_json(os.path.join(out, "summary.json"), summary)
    return summary


def print_summary(options, summary):
    """The end of a run on the screen."""
    if "warning" in summary:
        print(f"warning: {summary['warning']}")
    shown = {name: value for name, value in summary.items() if name != "warning"}
    width = max(map(len, shown))
    for name, value in shown.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        text = "none" if value is None else text
        print(f"  {name:{width}s} {text}")
    print(f"in {options.out}: policy/, samples.txt, curves.png, metrics.jsonl, summary.json")


def ending(error, saves=True):
    """How a program ends that one of EXPECTED ended: (exit status, what is said in one line).

    saves:
        whether it is a run, which keeps what is finished. Raises the error if it is a mistake.
    """
    if isinstance(error, KeyboardInterrupt):  # its argument is the signal's number
        number = error.args[0] if error.args else signal.SIGINT
        return 128 + number, f"stopped; {GOES_ON}" if saves else "stopped"
    if files.is_out_of_memory(error):
        return 2, f"error: {OUT_OF_MEMORY if saves else MEMORY_IS_FULL}"
    if isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError):
        return 1, f"error: {error}"  # another process of the run, which says why itself
    if isinstance(error, (OSError, SafetensorError)):
        reason = policies.first_line(error)
        line = f"error: cannot write or read: {reason}" + (f"; {KEPT}" if saves else "")
        return 2, files.escaped(line)
    if isinstance(error, RuntimeError):
        raise error
    return 2, files.escaped(f"error: {error}".replace("\n", " "))
