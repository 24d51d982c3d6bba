"""The graded tests: exercises 1 to 8, ten points each. `pytest --impl DIR -m ex2` grades one exercise of a folder.

Oracles are closed forms, fixed points, limits and enumerations in float64, written out here or taken from parts that are
not graded in the exercise. check() compares against values that are far above its tolerance, so an answer of zeros fails.
A failure names the equation, and the mistake of mistakes.py that gives the observed value, if one does.
"""

import copy
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
REF, PI = law(0.4, 0.3, 0.2, 0.1), law(0.15, 0.25, 0.1, 0.5)
CYCLE = number([0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]).view(3, 3)
BIASED = law(0.6, 0.3, 0.1)


def close(observed, expected):
    """Relative 1e-6, and absolute 1e-6 of the smallest expected magnitude that is not zero."""
    if not (expected != 0).any():  # an observed value of zeros, compared with a mistake's
        return observed.shape == expected.shape and not (observed != 0).any()
    smallest = expected.abs()[expected != 0].min()
    return observed.shape == expected.shape and bool(
        ((observed - expected).abs() <= 1e-6 * expected.abs() + 1e-6 * smallest).all()
    )


def numbers(value):
    return torch.as_tensor(value).detach().double()


def show(value):
    return str([float(f"{entry:.6g}") for entry in value.flatten()[:8].tolist()]) + (
        " ..." if value.numel() > 8 else ""
    )


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


def explain(exercise, observe, observed):
    """The hint of a listed mistake of the exercise that gives the observed value, None if none does.

    A mistake explains the value if it alone decides it. One that also needs another of the student's functions may leave
    the value as it was because that other function is wrong: then it is only a guess.
    """
    guess = None
    for one in MISTAKES:
        if one.exercise != exercise:
            continue
        others = {
            f"{name}.{item}"
            for name, graded in adapters.EXERCISES[exercise].items()
            for item in graded
        } - set(one.parts)
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


def check(exercise, equation, observe, expected):
    """Asserts that observe() gives expected; expected must not be all zeros, or an empty answer would pass."""
    expected = numbers(expected)
    assert (expected != 0).any(), "the grader itself: nothing to compare with"
    observed = numbers(observe())
    if not close(observed, expected):
        hint = explain(exercise, observe, observed) or factor(observed, expected)
        raise AssertionError(
            f"{equation}: {hint}\n  observed {show(observed)}\n  expected {show(expected)}"
        )


def require(holds, message):
    """An assertion with a sentence for the student; pytest's rewriting would add our own variables."""
    if not holds:
        raise AssertionError(message)


def wins_against(preferences, log_pi):
    """p(y > pi) by a plain loop."""
    return torch.stack(
        [sum(p * q for p, q in zip(row, log_pi.exp(), strict=True)) for row in preferences]
    )


# Exercise 1: preference matrix, win rate, antisymmetry


@pytest.mark.ex1(points=3)
def test_cycle():
    """Each action beats the next, and preferences + preferences^T = 1."""
    check(1, "p(i > j) of rock-paper-scissors", lambda: bandit.cycle(0.4), CYCLE)
    check(
        1,
        "p(i > j) of rock-paper-scissors, margin 0.1",
        lambda: bandit.cycle(0.1),
        0.5 + (CYCLE - 0.5) / 4,
    )


@pytest.mark.ex1(points=3)
def test_bradley_terry():
    """exp(r_i)/(exp(r_i) + exp(r_j)), and the logit of p is the reward gap."""
    rewards = number(0.3, -1.2, 2.0, 0.9)
    powers = rewards.exp()
    check(
        1,
        "Bradley-Terry",
        lambda: bandit.bradley_terry(rewards),
        powers[:, None] / (powers[:, None] + powers),
    )


@pytest.mark.ex1(points=2)
def test_win_rate():
    """p(y > opponent), the expectation over the opponent's actions, for one and for several opponents."""
    check(
        1,
        "p(y > pi) = E_{y' ~ pi} p(y > y')",
        lambda: bandit.win_rate(GAME, PI),
        wins_against(GAME, PI),
    )
    both = torch.stack([PI, REF])
    wanted = torch.stack([wins_against(GAME, PI), wins_against(GAME, REF)])
    check(
        1,
        "p(y > pi) for two opponents at once, [2, n]",
        lambda: bandit.win_rate(GAME, both),
        wanted,
    )


@pytest.mark.ex1(points=2)
def test_antisymmetry():
    """Nobody beats himself: E_{y ~ pi} p(y > pi) = 1/2 for every pi; and p(pi > rho) + p(rho > pi) = 1."""
    games = bandit.cycle(0.3), bandit.bradley_terry(number(0.5, 0.0, -2.0))
    pi, rho = law(0.2, 0.7, 0.1), law(0.5, 0.1, 0.4)
    for preferences in games:
        itself = lambda p=preferences: (pi.exp() * bandit.win_rate(p, pi)).sum()
        check(1, "p(pi > pi) = 1/2", itself, 0.5)
        there_and_back = lambda p=preferences: (
            (pi.exp() * bandit.win_rate(p, rho)).sum() + (rho.exp() * bandit.win_rate(p, pi)).sum()
        )
        check(1, "p(pi > rho) + p(rho > pi) = 1", there_and_back, 1.0)
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
    check(
        2,
        "h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y')",
        lambda: ipo.log_ratio_gap(*FOUR),
        GAPS,
    )
    leaf = number(-3.0).requires_grad_()
    slope = lambda: torch.autograd.grad(
        ipo.log_ratio_gap(leaf, FOUR[1][0], FOUR[2][0], FOUR[3][0]).sum(), leaf
    )[0]
    check(2, "the slope of h in log pi(y) is 1", slope, number(1.0))


@pytest.mark.ex2(points=2)
def test_ipo_loss():
    """Values at tau = 0.1, target 5: 0.7 * 5.7^2 + 0.3 * 4.3^2 = 28.29, and so on; [B], not reduced."""
    check(
        2,
        "eq 11 with soft labels, tau = 0.1",
        lambda: ipo.loss(*FOUR, LABELS, 0.1),
        number(28.29, 0.2 * 6.5**2 + 0.8 * 3.5**2, 3.2**2),
    )


@pytest.mark.ex2(points=2)
def test_soft_label_identity():
    """The same parabola completed to a square: (h - (2p - 1)/(2 tau))^2 + p (1 - p)/tau^2, for several tau."""
    for tau in (0.02, 0.5, 3.0):
        wanted = (GAPS - (2 * LABELS - 1) / (2 * tau)) ** 2 + LABELS * (1 - LABELS) / tau**2
        check(
            2,
            f"soft labels: (h - (2p-1)/(2 tau))^2 + p (1-p)/tau^2, tau = {tau}",
            lambda tau=tau: ipo.loss(*FOUR, LABELS, tau),
            wanted,
        )


@pytest.mark.ex2(points=1)
def test_at_the_start():
    """pi = pi_ref: 1/(4 tau^2) for every label, and the slope in h is -(2p - 1)/tau."""
    zero = number(-2.0, -2.0, -2.0)
    check(
        2,
        "the loss at h = 0 is 1/(4 tau^2)",
        lambda: ipo.loss(zero, zero, zero, zero, LABELS, 0.1),
        number(25.0, 25.0, 25.0),
    )
    leaf = zero.clone().requires_grad_()
    slope = lambda: torch.autograd.grad(ipo.loss(leaf, zero, zero, zero, LABELS, 0.1).sum(), leaf)[
        0
    ]
    check(2, "the slope at h = 0 is -(2p - 1)/tau", slope, -(2 * LABELS - 1) / 0.1)


@pytest.mark.ex2(points=3)
def test_pair_identity():
    """grad loss = -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y')) on a softmax policy: the paper in one line."""
    logits = number(0.5, 0.0, -0.5, 1.0).requires_grad_()
    for y, other, p, tau in ((0, 2, 0.7, 0.1), (3, 1, 0.25, 0.4), (1, 0, 1.0, 2.0)):

        def slope(y=y, other=other, p=p, tau=tau):
            log_pi = torch.log_softmax(logits, 0)
            return torch.autograd.grad(
                ipo.loss(log_pi[y], log_pi[other], REF[y], REF[other], number(p)[0], tau).sum(),
                logits,
            )[0]

        log_pi = torch.log_softmax(logits, 0).detach()
        h = log_pi[y] - REF[y] - log_pi[other] + REF[other]
        difference = (
            torch.eye(4).double()[y] - torch.eye(4).double()[other]
        )  # the scores' pi cancels
        check(
            2,
            "the pair identity, -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y'))",
            slope,
            -(2 / tau) * (p - 0.5 - tau * h) * difference,
        )


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
    check(
        3,
        "KL(pi, pi_ref) = E_{y ~ pi} log pi(y)/pi_ref(y)",
        lambda: bandit.kl(PI[None], REF[None]),
        wanted,
    )


@pytest.mark.ex3(points=2)
def test_respond():
    """pi_ref exp(p(y > opponent)/tau)/Z with every sum written out."""
    for tau in (0.1, 2.0):
        weights = REF.exp() * (wins_against(GAME, PI) / tau).exp()
        check(
            3,
            f"eq 12's right-hand side, tau = {tau}",
            lambda tau=tau: bandit.respond(GAME, REF, tau, PI).exp(),
            weights / weights.sum(),
        )


def payoff(one, other, preferences, log_ref, tau):
    """p(one > other) - tau KL(one, pi_ref) + tau KL(other, pi_ref)."""

    def leave(log_pi):
        return (log_pi.exp() * (log_pi - log_ref)).sum()

    return (
        (one.exp() * wins_against(preferences, other)).sum() - tau * leave(one) + tau * leave(other)
    )


@pytest.mark.ex3(points=3)
def test_duality_gap():
    """2 max_pi' payoff(pi', pi) - 1, the maximum found by gradient ascent, not by a formula; 0 at a known equilibrium."""
    for pi, ref, tau in ((PI, REF, 0.5), (REF, PI, 1.0), (REF, REF, 0.3)):
        logits = ref.clone()
        for _ in range(
            400
        ):  # mirror ascent: converges geometrically, since the payoff is strongly concave
            logits = torch.log_softmax(
                logits + 0.5 * (wins_against(GAME, pi) / tau - (logits - ref)), 0
            )
        wanted = 2 * payoff(logits, pi, GAME, ref, tau) - 1
        check(
            3,
            "the duality gap, 2 max payoff(pi', pi) - 1",
            lambda pi=pi, ref=ref, tau=tau: bandit.duality_gap(pi, GAME, ref, tau),
            wanted,
        )
    uniform = number(1.0, 1.0, 1.0).log_softmax(0)
    check(
        3,
        "the gap is 0 at rock-paper-scissors' uniform equilibrium (1 was added)",
        lambda: 1 + bandit.duality_gap(uniform, CYCLE, uniform, 0.1),
        1.0,
    )


@pytest.mark.ex3(points=3)
def test_nash_equilibrium():
    """A zero of its own equation on games with cycles; the closed form of two actions; pi_ref for large tau."""
    for preferences, ref, tau in ((CYCLE, BIASED, 0.1), (GAME, REF, 0.1), (GAME, PI, 0.4)):
        solve = lambda p=preferences, r=ref, tau=tau: bandit.fixed_point(p, r, tau)
        log_pi = solve()
        require(
            torch.is_tensor(log_pi) and log_pi.shape == ref.shape and log_pi.isfinite().all(),
            "fixed_point must return log pi, [n], finite",
        )
        weights = ref.exp() * (wins_against(preferences, log_pi) / tau).exp()
        check(
            3,
            f"eq 12, pi = pi_ref exp(p(. > pi)/tau)/Z, tau = {tau}",
            lambda solve=solve: solve().exp(),
            weights / weights.sum(),
        )
    two, ref = number([0.5, 0.7], [0.3, 0.5]).view(2, 2), law(0.3, 0.7)
    slope = lambda: bandit.fixed_point(two, ref, 0.1)[0] - bandit.fixed_point(two, ref, 0.1)[1]
    check(
        3,
        "two actions: log(pi1/pi2) = log(ref1/ref2) + (p - 1/2)/tau",
        slope,
        math.log(0.3 / 0.7) + 2.0,
    )
    check(3, "tau = 1e9 gives pi_ref", lambda: bandit.fixed_point(GAME, REF, 1e9).exp(), REF.exp())


@pytest.mark.ex3(points=1)
def test_equation_13():
    """With beta the opponent is the mixture, written out here; Prop 5.2: that mixture is Nash at tau/(1 - beta)."""
    for beta in (0.25, 0.6):
        log_pi = bandit.fixed_point(GAME, REF, 0.2, beta)
        blend = log_pi.exp() ** (1 - beta) * REF.exp() ** beta
        blend = blend / blend.sum()
        weights = REF.exp() * (wins_against(GAME, blend.log()) / 0.2).exp()
        check(
            3,
            "eq 13, the opponent is pi^(1-beta) pi_ref^beta",
            lambda beta=beta: bandit.fixed_point(GAME, REF, 0.2, beta).exp(),
            weights / weights.sum(),
        )
        hotter = REF.exp() * (wins_against(GAME, blend.log()) * (1 - beta) / 0.2).exp()
        require(
            (blend - hotter / hotter.sum()).abs().max() < 1e-6,
            "Prop 5.2: the mixture of the fixed point must be Nash at tau/(1 - beta)",
        )


# Exercise 4: geometric mixture and its sampler


@pytest.mark.ex4(points=3)
def test_mixture():
    """beta = 1/2 by hand, sqrt(pi pi_ref) normalised; both ends; several rows at once."""
    pi, ref = law(0.8, 0.1, 0.1), law(0.2, 0.3, 0.5)
    roots = number(0.16, 0.03, 0.05).sqrt()
    check(
        4,
        "pi^(1/2) pi_ref^(1/2)/Z",
        lambda: ipo_md.mixture(pi, ref, 0.5).exp(),
        roots / roots.sum(),
    )
    check(4, "beta = 0 is the policy", lambda: ipo_md.mixture(pi, ref, 0.0).exp(), pi.exp())
    check(4, "beta = 1 is the reference", lambda: ipo_md.mixture(pi, ref, 1.0).exp(), ref.exp())
    powers = PI.exp() ** 0.875 * REF.exp() ** 0.125
    rows = torch.stack([powers / powers.sum(), REF.exp()])
    check(
        4,
        "beta = 0.125, two rows",
        lambda: ipo_md.mixture(torch.stack([PI, REF]), REF, 0.125).exp(),
        rows,
    )


@pytest.mark.ex4(points=2)
def test_mix_and_draw():
    """One step of the sampler: the mixture's logits of rows with different beta, and inversion of the distribution function."""
    import sampler

    one, other = (
        number([1.0, 2.0, -1.0], [0.5, 0.0, 3.0]).view(2, 3),
        number([0.0, -1.0, 1.5], [2.0, 1.0, 0.0]).view(2, 3),
    )
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
    probabilities, grid = number(0.1, 0.0, 0.55, 0.35), (torch.arange(1000).double() + 0.5) / 1000
    counts = lambda: torch.bincount(
        sampler.draw(probabilities.log().expand(1000, 4) + 7.0, grid), minlength=4
    )
    check(
        4,
        "a uniform u draws the token whose interval of the distribution function holds u",
        counts,
        1000 * probabilities,
    )


def sharp_models():
    """Two tiny GPT-2 that disagree, policy and reference, and the enumerated world's tables."""
    import enumerated
    import policy as policies

    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    pair = [
        policies.build("enumerable", tokenizer, 8, seed).double().requires_grad_(False)
        for seed in (3, 4)
    ]
    for index, model in enumerate(pair):
        generator = torch.Generator().manual_seed(index)
        for parameter in (
            model.parameters()
        ):  # whatever the initialisation, far from uniform and from each other
            parameter.add_(
                0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return enumerated, policies, *pair


@pytest.mark.ex4(points=3)
def test_sampler_draws_the_mixture():
    """4,000 responses to each of two prompts, one padded: Pearson's chi-square over the 85 responses.

    84 degrees of freedom: a right sampler exceeds 165 less than once in 10^6 runs, whatever its random numbers.
    """
    import sampler

    enumerated, policies, policy, reference = sharp_models()
    w = SimpleNamespace(
        batch=(
            policies.pad([p for p in enumerated.PROMPTS for _ in enumerated.RESPONSES], "left", 0),
            policies.pad(enumerated.RESPONSES * 2, "right", 0),
        )
    )
    with torch.no_grad():
        log_pi, log_ref = (enumerated.log_policy(model, w) for model in (policy, reference))
    for beta in (0.0, 0.25):
        ids, mask, _ = sampler.sample(
            policy,
            reference,
            policies.pad(enumerated.PROMPTS * 4000, "left", 0),
            beta,
            torch.Generator().manual_seed(0),
            max_tokens=3,
        )
        drawn = [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
        possible = {tuple(response): index for index, response in enumerate(enumerated.RESPONSES)}
        strange = next((row for row in drawn if row not in possible), None)
        require(
            strange is None,
            f"{strange} is no response: the mask holds through the first end-of-text token (0) and no further",
        )
        for row in range(2):
            counts = torch.tensor([possible[one] for one in drawn[row::2]]).bincount(minlength=85)
            expected = 4000 * enumerated.per_token_mixture(log_pi, log_ref, beta)[row].exp()
            square = ((counts - expected) ** 2 / expected).sum().item()
            wrong = 4000 * enumerated.per_token_mixture(log_pi, log_ref, 1 - beta)[row].exp()
            other = ((counts - wrong) ** 2 / wrong).sum().item()
            why = (
                "it fits 1 - beta: beta is the weight of the reference"
                if other < 165
                else "the frequencies fit neither beta nor 1 - beta"
            )
            require(
                square < 165,
                f"sec 5.1, beta = {beta}: {why} (chi-square {square:.0f} on 84 degrees of freedom)",
            )


@pytest.mark.ex4(points=2)
def test_sampled_rows():
    """(0, beta): first responses then second ones; the mask ends with end-of-text, or the response was cut and is unfinished."""
    import sampler

    enumerated, policies, policy, reference = sharp_models()
    prompt = policies.pad(enumerated.PROMPTS * 200, "left", 0)
    ids, mask, finished = sampler.sample(
        policy, reference, prompt, (0.0, 0.5), torch.Generator().manual_seed(1), max_tokens=3
    )
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
    again = sampler.sample(
        policy, policy, prompt, (0.0, 0.5), torch.Generator().manual_seed(1), max_tokens=3
    )[0]
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
    ids, total = list(prompt), []
    for token in response:
        total.append(
            torch.log_softmax(
                model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[
                    0, -1
                ],
                0,
            )[token]
        )
        ids.append(token)
    return torch.stack(total)


def scored_batch(policies):
    """Prompts of three lengths; a finished response, one cut at the limit, a lone end-of-text; what follows a mask is junk."""
    prompts, responses = [[1, 2, 3], [2], [4, 4]], [[1, 0], [3, 1, 2], [0]]
    prompt, (ids, mask) = policies.pad(prompts, "left", 0), policies.pad(responses, "right", 0)
    return prompts, responses, prompt, (ids.masked_fill(~mask, 2), mask)


@pytest.mark.ex5(points=3)
def test_log_prob():
    """Padded on the left and right, pad equal to end-of-text: each row as if it stood alone, token by token and summed."""
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
    batch = policies.pad(prompts, "left", 0), policies.pad(enumerated.RESPONSES * 2, "right", 0)
    total = lambda: policies.log_prob(model, *batch).view(2, -1).exp().sum(1)
    check(5, "sum over every y of pi(y | x) = 1", total, number(1.0, 1.0))


@pytest.mark.ex5(points=3)
def test_nash_md_gradient_of_one_sample():
    """-(p - 1/2 - tau log pi/pi_ref) in log pi(y), and nothing for a draw at pi = pi_ref."""
    logp, ref, p = (
        number(-1.0, -2.0, -0.5, -3.0),
        number(-1.5, -1.0, -0.5, -2.0),
        number(0.9, 0.2, 0.8, 0.5),
    )
    for tau in (0.1, 0.6):

        def slope(tau=tau):
            leaf = logp.clone().requires_grad_()
            return torch.autograd.grad(nash_md.loss(leaf, None, ref, None, p, tau).sum(), leaf)[0]

        check(
            5,
            "NLHF sec 7: grad log pi(y) (p - 1/2 - tau log pi(y)/pi_ref(y)), descended",
            slope,
            -(p - 0.5 - tau * (logp - ref)),
        )


@pytest.mark.ex5(points=3)
def test_nash_md_gradient_in_expectation():
    """In the model's parameters, over all 85 responses: minus the gradient of p(pi > SG[mixture]) - tau KL(pi, pi_ref).

    The objective is differentiated as it stands, with log-probabilities scored here and not by policy.py.
    """
    enumerated, policies, model, reference = sharp_models()
    model, beta, tau, x = copy.deepcopy(model).requires_grad_(True), 0.4, 0.2, [1, 2]
    preferences = bandit.random_game(85, torch.Generator().manual_seed(0))[0]
    batch = policies.pad([x] * 85, "left", 0), policies.pad(enumerated.RESPONSES, "right", 0)
    ids, mask = torch.cat([batch[0][0], batch[1][0]], 1), batch[1][1]

    def score(which):  # one prompt, so nothing is padded on the left
        every = torch.log_softmax(
            which(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 1:-1], -1
        )
        return (every.gather(2, batch[1][0][..., None])[..., 0] * mask).sum(1)

    log_pi, log_ref = score(model), score(reference)
    laws = dict(
        policy=log_pi.detach(),
        mixture=((1 - beta) * log_pi + beta * log_ref).log_softmax(0).detach(),
    )
    wins = (preferences @ laws["mixture"].exp()[:, None])[:, 0]
    wanted = torch.autograd.grad(
        -(log_pi.exp() * (wins - tau * (log_pi - log_ref))).sum(), model.transformer.wte.weight
    )[0]

    def slope():
        drawn, opponent = (laws[who] for who in nash_md.PAIR)
        logp, ref_logp = (
            policies.log_prob(model, *batch),
            policies.log_prob(reference, *batch).detach(),
        )
        values = nash_md.loss(
            logp, None, ref_logp, None, (preferences @ opponent.exp()[:, None])[:, 0], tau
        )
        return torch.autograd.grad(
            (drawn.exp() * values.reshape(85, -1).sum(1)).sum(), model.transformer.wte.weight
        )[0]

    check(
        5,
        "the expected gradient, against autograd of p(pi > SG[mixture]) - tau KL(pi, pi_ref)",
        slope,
        wanted,
    )


# Exercise 6: IPO-MD


def ipo_md_gradient(log_pi, tau, beta, preferences=GAME, log_ref=REF):
    """-(4/tau) E_{y,y' ~ m} grad log pi(y) f(y, y'), m the mixture: every sum written out, no autograd."""
    blend = log_pi.exp() ** (1 - beta) * log_ref.exp() ** beta
    blend, ratio = blend / blend.sum(), log_pi - log_ref
    total = torch.zeros_like(log_pi)
    for y, other in itertools.product(range(len(log_pi)), repeat=2):
        f = preferences[y, other] - 0.5 - tau * (ratio[y] - ratio[other])
        total += blend[y] * blend[other] * f * (torch.eye(len(log_pi)).double()[y] - log_pi.exp())
    return -(4 / tau) * total


@pytest.mark.ex6(points=3)
def test_ipo_md_gradient():
    """The pair form of Prop 5.1, on the logits, for several beta."""
    for tau, beta in ((0.2, 0.125), (0.2, 0.6), (1.0, 0.3)):
        slope = lambda tau=tau, beta=beta: bandit.gradient(ipo_md, PI, REF, GAME, tau, beta)
        check(
            6,
            f"-(4/tau) E_(y,y'~mixture) grad log pi(y) f(y, y'), beta = {beta}",
            slope,
            ipo_md_gradient(PI, tau, beta),
        )


@pytest.mark.ex6(points=2)
def test_ipo_md_limits():
    """beta = 0: online IPO. beta = 1: offline IPO on the reference's data, its value by hand."""
    slope = lambda: bandit.gradient(ipo_md, PI, REF, GAME, 0.3, 0.0)
    check(6, "beta = 0 is online IPO", slope, ipo_md_gradient(PI, 0.3, 0.0))
    wanted = sum(
        REF[y].exp()
        * REF[other].exp()
        * (GAME[y, other] * (h - 2.5) ** 2 + (1 - GAME[y, other]) * (h + 2.5) ** 2)
        for y, other in itertools.product(range(4), repeat=2)
        for h in [PI[y] - REF[y] - PI[other] + REF[other]]
    )
    check(
        6,
        "beta = 1 is offline IPO with data from pi_ref (eq 10)",
        lambda: bandit.expected_loss(ipo_md, PI, REF, GAME, 0.2, 1.0),
        wanted,
    )


@pytest.mark.ex6(points=3)
def test_ipo_md_stops_at_equation_13():
    """Descent ends at the solved point of eq 13 on a cyclic game, and moves the policy on the way."""
    for beta in (0.125, 0.5):
        wanted = bandit.fixed_point(GAME, REF, 0.3, beta).exp()

        def end(beta=beta):
            log_pi = REF
            for _ in range(200):
                blend = ((1 - beta) * log_pi + beta * REF).log_softmax(-1).exp()
                step = 0.3 / 4 * bandit.gradient(ipo_md, log_pi, REF, GAME, 0.3, beta) / blend
                log_pi = torch.log_softmax(log_pi - (0.3 / 0.34 * step).clamp(-1, 1), -1)
            return log_pi.exp()

        check(6, f"eq 13: where IPO-MD stops, beta = {beta}", end, wanted)


@pytest.mark.ex6(points=2)
def test_expected_loss_serves_every_method():
    """PAIR decides: Nash-MD-PG's expected gradient; a law put in the mixture's place; two policies at once."""
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
    wanted = sum(
        data[y].exp()
        * data[other].exp()
        * (GAME[y, other] * (h - 1.25) ** 2 + (1 - GAME[y, other]) * (h + 1.25) ** 2)
        for y, other in itertools.product(range(4), repeat=2)
        for h in [PI[y] - REF[y] - PI[other] + REF[other]]
    )
    check(
        6,
        "mixture: the law that is passed",
        lambda: bandit.expected_loss(ipo_md, PI, REF, GAME, tau, beta, lambda *_: data),
        wanted,
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
    """-p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h) at the pairs of exercise 2, and its slope."""
    for tau in (0.1, 2.0):
        wanted = [
            p * math.log1p(math.exp(-tau * h)) + (1 - p) * math.log1p(math.exp(tau * h))
            for h, p in zip(GAPS.tolist(), LABELS.tolist(), strict=True)
        ]
        check(
            7, "DPO with soft labels", lambda tau=tau: dpo.loss(*FOUR, LABELS, tau), number(*wanted)
        )

        def slope(tau=tau):
            leaf = FOUR[0].clone().requires_grad_()
            return torch.autograd.grad(dpo.loss(leaf, *FOUR[1:], LABELS, tau).sum(), leaf)[0]

        check(
            7,
            "the slope -tau (p - sigmoid(tau h))",
            slope,
            -tau * (LABELS - torch.sigmoid(tau * GAPS)),
        )


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


@pytest.mark.ex7(points=2)
def test_dpo_does_not_stop_at_nash():
    """Appendix F: the gradient at the Nash equilibrium, -2 tau pi*(y) (p(y > pi*) - sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*)))."""
    for preferences, ref, tau in (
        (GAME, REF, 0.2),
        (number([0.5, 0.7], [0.3, 0.5]).view(2, 2), law(0.3, 0.7), 0.1),
    ):
        nash = bandit.fixed_point(preferences, ref, tau)
        wins = wins_against(preferences, nash)
        wanted = -2 * tau * nash.exp() * (wins - torch.sigmoid(wins[:, None] - wins) @ nash.exp())
        slope = lambda p=preferences, r=ref, tau=tau, nash=nash: bandit.gradient(
            dpo, nash, r, p, tau
        )
        check(7, "F.5: online DPO's gradient at the Nash equilibrium is not zero", slope, wanted)


@pytest.mark.ex7(points=2)
def test_where_dpo_stops():
    """A root of online DPO's own equation; pi_ref exp(r/tau)/Z under Bradley-Terry (F.7)."""
    rewards = number(0.0, 0.4, -0.3, 0.2)
    powers = (REF + rewards / 0.3).exp()
    check(
        7,
        "F.7: the RLHF policy",
        lambda: bandit.dpo_point(torch.sigmoid(rewards[:, None] - rewards), REF, 0.3).exp(),
        powers / powers.sum(),
    )
    mild = 0.5 + (GAME - 0.5) / 2
    log_pi = bandit.dpo_point(mild, REF, 0.2)
    require(
        torch.is_tensor(log_pi) and log_pi.shape == (4,) and abs(log_pi.exp().sum() - 1) < 1e-9,
        "dpo_point must return log pi, [n], normalised",
    )
    returns = 0.2 * (log_pi - REF)
    slope = lambda: torch.sigmoid(returns[:, None] - returns) @ log_pi.exp()
    check(7, "sum_y' pi(y') sigmoid(tau h(y, y')) = p(y > pi)", slope, wins_against(mild, log_pi))


@pytest.mark.ex7(points=2)
def test_predictions():
    """predictions.json: is the Nash equilibrium stationary for online DPO? Judged by F.5's condition, here and now."""
    given, uniform = adapters.answers(7), number(1.0, 1.0, 1.0).log_softmax(0)
    rewards = number(0.0, 0.5, 1.5)
    games = {
        "two_actions_0.7": (number([0.5, 0.7], [0.3, 0.5]).view(2, 2), law(0.3, 0.7)),
        "two_actions_0.5": (number([0.5, 0.5], [0.5, 0.5]).view(2, 2), law(0.3, 0.7)),
        "rock_paper_scissors_uniform": (CYCLE, uniform),
        "rock_paper_scissors_biased": (CYCLE, BIASED),
        "bradley_terry_three": (torch.sigmoid(rewards[:, None] - rewards), uniform),
    }
    for name, (preferences, ref) in games.items():
        nash = bandit.fixed_point(preferences, ref, 0.1)
        wins = wins_against(preferences, nash)
        stationary = bool(
            ((wins - torch.sigmoid(wins[:, None] - wins) @ nash.exp()) * nash.exp()).abs().max()
            < 1e-9
        )
        require(
            given.get(name) in (True, False) and isinstance(given.get(name), bool),
            f"predictions.json: {name} must be true or false",
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
    require(
        given.get(run) in NAMES, f"diagnosis.json: run {run} needs a name of the list, word by word"
    )
    require(
        list(given.values()).count(given[run]) == 1,
        "six runs, six different bugs: a name given twice counts for neither",
    )
    key = json.loads((adapters.ROOT / "exercises" / "symptoms" / "key.json").read_text())
    require(
        hashlib.sha256(f"{key['salt']}/{run}/{given[run]}".encode()).hexdigest() == key[run],
        f"run {run} is another bug: compare step 0, the end and the shape of each column with run_healthy.csv",
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
