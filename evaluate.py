"""Side-by-side evaluation: one policy's responses against another's on the same prompts, under a judge.

The judge gives p(y > y' | x) for two responses: the panel of the built-in task, exact, or a preference model's folder.
Left out: ties, human judges, confidence beyond the standard error over prompts.
Run: python evaluate.py A B [--judge panel|FOLDER] [--prompts FILE]    (A, B: policy folders, or run folders)
"""

import argparse
import os
import sys

import torch

import data
import policy as policies
import preference_model
import sampler


@torch.no_grad()
def measure(policy, other, judge, task, split="test", count=500, seed=0, chunk=100):
    """Both policies answer count prompts of a split. Returns the numbers of the run's summary and the responses. win_rate: mean
    of p(y > y') over prompts, y of policy and y' of other, in [0, 1]; win_rate_se: its standard error over prompts. kl: mean of
    log pi(y)/pi_other(y) over policy's responses, nats. length: mean response tokens, end-of-text included; unfinished: share cut
    at the limit; distinct: share of different responses; length_other, of the other."""
    wins, gaps, lengths, others, finished, texts, kept = [], [], [], [], [], [], []
    for step in range(-(-count // chunk)):
        prompt = tuple(
            part[: count - step * chunk].to(policy.device)
            for part in task.prompts(split, step, chunk)
        )
        # Two streams: the same uniforms for both would make equal policies give equal responses, and p = 1/2 for free.
        y, y_other = (
            sampler.sample(
                model,
                None,
                prompt,
                0.0,
                data.generator(seed, f"{split} {name}", step),
                task.max_response,
            )
            for model, name in ((policy, "policy"), (other, "other"))
        )
        wins.append(judge(prompt, y, y_other))
        gaps.append(policies.log_prob(policy, prompt, y) - policies.log_prob(other, prompt, y))
        lengths.append(y[1].sum(1).float())
        others.append(y_other[1].sum(1).float())
        finished.append(y[2].float())
        texts += [tuple(row[keep].tolist()) for row, keep in zip(*y[:2], strict=True)]
        kept.append((prompt, y, y_other))
    win, gap, length, length_other, done = (
        torch.cat(part).double() for part in (wins, gaps, lengths, others, finished)
    )
    numbers = dict(
        win_rate=win.mean().item(),
        win_rate_se=(win.std() / len(win) ** 0.5).item(),
        kl=gap.mean().item(),
        length=length.mean().item(),
        length_other=length_other.mean().item(),
        unfinished=1 - done.mean().item(),
        distinct=len(set(texts)) / len(texts),
        prompts=len(win),
    )
    return numbers, kept


def samples(kept, judge, tokenizer, count=5):
    """Text of the first prompts with both responses and what the judge says of them."""
    prompt, y, y_other = kept[0]
    votes = judge.votes(prompt, y, y_other) if hasattr(judge, "votes") else None
    chance, lines = judge(prompt, y, y_other), []
    for row in range(min(count, len(chance))):
        asked, result, start = (
            tokenizer.decode(part[0][row][part[1][row]], skip_special_tokens=True)
            for part in (prompt, y, y_other)
        )
        lines += [
            f"prompt: {asked}",
            f"  start:  {start}",
            f"  result: {result}",
            f"  p(result > start) = {chance[row]:.3f}",
        ]
        if votes is not None:
            lines.append(
                "  "
                + ", ".join(
                    f"{name} {vote:.2f}"
                    for name, vote in zip(judge.ANNOTATORS, votes[row].tolist(), strict=True)
                )
            )
        lines.append("")
    return "\n".join(lines)


def draw(path, panels):
    """Writes a picture: panels (title, x label, y label, {label: (xs, ys)}) side by side. tau is drawn on a logarithmic scale."""
    from matplotlib.figure import Figure  # here: only pictures need it

    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axis, (title, x, y, series) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for label, (xs, ys) in series.items():
            axis.plot(
                xs, ys, "o" if x.startswith("KL") else "o-", markersize=4, label=label, alpha=0.8
            )
        axis.set(title=title, xlabel=x, ylabel=y, xscale="log" if x == "tau" else "linear")
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Compares two policy folders; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", help="policy folder, or a run's folder")
    parser.add_argument("b", help="the policy it is compared with")
    parser.add_argument(
        "--judge",
        default="panel",
        help="panel (the built-in task's annotators) or a preference model's folder",
    )
    parser.add_argument(
        "--prompts",
        help="a .jsonl, .json, .csv or .parquet file or hub name with the field prompt; default: the built-in task's test posts",
    )
    parser.add_argument(
        "--count", type=int, default=500, help="prompts to compare on (default 500)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        help="longer prompts are cut from the left (default: what the models' positions leave)",
    )
    parser.add_argument(
        "--max-response-tokens",
        type=int,
        default=48,
        help="of a response (default 48; the built-in task has its own)",
    )
    options = parser.parse_args(argv)
    policies.quiet()
    try:
        folders = [
            os.path.join(path, "policy") if os.path.isdir(os.path.join(path, "policy")) else path
            for path in (options.a, options.b)
        ]
        (policy, tokenizer), (other, other_tokenizer) = (
            policies.load(folder) for folder in folders
        )
        if tokenizer.get_vocab() != other_tokenizer.get_vocab():
            raise ValueError(
                f"{options.a} and {options.b} have different tokenizers; only policies with one tokenizer can be compared"
            )
        if options.prompts:
            if options.judge == "panel":
                raise ValueError(
                    "--judge panel reads only the built-in task's posts; give a preference model's folder with --prompts"
                )
            judge = preference_model.load(options.judge)
            room = (
                min(model.config.n_positions for model in (policy, other, judge.body))
                - options.max_response_tokens
            )
            if (
                options.max_response_tokens < 1
                or not 1 <= (options.max_prompt_tokens or room) <= room
            ):
                raise ValueError(
                    f"--max-prompt-tokens and --max-response-tokens: the models leave {room} tokens for a prompt; lower one"
                )
            task = data.Prompts(
                data.read("prompts", options.prompts),
                tokenizer,
                options.max_prompt_tokens or room,
                options.max_response_tokens,
            )
            count = min(options.count, len(task.texts))
        else:
            task, count = data.BuiltIn(), options.count
            if tokenizer.get_vocab() != task.tokenizer.get_vocab():
                raise ValueError(
                    f"{options.a}: does not speak the built-in task's words; give --prompts FILE and --judge FOLDER"
                )
            judge = task.judge if options.judge == "panel" else preference_model.load(options.judge)
        if (
            options.count < 1
            or judge is not task.judge
            and judge.body.config.vocab_size != policy.config.vocab_size
        ):
            raise ValueError(
                f"--count {options.count}, --judge {options.judge}: give at least 1, and a judge that reads the policies' own tokens"
            )
        numbers, kept = measure(policy, other, judge, task, "test", count, options.seed)
    except ValueError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    print(samples(kept, judge, tokenizer, 3))
    for name, value in numbers.items():
        print(f"{name:14s} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
