"""The graded tests: exercises 1 to 8, ten points each.

`pytest --impl DIR -m ex2` grades one exercise of a folder.
Oracles are closed forms, fixed points, limits and enumerations in float64, written out here or
taken from earlier exercises, so that a folder with 1 to K solved passes 1 to K. check() compares
against values that are far above its tolerance, so an answer of zeros fails. Beside the inputs that
all can read here are inputs from the course's seed: a table of the visible answers fails.
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
from exercises.grader.checks import check, course_random, random_game, random_law, require


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
# Policies for a stack, [2, 3, 4].
STACK = torch.stack(
    [
        torch.stack([PI, REF, law(0.1, 0.2, 0.3, 0.4)]),
        torch.stack([law(0.25, 0.25, 0.25, 0.25), PI.flip(0), law(0.02, 0.9, 0.03, 0.05)]),
    ]
)


def by_row(function, stack):
    """function of each law [n] of a stack [..., n], in the stack's shape."""
    rows = [function(row) for row in stack.flatten(0, -2)]
    return torch.stack(rows).view(*stack.shape[:-1], *rows[0].shape)


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


def cycle_by_hand(margin):
    high, low = 0.5 + margin, 0.5 - margin
    return number([0.5, high, low], [low, 0.5, high], [high, low, 0.5]).view(3, 3)


@pytest.mark.ex1(points=3)
def test_cycle():
    """Each action beats the next, and preferences + preferences^T = 1."""
    for margin in (0.4, 0.1, -0.2):
        equation = f"p(i > j) of rock-paper-scissors, margin {margin}"
        check(1, equation, bandit.cycle, cycle_by_hand(margin), margin)
    margin = torch.rand((), generator=course_random("cycle"), dtype=torch.float64).item() / 3
    equation = f"p(i > j) of rock-paper-scissors, margin {margin}"
    check(1, equation, bandit.cycle, cycle_by_hand(margin), margin, public=False)


@pytest.mark.ex1(points=3)
def test_bradley_terry():
    """exp(r_i)/(exp(r_i) + exp(r_j)), and the logit of p is the reward gap."""
    equation = "Bradley-Terry, p(i > j) = exp(r_i)/(exp(r_i) + exp(r_j))"

    def by_hand(rewards):
        powers = rewards.exp()
        return powers[:, None] / (powers[:, None] + powers)

    rewards = number(0.3, -1.2, 2.0, 0.9)
    check(1, equation, bandit.bradley_terry, by_hand(rewards), rewards)
    more = torch.randn(6, generator=course_random("bradley_terry"), dtype=torch.float64)
    check(1, equation, bandit.bradley_terry, by_hand(more), more, public=False)


@pytest.mark.ex1(points=2)
def test_win_rate():
    """p(y > opponent), the expectation over the opponent's actions; one opponent and stacks."""
    equation = "p(y > pi) = E_{y' ~ pi} p(y > y')"
    check(1, equation, bandit.win_rate, wins_against(GAME, PI), GAME, PI)
    wanted = by_row(functools.partial(wins_against, GAME), STACK)
    equation = "p(y > pi) for two opponents at once, [2, n]"
    check(1, equation, bandit.win_rate, wanted[0, :2], GAME, STACK[0, :2])
    equation = "p(y > pi) for a stack of opponents, [2, 3, n]"
    check(1, equation, bandit.win_rate, wanted, GAME, STACK)
    random = course_random("win_rate")
    game, opponent = random_game(random, 5), random_law(random, 5)
    equation = "p(y > pi), five actions"
    wanted = wins_against(game, opponent)
    check(1, equation, bandit.win_rate, wanted, game, opponent, public=False)


@pytest.mark.ex1(points=2)
def test_antisymmetry():
    """Nobody beats himself: E_{y ~ pi} p(y > pi) = 1/2; and p(pi > rho) + p(rho > pi) = 1."""
    games = {
        "a cycle": torch.as_tensor(bandit.cycle(0.3)).double(),
        "Bradley-Terry": bandit.bradley_terry(number(0.5, 0.0, -2.0)).double(),
    }
    pi, rho = law(0.2, 0.7, 0.1), law(0.5, 0.1, 0.4)

    def against(preferences, one, other):
        return (one.exp() * bandit.win_rate(preferences, other)).sum()

    def there_and_back(preferences):
        return against(preferences, pi, rho) + against(preferences, rho, pi)

    for name, preferences in games.items():
        check(1, f"p(pi > pi) = 1/2 in {name}", against, 0.5, preferences, pi, pi)
        check(1, f"p(pi > rho) + p(rho > pi) = 1 in {name}", there_and_back, 1.0, preferences)
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
# Whole responses have hundreds of nats: h = 240 and -350.
FAR = number(-60.0, -500.0), number(-310.0, -90.0), number(-70.0, -90.0), number(-80.0, -30.0)
FAR_GAPS = number(240.0, -350.0)


def random_pairs(name):
    """Five pairs from the course's seed: their four log-probabilities, h, and labels."""
    random = course_random(name)
    four = -5 * torch.rand(4, 5, generator=random, dtype=torch.float64)
    labels = torch.rand(5, generator=random, dtype=torch.float64)
    return tuple(four), four[0] - four[1] - four[2] + four[3], labels


@pytest.mark.ex2(points=2)
def test_gap():
    """h of three pairs, by hand, and its slopes."""
    equation = "h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y')"
    check(2, equation, lambda: ipo.log_ratio_gap(*FOUR), GAPS)
    check(2, "h of long responses", lambda: ipo.log_ratio_gap(*FAR), FAR_GAPS)
    four, gaps, _ = random_pairs("gap")
    check(2, equation, lambda: ipo.log_ratio_gap(*four), gaps, public=False)

    def slopes():
        leaves = [part.clone().requires_grad_() for part in FOUR[:2]]
        return torch.stack(torch.autograd.grad(ipo.log_ratio_gap(*leaves, *FOUR[2:]).sum(), leaves))

    wanted = torch.stack([torch.ones(3), -torch.ones(3)])
    check(2, "the slopes of h in log pi(y) and log pi(y') are 1 and -1", slopes, wanted)


def parabola(h, p, tau):
    """p (h - 1/(2 tau))^2 + (1 - p) (h + 1/(2 tau))^2 entry by entry."""
    target = 1 / (2 * tau)
    values = []
    for gap, label in zip(h.tolist(), p.tolist(), strict=True):
        values.append(label * (gap - target) ** 2 + (1 - label) * (gap + target) ** 2)
    return number(*values)


@pytest.mark.ex2(points=2)
def test_ipo_loss():
    """tau = 0.1, target 5: 0.7 * 5.7^2 + 0.3 * 4.3^2 = 28.29, and so on; [B], not reduced."""
    wanted = number(28.29, 0.2 * 6.5**2 + 0.8 * 3.5**2, 3.2**2)
    check(2, "eq 11 with soft labels, tau = 0.1", lambda: ipo.loss(*FOUR, LABELS, 0.1), wanted)
    labels = number(0.6, 0.9)
    wanted = parabola(FAR_GAPS, labels, 0.1)
    equation = "eq 11 for h of hundreds of nats, tau = 0.1"
    check(2, equation, lambda: ipo.loss(*FAR, labels, 0.1), wanted)
    four, gaps, labels = random_pairs("ipo_loss")
    wanted = parabola(gaps, labels, 0.3)
    check(2, "eq 11, tau = 0.3", lambda: ipo.loss(*four, labels, 0.3), wanted, public=False)


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
    logits = number(0.5, 0.0, -0.5, 1.0).requires_grad_()

    def slope(y, other, p, tau):
        log_pi = torch.log_softmax(logits, 0)
        pair = log_pi[[y]], log_pi[[other]], REF[[y]], REF[[other]]
        return torch.autograd.grad(ipo.loss(*pair, number(p), tau).sum(), logits)[0]

    log_pi = torch.log_softmax(logits, 0).detach()
    unit = torch.eye(4).double()
    random = torch.rand((), generator=course_random("pair_identity"), dtype=torch.float64)
    cases = ((0, 2, 0.7, 0.1, True), (3, 1, 0.25, 0.4, True), (1, 0, 1.0, 2.0, True))
    for y, other, p, tau, public in (*cases, (2, 3, 0.9 * random.item(), 0.7, False)):
        h = log_pi[y] - REF[y] - log_pi[other] + REF[other]
        difference = unit[y] - unit[other]  # the scores' pi cancels
        wanted = -(2 / tau) * (p - 0.5 - tau * h) * difference
        identity = "-(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y'))"
        equation = f"the pair identity, {identity}, p = {p:g}, tau = {tau}"
        check(2, equation, slope, wanted, y, other, p, tau, public=public)


# Exercise 3: geometric mixture, regularised Nash equilibrium, duality gap


@pytest.mark.ex3(points=2)
def test_mixture():
    """beta = 1/2 by hand, sqrt(pi pi_ref) normalised; both ends; stacks."""
    pi, ref = law(0.8, 0.1, 0.1), law(0.2, 0.3, 0.5)

    def mixed(beta):
        return ipo_md.mixture(pi, ref, beta).exp()

    roots = number(0.16, 0.03, 0.05).sqrt()
    check(3, "pi^(1/2) pi_ref^(1/2)/Z", mixed, roots / roots.sum(), 0.5)
    check(3, "the mixture, beta = 0 is the policy", mixed, pi.exp(), 0.0)
    check(3, "the mixture, beta = 1 is the reference", mixed, ref.exp(), 1.0)

    def by_hand(policy, reference, beta):
        powers = policy.exp() ** (1 - beta) * reference.exp() ** beta
        return powers / powers.sum(-1, keepdim=True)

    wanted = by_hand(STACK, REF, 0.125)
    two, equation = STACK[0, :2], "the mixture, beta = 0.125, "
    check(3, f"{equation}two rows", lambda: ipo_md.mixture(two, REF, 0.125).exp(), wanted[0, :2])
    check(3, f"{equation}[2, 3, n]", lambda: ipo_md.mixture(STACK, REF, 0.125).exp(), wanted)
    random = course_random("mixture")
    pi, ref = random_law(random, 6), random_law(random, 6)
    check(3, "the mixture, beta = 0.7", mixed, by_hand(pi, ref, 0.7), 0.7, public=False)


def leaving(log_pi, log_ref):
    """KL(pi, pi_ref) of two laws [n]."""
    return sum(p * (p / q).log() for p, q in zip(log_pi.exp(), log_ref.exp(), strict=True))


@pytest.mark.ex3(points=1)
def test_kl():
    """Two laws by hand, one row each; a stack."""
    wanted = number(
        0.15 * math.log(0.15 / 0.4)
        + 0.25 * math.log(0.25 / 0.3)
        + 0.1 * math.log(0.5)
        + 0.5 * math.log(5.0)
    )
    equation = "KL(pi, pi_ref) = E_{y ~ pi} log pi(y)/pi_ref(y)"
    check(3, equation, lambda: bandit.kl(PI[None], REF[None]), wanted)
    wanted = by_row(lambda log_pi: leaving(log_pi, UNEVEN), STACK)
    check(3, "KL of a stack, [2, 3]", lambda: bandit.kl(STACK, UNEVEN), wanted)
    random = course_random("kl")
    pi, ref = random_law(random, 5), random_law(random, 5)
    check(3, equation, lambda: bandit.kl(pi, ref), leaving(pi, ref), public=False)


UNEVEN = law(0.05, 0.15, 0.35, 0.45)


@pytest.mark.ex3(points=1)
def test_respond():
    """pi_ref exp(p(y > opponent)/tau)/Z with every sum written out."""

    def response(tau, opponent):
        return bandit.respond(GAME, REF, tau, opponent).exp()

    for tau in (0.1, 2.0):
        wanted = answer_to(PI, GAME, REF, tau)
        check(3, f"eq 12's right-hand side, tau = {tau}", response, wanted, tau, PI)
    wanted = by_row(lambda opponent: answer_to(opponent, GAME, REF, 0.5), STACK)
    check(3, "eq 12's right-hand side for a stack, [2, 3, n]", response, wanted, 0.5, STACK)
    opponent = random_law(course_random("respond"), 4)
    wanted = answer_to(opponent, GAME, REF, 0.3)
    check(3, "eq 12's right-hand side", response, wanted, 0.3, opponent, public=False)


def payoff(one, other, preferences, log_ref, tau):
    """p(one > other) - tau KL(one, pi_ref) + tau KL(other, pi_ref)."""
    wins = (one.exp() * wins_against(preferences, other)).sum()
    return wins - tau * leaving(one, log_ref) + tau * leaving(other, log_ref)


def gap_by_ascent(pi, preferences, log_ref, tau):
    """2 max_pi' payoff(pi', pi) - 1, the maximum found by mirror ascent and not by a formula.

    It converges geometrically, since the payoff is strongly concave.
    """
    best = log_ref.clone()
    pull = wins_against(preferences, pi) / tau
    for _ in range(60):
        best = torch.log_softmax(best + 0.5 * (pull - (best - log_ref)), 0)
    return 2 * payoff(best, pi, preferences, log_ref, tau) - 1


@pytest.mark.ex3(points=2)
def test_duality_gap():
    """2 max_pi' payoff(pi', pi) - 1, found by ascent, not by a formula; 0 at Nash; stacks."""

    def gap(pi, ref, tau):
        return bandit.duality_gap(pi, GAME, ref, tau)

    equation = "the duality gap, 2 max payoff(pi', pi) - 1"
    for pi, ref, tau in ((PI, REF, 0.5), (REF, PI, 1.0), (REF, REF, 0.3)):
        wanted = gap_by_ascent(pi, GAME, ref, tau)
        check(3, f"{equation}, tau = {tau}", gap, wanted, pi, ref, tau)
    check(
        3,
        "the gap is 0 at rock-paper-scissors' uniform equilibrium (1 was added)",
        lambda: 1 + bandit.duality_gap(UNIFORM, CYCLE, UNIFORM, 0.1),
        1.0,
    )
    wanted = by_row(lambda log_pi: gap_by_ascent(log_pi, GAME, REF, 0.4), STACK)
    check(3, f"{equation}, a stack of policies [2, 3, n]", gap, wanted, STACK, REF, 0.4)
    random = course_random("duality_gap")
    pi, ref = random_law(random, 4), random_law(random, 4)
    check(3, equation, gap, gap_by_ascent(pi, GAME, ref, 0.2), pi, ref, 0.2, public=False)


def solved(preferences, ref, tau, *more):
    """fixed_point's answer, looked at."""
    log_pi = bandit.fixed_point(preferences, ref, tau, *more)
    require(
        torch.is_tensor(log_pi) and log_pi.shape == ref.shape and log_pi.isfinite().all(),
        "fixed_point must return log pi, [n], finite",
    )
    return log_pi


@pytest.mark.ex3(points=2)
def test_nash_equilibrium():
    """A zero of its own equation on cyclic games; the closed form of two actions; large tau."""

    def solve(preferences, ref, tau):
        return bandit.fixed_point(preferences, ref, tau).exp()

    def difference():
        log_pi = bandit.fixed_point(TWO, TWO_REF, 0.1)
        return log_pi[0] - log_pi[1]

    random = course_random("nash_equilibrium")
    cases = {
        "rock-paper-scissors": (CYCLE, BIASED, 0.1),
        "four actions": (GAME, REF, 0.1),
        "four actions again": (GAME, PI, 0.4),
        "five actions": (random_game(random, 5), random_law(random, 5), 0.2),
    }
    for name, (preferences, ref, tau) in cases.items():
        wanted = answer_to(solved(preferences, ref, tau), preferences, ref, tau)
        equation = f"eq 12, pi = pi_ref exp(p(. > pi)/tau)/Z, {name}, tau = {tau}"
        public = name != "five actions"
        check(3, equation, solve, wanted, preferences, ref, tau, public=public)
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
        blend = solved(GAME, REF, 0.2, beta).exp() ** (1 - beta) * REF.exp() ** beta
        blend = blend / blend.sum()
        wanted = answer_to(blend.log(), GAME, REF, 0.2)
        equation = f"eq 13, the opponent is pi^(1-beta) pi_ref^beta, beta = {beta}"
        check(3, equation, solve, wanted, beta)
        hotter = answer_to(blend.log(), GAME, REF, 0.2 / (1 - beta))
        require(
            (blend - hotter).abs().max() < 1e-6,
            "Prop 5.2: the mixture of the fixed point must be Nash at tau/(1 - beta)",
        )


def the_data(log_pi, log_ref, beta):
    """A law in the mixture's place that does not depend on the policy: offline IPO's data."""
    return UNEVEN


def leader_loses(log_pi, log_ref, beta):
    """An opponent that beats whatever action leads: no policy answers it with itself."""
    sure = torch.eye(3).double() * 6
    return sure[log_pi.argmax(-1)].log_softmax(-1)


@pytest.mark.ex3(points=1)
def test_another_opponent():
    """Another law as mixture: the answer to it; ValueError where there is no fixed point."""
    equation = "eq 13 with another law as mixture"
    wanted = answer_to(UNEVEN, GAME, REF, 0.3)

    def solve():
        return bandit.fixed_point(GAME, REF, 0.3, 0.5, the_data).exp()

    check(3, equation, solve, wanted)
    try:
        bandit.fixed_point(CYCLE, BIASED, 0.1, 0.5, leader_loses)
    except ValueError:
        return
    require(False, "no policy solves eq 13 with this mixture: ValueError must be raised")


# Exercise 4: IPO-MD


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


@pytest.mark.ex4(points=3)
def test_ipo_md_gradient():
    """The pair form of Prop 5.1, on the logits, for several beta."""

    def slope(pi, preferences, tau, beta):
        return bandit.gradient(ipo_md, pi, REF, preferences, tau, beta)

    require(ipo_md.PAIR is not None, "Exercise 4: ipo_md.PAIR says who draws y and y'")
    random = course_random("ipo_md_gradient")
    cases = [(PI, GAME, 0.2, 0.125), (PI, GAME, 0.2, 0.6), (PI, GAME, 1.0, 0.3)]
    cases.append((random_law(random, 4), random_game(random, 4), 0.5, 0.2))
    for pi, preferences, tau, beta in cases:
        formula = "-(4/tau) E_(y,y'~mixture) grad log pi(y) f(y, y')"
        equation = f"{formula}, tau = {tau}, beta = {beta}"
        wanted = ipo_md_gradient(pi, tau, beta, preferences)
        check(4, equation, slope, wanted, pi, preferences, tau, beta, public=preferences is GAME)


@pytest.mark.ex4(points=2)
def test_ipo_md_limits():
    """beta = 0: online IPO. beta = 1: offline IPO on the reference's data, its value by hand."""

    def slope():
        return bandit.gradient(ipo_md, PI, REF, GAME, 0.3, 0.0)

    def value():
        return bandit.expected_loss(ipo_md, PI, REF, GAME, 0.2, 1.0)

    check(4, "beta = 0 is online IPO", slope, ipo_md_gradient(PI, 0.3, 0.0))
    equation = "beta = 1 is offline IPO with data from pi_ref (eq 10)"
    check(4, equation, value, ipo_value(REF, target=2.5))


@pytest.mark.ex4(points=2)
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
        check(4, f"eq 13: where IPO-MD stops, beta = {beta}", end, wanted, beta)


def one_sided(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Nash-MD-PG's loss: exercise 7 has more of it."""
    return -(preference - 0.5 - tau * (logp - ref_logp)).detach() * logp


def rewarded(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """A loss whose label is a reward gap, any number."""
    return -preference * (logp - logp_other)


@pytest.mark.ex4(points=3)
def test_expected_loss_serves_every_method():
    """PAIR decides; a law in the mixture's place; reward gaps; stacks of policies and of games."""
    beta, tau = 0.5, 0.4
    blend = (PI.exp() * REF.exp()).sqrt()
    advantage = wins_against(GAME, (blend / blend.sum()).log()) - 0.5 - tau * (PI - REF)
    wanted = -(PI.exp() * (advantage - (PI.exp() * advantage).sum()))
    mixed = SimpleNamespace(PAIR=("policy", "mixture"), loss=one_sided)
    equation = "Nash-MD-PG: y from the policy, y' from the mixture"
    check(4, equation, lambda: bandit.gradient(mixed, PI, REF, GAME, tau, beta), wanted)
    check(
        4,
        "mixture: the law that is passed",
        lambda: bandit.expected_loss(ipo_md, PI, REF, GAME, tau, beta, the_data),
        ipo_value(UNEVEN, target=1.25),
    )
    rewards = number(3.0, -2.0, 0.5, 7.0)
    gaps = rewards[:, None] - rewards
    wanted = 0
    for y, other in itertools.product(range(4), repeat=2):
        wanted -= (PI[y] + PI[other]).exp() * gaps[y, other] * (PI[y] - PI[other])
    paid = SimpleNamespace(PAIR=("policy", "policy"), loss=rewarded)
    equation = "reward gaps in the preferences' place"
    check(4, equation, lambda: bandit.expected_loss(paid, PI, REF, gaps, tau), wanted)

    def slope(pi, preferences):
        return bandit.gradient(ipo_md, pi, REF, preferences, tau, beta)

    wanted = by_row(lambda log_pi: ipo_md_gradient(log_pi, tau, beta), STACK)
    values = by_row(lambda log_pi: bandit.expected_loss(ipo_md, log_pi, REF, GAME, tau), STACK)
    equation = "a stack of values, [2, 3], as one by one"
    check(4, equation, lambda: bandit.expected_loss(ipo_md, STACK, REF, GAME, tau), values)
    equation = "two policies at once, [2, n]"
    check(4, equation, slope, wanted[0, :2], STACK[0, :2], GAME)
    check(4, "a stack of policies, [2, 3, n]", slope, wanted, STACK, GAME)
    games = torch.stack([GAME, 1 - GAME])  # the second with winner and loser exchanged
    wanted = torch.stack([ipo_md_gradient(PI, tau, beta, game) for game in games])
    check(
        4, "a policy and a game each, [2, n] and [2, n, n]", slope, wanted, PI.repeat(2, 1), games
    )


# Exercise 5: online DPO is not a Nash solver


def logistic(h, p, tau):
    """-p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h), entry by entry."""
    values = []
    for gap, label in zip(h.tolist(), p.tolist(), strict=True):
        wins, loses = math.log1p(math.exp(-tau * gap)), math.log1p(math.exp(tau * gap))
        values.append(label * wins + (1 - label) * loses)
    return number(*values)


@pytest.mark.ex5(points=3)
def test_dpo_loss():
    """-p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h) at exercise 2's pairs, and its slope."""

    def value(tau):
        return dpo.loss(*FOUR, LABELS, tau)

    def slope(tau):
        leaf = FOUR[0].clone().requires_grad_()
        losses = dpo.loss(leaf, *FOUR[1:], LABELS, tau)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    for tau in (0.1, 2.0):
        equation = f"DPO with soft labels, tau = {tau}"
        check(5, equation, value, logistic(GAPS, LABELS, tau), tau)
        wanted = -tau * (LABELS - torch.sigmoid(tau * GAPS))
        check(5, f"the slope -tau (p - sigmoid(tau h)), tau = {tau}", slope, wanted, tau)
    four, gaps, labels = random_pairs("dpo_loss")
    wanted = logistic(gaps, labels, 0.7)
    equation = "DPO with soft labels, tau = 0.7"
    check(5, equation, lambda: dpo.loss(*four, labels, 0.7), wanted, public=False)
    check(
        5,
        "smoothing = 0.2: p becomes 0.8 p + 0.2 (1 - p)",
        lambda: dpo.loss(*FOUR, LABELS, 0.5, smoothing=0.2),
        logistic(GAPS, 0.8 * LABELS + 0.2 * (1 - LABELS), 0.5),
    )


@pytest.mark.ex5(points=1)
def test_dpo_is_finite():
    """h of thousands of nats: the loss is linear there."""
    far, zero = number(3000.0, -3000.0), number(0.0, 0.0)
    check(
        5,
        "the loss at h = +-3000, tau = 1, p = 0.7",
        lambda: dpo.loss(far, zero, zero, zero, number(0.7, 0.7), 1.0),
        number(900.0, 2100.0),
    )


def f5(nash, preferences):
    """p(y > pi*) - sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*)): 0 where F.5 holds."""
    wins = wins_against(preferences, nash)
    return wins - torch.sigmoid(wins[:, None] - wins) @ nash.exp()


@pytest.mark.ex5(points=2)
def test_dpo_does_not_stop_at_nash():
    """Appendix F: the gradient at the Nash equilibrium is not zero. It is

    -2 tau pi*(y) (p(y > pi*) - sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*))).
    """

    def slope(nash, preferences, ref, tau):
        logits = nash.clone().requires_grad_()
        log_pi = torch.log_softmax(logits, 0)
        y, other = torch.cartesian_prod(torch.arange(len(ref)), torch.arange(len(ref))).T
        pairs = log_pi[y], log_pi[other], ref[y], ref[other]
        losses = dpo.loss(*pairs, preferences[y, other], tau)
        weight = (nash[y] + nash[other]).exp()
        return torch.autograd.grad((weight * losses).sum(), logits)[0]

    equation = "F.5: online DPO's gradient at the Nash equilibrium is not zero"
    for preferences, ref, tau in ((GAME, REF, 0.2), (TWO, TWO_REF, 0.1)):
        nash = bandit.fixed_point(preferences, ref, tau)
        wanted = -2 * tau * nash.exp() * f5(nash, preferences)
        check(5, f"{equation}, tau = {tau}", slope, wanted, nash, preferences, ref, tau)


@pytest.mark.ex5(points=2)
def test_where_dpo_stops():
    """A root of online DPO's own equation; pi_ref exp(r/tau)/Z under Bradley-Terry (F.7)."""
    equation = "F.7: the RLHF policy"

    def solve(bradley_terry):
        return bandit.dpo_point(bradley_terry, REF, 0.3).exp()

    gaps = torch.randn(4, generator=course_random("where_dpo_stops"), dtype=torch.float64) / 3
    for rewards, public in ((number(0.0, 0.4, -0.3, 0.2), True), (gaps, False)):
        bradley_terry = torch.sigmoid(rewards[:, None] - rewards)
        wanted = torch.softmax(REF + rewards / 0.3, 0)
        check(5, equation, solve, wanted, bradley_terry, public=public)
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
    check(5, equation, own_wins, wins_against(mild, log_pi))


@pytest.mark.ex5(points=2)
def test_predictions():
    """predictions.json: is the Nash equilibrium stationary for online DPO?

    Judged by F.5's condition, here and now.
    """
    given = adapters.answers(5)
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


# Exercise 6: no code

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
    given = adapters.answers(6)
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


@pytest.mark.ex6(points=2)
def test_run_a():
    diagnose("a")


@pytest.mark.ex6(points=2)
def test_run_b():
    diagnose("b")


@pytest.mark.ex6(points=2)
def test_run_c():
    diagnose("c")


@pytest.mark.ex6(points=2)
def test_run_d():
    diagnose("d")


@pytest.mark.ex6(points=1)
def test_run_e():
    diagnose("e")


@pytest.mark.ex6(points=1)
def test_run_f():
    diagnose("f")


# Exercise 7: Nash-MD-PG, sequence-level KL


@functools.cache
def sharp_models():
    """Two tiny GPT-2 that disagree, policy and reference: made once.

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


def scored_batch(policies, prompts, responses):
    """Lists of ids as Tokens, prompt and response. What follows a mask is junk."""
    ids, mask = policies.pad(responses, "right", 0)
    response = policies.Tokens(ids.masked_fill(~mask, 2), mask)
    return policies.pad(prompts, "left", 0), response


# Prompts of three lengths, with a finished response, one cut at the limit, a lone end-of-text.
SCORED = [[1, 2, 3], [2], [4, 4]], [[1, 0], [3, 1, 2], [0]]


def random_words():
    """Prompts and responses like SCORED, from the course's seed."""
    words = torch.randint(1, 5, (3, 6), generator=course_random("log_prob")).tolist()
    first, second, third = words
    return [first[:1], second[:3], third[:2]], [[*first[3:5], 0], third[3:6], [second[5], 0]]


@pytest.mark.ex7(points=3)
def test_log_prob():
    """Padded on the left and right, pad equal to end-of-text: each row as if it stood alone.

    Token by token, and summed.
    """
    _, policies, model, _ = sharp_models()
    for (prompts, responses), public in ((SCORED, True), (random_words(), False)):
        batch = scored_batch(policies, prompts, responses)
        tokens = torch.zeros(3, 3, dtype=torch.float64)
        for row, (x, y) in enumerate(zip(prompts, responses, strict=True)):
            tokens[row, : len(y)] = slow_log_prob(model, x, y)
        equation = "log pi(y | x) = sum of log pi(y_n | x, y_<n)"
        check(7, equation, policies.log_prob, tokens.sum(1), model, *batch, public=public)
        equation = "log pi(y_n | x, y_<n), 0 beyond the mask"
        check(7, equation, policies.token_log_probs, tokens, model, *batch, public=public)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        each, total = (
            score(half, *batch) for score in (policies.token_log_probs, policies.log_prob)
        )
    # What was ever a bfloat16 has 8 bits; sums of such numbers soon have more.
    precise = (each != each.bfloat16().to(each.dtype)).any() and total.dtype != torch.bfloat16
    require(
        precise and total.dtype != torch.float16,
        "the log-probabilities of a bfloat16 model must be taken in float32: logits.float() before "
        "the softmax",
    )


@pytest.mark.ex7(points=1)
def test_responses_are_all_there_is():
    """The probabilities of all 85 responses sum to 1 for both prompts."""
    enumerated, policies, model, _ = sharp_models()
    prompts = [x for x in enumerated.PROMPTS for _ in enumerated.RESPONSES]
    prompt = policies.pad(prompts, "left", 0)
    response = policies.pad(enumerated.RESPONSES * 2, "right", 0)

    def total():
        return policies.log_prob(model, prompt, response).view(2, -1).exp().sum(1)

    check(7, "sum over every y of pi(y | x) = 1", total, number(1.0, 1.0))


@pytest.mark.ex7(points=3)
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
        check(7, f"{equation}, tau = {tau}", slope, -(p - 0.5 - tau * (logp - ref)), tau)
    (logp, _, ref, _), _, p = random_pairs("nash_md_gradient")
    check(7, equation, slope, -(p - 0.5 - 0.3 * (logp - ref)), 0.3, public=False)


def score_without_padding(model, prompt, response):
    """log pi(y | x), [B], with no graded function: one prompt, so nothing is padded on the left."""
    ids = torch.cat([prompt.ids, response.ids], 1)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    every = torch.log_softmax(logits[:, prompt.ids.shape[1] - 1 : -1], -1)
    return (every.gather(2, response.ids[..., None])[..., 0] * response.mask).sum(1)


@pytest.mark.ex7(points=3)
def test_nash_md_gradient_in_expectation():
    """In the model's parameters, over all 85 responses, against the objective's gradient:

    minus that of p(pi > SG[mixture]) - tau KL(pi, pi_ref). The objective is differentiated as it
    stands, with log-probabilities scored here and not by policy.py.
    """
    require(nash_md.PAIR is not None, "Exercise 7: nash_md.PAIR says who draws y and y'")
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
    check(7, equation, slope, wanted)


# Exercise 8: the mixture's sampler


@pytest.mark.ex8(points=1)
def test_mix():
    """The mixture's logits of rows with different beta, row by row."""
    import sampler

    one = number([1.0, 2.0, -1.0], [0.5, 0.0, 3.0]).view(2, 3)
    other = number([0.0, -1.0, 1.5], [2.0, 1.0, 0.0]).view(2, 3)
    more = 2 * torch.randn(2, 3, generator=course_random("mix"), dtype=torch.float64)

    def mixed(one, other):
        """Rows 0, 1 and 2 with beta 0.25, 1 and 0.5: each model serves two of them."""
        weight, rest = number(0.75, 0.5)[:, None], number(0.25, 1.0, 0.5)[:, None]
        rows = torch.tensor([0, 2]), torch.tensor([0, 1, 2])
        streams = [
            SimpleNamespace(rows=rows[0], weight=weight, logits=one),
            SimpleNamespace(rows=rows[1], weight=rest, logits=torch.cat([other, 2 * other[:1]])),
        ]
        return sampler.mix(streams, 3).softmax(-1)

    for first, second, public in ((one, other, True), (more, other, False)):
        logits = [0.75 * first[0] + 0.25 * second[0], second[1], 0.5 * first[1] + second[0]]
        wanted = torch.stack(logits).softmax(-1)
        equation = "sec 5.1: (1-beta) log pi + beta log pi_ref, row by row"
        check(8, equation, mixed, wanted, first, second, public=public)


@pytest.mark.ex8(points=2)
def test_draw():
    """Inversion of the distribution function: frequencies on a grid, both ends, a large one."""
    import sampler

    probabilities = number(0.1, 0.0, 0.55, 0.35)
    grid = (torch.arange(1000).double() + 0.5) / 1000

    def counts():
        logits = probabilities.log().expand(1000, 4) + 7.0
        return torch.bincount(sampler.draw(logits, grid), minlength=4)

    equation = "a uniform u draws the token whose interval of the distribution function holds u"
    check(8, equation, counts, 1000 * probabilities)
    # GPT-2's vocabulary in float32, the first and last tokens impossible.
    logits = torch.randn(8, 50257, generator=course_random("draw"))
    logits[:, :5] = logits[:, -5:] = -torch.inf
    cumulative = logits[0].double().softmax(0).cumsum(0)
    tokens = torch.tensor([5, 700, 2345, 20000, 31415, 40000, 49000, 50251])
    middle = (cumulative[tokens - 1] + cumulative[tokens]) / 2
    drawn = sampler.draw(logits[:1].expand(8, -1), middle)
    require(
        drawn.shape == (8,) and (drawn == tokens).all(),
        "50,257 tokens: a uniform in the middle of a token's interval must draw this token",
    )
    # Eight rows: whether their sums come out above or below 1 is a matter of rounding.
    for uniform, token in ((0.0, 5), (1 - 2**-53, 50251)):
        drawn = sampler.draw(logits, torch.full((8,), uniform, dtype=torch.float64))
        require(
            (drawn == token).all(),
            f"uniform {uniform!r}: of the possible tokens 5 to 50251 it must draw {token}, "
            f"not {drawn.tolist()}",
        )


def chi_square(counts, log_law):
    """Pearson's statistic of 4,000 draws."""
    expected = 4000 * log_law.exp()
    return ((counts - expected) ** 2 / expected).sum().item()


def sampled(beta, seed, copies, other=None):
    """ids, mask, finished of `copies` of the two prompts: the masks as bool, whatever they were."""
    import sampler

    _, policies, policy, reference = sharp_models()
    enumerated, *_ = sharp_models()
    prompt = policies.pad(enumerated.PROMPTS * copies, "left", 0)
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    other = other or reference
    ids, mask, finished = sampler.sample(policy, other, prompt, beta, generator, max_tokens=3)
    require(
        ids.shape == mask.shape and ids.ndim == 2 and finished.shape == ids.shape[:1],
        f"ids {list(ids.shape)}, mask {list(mask.shape)}, finished {list(finished.shape)}: "
        "[B, T], [B, T] and [B] are wanted",
    )
    return ids, mask.bool(), finished.bool()


def response_indices(enumerated, ids, mask):
    """Each response's place among the 85 possible ones, [B]."""
    places = torch.full((6**3,), -1)
    for index, response in enumerate(enumerated.RESPONSES):
        places[sum((token + 1) * 6**place for place, token in enumerate(response))] = index
    powers = 6 ** torch.arange(ids.shape[1])
    found = places[((ids + 1) * mask * powers).sum(1)]
    strange = (found < 0).nonzero()
    row = int(strange[0]) if len(strange) else 0
    require(
        not len(strange),
        f"{ids[row][mask[row]].tolist()} is no response: the mask holds through the first "
        "end-of-text token (0) and no further",
    )
    return found


def exact_laws(enumerated, policies):
    """log pi and log pi_ref of the 85 responses to both prompts, [2, 85] each."""
    _, _, policy, reference = sharp_models()
    prompts = [prompt for prompt in enumerated.PROMPTS for _ in enumerated.RESPONSES]
    responses = policies.pad(enumerated.RESPONSES * 2, "right", 0)
    w = SimpleNamespace(batch=(policies.pad(prompts, "left", 0), responses))
    with torch.no_grad():
        return [enumerated.log_policy(model, w) for model in (policy, reference)]


@pytest.mark.ex8(points=3)
def test_sampler_draws_the_mixture():
    """4,000 pairs for each of two prompts, y at beta = 0.15 and y' at 0.6: chi-square of all four.

    84 degrees of freedom: a right sampler exceeds 165 less than once in 10^6 runs, whatever its
    random numbers. The share of pairs with y = y' is binomial: 5.5 standard deviations are allowed.
    """
    enumerated, policies, _, _ = sharp_models()
    betas = (0.15, 0.6)
    laws = exact_laws(enumerated, policies)
    right = [enumerated.per_token_mixture(*laws, beta) for beta in betas]
    ids, mask, _ = sampled(betas, 0, 4000)
    require(len(ids) == 16000, f"2 responses to 8,000 prompts are 16,000 rows, not {len(ids)}")
    index = response_indices(enumerated, ids, mask).view(2, 4000, 2)  # response, copy, prompt
    for which, beta in enumerate(betas):
        for row in range(2):
            counts = index[which, :, row].bincount(minlength=85)
            square = chi_square(counts, right[which][row])
            inverted = enumerated.per_token_mixture(*laws, 1 - beta)[row]
            swapped = right[1 - which][row], right[which][1 - row]
            why = "the frequencies fit neither this beta nor 1 - beta"
            if chi_square(counts, inverted) < 165:
                why = "the frequencies are those of 1 - beta: beta is the weight of the reference"
            if chi_square(counts, swapped[0]) < 165:
                why = "the frequencies are those of the other response's beta"
            if chi_square(counts, swapped[1]) < 165:
                why = "the frequencies are those of the other prompt: row r has prompt r % N"
            require(
                square < 165,
                f"sec 5.1, beta = {beta}: {why} (chi-square {square:.0f} on 84 degrees of freedom)",
            )
    share = (index[0] == index[1]).double().mean(0)
    exact = (right[0] + right[1]).exp().sum(1)
    allowed = 5.5 * (exact * (1 - exact) / 4000).sqrt()
    require(
        ((share - exact).abs() < allowed).all(),
        f"y = y' in {share.tolist()} of the pairs, {exact.tolist()} if they are independent: "
        "each response needs uniform numbers of its own",
    )


@pytest.mark.ex8(points=2)
def test_generator():
    """All randomness is the generator's: two of one seed agree, two seeds and two calls differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        before = torch.get_rng_state()
        first, _, _ = sampled(0.3, generator, 100)
        untouched = torch.equal(before, torch.get_rng_state())
        torch.manual_seed(12)
        again, _, _ = sampled(0.3, 5, 100)
        other, _, _ = sampled(0.3, 6, 100)
        second, _, _ = sampled(0.3, generator, 100)
    require(untouched, "torch's global generator must stay untouched: pass generator=generator")
    require(torch.equal(first, again), "equal generators must give equal responses")
    require(not torch.equal(first, other), "generators of different seeds give equal responses")
    require(not torch.equal(first, second), "a second call with one generator draws the same again")


def by_inversion(beta, uniforms):
    """The tokens that given uniforms [T, B] draw, row by row without a cache: lists of ids."""
    enumerated, _, policy, reference = sharp_models()
    rows = []
    for row, draws in enumerate(uniforms.T):
        ids = list(enumerated.PROMPTS[row % 2])
        weight = beta[row // (uniforms.shape[1] // len(beta))]
        response = []
        for u in draws:
            batch = torch.tensor([[*ids, *response]])
            with torch.no_grad():
                logits = [model(input_ids=batch).logits[0, -1] for model in (policy, reference)]
            mixed = (1 - weight) * logits[0] + weight * logits[1]
            response.append(int((mixed.softmax(0).cumsum(0) <= u).sum()))
            if response[-1] == 0:
                break
        rows.append(response)
    return rows


@pytest.mark.ex8(points=1)
def test_uniforms():
    """Given uniforms decide every token, against the laws row by row without a cache."""
    import sampler

    enumerated, policies, policy, reference = sharp_models()
    prompt = policies.pad(enumerated.PROMPTS * 4, "left", 0)
    uniforms = torch.rand(3, 16, generator=course_random("uniforms"), dtype=torch.float64)
    beta = (0.1, 0.7)
    ids, mask, _ = sampler.sample(policy, reference, prompt, beta, None, 3, uniforms)
    drawn = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    require(
        drawn == by_inversion(beta, uniforms),
        "uniforms[n, r] must decide token n of row r by inverting the distribution function",
    )


@pytest.mark.ex8(points=1)
def test_sampled_rows():
    """(0, beta): first responses, then second ones.

    The mask ends with end-of-text, or the response was cut and is unfinished.
    """
    _, _, policy, _ = sharp_models()
    ids, mask, finished = sampled((0.0, 0.5), 1, 200)
    require(len(ids) == 800, f"2 responses to 400 prompts are 800 rows, not {len(ids)}")
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
    again, _, _ = sampled((0.0, 0.5), 1, 200, other=policy)
    require(
        (ids[:400] == again[:400]).all(),
        "the first 400 rows (beta = 0) must not depend on the reference",
    )
    require(
        (ids[400:] != again[400:]).any(),
        "the last 400 rows (beta = 0.5) must depend on the reference",
    )
