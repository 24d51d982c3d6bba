"""studies/stationary.py: the gradient of every loss is 0 at its predicted point, and only there.

The predictions do not call the losses; the gradients do nothing else. 1e-8 is asked for, Newton's
method leaves some 1e-11.
"""

import torch

import bandit
import enumerated
from job.options import find_method
from studies import stationary
from studies.stationary import bradley_terry_game, cyclic_game, gradient, loss_of

NAMES = {
    *("cpo", "cringe", "dpop", "f_dpo", "gpo", "npo"),
    *("orpo", "r_dpo", "simpo", "slic_hf", "tdpo"),
}
WITHOUT_REFERENCE = ("simpo", "cpo", "orpo", "slic_hf", "cringe")


def nudged(log_pi, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(len(log_pi), generator=generator, dtype=torch.float64)
    return torch.log_softmax(log_pi + size * step / step.norm(), 0)


def check(planned):
    """Every row: a policy, no gradient there, and one beside it that is larger than 1e-6."""
    seen = set()
    for game, name, loss, _, point in planned:
        seen.add(name.split()[0].strip(","))
        assert torch.logsumexp(point, 0).abs() < 1e-10, name
        assert gradient(loss, point, game).abs().max() < 1e-8, name
        assert gradient(loss, nudged(point, 0.1), game).abs().max() > 1e-6, name
    return seen


def test_recorded_pairs():
    """Three Bradley-Terry games, two taus; every method of the room has a row.

    Games in which DPOP does not stop on a kink, where some pi(y) is pi_ref(y) and no gradient 0.
    """
    for seed, tau in ((0, 0.5), (1, 0.5), (6, 0.8)):
        assert check(stationary.offline_plan(bradley_terry_game(seed, tau))) == NAMES


def test_the_policys_own_pairs():
    """Three games with a cycle."""
    for seed in range(3):
        assert check(stationary.online_plan(cyclic_game(seed))) >= {"gpo", "npo", "dpo"}


def test_the_points_are_those_that_the_table_names():
    """RLHF is pi_ref exp(r/tau)/Z by hand; TDPO2 lies between it and the reference in KL; a flatter
    game leads less far; a margin leads further apart than none."""
    game = bradley_terry_game(0)
    rlhf = game.log_ref.exp() * (game.rewards / game.tau).exp()
    torch.testing.assert_close(stationary.rlhf(game).exp(), rlhf / rlhf.sum())
    away = [bandit.kl(stationary.tdpo_point(game, alpha), game.log_ref) for alpha in (0, 0.5, 5)]
    assert away[0] > away[1] > away[2] > 0
    torch.testing.assert_close(stationary.tdpo_point(game, 0.0), stationary.rlhf(game))
    torch.testing.assert_close(stationary.dpop_point(game, 0.0), stationary.rlhf(game))
    cyclic = cyclic_game(0)
    plain, flat = (stationary.dpo_online_point(cyclic, smoothing) for smoothing in (0.0, 0.2))
    assert bandit.kl(flat, cyclic.log_ref) < bandit.kl(plain, cyclic.log_ref)
    spread = [stationary.simpo_point(game, gamma) for gamma in (0.0, 1.0)]
    assert spread[1].max() - spread[1].min() > spread[0].max() - spread[0].min()


def test_what_forgets_the_reference():
    """The same point for two references; the methods that have one in their loss move with it."""
    game = bradley_terry_game(0)
    moved = game._replace(log_ref=nudged(game.log_ref, 1.0))
    for (first, name, loss, _, point), (second, *_) in zip(
        stationary.offline_plan(game), stationary.offline_plan(moved), strict=True
    ):
        assert gradient(loss, point, first).abs().max() < 1e-8
        forgets = name.split()[0] in WITHOUT_REFERENCE
        assert (gradient(loss, point, second).abs().max() < 1e-8) == forgets, name


def expected(loss, log_pi, game):
    """The expected loss on recorded pairs, all n x n of them by hand."""
    law = game.log_data.exp()
    value = loss(
        *(log_pi[:, None], log_pi[None]),
        *(game.log_ref[:, None], game.log_ref[None]),
        *(game.preferences, game.tau),
    )
    return (law[:, None] * law[None] * value).sum()


def test_dpop_stays_at_the_reference():
    """Pairs from pi_ref: at 1.01 times the penalty of kept_penalty every direction costs, at 0.99
    times one gains. There is a kink: the gradient that autograd gives is not 0."""
    game = bradley_terry_game(0)
    game = game._replace(log_data=game.log_ref)
    least = stationary.kept_penalty(game)
    for factor, stays in ((1.01, True), (0.99, False)):
        loss = loss_of("dpop", penalty=factor * least)
        start, gains = expected(loss, game.log_ref, game), 0
        for seed in range(200):
            gains += expected(loss, nudged(game.log_ref, 1e-4, seed), game) < start
        wins = bandit.win_rate(game.preferences, game.log_ref)
        pi = game.log_ref.exp()
        pi[wins.argmax()] += 1e-5  # the one direction in which it gains first
        pi[wins.argmin()] -= 1e-5
        gains += expected(loss, pi.log(), game) < start
        assert (gains == 0) == stays
    assert gradient(loss, game.log_ref, game).abs().max() > 1e-3


def test_npo_runs_away_from_recorded_pairs():
    """At its zero the expected loss is a maximum: every direction lowers it. Its online point has
    (1 - p(y > pi)) sigmoid(tau d) equal for all y."""
    game = bradley_terry_game(0)
    loss, point = loss_of("npo"), stationary.npo_point(game)
    top = expected(loss, point, game)
    for seed in range(50):
        assert expected(loss, nudged(point, 0.1, seed), game) < top
    cyclic = cyclic_game(0)
    point = stationary.npo_online_point(cyclic)
    lost = 1 - bandit.win_rate(cyclic.preferences, point)
    level = lost * torch.sigmoid(cyclic.tau * (point - cyclic.log_ref))
    assert level.max() - level.min() < 1e-10


def test_lengths_of_real_responses():
    """The 85 responses of enumerated.py's GPT-2, one to three tokens long, as the actions, its
    probabilities as the reference: R-DPO stops at pi_ref exp((r - alpha |y|)/tau), SimPO at exp(|y|
    (r/tau + c)), ORPO at the solved point of means. With the lengths of others none does."""
    w = enumerated.world(0)
    length = w.batch[1].lengths()[: len(enumerated.RESPONSES)].double()
    generator = torch.Generator().manual_seed(0)
    rewards = 0.3 * torch.randn(len(length), generator=generator, dtype=torch.float64)
    log_ref = w.log_ref[0]
    game = stationary.Game(bandit.bradley_terry(rewards), log_ref, 0.5, log_ref, rewards)
    cases = (
        ("r_dpo", {"alpha": 0.3}, stationary.shorter_point(game, 0.3, length)),
        ("simpo", {"gamma": 0.0}, stationary.simpo_lengths_point(game, length)),
        ("orpo", {}, stationary.orpo_point(game, length)),
    )
    assert set(length.tolist()) == {1.0, 2.0, 3.0}
    for name, constants, point in cases:
        lengths = dict(length=length[:, None], length_other=length[None])
        assert gradient(loss_of(name, **constants, **lengths), point, game).abs().max() < 1e-8
        other = dict(length=length.flip(0)[:, None], length_other=length.flip(0)[None])
        assert gradient(loss_of(name, **constants, **other), point, game).abs().max() > 1e-6, name
    assert find_method("r_dpo").OFFLINE


def test_the_table_is_printed(capsys):
    stationary.main()
    out = capsys.readouterr().out
    assert out.count("RLHF") >= 5 and "nan" not in out
    for name in NAMES:
        assert f"\n{name}" in out
