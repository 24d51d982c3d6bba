"""The graded tests: exercises 1 to 8, ten points each.

`pytest --impl DIR -m ex2` grades one exercise of a folder.
Oracles are closed forms, fixed points, limits and enumerations in float64, written out here or
taken from parts that are not graded in the exercise. check() compares against values that are far
above its tolerance, so an answer of zeros fails. A failure names the equation, and the mistake of
mistakes.py that gives the observed value, if one does.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import bandit
import dpo
import ipo
import ipo_md
import nash_md
from exercises.grader import adapters
from exercises.grader.mistakes import MISTAKES, planted


def number(*values):
    return torch.tensor(values, dtype=torch.float64)


def law(*values):
    return number(*values).log()


# A game of four actions with cycles, its reference, and a policy that solves nothing.
GAME = number(
    [0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.8, 0.35], [0.8, 0.2, 0.5, 0.75], [0.4, 0.65, 0.25, 0.5]
).view(4, 4)
REF = law(0.4, 0.3, 0.2, 0.1)
PI = law(0.15, 0.25, 0.1, 0.5)
CYCLE = number([0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]).view(3, 3)
BIASED = law(0.6, 0.3, 0.1)
UNIFORM = number(1.0, 1.0, 1.0).log_softmax(0)
TWO = number([0.5, 0.7], [0.3, 0.5]).view(2, 2)
TWO_REF = law(0.3, 0.7)


def close(observed, expected):
    """Relative 1e-6, and absolute 1e-6 of the smallest expected magnitude that is not zero."""
    if observed.shape != expected.shape:
        return False
    if not (expected != 0).any():  # an observed value of zeros, compared with a mistake's
        return not (observed != 0).any()
    smallest = expected.abs()[expected != 0].min()
    allowed = 1e-6 * expected.abs() + 1e-6 * smallest
    return bool(((observed - expected).abs() <= allowed).all())


def numbers(value):
    return torch.as_tensor(value).detach().double()


def show(value):
    entries = [float(f"{entry:.6g}") for entry in value.flatten()[:8].tolist()]
    return f"{entries} ..." if value.numel() > 8 else str(entries)


def factor(observed, expected):
    """In words, if observed is a multiple of expected."""
    if observed.shape != expected.shape:
        return f"the shape is {list(observed.shape)}, expected {list(expected.shape)}"
    ratio = (observed / expected)[expected != 0]
    if len(ratio) > 1 and (ratio - ratio[0]).abs().max() < 1e-6 * ratio[0].abs().clamp(min=1):
        return f"exactly {ratio[0]:.6g} times the expected value"
    return "no mistake on our list gives this value"


def refuse(*_, **__):
    raise LookupError


def depends(observe, targets):
    """Whether observe() uses any of targets, tried by making each refuse."""
    for target in targets:
        try:
            with planted(SimpleNamespace(parts={target: refuse})):
                observe()
        except Exception:
            return True
    return False


def targets_of(exercise):
    """What an exercise grades, as 'ipo.loss' and the like."""
    found = set()
    for module, graded in adapters.EXERCISES[exercise].items():
        found.update(f"{module}.{name}" for name in graded)
    return found


def explain(exercise, observe, observed):
    """The hint of a listed mistake of the exercise that gives the observed value, or None.

    A mistake explains the value if it alone decides it. One that also needs another of the
    student's functions may leave the value as it was because that other function is wrong: then it
    is only a guess.
    """
    guess = None
    for one in MISTAKES:
        if one.exercise != exercise:
            continue
        others = targets_of(exercise) - set(one.parts)
        try:
            with planted(one):
                same = close(numbers(observe()), observed)
                alone = same and not depends(observe, others)
            if same and depends(observe, one.parts):  # else the mistake would match for nothing
                if alone:
                    return one.hint
                guess = guess or f"perhaps {one.hint}"
        except Exception:  # a mistake may not run at all in this test
            continue
    return guess


def check(exercise, equation, observe, expected, *arguments):
    """Asserts that observe(*arguments) gives expected.

    expected must not be all zeros, or an empty answer would pass. observe must look a graded
    function up when it is called, as in ipo.loss(...): mistakes are planted and it is called again.
    """
    observe = functools.partial(observe, *arguments)
    expected = numbers(expected)
    assert (expected != 0).any(), "the grader itself: nothing to compare with"
    observed = numbers(observe())
    if not close(observed, expected):
        hint = explain(exercise, observe, observed) or factor(observed, expected)
        raise AssertionError(
            f"{equation}: {hint}\n  observed {show(observed)}\n  expected {show(expected)}"
        )


def require(holds, message):
    """An assertion with a sentence for the student; pytest's rewriting would add our variables."""
    if not holds:
        raise AssertionError(message)


def wins_against(preferences, log_pi):
    """p(y > pi) by a plain loop."""
    wins = []
    for row in preferences:
        wins.append(sum(p * q for p, q in zip(row, log_pi.exp(), strict=True)))
    return torch.stack(wins)


def answer_to(log_opponent, preferences, log_ref, tau):
    """pi_ref exp(p(. > opponent)/tau)/Z as probabilities, written out."""
    weights = log_ref.exp() * (wins_against(preferences, log_opponent) / tau).exp()
    return weights / weights.sum()


# Exercise 1: preference matrix, win rate, antisymmetry


@pytest.mark.ex1(points=3)
def test_cycle():
    """Each action beats the next, and preferences + preferences^T = 1."""
    check(1, "p(i > j) of rock-paper-scissors", lambda: bandit.cycle(0.4), CYCLE)
    milder = 0.5 + (CYCLE - 0.5) / 4
    check(1, "p(i > j) of rock-paper-scissors, margin 0.1", lambda: bandit.cycle(0.1), milder)


@pytest.mark.ex1(points=3)
def test_bradley_terry():
    """exp(r_i)/(exp(r_i) + exp(r_j)), and the logit of p is the reward gap."""
    rewards = number(0.3, -1.2, 2.0, 0.9)
    powers = rewards.exp()
    wanted = powers[:, None] / (powers[:, None] + powers)
    check(1, "Bradley-Terry", lambda: bandit.bradley_terry(rewards), wanted)


@pytest.mark.ex1(points=2)
def test_win_rate():
    """p(y > opponent), the expectation over the opponent's actions; one and several opponents."""
    wanted = wins_against(GAME, PI)
    check(1, "p(y > pi) = E_{y' ~ pi} p(y > y')", lambda: bandit.win_rate(GAME, PI), wanted)
    both = torch.stack([PI, REF])
    wanted = torch.stack([wins_against(GAME, PI), wins_against(GAME, REF)])
    equation = "p(y > pi) for two opponents at once, [2, n]"
    check(1, equation, lambda: bandit.win_rate(GAME, both), wanted)


@pytest.mark.ex1(points=2)
def test_antisymmetry():
    """Nobody beats himself: E_{y ~ pi} p(y > pi) = 1/2; and p(pi > rho) + p(rho > pi) = 1."""
    games = bandit.cycle(0.3), bandit.bradley_terry(number(0.5, 0.0, -2.0))
    pi, rho = law(0.2, 0.7, 0.1), law(0.5, 0.1, 0.4)

    def against(preferences, one, other):
        return (one.exp() * bandit.win_rate(preferences, other)).sum()

    def there_and_back(preferences):
        return against(preferences, pi, rho) + against(preferences, rho, pi)

    for preferences in games:
        check(1, "p(pi > pi) = 1/2", against, 0.5, preferences, pi, pi)
        check(1, "p(pi > rho) + p(rho > pi) = 1", there_and_back, 1.0, preferences)
        require(((preferences - 0.5).abs() > 1e-3).any(), "all preferences are 1/2")


# Exercise 2: the IPO loss with soft labels, and the pair identity

FOUR = (
    number(-3.0, -1.5, -0.2),
    number(-2.0, -2.5, -4.0),
    number(-2.5, -1.0, -1.0),
    number(-2.2, -3.5, -3.0),
)
GAPS = number(-0.7, -1.5, 1.8)  # by hand: (-3 + 2.5) - (-2 + 2.2), ...
LABELS = number(0.7, 0.2, 1.0)


@pytest.mark.ex2(points=2)
def test_gap():
    """h of three pairs, by hand."""
    equation = "h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y')"
    check(2, equation, lambda: ipo.log_ratio_gap(*FOUR), GAPS)
    leaf = number(-3.0).requires_grad_()

    def slope():
        h = ipo.log_ratio_gap(leaf, FOUR[1][0], FOUR[2][0], FOUR[3][0])
        return torch.autograd.grad(h.sum(), leaf)[0]

    check(2, "the slope of h in log pi(y) is 1", slope, number(1.0))


@pytest.mark.ex2(points=2)
def test_ipo_loss():
    """tau = 0.1, target 5: 0.7 * 5.7^2 + 0.3 * 4.3^2 = 28.29, and so on; [B], not reduced."""
    wanted = number(28.29, 0.2 * 6.5**2 + 0.8 * 3.5**2, 3.2**2)
    check(2, "eq 11 with soft labels, tau = 0.1", lambda: ipo.loss(*FOUR, LABELS, 0.1), wanted)


@pytest.mark.ex2(points=2)
def test_soft_label_identity():
    """The same parabola as a square: (h - (2p - 1)/(2 tau))^2 + p (1 - p)/tau^2, several tau."""

    def value(tau):
        return ipo.loss(*FOUR, LABELS, tau)

    for tau in (0.02, 0.5, 3.0):
        wanted = (GAPS - (2 * LABELS - 1) / (2 * tau)) ** 2 + LABELS * (1 - LABELS) / tau**2
        equation = f"soft labels: (h - (2p-1)/(2 tau))^2 + p (1-p)/tau^2, tau = {tau}"
        check(2, equation, value, wanted, tau)


@pytest.mark.ex2(points=1)
def test_at_the_start():
    """pi = pi_ref: 1/(4 tau^2) for every label, and the slope in h is -(2p - 1)/tau."""
    zero = number(-2.0, -2.0, -2.0)
    leaf = zero.clone().requires_grad_()

    def value():
        return ipo.loss(zero, zero, zero, zero, LABELS, 0.1)

    def slope():
        losses = ipo.loss(leaf, zero, zero, zero, LABELS, 0.1)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    check(2, "the loss at h = 0 is 1/(4 tau^2)", value, number(25.0, 25.0, 25.0))
    check(2, "the slope at h = 0 is -(2p - 1)/tau", slope, -(2 * LABELS - 1) / 0.1)


@pytest.mark.ex2(points=3)
def test_pair_identity():
    """On a softmax policy, the paper in one line:

    grad loss = -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y')).
    """
    equation = "the pair identity, -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y'))"
    logits = number(0.5, 0.0, -0.5, 1.0).requires_grad_()

    def slope(y, other, p, tau):
        log_pi = torch.log_softmax(logits, 0)
        value = ipo.loss(log_pi[y], log_pi[other], REF[y], REF[other], number(p)[0], tau)
        return torch.autograd.grad(value.sum(), logits)[0]

    log_pi = torch.log_softmax(logits, 0).detach()
    unit = torch.eye(4).double()
    for y, other, p, tau in ((0, 2, 0.7, 0.1), (3, 1, 0.25, 0.4), (1, 0, 1.0, 2.0)):
        h = log_pi[y] - REF[y] - log_pi[other] + REF[other]
        difference = unit[y] - unit[other]  # the scores' pi cancels
        wanted = -(2 / tau) * (p - 0.5 - tau * h) * difference
        check(2, equation, slope, wanted, y, other, p, tau)


# Exercise 3: duality gap and regularised Nash equilibrium


@pytest.mark.ex3(points=1)
def test_kl():
    """Two laws by hand, one row each."""
    wanted = number(
        0.15 * math.log(0.15 / 0.4)
        + 0.25 * math.log(0.25 / 0.3)
        + 0.1 * math.log(0.5)
        + 0.5 * math.log(5.0)
    )
    equation = "KL(pi, pi_ref) = E_{y ~ pi} log pi(y)/pi_ref(y)"
    check(3, equation, lambda: bandit.kl(PI[None], REF[None]), wanted)


@pytest.mark.ex3(points=2)
def test_respond():
    """pi_ref exp(p(y > opponent)/tau)/Z with every sum written out."""

    def response(tau):
        return bandit.respond(GAME, REF, tau, PI).exp()

    for tau in (0.1, 2.0):
        wanted = answer_to(PI, GAME, REF, tau)
        check(3, f"eq 12's right-hand side, tau = {tau}", response, wanted, tau)


def payoff(one, other, preferences, log_ref, tau):
    """p(one > other) - tau KL(one, pi_ref) + tau KL(other, pi_ref)."""

    def leave(log_pi):
        return (log_pi.exp() * (log_pi - log_ref)).sum()

    wins = (one.exp() * wins_against(preferences, other)).sum()
    return wins - tau * leave(one) + tau * leave(other)


@pytest.mark.ex3(points=3)
def test_duality_gap():
    """2 max_pi' payoff(pi', pi) - 1, found by gradient ascent, not by a formula; 0 at Nash."""

    def gap(pi, ref, tau):
        return bandit.duality_gap(pi, GAME, ref, tau)

    for pi, ref, tau in ((PI, REF, 0.5), (REF, PI, 1.0), (REF, REF, 0.3)):
        best = ref.clone()
        pull = wins_against(GAME, pi) / tau
        # Mirror ascent: converges geometrically, since the payoff is strongly concave.
        for _ in range(400):
            best = torch.log_softmax(best + 0.5 * (pull - (best - ref)), 0)
        wanted = 2 * payoff(best, pi, GAME, ref, tau) - 1
        check(3, "the duality gap, 2 max payoff(pi', pi) - 1", gap, wanted, pi, ref, tau)
    check(
        3,
        "the gap is 0 at rock-paper-scissors' uniform equilibrium (1 was added)",
        lambda: 1 + bandit.duality_gap(UNIFORM, CYCLE, UNIFORM, 0.1),
        1.0,
    )


@pytest.mark.ex3(points=3)
def test_nash_equilibrium():
    """A zero of its own equation on cyclic games; the closed form of two actions; large tau."""

    def solve(preferences, ref, tau):
        return bandit.fixed_point(preferences, ref, tau).exp()

    def difference():
        log_pi = bandit.fixed_point(TWO, TWO_REF, 0.1)
        return log_pi[0] - log_pi[1]

    for preferences, ref, tau in ((CYCLE, BIASED, 0.1), (GAME, REF, 0.1), (GAME, PI, 0.4)):
        log_pi = bandit.fixed_point(preferences, ref, tau)
        require(
            torch.is_tensor(log_pi) and log_pi.shape == ref.shape and log_pi.isfinite().all(),
            "fixed_point must return log pi, [n], finite",
        )
        wanted = answer_to(log_pi, preferences, ref, tau)
        equation = f"eq 12, pi = pi_ref exp(p(. > pi)/tau)/Z, tau = {tau}"
        check(3, equation, solve, wanted, preferences, ref, tau)
    equation = "two actions: log(pi1/pi2) = log(ref1/ref2) + (p - 1/2)/tau"
    check(3, equation, difference, math.log(0.3 / 0.7) + 2.0)
    check(3, "tau = 1e9 gives pi_ref", solve, REF.exp(), GAME, REF, 1e9)


@pytest.mark.ex3(points=1)
def test_equation_13():
    """With beta the opponent is the mixture, written out here.

    Prop 5.2: that mixture is Nash at tau/(1 - beta).
    """

    def solve(beta):
        return bandit.fixed_point(GAME, REF, 0.2, beta).exp()

    for beta in (0.25, 0.6):
        blend = solve(beta) ** (1 - beta) * REF.exp() ** beta
        blend = blend / blend.sum()
        wanted = answer_to(blend.log(), GAME, REF, 0.2)
        check(3, "eq 13, the opponent is pi^(1-beta) pi_ref^beta", solve, wanted, beta)
        hotter = answer_to(blend.log(), GAME, REF, 0.2 / (1 - beta))
        require(
            (blend - hotter).abs().max() < 1e-6,
            "Prop 5.2: the mixture of the fixed point must be Nash at tau/(1 - beta)",
        )


# Exercise 4: geometric mixture and its sampler


@pytest.mark.ex4(points=3)
def test_mixture():
    """beta = 1/2 by hand, sqrt(pi pi_ref) normalised; both ends; several rows at once."""
    pi, ref = law(0.8, 0.1, 0.1), law(0.2, 0.3, 0.5)

    def mixed(beta):
        return ipo_md.mixture(pi, ref, beta).exp()

    roots = number(0.16, 0.03, 0.05).sqrt()
    check(4, "pi^(1/2) pi_ref^(1/2)/Z", mixed, roots / roots.sum(), 0.5)
    check(4, "beta = 0 is the policy", mixed, pi.exp(), 0.0)
    check(4, "beta = 1 is the reference", mixed, ref.exp(), 1.0)
    powers = PI.exp() ** 0.875 * REF.exp() ** 0.125
    wanted = torch.stack([powers / powers.sum(), REF.exp()])
    both = torch.stack([PI, REF])
    check(4, "beta = 0.125, two rows", lambda: ipo_md.mixture(both, REF, 0.125).exp(), wanted)


@pytest.mark.ex4(points=2)
def test_mix_and_draw():
    """One step of the sampler.

    The mixture's logits of rows with different beta, and inversion of the distribution function.
    """
    import sampler

    one = number([1.0, 2.0, -1.0], [0.5, 0.0, 3.0]).view(2, 3)
    other = number([0.0, -1.0, 1.5], [2.0, 1.0, 0.0]).view(2, 3)
    streams = [
        SimpleNamespace(rows=torch.tensor([0, 2]), weight=number(0.75, 0.5)[:, None], logits=one),
        SimpleNamespace(rows=torch.tensor([0, 1]), weight=number(0.25, 1.0)[:, None], logits=other),
    ]
    wanted = torch.stack([0.75 * one[0] + 0.25 * other[0], other[1], 0.5 * one[1]]).softmax(-1)
    check(
        4,
        "sec 5.1: (1-beta) log pi + beta log pi_ref, row by row",
        lambda: sampler.mix(streams, 3).softmax(-1),
        wanted,
    )
    probabilities = number(0.1, 0.0, 0.55, 0.35)
    grid = (torch.arange(1000).double() + 0.5) / 1000

    def counts():
        logits = probabilities.log().expand(1000, 4) + 7.0
        return torch.bincount(sampler.draw(logits, grid), minlength=4)

    equation = "a uniform u draws the token whose interval of the distribution function holds u"
    check(4, equation, counts, 1000 * probabilities)


def sharp_models():
    """Two tiny GPT-2 that disagree, policy and reference.

    Returns (enumerated, policy, the two models): the first two are the modules.
    """
    import enumerated
    import policy as policies

    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    models = []
    for index, seed in enumerate((3, 4)):
        model = policies.build("enumerable", tokenizer, 8, seed).double().requires_grad_(False)
        generator = torch.Generator().manual_seed(index)
        # Whatever the initialisation, far from uniform and from each other.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.15 * noise)
        models.append(model)
    return enumerated, policies, *models


def chi_square(counts, log_law):
    """Pearson's statistic of 4,000 draws."""
    expected = 4000 * log_law.exp()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.ex4(points=3)
def test_sampler_draws_the_mixture():
    """4,000 responses to two prompts, one padded: Pearson's chi-square over the 85 responses.

    84 degrees of freedom: a right sampler exceeds 165 less than once in 10^6 runs, whatever its
    random numbers.
    """
    import sampler

    enumerated, policies, policy, reference = sharp_models()
    prompts = [prompt for prompt in enumerated.PROMPTS for _ in enumerated.RESPONSES]
    responses = policies.pad(enumerated.RESPONSES * 2, "right", 0)
    w = SimpleNamespace(batch=(policies.pad(prompts, "left", 0), responses))
    with torch.no_grad():
        log_pi, log_ref = (enumerated.log_policy(model, w) for model in (policy, reference))
    possible = {tuple(response): index for index, response in enumerate(enumerated.RESPONSES)}
    prompt = policies.pad(enumerated.PROMPTS * 4000, "left", 0)
    for beta in (0.0, 0.25):
        generator = torch.Generator().manual_seed(0)
        ids, mask, _ = sampler.sample(policy, reference, prompt, beta, generator, max_tokens=3)
        drawn = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
        strange = next((row for row in drawn if row not in possible), None)
        require(
            strange is None,
            f"{strange} is no response: the mask holds through the first end-of-text token (0) "
            "and no further",
        )
        index = torch.tensor([possible[row] for row in drawn])
        right = enumerated.per_token_mixture(log_pi, log_ref, beta)
        inverted = enumerated.per_token_mixture(log_pi, log_ref, 1 - beta)
        for row in range(2):
            counts = index[row::2].bincount(minlength=85)
            square = chi_square(counts, right[row])
            why = "the frequencies fit neither beta nor 1 - beta"
            if chi_square(counts, inverted[row]) < 165:
                why = "it fits 1 - beta: beta is the weight of the reference"
            require(
                square < 165,
                f"sec 5.1, beta = {beta}: {why} (chi-square {square:.0f} on 84 degrees of freedom)",
            )


@pytest.mark.ex4(points=2)
def test_sampled_rows():
    """(0, beta): first responses, then second ones.

    The mask ends with end-of-text, or the response was cut and is unfinished.
    """
    import sampler

    enumerated, policies, policy, reference = sharp_models()
    prompt = policies.pad(enumerated.PROMPTS * 200, "left", 0)

    def sampled(other):
        generator = torch.Generator().manual_seed(1)
        return sampler.sample(policy, other, prompt, (0.0, 0.5), generator, max_tokens=3)

    ids, mask, finished = sampled(reference)
    require(
        ids.shape == mask.shape == (800, 3) and finished.shape == (800,),
        f"ids {list(ids.shape)}, mask {list(mask.shape)}: expected [800, 3]",
    )
    ends = (ids == 0) & mask
    require(
        (ends.sum(1) == finished.long()).all(),
        "finished must say whether the response holds its end-of-text token (0) within the mask",
    )
    last = mask.sum(1) - 1
    require(
        (ids[torch.arange(800), last][finished] == 0).all(),
        "the end-of-text token must be the last one inside the mask",
    )
    require(
        (mask.sum(1)[~finished] == 3).all() and 50 < finished.sum() < 780,
        "an unfinished response has max_tokens tokens",
    )
    again, _, _ = sampled(policy)
    require(
        (ids[:400] == again[:400]).all(),
        "the first 400 rows (beta = 0) must not depend on the reference",
    )
    require(
        (ids[400:] != again[400:]).any(),
        "the last 400 rows (beta = 0.5) must depend on the reference",
    )


# Exercise 5: Nash-MD-PG, sequence-level KL


def slow_log_prob(model, prompt, response):
    """log pi(y | x) token by token, each row alone and unpadded: [tokens]."""
    ids = list(prompt)
    found = []
    for token in response:
        mask = torch.ones(1, len(ids))
        logits = model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0, -1]
        found.append(torch.log_softmax(logits, 0)[token])
        ids.append(token)
    return torch.stack(found)


def scored_batch(policies):
    """Prompts of three lengths, with a finished response, one cut at the limit, a lone end-of-text.

    What follows a mask is junk. Returns both as lists, and both as Tokens.
    """
    prompts = [[1, 2, 3], [2], [4, 4]]
    responses = [[1, 0], [3, 1, 2], [0]]
    ids, mask = policies.pad(responses, "right", 0)
    response = policies.Tokens(ids.masked_fill(~mask, 2), mask)
    return prompts, responses, policies.pad(prompts, "left", 0), response


@pytest.mark.ex5(points=3)
def test_log_prob():
    """Padded on the left and right, pad equal to end-of-text: each row as if it stood alone.

    Token by token, and summed.
    """
    _, policies, model, _ = sharp_models()
    prompts, responses, prompt, response = scored_batch(policies)
    tokens = torch.zeros(3, 3, dtype=torch.float64)
    for row, (x, y) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(y)] = slow_log_prob(model, x, y)
    check(
        5,
        "log pi(y | x) = sum of log pi(y_n | x, y_<n)",
        lambda: policies.log_prob(model, prompt, response),
        tokens.sum(1),
    )
    check(
        5,
        "log pi(y_n | x, y_<n), 0 beyond the mask",
        lambda: policies.token_log_probs(model, prompt, response),
        tokens,
    )


@pytest.mark.ex5(points=1)
def test_responses_are_all_there_is():
    """The probabilities of all 85 responses sum to 1 for both prompts."""
    enumerated, policies, model, _ = sharp_models()
    prompts = [x for x in enumerated.PROMPTS for _ in enumerated.RESPONSES]
    prompt = policies.pad(prompts, "left", 0)
    response = policies.pad(enumerated.RESPONSES * 2, "right", 0)

    def total():
        return policies.log_prob(model, prompt, response).view(2, -1).exp().sum(1)

    check(5, "sum over every y of pi(y | x) = 1", total, number(1.0, 1.0))


@pytest.mark.ex5(points=3)
def test_nash_md_gradient_of_one_sample():
    """-(p - 1/2 - tau log pi/pi_ref) in log pi(y), and nothing for a draw at pi = pi_ref."""
    logp = number(-1.0, -2.0, -0.5, -3.0)
    ref = number(-1.5, -1.0, -0.5, -2.0)
    p = number(0.9, 0.2, 0.8, 0.5)

    def slope(tau):
        leaf = logp.clone().requires_grad_()
        losses = nash_md.loss(leaf, None, ref, None, p, tau)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    equation = "NLHF sec 7: grad log pi(y) (p - 1/2 - tau log pi(y)/pi_ref(y)), descended"
    for tau in (0.1, 0.6):
        check(5, equation, slope, -(p - 0.5 - tau * (logp - ref)), tau)


def score_without_padding(model, prompt, response):
    """log pi(y | x), [B], with no graded function: one prompt, so nothing is padded on the left."""
    ids = torch.cat([prompt.ids, response.ids], 1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    every = torch.log_softmax(logits[:, prompt.ids.shape[1] - 1 : -1], -1)
    return (every.gather(2, response.ids[..., None])[..., 0] * response.mask).sum(1)


@pytest.mark.ex5(points=3)
def test_nash_md_gradient_in_expectation():
    """In the model's parameters, over all 85 responses, against the objective's gradient:

    minus that of p(pi > SG[mixture]) - tau KL(pi, pi_ref). The objective is differentiated as it
    stands, with log-probabilities scored here and not by policy.py.
    """
    enumerated, policies, model, reference = sharp_models()
    model = copy.deepcopy(model).requires_grad_(True)
    weights = model.transformer.wte.weight
    beta, tau = 0.4, 0.2
    preferences = bandit.random_game(85, torch.Generator().manual_seed(0))[0]
    prompt = policies.pad([[1, 2]] * 85, "left", 0)
    response = policies.pad(enumerated.RESPONSES, "right", 0)

    log_pi = score_without_padding(model, prompt, response)
    log_ref = score_without_padding(reference, prompt, response)
    blend = ((1 - beta) * log_pi + beta * log_ref).log_softmax(0)
    # SG: no gradient flows through what is drawn.
    laws = dict(policy=log_pi.detach(), mixture=blend.detach())
    wins = (preferences @ laws["mixture"].exp()[:, None])[:, 0]
    objective = (log_pi.exp() * (wins - tau * (log_pi - log_ref))).sum()
    wanted = torch.autograd.grad(-objective, weights)[0]

    def slope():
        drawn, opponent = (laws[who] for who in nash_md.PAIR)
        logp = policies.log_prob(model, prompt, response)
        ref_logp = policies.log_prob(reference, prompt, response).detach()
        label = (preferences @ opponent.exp()[:, None])[:, 0]
        values = nash_md.loss(logp, None, ref_logp, None, label, tau)
        expected = (drawn.exp() * values.reshape(85, -1).sum(1)).sum()
        return torch.autograd.grad(expected, weights)[0]

    equation = "the expected gradient, against autograd of p(pi > SG[mixture]) - tau KL(pi, pi_ref)"
    check(5, equation, slope, wanted)


# Exercise 6: IPO-MD


def ipo_md_gradient(log_pi, tau, beta, preferences=GAME, log_ref=REF):
    """-(4/tau) E_{y,y' ~ m} grad log pi(y) f(y, y'), m the mixture: every sum written out."""
    blend = log_pi.exp() ** (1 - beta) * log_ref.exp() ** beta
    blend = blend / blend.sum()
    ratio = log_pi - log_ref
    unit = torch.eye(len(log_pi)).double()
    total = torch.zeros_like(log_pi)
    for y, other in itertools.product(range(len(log_pi)), repeat=2):
        f = preferences[y, other] - 0.5 - tau * (ratio[y] - ratio[other])
        total += blend[y] * blend[other] * f * (unit[y] - log_pi.exp())
    return -(4 / tau) * total


def ipo_value(log_law, target):
    """E_{y,y' ~ law} p (h - target)^2 + (1 - p) (h + target)^2 of PI in GAME, a double sum."""
    total = 0
    for y, other in itertools.product(range(4), repeat=2):
        h = PI[y] - REF[y] - PI[other] + REF[other]
        p = GAME[y, other]
        value = p * (h - target) ** 2 + (1 - p) * (h + target) ** 2
        total += log_law[y].exp() * log_law[other].exp() * value
    return total


@pytest.mark.ex6(points=3)
def test_ipo_md_gradient():
    """The pair form of Prop 5.1, on the logits, for several beta."""

    def slope(tau, beta):
        return bandit.gradient(ipo_md, PI, REF, GAME, tau, beta)

    for tau, beta in ((0.2, 0.125), (0.2, 0.6), (1.0, 0.3)):
        equation = f"-(4/tau) E_(y,y'~mixture) grad log pi(y) f(y, y'), beta = {beta}"
        check(6, equation, slope, ipo_md_gradient(PI, tau, beta), tau, beta)


@pytest.mark.ex6(points=2)
def test_ipo_md_limits():
    """beta = 0: online IPO. beta = 1: offline IPO on the reference's data, its value by hand."""

    def slope():
        return bandit.gradient(ipo_md, PI, REF, GAME, 0.3, 0.0)

    def value():
        return bandit.expected_loss(ipo_md, PI, REF, GAME, 0.2, 1.0)

    check(6, "beta = 0 is online IPO", slope, ipo_md_gradient(PI, 0.3, 0.0))
    equation = "beta = 1 is offline IPO with data from pi_ref (eq 10)"
    check(6, equation, value, ipo_value(REF, target=2.5))


@pytest.mark.ex6(points=3)
def test_ipo_md_stops_at_equation_13():
    """Descent ends at the solved point of eq 13 on a cyclic game, and moves the policy."""

    def end(beta):
        log_pi = REF
        for _ in range(200):
            blend = ((1 - beta) * log_pi + beta * REF).log_softmax(-1).exp()
            step = 0.3 / 4 * bandit.gradient(ipo_md, log_pi, REF, GAME, 0.3, beta) / blend
            log_pi = torch.log_softmax(log_pi - (0.3 / 0.34 * step).clamp(-1, 1), -1)
        return log_pi.exp()

    for beta in (0.125, 0.5):
        wanted = bandit.fixed_point(GAME, REF, 0.3, beta).exp()
        check(6, f"eq 13: where IPO-MD stops, beta = {beta}", end, wanted, beta)


@pytest.mark.ex6(points=2)
def test_expected_loss_serves_every_method():
    """PAIR decides: Nash-MD-PG's gradient; a law in the mixture's place; two policies at once."""
    beta, tau = 0.5, 0.4
    blend = (PI.exp() * REF.exp()).sqrt()
    advantage = wins_against(GAME, (blend / blend.sum()).log()) - 0.5 - tau * (PI - REF)
    wanted = -(PI.exp() * (advantage - (PI.exp() * advantage).sum()))
    check(
        6,
        "Nash-MD-PG: y from the policy, y' from the mixture",
        lambda: bandit.gradient(nash_md, PI, REF, GAME, tau, beta),
        wanted,
    )
    data = law(0.1, 0.2, 0.3, 0.4)
    check(
        6,
        "mixture: the law that is passed",
        lambda: bandit.expected_loss(ipo_md, PI, REF, GAME, tau, beta, lambda *_: data),
        ipo_value(data, target=1.25),
    )
    both = torch.stack([PI, REF])
    wanted = torch.stack([ipo_md_gradient(PI, tau, beta), ipo_md_gradient(REF, tau, beta)])
    check(
        6,
        "two policies at once, [2, n]",
        lambda: bandit.gradient(ipo_md, both, REF, GAME, tau, beta),
        wanted,
    )


# Exercise 7: online DPO is not a Nash solver


@pytest.mark.ex7(points=3)
def test_dpo_loss():
    """-p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h) at exercise 2's pairs, and its slope."""

    def value(tau):
        return dpo.loss(*FOUR, LABELS, tau)

    def slope(tau):
        leaf = FOUR[0].clone().requires_grad_()
        losses = dpo.loss(leaf, *FOUR[1:], LABELS, tau)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    for tau in (0.1, 2.0):
        wanted = []
        for h, p in zip(GAPS.tolist(), LABELS.tolist(), strict=True):
            wins, loses = math.log1p(math.exp(-tau * h)), math.log1p(math.exp(tau * h))
            wanted.append(p * wins + (1 - p) * loses)
        check(7, "DPO with soft labels", value, number(*wanted), tau)
        wanted = -tau * (LABELS - torch.sigmoid(tau * GAPS))
        check(7, "the slope -tau (p - sigmoid(tau h))", slope, wanted, tau)


@pytest.mark.ex7(points=1)
def test_dpo_is_finite():
    """h of thousands of nats: the loss is linear there."""
    far, zero = number(3000.0, -3000.0), number(0.0, 0.0)
    check(
        7,
        "the loss at h = +-3000, tau = 1, p = 0.7",
        lambda: dpo.loss(far, zero, zero, zero, number(0.7, 0.7), 1.0),
        number(900.0, 2100.0),
    )


def f5(nash, preferences):
    """p(y > pi*) - sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*)): 0 where F.5 holds."""
    wins = wins_against(preferences, nash)
    return wins - torch.sigmoid(wins[:, None] - wins) @ nash.exp()


@pytest.mark.ex7(points=2)
def test_dpo_does_not_stop_at_nash():
    """Appendix F: the gradient at the Nash equilibrium is not zero. It is

    -2 tau pi*(y) (p(y > pi*) - sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*))).
    """

    def slope(nash, preferences, ref, tau):
        return bandit.gradient(dpo, nash, ref, preferences, tau)

    equation = "F.5: online DPO's gradient at the Nash equilibrium is not zero"
    for preferences, ref, tau in ((GAME, REF, 0.2), (TWO, TWO_REF, 0.1)):
        nash = bandit.fixed_point(preferences, ref, tau)
        wanted = -2 * tau * nash.exp() * f5(nash, preferences)
        check(7, equation, slope, wanted, nash, preferences, ref, tau)


@pytest.mark.ex7(points=2)
def test_where_dpo_stops():
    """A root of online DPO's own equation; pi_ref exp(r/tau)/Z under Bradley-Terry (F.7)."""
    rewards = number(0.0, 0.4, -0.3, 0.2)
    bradley_terry = torch.sigmoid(rewards[:, None] - rewards)
    powers = (REF + rewards / 0.3).exp()
    check(
        7,
        "F.7: the RLHF policy",
        lambda: bandit.dpo_point(bradley_terry, REF, 0.3).exp(),
        powers / powers.sum(),
    )
    mild = 0.5 + (GAME - 0.5) / 2
    log_pi = bandit.dpo_point(mild, REF, 0.2)
    require(
        torch.is_tensor(log_pi) and log_pi.shape == (4,) and abs(log_pi.exp().sum() - 1) < 1e-9,
        "dpo_point must return log pi, [n], normalised",
    )
    returns = 0.2 * (log_pi - REF)

    def own_wins():
        return torch.sigmoid(returns[:, None] - returns) @ log_pi.exp()

    equation = "sum_y' pi(y') sigmoid(tau h(y, y')) = p(y > pi)"
    check(7, equation, own_wins, wins_against(mild, log_pi))


@pytest.mark.ex7(points=2)
def test_predictions():
    """predictions.json: is the Nash equilibrium stationary for online DPO?

    Judged by F.5's condition, here and now.
    """
    given = adapters.answers(7)
    rewards = number(0.0, 0.5, 1.5)
    even = number([0.5, 0.5], [0.5, 0.5]).view(2, 2)
    games = {
        "two_actions_0.7": (TWO, TWO_REF),
        "two_actions_0.5": (even, TWO_REF),
        "rock_paper_scissors_uniform": (CYCLE, UNIFORM),
        "rock_paper_scissors_biased": (CYCLE, BIASED),
        "bradley_terry_three": (torch.sigmoid(rewards[:, None] - rewards), UNIFORM),
    }
    for name, (preferences, ref) in games.items():
        nash = bandit.fixed_point(preferences, ref, 0.1)
        stationary = bool((f5(nash, preferences) * nash.exp()).abs().max() < 1e-9)
        require(
            isinstance(given.get(name), bool), f"predictions.json: {name} must be true or false"
        )
        # Which one is wrong stays unsaid, or two attempts would give the answer.
        require(
            given[name] is stationary,
            "F.5 to F.8: at least one prediction is wrong; put each game into F.5's condition",
        )


# Exercise 8: no code

NAMES = [
    "winner and loser swapped",
    "target is 1/tau",
    "mean over tokens instead of sum",
    "reference is the policy itself",
    "sampling weights differentiated",
    "pairs from the reference",
    "no reference in h",
    "end-of-text not scored",
    "labels of the other prompt",
    "preference is always 1/2",
]


def diagnose(run):
    """Compares one answer with its salted hash in exercises/symptoms/key.json."""
    given = adapters.answers(8)
    name = given.get(run)
    require(name in NAMES, f"diagnosis.json: run {run} needs a name of the list, word by word")
    require(
        list(given.values()).count(name) == 1,
        "six runs, six different bugs: a name given twice counts for neither",
    )
    key = json.loads((adapters.ROOT / "exercises" / "symptoms" / "key.json").read_text())
    require(
        hashlib.sha256(f"{key['salt']}/{run}/{name}".encode()).hexdigest() == key[run],
        f"run {run} is another bug: compare step 0, the end and the shape of each column with "
        "run_healthy.csv",
    )


@pytest.mark.ex8(points=2)
def test_run_a():
    diagnose("a")


@pytest.mark.ex8(points=2)
def test_run_b():
    diagnose("b")


@pytest.mark.ex8(points=2)
def test_run_c():
    diagnose("c")


@pytest.mark.ex8(points=2)
def test_run_d():
    diagnose("d")


@pytest.mark.ex8(points=1)
def test_run_e():
    diagnose("e")


@pytest.mark.ex8(points=1)
def test_run_f():
    diagnose("f")
