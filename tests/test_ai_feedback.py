"""studies/ai_feedback.py, a language model asked "1 or 2", on a tiny random one."""

from pathlib import Path

import pytest
import torch

import policy as policies
import train
from job import judged
from test_architectures import tiny
from test_data import records, write

FILE = str(Path(__file__).resolve().parent.parent / "studies" / "ai_feedback.py")
FEW = "--supervised-steps 2 --steps 2 --batch-size 4 --eval-prompts 4 --device cpu".split()
FEW += "--max-prompt-tokens 24 --max-response-tokens 6".split()


def saved(folder, tokenizer, **changes):
    """A random model's folder. Large weights: it has opinions."""
    model = tiny("gpt2", 0, torch.float32, vocab_size=len(tokenizer), **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(
                    0, 0.5, generator=torch.Generator().manual_seed(parameter.numel())
                )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bytes", "words"])
def folder(tmp_path_factory, request):
    """A model with room for a question in bytes; its " 1" is a space and a digit, or one token."""
    tokenizer = policies.byte_tokenizer([" 1 2 1 2"], 257 if request.param == "bytes" else 259)
    assert len(tokenizer.encode(" 1")) == (2 if request.param == "bytes" else 1)
    place = tmp_path_factory.mktemp("model") / "judge"
    return saved(place, tokenizer, max_position_embeddings=300)


@pytest.fixture
def asked(folder, monkeypatch):
    """The file, run with that model."""
    monkeypatch.setenv("AI_FEEDBACK_MODEL", str(folder))
    return judged.Asked("--preference", FILE, policies.word_tokenizer(["a"]))


PROMPTS = ["a post", "b", "c of some length", "d"] * 3
YS = [" a summary", " x", " yes", " no"] * 3
OTHERS = [" another", " xyz and more", " yes", " maybe"] * 3


def by_hand(model, tokenizer, template, prompt, first, second):
    """log p(" 1") and log p(" 2") after one question, alone, as whole continuations."""
    text = template.format(prompt=prompt, first=first.strip(), second=second.strip())
    question = policies.pad([tokenizer.encode(text)], "left", 0)
    logs = []
    for answer in (" 1", " 2"):
        response = policies.pad([tokenizer.encode(answer)], "right", 0)
        logs.append(policies.log_prob(model, question, response))
    return torch.stack(logs, 1)


@torch.no_grad()
def test_both_orders_are_averaged(folder, asked):
    """Each question alone and unpadded gives what the batches give; equal responses are 1/2; the
    orders differ, so the average does something; p is antisymmetric."""
    names = asked.function.__globals__
    model, tokenizer = policies.load(str(folder))
    p = asked.ask(PROMPTS, YS, OTHERS)
    expected = []
    places = []
    for prompt, y, other in zip(PROMPTS[:4], YS[:4], OTHERS[:4], strict=True):
        forth = by_hand(model, tokenizer, names["TEMPLATE"], prompt, y, other).softmax(1)
        back = by_hand(model, tokenizer, names["TEMPLATE"], prompt, other, y).softmax(1)
        expected.append(((forth[0, 0] + back[0, 1]) / 2).item())
        places.append((forth[0, 0] - back[0, 1]).abs().item())
    assert p.tolist() == pytest.approx(expected * 3, abs=1e-5)
    assert max(places) > 0.05 and max(abs(value - 0.5) for value in expected) > 0.001
    assert p[2].item() == pytest.approx(0.5, abs=1e-6)
    back = asked.ask(PROMPTS, OTHERS, YS)
    assert (p + back).tolist() == pytest.approx([1] * 12, abs=1e-6)


def test_a_long_text_loses_its_beginning(asked):
    """Beyond the model's positions the question and both responses stay."""
    long = "word " * 200
    texts = ([long + "end"], [" a"], [" b"])
    assert asked.ask(*texts).tolist() == asked.ask([long * 2 + "end"], *texts[1:]).tolist()


def test_a_run_that_it_labels(tmp_path, asked, folder, capsys, monkeypatch):
    """Self-rewarding: the policy's own folder is asked, on demos alone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "demos.jsonl", records(240)[0])
    argv = ["--policy", str(folder), "--demos", path, "--preference", FILE]
    places = ["--stages", str(tmp_path / "stages"), "--out", str(tmp_path / "run")]
    assert train.main([*FEW, *argv, *places]) == 0, capsys.readouterr().err
    assert "preference and judge: " in capsys.readouterr().out


REFUSED = {
    "the built-in vocabulary": "has no words for the answers 1 and 2",
    "a missing folder": "no such folder",
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_cannot_be_asked(tmp_path, monkeypatch, case):
    """One line, when the file is read: before anything is trained."""
    import summaries

    place = tmp_path / "judge"
    if case != "a missing folder":
        saved(place, summaries.tokenizer())
    monkeypatch.setenv("AI_FEEDBACK_MODEL", str(place))
    with pytest.raises(ValueError) as error:
        judged.Asked("--preference", FILE, summaries.tokenizer())
    message = str(error.value)
    assert message.startswith(f"--preference {FILE}, line ") and REFUSED[case] in message
    assert "\n" not in message
