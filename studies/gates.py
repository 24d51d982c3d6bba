"""What the built-in task, its preference model and the default runs must hold, measured: python -m studies.gates"""

import argparse
import itertools
import os
import sys

import train  # noqa: E402  first: it sets how torch's threads wait

import data  # noqa: E402
import sampler  # noqa: E402
import summaries  # noqa: E402


def supervised_samples(task, reference, count=1000, responses=3):
    """Texts of validation posts and of the supervised policy's responses: [(post, [response, ...]), ...]."""
    prompt = task.prompts("validation", 1, count)
    drawn = sampler.sample(
        reference,
        None,
        prompt,
        (0.0,) * responses,
        data.generator(0, "gates", 0),
        task.max_response,
    )
    texts, posts = task.judge.read(drawn), task.judge.read(prompt)
    return [(post, texts[row::count]) for row, post in enumerate(posts)]


def panel(post, response, other):
    """The panel's p(response > other)."""
    return sum(summaries.votes(post, response, other)) / len(summaries.ANNOTATORS)


def task_gates(samples):
    """The share of cyclic triples, the worst case for empty and repetitive summaries, and both length biases."""
    triples, degenerate, shorter = [], [], []
    for post, responses in samples:
        if len(set(responses)) == 3:
            margins = [panel(post, responses[k], responses[(k + 1) % 3]) - 0.5 for k in range(3)]
            triples.append(min(margins) > 0.1 or max(margins) < -0.1)
        for response in responses:
            if summaries.qualities(post, response)["real"]:
                word = summaries.mentions(post)[0]
                degenerate += [
                    panel(post, response, bad)
                    for bad in ("", f"{word} , {word}", " ".join([word] * 9))
                ]
        for a, b in itertools.combinations(responses, 2):
            less = len(b.split()) - len(a.split())
            if less and panel(post, a, b) != 0.5:
                shorter.append((less > 0) == (panel(post, a, b) > 0.5))
    yield "cyclic triples, margins above 0.1", sum(triples) / len(triples), 0.05
    yield "least p(real > empty or repetitive)", min(degenerate), 0.9
    yield "pairs in which the shorter is preferred", sum(shorter) / len(shorter), None
    yield "pairs in which the longer is preferred", 1 - sum(shorter) / len(shorter), None


def gates(options):
    """Prints every gate with its measured value and bound; returns 1 if one is missed."""
    missed = 0

    def show(name, value, least=None, most=None):
        nonlocal missed
        bound = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
        fails = least is not None and value < least or most is not None and value > most
        missed += fails
        print(f"{name:44s} {value:8.3f}  {bound:8s} {'MISSED' if fails else ''}", flush=True)

    chosen = train.arguments(["--stages", options.stages])
    task, start, data_hash = train.open_data(chosen)
    reference, path = train.supervised(chosen, task, start, data_hash)
    numbers = train.read_json(
        os.path.join(
            train.preference(chosen, task, reference, path, "preference")[1], "accuracy.json"
        )
    )
    for name, value, least in task_gates(supervised_samples(task, reference)):
        show(name, value, least)
    baseline = max(numbers["shorter_wins"], numbers["longer_wins"])
    show("preference model: right signs", numbers["accuracy"], max(0.75, baseline + 0.05))
    show("preference model: mean |p_hat - p|", numbers["error"], most=0.20)
    for loss, seed in itertools.product(("ipo", "ipo_md"), range(options.seeds)):
        out = os.path.join(os.path.dirname(options.stages), f"{loss}-seed{seed}")
        if train.main(
            ["--loss", loss, "--seed", str(seed), "--stages", options.stages, "--out", out]
        ):
            return 2
        result = train.read_json(os.path.join(out, "summary.json"))
        show(
            f"{loss}, seed {seed}: win rate (se {result['win_rate_se']:.3f})",
            result["win_rate"],
            0.72,
        )
        show("  KL to the reference, nats", result["kl"], 0.5)
        show("  KL to the reference, nats", result["kl"], most=10)
        show("  unfinished", result["unfinished"], most=0.02)
        show("  length over the start's", result["length"] / result["length_other"], 0.6)
        show("  length over the start's", result["length"] / result["length_other"], most=1.5)
        show("  distinct responses", result["distinct"], 0.5)
    return int(missed > 0)


def main():
    """Prints the gates; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="alignment seeds (default 3)")
    parser.add_argument(
        "--stages",
        default="runs/stages",
        help="the shared stages (default runs/stages); runs go beside them",
    )
    return gates(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
