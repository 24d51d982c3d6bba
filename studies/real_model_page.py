"""The page of studies/real_model.py: what its runs took and what they are worth, from their lines.

Run: python -m studies.real_model_page    (writes results/real_model.md and .png)
"""

import argparse
import json
import os
import re
import sys

import job.report  # before torch: it sets how torch's threads wait
import policy as policies
from studies import readers
from studies.real_model import HELD_OUT, NAMES, PROMPT_TOKENS, RESPONSE_TOKENS, RESULTS


def read_lines(path):
    """The lines of a file by method; of two of one method the later counts."""
    lines = {}
    if not os.path.isfile(path):
        raise ValueError(
            f"--results {path}: no such file; python -m studies.real_model run makes it"
        )
    with open(path, encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            lines[line["name"]] = line
    return lines


def write_page(path):
    """Writes the page and the picture of a file of lines beside it. Returns the page's path."""
    lines = read_lines(path)
    stem = os.path.splitext(path)[0]
    plot(f"{stem}.png", lines.values())
    with open(f"{stem}.md", "w", encoding="utf-8", newline="") as file:
        file.write(page(lines.values()))
    return f"{stem}.md"


def page(lines):
    """The page of some lines as text."""
    lines = list(lines)
    sizes = dict(room=PROMPT_TOKENS, most=RESPONSE_TOKENS, held_out=HELD_OUT)
    sizes["posts"] = lines[0]["posts"]
    files = ", ".join(f"`{name}`" for name in lines[0]["files"])
    parts = [HEAD.format(files=files, **sizes)]
    parts += [of_runs(lines), "".join(map(verdict, lines)), of_readers(lines)]
    parts += [of_cycles(line) for line in lines if "cycles" in line]
    parts.append(CURVES)
    parts += map(of_curve, lines)
    parts.append(SAMPLES)
    parts += map(of_samples, lines)
    return "\n".join(parts)


HEAD = """# A pretrained model, aligned on a CPU

`python -m studies.real_model prepare FOLDER`, then for each method
`python -m studies.real_model run --policy FOLDER --prompts FILE ... --loss METHOD`;
`python -m studies.real_model_page` writes this page from the lines of `real_model.jsonl`.

SmolLM2-135M-Instruct as it is, read from a file of four bits a weight, is the start and the
reference. It summarises TL;DR posts (of Reddit; here from {files}), of each the title and as many
first sentences as {room} tokens hold, in at most {most} tokens, sampled at temperature 1. The
preference is a panel of three rules on text whose p is known exactly (`studies/readers.py`):
*informed* counts key words of the post, *busy* words, *careful* faults of form and names or numbers
that the post does not have. They know nothing of what a text means. The run has {posts} posts, a
tenth of them to look at on the way; {held_out} others are answered at the end. One seed.
"""
CURVES = """## On the way

![Win rate, KL and length over the steps, on the run's validation posts](real_model.png)
"""
SAMPLES = """## Before and after

The first of the held-out posts, nothing selected, one sample of each model; p is the panel's
p(after > before).
"""


def interval(value, error):
    """A number with the 95 % interval of its standard error, as text."""
    return f"{value:.3f} ({value - 1.96 * error:.3f} to {value + 1.96 * error:.3f})"


def rows(head, cells):
    """A table as text. head: its columns; cells: a list of texts a row."""
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_runs(lines):
    """What each run took, and what it is worth on the held-out posts."""
    took, worth = [], []
    for line in lines:
        seconds = "-"  # of a run that was finished before
        if line["steps_timed"]:
            # The evaluations on the way are in it.
            seconds = f"{line['cpu_seconds'] / line['steps_timed']:.1f}"
        sizes = f"{line['steps']} x {line['batch']}", f"{line['lr']:g}", f"{line['tau']:g}"
        cost = seconds, f"{line['peak_bytes'] / 1e9:.1f}"
        took.append([NAMES[line["name"]], *sizes, *cost])
        rate = interval(line["win_rate"], line["win_rate_se"])
        numbers = [f"{line[name]:.1f}" for name in ("kl", "length", "length_other")]
        shares = [f"{line[name]:.2f}" for name in ("unfinished", "distinct")]
        worth.append([NAMES[line["name"]], rate, *numbers, *shares])
    head = ["method", "steps x posts", "rate", "tau", "CPU s a step", "peak GB"]
    of_worth = ["method", "win rate over the start (95 %)", "KL, nats", "tokens", "start's", "cut"]
    return f"{rows(head, took)}\n{rows([*of_worth, 'distinct'], worth)}"


def verdict(line):
    """What a run's interval says, in a sentence."""
    name, error = NAMES[line["name"]], 1.96 * line["win_rate_se"]
    if line["win_rate"] - error > 0.5:
        said = "beats its start under the panel"
    elif line["win_rate"] + error < 0.5:
        said = "has become worse than its start under the panel"
    else:
        said = "is not shown to differ from its start under the panel"
    return f"{name} {said}.\n"


def of_readers(lines):
    """Each reader's own win rate, and what it counts."""
    cells = []
    for line in lines:
        rates = []
        for name in readers.READERS:
            rates.append(interval(line["readers"][name], line["readers_se"][name]))
        cells.append([NAMES[line["name"]], *rates, *(f"{count:.2f}" for count in line["counts"])])
    # The start answers every line's posts with the same draws.
    cells.append(["the start", "", "", "", *(f"{count:.2f}" for count in line["counts_start"])])
    head = ["each reader's own win rate", *readers.READERS, "key words", "words", "faults"]
    return rows(head, cells)


def of_cycles(line):
    """How intransitive the panel is."""
    found = line["cycles"]
    return (
        f"Of {found['triples']} triples of the start's own summaries of one post "
        f"{found['cyclic']:.3f} are cycles of the panel, {found['clear']:.3f} with margins of "
        "0.1 or more.\n"
    )


def of_curve(line):
    """The evaluations on the way."""
    cells = []
    for name, digits in (("win_rate", 3), ("kl", 1), ("length", 1)):
        cells.append([f"`{name}`", *(f"{at[name]:.{digits}f}" for at in line["curve"])])
    steps = [str(at["step"]) for at in line["curve"]]
    return rows([f"{NAMES[line['name']]}, step", *steps], cells)


def of_samples(line):
    """The first summaries of the held-out posts, before and after."""
    cells = []
    for shown in line["samples"]:
        texts = [" ".join(shown[name].split()) for name in ("title", "before", "after")]
        cells.append([*(plain_cell(text) for text in texts), f"{shown['p']:.2f}"])
    return rows(["post's title", "before", f"after {NAMES[line['name']]}", "p"], cells)


def plain_cell(text):
    """A model's text in a table's cell: nothing in it is a cell's end, a link or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", text)


def plot(path, lines):
    """The curves of all lines as one picture."""
    panels = []
    for name in ("win_rate", "kl", "length"):
        series = {}
        for line in lines:
            values = [at[name] for at in line["curve"]]
            series[NAMES[line["name"]]] = [at["step"] for at in line["curve"]], values
        panels.append((job.report.CURVES[name], "step", "", series))
    job.report.plot(path, panels)


def main(argv=None):
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies.real_model_page")
    parser.add_argument("--results", default=RESULTS, help=f"of the lines (default {RESULTS})")
    options = parser.parse_args(argv)
    try:
        print(f"written: {write_page(options.results)}")
    except (OSError, ValueError) as error:
        print(f"studies.real_model_page: error: {policies.first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
