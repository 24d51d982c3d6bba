"""studies/solvers.py: each later solver's step against its paper's formula, written out in
probabilities; against the loss or the objective that it is said to solve; and where it leads.

Everything is tabular and in float64. The game with the literal equilibrium is cyclic with a fourth
action; random games of other sizes stand beside it, because a step may be right on one by luck.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

import bandit
import enumerated
import ipo
import policy as policies
import sampler
from bandit import fixed_point, respond, total_variation, win_rate
from policy import Tokens
from studies import solvers
from studies.solvers import inpo_loss, move, unregularised_gap

DOUBLE = torch.float64
GAME = solvers.PREFERENCES, solvers.LOG_REF, solvers.TAU
NASH = fixed_point(*GAME)


def random_games():
    """(preferences, log_ref, tau) of 3 to 6 actions."""
    generator = torch.Generator().manual_seed(15)
    games = []
    for count, tau in ((3, 0.3), (4, 0.15), (5, 0.2), (6, 0.4)):
        games.append((*bandit.random_game(count, generator), tau))
    return games


RANDOM = random_games()


def law(weights):
    """Weights divided by their sum."""
    return weights / weights.sum()


def test_the_game_is_the_one_of_the_literal_equilibrium():
    """Six printed digits of the regularised equilibrium; the other one is (1/3, 1/3, 1/3, 0)."""
    p = [[0.5, 0.9, 0.1, 0.7], [0.1, 0.5, 0.9, 0.7], [0.9, 0.1, 0.5, 0.7], [0.3, 0.3, 0.3, 0.5]]
    assert solvers.PREFERENCES.tolist() == p and solvers.TAU == 0.1
    torch.testing.assert_close(
        solvers.LOG_REF.exp(), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=DOUBLE)
    )
    literal = torch.tensor([0.374848, 0.281510, 0.328346, 0.015296], dtype=DOUBLE)
    assert (NASH.exp() - literal).abs().max() < 6e-7
    third = (
        torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=DOUBLE).log() - torch.tensor(3.0).double().log()
    )
    assert abs(unregularised_gap(third, solvers.PREFERENCES)) < 1e-15
    # By hand: against the reference the first action wins .2 + .27 + .02 + .07 = .56.
    assert abs(unregularised_gap(solvers.LOG_REF, solvers.PREFERENCES) - 0.12) < 1e-12
    assert total_variation(NASH, third) > 0.05  # the two equilibria are told apart


# Each step in the symbols of its paper, in probabilities and without the shared move: p, ref, tau,
# then past, the path's laws so far.


def literal_inpo(p, ref, tau, past):
    eta, pi = 0.7, past[-1]
    return ref ** (tau / eta) * pi ** (1 - tau / eta) * torch.exp(p @ pi / eta)


def literal_comal(p, ref, tau, past):
    """Rounds of three steps: the reference is the policy that a round began with."""
    start = past[(len(past) - 1) // 3 * 3]
    return literal_inpo(p, start, tau, past)


def literal_mpo(p, ref, tau, past, magnet=None):
    eta, pi = 1.3, past[-1]
    magnet = ref if magnet is None else magnet
    return (pi * magnet ** (tau * eta) * torch.exp(eta * (p @ pi))) ** (1 / (1 + tau * eta))


def literal_mpo_moving(p, ref, tau, past):
    return literal_mpo(p, ref, tau, past, past[(len(past) - 1) // 2 * 2])


def literal_egpo(p, ref, tau, past):
    eta, theta = 1.1, past[-1].log()
    half = (1 - eta * tau) * theta + eta * tau * ref.log() + eta * (p @ past[-1])
    return torch.exp(
        (1 - eta * tau) * theta + eta * tau * ref.log() + eta * (p @ torch.softmax(half, 0))
    )


def literal_nash_prox(p, ref, tau, past):
    eta, q = 0.2, past[-1]
    for _ in range(2):
        q = law(torch.exp((ref.log() + past[-1].log() / eta + p @ q / tau) / (1 + 1 / eta)))
    return q


def literal_mnpo(p, ref, tau, past):
    eta = 0.9
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)[: len(past)]
    base = torch.ones_like(ref)
    for weight, pi in zip(law(weights), past[::-1], strict=False):
        base = base * pi**weight
    return ref ** (tau / eta) * base ** (1 - tau / eta) * torch.exp(p @ past[-1] / eta)


def literal_nash_rs(p, ref, tau, past):
    """The opponent by its rejections; then a natural gradient of p - tau log pi/pi_ref."""
    eta, pi = 0.8, past[-1]
    accepted = law(ref * torch.exp(-(pi @ p) / tau))
    return pi * torch.exp(eta * (p @ accepted - tau * torch.log(pi / ref)))


def literal_onpo(p, ref, tau, past):
    """Closed form: all win rates so far, the last one twice."""
    total = torch.stack(past).sum(0) + past[-1]
    return ref * torch.exp(0.6 * (p @ total))


def literal_spo(p, ref, tau, past):
    """Closed form: all win rates so far."""
    return ref * torch.exp(0.6 * (p @ torch.stack(past).sum(0)))


def run(name, preferences, log_ref, tau, steps):
    """A path with the constants of the literal steps."""
    game = preferences, log_ref, tau, steps
    paths = dict(
        inpo=lambda: solvers.inpo_path(*game, 0.7),
        comal=lambda: solvers.comal_path(*game, 0.7, 3),
        mpo=lambda: solvers.mpo_path(*game, 1.3),
        mpo_moving=lambda: solvers.mpo_path(*game, 1.3, 2),
        egpo=lambda: solvers.egpo_path(*game, 1.1),
        nash_prox=lambda: solvers.nash_prox_path(*game, 0.2),
        mnpo=lambda: solvers.mnpo_path(*game, 0.9, (0.5, 0.3, 0.2)),
        nash_rs=lambda: solvers.nash_rs_path(*game, 0.8),
        onpo=lambda: solvers.onpo_path(preferences, log_ref, steps, 0.6),
        spo=lambda: solvers.spo_path(preferences, log_ref, steps, 0.6),
    )
    return paths[name]()


LITERAL = dict(
    inpo=literal_inpo,
    comal=literal_comal,
    mpo=literal_mpo,
    mpo_moving=literal_mpo_moving,
    egpo=literal_egpo,
    nash_prox=literal_nash_prox,
    mnpo=literal_mnpo,
    nash_rs=literal_nash_rs,
    onpo=literal_onpo,
    spo=literal_spo,
)


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_each_step_is_its_papers_formula(name, game):
    """Seven steps in a row: more than a round of COMAL and MPO, and than MNPO's memory."""
    p, log_ref, tau = game
    path = run(name, *game, 7).exp()
    assert path.shape == (8, len(log_ref)) and torch.equal(path[0], log_ref.exp())
    assert (path[7] - path[0]).abs().max() > 1e-3
    for step in range(7):
        expected = law(LITERAL[name](p, log_ref.exp(), tau, list(path[: step + 1])))
        assert (path[step + 1] - expected).abs().max() < 1e-13, step


# What the steps solve


def random_policy(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=DOUBLE).log_softmax(0)


def slope(objective, log_pi):
    """The gradient of an objective on the logits of a policy."""
    logits = log_pi.detach().requires_grad_()
    return torch.autograd.grad(objective(torch.log_softmax(logits, -1)), logits)[0]


@pytest.mark.parametrize("game", RANDOM)
@pytest.mark.parametrize("regularised", [True, False])
def test_the_move_maximises_its_objective(game, regularised):
    """p(pi > q) - tau KL(pi, pi_ref) - (1/size - tau) KL(pi, base): no slope, and a maximum.

    SPO's trust region is the case without regularisation, MPO's and Nash-Prox's objectives are
    this one at their size.
    """
    p, log_ref, tau = game
    tau = tau if regularised else 0.0
    size = 1.7
    base, opponent = (random_policy(len(log_ref), seed) for seed in (1, 2))

    def objective(log_pi):
        won = log_pi.exp() @ win_rate(p, opponent)
        anchored = tau * bandit.kl(log_pi, log_ref) + (1 / size - tau) * bandit.kl(log_pi, base)
        return won - anchored

    best = move(p, log_ref, tau, size, base, opponent)
    assert slope(objective, best).abs().max() < 1e-14
    assert slope(objective, base).abs().max() > 1e-3
    for seed in range(5):
        assert objective(random_policy(len(log_ref), seed)) < objective(best)


def pair_slope(log_pi, log_law, log_ref, log_last, p, tau, eta):
    """The gradient of inpo_loss over pairs of which both are drawn from a law, on the logits."""

    def objective(log_pi):
        pairs = inpo_loss(
            *(log_pi[:, None], log_pi[None]),
            *(log_ref[:, None], log_ref[None]),
            *(log_last[:, None], log_last[None]),
            *(p, tau, eta),
        )
        return ((log_law[:, None] + log_law[None]).exp() * pairs).sum()

    return slope(objective, log_pi)


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_steps_are_minimisers_of_the_pair_loss(game):
    """The gradient of the loss over pairs from the opponent is 0 at the step's result.

    It is not at the step's start, or the test is empty. EGPO's second half has its opponent half a
    step ahead; MNPO's last policy is a weighted mean; ONPO's is the lagging one, at tau = 0.
    """
    p, log_ref, tau = game
    inpo, mpo, egpo = (run(name, *game, 4) for name in ("inpo", "mpo", "egpo"))
    mnpo, onpo = (run(name, *game, 4) for name in ("mnpo", "onpo"))
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    half = move(p, log_ref, tau, 1.1, egpo[3], egpo[3])
    lagging = log_ref + 0.6 * win_rate(p, onpo[:4]).sum(0)
    cases = dict(
        inpo=(inpo[4], inpo[3], log_ref, inpo[3], p, tau, 0.7),
        mpo=(mpo[4], mpo[3], log_ref, mpo[3], p, tau, tau + 1 / 1.3),
        egpo_half=(half, egpo[3], log_ref, egpo[3], p, tau, 1 / 1.1),
        egpo=(egpo[4], half, log_ref, egpo[3], p, tau, 1 / 1.1),
        mnpo=(mnpo[4], mnpo[3], log_ref, weights @ mnpo[1:4].flip(0), p, tau, 0.9),
        onpo=(onpo[4], onpo[3], log_ref, lagging, p, 0.0, 1 / 0.6),
    )
    for name, case in cases.items():
        assert pair_slope(*case).abs().max() < 1e-13, name
        # From elsewhere, and with another law for the pairs, the slope is not 0.
        assert pair_slope(log_ref, *case[1:]).abs().max() > 1e-4, name
    assert pair_slope(egpo[4], egpo[3], *cases["egpo"][2:]).abs().max() > 1e-6


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_egpo_is_gradient_steps_on_its_loss(game):
    """Rate eta tau n/4, uniform pairs, from the same policy twice: losses of pi, then of half."""
    p, log_ref, tau = game
    eta, count = 1.1, len(log_ref)
    path = run("egpo", *game, 3)
    start = path[2]
    opponent = start
    for _ in range(2):
        wins = win_rate(p, opponent)
        target = (wins[:, None] - wins[None]) / tau

        def loss(theta, target=target):
            ratio = theta - log_ref
            return ((ratio[:, None] - ratio[None] - target) ** 2).sum() / count**2

        theta = start.clone().requires_grad_()
        gradient = torch.autograd.grad(loss(theta), theta)[0]
        opponent = torch.log_softmax(start - eta * tau * count / 4 * gradient, 0)
    assert (opponent - path[3]).abs().max() < 1e-13


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_nash_rs_climbs_what_the_worst_opponent_leaves(game):
    """min over pi' of p(pi > pi') + tau KL(pi', pi_ref), less tau KL(pi, pi_ref), by autograd.

    The minimum is -tau log E exp(-p(pi > y')/tau): no opponent is written down here.
    """
    p, log_ref, tau = game
    path = run("nash_rs", *game, 5)

    def left(log_pi):
        worst = -tau * torch.logsumexp(log_ref - log_pi.exp() @ p / tau, 0)
        return worst - tau * bandit.kl(log_pi, log_ref)

    for step in range(5):
        natural = slope(left, path[step]) / path[step].exp()
        expected = torch.log_softmax(path[step] + 0.8 * natural, 0)
        assert (path[step + 1] - expected).abs().max() < 1e-12
        assert left(path[step + 1]) > left(path[step])
    accepted = (log_ref.exp() * torch.exp(-(path[5].exp() @ p) / tau)).sum()
    assert abs(solvers.acceptance(p, log_ref, tau, path[5]) / accepted - 1) < 1e-12


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_sppos_loss_aims_at_the_step_up_to_third_order(game):
    """Half the step leaves an eighth of the slope: 1/2 stands where log Z/eta would make it 0."""
    p, log_ref, _ = game
    wins = win_rate(p, log_ref)
    slopes = []
    for eta in (0.2, 0.1):

        def loss(log_pi, eta=eta, centre=0.5):
            miss = log_pi - log_ref - eta * (wins - centre)
            return (log_ref.exp() * miss**2).sum() / 2

        stepped = solvers.spo_path(p, log_ref, 1, eta)[1]
        slopes.append(slope(loss, stepped).abs().max())
        exact = torch.logsumexp(log_ref + eta * wins, 0) / eta

        def exact_loss(log_pi, loss=loss, exact=exact):
            return loss(log_pi, centre=exact)

        assert slope(exact_loss, stepped).abs().max() < 1e-16 + 1e-4 * slopes[-1]
    assert slopes[0] > 1e-9 and 7 < slopes[0] / slopes[1] < 9


# Solvers that are one another


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_solvers_that_are_one_another(game):
    """In exact arithmetic, at the step sizes that the file's head gives."""
    p, log_ref, tau = game
    eta = 0.6
    pairs = (
        (solvers.mpo_path(*game, 30, eta), solvers.inpo_path(*game, 30, tau + 1 / eta)),
        (solvers.mpo_path(*game, 30, eta, 7), solvers.comal_path(*game, 30, tau + 1 / eta, 7)),
        (
            solvers.nash_prox_path(*game, 30, eta),
            solvers.egpo_path(*game, 30, 1 / (tau + tau / eta)),
        ),
        (
            solvers.nash_prox_path(*game, 30, eta, inner=1),
            solvers.inpo_path(*game, 30, tau * (1 + 1 / eta)),
        ),
        (solvers.mnpo_path(*game, 30, 0.9, (1.0,)), solvers.inpo_path(*game, 30, 0.9)),
    )
    for one, other in pairs:
        assert (one - other).abs().max() < 1e-11
        assert total_variation(one[0], one[-1]) > 1e-3


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_nash_md_is_the_same_move(game):
    """From pi, against its mixture with the reference, which weighs the reference as the move."""
    p, log_ref, tau = game
    path = bandit.nash_md_path(*game, 10)
    for step in range(10):
        size = 2 / (tau * (step + 2))
        opponent = (1 - size * tau) * path[step] + size * tau * log_ref
        moved = move(p, log_ref, tau, size, path[step], opponent.log_softmax(0))
        assert (moved - path[step + 1]).abs().max() < 1e-12


# Where they lead


CONVERGE = (
    # solver, its constants, steps to a total variation of 1e-6 that suffice
    ("inpo", (1.0,), 160),
    ("inpo", (3.0,), 400),
    ("mpo", (2.0,), 140),
    ("egpo", (0.5,), 220),
    ("egpo", (1.0,), 100),
    ("egpo", (2.0,), 50),
    ("nash_prox", (0.02,), 600),
    ("nash_prox", (0.05,), 230),
    ("nash_prox", (0.2,), 60),
    ("mnpo", (1.0,), 190),
    ("mnpo", (0.3,), 70),
    ("mnpo", (0.2,), 220),
    ("nash_rs", (1.0,), 100),
    ("nash_rs", (3.0,), 1000),
)


@pytest.mark.parametrize("name, constants, most", CONVERGE)
def test_reaches_the_regularised_equilibrium(name, constants, most):
    """To rounding, in about the steps that the table prints; and the equilibrium is the literal."""
    path = getattr(solvers, f"{name}_path")(*GAME, 1600, *constants)
    distances = total_variation(path, NASH)
    assert distances[-1] < 1e-12
    assert most / 2 < solvers.steps_to(distances) <= most or name == "nash_rs"
    # At rest: the last step moves nothing.
    assert (path[-1] - path[-2]).abs().max() < 1e-12


@pytest.mark.parametrize("game", RANDOM)
def test_reaches_it_on_random_games(game):
    p, log_ref, tau = game
    nash = fixed_point(*game)
    for name in ("inpo", "mpo", "egpo", "nash_prox", "mnpo", "nash_rs"):
        assert total_variation(run(name, *game, 500)[-1], nash) < 1e-10, name


def radius(step, log_pi):
    """The largest factor by which a step multiplies a small error at its fixed point."""
    assert (step(log_pi) - log_pi).abs().max() < 1e-10
    return torch.linalg.eigvals(torch.func.jacrev(step)(log_pi)).abs().max()


@pytest.mark.parametrize("game", [GAME, *RANDOM])
@pytest.mark.parametrize("solver", ["inpo", "nash_rs"])
def test_limits(solver, game):
    """At the limit the step's Jacobian, by autograd, has spectral radius 1; on either side not.

    Where a game turns little, INPO's limit is below tau and Nash-RS's above 1/tau: there every step
    in its range converges.
    """
    p, log_ref, tau = game
    nash = fixed_point(*game)
    limit = getattr(solvers, f"{solver}_limit")(*game).item()
    largest = 1 / limit if solver == "inpo" else limit

    def radius_at(size):
        def step(log_pi):
            opponent = log_pi if solver == "inpo" else respond(p, log_ref, tau, log_pi)
            return move(p, log_ref, tau, size, log_pi, opponent)

        return radius(step, nash)

    assert radius_at(0.9 * min(largest, 1 / tau)) < 1 - 1e-3
    if largest * 1.1 < 1 / tau:
        assert abs(radius_at(largest) - 1) < 1e-9
        assert radius_at(1.1 * largest) > 1 + 1e-3
    else:
        assert game is not GAME and radius_at(1 / tau) < 1


def test_inpo_circles_below_its_limit():
    """At .3, a hundredth below, it keeps a distance of .05 for ever; a little above it arrives."""
    assert abs(solvers.inpo_limit(*GAME) - 0.303) < 5e-4
    tail = total_variation(solvers.inpo_path(*GAME, 4000, 0.3)[-400:], NASH)
    assert 0.05 < tail.min() and tail.max() < 0.07
    assert total_variation(solvers.inpo_path(*GAME, 4000, 0.31)[-1], NASH) < 1e-11
    # MNPO's two policies damp the turn, five are too many at .2.
    five = total_variation(solvers.mnpo_path(*GAME, 1200, 0.2, (0.2,) * 5)[-200:], NASH)
    assert five.min() > 0.1


@pytest.mark.parametrize("game", [GAME, *RANDOM])
def test_what_nash_rs_rejects(game):
    """At the equilibrium e^(1/(2 tau) + KL(pi, pi_ref)) draws for one that is accepted."""
    p, log_ref, tau = game
    nash = fixed_point(*game)
    draws = (1 / (2 * tau) + bandit.kl(nash, log_ref)).exp()
    assert abs(solvers.acceptance(p, log_ref, tau, nash) * draws - 1) < 1e-9


def test_nash_rs_goes_on_for_ever_above_its_limit():
    assert abs(solvers.nash_rs_limit(*GAME) - 3.30) < 5e-3
    assert total_variation(solvers.nash_rs_path(*GAME, 1200, 3.5)[-100:], NASH).min() > 0.01


def test_last_iterates_of_the_unregularised_game():
    """COMAL, MPO with a moving magnet and ONPO go on where the regularised solvers stop."""
    p, log_ref, tau = GAME
    assert unregularised_gap(NASH, p) > 0.05
    comal = unregularised_gap(solvers.comal_path(*GAME, 2000, 0.5, 100), p)
    moving = unregularised_gap(solvers.mpo_path(*GAME, 1000, 2.0, 20), p)
    onpo = unregularised_gap(solvers.onpo_path(p, log_ref, 2000, 0.5), p)
    assert comal[-1] < 1e-8 and moving[-1] < 1e-14
    assert 1e-4 < onpo[1000] < 4e-4 and onpo[-1] < 1e-6
    assert unregularised_gap(solvers.onpo_path(p, log_ref, 2000, 1.0)[-1], p) < 1e-14


def test_spo_reaches_it_on_average_only():
    """The last iterate leaves for the border; the average's gap halves in four times the steps."""
    p, log_ref, _ = GAME
    path = solvers.spo_path(p, log_ref, 8000, 1.0)
    last = unregularised_gap(path, p)
    mean = unregularised_gap(solvers.average(path), p)
    assert last[0] < 0.13 and last[-2000:].min() > 0.25 and last[-2000:].max() > 0.75
    assert path[-2000:].exp().amax(-1).mean() > 0.9
    assert mean[2000] < 0.015 and mean[-1] < 0.6 * mean[2000]


def test_the_average_is_of_laws():
    """Of (1/2, 1/2) and (1/10, 9/10): (3/10, 7/10), which no mean of logarithms gives."""
    path = torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=DOUBLE).log()
    expected = torch.tensor([[0.5, 0.5], [0.3, 0.7]], dtype=DOUBLE)
    torch.testing.assert_close(solvers.average(path).exp(), expected, atol=1e-15, rtol=0)


# INPO's loss, and online IPO


def test_inpo_loss_by_hand():
    """d = .8 - .25 * .4 - .75 * .2 = .55, t = 1/(2 * .4) = 1.25, p = .7: .7 * .49 + .3 * 3.24."""
    rows = [torch.tensor([value], dtype=DOUBLE) for value in (0.5, -0.3, 0.1, -0.3, 0.4, 0.2, 0.7)]
    value = inpo_loss(*rows, 0.1, 0.4)
    assert value.shape == (1,) and abs(value.item() - (0.7 * 0.49 + 0.3 * 3.24)) < 1e-14
    # The same pair the other way round, with the other label.
    y, other, ref, ref_other, last, last_other, label = rows
    swapped = inpo_loss(other, y, ref_other, ref, last_other, last, 1 - label, 0.1, 0.4)
    assert abs(swapped - value) < 1e-14
    zero = torch.zeros(3, dtype=DOUBLE)
    start = inpo_loss(*[zero] * 6, torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE), 0.1, 0.4)
    assert start.shape == (3,) and (start - 1 / (4 * 0.4**2)).abs().max() < 1e-14
    # The pair's label may be soft: the slope is 0 where d = (p - 1/2)/eta.
    d = torch.tensor(0.2 / 0.4, dtype=DOUBLE, requires_grad=True)
    inpo_loss(d, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7, 0.1, 0.4).backward()
    assert abs(d.grad) < 1e-14


def one_step(eta):
    """INPO as a method of the lab, whose last policy is always the current one."""

    def loss(logp, logp_other, ref_logp, ref_logp_other, label, tau):
        last, last_other = logp.detach(), logp_other.detach()
        return inpo_loss(
            logp, logp_other, ref_logp, ref_logp_other, last, last_other, label, tau, eta
        )

    return SimpleNamespace(PAIR=ipo.PAIR, loss=loss)


@pytest.mark.parametrize("game", [GAME, *RANDOM])
@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_inpos_first_step_is_online_ipos(game, eta):
    """At pi = pi_t the expected gradient is tau/eta times online IPO's; at another pi_t it is not.

    The policy is neither the reference nor an equilibrium.
    """
    p, log_ref, tau = game
    log_pi = random_policy(len(log_ref), 3)
    ours = bandit.gradient(one_step(eta), log_pi, log_ref, p, tau)
    online = bandit.gradient(ipo, log_pi, log_ref, p, tau)
    assert online.abs().max() > 0.1
    assert (ours - tau / eta * online).abs().max() < 1e-12
    stale = pair_slope(log_pi, log_pi, log_ref, random_policy(len(log_ref), 4), p, tau, eta)
    assert (stale - tau / eta * online).abs().max() > 1e-2


def gradients(value, model):
    """All parameters' gradients as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def test_inpos_first_step_is_online_ipos_in_every_parameter():
    """A GPT-2 in float64, 64 pairs from the real sampler, scored by the policy and its frozen copy.

    The policy is a model of its own, not the reference. After one step of the policy, on the same
    pairs, the copy lags, and the two gradients are no longer proportional: that is INPO.
    """
    w = enumerated.world(0)
    model = enumerated.world(1).reference.requires_grad_(True)
    last = copy.deepcopy(model).requires_grad_(False)
    prompt = policies.pad(enumerated.PROMPTS * 32, "left", enumerated.END)
    generator = torch.Generator().manual_seed(0)
    limit = enumerated.LIMIT
    ids, mask, _ = sampler.sample(model, w.reference, prompt, (0.0, 0.0), generator, limit)
    response = Tokens(ids, mask)
    index = torch.tensor([enumerated.RESPONSES.index(row) for row in response.lists()])
    y, other = index.chunk(2)
    x = torch.arange(len(prompt.ids)) % len(enumerated.PROMPTS)
    label = w.preferences[x, y, other]
    ref = w.log_ref[x, y], w.log_ref[x, other]
    tau, eta = 0.1, 0.7
    with torch.no_grad():
        copied = policies.log_prob(last, prompt.repeat(2), response).chunk(2)

    def both():
        scored = policies.log_prob(model, prompt.repeat(2), response).chunk(2)
        online = gradients(ipo.loss(*scored, *ref, label, tau).mean(), model)
        scored = policies.log_prob(model, prompt.repeat(2), response).chunk(2)
        return gradients(inpo_loss(*scored, *ref, *copied, label, tau, eta).mean(), model), online

    ours, online = both()
    assert online.norm() > 1 and len(online) > 10000
    assert (ours - tau / eta * online).abs().max() < 1e-10 * online.abs().max()
    with torch.no_grad():
        start = 0
        for parameter in model.parameters():
            step = online[start : start + parameter.numel()].view_as(parameter)
            parameter -= 1e-3 * step
            start += parameter.numel()
    ours, online = both()
    assert (ours - tau / eta * online).norm() > 1e-2 * (tau / eta * online).norm()


# The file's own tools


def test_a_step_out_of_range_is_refused():
    p, log_ref, tau = GAME
    for size in (0.0, -1.0, 10.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a step of"):
            move(p, log_ref, tau, size, log_ref, log_ref)
    # At eta = tau the base has no weight: INPO is then the best response, which need not converge.
    for awkward in (0.1, 0.07, 0.3, 0.049):
        stepped = solvers.inpo_path(p, log_ref, awkward, 1, awkward)[1]
        assert (stepped - respond(p, log_ref, awkward, log_ref)).abs().max() < 1e-12


def test_steps_to_counts_to_the_last_time():
    far, near = 1.0, 1e-7
    for distances, expected in (
        ([far, near, far, near, near], 3),
        ([near, near], 0),
        ([near, far], None),
        ([far, float("nan")], None),
    ):
        assert solvers.steps_to(torch.tensor(distances)) == expected


def test_the_command_prints_a_row_a_solver_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solvers, "STEPS", 150)
    assert solvers.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "0.374848, 0.281510, 0.328346, 0.015296" in printed
    rows = {}
    for line in printed.splitlines():
        rows[line[:20].strip()] = line.split()
    names = "INPO COMAL MPO EGPO Nash-Prox ONPO SPO MNPO Nash-RS Nash-MD"
    for name in names.split():
        assert any(row.startswith(name) for row in rows), name
    # steps to 1e-6 is the last but one column, where the source is one word
    assert rows["EGPO eta 1"][-2] == "98" and rows["Nash-Prox eta .2"][-2] == "57"
    assert rows["INPO eta .3"][-2] == "-" and "circles" in rows["INPO eta .3"]
    assert (tmp_path / "solvers.png").stat().st_size > 10000


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solvers, "STEPS", 5)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        solvers.main(["--out", str(tmp_path / "file" / "below")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
