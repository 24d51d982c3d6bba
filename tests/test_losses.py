"""The six losses as functions of numbers: values, slopes and identities that can be worked out by hand, in float64.

Where they lead to is tested elsewhere (test_bandit.py, test_enumerated.py); here is what one pair gives.
"""

import math

import enumerated
import pytest
import torch

import dpo
import ipo
import ipo_md
import nash_md
import policy as policies
import rl
import sampler
import slic
import summaries

DOUBLE = torch.float64
CONTRASTIVE = (ipo, dpo, slic)


def numbers(*values):
    return [torch.tensor(value, dtype=DOUBLE).view(-1) for value in values]


def at(method, h, p, tau):
    """Loss and slope in h, [B] each, for gaps h (tensor [B]) and label p."""
    h, zero = h.detach().clone().requires_grad_(), torch.zeros_like(h)
    value = method.loss(h, zero, zero, zero, torch.as_tensor(p, dtype=DOUBLE).expand_as(h), tau)
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


GAPS = torch.tensor([-30.0, -7.0, -0.3, 0.0, 0.2, 4.0, 25.0], dtype=DOUBLE)


def test_table_1():
    """Who draws y and y', what is learned from and whether the loss is contrastive: the paper's Table 1, row by row."""
    table = {
        ipo: (("policy", "policy"), 2, True),
        ipo_md: (("mixture", "mixture"), 2, True),
        nash_md: (("policy", "mixture"), 1, False),
        dpo: (("policy", "policy"), 2, True),
        slic: (("policy", "policy"), 2, True),
        rl: (("policy", "policy"), 2, False),
    }
    for method, row in table.items():
        assert (method.PAIR, method.LEARNS_FROM, method.CONTRASTIVE) == row, method.__name__
    assert ipo_md.loss is ipo.loss, "IPO-MD differs from IPO by its sampling only"


def test_gap_by_hand():
    """h = (log pi - log pi_ref)(y) - (log pi - log pi_ref)(y') = (-1 + 3) - (-2 + 2.5) = 1.5; exact in binary."""
    assert ipo.log_ratio_gap(*numbers(-1.0, -2.0, -3.0, -2.5)).item() == 1.5


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
def test_values_at_the_start(p, tau):
    """At h = 0, where every run starts: IPO 1/(4 tau^2), DPO log 2, SLiC 1, for every label. One rounding is allowed."""
    zero = torch.zeros(1, dtype=DOUBLE)
    for method, expected in ((ipo, 1 / (4 * tau**2)), (dpo, math.log(2)), (slic, 1.0)):
        assert at(method, zero, p, tau)[0].item() == pytest.approx(expected, rel=1e-15), (
            method.__name__
        )


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_soft_label_ipo_is_one_square(p, tau):
    """The weighted sum of both orders = (h - (2p-1)/(2 tau))^2 + p(1-p)/tau^2, and times tau the expanded form
    tau h^2 - (2p-1) h + 1/(4 tau) (eq 10, 11). Values and slopes, relative 1e-13: both sides round a few times."""
    value, slope = at(ipo, GAPS, p, tau)
    torch.testing.assert_close(
        value, (GAPS - (2 * p - 1) / (2 * tau)) ** 2 + p * (1 - p) / tau**2, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(slope, 2 * (GAPS - (2 * p - 1) / (2 * tau)), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        tau * value, tau * GAPS**2 - (2 * p - 1) * GAPS + 1 / (4 * tau), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("method", CONTRASTIVE, ids=lambda m: m.__name__)
def test_a_soft_label_weights_both_orders(method):
    """p L(y, y') + (1-p) L(y', y) with L the loss of a certain label: values and slopes, 1e-13 for rounding."""
    for p in (0.0, 0.25, 0.6, 1.0):
        value, slope = at(method, GAPS, p, 0.3)
        (first, first_slope), (second, second_slope) = (
            at(method, GAPS, 1.0, 0.3),
            at(method, -GAPS, 1.0, 0.3),
        )
        torch.testing.assert_close(value, p * first + (1 - p) * second, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            slope, p * first_slope - (1 - p) * second_slope, rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("method", [*CONTRASTIVE, rl], ids=lambda m: m.__name__)
def test_swapping_the_responses_changes_nothing(method):
    """y <-> y' with p -> 1 - p (rl: the reward gap changes sign): same loss, same gradient on each response, 1e-12."""
    generator = torch.Generator().manual_seed(0)
    logp, other, ref, ref_other = (
        -20 * torch.rand(50, generator=generator, dtype=DOUBLE) for _ in range(4)
    )
    label = torch.rand(50, generator=generator, dtype=DOUBLE)
    swapped = -label if method is rl else 1 - label
    logp.requires_grad_(), other.requires_grad_()
    value = method.loss(logp, other, ref, ref_other, label, 0.3)
    again = method.loss(other, logp, ref_other, ref, swapped, 0.3)
    torch.testing.assert_close(value, again, rtol=1e-12, atol=1e-12)
    for one, two in zip(
        *(torch.autograd.grad(v.sum(), (logp, other)) for v in (value, again)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
        assert one.abs().max() > 0.01, "nothing was compared"


@pytest.mark.parametrize("method", [ipo, dpo, slic, nash_md, rl], ids=lambda m: m.__name__)
def test_the_preferred_response_is_raised(method):
    """From the start, with p > 1/2 a step downhill raises log pi(y) and never log pi(y'); with p < 1/2 the reverse. A sign
    error in the log-ratio or the label fails here."""
    for label, sign in ((0.8, 1), (0.2, -1)):
        logp, other, ref, ref_other = numbers(-3.0, -4.0, -3.0, -4.0)
        logp.requires_grad_(), other.requires_grad_()
        label = torch.tensor([label - 0.5 if method is rl else label], dtype=DOUBLE)
        slopes = torch.autograd.grad(
            method.loss(logp, other, ref, ref_other, label, 0.3).sum(),
            (logp, other),
            allow_unused=True,
        )
        assert sign * slopes[0].item() < 0
        if method.LEARNS_FROM == 2:
            assert slopes[1].item() == pytest.approx(-slopes[0].item(), rel=1e-14)


@pytest.mark.parametrize(
    "method, h", [(ipo, 0.2 / 0.1), (dpo, math.log(0.7 / 0.3) / 0.1)], ids=["ipo", "dpo"]
)
def test_where_one_pair_stops(method, h):
    """The zero of the slope at p = 0.7, tau = 0.1: IPO (p - 1/2)/tau = 2, DPO logit(p)/tau = 8.47. 1e-12 of the slope's scale."""
    assert at(method, torch.tensor([h], dtype=DOUBLE), 0.7, 0.1)[1].abs().item() < 1e-12


def test_slic_slopes_on_both_sides_of_the_kink():
    """tau = 0.25: -tau (2p-1) while |h| < 4, tau (1-p) beyond 4 and -tau p below -4; zero beyond the kink for p = 1 alone."""
    tau, h = 0.25, torch.tensor([-5.0, -3.9, 0.0, 3.9, 4.1, 90.0], dtype=DOUBLE)
    for p in (0.5, 0.8, 1.0):
        inside, beyond = -tau * (2 * p - 1), tau * (1 - p)
        expected = torch.tensor([-tau * p, inside, inside, inside, beyond, beyond], dtype=DOUBLE)
        torch.testing.assert_close(at(slic, h, p, tau)[1], expected, rtol=1e-14, atol=1e-16)
    assert (at(slic, h, 1.0, tau)[1][-2:] == 0).all()
    assert at(slic, torch.tensor([4.0], dtype=DOUBLE), 1.0, tau)[0].item() == 0, (
        "the kink is where the value reaches 0: h = 1/tau"
    )


def test_dpo_at_huge_gaps():
    """+-1e4 nats, in float32 as in training: the loss of a certain label is tau |h| on the wrong side and 0 on the right one,
    its slope -tau and 0, nothing infinite or NaN. log(sigmoid) would give infinity."""
    for h, value, slope in ((-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)):
        gap, zero = torch.tensor([h], requires_grad=True), torch.zeros(1)
        loss = dpo.loss(gap, zero, zero, zero, torch.ones(1), 1.0)
        assert loss.item() == value and torch.autograd.grad(loss.sum(), gap)[0].item() == slope
    soft, slope = at(dpo, torch.tensor([-1e4, 1e4], dtype=DOUBLE), 0.7, 1.0)
    torch.testing.assert_close(soft, torch.tensor([7e3, 3e3], dtype=DOUBLE), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        slope, torch.tensor([-0.7, 0.3], dtype=DOUBLE), rtol=1e-14, atol=1e-16
    )


def test_equal_responses():
    """y = y' (h = 0, one log-probability on both sides): no gradient from any contrastive loss; Nash-MD-PG keeps its KL term
    tau log pi/pi_ref = 0.3 (2) = 0.6 on log pi(y)."""
    for method in CONTRASTIVE:
        (logp, ref, p) = numbers(-1.0, -3.0, 0.5)
        logp.requires_grad_()
        assert (
            torch.autograd.grad(method.loss(logp, logp, ref, ref, p, 0.3).sum(), logp)[0].item()
            == 0
        )
    logp, ref, p = numbers(-1.0, -3.0, 0.5)
    logp.requires_grad_()
    assert torch.autograd.grad(nash_md.loss(logp, None, ref, None, p, 0.3).sum(), logp)[
        0
    ].item() == pytest.approx(0.6, rel=1e-14)


def test_nash_md_rests_at_a_draw():
    """p = 1/2 and pi = pi_ref: the gradient of a single sample is exactly zero, which it is not without the baseline 1/2."""
    logp, ref, p = numbers(-2.7, -2.7, 0.5)
    logp.requires_grad_()
    assert (
        torch.autograd.grad(nash_md.loss(logp, None, ref, None, p, 0.3).sum(), logp)[0].item()
        == 0.0
    )


def test_score_function_slopes_by_hand():
    """Nash-MD-PG: -(p - 1/2 - tau l) with l = 1.5: -(0.4 - 0.45) = 0.05. RL: minus half of (gap - tau h), h = 1.5 - 0.5:
    -(0.8 - 0.3)/2 = -0.25. A log-ratio that is not detached adds tau log pi to either."""
    logp, other, ref, ref_other = numbers(-1.0, -2.0, -2.5, -2.5)
    logp.requires_grad_(), other.requires_grad_()
    nash = nash_md.loss(logp, None, ref, None, *numbers(0.9), 0.3)
    assert torch.autograd.grad(nash.sum(), logp)[0].item() == pytest.approx(0.05, rel=1e-12)
    slopes = torch.autograd.grad(
        rl.loss(logp, other, ref, ref_other, *numbers(0.8), 0.3).sum(), (logp, other)
    )
    assert [slope.item() for slope in slopes] == pytest.approx([-0.25, 0.25], rel=1e-12)


def test_no_gradient_reaches_label_or_reference():
    """Labels and reference log-probabilities come without gradient; a loss must not need one from them, and returns [B]."""
    for method in (ipo, dpo, slic, nash_md, rl):
        arguments = [
            torch.randn(3, dtype=DOUBLE, generator=torch.Generator().manual_seed(k))
            for k in range(5)
        ]
        arguments[0].requires_grad_()
        value = method.loss(*arguments, 0.3)
        assert value.shape == (3,) and value.requires_grad


# In the parameters of a real GPT-2


def slope(loss, model):
    """The gradient in all parameters, as one vector."""
    gradients = torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True
    )
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_pair_identity_on_the_real_model():
    """The identity that explains the paper, for single pairs that the real policy of the built-in task samples:

    grad (h - (2p-1)/(2 tau))^2 = -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y')), in all parameters.
    The left side is autograd through ipo.loss; the right one uses the two score vectors alone. Relative 1e-10: float64
    rounding through two layers is some 1e-14, and any factor, sign or missing term is of order 1.
    """
    words = summaries.tokenizer()
    policy, reference = (policies.build("tiny", words, 128, seed).double() for seed in (0, 1))
    prompt = policies.pad([words.encode(summaries.post(seed)) for seed in range(2)], "left", 0)
    ids, mask, _ = sampler.sample(
        policy,
        reference,
        prompt,
        (0.0, 0.5),
        torch.Generator().manual_seed(0),
        summaries.MAX_RESPONSE,
    )
    y, other = ((ids[rows], mask[rows]) for rows in (slice(2), slice(2, 4)))
    logp, logp_other = (policies.log_prob(policy, prompt, side) for side in (y, other))
    with torch.no_grad():
        ref, ref_other = (policies.log_prob(reference, prompt, side) for side in (y, other))
    for row, p, tau in ((0, 0.7, 0.1), (1, 0.0, 0.5)):
        here = slice(row, row + 1)
        value = ipo.loss(
            logp[here],
            logp_other[here],
            ref[here],
            ref_other[here],
            torch.tensor([p], dtype=DOUBLE),
            tau,
        )
        left = slope(value.sum(), policy)
        h = ((logp - ref) - (logp_other - ref_other))[row].item()
        score = slope(logp[row], policy) - slope(logp_other[row], policy)
        right = -(2 / tau) * (p - 0.5 - tau * h) * score
        assert left.norm() > 1 and (left - right).norm() / left.norm() < 1e-10


def test_score_function_losses_against_the_exact_objective():
    """RL and Nash-MD-PG, in the parameters of a GPT-2 whose 85 responses are enumerated.

    The truth is autograd of the regularised objective itself, sum_y pi(y) (reward(y) - tau log pi(y)/pi_ref(y)), with a random
    reward, and with p(y > pi_ref) for Nash-MD-PG against a fixed opponent. The losses are averaged over all pairs with weights
    that carry no gradient, as sampling does. Relative 1e-10. A KL that is differentiated directly, without the score, fails.
    """
    w = enumerated.world(0)
    model = policies.build(
        "enumerable", policies.word_tokenizer(["a", "b", "c", "d"]), 8, 1
    ).double()
    log_pi, log_ref, tau = enumerated.log_policy(model, w), w.log_ref, 0.3
    reward = torch.randn(log_ref.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    pairs = log_pi[:, :, None], log_pi[:, None, :], log_ref[:, :, None], log_ref[:, None, :]

    exact = slope((log_pi.exp() * (reward - tau * (log_pi - log_ref))).sum(), model)
    weight = (pairs[0] + pairs[1]).exp().detach()
    sampled = slope(
        (weight * rl.loss(*pairs, reward[:, :, None] - reward[:, None, :], tau)).sum(), model
    )
    assert (sampled + exact).norm() / exact.norm() < 1e-10

    wins = (w.preferences * log_ref.exp()[:, None]).sum(2)
    exact = slope((log_pi.exp() * (wins - tau * (log_pi - log_ref))).sum(), model)
    weight = (pairs[0] + pairs[3]).exp().detach()
    sampled = slope((weight * nash_md.loss(*pairs, w.preferences, tau)).sum(), model)
    assert (sampled + exact).norm() / exact.norm() < 1e-10
