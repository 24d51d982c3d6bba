"""The toy test the project promises: online IPO and Nash-MD reach the same equilibrium.

And a broken loss is noticed. Everything is exact and in float64, on games of at least three actions
with a cycle in the preferences and a non-uniform reference: on two actions, on transitive games or
with a uniform reference wrong programs pass (one test shows it). The solver is checked against
closed forms first, so that it can judge the rest.
"""

import json
import math
import os
from types import SimpleNamespace

import matplotlib.image
import numpy
import pytest
import torch

import bandit
import dpo
import ipo
import ipo_md
import nash_md
import rl
from bandit import descend, duality_gap, fixed_point, respond, total_variation
from ipo_md import mixture

DOUBLE = torch.float64
BIASED = torch.tensor([0.6, 0.3, 0.1], dtype=DOUBLE).log()


def toy_games():
    """Name -> (preferences, log_ref, tau): the biased cycle, random ones of 4 and 6 actions."""
    generator = torch.Generator().manual_seed(7)
    four = bandit.random_game(4, generator)
    six = bandit.random_game(6, generator)
    return {"cycle": (bandit.cycle(0.4), BIASED, 0.1), "four": (*four, 0.2), "six": (*six, 0.15)}


GAMES = toy_games()


def gap_to(target, method, game, beta=0.0, law=mixture):
    """Total variation between where exact gradients of method lead and target."""
    preferences, log_ref, tau = game
    rate = tau / (tau**2 + 0.25)  # stable: no game turns faster than 1/2
    return total_variation(
        descend(method, preferences, log_ref, tau, beta, law, rate=rate, steps=4000)[-1], target
    ).item()


@pytest.mark.equivalence
@pytest.mark.parametrize("name", GAMES)
def test_online_ipo_and_nash_md_reach_the_same_equilibrium(name):
    """Exact gradients through the two losses, and tabular Nash-MD, which has no gradient at all.

    All reach one policy, the solved one: 1e-9 for the gradients, which converge linearly to
    rounding; 1e-3 for tabular Nash-MD, whose error falls as 1/steps, and a tenfold smaller
    distance after tenfold steps.
    """
    preferences, log_ref, tau = game = GAMES[name]
    nash = fixed_point(*game)
    assert total_variation(nash, log_ref) > 0.05, (
        "the game must move the policy, or the test is empty"
    )
    gaps = [gap_to(nash, method, game) for method in (ipo, nash_md)]
    print(f"total variation to Nash: online IPO {gaps[0]:.1e}, Nash-MD-PG {gaps[1]:.1e}")
    assert max(gaps) < 1e-9
    path = bandit.nash_md_path(preferences, log_ref, tau, 10000)
    early, late = total_variation(path[1000], nash), total_variation(path[10000], nash)
    assert late < 1e-3 and late < early / 5


@pytest.mark.equivalence
@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("beta", [0.125, 0.5])
def test_ipo_md_and_nash_md_pg_share_the_point_of_eq_13(name, beta):
    """And it is not the Nash equilibrium, so a program that ignores beta fails here.

    The mixture is written out: methods and solver share ipo_md.mixture, and would agree on an
    inverted weight.
    """
    preferences, log_ref, tau = game = GAMES[name]
    shifted = fixed_point(*game, beta)
    blend = shifted.exp() ** (1 - beta) * log_ref.exp() ** beta
    response = respond(preferences, log_ref, tau, (blend / blend.sum()).log())
    assert (shifted - response).abs().max() < 1e-10
    gaps = [gap_to(shifted, method, game, beta) for method in (ipo_md, nash_md)]
    print(f"total variation to eq 13's point: IPO-MD {gaps[0]:.1e}, Nash-MD-PG {gaps[1]:.1e}")
    assert max(gaps) < 1e-9
    assert total_variation(shifted, fixed_point(*game)) > 1e-3


@pytest.mark.equivalence
def test_plain_gradient_descent_on_the_logits_reaches_it_too():
    """The lab's step divides by the law of y; without it the zeros are the same, the way slower."""
    preferences, log_ref, tau = GAMES["cycle"]
    for method in (ipo, nash_md):
        path = descend(method, preferences, log_ref, tau, rate=1.0, steps=3000, natural=False)
        assert total_variation(path[-1], fixed_point(*GAMES["cycle"])) < 1e-9


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("method, beta", [(ipo, 0.0), (ipo_md, 0.5), (nash_md, 0.5)])
def test_one_natural_step_by_hand(name, method, beta):
    """Each logit moves by the rate times p(y > mixture) - tau log pi/pi_ref, whoever draws y.

    Divided by another law than the one that draws y, a step has the same zeros: where the methods
    end does not show it.
    """
    preferences, log_ref, tau = GAMES[name]
    generator = torch.Generator().manual_seed(2)
    log_pi = torch.randn(len(log_ref), generator=generator, dtype=DOUBLE).log_softmax(0)
    blend = log_pi.exp() ** (1 - beta) * log_ref.exp() ** beta
    advantage = preferences @ (blend / blend.sum()) - tau * (log_pi - log_ref)
    expected = (log_pi + 0.3 * advantage).log_softmax(0)
    path = descend(method, preferences, log_ref, tau, beta, rate=0.3, steps=1, start=log_pi)
    assert (path[1] - expected).abs().max() < 1e-12


# Each entry of BROKEN breaks one thing that people get wrong. The names say what; the values are
# (PAIR's module, loss, beta, law).


def factor_two(*pair):
    """1/tau where IPO's target is 1/(2 tau)."""
    return ipo.loss(*pair[:5], pair[5] / 2)


def wrong_sign(logp, other, ref, ref_other, p, tau):
    """The loser is preferred."""
    return ipo.loss(logp, other, ref, ref_other, 1 - p, tau)


def swapped_reference(logp, other, ref, ref_other, p, tau):
    """Each response is held against the other's reference."""
    return ipo.loss(logp, other, ref_other, ref, p, tau)


def no_reference(logp, other, ref, ref_other, p, tau):
    """h without pi_ref: an entropy bonus in place of the KL."""
    return ipo.loss(logp, other, 0 * ref, 0 * ref_other, p, tau)


def nash_factor_two(logp, other, ref, ref_other, p, tau):
    """The KL twice."""
    return nash_md.loss(logp, other, ref, ref_other, p, 2 * tau)


def nash_wrong_sign(logp, other, ref, ref_other, p, tau):
    return nash_md.loss(logp, other, ref, ref_other, 1 - p, tau)


def nash_swapped_reference(logp, other, ref, ref_other, p, tau):
    return nash_md.loss(logp, other, ref_other, ref, p, tau)


def nash_without_kl(logp, other, ref, ref_other, p, tau):
    return -(p - 0.5) * logp


def nash_undetached(logp, other, ref, ref_other, p, tau):
    """Differentiates the log-ratio inside the advantage."""
    return -(p - 0.5 - tau * (logp - ref)) * logp


def inverted(log_pi, log_ref, beta):
    """beta on the policy."""
    return mixture(log_ref, log_pi, beta)


def arithmetic(log_pi, log_ref, beta):
    return ((1 - beta) * log_pi.exp() + beta * log_ref.exp()).log()


def uncentred(logp, other, ref, ref_other, p, tau):
    """The one-sided loss on samples of the mixture: Prop 5.1's trap."""
    return nash_md.loss(logp, other, ref, ref_other, p, tau)


BROKEN = {
    "IPO: target 1/tau": (ipo, factor_two, 0.0, mixture),
    "IPO: sign": (ipo, wrong_sign, 0.0, mixture),
    "IPO: swapped reference": (ipo, swapped_reference, 0.0, mixture),
    "IPO: no reference": (ipo, no_reference, 0.0, mixture),
    "Nash-MD-PG: KL twice": (nash_md, nash_factor_two, 0.0, mixture),
    "Nash-MD-PG: sign": (nash_md, nash_wrong_sign, 0.0, mixture),
    "Nash-MD-PG: swapped reference": (nash_md, nash_swapped_reference, 0.0, mixture),
    "Nash-MD-PG: no KL": (nash_md, nash_without_kl, 0.0, mixture),
    "Nash-MD-PG: log-ratio not detached": (nash_md, nash_undetached, 0.0, mixture),
    "IPO-MD: mixture weight inverted": (ipo_md, ipo.loss, 0.125, inverted),
    "Nash-MD-PG: mixture weight inverted": (nash_md, nash_md.loss, 0.125, inverted),
    "IPO-MD: arithmetic mixture": (ipo_md, ipo.loss, 0.125, arithmetic),
    "IPO-MD: both from the policy": (ipo, ipo.loss, 0.125, mixture),
    "IPO-MD: one from the policy": (nash_md, ipo.loss, 0.125, mixture),
    "Prop 5.1: uncentred field": (ipo_md, uncentred, 0.125, mixture),
}


def damage(broken, game):
    """Where the broken method ends, as its total variation to the right point.

    The right ones stay below 1e-9.
    """
    sampling, loss, beta, law = BROKEN[broken]
    preferences, log_ref, tau = game
    method = SimpleNamespace(PAIR=sampling.PAIR, loss=loss)
    right = fixed_point(preferences, log_ref, tau, beta)
    rate = tau / (tau**2 + 0.25)
    one_sided = loss is nash_md.loss or loss.__name__.startswith(("nash", "uncentred"))
    unit = 1.0 if one_sided else tau / 4
    log_pi = log_ref
    for _ in range(1500):
        weight = law(log_pi, log_ref, beta) if method.PAIR[0] == "mixture" else log_pi
        slope = bandit.gradient(method, log_pi, log_ref, preferences, tau, beta, law)
        step = rate * unit * slope / weight.exp()
        # Clamped: some of the wrong fields run away.
        log_pi = torch.log_softmax(log_pi - step.clamp(-1, 1), -1)
    return total_variation(log_pi, right).item()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_loss_is_noticed(broken):
    """Every planted mistake misses its point by more than 1e-4 on the cycle.

    The equivalence test above allows 1e-9.
    """
    off = damage(broken, GAMES["cycle"])
    print(f"{broken}: total variation {off:.1e}")
    assert off > 1e-4, f"{broken} ends at the right policy to {off:.1e}"


def test_two_actions_are_blind():
    """Why the games above have three: with two, offline, online and every beta share one point.

    It has a closed form.
    """
    preferences, tau = bandit.cycle(0.2)[:2, :2], 0.1
    log_ref = torch.tensor([0.3, 0.7], dtype=DOUBLE).log()
    closed = math.log(0.3 / 0.7) + 0.2 / tau
    offline = respond(preferences, log_ref, tau, torch.tensor([0.9, 0.1], dtype=DOUBLE).log())
    online = [fixed_point(preferences, log_ref, tau, beta) for beta in (0.0, 0.5, 0.9)]
    for log_pi in (offline, *online):
        assert (log_pi[0] - log_pi[1]).item() == pytest.approx(closed, abs=1e-11)


# The solver


@pytest.mark.parametrize(
    "count, tau",
    [
        (3, 0.01),
        (20, 0.01),
        (20, 10.0),
        (100, 0.1),
        pytest.param(500, 0.01, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_solver_residual(count, tau, beta):
    """Its own equation, to 1e-10 nats, over tau in [0.01, 10] and up to 500 actions."""
    preferences, log_ref = bandit.random_game(count, torch.Generator().manual_seed(count))
    log_pi = fixed_point(preferences, log_ref, tau, beta)
    response = respond(preferences, log_ref, tau, mixture(log_pi, log_ref, beta))
    assert (log_pi - response).abs().max() < 1e-10
    assert abs(log_pi.exp().sum().item() - 1) < 1e-12


def test_solver_on_hard_games():
    """Tournaments (p is 0 or 1) with a far from uniform reference at tau = 0.01.

    These are sharp cycles that plain iteration loses.
    """
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        preferences, log_ref = bandit.random_game(5, generator)
        preferences = 0.5 + (preferences - 0.5).sign() / 2
        log_ref = torch.log_softmax(3 * log_ref, 0)
        log_pi = fixed_point(preferences, log_ref, 0.01)
        assert (log_pi - respond(preferences, log_ref, 0.01, log_pi)).abs().max() < 1e-10
        assert duality_gap(log_pi, preferences, log_ref, 0.01).abs() < 1e-10


def test_solver_refuses_what_it_cannot_solve():
    with pytest.raises(ValueError, match="larger tau"):
        fixed_point(bandit.cycle(0.4), BIASED, 0.1, tolerance=1e-30)


def test_plain_iteration_diverges_where_the_solver_stands():
    """The reason for Newton's method: iterating eq 12 on the cycle at tau = 0.1 never settles."""
    log_pi, nash = BIASED, fixed_point(bandit.cycle(0.4), BIASED, 0.1)
    for _ in range(1000):
        log_pi = respond(bandit.cycle(0.4), BIASED, 0.1, log_pi)
    assert total_variation(log_pi, nash) > 0.1


def test_solver_agrees_with_the_limit_of_rock_paper_scissors():
    """tau -> 0 with margins a, b, c (1 over 2, 2 over 3, 3 over 1): (b, c, a)/(a + b + c).

    And the error falls with tau.
    """
    a, b, c = 0.4, 0.1, 0.2
    preferences = 0.5 + torch.tensor([[0, a, -c], [-a, 0, b], [c, -b, 0]], dtype=DOUBLE)
    limit = (torch.tensor([b, c, a], dtype=DOUBLE) / (a + b + c)).log()
    far = total_variation(fixed_point(preferences, BIASED, 1e-3), limit).item()
    near = total_variation(fixed_point(preferences, BIASED, 1e-4), limit).item()
    assert near < 1e-3 and near == pytest.approx(far / 10, rel=0.05)


def test_fixed_points_of_the_other_methods():
    """RL and online DPO meet at the RLHF policy of a Bradley-Terry game.

    Elsewhere DPO's root is where its gradient vanishes, and not the Nash point.
    """
    rewards = torch.tensor([0.0, 0.3, -0.2, 0.5], dtype=DOUBLE)
    preferences, log_ref, tau = bandit.bradley_terry(rewards), GAMES["four"][1], 0.3
    fitted = bandit.fit_reward(preferences, log_ref)
    assert (fitted - (rewards - rewards.mean())).abs().max() < 1e-10
    rlhf = bandit.rlhf_policy(rewards, log_ref, tau)
    assert total_variation(bandit.dpo_point(preferences, log_ref, tau), rlhf) < 1e-10
    assert total_variation(descend(dpo, preferences, log_ref, tau, rate=2.0)[-1], rlhf) < 1e-8
    assert total_variation(descend(rl, rewards[:, None] - rewards, log_ref, tau)[-1], rlhf) < 1e-8
    preferences, log_ref, tau = GAMES["cycle"]
    point = bandit.dpo_point(preferences, log_ref, tau)
    assert total_variation(point, fixed_point(preferences, log_ref, tau)) > 0.05, (
        "online DPO is not a Nash solver"
    )
    assert bandit.gradient(dpo, point, log_ref, preferences, tau).abs().max() < 1e-11


def cross_entropy(rewards, preferences, log_data):
    """Of Bradley-Terry's p on pairs whose responses are both drawn from the data: nats a pair."""
    total = 0.0
    for i, law in enumerate(log_data.exp()):
        for j, law_other in enumerate(log_data.exp()):
            log_p = torch.nn.functional.logsigmoid(rewards[i] - rewards[j])
            log_q = torch.nn.functional.logsigmoid(rewards[j] - rewards[i])
            p = preferences[i, j]
            total = total - law * law_other * (p * log_p + (1 - p) * log_q)
    return total


def least_cross_entropy(preferences, log_data):
    """The rewards of the least cross-entropy, sum 0, by another minimiser than the lab's."""
    rewards = torch.zeros(len(preferences), dtype=DOUBLE, requires_grad=True)
    settings = dict(max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0)
    optimizer = torch.optim.LBFGS([rewards], line_search_fn="strong_wolfe", **settings)

    def closure():
        optimizer.zero_grad()
        value = cross_entropy(rewards, preferences, log_data)
        value.backward()
        return value

    optimizer.step(closure)
    found = rewards.detach()
    return found - found.mean()


def test_the_reward_depends_on_the_datas_law(monkeypatch):
    """It is the minimum of the cross-entropy on pairs of that very law, and of uniform pairs
    another one; the table's RL takes the reference's. 1e-5: the other minimiser's."""
    preferences, log_ref, tau = GAMES["six"]
    uniform = torch.zeros(6, dtype=DOUBLE).log_softmax(0)
    fitted = {}
    for name, law in dict(reference=log_ref, uniform=uniform).items():
        fitted[name] = bandit.fit_reward(preferences, law)
        assert (fitted[name] - least_cross_entropy(preferences, law)).abs().max() < 1e-5, name
    assert (fitted["reference"] - fitted["uniform"]).abs().max() > 0.05
    monkeypatch.setattr(bandit, "descend", lambda *given, **named: log_ref[None])
    monkeypatch.setattr(bandit, "nash_md_path", lambda *given: log_ref[None])
    rows = bandit.run_methods(preferences, log_ref, tau, 0.125)
    predicted = {name: log_pi for name, log_pi, _, _ in rows}
    rlhf = (log_ref + fitted["reference"] / tau).log_softmax(0)
    assert total_variation(predicted["RL"], rlhf) < 1e-9


# Minibatches of pairs


def sampled_gradient(method, log_pi, log_ref, preferences, tau, beta, batch, generator):
    """The gradient on the logits from batch pairs drawn for each policy of log_pi [R, n].

    Averaged over the pairs, as the trainer does.
    """
    logits = log_pi.detach().clone().requires_grad_()
    log_pi = logits.log_softmax(-1)
    laws = {"policy": log_pi, "mixture": mixture(log_pi, log_ref, beta)}
    y, other = (
        torch.multinomial(laws[who].detach().exp(), batch, True, generator=generator)
        for who in method.PAIR
    )
    values = method.loss(
        log_pi.gather(1, y),
        log_pi.gather(1, other),
        log_ref[y],
        log_ref[other],
        preferences[y, other],
        tau,
    )
    return torch.autograd.grad(values.mean(1).sum(), logits)[0]


@pytest.mark.parametrize("method, beta", [(ipo, 0.0), (ipo_md, 0.5), (nash_md, 0.5), (dpo, 0.0)])
def test_sampled_gradients_average_to_the_exact_one(method, beta):
    """20,000 gradients of 8 pairs each: every coordinate within 4 standard errors.

    False alarm: 6 x 6e-5 a method.
    """
    preferences, log_ref, tau = GAMES["six"]
    log_pi = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=DOUBLE).log_softmax(0)
    many = sampled_gradient(
        method,
        log_pi.expand(20000, -1),
        log_ref,
        preferences,
        tau,
        beta,
        8,
        torch.Generator().manual_seed(4),
    )
    error = many.mean(0) - bandit.gradient(method, log_pi, log_ref, preferences, tau, beta)
    assert (error.abs() < 4 * many.std(0) / 20000**0.5).all()


@pytest.mark.equivalence
@pytest.mark.parametrize("method, beta", [(ipo, 0.0), (ipo_md, 0.5), (nash_md, 0.5)])
def test_sampled_training_converges_within_its_sampling_error(method, beta):
    """256 independent runs with minibatches of 8 pairs and a falling rate, plain gradient descent.

    The mean over the runs is within 4 standard errors, plus 1e-3 for the bias of a finite run, of
    the solved point, and the runs' spread is small: sampling neither moves the fixed point nor
    keeps the runs from it.
    """
    preferences, log_ref, tau = GAMES["four"]
    generator = torch.Generator().manual_seed(5)
    unit = {ipo: tau / 4, ipo_md: tau / 4, nash_md: 1.0}[method]
    log_pi = log_ref.expand(256, -1)
    for step in range(3000):
        rate = 2.0 * unit / (1 + step / 300)
        slope = sampled_gradient(method, log_pi, log_ref, preferences, tau, beta, 8, generator)
        log_pi = (log_pi - rate * slope).log_softmax(-1)
    target, ends = fixed_point(preferences, log_ref, tau, beta).exp(), log_pi.exp()
    assert ((ends.mean(0) - target).abs() < 4 * ends.std(0) / 16 + 1e-3).all(), (
        ends.mean(0) - target,
        ends.std(0) / 16,
    )
    assert ends.std(0).max() < 0.05


# The command


def run(capsys, *arguments):
    """bandit.main in-process: (exit status, what it printed, what it complained)."""
    try:
        status = bandit.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_preferences_of_your_own(capsys, tmp_path):
    """The three formats are one matrix, and the answer is what the solver gives, to 6 decimals."""
    preferences = bandit.cycle(0.3)
    numpy.save(tmp_path / "game.npy", preferences.numpy())
    (tmp_path / "game.json").write_text(json.dumps(preferences.tolist()))
    (tmp_path / "game.csv").write_text(
        "\n".join(",".join(map(str, row)) for row in preferences.tolist()) + "\n\n"
    )
    (tmp_path / "reference.csv").write_text("0.6,0.3,0.1\n")
    for kind in ("csv", "json", "npy"):
        read = bandit.read_preferences(str(tmp_path / f"game.{kind}"))
        assert (read - preferences).abs().max() < 1e-15
    arguments = [
        "--preferences",
        tmp_path / "game.csv",
        "--reference",
        tmp_path / "reference.csv",
        "--tau",
        0.5,
        "--beta",
        0.25,
    ]
    status, out, error = run(capsys, *arguments, "--out", tmp_path / "out")
    assert status == 0 and error == ""
    policies = dict(
        line.rsplit(maxsplit=3)[::3] for line in out[out.index("policy\n") :].splitlines()[1:12]
    )
    wanted = {
        "reference": BIASED,
        "Nash equilibrium": fixed_point(preferences, BIASED, 0.5),
        "IPO-MD 0.25": fixed_point(preferences, BIASED, 0.5, 0.25),
    }
    wanted |= {
        "online IPO": wanted["Nash equilibrium"],
        "self-play": wanted["Nash equilibrium"],
        "Nash-MD-PG 0.25": wanted["IPO-MD 0.25"],
    }
    for method, log_pi in wanted.items():
        assert policies[method] == f"{log_pi[2].exp():.6f}", method
    for picture in ("fig6.png", "duality_gap.png"):  # not blank: many colours
        pixels = matplotlib.image.imread(tmp_path / "out" / picture).reshape(-1, 4)
        assert len(numpy.unique(pixels, axis=0)) > 20


GOOD = "0.5,0.7\n0.3,0.5\n"
BAD = {
    "not square": ("p.csv", "0.5,0.7,0.2\n0.3,0.5,0.1\n", [], "square"),
    "ragged": ("p.csv", "0.5,0.7\n0.3\n", [], "row 2"),
    "a word": ("p.csv", "0.5,x\n0.3,0.5\n", [], "row 1"),
    "out of range": ("p.csv", "0.5,1.7\n-0.7,0.5\n", [], "row 1, column 2"),
    "not antisymmetric": ("p.csv", "0.5,0.7\n0.4,0.5\n", [], "row 1, column 2"),
    "diagonal": ("p.csv", "0.6,0.7\n0.3,0.5\n", [], "row 1, column 1"),
    "nan": ("p.csv", "0.5,nan\n0.3,0.5\n", [], "row 1, column 2"),
    "empty": ("p.csv", "", [], "square"),
    "broken json": ("p.json", "[[0.5, 0.7], [0.3", [], "p.json"),
    "json object": ("p.json", '{"a": 1}', [], "p.json"),
    "json null": ("p.json", "[[0.5, null], [0.3, 0.5]]", [], "row 1"),
    "json number": ("p.json", "0.5", [], "p.json"),
    "not an npy": ("p.npy", "hello", [], "p.npy"),
    "extension": ("p.txt", GOOD, [], ".csv"),
    "tau 0": ("p.csv", GOOD, ["--tau", "0"], "--tau"),
    "tau nan": ("p.csv", GOOD, ["--tau", "nan"], "--tau"),
    "tau 1e300": ("p.csv", GOOD, ["--tau", "1e300"], "--tau 1e+300: give"),
    "tau 1e-300": ("p.csv", GOOD, ["--tau", "1e-300"], "--tau 1e-300: give"),
    "tau a word": ("p.csv", GOOD, ["--tau", "small"], "--tau"),
    "beta": ("p.csv", GOOD, ["--beta", "1.5"], "--beta"),
    "claims.py's option": ("p.csv", GOOD, ["--games", "0"], "--games"),
    "unknown option": ("p.csv", GOOD, ["--taus", "1"], "--taus"),
    "reference missing": ("p.csv", GOOD, ["--reference", "nowhere.csv"], "--reference nowhere.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, case):
    """The line names the option or file and the place; nothing is written."""
    name, text, options, expected = BAD[case]
    (tmp_path / name).write_text(text)
    status, out, error = run(
        capsys, "--preferences", tmp_path / name, *options, "--out", tmp_path / "out"
    )
    assert status == 2 and out == ""
    assert error.count("\n") == 1 and error.startswith("bandit.py: error: ") and expected in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.5,0.5\n", "2 probabilities"),
        ("0.5,0.5,0\n", "entry 3"),
        ("0.5,0.2,0.1\n", "sums to"),
        ("0.5,0.5,nan\n", "entry 3"),
    ],
)
def test_bad_references(capsys, tmp_path, text, expected):
    (tmp_path / "p.json").write_text(json.dumps(bandit.cycle(0.4).tolist()))
    (tmp_path / "q.csv").write_text(text)
    status, _, error = run(
        capsys,
        "--preferences",
        tmp_path / "p.json",
        "--reference",
        tmp_path / "q.csv",
        "--out",
        tmp_path / "out",
    )
    assert status == 2 and error.count("\n") == 1 and expected in error and "q.csv" in error
    status, _, error = run(capsys, "--reference", tmp_path / "q.csv")
    assert status == 2 and "--preferences" in error


def test_out_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "p.csv").write_text(GOOD)
    (tmp_path / "file").write_text("mine")
    status, _, error = run(capsys, "--preferences", tmp_path / "p.csv", "--out", tmp_path / "file")
    assert (
        status == 2
        and error.count("\n") == 1
        and "--out" in error
        and (tmp_path / "file").read_text() == "mine"
    )


def test_certain_preferences_stay_finite():
    """p = 1 everywhere at tau = 0.02: rewards are clipped, probabilities underflow, none is NaN."""
    above = torch.ones(3, 3, dtype=DOUBLE).triu(1)
    preferences = 0.5 + above / 2 - above.T / 2
    rewards = bandit.fit_reward(preferences, BIASED)
    assert rewards.isfinite().all()
    for method, labels in ((ipo, preferences), (rl, rewards[:, None] - rewards)):
        end = descend(method, labels, BIASED, 0.02, rate=0.5, steps=500)[-1]
        assert end.isfinite().all(), method.__name__


def test_a_pickle_is_not_opened(capsys, tmp_path):
    numpy.save(tmp_path / "p.npy", numpy.array([[object()]]), allow_pickle=True)
    status, _, error = run(capsys, "--preferences", tmp_path / "p.npy")
    assert status == 2 and error.count("\n") == 1


ROUGH = {
    "no preferences": (["--preferences", ""], "--preferences: is empty"),
    "no folder": (["--out", " "], "--out: is empty"),
    "a device": (["--preferences", "{zero}"], "is no file"),
    "a pipe": (["--preferences", "{pipe}"], "is no file"),
    "words": (["--preferences", "{words}"], "n rows of n probabilities"),
    "a reference of words": (["--preferences", "{game}", "--reference", "{words}"], "one probab"),
    "a short reference": (["--preferences", "{game}", "--reference", "{one}"], "one probability"),
    "control characters": (["--preferences", "{words}\x1b[31m.csv"], "\\x1b[31m"),
}


@pytest.mark.parametrize("case", ROUGH)
def test_rough_input(tmp_path, capsys, case):
    """One line that says what is wanted, exit 2, nothing waited for and no folder made."""
    argv, expected = ROUGH[case]
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.json")
    for name, text in dict(words="a,b\nc,d", game="0.5,0.9\n0.1,0.5", one="1").items():
        (tmp_path / f"{name}.csv").write_text(text)
    paths = {path.stem: path for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        bandit.main([word.format(**paths) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and expected in error
    assert len(list(tmp_path.iterdir())) == 5
