"""studies/gpu.py and studies/memory.py on the CPU; the device's exactness where there is CUDA."""

import sys

import pytest
import torch

import policy as policies
from studies import gpu, memory

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_device_agrees_with_the_cpu(device, capsys):
    """The same responses, log-probabilities and gradient; the cache is exact."""
    assert gpu.cached_is_plain(device, torch.float32)
    assert gpu.compare_devices(device)
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [1e-6, 1e-1])
def test_a_device_that_adds_wrongly_is_noticed(monkeypatch, capsys, size):
    """Logits that are off at the second asking, which stands for the device: a millionth turns the
    float64 gradient, a tenth moves the draws."""
    run_model, seen = policies.run_model, []

    def off(model, *given):
        logits = run_model(model, *given)
        return logits * (1 + size) if seen else logits

    one_step = gpu.one_step

    def second_is_off(*given):
        found = one_step(*given)
        seen.append(1)
        return found

    monkeypatch.setattr(policies, "run_model", off)
    monkeypatch.setattr(gpu, "one_step", second_is_off)
    assert not gpu.compare_devices("cpu")
    assert "WRONG" in capsys.readouterr().out


def test_the_page_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_page_on_a_cpu(tmp_path, monkeypatch, capsys):
    """All its parts, in the sizes of a test; of the memory table one row."""
    monkeypatch.setattr(memory, "SETTINGS", {"float32": []})
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("Exactness", "Speed", "Memory", "Training"):
        assert f"## {part}" in out
    assert out.count("win_rate  ") == 2


def test_a_cell_of_the_memory_table(monkeypatch):
    """A setting reaches the step: micro-batches change what is held, not what is learnt."""
    monkeypatch.setitem(
        memory.SIZES,
        "small",
        dict(kind="qwen2", vocab_size=8, hidden_size=8, head_dim=4)
        | dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        | dict(intermediate_size=8),
    )
    asked = []
    pair_losses = memory.train.pair_losses

    def watched(options, method, policy, reference, prompt, *rest):
        asked.append((len(prompt.ids), policy.training))
        return pair_losses(options, method, policy, reference, prompt, *rest)

    monkeypatch.setattr(memory.train, "pair_losses", watched)
    for setting, parts in (("float32", [(4, False)]), ("bfloat16, both", [(1, True)] * 4)):
        peak, spent = memory.cell("small", setting, "cpu")
        assert asked == parts * 2 and spent > 0 and (peak is None or peak > 1e7)
        asked.clear()


def test_too_much_memory_is_an_answer(monkeypatch, capsys):
    """A cell that ends badly is a row that says so, and the table goes on."""
    monkeypatch.setattr(memory, "SETTINGS", {"float32": []})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    memory.table(["default"], "cpu")
    assert "| float32 | too much |" in capsys.readouterr().out


def test_the_attention_that_gives_nan_is_off():
    """cuDNN's, whatever the device; another kernel is left for every dtype."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
