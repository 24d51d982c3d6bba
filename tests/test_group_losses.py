"""The losses of groups and of whole batches in losses/, as functions of numbers and in the trainer.

Values by hand, slopes by finite differences, symmetries, the limits in which one loss is another,
what is detached, and where they stop (studies/stationary_groups.py). All in float64.
"""

import itertools
import math
import types

import pytest
import torch

import bandit
import data
import dpo
import ipo
import policy as policies
import preference_model
import rl
import sampler
import train
from job import parallel, report
from job.options import constants, find_method, is_group, method_names, parse, requests
from losses import batches, beta_dpo, dro, groups, kto, lipo, rloo, rso
from reference_sampler import gpt2
from studies import stationary_groups
from studies.stationary import Game, bradley_terry_game

DOUBLE = torch.float64
# Name: TAU, RESPONSES, the constants, the requests.
FILES = {
    "d2o": (0.1, 6, {"alpha": 0.1}, set()),
    "dro": (1.0, 2, {}, {"extra"}),
    "ipo_group": (0.03, 8, {}, set()),
    "lipo": (0.05, 4, {}, set()),
    "list_mle": (0.05, 4, {}, set()),
    "pro": (0.05, 4, {}, {"length"}),
    "rloo": (0.2, 4, {}, set()),
    "rrhf": (1.0, 4, {"power": 1.0}, {"length"}),
    "rso": (0.05, 16, {"hinge": 0}, set()),
    "sppo": (0.03, 4, {}, set()),
    "typo": (1.0, 3, {}, set()),
}
NAMES = tuple(FILES)
PROCEDURES = ("ppo",)  # they score groups in their own way, and have test files of their own
# All responses count alike; in the others y, y' and those of the reference have parts of their own.
SYMMETRIC = ("dro", "ipo_group", "lipo", "list_mle", "pro", "rloo", "rrhf", "rso", "sppo")
WITHOUT_REFERENCE = ("pro", "rrhf")


def tensors(seed, count=40, responses=4, scale=3.0):
    """Random log pi and log pi_ref, [count, K], preferences [count, K, K], rewards [count, K]."""
    generator = torch.Generator().manual_seed(seed)
    sides = -scale * torch.rand(2, count, responses, generator=generator, dtype=DOUBLE) - 0.1
    noise = torch.randn(count, responses, responses, generator=generator, dtype=DOUBLE)
    rewards = torch.randn(count, responses, generator=generator, dtype=DOUBLE)
    return [*sides, torch.sigmoid(noise - noise.transpose(1, 2)), rewards]


def label_of(name, preferences, rewards):
    """What a method's label_pairs makes of a game."""
    labels = {
        groups.label_rewards: rewards,
        groups.label_pairs: preferences,
        groups.label_first: preferences[:, 0, 1],
        rso.label_pairs: preferences,
    }
    return labels[find_method(name).label_pairs]


def asked(name, count=40, responses=4, seed=1):
    """Random values of what a method's loss asks for."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for request in sorted(FILES[name][3]):
        given[request] = torch.rand(count, responses, generator=generator, dtype=DOUBLE)
        if request == "length":
            given[request] = torch.randint(1, 9, (count, responses), generator=generator)
    return given


def value_of(name, seed=0, responses=4, tau=0.4, **constant):
    """A method's loss of random groups: (logp, what is asked, the value)."""
    logp, ref_logp, *labels = tensors(seed, responses=responses)
    given, logp = asked(name, responses=responses), logp.requires_grad_()
    value = find_method(name).loss(
        logp, ref_logp, label_of(name, *labels), tau, **given, **constant
    )
    return logp, given, value


def slopes(value, *inputs):
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(value.sum(), inputs, **options)


def assert_close(value, expected, tolerance=1e-12):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def numbers(*rows):
    return torch.tensor([rows], dtype=DOUBLE)


every_name = pytest.mark.parametrize("name", NAMES)


# What a file says


def test_every_group_method_is_tested_here():
    found = [name for name in method_names() if is_group(find_method(name))]
    assert sorted((*NAMES, *PROCEDURES)) == found


@every_name
def test_what_a_file_says(name):
    method, (tau, responses, its_constants, its_requests) = find_method(name), FILES[name]
    assert (method.TAU, method.RESPONSES) == (tau, responses)
    assert constants(method) == its_constants and requests(method) == its_requests
    assert method.LABEL in ("preference", "rewards") and not method.OFFLINE
    # RSO asks for rewards and makes preferences of them; its candidates are the start's.
    by_rewards = method.label_pairs in (groups.label_rewards, rso.label_pairs)
    assert by_rewards == (method.LABEL == "rewards")
    first_two = ("reference", "reference") if name == "rso" else ("policy", "policy")
    assert method.PAIR[:2] == first_two and len(method.PAIR) <= responses
    assert method.pair_losses is groups.pair_losses and method.CONTRASTIVE == (
        name in ("rso", "ipo_group")
    )


@pytest.mark.parametrize("name", [*NAMES, "kto", "beta_dpo"])
def test_a_worked_example(name, capsys):
    find_method(name).worked_example()
    out = capsys.readouterr().out
    assert out.count("\n") >= 3 and "nan" not in out and "inf" not in out


# Values


P3 = [[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]
BY_HAND = {
    # log pi, log pi_ref, the label, tau, the rest, the value.
    # psi = 0.7, 0.5333, 0.2667; s = 1, 2, 0.5: ranks 2, 1, 3. The three pairs' weights are
    # |2^.7 - 2^.5333| (1/log 2 - 1/log 3), |2^.7 - 2^.2667| (1/log 3 - 1/log 4),
    # |2^.5333 - 2^.2667| (1/log 2 - 1/log 4); s_i - s_j = -1, 0.5, 1.5 in the logistic terms.
    "lipo": ((-2, -1, -2.5), (-4, -5, -3.5), P3, 0.5, {}, None),
    # Returns 1.2 - 0.1, 0.4 - 0.05, 0; advantages 0.925, -0.2, -0.725 times log pi -3, -2, -4
    "rloo": ((-3, -2, -4), (-4, -2.5, -4), (1.2, 0.4, 0.0), 0.1, {}, -(-2.775 + 0.4 + 2.9) / 3),
    # Residuals 1.2 - 0.3 - 0.1, 0.4 - 0.3 - 0.05
    "dro": ((-3, -2), (-4, -2.5), (1.2, 0.4), 0.1, {"extra": 0.3}, (0.64 + 0.0025) / 4),
    # h = 0.5, 1, 0.5 against +-1: 0.7 * 0.25 + 0.3 * 2.25, 0.1 * 4, 0.8 * 0.25 + 0.2 * 2.25
    "ipo_group": ((-3, -2, -4), (-4, -2.5, -4), P3, 0.5, {}, (0.85 + 0.4 + 0.65) / 3),
    # Win rates 0.7, 0.5333, 0.2667, targets 0.4, 1/15, -7/15 against d = 1, 0.5, 0
    "sppo": (
        (-3, -2, -4),
        *((-4, -2.5, -4), P3, 0.5, {}, (0.6**2 + (13 / 30) ** 2 + (7 / 15) ** 2) / 3),
    ),
    # s = 1, 2, 0.5 in the order of the labels:
    # log(e^1 + e^2 + e^0.5) - 1 + log(e^2 + e^0.5) - 2
    "list_mle": ((-2, -1, -2.5), (-4, -5, -3.5), P3, 0.5, {}, 1.6657820620906971),
    # gap = 1: 0.75 log(1 + e^-1) + 0.25 log(1 + e) + 0.3 * (0.5 - 1)/2
    "typo": (
        (-2, -3, -1.5, -2),
        *((-2, -2, -1, -3), 0.75, 0.3, {}, 0.5632616875182228 - 0.075),
    ),
    # d = 1, 2 and 0, -2; 0.75 log(1 + e^(0.6 + 0.1)) + 0.25 log(1 + e^(0.3 + 0.1))
    "d2o": (
        (-2, -3, -4, -5),
        *((-3, -5, -4, -3), 0.75, 0.1, {"alpha": 0.3}, 1.0556433497640816),
    ),
    # d = 1, 0.5, 0: the mean of three logistic terms, h = 0.5, 1, 0.5
    "rso": ((-3, -2, -4), (-4, -2.5, -4), P3, 0.2, {}, None),
    # Means -2, -1, -3 over 3, 4, 3 tokens, the best the first: 2 * 1 + 6
    "rrhf": ((-6, -4, -9), (0, 0, 0), (2.0, 1.0, 0.0), 2.0, {"length": (3, 4, 3)}, 8.0),
    # The best is in the second column: means -1, -2, -3 in order, r = 2, 1, 0:
    # log(e^-2 + e^-2 + e^-6) + 2 + log(e^-2 + e^-3) + 2 + 0.05 * 4 * 2
    "pro": (
        (-4, -2, -9),
        *((0, 0, 0), (1.0, 2.0, 0.0), 0.05, {"length": (2, 2, 3)}, 1.4155249),
    ),
}


def lipo_by_hand():
    gains = [2**0.7 - 2 ** (1.6 / 3), 2**0.7 - 2 ** (0.8 / 3)]
    gains.append(2 ** (1.6 / 3) - 2 ** (0.8 / 3))
    steps = [1 / math.log(2) - 1 / math.log(3), 1 / math.log(3) - 1 / math.log(4)]
    steps.append(1 / math.log(2) - 1 / math.log(4))
    terms = [math.log(1 + math.exp(-gap)) for gap in (-1.0, 0.5, 1.5)]
    return sum(gain * step * term for gain, step, term in zip(gains, steps, terms, strict=True))


def rso_by_hand():
    """Of the pairs (1, 2), (1, 3), (2, 3): d = 1, 0.5, 0, so h = 0.5, 1, 0.5."""
    total = 0.0
    for p, h in ((0.7, 0.5), (0.9, 1.0), (0.8, 0.5)):
        total += p * math.log(1 + math.exp(-0.2 * h)) + (1 - p) * math.log(1 + math.exp(0.2 * h))
    return total / 3


@pytest.mark.parametrize("case", BY_HAND)
def test_a_value_by_hand(case):
    """The comment above each case is its formula; 1e-12 for rounding."""
    logp, ref_logp, label, tau, given, expected = BY_HAND[case]
    if expected is None:
        expected = {"lipo": lipo_by_hand, "rso": rso_by_hand}[case]()
    tensor = {}
    for key, value in given.items():
        tensor[key] = torch.tensor([value], dtype=DOUBLE) if key in FILES[case][3] else value
    label = torch.tensor([label], dtype=DOUBLE)
    value = find_method(case).loss(numbers(*logp), numbers(*ref_logp), label, tau, **tensor)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(expected, rel=1e-7 if case == "pro" else 1e-12)


def test_kto_by_hand():
    """d = 1 and -2, z0 = 0.5, tau = 0.4, lambdas 2 and 3, p = 3/4: sigmoids of -+0.2 and +-1."""
    s = [1 / (1 + math.exp(-z)) for z in (-0.2, 0.2, 1.0, -1.0)]
    first = 0.75 * 2 * s[0] + 0.25 * 3 * s[1]
    second = 0.25 * 2 * s[2] + 0.75 * 3 * s[3]
    sides = [torch.tensor([value], dtype=DOUBLE) for value in (-2.0, -5.0, -3.0, -3.0, 0.75)]
    z0 = torch.tensor([0.5], dtype=DOUBLE)
    value = kto.loss(*sides, 0.4, z0=z0, lambda_d=2.0, lambda_u=3.0).item()
    assert value == pytest.approx((first + second) / 2, rel=1e-12)
    assert value == pytest.approx(1.0291360, rel=1e-7)


# Slopes and symmetries


@every_name
def test_slopes_by_finite_differences(name):
    """Of the numbers that a loss learns from; not of a loss whose weight is detached."""
    logp, given, value = value_of(name)
    inputs = [logp]
    slope = slopes(value, *inputs)[0]
    assert slope.abs().max() > 1e-3 and slope.isfinite().all()
    if name == "rloo":  # its value means nothing
        return
    step = 1e-6
    for place in range(logp.shape[1]):
        ends = []
        for sign in (1, -1):
            moved, ref_logp, *labels = tensors(0)
            moved[:, place] += sign * step
            label = label_of(name, *labels)
            ends.append(find_method(name).loss(moved, ref_logp, label, 0.4, **given))
        assert_close(slope[:, place], (ends[0] - ends[1]) / (2 * step), 1e-7)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_the_responses_means_nothing(name):
    """The value and each response's slope, whichever column it is in."""
    logp, ref_logp, preferences, rewards = tensors(3)
    given, order = asked(name), torch.tensor([2, 0, 3, 1])
    logp = logp.requires_grad_()
    value = find_method(name).loss(
        logp, ref_logp, label_of(name, preferences, rewards), 0.4, **given
    )
    shuffled = logp.detach()[:, order].requires_grad_()
    label = label_of(name, preferences[:, order][:, :, order], rewards[:, order])
    given = {key: values[:, order] for key, values in given.items()}
    again = find_method(name).loss(shuffled, ref_logp[:, order], label, 0.4, **given)
    if name != "rloo":
        assert_close(value, again)
    assert_close(slopes(value, logp)[0][:, order], slopes(again, shuffled)[0])


def test_swapping_a_pair_of_kto_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    one, two, ref, other = -3 * torch.rand(4, 20, generator=generator, dtype=DOUBLE)
    p, z0 = torch.rand(2, 20, generator=generator, dtype=DOUBLE)
    value = kto.loss(one, two, ref, other, p, 0.3, z0=z0, lambda_d=1.3)
    again = kto.loss(two, one, other, ref, 1 - p, 0.3, z0=z0, lambda_d=1.3)
    assert_close(value, again)
    at_start = kto.loss(ref, ref, ref, ref, p, 0.3, z0=torch.zeros_like(p))
    assert_close(at_start, torch.full_like(p, 0.5), 1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_extremes_are_finite(name):
    """Log-ratios of a thousand nats in both directions, in the value and in the slopes."""
    logp, ref_logp, preferences, rewards = tensors(4)
    logp = (logp * 1000).requires_grad_()
    label, given = label_of(name, preferences, rewards), asked(name)
    value = find_method(name).loss(logp, ref_logp, label, 0.4, **given)
    assert value.isfinite().all() and slopes(value, logp)[0].isfinite().all()


# Limits


def test_lipo_of_two_is_dpo_of_a_certain_label():
    """(2^psi - 2^psi') (1/log 2 - 1/log 3) times it, psi = (p + 1/2)/2, in whatever order."""
    logp, ref_logp, preferences, _ = tensors(5, responses=2)
    p = preferences[:, 0, 1]
    value = lipo.loss(logp, ref_logp, preferences, 0.4)
    sides = logp[:, 0], logp[:, 1], ref_logp[:, 0], ref_logp[:, 1]
    certain = dpo.loss(*sides, (p > 0.5).double(), 0.4)
    psi = (p + 0.5) / 2
    weight = (2**psi - 2 ** (1 - psi)).abs() * (1 / math.log(2) - 1 / math.log(3))
    assert_close(value, weight * certain)


def test_lipo_takes_the_current_ranks():
    """The weights by a loop over the pairs, with ranks of the scores and no gradient in them."""
    scores, _, preferences, _ = tensors(6, count=5)
    psi = groups.win_rates(preferences)
    found = lipo.lambdas(scores.requires_grad_(), psi)
    assert not found.requires_grad
    for one in range(5):
        rank = [1 + sum(other > score for other in scores[one]).item() for score in scores[one]]
        for i in range(4):
            for j in range(4):
                gain = abs(2 ** psi[one, i].item() - 2 ** psi[one, j].item())
                step = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                assert found[one, i, j].item() == pytest.approx(gain * step, abs=1e-14)


def test_list_mle_of_two_is_dpo_of_a_certain_label():
    logp, ref_logp, preferences, _ = tensors(5, responses=2)
    certain = (preferences[:, 0, 1] > 0.5).double()
    sides = logp[:, 0], logp[:, 1], ref_logp[:, 0], ref_logp[:, 1]
    value = find_method("list_mle").loss(logp, ref_logp, preferences, 0.4)
    assert_close(value, dpo.loss(*sides, certain, 0.4))


def test_list_mle_is_a_law_of_orders():
    """Over all six orders of three responses e^-loss adds up to 1."""
    logp, ref_logp, _, _ = tensors(6, responses=3)
    total = 0.0
    for order in itertools.permutations(range(3)):
        rewards = torch.tensor(order, dtype=DOUBLE)
        preferences = bandit.bradley_terry(rewards).expand(40, 3, 3)
        total += torch.exp(-find_method("list_mle").loss(logp, ref_logp, preferences, 0.4))
    assert_close(total, torch.ones(40, dtype=DOUBLE))


def test_pro_of_two():
    """log(1 + e^-(r - r')(Lbar - Lbar')) of the better one, and its likelihood at weight tau."""
    logp, _, _, rewards = tensors(10, responses=2)
    length = asked("pro", responses=2)["length"]
    value = find_method("pro").loss(logp, None, rewards, 0.3, length=length)
    mean, best = logp / length, rewards.argmax(1, keepdim=True)
    z = (rewards[:, 0] - rewards[:, 1]) * (mean[:, 0] - mean[:, 1])
    assert_close(value, torch.log1p(torch.exp(-z)) - 0.3 * logp.gather(1, best)[:, 0])


def test_ipo_of_a_group_is_the_mean_over_its_pairs():
    """Every pair asked of ipo.loss one by one; for K = 2 ipo.loss itself."""
    logp, ref_logp, preferences, _ = tensors(3, responses=4)
    value = find_method("ipo_group").loss(logp, ref_logp, preferences, 0.4)
    alone = []
    for first in range(4):
        for second in range(first + 1, 4):
            sides = logp[:, first], logp[:, second], ref_logp[:, first], ref_logp[:, second]
            alone.append(ipo.loss(*sides, preferences[:, first, second], 0.4))
    assert_close(value, torch.stack(alone).mean(0))
    assert len(alone) == 6


def test_a_model_of_preferences_reads_each_response_once(monkeypatch):
    """label_pairs of a model equals asking it pair by pair, to the bit, in K readings."""
    task = data.BuiltIn()
    reference = gpt2(0, len(task.tokenizer), 128).float()
    model = preference_model.PreferenceModel(reference).eval()
    prompt = task.prompts("align", 0, 3)
    ids, mask, _ = sampler.sample(reference, None, prompt, (0.0,) * 4, data.generator(0, "x", 0), 6)
    drawn = policies.Tokens(ids, mask)
    responses = [drawn.rows(slice(3 * k, 3 * k + 3)) for k in range(4)]
    asked = groups.label_pairs(lambda *given: model(*given), prompt, *responses)
    count, read = [], preference_model.PreferenceModel.read
    monkeypatch.setattr(
        preference_model.PreferenceModel, "read", lambda *given: count.append(1) or read(*given)
    )
    assert torch.equal(groups.label_pairs(model, prompt, *responses), asked)
    assert len(count) == 4
    assert 0 < (asked - 0.5).abs().max()


def test_sppo_of_two_is_the_authors_pair():
    """1/2 [(d - (P - 1/2)/tau)^2 + the same of y'], P = (p + 1/2)/2 against two samples."""
    logp, ref_logp, preferences, _ = tensors(11, responses=2)
    rate = (preferences[:, 0, 1] + 0.5) / 2
    ratio = logp - ref_logp
    first = ratio[:, 0] - (rate - 0.5) / 0.4
    second = ratio[:, 1] + (rate - 0.5) / 0.4
    value = find_method("sppo").loss(logp, ref_logp, preferences, 0.4)
    assert_close(value, (first**2 + second**2) / 2)


def test_rrhf_of_a_right_order_is_the_bests_likelihood():
    """No hinge is on; at power 0 sums are compared, not means."""
    logp, rewards, length = numbers(-2, -3, -8), numbers(3, 2, 1), torch.tensor([[1, 2, 3]])
    rrhf = find_method("rrhf").loss
    # Means -2, -1.5, -2.67: one hinge of 0.5. The sums are in order.
    assert rrhf(logp, None, rewards, 5.0, length=length).item() == 5 * 0.5 + 2
    assert rrhf(logp, None, rewards, 5.0, length=length, power=0.0).item() == 2
    assert rrhf(logp, None, rewards, 5.0, length=torch.ones_like(length)).item() == 2


@every_name
def test_what_has_no_reference(name):
    """Another reference gives the same slopes; for every other loss it does not (but TYPO's, in
    which it is a constant of the value: the samples are what keeps the reference)."""
    logp, ref_logp, *labels = tensors(12)
    logp, given, label = logp.requires_grad_(), asked(name), label_of(name, *labels)
    found = []
    for reference in (ref_logp, ref_logp * torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=DOUBLE)):
        value = find_method(name).loss(logp, reference, label, 0.4, **given)
        found.append(slopes(value, logp)[0])
    assert torch.equal(*found) == (name in (*WITHOUT_REFERENCE, "typo"))


def test_values_at_the_start():
    """pi = pi_ref: D2O log 2, TYPO's KL part 0, list-MLE log K!, SPPO the targets' squares."""
    logp, _, preferences, _ = tensors(13)
    p, ones = preferences[:, 0, 1], torch.ones(40, dtype=DOUBLE)
    assert_close(find_method("d2o").loss(logp, logp, p, 0.4), math.log(2) * ones)
    gap = logp[:, 0] - logp[:, 1]
    entropy = dpo.loss(gap, 0 * gap, 0 * gap, 0 * gap, p, 1.0)
    assert_close(find_method("typo").loss(logp, logp, p, 0.4), entropy)
    value = find_method("list_mle").loss(logp, logp, preferences, 0.4)
    assert_close(value, math.log(24) * ones)
    target = (preferences.mean(2) - 0.5) / 0.4
    assert_close(find_method("sppo").loss(logp, logp, preferences, 0.4), (target**2).mean(1))
    assert_close(rso.loss(logp, logp, preferences, 0.4), math.log(2) * ones)
    assert_close(rso.loss(logp, logp, preferences, 0.4, hinge=1), ones)


def test_equal_responses_are_no_pair():
    """All labels 1/2: LiPO costs nothing and pulls nowhere."""
    logp, ref_logp, preferences, _ = tensors(7)
    logp = logp.requires_grad_()
    value = lipo.loss(logp, ref_logp, torch.full_like(preferences, 0.5), 0.4)
    assert value.abs().max() == 0 and slopes(value, logp)[0].abs().max() == 0


@pytest.mark.parametrize("responses", [2, 3, 5])
def test_rloo_is_the_leave_one_out_mean(responses):
    """The slope on log pi(y_i) is -K/(K-1) (R_i - mean R)/K, and the baselines' form of it."""
    logp, ref_logp, _, rewards = tensors(8, responses=responses)
    logp = logp.requires_grad_()
    slope = slopes(rloo.loss(logp, ref_logp, rewards, 0.4), logp)[0]
    returns = (rewards - 0.4 * (logp - ref_logp)).detach()
    centred = returns - returns.mean(1, keepdim=True)
    assert_close(slope, -centred / (responses - 1))
    others = (returns.sum(1, keepdim=True) - returns) / (responses - 1)
    assert_close(slope, -(returns - others) / responses)


def test_rl_is_rloo_of_two():
    """Value and slopes, to the bit."""
    logp, ref_logp, _, rewards = tensors(9, responses=2)
    logp = logp.requires_grad_()
    value = rloo.loss(logp, ref_logp, rewards, 0.4)
    sides = logp[:, 0], logp[:, 1], ref_logp[:, 0], ref_logp[:, 1]
    pair = rl.loss(*sides, rewards[:, 0] - rewards[:, 1], 0.4)
    assert torch.equal(value, pair)
    assert torch.equal(slopes(value, logp)[0], slopes(pair, logp)[0])


def test_kto_with_far_levels_learns_nothing():
    """Saturated on both sides, and steepest at z0, where the slope is -+ tau lambda/8 a pair."""
    half = torch.tensor([1.0], dtype=DOUBLE)
    for z0, expected in ((0.0, 0.4 / 8), (1e4, 0.0), (-1e4, 0.0)):
        one, two = torch.zeros(2, 1, dtype=DOUBLE).requires_grad_()
        zero, level = torch.zeros(1, dtype=DOUBLE), torch.tensor([z0], dtype=DOUBLE)
        slope, other = slopes(kto.loss(one, two, zero, zero, half, 0.4, z0=level), one, two)
        assert slope.item() == pytest.approx(-expected) and other.item() == pytest.approx(expected)


# In the trainer


PROMPT = policies.pad([[1, 2, 3], [2], [4, 4]], "left", 0)
Y = policies.pad([[1, 0], [2, 3, 4, 1], [0]], "right", 0)
OTHER = policies.pad([[3, 2, 0], [0], [1, 2, 3, 3]], "right", 0)
THIRD = policies.pad([[2, 2], [1], [4, 0]], "right", 0)


def test_z0_is_of_the_mismatched_pairs():
    """The mean of log pi/pi_ref of every prompt with the next one's y, by hand; 0 if that is below.

    One prompt has no other's response.
    """
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    rows = list(zip(PROMPT.lists(), Y.lists()[1:] + Y.lists()[:1], strict=True))
    for models in ((policy, reference), (reference, policy)):
        total = 0.0
        for prompt, response in rows:
            pair = policies.pad([prompt], "left", 0), policies.pad([response], "right", 0)
            total += (
                policies.log_prob(models[0], *pair) - policies.log_prob(models[1], *pair)
            ).item()
        for size in (None, 1, 2):
            given = parallel, size, models[0], *models, PROMPT, Y, OTHER, torch.ones(3)
            found = kto.of_batch(*given)["z0"]
            assert found.shape == (3,) and not found.requires_grad
            assert_close(found, torch.full((3,), max(0.0, total / 3), dtype=DOUBLE))
    assert found.max() == 0 or total > 0
    one = [part.rows(slice(0, 1)) for part in (PROMPT, Y, OTHER)]
    with pytest.raises(ValueError, match="--batch-size"):
        kto.of_batch(parallel, None, policy, policy, reference, *one, torch.ones(1))


def test_beta_dpo_of_a_batch_by_hand():
    """Two batches: the running means, the number of kept pairs, their weight 1/(1 - rho) in the
    batch, M - M0 of the kept ones, and the loss at the batch's beta; a soft label below 1/2 turns
    h round. Neither the policy's nor the statistics' part has a gradient."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    beta_dpo.prepare(policy)
    label = torch.tensor([0.9, 0.2, 0.6], dtype=DOUBLE)
    ratios = [batches.log_ratios(None, policy, reference, PROMPT, side) for side in (Y, OTHER)]
    h = (ratios[0] - ratios[1]) * torch.tensor([1, -1, 1], dtype=DOUBLE)
    mean, spread = 0.0, 0.0
    for count in range(2):
        found = beta_dpo.of_batch(parallel, 1, policy, policy, reference, PROMPT, Y, OTHER, label)
        mean, spread = 0.9 * mean + 0.1 * h.mean().item(), 0.9 * spread + 0.1 * h.std().item()
        assert policy.margins.tolist() == pytest.approx([mean, spread, count + 1], rel=1e-12)
        kept = found["kept"] > 0
        assert kept.sum() == 2 and found["kept"].sum().item() == pytest.approx(3.0)
        shift = h[kept].mean().item() - mean
        assert found["shift"].tolist() == pytest.approx([shift] * 3, rel=1e-12)
        pairs = PROMPT, Y, OTHER, label
        options = parse(["--loss", "beta_dpo", "--device", "cpu"])
        value, _ = train.pair_losses(options, beta_dpo, policy, reference, *pairs, **found)
        beta = max(1e-3, 0.1 * (1 + 0.6 * shift))
        sides = [policies.log_prob(m, PROMPT, s) for m in (policy, reference) for s in (Y, OTHER)]
        plain = dpo.loss(*sides, label, beta)
        assert_close(value[kept], 1.5 * plain[kept])
        assert value[~kept].abs().max() == 0 and not found["shift"].requires_grad


def test_beta_dpo_keeps_what_is_near_the_mean():
    """Drawn without replacement with weights e^-((h - M0)^2/(2 s0^2)): the first draw's law, and no
    number of the race is lost where the weights underflow."""
    h, counts = torch.tensor([0.0, 1.0, 3.0], dtype=DOUBLE), torch.zeros(3)
    patch = pytest.MonkeyPatch()
    patch.setattr(beta_dpo, "RHO", 0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[beta_dpo.draw(h, 0.0, 1.0, generator)] += 1
    weight = torch.exp(-(h**2) / 2)
    expected = (weight / weight.sum()).float()
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)
    patch.undo()
    far = 1000 + torch.arange(10, dtype=DOUBLE)
    assert sorted(beta_dpo.draw(far, 0.0, 1.0, generator).tolist()) == list(range(8))
    still = torch.zeros(10, dtype=DOUBLE)
    assert len(set(beta_dpo.draw(still, 0.0, 0.0, generator).tolist())) == 8


def test_beta_dpo_without_statistics_is_dpo():
    generator = torch.Generator().manual_seed(0)
    *sides, p = torch.rand(5, 20, generator=generator, dtype=DOUBLE)
    given = dict(shift=torch.full_like(p, 0.7), kept=torch.ones_like(p))
    assert_close(beta_dpo.loss(*sides, p, 0.3, a=0.0, **given), dpo.loss(*sides, p, 0.3))
    given["shift"] = torch.full_like(p, -100.0)
    assert_close(beta_dpo.loss(*sides, p, 0.3, **given), dpo.loss(*sides, p, 1e-3))


def test_log_ratios_a_part_at_a_time():
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    whole = batches.log_ratios(None, policy, reference, PROMPT, Y)
    expected = policies.log_prob(policy, PROMPT, Y) - policies.log_prob(reference, PROMPT, Y)
    assert_close(whole, expected.detach())
    assert_close(batches.log_ratios(2, policy, reference, PROMPT, Y), whole)


def test_labels_of_a_group():
    """p of every pair asked once, the rest to 1 below the diagonal; rewards one by one."""
    questions = []

    def preference(prompt, y, y_other):
        questions.append(1)
        return torch.sigmoid((y.lengths() - y_other.lengths()).double() / 2)

    found = groups.label_pairs(preference, PROMPT, Y, OTHER, THIRD)
    length = torch.stack([part.lengths() for part in (Y, OTHER, THIRD)], 1).double()
    assert_close(found, torch.sigmoid((length[:, :, None] - length[:, None]) / 2))
    assert len(questions) == 3

    def reward(prompt, y):
        return y.lengths().double()

    assert torch.equal(groups.label_rewards(reward, PROMPT, Y, OTHER, THIRD), length)


def batch_of(name):
    preferences = torch.tensor(P3, dtype=DOUBLE).expand(3, 3, 3)
    rewards = torch.tensor([[1.2, 0.4, -0.3]] * 3, dtype=DOUBLE)
    return PROMPT, Y, OTHER, THIRD, label_of(name, preferences, rewards)


@every_name
def test_the_trainer_gives_a_group(name, capsys):
    """pair_losses is the loss of the responses' log-probabilities, column by column, with what was
    asked for; --show prints it, and the run's line says who draws."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    options, method = (
        parse(["--loss", name, "--responses", "3", "--device", "cpu"]),
        find_method(name),
    )
    if hasattr(method, "prepare"):
        method.prepare(policy)
    batch = batch_of(name)
    given = train.requested(method, policy, reference, *batch[:-1])
    found, ratio = method.pair_losses(options, method, policy, reference, *batch, **given)
    columns = []
    for model in (policy, reference):
        sides = [policies.log_prob(model, PROMPT, side) for side in (Y, OTHER, THIRD)]
        columns.append(torch.stack(sides, 1))
    assert_close(found, method.loss(*columns, batch[-1], method.TAU, **given))
    assert_close(ratio, (columns[0] - columns[1]).mean(1))
    assert found.requires_grad
    words = policies.word_tokenizer(["a", "b", "c", "d"])
    report.show(options, method, words, policy, reference, *batch)
    out = capsys.readouterr().out
    shown = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  loss")]
    assert shown == pytest.approx(found[:2].tolist(), abs=2e-6)
    assert out.count("log pi, log pi_ref") == 6 and "  y3 (" in out
    report.print_method(options, method)
    assert out.count("prompt ") == 2 and "a group from the " in capsys.readouterr().out


def test_kto_is_shown(capsys):
    """With the z0 of the whole batch, not of the two pairs that are printed."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    options, words = parse(["--loss", "kto", "--device", "cpu"]), policies.word_tokenizer("abcd")
    pairs = PROMPT, Y, OTHER, torch.tensor([0.9, 0.2, 0.6], dtype=DOUBLE)
    z0 = kto.of_batch(parallel, None, policy, policy, reference, *pairs)["z0"]
    report.show(options, kto, words, policy, reference, *pairs, z0=z0)
    out = capsys.readouterr().out
    value, _ = train.pair_losses(options, kto, policy, reference, *pairs, z0=z0)
    shown = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  loss")]
    assert shown == pytest.approx(value[:2].tolist(), abs=2e-6) and out.count("  z0 ") == 2
    report.print_method(options, kto)
    assert "of the whole batch: z0" in capsys.readouterr().out


def test_responses_as_an_option():
    """Its default is the file's, pairs have none; what does not fit is refused."""
    assert parse(["--loss", "rloo"]).responses == 4 and parse(["--loss", "ipo"]).responses is None
    assert parse(["--loss", "rloo", "--responses", "7"]).responses == 7
    for argv, advice in (
        (["--loss", "ipo", "--responses", "3"], "lipo"),
        (["--loss", "rloo", "--responses", "1"], "takes 2 or more"),
    ):
        with pytest.raises(ValueError, match=advice):
            parse(argv)


def test_the_value_of_dro():
    """V is 0 at first, the same for every response of a prompt, whatever the padding, and learns
    alone: it sends no gradient into the policy's other weights, nor into the reference."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    state = torch.random.get_rng_state()
    dro.prepare(policy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert dro.extra(policy, reference, PROMPT, Y).abs().max() == 0
    with torch.no_grad():
        policy.value[2].weight.fill_(0.5)
    value = dro.extra(policy, reference, PROMPT, Y)
    assert torch.equal(value, dro.extra(policy, reference, PROMPT, OTHER))
    assert value.std() > 1e-3 and value.dtype == DOUBLE
    for row, prompt in enumerate(PROMPT.lists()):
        alone = dro.extra(policy, reference, policies.pad([prompt], "left", 0), None)
        assert_close(value[row : row + 1], alone)
    value.sum().backward()
    learns = {name for name, part in policy.named_parameters() if part.grad is not None}
    assert learns == {"value.0.weight", "value.0.bias", "value.2.weight", "value.2.bias"}


# Where they stop


def nudged(log_pi, size=0.1):
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(len(log_pi), generator=generator, dtype=DOUBLE)
    return torch.log_softmax(log_pi + size * step / step.norm(), 0)


def typo_game(truth, reference):
    """Bradley-Terry labels of a true policy, pairs uniform over all nine ordered ones."""
    truth, reference = (torch.tensor(law, dtype=DOUBLE).log() for law in (truth, reference))
    even = torch.full((3,), 1 / 3, dtype=DOUBLE).log()
    return Game(bandit.bradley_terry(truth), reference, 1.0, even, truth)


@pytest.mark.parametrize(
    "tau, expected",
    [
        (0.01, (0.5885, 0.3079, 0.1036)),
        (0.1, (0.5268, 0.3472, 0.1260)),
        (1.0, (0.4321, 0.3911, 0.1768)),
        (100.0, (0.4004, 0.3999, 0.1997)),
    ],
)
def test_typo_interpolates(tau, expected):
    """From the true policy to the reference, the point of the loss's own gradient; DPO's goes to
    one response as its tau falls, whatever the true policy is.

    The expected numbers weigh an ordered pair (w, l) with p/9, so half of the labels' weight here:
    their lambda is tau/2.
    """
    game = typo_game((0.6, 0.3, 0.1), (0.4, 0.4, 0.2))._replace(tau=2 * tau)
    point = stationary_groups.typo_point(game, game.log_data)
    assert point.exp().tolist() == pytest.approx(expected, abs=5.1e-5)
    laws = [game.log_data, game.log_data, game.log_ref]
    field = stationary_groups.row("typo", "", point, game, laws).field
    assert field(point).abs().max() < 1e-8 < field(nudged(point)).abs().max()
    nearly = stationary_groups.typo_point(game._replace(tau=1e-9), game.log_data)
    assert nearly.exp().tolist() == pytest.approx((0.6, 0.3, 0.1), abs=1e-7)
    assert bandit.rlhf_policy(game.rewards, game.log_ref, 0.01).exp().max() > 1 - 1e-12


@pytest.mark.parametrize(
    "tau, dpos",
    [(0.5, (0.885, 0.111, 0.004)), (1.0, (0.783, 0.196, 0.022)), (2.0, (0.703, 0.249, 0.048))],
)
def test_typo_preserves_what_is_right(tau, dpos):
    """Where the reference is the true policy, TYPO's gradient there is 0 for every tau, and DPO's
    point, the RLHF policy of the reward log pi*, is elsewhere."""
    game = typo_game((0.6, 0.3, 0.1), (0.6, 0.3, 0.1))
    laws = [game.log_data, game.log_data, game.log_ref]
    for weight in (1e-3, tau, 50.0):
        now = game._replace(tau=weight)
        assert (
            stationary_groups.row("typo", "", None, now, laws).field(game.log_ref).abs().max()
            < 1e-15
        )
    away = bandit.rlhf_policy(game.rewards, game.log_ref, tau).exp()
    assert away.tolist() == pytest.approx(dpos, abs=5.1e-4)


@pytest.mark.parametrize("seed, tau", [(0, 0.5), (1, 0.5), (2, 0.8)])
def test_every_point(seed, tau):
    """No gradient at the predicted point, one beside it; every method of this file has a row."""
    seen = set()
    for row in stationary_groups.plan(seed, tau):
        assert torch.logsumexp(row.point, 0).abs() < 1e-10, row.name
        assert row.field(row.point).abs().max() < 1e-8, row.name
        assert row.field(nudged(row.point)).abs().max() > 1e-6, row.name
        seen.add(row.name.split()[0])
    assert seen == {*NAMES, *PROCEDURES, "kto", "beta_dpo"}


def test_the_rows_are_printed(capsys):
    stationary_groups.main()
    out = capsys.readouterr().out
    assert "nan" not in out and out.count("RLHF") >= 3


def test_kto_at_equal_lambdas_has_no_point():
    """The slopes on log pi(y) have the sign of 1/2 - p(y > mu) whatever pi is; they are not all of
    one sign, so no policy balances them."""
    for seed in range(3):
        game = bradley_terry_game(seed)
        field, wins = (
            stationary_groups.kto_field(game),
            bandit.win_rate(game.preferences, game.log_data),
        )
        worst = wins.argmin()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            log_pi = torch.randn(4, generator=generator, dtype=DOUBLE).log_softmax(0)
            ratio = (log_pi - game.log_ref).requires_grad_()
            z0 = stationary_groups.kto_level(game, log_pi)
            first, second = stationary_groups.groups(4, 2).T
            zero = torch.zeros((), dtype=DOUBLE)
            value = kto.loss(
                *(ratio[first], ratio[second], zero, zero),
                *(game.preferences[first, second], game.tau),
                z0=z0,
            )
            weight = (game.log_data[first] + game.log_data[second]).exp()
            slope = slopes(weight * value, ratio)[0]
            assert ((slope > 0) == (wins < 0.5)).all() and slope[worst] > 0
            assert field(log_pi).abs().max() > 1e-5


def test_another_function_of_the_methods_own_name_is_taken():
    """train.py asks a file for label_pairs and pair_losses by name."""
    method = types.SimpleNamespace(pair_losses=1)
    assert train.own(method, train.pair_losses) == 1
    assert train.own(method, sampler.draw_pairs) is sampler.draw_pairs
