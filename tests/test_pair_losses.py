"""The pair losses of losses/, and DPO's label smoothing, as functions of numbers.

Values by hand, slopes by finite differences, the limits in which one loss is another, what is
detached, and what a loss asks the trainer for. All in float64 unless a test says so. Where they
lead to is tested in test_stationary.py.
"""

import copy
import math
import types
from pathlib import Path

import pytest
import torch

import bandit
import dpo
import enumerated
import ipo
import policy as policies
import slic
import train
from job import report
from job.options import constants, find_method, method_names, parse, requested, requests
from losses import cringe, simpo, tdpo
from reference_sampler import gpt2, next_law

ROOT = Path(__file__).resolve().parent.parent
DOUBLE = torch.float64
NAMES = (
    *("cpo", "cringe", "dpop", "f_dpo", "gpo", "npo"),
    *("orpo", "r_dpo", "simpo", "slic_hf", "tdpo"),
)
LENGTHS = {"length", "length_other"}
EXTRAS = {"extra", "extra_other"}
# Name: TAU, the constants, the requests.
FILES = {
    "cpo": (0.1, {"alpha": 1.0}, set()),
    "cringe": (10.0, {"alpha": 1.0, "b": -10.0}, EXTRAS),
    "dpop": (0.3, {"penalty": 50.0}, set()),
    "f_dpo": (0.1, {"kind": 2}, set()),
    "gpo": (0.1, {"kind": 3}, set()),
    "npo": (0.1, {}, set()),
    "orpo": (0.1, {}, LENGTHS),
    "r_dpo": (0.1, {"alpha": 0.05}, LENGTHS),
    "simpo": (2.0, {"gamma": 1.0}, LENGTHS),
    "slic_hf": (1.0, {"likelihood": 0.1}, set()),
    "tdpo": (0.1, {"alpha": 0.5, "kind": 2}, EXTRAS),
}
# Every variant that is a formula of its own: name and constants.
# CRINGE's own b of -10 nats lets next to nothing through at the small temperatures used here.
VARIANTS = [(name, {}) for name in NAMES if name != "cringe"] + [("cringe", {"b": 0.2})]
VARIANTS += [("gpo", {"kind": kind}) for kind in (0, 1, 2, 4, 5)]
VARIANTS += [("f_dpo", {"kind": kind}) for kind in (0, 1)]
VARIANTS += [("tdpo", {"kind": 1}), ("dpop", {"penalty": 0.5}), ("simpo", {"gamma": 0.0})]
WITHOUT_REFERENCE = ("cpo", "cringe", "orpo", "simpo", "slic_hf")
GROUPS_WITHOUT_REFERENCE = ("pro", "rrhf")


def label_of(variant):
    name, given = variant
    return " ".join([name, *(f"{key}={value}" for key, value in given.items())])


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=label_of)


def numbers(*values):
    return [torch.tensor([value], dtype=DOUBLE) for value in values]


def tensors(seed, count=40, scale=3.0):
    """Random log pi, log pi', log pi_ref, log pi_ref' and labels, [count] each."""
    generator = torch.Generator().manual_seed(seed)
    sides = -scale * torch.rand(4, count, generator=generator, dtype=DOUBLE) - 0.1
    return list(sides), torch.rand(count, generator=generator, dtype=DOUBLE)


def asked(name, count=40, seed=1):
    """Random values of what a method's loss asks for."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for request in sorted(FILES[name][2]):
        if request in LENGTHS:
            given[request] = torch.randint(1, 9, (count,), generator=generator)
        else:
            given[request] = 2 * torch.rand(count, generator=generator, dtype=DOUBLE)
    return given


def swapped(given):
    """The same values for y and y' the other way round."""
    result = dict(given)
    for name in ("length", "extra"):
        if name in given:
            result[name], result[f"{name}_other"] = given[f"{name}_other"], given[name]
    return result


def slopes(value, *inputs):
    """The gradients of a loss's sum, 0 where there is none; the graph is kept."""
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(value.sum(), inputs, **options)


def assert_close(value, expected, tolerance=1e-12):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


# What a file says


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says(name):
    """TAU, constants and requests; y and y' from the policy or records, a label that is a p."""
    method, (tau, its_constants, its_requests) = find_method(name), FILES[name]
    assert (method.TAU, method.RATE) == (tau, 2e-3)
    assert constants(method) == its_constants and requests(method) == its_requests
    assert method.PAIR == ("policy", "policy") and method.LABEL == "preference"
    assert method.LEARNS_FROM == 2 and method.OFFLINE and not hasattr(method, "BETA")
    assert method.CONTRASTIVE == (name == "gpo")


@pytest.mark.parametrize("name", NAMES)
def test_a_worked_example(name, capsys):
    """It prints numbers."""
    find_method(name).worked_example()
    out = capsys.readouterr().out
    assert out.count("\n") >= 3 and "nan" not in out and "inf" not in out


# Values


BY_HAND = {
    # Log-probabilities of y, y' and of both under the reference; p; tau; the rest; the value.
    # d = -1, d' = -3, h = 2, the fines 5 * 1 and 5 * 3: 0.75 log(1 + e^0.9) + 0.25 log(1 + e^5.1)
    "dpop": ((-4, -6, -3, -3), 0.75, 0.3, {"penalty": 5.0}, 2.2073849651995108),
    # h = 1, z = 0.5. 0.7 log(1 + e^-0.5) + 0.3 log(1 + e^0.5)
    "gpo 0": ((-2, -3.5, -2.5, -3), 0.7, 0.5, {"kind": 0}, 0.6240769841801066),
    # 0.7 * 0.5^2 + 0.3 * 1.5^2
    "gpo 1": ((-2, -3.5, -2.5, -3), 0.7, 0.5, {"kind": 1}, 0.85),
    # 0.7 * 0.5 + 0.3 * 1.5
    "gpo 2": ((-2, -3.5, -2.5, -3), 0.7, 0.5, {"kind": 2}, 0.8),
    # 0.7 e^-0.5 + 0.3 e^0.5
    "gpo 3": ((-2, -3.5, -2.5, -3), 0.7, 0.5, {"kind": 3}, 0.9191878430088818),
    # h = 3, z = 1.5: 0.7 * 0 + 0.3 * 2.5^2
    "gpo 4": ((-1, -4.5, -2.5, -3), 0.7, 0.5, {"kind": 4}, 1.875),
    # 0.7/(1 + e^0.5)^2 + 0.3/(1 + e^-0.5)^2
    "gpo 5": ((-2, -3.5, -2.5, -3), 0.7, 0.5, {"kind": 5}, 0.21601255531766367),
    # z = 0.1 * 2 + 0.05 * 10: 0.75 log(1 + e^-0.7) + 0.25 log(1 + e^0.7)
    "r_dpo": (
        (-2, -4, -3, -3),
        *(0.75, 0.1, {"length": 20, "length_other": 10}, 0.5781860488854579),
    ),
    # z = 2 (-1.2 + 2) = 1.6, gamma = 1: 0.75 log(1 + e^-0.6) + 0.25 log(1 + e^2.6)
    "simpo": (
        (-12, -10, 0, 0),
        *(0.75, 2.0, {"length": 10, "length_other": 5}, 0.9960271358563317),
    ),
    # z = 0.2: 0.75 log(1 + e^-0.2) + 0.25 log(1 + e^0.2) + 0.5 (0.75 * 3 + 0.25 * 5)
    "cpo": ((-3, -5, 0, 0), 0.75, 0.1, {"alpha": 0.5}, 2.398138869381592),
    # Means log 1/2 and log 1/5, odds 1 and 1/4: 0.75 (log 2 + 0.1 log(1 + 1/4)) + 0.25 (log 5 +
    # 0.1 log(1 + 4))
    "orpo": (
        (3 * math.log(0.5), 4 * math.log(0.2), 0, 0),
        *(0.75, 0.1, {"length": 3, "length_other": 4}, 0.9791915776879023),
    ),
    # The margin is 2, the gap 3: 0.75 * 0 + 0.25 * 5 + 0.1 (0.75 * 2 + 0.25 * 5)
    "slic_hf": ((-2, -5, 0, 0), 0.75, 0.5, {}, 1.525),
    # u = 2 and 1/2, z = -1/2 + 2: 0.75 log(1 + e^-1.5) + 0.25 log(1 + e^1.5)
    "f_dpo 1": ((math.log(2), -math.log(2), 0, 0), 0.75, 1.0, {"kind": 1}, 0.5764132779827524),
    # z = log(2/3) - log(1/3) = log 2: 0.75 log(1 + 1/2) + 0.25 log(1 + 2)
    "f_dpo 2": ((math.log(2), -math.log(2), 0, 0), 0.75, 1.0, {"kind": 2}, 0.5787519032481507),
    # d = 1, d' = -2: 20 (0.75 log(1 + e^-0.2) + 0.25 log(1 + e^0.1))
    "npo": ((-2, -5, -3, -3), 0.75, 0.1, {}, 12.694066341091732),
    # h = 2, z = 0.1 (2 - (1.5 - 0.5)): 0.75 log(1 + e^-0.1) + 0.25 log(1 + e^0.1)
    "tdpo 1": (
        (-2, -4, -3, -3),
        *(0.75, 0.1, {"kind": 1, "extra": 0.5, "extra_other": 1.5}, 0.6693966600735709),
    ),
    # z = 0.1 (2 - 0.5 (1.5 - 0.5)): 0.75 log(1 + e^-0.15) + 0.25 log(1 + e^0.15)
    "tdpo 2": (
        (-2, -4, -3, -3),
        *(0.75, 0.1, {"kind": 2, "extra": 0.5, "extra_other": 1.5}, 0.6584570477895321),
    ),
    # M = log 2.5, the gates 1/(1 + 2.5) = 2/7 and 5/7: 0.75 (2/7) (log 2 + 0.4) + 0.25 (5/7)
    # (log 5 + 0.9)
    "cringe": (
        (math.log(0.5), math.log(0.2), 0, 0),
        *(0.75, 1.0, {"b": 0.0, "extra": 0.9, "extra_other": 0.4}, 0.6823597373403634),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_value_by_hand(case):
    """The comment above each case is its formula; 1e-12 for rounding."""
    sides, p, tau, given, expected = BY_HAND[case]
    tensor = {}
    for name, value in given.items():
        is_a_response_s = name.startswith(("length", "extra"))
        tensor[name] = torch.tensor([value], dtype=DOUBLE) if is_a_response_s else value
    loss = find_method(case.split()[0]).loss
    value = loss(*numbers(*map(float, sides)), *numbers(p), tau, **tensor)
    assert value.shape == (1,) and value.item() == pytest.approx(expected, rel=1e-12)


def test_a_token_of_cringe_by_hand():
    """Probabilities 0.5, 0.3, 0.2, the last the loser's: 5/8 log(1 + 0.4) + 3/8 log(1 + 2/3).

    With one rival, log(1 + 0.4).
    """
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE).log() + 7
    value = cringe.token_terms(logits, torch.tensor(2)).item()
    assert value == pytest.approx(0.40185475680050453, rel=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cringe, "RIVALS", 1)
        value = cringe.token_terms(logits, torch.tensor(2)).item()
    assert value == pytest.approx(0.3364722366212129, rel=1e-12)


def at_the_start(name, given, p, log_y, tau):
    """A loss's value where policy and reference are equal, and y and y' equally likely (formulas).

    Both of log-probability log_y and four tokens, no KL, token terms of 0.7.
    """
    if name == "gpo":
        return {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.25}.get(given.get("kind", 3), math.log(2))
    if name == "simpo":
        return math.log(1 + math.exp(given.get("gamma", 1.0)))
    if name == "orpo":
        return -log_y / 4 + tau * math.log(2)
    if name == "cringe":
        return (-log_y + 0.7) / (1 + math.exp(-given["b"] / tau))
    own = {"cpo": math.log(2) - log_y, "slic_hf": 1 / tau - 0.1 * log_y}
    own["npo"] = 2 * math.log(2) / tau
    return own.get(name, math.log(2))


@every_variant
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_value_at_the_start(variant, p):
    """Every loss at pi = pi_ref by a formula; for most it is one number, whatever the label is."""
    name, constant = variant
    tokens_or_terms = 0.7 if name == "cringe" else 4.0
    given = dict.fromkeys(FILES[name][2], torch.tensor([tokens_or_terms], dtype=DOUBLE))
    if name == "tdpo":
        given = dict.fromkeys(EXTRAS, torch.zeros(1, dtype=DOUBLE))
    sides = numbers(-5.0, -5.0, -5.0, -5.0)
    value = find_method(name).loss(*sides, *numbers(p), 0.4, **given, **constant).item()
    assert value == pytest.approx(at_the_start(name, constant, p, -5.0, 0.4), rel=1e-13)


def test_r_dpo_at_the_start():
    """At h = 0 a certain label costs log(1 + e^-(alpha (|w| - |l|))): longer winners cost less."""
    zero, one = numbers(0.0, 1.0)
    for length, other, expected in ((5, 1, -1.2), (1, 5, 1.2)):
        given = dict(length=torch.tensor([length]), length_other=torch.tensor([other]), alpha=0.3)
        value = find_method("r_dpo").loss(zero, zero, zero, zero, one, 0.4, **given)
        assert value.item() == pytest.approx(math.log(1 + math.exp(expected)), rel=1e-14)


# Symmetries


@every_variant
def test_swapping_the_responses_changes_nothing(variant):
    """y <-> y' with p -> 1 - p, and with all that was asked for: the same loss and slopes."""
    name, constant = variant
    loss, (sides, label), given = find_method(name).loss, tensors(0), asked(name)
    logp, other, ref, ref_other = sides
    inputs = [logp.requires_grad_(), other.requires_grad_()]
    for request, value in given.items():
        if request in EXTRAS:
            inputs.append(value.requires_grad_())
    value = loss(logp, other, ref, ref_other, label, 0.4, **given, **constant)
    again = loss(other, logp, ref_other, ref, 1 - label, 0.4, **swapped(given), **constant)
    assert value.shape == (40,)
    assert_close(value, again)
    for one, two in zip(slopes(value, *inputs), slopes(again, *inputs), strict=True):
        assert_close(one, two)
    assert slopes(value, logp)[0].abs().max() > 1e-3, "nothing was compared"


@every_variant
def test_a_soft_label_weights_both_orders(variant):
    """p L(y, y') + (1 - p) L(y', y) with L of a certain label, for every loss of this room."""
    name, constant = variant
    loss, (sides, label), given = find_method(name).loss, tensors(2), asked(name)
    one, zero = torch.ones_like(label), torch.zeros_like(label)
    value = loss(*sides, label, 0.4, **given, **constant)
    first = loss(*sides, one, 0.4, **given, **constant)
    second = loss(*sides, zero, 0.4, **given, **constant)
    assert_close(value, label * first + (1 - label) * second)
    assert (first - second).abs().max() > 1e-3


@every_variant
def test_the_preferred_response_is_raised_more(variant):
    """From equal probabilities downhill moves log pi(y) up against log pi(y') where p > 1/2.

    With p < 1/2 the reverse: a sign error in the label or in a gap fails here.
    """
    name, constant = variant
    given = dict.fromkeys(FILES[name][2], torch.tensor([3.0], dtype=DOUBLE))
    for p, sign in ((0.8, 1), (0.2, -1)):
        logp, other, ref, ref_other = numbers(-3.0, -3.0, -3.0, -3.0)
        inputs = logp.requires_grad_(), other.requires_grad_()
        value = find_method(name).loss(
            *inputs, ref, ref_other, *numbers(p), 0.3, **given, **constant
        )
        slope, slope_other = slopes(value, *inputs)
        assert sign * (slope_other - slope).item() > 1e-3


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_what_has_no_reference(name):
    """Another reference, or none, gives the same value; for every other loss it does not."""
    sides, label = tensors(3)
    for other_name in NAMES:
        loss, given = find_method(other_name).loss, asked(other_name)
        value = loss(*sides, label, 0.4, **given)
        moved = loss(*sides[:2], sides[2] - 1, sides[3] + 0.5, label, 0.4, **given)
        assert torch.equal(value, moved) == (other_name in WITHOUT_REFERENCE), other_name
    find_method(name).loss(*sides[:2], None, None, label, 0.4, **asked(name))


# Slopes


@every_variant
def test_slopes_by_finite_differences(variant):
    """Central differences of 1e-5 nats in log pi(y) and log pi(y'); 1e-7 relative to the slope's
    size. CRINGE's gate has no gradient: at a temperature of 1e15 it does not move."""
    name, constant = variant
    loss, (sides, label), given = find_method(name).loss, tensors(4), asked(name)
    tau, step = (1e15, 1e-5) if name == "cringe" else (0.4, 1e-5)

    def at(logp, other):
        return loss(logp, other, *sides[2:], label, tau, **given, **constant)

    inputs = [side.clone().requires_grad_() for side in sides[:2]]
    first, second = slopes(at(*inputs), *inputs)
    with torch.no_grad():
        left = (at(sides[0] + step, sides[1]) - at(sides[0] - step, sides[1])) / (2 * step)
        right = (at(sides[0], sides[1] + step) - at(sides[0], sides[1] - step)) / (2 * step)
    size = max(first.abs().max(), second.abs().max())
    assert (first - left).abs().max() < 1e-7 * size
    assert (second - right).abs().max() < 1e-7 * size


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@every_variant
def test_at_the_extremes(variant, dtype):
    """Log-probabilities from 0 to -1e4 on all four sides and certain labels, in float32, too: the
    loss and its slopes are finite."""
    name, constant = variant
    levels = torch.tensor([0.0, -1e-30, -1e-3, -90.0, -1e4], dtype=dtype)
    logp, other, ref, ref_other = (
        part.flatten() for part in torch.meshgrid(*[levels] * 4, indexing="ij")
    )
    given = {}
    for request in FILES[name][2]:
        given[request] = torch.full_like(logp, 1e3 if request in EXTRAS else 1)
    inputs = logp.requires_grad_(), other.requires_grad_()
    for p in (0.0, 0.3, 1.0):
        label = torch.full_like(ref, p)
        value = find_method(name).loss(*inputs, ref, ref_other, label, 0.1, **given, **constant)
        assert value.dtype == dtype and value.isfinite().all()
        assert all(slope.isfinite().all() for slope in slopes(value, *inputs))


def test_huge_gaps_keep_their_slope():
    """Where the logistic is all but certain of the wrong side, its slope is tau, not 0: the losses
    are written with log sigmoid. On the right side it is 0."""
    big, zero, one = numbers(1e4, 0.0, 1.0)
    for name, expected in (("dpop", 0.1), ("r_dpo", 0.1), ("cpo", 0.1), ("simpo", 0.1)):
        own = {"dpop": {"penalty": 0.0}, "cpo": {"alpha": 0.0}}.get(name, {})
        given = dict.fromkeys(FILES[name][2], one)
        for logp, slope in ((-big, -expected), (big, 0.0)):
            logp = logp.clone().requires_grad_()
            value = find_method(name).loss(logp, zero, zero, zero, one, 0.1, **own, **given)
            assert slopes(value, logp)[0].item() == pytest.approx(slope, abs=1e-15), name


def test_the_odds_of_a_certain_response():
    """log(q/(1 - q)) of q near 0, in the middle and near 1 against numbers; finite at q = 1."""
    log_odds = find_method("orpo").log_odds
    mean = torch.tensor([-50.0, math.log(0.8), -1e-9, 0.0], dtype=DOUBLE)
    expected = torch.tensor([-50.0, math.log(4), math.log(1e9)], dtype=DOUBLE)
    assert_close(log_odds(mean)[:3], expected, 1e-9)
    assert log_odds(mean)[3].isfinite()


# Limits: where one loss is another


def same_loss(name, constant, other, other_constant, tau, other_tau=None, factor=1.0, **given):
    """A loss and its slopes are factor times another loss's."""
    sides, label = tensors(5)
    inputs = [side.requires_grad_() for side in sides[:2]]
    method = find_method(name) if isinstance(name, str) else name
    value = method.loss(*sides, label, tau, **constant, **given)
    expected = other.loss(*sides, label, other_tau or tau, **other_constant)
    assert_close(value, factor * expected)
    for one, two in zip(slopes(value, *inputs), slopes(expected, *inputs), strict=True):
        assert_close(one, factor * two)


def test_what_is_dpo_in_a_limit():
    """DPOP without its penalty, R-DPO and TDPO2 at alpha 0, f-DPO's reverse KL, GPO's logistic."""
    for tau in (0.1, 0.7):
        same_loss("dpop", {"penalty": 0.0}, dpo, {}, tau)
        same_loss("r_dpo", {"alpha": 0.0}, dpo, {}, tau, **asked("r_dpo"))
        same_loss("tdpo", {"alpha": 0.0}, dpo, {}, tau, **asked("tdpo"))
        same_loss("f_dpo", {"kind": 0}, dpo, {}, tau)
        same_loss("gpo", {"kind": 0}, dpo, {}, tau)


def test_limits_within_other_constants():
    """R-DPO of equal lengths and TDPO of equal KLs are DPO whatever alpha is; and no other is."""
    length = dict(length=torch.full((40,), 6), length_other=torch.full((40,), 6))
    same_loss("r_dpo", {"alpha": 0.8}, dpo, {}, 0.3, **length)
    equal = dict.fromkeys(EXTRAS, torch.full((40,), 1.7, dtype=DOUBLE))
    same_loss("tdpo", {"alpha": 0.8}, dpo, {}, 0.3, **equal)
    same_loss("tdpo", {"kind": 1}, dpo, {}, 0.3, **equal)
    for name in ("dpop", "r_dpo", "tdpo", "f_dpo", "gpo"):
        with pytest.raises(AssertionError):
            same_loss(name, {}, dpo, {}, 0.3, **asked(name))


def test_gpo_is_ipo_and_slic():
    """(z - 1)^2 at tau is IPO at tau/2 times tau^2; the hinge is SLiC at tau."""
    for tau in (0.1, 0.7):
        same_loss("gpo", {"kind": 1}, ipo, {}, tau, other_tau=tau / 2, factor=tau**2)
        same_loss("gpo", {"kind": 2}, slic, {}, tau)


def test_reference_free_limits():
    """With one reference for all responses h is log pi(y) - log pi(y'): DPO is then CPO without
    the likelihood, SimPO of one length at gamma 0 at tau times that length, and SLiC-HF without the
    likelihood SLiC divided by tau."""
    sides, label = tensors(6)
    flat = [*sides[:2], torch.zeros_like(label), torch.zeros_like(label)]
    plain = dpo.loss(*flat, label, 0.3)
    assert_close(find_method("cpo").loss(*sides, label, 0.3, alpha=0.0), plain)
    lengths = dict(length=torch.full((40,), 5), length_other=torch.full((40,), 5))
    assert_close(simpo.loss(*sides, label, 1.5, gamma=0.0, **lengths), plain)
    hinge = slic.loss(*flat, label, 0.3) / 0.3
    assert_close(find_method("slic_hf").loss(*sides, label, 0.3, likelihood=0.0), hinge)


def test_orpo_of_rare_responses():
    """1 - q is 1 for responses of e^-40: the odds are probabilities and the term is DPO's at 1,
    times tau, on means."""
    sides, label = tensors(7)
    logp, other = sides[0] - 40, sides[1] - 40
    zero, one = torch.zeros_like(label), torch.ones_like(label)
    found = find_method("orpo").loss(
        logp, other, None, None, label, 0.3, length=one, length_other=one
    )
    likelihood = label * logp + (1 - label) * other
    assert_close(found, 0.3 * dpo.loss(logp, other, zero, zero, label, 1.0) - likelihood)


def test_npo_is_ascent_at_the_start():
    """At pi = pi_ref the slope on a certain loser is 1 for every tau; far below it fades."""
    zero, one = numbers(0.0, 1.0)
    for tau in (0.01, 0.1, 3.0):
        loser = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        value = find_method("npo").loss(zero, loser, zero, zero, one, tau)
        assert slopes(value, loser)[0].item() == pytest.approx(1, rel=1e-14)
    value = find_method("npo").loss(zero, loser - 20, zero, zero, one, 3.0)
    assert slopes(value, loser)[0].item() < 1e-20


def test_constants_out_of_range():
    """A kind that there is not is refused by name, when the loss is first taken."""
    sides, label = tensors(0)
    for name in ("gpo", "f_dpo"):
        with pytest.raises(ValueError, match="kind=7: give 0 to"):
            find_method(name).loss(*sides, label, 0.3, kind=7)


# DPO's label smoothing


def test_no_smoothing_is_dpo_to_the_bit():
    """smoothing 0 gives the very bits of -p log sigmoid(z) - (1 - p) log sigmoid(-z), in float32,
    too, and of the label's logit."""
    for dtype in (torch.float32, DOUBLE):
        sides, label = tensors(8)
        sides, label = [side.to(dtype) for side in sides], label.to(dtype)
        z = 0.3 * ipo.log_ratio_gap(*sides)
        logsigmoid = torch.nn.functional.logsigmoid
        before = -label * logsigmoid(z) - (1 - label) * logsigmoid(-z)
        assert torch.equal(dpo.loss(*sides, label, 0.3), before)
        assert torch.equal(dpo.loss(*sides, label, 0.3, smoothing=0.0), before)
        assert torch.equal(dpo.target_gap(label, 0.3), torch.logit(label) / 0.3)


def test_smoothing_by_hand():
    """e = 0.1 takes a certain label for 0.9: -0.9 log sigmoid(z) - 0.1 log sigmoid(-z), z = 0.6:
    0.9 log(1 + e^-0.6) + 0.1 log(1 + e^0.6) = 0.4974878..., and the pair stops at logit(0.9)/tau.
    e = 1/2 makes every label a draw."""
    sides, one = numbers(-3.0, -4.0, -4.0, -3.0), torch.ones(1, dtype=DOUBLE)
    value = dpo.loss(*sides, one, 0.3, smoothing=0.1).item()
    assert value == pytest.approx(0.4374879504858856 * 0.9 + 1.0374879504858856 * 0.1, rel=1e-14)
    assert dpo.target_gap(one, 0.3, smoothing=0.1).item() == pytest.approx(
        math.log(9) / 0.3, rel=1e-14
    )
    sides, label = tensors(9)
    half = dpo.loss(*sides, label, 0.3, smoothing=0.5)
    assert_close(half, dpo.loss(*sides, torch.full_like(label, 0.5), 0.3))
    assert constants(dpo) == {"smoothing": 0.0}


# Detached or not


def test_tdpo_1_has_both_gradients_and_tdpo_2_one():
    """p = 1, h = 0, K = 0.5 and 1.5, tau = 2: TDPO1's z = -2 and both KLs have the slope 2
    sigmoid(2); TDPO2's z = -1 and the loser's alone has one, alpha 2 sigmoid(1)."""
    zero, one = numbers(0.0, 1.0)
    kl_w, kl_l = numbers(0.5, 1.5)
    inputs = kl_w.requires_grad_(), kl_l.requires_grad_()
    given = dict(extra=kl_w, extra_other=kl_l)
    first = slopes(tdpo.loss(zero, zero, zero, zero, one, 2.0, kind=1, **given), *inputs)
    expected = 2 / (1 + math.exp(-2.0))
    assert [slope.item() for slope in first] == pytest.approx([-expected, expected], rel=1e-14)
    second = slopes(tdpo.loss(zero, zero, zero, zero, one, 2.0, **given), *inputs)
    expected = 1 / (1 + math.exp(-1.0))
    assert [slope.item() for slope in second] == pytest.approx([0.0, expected], rel=1e-14)


def test_the_gate_of_cringe_has_no_gradient():
    """A certain label: the slope on log pi(w) is minus the gate, on log pi(l) 0, on the loser's
    tokens alpha times the gate. M = 2, b = 1, tau = 0.5: the gate is sigmoid(-2)."""
    logp, other, one, terms = numbers(-3.0, -5.0, 1.0, 0.8)
    inputs = logp.requires_grad_(), other.requires_grad_(), terms.requires_grad_()
    given = dict(extra=torch.zeros(1), extra_other=terms, b=1.0, alpha=0.3)
    value = cringe.loss(logp, other, None, None, one, 0.5, **given)
    gate = 1 / (1 + math.exp(2.0))
    found = [slope.item() for slope in slopes(value, *inputs)]
    assert found == pytest.approx([-gate, 0.0, 0.3 * gate], rel=1e-14)


def test_the_rivals_of_cringe():
    """Through the rivals' logits flows gradient, through their weights none: the slope on rival k's
    logit is -w_k sigmoid(s_t - s_k), and on the target's the sum of these. Only the largest k other
    logits take part; adding a constant to all changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=DOUBLE).requires_grad_()
    target = int(logits.argmax())
    value = cringe.token_terms(logits, torch.tensor(target))
    slope = slopes(value, logits)[0]
    others = [index for index in logits.argsort(descending=True).tolist() if index != target]
    rivals = others[: cringe.RIVALS]
    weight = torch.softmax(logits[rivals], 0).detach()
    expected = torch.zeros(9, dtype=DOUBLE)
    expected[rivals] = -weight * torch.sigmoid(logits[target] - logits[rivals]).detach()
    expected[target] = -expected.sum()
    assert_close(slope, expected)
    assert_close(cringe.token_terms(logits + 5, torch.tensor(target)), value)


@every_variant
def test_no_gradient_reaches_label_or_reference(variant):
    """They come without one, and every loss has one in the policy's numbers."""
    name, constant = variant
    sides, label = tensors(10)
    sides[0].requires_grad_()
    value = find_method(name).loss(*sides, label, 0.3, **asked(name), **constant)
    assert value.requires_grad and value.shape == (40,)


# gradient_scale and target_gap


def uniform_game(seed, count=5):
    """A uniform policy, a reference equal to it, and preferences [n, n]."""
    preferences, _ = bandit.random_game(count, torch.Generator().manual_seed(seed))
    log_pi = torch.full((count,), -math.log(count), dtype=DOUBLE)
    return log_pi, log_pi, preferences


SCALES = [("gpo", {"kind": kind}, {"kind": kind}) for kind in range(6)]
SCALES += [("f_dpo", {"kind": kind}, {"kind": kind}) for kind in range(3)]
SCALES += [
    ("dpop", {"penalty": 0.0}, {}),
    ("r_dpo", {}, {}),
    ("simpo", {"gamma": 0.0}, {}),
    ("cpo", {"alpha": 0.0}, {}),
    ("slic_hf", {"likelihood": 0.0}, {}),
    ("npo", {}, {}),
    ("tdpo", {}, {}),
]


@pytest.mark.parametrize("name, constant, given", SCALES, ids=str)
def test_gradient_scale(name, constant, given):
    """At a uniform pi = pi_ref the expected gradient is -gradient_scale(tau) times the self-play
    direction pi (p(y > pi) - 1/2), with the constants for which the file says so: 1e-12. GPO's
    hinge counts as SLiC's: its file gives f'(0)."""
    method, tau = find_method(name), 0.3
    if name == "tdpo":
        zero = torch.zeros(1, dtype=DOUBLE)
        constant = dict(constant, extra=zero, extra_other=zero)
    for seed in range(3):
        log_pi, log_ref, preferences = uniform_game(seed)

        def loss(*arguments):
            return method.loss(*arguments, **constant, **bandit.one_token(method.loss))

        wrapped = types.SimpleNamespace(PAIR=("policy", "policy"), loss=loss)
        found = bandit.gradient(wrapped, log_pi, log_ref, preferences, tau)
        direction = log_pi.exp() * (bandit.win_rate(preferences, log_pi) - 0.5)
        assert direction.abs().max() > 0.01
        assert_close(found, -method.gradient_scale(tau, **given) * direction)


TARGETS = [("gpo", {"kind": kind}) for kind in (0, 1, 3, 4, 5)]
TARGETS += [("f_dpo", {"kind": 0}), ("r_dpo", {}), ("tdpo", {}), ("tdpo", {"kind": 1})]


@pytest.mark.parametrize("name, constant", TARGETS, ids=str)
def test_target_gap_has_no_slope(name, constant):
    """At h = target_gap the slope is 0, away from it it has the sign of the distance."""
    method, label = find_method(name), torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=DOUBLE)
    zero, given = torch.zeros_like(label), asked(name, 4)
    for tau in (0.1, 2.0):
        target = method.target_gap(label, tau, **constant, **given)
        for step, sign in ((0.0, 0), (0.1 / tau, 1), (-0.1 / tau, -1)):
            h = (target + step).requires_grad_()
            value = method.loss(h, zero, zero, zero, label, tau, **constant, **given)
            slope = slopes(value, h)[0]
            assert (slope * sign > 0).all() if sign else slope.abs().max() < 1e-12


def test_target_gap_of_the_hinge_and_where_there_is_none():
    """GPO's hinge stops at its kink, as SLiC; a method whose loss has no h has no target."""
    label = torch.tensor([0.2, 0.5, 0.9], dtype=DOUBLE)
    hinge = find_method("gpo").target_gap(label, 0.3, kind=2)
    assert torch.equal(hinge, slic.target_gap(label, 0.3))
    none = ("dpop", "simpo", "cpo", "orpo", "slic_hf", "npo", "cringe")
    for name in none:
        method = find_method(name)
        given = asked(name, 3)
        assert method.target_gap(label, 0.3, **constants(method), **given) is None, name
    assert find_method("f_dpo").target_gap(label, 0.3) is None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_simpo_stops_at_its_mean_gap(gamma):
    """The slope is 0 there for every label; at gamma 0 it is logit(p)/tau; gamma widens it."""
    label = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=DOUBLE)
    zero, one = torch.zeros_like(label), torch.ones_like(label)
    gap = simpo.mean_gap(label, 2.0, gamma=gamma).requires_grad_()
    given = dict(length=one, length_other=one, gamma=gamma)
    value = simpo.loss(gap, zero, None, None, label, 2.0, **given)
    assert slopes(value, gap)[0].abs().max() < 1e-14
    plain = torch.logit(label) / 2
    if gamma == 0:
        assert_close(gap.detach(), plain)
    else:
        assert (gap.abs() > plain.abs())[label != 0.5].all()


# What a loss asks for


PROMPT = policies.pad([[1, 2, 3], [2], [4, 4]], "left", 0)
Y = policies.pad([[1, 0], [2, 3, 4, 1], [0]], "right", 0)
OTHER = policies.pad([[3, 2, 0], [0], [1, 2, 3, 3]], "right", 0)
LABEL = torch.tensor([0.9, 0.2, 0.6], dtype=DOUBLE)


def parsed(name, *more):
    return parse(["--loss", name, "--device", "cpu", *more])


def test_requested_lengths():
    """Tokens of y and y', end-of-text included; a loss without requests is given nothing."""
    given = requested(find_method("r_dpo"), None, None, PROMPT, Y, OTHER)
    assert given["length"].tolist() == [2, 4, 1] and given["length_other"].tolist() == [3, 1, 4]
    assert set(given) == LENGTHS and requested(dpo, None, None, PROMPT, Y, OTHER) == {}


def test_a_request_that_nobody_has_is_refused():
    def loss(logp, logp_other, ref_logp, ref_logp_other, label, tau, *, reward):
        return logp

    method = types.SimpleNamespace(loss=loss, __name__="losses.strange")
    with pytest.raises(ValueError, match="strange.*reward"):
        requested(method, None, None, PROMPT, Y, OTHER)


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_gives_what_is_asked_for(name):
    """pair_losses is the loss of the pairs' log-probabilities with lengths and extras, and --set
    reaches it; and so is what --show prints, with a target where there is one."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    changed = {"penalty": 0.5, "gamma": 0.25, "alpha": 0.75, "likelihood": 0.5}
    known = {key: value for key, value in changed.items() if key in FILES[name][1]}
    more = []
    for key, value in known.items():
        more += ["--set", f"{key}={value}"]
    options, method = parsed(name, *more), find_method(name)
    given = requested(method, policy, reference, PROMPT, Y, OTHER)
    pairs = PROMPT, Y, OTHER, LABEL
    found, ratio = train.pair_losses(options, method, policy, reference, *pairs, **given)
    sides = []
    for model in (policy, reference):
        sides += [policies.log_prob(model, PROMPT, side) for side in (Y, OTHER)]
    given = {}
    if FILES[name][2] == LENGTHS:
        given = dict(length=torch.tensor([2, 4, 1]), length_other=torch.tensor([3, 1, 4]))
    if FILES[name][2] == EXTRAS:
        given["extra"] = method.extra(policy, reference, PROMPT, Y)
        given["extra_other"] = method.extra(policy, reference, PROMPT, OTHER)
        assert given["extra"].requires_grad and not torch.equal(*given.values())
    expected = method.loss(*sides, LABEL, method.TAU, **given, **known)
    assert_close(found, expected)
    assert_close(ratio, sides[0] - sides[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_shown(name, capsys):
    """--show prints the loss of pair_losses, what was asked for, and whether h has a target."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    options, method = parsed(name), find_method(name)
    words = policies.word_tokenizer(["a", "b", "c", "d"])
    pairs = PROMPT, Y, OTHER, LABEL
    report.show_pairs(options, method, words, policy, reference, *pairs)
    out = capsys.readouterr().out
    given = requested(method, policy, reference, PROMPT, Y, OTHER)
    values = train.pair_losses(options, method, policy, reference, *pairs, **given)[0]
    shown = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  loss")]
    assert shown == pytest.approx(values[:2].tolist(), abs=2e-6)
    for request in FILES[name][2]:
        assert out.count(f"  {request} ") == 2
    has_target = method.target_gap(LABEL, 0.3, **asked(name, 3)) is not None
    assert out.count("h, its target") == 2 * has_target
    assert out.count("h, without a target") == 2 * (not has_target)
    report.print_method(options, method)
    out = capsys.readouterr().out
    assert ("also takes of a response" in out) == bool(FILES[name][2])


def token_laws(model, prompt, response):
    """log-laws of each token of one response, a list of [V]; a prefix at a time, unpadded."""
    laws = []
    for place in range(len(response)):
        laws.append(next_law(model, model, [*prompt, *response[:place]], 0.0))
    return laws


def test_the_kl_along_a_response():
    """TDPO's K against sums over unpadded prefixes, KL(pi_ref, pi) token by token: 1e-12; at
    pi = pi_ref it is 0 and so is its gradient."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    found = tdpo.extra(policy, reference, PROMPT, Y)
    for row, (prompt, response) in enumerate(zip(PROMPT.lists(), Y.lists(), strict=True)):
        laws = token_laws(policy, prompt, response), token_laws(reference, prompt, response)
        total = 0.0
        for log_pi, log_ref in zip(*laws, strict=True):
            total += (log_ref.exp() * (log_ref - log_pi)).sum().item()
        assert found[row].item() == pytest.approx(total, rel=1e-12) and total > 0.01
    start = copy.deepcopy(reference).requires_grad_(True)
    at_start = tdpo.extra(start, reference, PROMPT, Y)
    assert at_start.abs().max() < 1e-14
    gradient = torch.autograd.grad(at_start.sum(), list(start.parameters()), allow_unused=True)
    assert max(part.abs().max() for part in gradient if part is not None) < 1e-13


def test_the_token_terms_along_a_response(monkeypatch):
    """CRINGE's terms against a loop over unpadded prefixes, with two rivals of the five words."""
    monkeypatch.setattr(cringe, "RIVALS", 2)
    policy = gpt2(0)
    found = cringe.extra(policy, None, PROMPT, OTHER)
    for row, (prompt, response) in enumerate(zip(PROMPT.lists(), OTHER.lists(), strict=True)):
        total = 0.0
        for law, token in zip(token_laws(policy, prompt, response), response, strict=True):
            law = law.tolist()
            rivals = sorted((value, k) for k, value in enumerate(law) if k != token)[-2:]
            shares = [math.exp(value) for value, _ in rivals]
            for value, _ in rivals:
                total += math.exp(value) / sum(shares) * math.log1p(math.exp(law[token] - value))
        assert found[row].item() == pytest.approx(total, rel=1e-12)


def test_ids_that_a_tokenizer_lacks():
    """Logits of -inf: neither the KL nor the rivals turn into inf - inf, nor do their slopes."""
    logits = torch.tensor([0.3, -torch.inf, 0.1, -torch.inf], dtype=DOUBLE, requires_grad=True)
    log_ref = torch.tensor([0.0, -torch.inf, 0.5, -torch.inf], dtype=DOUBLE).log_softmax(0)
    kl = tdpo.forward_kl(logits.log_softmax(0), log_ref)
    term = cringe.token_terms(logits, torch.tensor(0))
    assert term.item() == pytest.approx(math.log1p(math.exp(0.2)), rel=1e-12)
    assert kl.item() > 0 and slopes(kl + term, logits)[0].isfinite().all()


def test_the_lab_gives_one_token_and_the_small_gpt2_real_lengths():
    """Actions are of one token. enumerated.py's responses have their own lengths and extras: its
    expectation is the weighted sum of the method's losses over all 85 x 85 pairs, and of the pairs
    that it samples the mean."""
    assert bandit.one_token(dpo.loss) == {} and bandit.one_token(tdpo.loss) == {}
    assert bandit.one_token(simpo.loss) == {"length": 1, "length_other": 1}
    w = enumerated.world(0)
    model = policies.build("enumerable", policies.word_tokenizer(["a", "b", "c", "d"]), 8, 1)
    model = model.double()
    log_pi = enumerated.log_policy(model, w).detach()
    length = torch.tensor([float(len(response)) for response in enumerated.RESPONSES])
    for name in ("orpo", "r_dpo", "tdpo"):
        method = find_method(name)
        found = enumerated.exact_loss(model, w, method, 0.3)
        total = 0.0
        for x in range(2):
            given = dict(length=length[:, None], length_other=length[None])
            if name == "tdpo":
                kl = method.extra(model, w.reference, *w.batch).view(2, -1)[x].detach()
                given = dict(extra=kl[:, None], extra_other=kl[None])
            sides = log_pi[x][:, None], log_pi[x][None], w.log_ref[x][:, None], w.log_ref[x][None]
            value = method.loss(*sides, w.preferences[x], 0.3, **given)
            weight = (log_pi[x][:, None] + log_pi[x][None]).exp()
            total += (weight * value).sum().item() / 2
        assert found.item() == pytest.approx(total, rel=1e-12)
        assert found.requires_grad
        generator = torch.Generator().manual_seed(0)
        sampled = enumerated.sampled_loss(model, w, method, 0.3, 0.0, 500, generator)
        assert sampled.item() == pytest.approx(total, rel=0.05)


# The table of losses/README.md


def test_the_readme_has_a_row_for_every_method():
    """Its method, reference, requests and check are what the files and tests say."""
    text = (ROOT / "losses" / "README.md").read_text(encoding="utf-8").split("## Every method")[1]
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ["):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 10, line
            rows[cells[0].split("]")[0].strip("[ ")] = cells
    assert sorted(rows) == method_names()
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    for name, cells in rows.items():
        method = find_method(name)
        needs = {request.removesuffix("_other") for request in requests(method)}
        assert set(cells[6].replace("`", "").split()) == needs, name
        without = (*WITHOUT_REFERENCE, *GROUPS_WITHOUT_REFERENCE)
        assert (cells[4] == "no") == (name in without), name
        assert cells[5] == ("both" if method.OFFLINE else "online"), name
        assert f"def {cells[9].strip('`')}(" in tests, name
