"""studies/bench.py: its check of exactness notices an inexact path, its phases are a whole step's.
No times are asserted."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import policy as policies
from studies import bench

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
PHASES = ["prefill", "decode", "preference", "forward", "backward", "optimiser", "step"]


def test_exactness_is_measured(monkeypatch):
    """Below 1e-6 as it is; above 1e-5 when a cached token takes the position after its own."""
    policy = bench.build(OPTIONS, 0)
    assert bench.exactness(OPTIONS, policy) < 1e-6
    run_model = policies.run_model

    def one_too_far(model, ids, mask, positions, *rest):
        decoding = ids.shape[1] == 1
        return run_model(model, ids, mask, positions + decoding, *rest)

    monkeypatch.setattr(policies, "run_model", one_too_far)
    assert bench.exactness(OPTIONS, policy) > 1e-5


@pytest.mark.parametrize("loss", ["ipo", "nash_md", "rl"])
def test_phases_add_up_to_the_step(loss):
    policy, reference = bench.build(OPTIONS, 0), bench.build(OPTIONS, 1)
    rows = bench.phases(OPTIONS, loss, policy, reference, (1e10, 1e11))
    assert [name for name, *_ in rows] == PHASES
    assert sum(spent for _, spent, _ in rows[:-1]) == pytest.approx(rows[-1][1])


def test_floor_by_hand():
    """Two layers of width 64, 60 words, 3 rows of 6 tokens, all scored: 2 x 12 x 2 x 64^2 a token,
    the head, attention over 3 on average."""
    model = bench.build(OPTIONS, 0)
    operations = 3 * (2 * 12 * 2 * 64**2 * 6 + 2 * 6 * 60 * 64 + 4 * 64 * 2 * 6 * 3)
    assert bench.floor(OPTIONS, model, (1e30, 1.0), 6, 6) == operations
    moved = 4 * (12 * 2 * 64**2 + 60 * 64 + 2 * 64 * 2 * 3 * (6 + 5 / 2))
    assert bench.floor(OPTIONS, model, (1.0, 1e30), 1, 1, rounds=5) == 5 * moved


def test_floors_count_models_and_responses():
    """Prefill runs the reference for a mixture only; decoding runs it once a mixture; the losses of
    one response cost half of those of two."""
    least = {}
    for loss in ("ipo", "ipo_md", "nash_md"):
        policy, reference = bench.build(OPTIONS, 0), bench.build(OPTIONS, 1)
        step = bench.prepare_step(OPTIONS, loss, policy, reference)
        least[loss] = bench.floors(OPTIONS, step, (1e30, 1.0))  # operations alone count
    for phase, ipo_md, nash_md in (("prefill", 2, 2), ("decode", 2, 1.5), ("forward", 1, 0.5)):
        assert least["ipo_md"][phase] == pytest.approx(ipo_md * least["ipo"][phase])
        assert least["nash_md"][phase] == pytest.approx(nash_md * least["ipo"][phase])


def test_llama_is_of_the_same_size():
    """What is compared differs in its architecture, not in its weights' number."""
    gpt2 = bench.build(OPTIONS, 0)
    llama = bench.build(OPTIONS, 0, kind="llama")
    assert llama.config.model_type == "llama"
    # GPT-2 has learned positions besides; Llama's head is a matrix of its own.
    blocks = [gpt2.transformer.h.parameters(), llama.model.layers.parameters()]
    sizes = [sum(weight.numel() for weight in block) for block in blocks]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_prompts_are_ragged():
    """From half of --prompt-tokens to all of them: a path without pads would flatter a sampler."""
    lengths = bench.prompts(OPTIONS).lengths().tolist()
    assert lengths == [4, 5, 6]


def test_operations_are_shares():
    """Six at most, falling, of one whole; the products of matrices are among them; the number of
    threads is as before."""
    threads = torch.get_num_threads()
    rows = bench.operations(OPTIONS, bench.build(OPTIONS, 0), bench.prompts(OPTIONS))
    shares = [share for _, share in rows]
    assert len(rows) == 6 and shares == sorted(shares, reverse=True) and sum(shares) <= 1
    assert "aten::addmm" in [name for name, _ in rows]
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_peak_is_this_programs():
    """Not that of a large parent, which getrusage would take over; and it grows by what is held."""
    held = torch.ones(2**26)  # 256 MiB, written
    code = "from studies import bench; import types; "
    code += "print(bench.peak_memory(types.SimpleNamespace(device='cpu')))"
    before = bench.peak_memory(OPTIONS)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert before > held.nbytes and int(child.stdout) < before - held.nbytes / 2


def test_memory_of_a_system_that_does_not_say(monkeypatch, capsys):
    """Without /proc, which is Linux's, and the module resource, which is Unix's, the bench says so
    in one line and goes on."""

    def no_such_file(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_such_file)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert bench.peak_memory(OPTIONS) is None
    found = dict(where="here", torch="2", rates=(1e9, 1e12), memory=None, exactness=0.0)
    bench.print_head(OPTIONS, found)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert len(said) == 1 and "not measured" in said[0]


def test_no_cuda_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
