"""THEORY.md: what it names exists, and the formulas that no other check covers hold.

Exact, in float64. Random games with a cycle and a random reference (claims.problem); a policy pi
that solves nothing, the solved Nash point, the solved point of eq 13. Tolerances are rounding's
unless a test says otherwise. Everything together takes a few seconds.
"""

import ast
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bandit
import dpo
import ipo
import ipo_md
import nash_md
import rl
import slic
from bandit import duality_gap, fixed_point, gradient, kl, respond, win_rate
from claims import BIASED, changed, f, pair_gradients, pair_weights, problem, scores
from enumerated import RESPONSES, per_token_mixture
from ipo_md import mixture
from losses import cpo, simpo
from studies import solvers

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "THEORY.md").read_text(encoding="utf-8")
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def games():
    generator = torch.Generator().manual_seed(0)
    return [problem(generator) for _ in range(5)]


# What the text names


def defined(path):
    """The functions and upper-case constants at the top level of a file."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def test_every_function_and_test_it_names_exists():
    """Functions and tests, plain files and commands.

    `file.py:function`, `tests/file.py::test_name`, `file.py` and `python file.py`.
    """
    named = re.findall(r"`((?:\w+/)?\w+\.py)::?(\w+)`", TEXT)
    assert len(named) > 50, "the pattern must find the references, or the test is empty"
    missing = [
        f"{path}:{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in defined(path)
    ]
    missing += [
        path
        for path in re.findall(r"`(?:python )?((?:\w+/)?\w+\.py)[` ]", TEXT)
        if not (ROOT / path).is_file()
    ]
    assert not missing


def test_every_claim_it_names_is_a_line_of_the_table():
    """THEORY.md writes a line as claims.py `Name`; claims.py has the names as first arguments."""
    source = (ROOT / "claims.py").read_text(encoding="utf-8")
    lines = set(re.findall(r'\b(?:each_game|row)\(\s*"([^"]+)"', source))
    named = set()
    for group in re.findall(r"claims\.py ((?:`[^`]+`(?:, )?)+)", TEXT):
        named.update(re.findall(r"`([^`]+)`", group))
    assert len(named) > 10 and named <= lines, named - lines


def test_its_tests_are_all_used():
    """A test here that the text does not name has lost its formula."""
    own = {name for name in defined("tests/test_theory.py") if name.startswith("test_")}
    own = {name for name in own if "_it_names_" not in name}
    named = set(re.findall(r"`tests/test_theory\.py::(\w+)`", TEXT))
    assert own - {"test_its_tests_are_all_used"} <= named


# Pairs


def test_soft_labels():
    """The two forms of the squared loss, the mirrored pair, the values at h = 0, SLiC's slopes."""
    h = torch.tensor([-20.0, -3.0, 0.0, 0.7, 30.0], dtype=DOUBLE, requires_grad=True)
    p, tau = 0.7, 0.1
    zero = torch.zeros_like(h)
    value = ipo.loss(h, zero, zero, zero, p, tau)
    assert (value - (h - (2 * p - 1) / (2 * tau)) ** 2 - p * (1 - p) / tau**2).abs().max() < 1e-10
    assert (tau * value - (tau * h**2 - (2 * p - 1) * h) - 1 / (4 * tau)).abs().max() < 1e-10
    for method, start in ((ipo, 1 / (4 * tau**2)), (dpo, math.log(2)), (slic, 1.0)):
        value = method.loss(h, zero, zero, zero, p, tau)
        assert (value - method.loss(zero, h, zero, zero, 1 - p, tau)).abs().max() < 1e-10
        assert value[2].item() == pytest.approx(start, abs=1e-12)
        # A drawn winner, averaged.
        won = method.loss(h, zero, zero, zero, 1.0, tau)
        lost = method.loss(h, zero, zero, zero, 0.0, tau)
        assert (p * won + (1 - p) * lost - value).abs().max() < 1e-10
    slope = torch.autograd.grad(slic.loss(h, zero, zero, zero, p, tau).sum(), h)[0]
    inside = -tau * (2 * p - 1)
    wanted = torch.tensor([-tau * p, inside, inside, inside, tau * (1 - p)], dtype=DOUBLE)
    assert (slope - wanted).abs().max() < 1e-12


def test_rl_is_the_identity_with_the_reward_gap(games):
    """For each pair: IPO's gradient is 4/tau times RL's, once the reward gap is p - 1/2."""
    for g in games:
        gap = changed(g, p=g.p - 0.5)
        difference = pair_gradients(ipo, g) - 4 / g.tau * pair_gradients(rl, gap)
        assert difference.abs().max() < 1e-10 / g.tau


def test_contrastive_covariance(games):
    """Cov(X1, X2) = -E[score . score' f^2] - |E X1|^2, as traces.

    And Var((X1 + X2)/2) = (Var X1 + Cov)/2.
    """
    for g in games:
        weight, score = pair_weights(g)[..., None], scores(g.pi)
        x1, x2 = -score[:, None] * f(g)[..., None], score[None] * f(g)[..., None]
        mean = (weight * x1).sum((0, 1))
        assert (mean - (weight * x2).sum((0, 1))).abs().max() < 1e-14
        one = (weight * x1**2).sum() - mean @ mean
        both = (weight * ((x1 + x2) / 2) ** 2).sum() - mean @ mean
        covariance = (weight * x1 * x2).sum() - mean @ mean
        product = (weight[..., 0] * (score @ score.T) * f(g) ** 2).sum()
        assert abs(covariance + product + mean @ mean) < 1e-13
        assert abs(both - (one + covariance) / 2) < 1e-13


# Equilibria


def test_antisymmetry_makes_the_equilibrium_unique(games):
    """Eq 12 at two policies, times their difference.

    The KL both ways on one side, (pi - q) P (pi - q) = 0 on the other.
    """
    for g in games:
        difference = g.pi.exp() - g.mu.exp()
        assert abs(difference @ g.p @ difference) < 1e-15
        assert abs((g.pi - g.mu) @ difference - kl(g.pi, g.mu) - kl(g.mu, g.pi)) < 1e-13


@pytest.mark.equivalence
def test_eq_13_from_the_nash_point_at_another_temperature(games):
    """Prop 5.2 backwards: respond once, at tau, to the Nash point at tau/(1 - beta).

    1e-8: the solver's 1e-11 over tau.
    """
    for g in games:
        nash = fixed_point(g.p, g.ref, g.tau / (1 - g.beta))
        assert (respond(g.p, g.ref, g.tau, nash) - g.shifted).abs().max() < 1e-8


def test_duality_gap_is_a_divergence(games):
    """gap = 2 tau KL(pi, respond(pi)) >= 2 tau KL(pi, nash)."""
    for g in games:
        for pi in (g.pi, g.mu, g.ref):
            gap = duality_gap(pi, g.p, g.ref, g.tau)
            assert abs(gap - 2 * g.tau * kl(pi, respond(g.p, g.ref, g.tau, pi))) < 1e-13
            assert gap > 2 * g.tau * kl(pi, g.nash)


def test_mean_log_probabilities_have_another_equilibrium(games):
    """With h from log-probabilities divided by lengths another policy is still.

    It is pi_ref exp(length (p(. > pi)/tau + C)), where C normalises it.
    """
    for g in games:
        length = torch.arange(1, len(g.ref) + 1, dtype=DOUBLE)
        wins = win_rate(g.p, g.pi) / g.tau
        # Bisection for C; pi is given, the reference that makes it the fixed point is not.
        low, high = -1e3, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            if torch.logsumexp(g.pi - length * (wins + middle), 0) > 0:
                low = middle
            else:
                high = middle
        ref = g.pi - length * (wins + middle)

        def loss(logp, other, ref_logp, ref_other, p, tau, length=length):
            y, y_other = length[:, None], length[None]
            return ipo.loss(logp / y, other / y_other, ref_logp / y, ref_other / y_other, p, tau)

        mean = SimpleNamespace(PAIR=ipo.PAIR, loss=loss)
        assert gradient(mean, g.pi, ref, g.p, g.tau).abs().max() < 1e-10 / g.tau
        assert gradient(ipo, g.pi, ref, g.p, g.tau).abs().max() > 1e-3


# Tokens


def two_tokens():
    """A policy over two tokens of three words: its logits have shapes [3] and [3, 3].

    Returns its log-laws, a reference's, and a scalar's gradient on all logits.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, generator=generator, dtype=DOUBLE, requires_grad=True)
    second = torch.randn(3, 3, generator=generator, dtype=DOUBLE, requires_grad=True)
    ref_first = torch.randn(3, generator=generator, dtype=DOUBLE).log_softmax(-1)
    ref_second = torch.randn(3, 3, generator=generator, dtype=DOUBLE).log_softmax(-1)
    ref = ref_first, ref_second
    pi = first.log_softmax(-1), second.log_softmax(-1)

    def slope(scalar):
        logits = first, second
        parts = torch.autograd.grad(
            scalar, logits, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])

    return pi, ref, slope


def test_kl_gradient_by_token():
    """Each token's score times the log-ratios from it on is the KL's gradient.

    And so is nash_md.loss's at p = 1/2. Its own log-ratio alone is the gradient of the tokens' KLs
    with the law of the prefixes held fixed.
    """
    pi, ref, slope = two_tokens()
    joint, joint_ref = (log[0][:, None] + log[1] for log in (pi, ref))
    exact = slope((joint.exp() * (joint - joint_ref)).sum())
    whole, to_go, own = 0, 0, 0
    for a, b in itertools.product(range(3), repeat=2):
        weight = joint[a, b].exp().detach()
        d = (pi[0] - ref[0])[a].detach(), (pi[1] - ref[1])[a, b].detach()
        s = slope(pi[0][a]), slope(pi[1][a, b])
        value = nash_md.loss(joint[a, b], None, joint_ref[a, b], None, 0.5, 1.0)
        whole = whole + weight * slope(value)
        to_go = to_go + weight * (s[0] * (d[0] + d[1]) + s[1] * d[1])
        own = own + weight * (s[0] * d[0] + s[1] * d[1])
    second = (pi[1].exp() * (pi[1] - ref[1])).sum(-1)
    held = (pi[0].exp() * (pi[0] - ref[0])).sum() + (pi[0].exp().detach() * second).sum()
    assert (whole - exact).abs().max() < 1e-14 and (to_go - exact).abs().max() < 1e-14
    assert (own - slope(held)).abs().max() < 1e-14 and (own - exact).norm() > 0.05 * exact.norm()


def test_undetached_log_ratio_adds_an_entropy_bonus(games):
    """Its gradient is the right one minus tau times the entropy's.

    A fixed opponent: it stops at pi_ref^(1/2) exp(p/(2 tau)).
    """

    def loss(logp, logp_other, ref_logp, ref_logp_other, p, tau):
        return -(p - 0.5 - tau * (logp - ref_logp)) * logp

    method = SimpleNamespace(PAIR=nash_md.PAIR, loss=loss)
    for g in games:
        logits = g.pi.clone().requires_grad_()
        log_pi = logits.log_softmax(0)
        entropy = torch.autograd.grad(-(log_pi.exp() * log_pi).sum(), logits)[0]
        off = gradient(method, g.pi, g.ref, g.p, g.tau) - gradient(nash_md, g.pi, g.ref, g.p, g.tau)
        assert (off + g.tau * entropy).abs().max() < 1e-13
        stop = torch.log_softmax(g.ref / 2 + win_rate(g.p, g.mu) / (2 * g.tau), 0)

        def fixed(log_pi, log_ref, beta, opponent=g.mu):
            return opponent

        assert gradient(method, stop, g.ref, g.p, g.tau, 0.5, fixed).abs().max() < 1e-13


def test_per_token_normalisers():
    """log(per-token law) - (1 - beta) log pi - beta log pi_ref depends on the prefixes.

    It is at least 0. Responses that differ in the last token alone share it; were it the same for
    all, this were the sequence-level mixture.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, len(RESPONSES), generator=generator, dtype=DOUBLE)
    log_pi, log_ref = logits.log_softmax(-1)
    excess = per_token_mixture(log_pi, log_ref, 0.5) - (log_pi + log_ref) / 2
    assert excess.min() > 0 and excess.max() - excess.min() > 0.1
    by_prefix = {}
    for response, value in zip(RESPONSES, excess.tolist(), strict=True):
        assert by_prefix.setdefault(tuple(response[:-1]), value) == pytest.approx(value, abs=1e-12)


# Dynamics


def test_nash_md_step_with_an_eighth(games):
    """One step's bound with eta^2/8 where NLHF has 2 eta^2.

    So KL(nash, pi_T) <= 1/(2 tau^2 (T + 1)), a sixteenth.
    """
    for g in games:
        distance = kl(g.nash, bandit.nash_md_path(g.p, g.ref, g.tau, 200))
        t = torch.arange(201, dtype=DOUBLE)
        eta = 2 / (g.tau * (t[:-1] + 2))
        assert (distance[1:] - (1 - eta * g.tau) * distance[:-1] - eta**2 / 8).max() < 1e-13
        assert (distance * 2 * g.tau**2 * (t + 1))[1:].max() < 1


def test_constant_step_cycles_beyond_its_bound():
    """Rock-paper-scissors, uniform up to 1e-6, tau = 0.02.

    (1 - eta tau)^2 (1 + eta^2 lam^2) is 0.993 at eta = 0.5, 1.012 at 1.
    """
    lam, ref = 0.4 / 3**0.5, torch.log_softmax(1e-6 * BIASED, 0)
    largest = torch.linalg.eigvals((bandit.cycle(0.4) - 0.5) / 3).abs().max().item()
    assert largest == pytest.approx(lam, abs=1e-12)
    for eta, stable in ((0.5, True), (1.0, False)):
        assert ((1 - eta * 0.02) ** 2 * (1 + (eta * lam) ** 2) < 1) == stable
        path = bandit.nash_md_path(bandit.cycle(0.4), ref, 0.02, 3000, eta)
        assert ((path[-1] - path[-2]).abs().max() < 1e-8) == stable


def test_natural_flow_contracts_at_tau(games):
    """d/dt KL(nash, pi) = -tau (KL(nash, pi) + KL(pi, nash)), at any policy.

    Along the self-play field divided by pi.
    """
    for g in games:
        move = -gradient(nash_md, g.pi, g.ref, g.p, g.tau) / g.pi.exp()

        def distance(logits, nash=g.nash):
            return kl(nash, logits.log_softmax(0))

        _, slope = torch.func.jvp(distance, (g.pi,), (move,))
        assert abs(slope + g.tau * (kl(g.nash, g.pi) + kl(g.pi, g.nash))) < 1e-12


def test_jacobian_of_the_solver_is_nonsingular(games):
    """At policies that solve nothing, too.

    At Nash its eigenvalues are 1 + i w, and 1 for the constants.
    """
    for g in games:
        for beta, pi in itertools.product((0.0, g.beta), (g.pi, g.mu, g.nash)):

            def residual(x, g=g, beta=beta):
                return x - respond(g.p, g.ref, g.tau, mixture(x, g.ref, beta))

            jacobian = torch.func.jacrev(residual)(pi)
            assert torch.linalg.svdvals(jacobian).min() > 1e-3
            if beta == 0.0 and pi is g.nash:
                assert (torch.linalg.eigvals(jacobian).real - 1).abs().max() < 1e-9


@pytest.mark.parametrize("method", [ipo, nash_md, ipo_md])
def test_rate_of_the_natural_step(games, method):
    """Linearised at its point, a step's factor is at most turn/sqrt(pull^2 + turn^2).

    And every eigenvalue is -tau + i w. By central differences (1e-5: error about 1e-8). For
    beta > 0 the turn is that of the mixture times 1 - beta.
    """
    for g in games[:3]:
        beta = g.beta if method is ipo_md else 0.0
        point = g.shifted if beta else g.nash
        unit = 1.0 if method is nash_md else g.tau / 4
        law = mixture(point, g.ref, beta)
        half = (law / 2).exp()
        turn = (1 - beta) * torch.linalg.matrix_norm(half[:, None] * (g.p - 0.5) * half, 2)
        around = point + 1e-5 * torch.cat([torch.eye(len(point)), -torch.eye(len(point))]).double()
        laws = mixture(around.log_softmax(-1), g.ref, beta)
        field = -unit * gradient(method, around, g.ref, g.p, g.tau, beta) / laws.exp()
        field = field - field.mean(-1, keepdim=True)
        jacobian = ((field[: len(point)] - field[len(point) :]) / 2e-5).T
        values = torch.linalg.eigvals(jacobian)
        values = values[values.abs() > 1e-6]  # without the constants, which move no probability
        assert len(values) == len(point) - 1 and (values.real + g.tau).abs().max() < 1e-6
        rate = g.tau / (g.tau**2 + turn**2)
        assert (1 + rate * values).abs().max() < turn / (g.tau**2 + turn**2) ** 0.5 + 1e-6


def test_momentum_multiplies_the_turn():
    """|factor|^2 of gradient steps with averaged gradients, on the eigenvalue pull + i turn.

    The second-order term, to 2 %.
    """
    pull, turn, rate = 0.01, 0.3, 1e-3
    for momentum in (0.0, 0.5, 0.9):
        middle = 1 + momentum - rate * (1 - momentum) * complex(pull, turn)
        # Of z^2 - middle z + momentum, the one near 1.
        root = (middle + (middle * middle - 4 * momentum) ** 0.5) / 2
        second = (rate * turn) ** 2 * (1 + momentum) / (1 - momentum)
        assert abs(abs(root) ** 2 - (1 - 2 * rate * pull + second)) < 0.02 * second


def test_adam_without_momentum_leaves_again():
    """The second-moment average forgets: it arrives, then circles.

    At a constant lr the steps grow until they overshoot. The gradient's noise of 1e-13 is in place
    of rounding's, which would do it, too, but at a step of its own on each machine.
    """
    noise = torch.Generator().manual_seed(0)
    nash = fixed_point(bandit.cycle(0.4), BIASED, 0.1)
    logits = torch.nn.Parameter(BIASED.clone())
    optimiser = torch.optim.Adam([logits], lr=0.03, betas=(0.0, 0.999))
    far = []
    for _ in range(2500):
        log_pi = logits.detach().log_softmax(0)
        advantage = win_rate(bandit.cycle(0.4), log_pi) - 0.1 * (log_pi - BIASED)
        # Online IPO's, Prop 4.1.
        logits.grad = -4 / 0.1 * log_pi.exp() * (advantage - log_pi.exp() @ advantage)
        logits.grad += 1e-13 * torch.randn(3, generator=noise, dtype=torch.float64)
        optimiser.step()
        far.append(bandit.total_variation(log_pi, nash).item())
    assert max(far[1000:1500]) < 1e-8 and max(far[2000:]) > 1e-2


# What tau means


def test_span_and_win_rate_at_nash(games):
    """log pi/pi_ref spans at most 1/tau, so p(nash > pi_ref) <= sigmoid(1/tau).

    A certain preference of two comes near.
    """
    hard = []
    for g in games:
        for tau in (0.1, 1.0):
            hard.append(changed(g, p=0.5 + (g.p - 0.5).sign() / 2, tau=tau))
    for g in games + hard:
        ratio = fixed_point(g.p, g.ref, g.tau) - g.ref
        assert ratio.max() - ratio.min() <= 1 / g.tau + 1e-9
        assert (ratio + g.ref).exp() @ win_rate(g.p, g.ref) <= 1 / (1 + math.exp(-1 / g.tau))


def test_total_order_of_many():
    """100 responses of equal mass in a certain order: one win rate in closed form, to 1/100.

    It is 1 - tau + 1/(e^(1/tau) - 1).
    """
    order = torch.ones(100, 100, dtype=DOUBLE).tril(-1) + torch.eye(100, dtype=DOUBLE) / 2
    ref = torch.zeros(100, dtype=DOUBLE).log_softmax(0)
    for tau, wanted in ((1.0, 0.582), (0.1, 0.900)):
        closed = 1 - tau + 1 / math.expm1(1 / tau)
        assert closed == pytest.approx(wanted, abs=5e-4)
        wins = fixed_point(order, ref, tau).exp() @ win_rate(order, ref)
        assert wins == pytest.approx(closed, abs=1 / 100)


def test_gain_at_large_tau(games):
    """p(nash > pi_ref) - 1/2 over Var(p(y > pi_ref))/tau is 1 up to a multiple of 1/tau."""
    for g in games:
        wins = win_rate(g.p, g.ref)
        variance = g.ref.exp() @ (wins - 0.5) ** 2
        for tau in (10.0, 100.0):
            gain = fixed_point(g.p, g.ref, tau).exp() @ wins - 0.5
            assert (gain * tau / variance).item() == pytest.approx(1, abs=1 / tau)


def test_weak_preferences_make_dpo_and_rl_four_times_weaker():
    """DPO's and RL's points at 4 tau tend to Nash's at tau.

    logit(p) = 4 (p - 1/2) and sigmoid(x) - 1/2 = x/4 to third order.
    """
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(5, generator=generator, dtype=DOUBLE)
    ref = torch.randn(5, generator=generator, dtype=DOUBLE).log_softmax(0)
    for size, limit in ((1e-1, 1e-2), (1e-2, 1e-4)):
        preferences = bandit.bradley_terry(size * rewards)
        nash = fixed_point(preferences, ref, size)
        rlhf = bandit.rlhf_policy(size * rewards, ref, 4 * size)
        dpos = bandit.dpo_point(preferences, ref, 4 * size)
        assert (rlhf - nash).abs().max() < limit and (dpos - nash).abs().max() < limit
        moved = bandit.total_variation(nash, ref)
        assert moved > 0.03, "the game must move the policy, or the test is empty"


# After the paper


def test_inpos_iteration_is_a_natural_step(games):
    """What INPO's steps on the pairs of one pi_t lead to (studies/solvers.py:move, which is the
    loss's minimiser) is bandit.descend's step on online IPO at rate 1/eta, from any pi_t."""
    for g in games:
        for eta in (1.01 * g.tau, 0.5 + g.tau, 3.0 + g.tau):
            inpo = solvers.move(g.p, g.ref, g.tau, 1 / eta, g.pi, g.pi)
            path = bandit.descend(ipo, g.p, g.ref, g.tau, rate=1 / eta, steps=1, start=g.pi)
            assert (path[-1] - inpo).abs().max() < 1e-11 / g.tau
            assert (inpo - g.pi).abs().max() > 1e-3


def factors(step, log_pi):
    """The factors by which a step multiplies small changes of its fixed point, complex [n - 1]."""
    assert (step(log_pi) - log_pi).abs().max() < 1e-8
    jacobian = torch.func.jacrev(step)(log_pi)
    values = torch.linalg.eigvals(jacobian)
    # Without the constants, which a normalised step forgets: the smallest factor, 0.
    return values[values.abs().argsort()][1:]


def test_the_extragradient_step_needs_no_small_rate(games):
    """Its factors are a - b^2 + i a b, and |.|^2 at most 1 - 2 s tau (1 - s tau) up to s = 2.

    Beside it the plain step of the same rate, which on the cycle is unstable at small tau.
    """
    cycles = [
        SimpleNamespace(p=bandit.cycle(0.5), ref=BIASED, tau=tau) for tau in (0.05, 0.02, 0.01)
    ]
    for g in games + cycles:
        nash = fixed_point(g.p, g.ref, g.tau)
        for size in (0.3, 1.0, 2.0):
            s = min(size, 0.99 / g.tau)

            def plain(x, g=g, s=s):
                return solvers.move(g.p, g.ref, g.tau, s, x, x)

            def extra(x, g=g, s=s, plain=plain):
                return solvers.move(g.p, g.ref, g.tau, s, x, plain(x))

            first, a = factors(plain, nash), 1 - s * g.tau
            assert (first.real - a).abs().max() < 1e-7, "a + i b"
            b = first.imag
            square = a**2 + b**2 * (1 - a) ** 2 - b**2 * (1 - b**2)
            found = factors(extra, nash).abs() ** 2
            assert (found.sort()[0] - square.sort()[0]).abs().max() < 1e-7
            assert b.abs().max() <= s / 2 + 1e-9
            assert found.max() <= 1 - 2 * s * g.tau * (1 - s * g.tau) + 1e-7
            if g.ref is BIASED and size == 2.0:
                assert first.abs().max() > 1.05, "the plain step would do as well"


def test_the_optimistic_step_comes_in():
    """ONPO around the uniform equilibrium of rock-paper-scissors: the measured rate of its last
    iterate is the larger root's modulus; from b = 1/sqrt(3) on it leaves. Plain steps always do."""
    p, uniform = bandit.cycle(0.4), torch.zeros(3, dtype=DOUBLE).log_softmax(0)
    near = (uniform + 1e-5 * torch.tensor([1.0, -1.0, 0.0]).double()).log_softmax(0)
    turn = solvers.turning(p, uniform).item()

    def root(b):
        middle = 1 + 2j * b
        return (middle + (middle * middle - 4j * b) ** 0.5) / 2

    for eta in (0.5, 1.0, 2.0, 2.6):
        # In logarithms the cycle turns a deviation without changing its length; the smaller root
        # has died out after 30 steps.
        away = (solvers.onpo_path(p, near, 60, eta) - uniform).norm(dim=1)
        rate = (away[60] / away[30]).item() ** (1 / 30)
        assert rate == pytest.approx(abs(root(eta * turn)), abs=1e-4)
        assert (rate < 1) == (eta * turn < 3**-0.5)
        away = bandit.total_variation(solvers.spo_path(p, near, 200, eta), uniform)
        assert away[-1] > 1.5 * away[0]
    small = 0.01
    assert abs(root(small) - (1 + 1j * small - small**2)) < 10 * small**3
    assert abs(root(0.5 * 1.15)) < 1 < abs(root(0.5 * 1.16))


def test_without_a_reference_it_is_dpo_with_a_uniform_one(games):
    """CPO without its likelihood, and SimPO without its margin on responses of one token."""
    for g in games:
        sides, zero = (g.pi[:, None], g.pi[None]), torch.zeros((), dtype=DOUBLE)
        uniform = dpo.loss(*sides, zero, zero, g.p, g.tau)
        given = (*sides, g.ref[:, None], g.ref[None], g.p, g.tau)
        one = torch.ones((), dtype=DOUBLE)
        means = simpo.loss(*given, gamma=0.0, length=one, length_other=one)
        for value in (cpo.loss(*given, alpha=0.0), means):
            torch.testing.assert_close(value, uniform, rtol=1e-13, atol=1e-13)
        assert (dpo.loss(*given) - uniform).abs().max() > 1e-3
