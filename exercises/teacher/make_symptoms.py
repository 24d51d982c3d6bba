"""Writes exercises/symptoms/: a healthy run of online IPO, six with a planted bug, and the key.

Every run trains the GPT-2 of enumerated.py (85 responses, two prompts) from the reference with
exact expectations at tau = 0.1. The columns loss and mean |h| are what the program with the bug
would log; the others come from an evaluation without bugs. Which run has which bug is read from
answers/diagnosis.json, which no handout contains; the key holds hashes of it.
Run: python -m exercises.teacher.make_symptoms    (about two minutes on two cores)
"""

import argparse
import csv
import hashlib
import json
import secrets
from pathlib import Path
from types import SimpleNamespace

import torch

import bandit
import enumerated
import ipo

HERE = Path(__file__).resolve().parent
TAU = 0.1
COLUMNS = (
    "step",
    "loss",
    "mean |h|",
    "KL to reference",
    "win rate against reference",
    "duality gap",
    "entropy",
    "mean length",
)
LENGTHS = torch.tensor([len(response) for response in enumerated.RESPONSES], dtype=torch.float64)


# The bugs: losses of all pairs, [2, 85, 85] (prompts, y, y'), from log-probabilities [2, 85, 1] of
# y and [2, 1, 85] of y'.


def swapped(logp, logp_other, ref_logp, ref_logp_other, p, tau):
    """Winner and loser exchanged."""
    return ipo.loss(logp, logp_other, ref_logp, ref_logp_other, 1 - p, tau)


def doubled_target(logp, logp_other, ref_logp, ref_logp_other, p, tau):
    """1/tau in the place of 1/(2 tau)."""
    return ipo.loss(logp, logp_other, ref_logp, ref_logp_other, p, tau / 2)


def per_token(logp, logp_other, ref_logp, ref_logp_other, p, tau):
    """Every log-probability divided by its response's length."""
    y = LENGTHS[:, None]
    other = LENGTHS[None]
    return ipo.loss(logp / y, logp_other / other, ref_logp / y, ref_logp_other / other, p, tau)


def against_itself(logp, logp_other, ref_logp, ref_logp_other, p, tau):
    """The policy's own log-probabilities, detached, for the reference's."""
    return ipo.loss(logp, logp_other, logp.detach(), logp_other.detach(), p, tau)


def through_the_sampler(logp, logp_other, *rest):
    """The factor is 1; its gradient is that of the probability of drawing the pair."""
    factor = torch.exp(logp - logp.detach() + logp_other - logp_other.detach())
    return ipo.loss(logp, logp_other, *rest) * factor


# name -> (loss, beta): beta = 1 draws the pairs from the reference
BUGS = {
    "none": (ipo.loss, 0.0),
    "winner and loser swapped": (swapped, 0.0),
    "target is 1/tau": (doubled_target, 0.0),
    "mean over tokens instead of sum": (per_token, 0.0),
    "reference is the policy itself": (against_itself, 0.0),
    "sampling weights differentiated": (through_the_sampler, 0.0),
    "pairs from the reference": (ipo.loss, 1.0),
}


def program_h(name, log_pi, log_ref):
    """The mean |h| over drawn pairs, as the program with the bug computes it."""
    scale = 1 / LENGTHS if name.startswith("mean") else 1.0
    reference = log_pi if name.startswith("reference") else log_ref
    ratio = scale * (log_pi - reference)
    h = ratio[:, :, None] - ratio[:, None]
    law = (log_ref if name.startswith("pairs") else log_pi).exp()
    return (law[:, :, None] * law[:, None] * h.abs()).sum((1, 2)).mean()


def record(w, name, steps):
    """The rows of one run, every 20 steps."""
    loss, beta = BUGS[name]
    method = SimpleNamespace(PAIR=("mixture", "mixture"), loss=loss)
    policies = [w.log_ref, *enumerated.train(w, method, TAU, beta, steps=steps)]
    for index, log_pi in enumerate(policies):
        law = log_pi.exp()
        wins = law * bandit.win_rate(w.preferences, w.log_ref)
        values = (
            bandit.expected_loss(method, log_pi, w.log_ref, w.preferences, TAU, beta).mean(),
            program_h(name, log_pi, w.log_ref),
            bandit.kl(log_pi, w.log_ref).mean(),
            wins.sum(-1).mean(),
            bandit.duality_gap(log_pi, w.preferences, w.log_ref, TAU).mean(),
            -(law * log_pi).sum(-1).mean(),
            (law * LENGTHS).sum(-1).mean(),
        )
        yield min(20 * index, steps), *(float(f"{value.item():.5g}") for value in values)


def plot(rows, healthy, title, path):
    """A picture of one run, the healthy one dashed behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    steps = [row[0] for row in rows]
    axes = figure.subplots(2, 4).flat
    for axis, column in zip(axes, range(1, len(COLUMNS)), strict=False):
        behind = [row[column] for row in healthy]
        axis.plot(steps, behind, color="0.6", ls="--", label="healthy")
        axis.plot(steps, [row[column] for row in rows], color="C3", ls="-", label=title)
        axis.set_title(COLUMNS[column], fontsize=9)
        axis.tick_params(labelsize=7)
    figure.axes[-1].axis("off")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower right")
    figure.savefig(path, dpi=70)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Trains and draws the six runs of exercise 6.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=HERE.parent / "symptoms")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    answers = json.loads((HERE / "answers" / "diagnosis.json").read_text(encoding="utf-8"))
    w = enumerated.world(0)
    healthy = list(record(w, "none", options.steps))
    key = {"salt": secrets.token_hex(16)}
    for run, name in {"healthy": "none", **answers}.items():
        rows = healthy if run == "healthy" else list(record(w, name, options.steps))
        with open(options.out / f"run_{run}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        plot(rows, healthy, f"run {run}", options.out / f"run_{run}.png")
        if run != "healthy":
            key[run] = hashlib.sha256(f"{key['salt']}/{run}/{name}".encode()).hexdigest()
        print(f"run {run}: {len(rows)} rows", flush=True)
    (options.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
