"""Writes exercises/symptoms/: a healthy run of online IPO on the enumerated model, six with a planted bug, and the key's hashes.

Every run trains the GPT-2 of enumerated.py (85 responses, two prompts) from the reference with exact expectations at
tau = 0.1. The column loss and mean |h| are what the program with the bug would log; the others come from an evaluation
without bugs. Which run has which bug is read from tests/answers/diagnosis.json, which no handout contains.
Run: python tests/make_symptoms.py    (about two minutes on two cores)
"""

import argparse
import csv
import hashlib
import json
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import adapters  # noqa: E402
import bandit  # noqa: E402
import enumerated  # noqa: E402
import ipo  # noqa: E402

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


def per_token(logp, logp_other, ref_logp, ref_logp_other, p, tau):
    """Every log-probability divided by its response's length: [2, 85, 1] for y, [2, 1, 85] for y'."""
    y, other = LENGTHS[:, None], LENGTHS[None]
    return ipo.loss(logp / y, logp_other / other, ref_logp / y, ref_logp_other / other, p, tau)


def through_the_sampler(logp, logp_other, *rest):
    """The factor is 1; its gradient is that of the probability of drawing the pair."""
    return ipo.loss(logp, logp_other, *rest) * torch.exp(
        logp - logp.detach() + logp_other - logp_other.detach()
    )


BUGS = {  # name -> (loss, beta): beta = 1 draws the pairs from the reference
    "none": (ipo.loss, 0.0),
    "winner and loser swapped": (lambda a, b, c, d, p, tau: ipo.loss(a, b, c, d, 1 - p, tau), 0.0),
    "target is 1/tau": (lambda a, b, c, d, p, tau: ipo.loss(a, b, c, d, p, tau / 2), 0.0),
    "mean over tokens instead of sum": (per_token, 0.0),
    "reference is the policy itself": (
        lambda a, b, c, d, p, tau: ipo.loss(a, b, a.detach(), b.detach(), p, tau),
        0.0,
    ),
    "sampling weights differentiated": (through_the_sampler, 0.0),
    "pairs from the reference": (ipo.loss, 1.0),
}


def program_h(name, log_pi, log_ref):
    """The mean |h| over drawn pairs, as the program with the bug computes it."""
    scale, reference = (
        1 / LENGTHS if name.startswith("mean") else 1.0,
        log_pi if name.startswith("reference") else log_ref,
    )
    ratio = scale * (log_pi - reference)
    law = (log_ref if name.startswith("pairs") else log_pi).exp()
    return (
        (law[:, :, None] * law[:, None] * (ratio[:, :, None] - ratio[:, None]).abs())
        .sum((1, 2))
        .mean()
    )


def record(w, name, steps):
    """The rows of one run, every 20 steps."""
    loss, beta = BUGS[name]
    method = SimpleNamespace(PAIR=("mixture", "mixture"), loss=loss)
    policies = [w.log_ref, *enumerated.train(w, method, TAU, beta, steps=steps)]
    for index, log_pi in enumerate(policies):
        own_loss = bandit.expected_loss(method, log_pi, w.log_ref, w.preferences, TAU, beta).mean()
        wins = (log_pi.exp() * bandit.win_rate(w.preferences, w.log_ref)).sum(-1).mean()
        gap = bandit.duality_gap(log_pi, w.preferences, w.log_ref, TAU).mean()
        entropy, length = (
            -(log_pi.exp() * log_pi).sum(-1).mean(),
            (log_pi.exp() * LENGTHS).sum(-1).mean(),
        )
        row = (
            own_loss,
            program_h(name, log_pi, w.log_ref),
            bandit.kl(log_pi, w.log_ref).mean(),
            wins,
            gap,
            entropy,
            length,
        )
        yield min(20 * index, steps), *(float(f"{value.item():.5g}") for value in row)


def draw(rows, healthy, title, path):
    """A picture of one run, the healthy one dashed behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axis, column in zip(figure.subplots(2, 4).flat, range(1, len(COLUMNS)), strict=False):
        for data, line, label in ((healthy, "0.6", "healthy"), (rows, "C3", title)):
            axis.plot(
                [row[0] for row in data],
                [row[column] for row in data],
                color=line,
                ls="--" if label == "healthy" else "-",
                label=label,
            )
        axis.set_title(COLUMNS[column], fontsize=9)
        axis.tick_params(labelsize=7)
    figure.axes[-1].axis("off")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower right")
    figure.savefig(path, dpi=70)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Trains and draws the six runs of exercise 8.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=adapters.ROOT / "exercises" / "symptoms")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    answers = json.loads((adapters.ROOT / "tests" / "answers" / "diagnosis.json").read_text())
    w, healthy, key = enumerated.world(0), None, {"salt": secrets.token_hex(16)}
    for run, name in {"healthy": "none", **answers}.items():
        rows = list(record(w, name, options.steps))
        healthy = healthy or rows
        with open(options.out / f"run_{run}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        draw(rows, healthy, f"run {run}", options.out / f"run_{run}.png")
        if run != "healthy":
            key[run] = hashlib.sha256(f"{key['salt']}/{run}/{name}".encode()).hexdigest()
        print(f"run {run}: {len(rows)} rows", flush=True)
    (options.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
