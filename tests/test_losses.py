"""The six losses as functions of numbers: values, slopes, identities to be worked out by hand.

All in float64. Where they lead to is tested elsewhere (test_bandit.py, test_enumerated.py); here is
what one pair gives, and what a method's file says of its own loss.
"""

import math

import pytest
import torch

import dpo
import enumerated
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
    return [torch.tensor([value], dtype=DOUBLE) for value in values]


def at(method, h, p, tau, **constants):
    """Loss and slope in h, [B] each, for gaps h (tensor [B]) and label p (a number or [B])."""
    h = h.detach().clone().requires_grad_()
    zero = torch.zeros_like(h)
    label = torch.as_tensor(p, dtype=DOUBLE).expand_as(h)
    value = method.loss(h, zero, zero, zero, label, tau, **constants)
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


def grad(value, *inputs):
    """The gradients of a loss's sum, as numbers; one number for one input."""
    slopes = [slope.item() for slope in torch.autograd.grad(value.sum(), inputs)]
    return slopes if len(slopes) > 1 else slopes[0]


def assert_close(value, expected, tolerance):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


GAPS = torch.tensor([-30.0, -7.0, -0.3, 0.0, 0.2, 4.0, 25.0], dtype=DOUBLE)


# What a method's file says


def test_table_1():
    """Who draws y and y', what is learned from, contrastive or not: the paper's Table 1."""
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


def test_defaults():
    """TAU, RATE, BETA (None: the file has none), LABEL, OFFLINE: the default runs' own."""
    table = {
        ipo: (0.03, 2e-3, None, "preference", True),
        ipo_md: (0.03, 2e-3, 0.125, "preference", False),
        nash_md: (0.03, 5e-4, 0.125, "preference", False),
        dpo: (0.2, 2e-3, None, "preference", True),
        slic: (0.1, 2e-3, None, "preference", True),
        rl: (0.2, 1e-3, None, "reward", False),
    }
    for method, row in table.items():
        beta = getattr(method, "BETA", None)
        found = method.TAU, method.RATE, beta, method.LABEL, method.OFFLINE
        assert found == row, method.__name__


def scores(log_pi):
    """grad log pi(y) on the logits of a softmax policy, a row a response: one-hot minus pi."""
    return torch.eye(len(log_pi), dtype=DOUBLE) - log_pi.exp()


def self_play(log_pi, log_ref, wins, tau):
    """E (p(y > y') - 1/2 - tau log pi(y)/pi_ref(y)) grad log pi(y), y and y' from pi, [n]."""
    pi = log_pi.exp()
    advantage = wins @ pi - 0.5 - tau * (log_pi - log_ref)
    return (pi * advantage) @ scores(log_pi)


def expected_gradient(method, log_pi, log_ref, wins, tau):
    """The gradient of a loss on the logits, averaged pair by pair, y and y' from pi, [n]."""
    logits = log_pi.clone().requires_grad_()
    logp = logits.log_softmax(0)
    total = torch.zeros(len(log_pi), dtype=DOUBLE)
    for first in range(len(log_pi)):
        for second in range(len(log_pi)):
            sides = logp[first], logp[second], log_ref[first], log_ref[second]
            value = method.loss(*sides, wins[first, second], tau)
            weight = (log_pi[first] + log_pi[second]).exp()
            total += weight * torch.autograd.grad(value, logits, retain_graph=True)[0]
    return total


def random_game(seed, count=5):
    """log pi [n], log pi_ref [n] and preferences [n, n] with p(y > y') + p(y' > y) = 1."""
    generator = torch.Generator().manual_seed(seed)
    log_pi, log_ref = torch.randn(2, count, generator=generator, dtype=DOUBLE).log_softmax(-1)
    above = torch.rand(count, count, generator=generator, dtype=DOUBLE).triu(1)
    wins = above + (1 - above.T).tril(-1) + 0.5 * torch.eye(count, dtype=DOUBLE)
    return log_pi, log_ref, wins


@pytest.mark.parametrize("tau", [0.1, 0.7])
@pytest.mark.parametrize(
    "method, everywhere, factor",
    [
        pytest.param(ipo, True, 1, marks=pytest.mark.equivalence),
        pytest.param(ipo_md, True, 1, marks=pytest.mark.equivalence),
        pytest.param(nash_md, True, 1, marks=pytest.mark.equivalence),
        (dpo, False, 1),
        (slic, False, 2),
    ],
    ids=["ipo", "ipo_md", "nash_md", "dpo", "slic"],
)
def test_gradient_scale(method, everywhere, factor, tau):
    """The expected gradient is -gradient_scale(tau) times the self-play direction: 1e-12.

    For IPO (IPO-MD at beta = 0) and Nash-MD-PG at any policy, Prop 4.2; for DPO at pi = pi_ref,
    where h = 0; for SLiC there, too, and twice that, as slic.py says. All 25 pairs are summed, and
    the direction is written out by hand.
    """
    for seed in range(3):
        log_pi, log_ref, wins = random_game(seed)
        if not everywhere:
            log_pi = log_ref
        direction = self_play(log_pi, log_ref, wins, tau)
        found = expected_gradient(method, log_pi, log_ref, wins, tau)
        assert direction.abs().max() > 0.01, "nothing was compared"
        assert_close(found, -factor * method.gradient_scale(tau) * direction, 1e-12)


def test_gradient_scale_of_rl():
    """1: the RLHF direction E (r(y) - tau log pi(y)/pi_ref(y)) grad log pi(y), at any policy."""
    log_pi, log_ref, _ = random_game(0)
    reward = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    advantage = reward - 0.3 * (log_pi - log_ref)
    direction = (log_pi.exp() * advantage) @ scores(log_pi)
    found = expected_gradient(rl, log_pi, log_ref, reward[:, None] - reward, 0.3)
    assert rl.gradient_scale(0.3) == nash_md.gradient_scale(0.3) == 1
    assert_close(found, -direction, 1e-12)


P = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.98], dtype=DOUBLE)


@pytest.mark.parametrize("method", [ipo, ipo_md, dpo], ids=lambda m: m.__name__)
@pytest.mark.parametrize("tau", [0.03, 0.5, 2.0])
def test_target_gap_has_no_slope(method, tau):
    """At h = target_gap the slope is 0, 1e-12 of the slope at h = 0; away from it it is not."""
    target = method.target_gap(P, tau)
    scale = at(method, torch.zeros(5, dtype=DOUBLE), P, tau)[1].abs().max()
    assert at(method, target, P, tau)[1].abs().max() < 1e-12 * scale
    assert (at(method, target + 0.1, P, tau)[1] > 1e-6 * scale).all()
    assert (at(method, target - 0.1, P, tau)[1] < -1e-6 * scale).all()


@pytest.mark.parametrize("tau", [0.03, 0.5, 2.0])
def test_target_gap_of_slic_is_a_minimum(tau):
    """The hinges have no zero slope at their kink: no neighbour of target_gap has a smaller loss.

    Where p is not 1/2 (there the loss is flat) both have a larger one.
    """
    target = slic.target_gap(P, tau)
    least, _ = at(slic, target, P, tau)
    for step in (-0.5, -1e-3, 1e-3, 0.5):
        value, _ = at(slic, target + step / tau, P, tau)
        assert (value >= least - 1e-15).all()
        assert (value > least)[P != 0.5].all()


def test_target_gap_of_the_score_functions():
    """Nash-MD-PG: no advantage, so no gradient, at log pi(y)/pi_ref(y) = target_gap; rl: at h."""
    logp = torch.full((5,), -3.0, dtype=DOUBLE, requires_grad=True)
    ref = (logp - nash_md.target_gap(P, 0.3)).detach()
    value = nash_md.loss(logp, None, ref, None, P, 0.3)
    assert torch.autograd.grad(value.sum(), logp)[0].abs().max() < 1e-15
    value = nash_md.loss(logp, None, ref - 0.1, None, P, 0.3)
    assert_close(torch.autograd.grad(value.sum(), logp)[0], torch.full_like(P, 0.03), 1e-12)

    reward_gap = torch.tensor([-4.0, -0.2, 0.0, 1.0, 3.0], dtype=DOUBLE)
    target = rl.target_gap(reward_gap, 0.3)
    assert at(rl, target, reward_gap, 0.3)[1].abs().max() < 1e-15
    expected = torch.full_like(target, 0.1 * 0.3 / 2)
    assert_close(at(rl, target + 0.1, reward_gap, 0.3)[1], expected, 1e-12)


# Values and slopes


def test_gap_by_hand():
    """h = (log pi - log pi_ref)(y) - (log pi - log pi_ref)(y') = (-1 + 3) - (-2 + 2.5) = 1.5.

    Exact in binary.
    """
    assert ipo.log_ratio_gap(*numbers(-1.0, -2.0, -3.0, -2.5)).item() == 1.5


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
def test_values_at_the_start(p, tau):
    """At h = 0, where every run starts: IPO 1/(4 tau^2), DPO log 2, SLiC 1, for every label.

    One rounding is allowed.
    """
    zero = torch.zeros(1, dtype=DOUBLE)
    for method, expected in ((ipo, 1 / (4 * tau**2)), (dpo, math.log(2)), (slic, 1.0)):
        value = at(method, zero, p, tau)[0].item()
        assert value == pytest.approx(expected, rel=1e-15), method.__name__


@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_soft_label_ipo_is_one_square(p, tau):
    """The weighted sum of both orders is (h - (2p-1)/(2 tau))^2 + p(1-p)/tau^2.

    Times tau it is the expanded form tau h^2 - (2p-1) h + 1/(4 tau) (eq 10, 11). Values and slopes,
    relative 1e-13: both sides round a few times.
    """
    value, slope = at(ipo, GAPS, p, tau)
    distance = GAPS - (2 * p - 1) / (2 * tau)
    assert_close(value, distance**2 + p * (1 - p) / tau**2, 1e-13)
    assert_close(slope, 2 * distance, 1e-13)
    assert_close(tau * value, tau * GAPS**2 - (2 * p - 1) * GAPS + 1 / (4 * tau), 1e-13)


@pytest.mark.parametrize("method", CONTRASTIVE, ids=lambda m: m.__name__)
def test_a_soft_label_weights_both_orders(method):
    """p L(y, y') + (1-p) L(y', y), L the loss of a certain label: values and slopes.

    1e-13 for rounding.
    """
    for p in (0.0, 0.25, 0.6, 1.0):
        value, slope = at(method, GAPS, p, 0.3)
        first, first_slope = at(method, GAPS, 1.0, 0.3)
        second, second_slope = at(method, -GAPS, 1.0, 0.3)
        assert_close(value, p * first + (1 - p) * second, 1e-13)
        assert_close(slope, p * first_slope - (1 - p) * second_slope, 1e-13)


@pytest.mark.parametrize("method", [*CONTRASTIVE, rl], ids=lambda m: m.__name__)
def test_swapping_the_responses_changes_nothing(method):
    """y <-> y' with p -> 1 - p (rl: the reward gap changes sign): the same loss and gradients.

    On each response, 1e-12.
    """
    generator = torch.Generator().manual_seed(0)
    sides = [-20 * torch.rand(50, generator=generator, dtype=DOUBLE) for _ in range(4)]
    logp, other, ref, ref_other = sides
    label = torch.rand(50, generator=generator, dtype=DOUBLE)
    swapped = -label if method is rl else 1 - label
    logp.requires_grad_()
    other.requires_grad_()
    value = method.loss(logp, other, ref, ref_other, label, 0.3)
    again = method.loss(other, logp, ref_other, ref, swapped, 0.3)
    assert_close(value, again, 1e-12)
    slopes = torch.autograd.grad(value.sum(), (logp, other))
    slopes_again = torch.autograd.grad(again.sum(), (logp, other))
    for one, two in zip(slopes, slopes_again, strict=True):
        assert_close(one, two, 1e-12)
        assert one.abs().max() > 0.01, "nothing was compared"


@pytest.mark.parametrize("method", [ipo, dpo, slic, nash_md, rl], ids=lambda m: m.__name__)
def test_the_preferred_response_is_raised(method):
    """From the start, with p > 1/2 a step downhill raises log pi(y) and never log pi(y').

    With p < 1/2 the reverse. A sign error in the log-ratio or the label fails here.
    """
    for p, sign in ((0.8, 1), (0.2, -1)):
        logp, other, ref, ref_other = numbers(-3.0, -4.0, -3.0, -4.0)
        logp.requires_grad_()
        other.requires_grad_()
        label = torch.tensor([p - 0.5 if method is rl else p], dtype=DOUBLE)
        value = method.loss(logp, other, ref, ref_other, label, 0.3)
        slopes = torch.autograd.grad(value.sum(), (logp, other), allow_unused=True)
        assert sign * slopes[0].item() < 0
        if method.LEARNS_FROM == 2:
            assert slopes[1].item() == pytest.approx(-slopes[0].item(), rel=1e-14)


@pytest.mark.parametrize(
    "method, h", [(ipo, 0.2 / 0.1), (dpo, math.log(0.7 / 0.3) / 0.1)], ids=["ipo", "dpo"]
)
def test_where_one_pair_stops(method, h):
    """The zero of the slope at p = 0.7, tau = 0.1: IPO (p - 1/2)/tau = 2, DPO logit(p)/tau = 8.47.

    1e-12 of the slope's scale.
    """
    assert at(method, torch.tensor([h], dtype=DOUBLE), 0.7, 0.1)[1].abs().item() < 1e-12


def test_slic_slopes_on_both_sides_of_the_kink():
    """tau = 0.25: -tau (2p-1) while |h| < 4, tau (1-p) beyond 4 and -tau p below -4.

    Zero beyond the kink for p = 1 alone.
    """
    tau = 0.25
    h = torch.tensor([-5.0, -3.9, 0.0, 3.9, 4.1, 90.0], dtype=DOUBLE)
    for p in (0.5, 0.8, 1.0):
        inside, beyond = -tau * (2 * p - 1), tau * (1 - p)
        expected = torch.tensor([-tau * p, inside, inside, inside, beyond, beyond], dtype=DOUBLE)
        torch.testing.assert_close(at(slic, h, p, tau)[1], expected, rtol=1e-14, atol=1e-16)
    assert (at(slic, h, 1.0, tau)[1][-2:] == 0).all()
    value = at(slic, torch.tensor([4.0], dtype=DOUBLE), 1.0, tau)[0].item()
    assert value == 0, "the kink is where the value reaches 0: h = 1/tau"


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_slic_margin(margin):
    """loss(..., margin=m): m at h = 0 for every p, kinks at h = +-m/tau; 1e-14 for rounding."""
    tau = 0.25
    kink = margin / tau
    h = torch.tensor([-1.01, -0.99, 0.0, 0.99, 1.01], dtype=DOUBLE) * kink
    for p in (0.0, 0.3, 0.5, 1.0):
        value, slope = at(slic, h, p, tau, margin=margin)
        inside = -tau * (2 * p - 1)
        expected = torch.tensor([-tau * p, inside, inside, inside, tau * (1 - p)], dtype=DOUBLE)
        torch.testing.assert_close(slope, expected, rtol=1e-14, atol=1e-16)
        assert value[2].item() == pytest.approx(margin, rel=1e-15)
    assert at(slic, torch.tensor([kink], dtype=DOUBLE), 1.0, tau, margin=margin)[0].item() == 0


def test_slic_margin_is_1_by_default():
    """To the bit, values and slopes; and another margin is another loss."""
    for p in (0.0, 0.3, 1.0):
        plain = at(slic, GAPS, p, 0.1)
        for one, two in zip(plain, at(slic, GAPS, p, 0.1, margin=1.0), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(plain[0], at(slic, GAPS, p, 0.1, margin=1.1)[0])


def test_dpo_at_huge_gaps():
    """+-1e4 nats, in float32 as in training: nothing is infinite or NaN.

    The loss of a certain label is tau |h| on the wrong side and 0 on the right one, its slope -tau
    and 0. log(sigmoid) would give infinity.
    """
    for h, value, slope in ((-1e4, 1e4, -1.0), (1e4, 0.0, 0.0)):
        gap = torch.tensor([h], requires_grad=True)
        zero = torch.zeros(1)
        loss = dpo.loss(gap, zero, zero, zero, torch.ones(1), 1.0)
        assert loss.item() == value
        assert grad(loss, gap) == slope
    soft, slope = at(dpo, torch.tensor([-1e4, 1e4], dtype=DOUBLE), 0.7, 1.0)
    torch.testing.assert_close(soft, torch.tensor([7e3, 3e3], dtype=DOUBLE), rtol=1e-14, atol=0)
    expected = torch.tensor([-0.7, 0.3], dtype=DOUBLE)
    torch.testing.assert_close(slope, expected, rtol=1e-14, atol=1e-16)


def test_equal_responses():
    """y = y' (h = 0, one log-probability on both sides): no gradient from any contrastive loss.

    Nash-MD-PG keeps its KL term tau log pi/pi_ref = 0.3 (2) = 0.6 on log pi(y).
    """
    for method in CONTRASTIVE:
        logp, ref, p = numbers(-1.0, -3.0, 0.5)
        logp.requires_grad_()
        assert grad(method.loss(logp, logp, ref, ref, p, 0.3), logp) == 0
    logp, ref, p = numbers(-1.0, -3.0, 0.5)
    logp.requires_grad_()
    slope = grad(nash_md.loss(logp, None, ref, None, p, 0.3), logp)
    assert slope == pytest.approx(0.6, rel=1e-14)


def test_nash_md_rests_at_a_draw():
    """p = 1/2 and pi = pi_ref: the gradient of a single sample is exactly zero.

    Without the baseline 1/2 it is not.
    """
    logp, ref, p = numbers(-2.7, -2.7, 0.5)
    logp.requires_grad_()
    assert grad(nash_md.loss(logp, None, ref, None, p, 0.3), logp) == 0.0


def test_score_function_slopes_by_hand():
    """Nash-MD-PG: -(p - 1/2 - tau l) with l = 1.5: -(0.4 - 0.45) = 0.05.

    RL: minus half of (gap - tau h), h = 1.5 - 0.5: -(0.8 - 0.3)/2 = -0.25. A log-ratio that is not
    detached adds tau log pi to either.
    """
    logp, other, ref, ref_other = numbers(-1.0, -2.0, -2.5, -2.5)
    logp.requires_grad_()
    other.requires_grad_()
    nash = nash_md.loss(logp, None, ref, None, *numbers(0.9), 0.3)
    assert grad(nash, logp) == pytest.approx(0.05, rel=1e-12)
    slopes = grad(rl.loss(logp, other, ref, ref_other, *numbers(0.8), 0.3), logp, other)
    assert slopes == pytest.approx([-0.25, 0.25], rel=1e-12)


def test_no_gradient_reaches_label_or_reference():
    """Labels and reference log-probabilities come without gradient; no loss may need one.

    It returns [B].
    """
    for method in (ipo, dpo, slic, nash_md, rl):
        arguments = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            arguments.append(torch.randn(3, dtype=DOUBLE, generator=generator))
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
    """The identity that explains the paper, for pairs that the built-in task's policy samples.

    grad (h - (2p-1)/(2 tau))^2 = -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y')),
    in all parameters. The left side is autograd through ipo.loss; the right one uses the two score
    vectors alone. Relative 1e-10: float64 rounding through two layers is some 1e-14, and any
    factor, sign or missing term is of order 1.
    """
    words = summaries.tokenizer()
    policy = policies.build("tiny", words, 128, 0).double()
    reference = policies.build("tiny", words, 128, 1).double()
    prompt = policies.pad([words.encode(summaries.post(seed)) for seed in range(2)], "left", 0)
    generator = torch.Generator().manual_seed(0)
    ids, mask, _ = sampler.sample(
        policy, reference, prompt, (0.0, 0.5), generator, summaries.MAX_RESPONSE
    )
    response = policies.Tokens(ids, mask)
    y, other = response.rows(slice(2)), response.rows(slice(2, 4))
    logp = policies.log_prob(policy, prompt, y)
    logp_other = policies.log_prob(policy, prompt, other)
    with torch.no_grad():
        ref = policies.log_prob(reference, prompt, y)
        ref_other = policies.log_prob(reference, prompt, other)
    for row, p, tau in ((0, 0.7, 0.1), (1, 0.0, 0.5)):
        here = slice(row, row + 1)
        label = torch.tensor([p], dtype=DOUBLE)
        value = ipo.loss(logp[here], logp_other[here], ref[here], ref_other[here], label, tau)
        left = slope(value.sum(), policy)
        h = ((logp - ref) - (logp_other - ref_other))[row].item()
        score = slope(logp[row], policy) - slope(logp_other[row], policy)
        right = -(2 / tau) * (p - 0.5 - tau * h) * score
        assert left.norm() > 1 and (left - right).norm() / left.norm() < 1e-10


def test_score_function_losses_against_the_exact_objective():
    """RL and Nash-MD-PG, in the parameters of a GPT-2 whose 85 responses are enumerated.

    The truth is autograd of the regularised objective itself, sum_y pi(y) (reward(y) - tau log
    pi(y)/pi_ref(y)), with a random reward, and with p(y > pi_ref) for Nash-MD-PG against a fixed
    opponent. The losses are averaged over all pairs with weights that carry no gradient, as
    sampling does. Relative 1e-10. A KL that is differentiated directly, without the score, fails.
    """
    w = enumerated.world(0)
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    model = policies.build("enumerable", tokenizer, 8, 1).double()
    log_pi, log_ref, tau = enumerated.log_policy(model, w), w.log_ref, 0.3
    reward = torch.randn(log_ref.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    pairs = log_pi[:, :, None], log_pi[:, None, :], log_ref[:, :, None], log_ref[:, None, :]

    exact = slope((log_pi.exp() * (reward - tau * (log_pi - log_ref))).sum(), model)
    weight = (pairs[0] + pairs[1]).exp().detach()
    losses = rl.loss(*pairs, reward[:, :, None] - reward[:, None, :], tau)
    sampled = slope((weight * losses).sum(), model)
    assert (sampled + exact).norm() / exact.norm() < 1e-10

    wins = (w.preferences * log_ref.exp()[:, None]).sum(2)
    exact = slope((log_pi.exp() * (wins - tau * (log_pi - log_ref))).sum(), model)
    weight = (pairs[0] + pairs[3]).exp().detach()
    sampled = slope((weight * nash_md.loss(*pairs, w.preferences, tau)).sum(), model)
    assert (sampled + exact).norm() / exact.norm() < 1e-10
