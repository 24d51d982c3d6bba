"""bench.py: its check of exactness notices an inexact path, and its phases are a whole step's. No times are asserted."""

from types import SimpleNamespace

import pytest
import torch

from studies import bench
import sampler

OPTIONS = SimpleNamespace(
    device="cpu",
    dtype="float32",
    repeats=1,
    layers=2,
    width=64,
    vocabulary=60,
    prompts=3,
    prompt_tokens=6,
    new_tokens=5,
    micro_batch_size=None,
)


def test_exactness_is_measured(monkeypatch):
    """Below 1e-6 as it is; above 1e-5 when a cached token takes the position after its own."""
    policy = bench.model(OPTIONS, 0)
    assert bench.exactness(OPTIONS, policy) < 1e-6
    forward = sampler.forward
    monkeypatch.setattr(
        sampler,
        "forward",
        lambda m, ids, positions, *rest: forward(m, ids, positions + (ids.shape[1] == 1), *rest),
    )
    assert bench.exactness(OPTIONS, policy) > 1e-5


@pytest.mark.parametrize("loss", ["ipo", "nash_md", "rl"])
def test_phases_add_up_to_the_step(loss):
    rows = bench.phases(
        OPTIONS, loss, bench.model(OPTIONS, 0), bench.model(OPTIONS, 1), (1e10, 1e11)
    )
    assert [name for name, *_ in rows] == [
        "prefill",
        "decode",
        "preference",
        "forward",
        "backward",
        "optimiser",
        "step",
    ]
    assert sum(spent for _, spent, _ in rows[:-1]) == pytest.approx(rows[-1][1])


def test_floor_by_hand():
    """Two layers of width 64, 60 words, 3 rows of 6 tokens, all scored: 2 x 12 x 2 x 64^2 a token, the head, attention over 3 on average."""
    model = bench.model(OPTIONS, 0)
    operations = 3 * (2 * 12 * 2 * 64**2 * 6 + 2 * 6 * 60 * 64 + 4 * 64 * 2 * 6 * 3)
    assert bench.floor(OPTIONS, model, (1e30, 1.0), 6, 6) == operations
    moved = 4 * (12 * 2 * 64**2 + 60 * 64 + 2 * 64 * 2 * 3 * (6 + 5 / 2))
    assert bench.floor(OPTIONS, model, (1.0, 1e30), 1, 1, rounds=5) == 5 * moved


def test_no_cuda_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
