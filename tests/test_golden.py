"""Every number of the main job, as it was when tests/golden.json was written: three float64 steps
of each method, and the stages.

A refactoring changes none of them. Where a number is meant to change, raise the constant that the
message names, so that kept stages, checkpoints and results of before are not taken for new ones,
and write the file anew:
    GOLDEN=write python -m pytest -q tests/test_golden.py
Weights are filled from uniform numbers, not by transformers' initialisation, so that no other
version of it changes them. Floats are compared to 1e-9 relative: another machine adds in another
order.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import policy as policies
import preference_model
from clock import Clock, align
from job import stages as job_stages
from job.options import find_method, parse

FILE = Path(__file__).with_name("golden.json")
ONLINE = ("ipo", "ipo_md", "nash_md", "dpo", "slic", "rl")
OFFLINE = ("ipo", "dpo", "slic")
CASES = [*ONLINE, *(f"{loss} offline" for loss in OFFLINE)]


@torch.no_grad()
def fill(model, seed, scale=0.6):
    """The model in float64 with weights uniform in +-scale/2, drawn in the order of their names."""
    generator, model = torch.Generator().manual_seed(seed), model.double()
    for _, parameter in sorted(model.named_parameters()):
        parameter.copy_(
            scale * (torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.5)
        )
    return model


def checksum(weights):
    """Two float64 sums over named tensors that any change of a weight moves.

    Plain and with weights that depend on the place.
    """
    flat = torch.cat([weights[name].double().flatten() for name in sorted(weights)])
    place = torch.cos(torch.arange(len(flat), dtype=torch.float64))
    return [flat.abs().sum().item(), (flat * place).sum().item()]


def gpt2(seed):
    """A GPT-2 of width 16 with the built-in task's words; it ends about half its responses."""
    model = fill(policies.build("tiny", data.BuiltIn(0).tokenizer, 128, 0), seed)
    with torch.no_grad():
        model.transformer.wte.weight[0] = (
            model.transformer.ln_f.bias * 3
        )  # end-of-text: likely after any word
    return model


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        yield


def three_steps(case):
    """Ids, labels, losses, gradient norms and the weights' checksum after each of three steps."""
    loss, *offline = case.split()
    argv = ["--loss", loss, "--batch-size", "4", "--lr", "1e-2", "--device", "cpu"]
    if offline:
        argv.append("--offline")
    options, method = parse(argv), find_method(loss)
    task, reference = data.BuiltIn(0), gpt2(1).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    rewards = method.LABEL == "reward"
    model = fill(preference_model.PreferenceModel(reference, pairwise=not rewards), 2)
    model.requires_grad_(False)
    preference = model.logit if rewards else model
    weights = {}
    clock = Clock(0, 1, 2, after=lambda step: weights.update({step: checksum(policy.state_dict())}))
    align(clock, options, task, policy, reference, preference)
    found = {}
    for step, (prompt, y, y_other, label) in clock.pairs.items():
        ids = [part.lists() for part in (prompt, y, y_other)]
        found[f"step {step}"] = dict(
            clock.numbers[step], ids=ids, labels=label.tolist(), weights=weights[step]
        )
    return found


def stages(folder, monkeypatch):
    """What three steps of each stage leave.

    The supervised policy, the preference model and the reward, with their held-out numbers.
    """
    argv = "--supervised-steps 3 --preference-steps 3 --device cpu --stages".split()
    options, task = parse([*argv, str(folder)]), data.BuiltIn(0)
    start, reference = gpt2(1), gpt2(3).requires_grad_(False)
    empty = preference_model.PreferenceModel

    def filled(body, pairwise=True):
        return fill(empty(body, pairwise), 2)

    monkeypatch.setattr(policies, "build", lambda *_: start)
    monkeypatch.setattr(preference_model, "PreferenceModel", filled)
    _, path = job_stages.supervised(options, task, None, "built-in")
    found = {"supervised": {"weights": weights_in(path)}}
    for name, pairwise in (("preference", True), ("reward", False)):
        _, path = job_stages.preference(
            options, task, reference, "reference", "preference", pairwise
        )
        held_out = json.loads((Path(path) / "accuracy.json").read_text())
        found[name] = {"weights": weights_in(path), "held out": held_out}
    return found


def weights_in(folder):
    return checksum(load_file(os.path.join(folder, "model.safetensors")))


def measured():
    """evaluate.measure's numbers for two policies under the panel."""
    numbers, kept = evaluate.measure(
        gpt2(1), gpt2(4), data.BuiltIn(0).judge, data.BuiltIn(0), "test", 24, chunk=10
    )
    return dict(numbers=numbers, ids=[part[0].tolist() for part in kept[-1]])


def same(found, wanted):
    """Equal, with floats equal to 1e-9 relative."""
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return False
        return all(same(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        if len(found) != len(wanted):
            return False
        return all(same(one, other) for one, other in zip(found, wanted, strict=True))
    if isinstance(wanted, float):
        return found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    return found == wanted


def compare(name, found, constant):
    """Compares with the file, or writes to it with GOLDEN=write."""
    golden = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = json.loads(json.dumps(found))
    if os.environ.get("GOLDEN") == "write":
        golden[name] = found
        # A line a case.
        lines = [f"{json.dumps(key)}: {json.dumps(golden[key])}" for key in sorted(golden)]
        FILE.write_text("{" + ",\n".join(lines) + "}\n")
    for key, wanted in golden[name].items():
        advice = f"if that was meant, raise {constant!r} in job/versions.py; see this file's head"
        assert same(found[key], wanted), (
            f"{name}, {key}: {found[key]} where it was {wanted}; {advice}"
        )
    assert found.keys() == golden[name].keys()


@pytest.mark.parametrize("case", CASES)
def test_three_steps(case):
    compare(case, three_steps(case), "alignment")


def test_stages(tmp_path, monkeypatch):
    for name, found in stages(tmp_path, monkeypatch).items():
        compare(name, found, "supervised" if name == "supervised" else "preference")


def test_measure():
    compare("measure", measured(), "measure")


def test_a_changed_number_is_noticed(monkeypatch):
    """Relative 1e-8 in a loss, or one id, is another number.

    The message names the constant. A missing key is noticed, too.
    """
    assert same({"a": [1.0, 2]}, {"a": [1.0 + 1e-12, 2]})
    assert (
        not same({"a": [1.0, 2]}, {"a": [1.0 + 1e-8, 2]})
        and not same([1], [2])
        and not same({}, {"a": 1})
    )
    monkeypatch.delenv("GOLDEN", raising=False)
    wrong = three_steps("ipo")
    wrong["step 1"]["loss"] *= 1 + 1e-8
    with pytest.raises(AssertionError, match="step 1.*'alignment'"):
        compare("ipo", wrong, "alignment")
