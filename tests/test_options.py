"""Options.

A method is found by its file, a constant by its name; single values and combinations.
"""

import math
import types

import pytest
import torch

import ipo_md
import policy as policies
import slic
from clock import Clock, align
from job import options as job_options
from job.options import constants, find_method, method_names, parse
from reference_sampler import gpt2

HINGE = '''"""The hinge on h itself: a throw-away method, to show what adding one takes."""

import torch

from ipo import CONTRASTIVE, LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap

TAU = 0.5
RATE = 1e-3


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, margin=1.0, power=1):
    """Soft-label hinge p max(0, margin - h)^power + (1 - p) max(0, margin + h)^power, [B]."""
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    won = torch.relu(margin - h) ** power
    lost = torch.relu(margin + h) ** power
    return tau * (preference * won + (1 - preference) * lost)
'''


def test_a_method_is_a_file_that_sets_tau():
    """The paper's six at the top; found by name, and no other file is one."""
    assert {"ipo", "ipo_md", "nash_md", "dpo", "slic", "rl"} <= set(method_names())
    assert not {"train", "bandit", "policy", "claims", "enumerated"} & set(method_names())
    assert find_method("ipo_md") is ipo_md


@pytest.fixture
def with_hinge(tmp_path, monkeypatch):
    """A tree whose losses/ holds hinge.py, and nothing else told of it."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "hinge.py").write_text(HINGE)
    monkeypatch.setattr(job_options, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def first_loss(options, count=4):
    """The loss of the first step, where policy and reference are equal and so h = 0."""
    prompt = policies.pad([[1, 2]] * count, "left", 0)
    task = types.SimpleNamespace(prompts=lambda *_: prompt, max_response=3, judge=None)
    reference = gpt2(0).requires_grad_(False)

    def preference(prompt, y, y_other):
        return torch.full((count,), 0.7, dtype=torch.float64)

    clock = align(Clock(0), options, task, gpt2(0), reference, preference)
    return clock.numbers[0]["loss"]


def test_a_method_is_added_by_its_file_alone(with_hinge):
    """--loss hinge trains it, with its own default of tau and its constants.

    At h = 0 the loss is tau margin^power.
    """
    assert method_names() == ["hinge"]
    assert constants(find_method("hinge")) == {"margin": 1.0, "power": 1}
    few = ["--loss", "hinge", "--batch-size", "4", "--device", "cpu"]
    assert first_loss(parse(few)) == pytest.approx(0.5, rel=1e-12)
    with pytest.raises(ValueError, match="whole number"):
        parse([*few, "--set", "power=1.5"])
    changed = parse([*few, "--tau", "2", "--set", "margin=3", "--set", "power=2"])
    assert first_loss(changed) == pytest.approx(18.0, rel=1e-12)


def test_set_reaches_the_loss():
    """slic's margin is its loss at h = 0, where a run starts; 1 without --set."""
    few = ["--loss", "slic", "--batch-size", "4", "--device", "cpu"]
    assert constants(slic) == {"margin": 1.0}
    assert parse(few).set == {} and parse([*few, "--set", "margin=2.5"]).set == {"margin": 2.5}
    assert first_loss(parse(few)) == pytest.approx(1.0, rel=1e-12)
    assert first_loss(parse([*few, "--set", "margin=2.5"])) == pytest.approx(2.5, rel=1e-12)
    assert slic.target_gap(torch.tensor([0.7]), 0.5, margin=2.5).item() == 5.0


def test_defaults_are_the_methods():
    """tau and beta of every method's file, unless they are given.

    0 for a method without a mixture.
    """
    for name in method_names():
        options, method = parse(["--loss", name]), find_method(name)
        assert options.tau == method.TAU and options.beta == getattr(method, "BETA", 0.0)
        assert options.lr == method.RATE
    given = parse(["--loss", "ipo_md", "--tau", "0.3", "--beta", "0"])
    assert (given.tau, given.beta) == (0.3, 0.0)


def test_a_larger_policy_has_a_lower_rate():
    """3e-5 of IPO for any but the built-in tiny one, for which RATE was chosen."""
    large = ["--loss", "ipo", "--policy", "gpt2-124m"]
    assert parse(large).lr == pytest.approx(3e-5, rel=1e-12)
    assert parse([*large, "--lr", "2e-3"]).lr == 2e-3
    assert parse(["--loss", "ipo", "--policy", "tiny"]).lr == 2e-3


REFUSED = {
    "a constant of another method": (["--loss", "slic", "--set", "gamma=1"], "margin=1"),
    "a method without constants": (["--loss", "ipo", "--set", "margin=1"], "it has: none"),
    "no value": (["--loss", "slic", "--set", "margin"], "NAME=NUMBER"),
    "a word": (["--loss", "slic", "--set", "margin=wide"], "NAME=NUMBER"),
    "not a number": (["--loss", "slic", "--set", "margin=nan"], "NAME=NUMBER"),
    "beta without a mixture": (["--loss", "dpo", "--beta", "0.5"], "ipo_md, nash_md"),
    "offline nash_md": (["--loss", "nash_md", "--offline"], ", ipo, kto, npo, "),
    "tau 0": (["--tau", "0"], "--tau: 0: give a number above 0"),
    "beta above 1": (["--beta", "1.5"], "--beta: 1.5: give a weight from 0 (policy) to 1"),
    "half a step": (["--steps", "0.5"], "--steps: 0.5: give a whole number, 0 or more"),
    "no prompts": (["--batch-size", "0"], "--batch-size: 0: give a whole number above 0"),
    "a seed too large": (["--data-seed", str(2**63)], "--data-seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_do(case):
    argv, advice = REFUSED[case]
    with pytest.raises(ValueError) as error:
        parse(argv)
    assert advice in str(error.value) and "\n" not in str(error.value)


def test_numbers_at_their_edges():
    """The smallest and largest values that are allowed, and the nearest that are not."""
    assert job_options.positive("1e-12") == 1e-12 and job_options.weight("1") == 1.0
    assert job_options.whole("0") == 0 and job_options.whole("1000000000") == 10**9
    assert job_options.seed(str(2**63 - 2)) == 2**63 - 2
    for kind, text in (
        (job_options.positive, "0"),
        (job_options.positive, "9e-13"),
        (job_options.positive, "1.1e12"),
        (job_options.positive, "inf"),
        (job_options.whole, "1000000001"),
        (job_options.seed, str(2**63 - 1)),
        (job_options.weight, str(math.nextafter(1, 2))),
        (job_options.whole, "-1"),
        (job_options.positive_whole, "0"),
        (job_options.positive_whole, "1e3"),
    ):
        with pytest.raises(Exception, match="give a"):
            kind(text)
