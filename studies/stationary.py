"""Where the losses of losses/ stop: predicted points of small games, and the gradients there.

Responses are four actions, so of one token. The prediction is by hand, in closed form or as an
equation that Newton's method solves; the gradient is the exact expectation of the method's own
loss. It tells a Bradley-Terry or RLHF policy from a Nash equilibrium, and from a policy that has
forgotten the reference.
    offline   pairs y, y' from a law mu with full support, labels of a Bradley-Terry game: what
              fixed data lead to, whoever drew them
    online    both from the policy, on a game with a cycle; sampling has no gradient
Of one token a mean is a sum, so SimPO and ORPO have rows of their own with LENGTHS, as if the four
actions were responses of so many tokens; so has R-DPO, which is DPO for responses of one length.
Run: python -m studies.stationary    (some seconds)
Left out: responses of several tokens (enumerated.py), and whether a descent gets there.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

import bandit
import dpo
import ipo
from job.options import find_method
from losses import cringe, inpo, tdpo

LENGTHS = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64)  # tokens of the four actions


class Game(NamedTuple):
    """A game and the regularisation: all that a prediction needs."""

    preferences: torch.Tensor  # [n, n]
    log_ref: torch.Tensor  # [n], nats
    tau: float
    log_data: torch.Tensor | None  # [n], the law of recorded responses; None: the policy's own
    rewards: torch.Tensor | None  # [n], nats; None: no rewards explain the game


class Row(NamedTuple):
    """A line of the table."""

    name: str
    where: str  # what the point is
    point: torch.Tensor  # [n], log pi
    size: float  # the largest entry of the loss's gradient on the logits there


def bradley_terry_game(seed=0, tau=0.5):
    """Recorded pairs: four rewards, a reference and another law that the pairs were drawn from."""
    generator = torch.Generator().manual_seed(seed)
    rewards, ref, data = 0.7 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    preferences = bandit.bradley_terry(rewards)
    return Game(preferences, ref.log_softmax(0), tau, data.log_softmax(0), rewards)


def cyclic_game(seed=0, tau=0.5):
    """The policy's own pairs: four actions with a cycle among their preferences."""
    preferences, log_ref = bandit.random_game(4, torch.Generator().manual_seed(seed))
    return Game(preferences, log_ref, tau, None, None)


def gradient(loss, log_pi, game):
    """The loss's exact expected gradient on the logits, [n], pairs drawn as the game says."""
    drawn_by = "policy" if game.log_data is None else "mixture"
    method = SimpleNamespace(PAIR=(drawn_by, drawn_by), loss=loss)

    def data_law(*_):
        return log_pi if game.log_data is None else game.log_data

    given = game.log_ref, game.preferences, game.tau, 0.0, data_law
    return bandit.gradient(method, log_pi, *given)


def won(game, log_pi):
    """2 mu(y) mu(y') p(y > y'), [n, n]: how often the first of an ordered pair is the winner."""
    law = (log_pi if game.log_data is None else game.log_data).exp()
    return 2 * law[:, None] * law[None] * game.preferences


def on_logits(log_pi, slopes):
    """The chain rule of log softmax: slopes [n] on log pi as the gradient on the logits, [n].

    With the normalisation in it, which is 0 for a policy: it makes Newton's equations regular.
    """
    return slopes - log_pi.exp() * slopes.sum() + torch.logsumexp(log_pi, 0)


def solve(field, *starts):
    """The zero of a field of log pi, [n]. Raises ValueError where Newton finds none."""
    for start in starts:
        point = bandit.newton(field, start)
        if point is not None:
            return point
    raise ValueError("Newton's method finds no stationary point from these starts")


def normalise(unnormalised, low, high):
    """The law exp(unnormalised(c)) [n] at the c in [low, high] where it sums to 1, by bisection.

    It rises in c.
    """
    for _ in range(200):
        middle = (low + high) / 2
        if torch.logsumexp(unnormalised(middle), 0) < 0:
            low = middle
        else:
            high = middle
    return torch.log_softmax(unnormalised(low), 0)


def solve_ordered(game, slopes, *starts):
    """The zero of an expected gradient, by the slopes of an ordered pair.

    slopes:
        log pi [n] -> slopes [n, n] on log pi(w) and on log pi(l); rows are winners.
    """

    def field(log_pi):
        of_winner, of_loser = slopes(log_pi)
        weight = won(game, log_pi)
        return on_logits(log_pi, (weight * of_winner).sum(1) + (weight * of_loser).sum(0))

    return solve(field, *starts)


def log_ratios(game, log_pi):
    """d = log pi/pi_ref of every action [n], and h of every pair [n, n], rows first."""
    ratio = log_pi - game.log_ref
    return ratio, ratio[:, None] - ratio[None]


# Recorded pairs of a Bradley-Terry game, method by method


def rlhf(game):
    """Every pair's slope is 0 where tau h = logit p = r - r': pi_ref exp(r/tau)/Z.

    DPO; f-DPO for the reverse KL; R-DPO at equal lengths; DPOP without its penalty; GPO's logistic
    and Savage's f (p = sigmoid(tau h) is the zero of both); TDPO1, as both responses begin after
    the same prompt, so their one KL is one number and cancels with its gradient.
    """
    return bandit.rlhf_policy(game.rewards, game.log_ref, game.tau)


def dpop_point(game, penalty):
    """Solved. z = tau (d(w) - d(l) - penalty max(0, -d(w))) has the slopes tau on d(l), and on d(w)
    tau, or tau (1 + penalty) where d(w) < 0. The loss is convex in the logits: -d is convex and
    the fine a maximum of such, so this is the minimum. Raises ValueError where that is on a kink,
    some d(y) = 0.

    With mu = pi_ref a soft winner is fined for all it loses: mass moved from i to j from pi_ref on
    costs tau/2 (2 (w_i - w_j) + penalty w_i), w the win rates against mu. From
    penalty = 2 (w_max/w_min - 1) on, pi_ref is the minimum, at a kink.
    """

    def slopes(log_pi):
        ratio, h = log_ratios(game, log_pi)
        fine = penalty * torch.relu(-ratio)[:, None]
        push = game.tau * torch.sigmoid(-game.tau * (h - fine))
        return -push * (1 + penalty * (ratio < 0).double())[:, None], push

    return solve_ordered(game, slopes, rlhf(game), game.log_ref)


def kept_penalty(game):
    """The least DPOP penalty at which pi_ref is the minimum, for pairs drawn from pi_ref."""
    wins = bandit.win_rate(game.preferences, game.log_ref)
    return (2 * (wins.max() / wins.min() - 1)).item()


def exponential_point(game):
    """p e^-z = (1 - p) e^z where 2 z = logit p: GPO's exponential is pi_ref exp(r/(2 tau))/Z."""
    return bandit.rlhf_policy(game.rewards, game.log_ref, 2 * game.tau)


def borda_point(game):
    """The square pulls by 2 tau (tau h - (2p - 1)). Averaged over y' it is 0 where
    tau d(y) = 2 p(y > mu) + const: offline IPO's policy at tau/2, pi_ref exp(2 p(. > mu)/tau)/Z.
    """
    return bandit.respond(game.preferences, game.log_ref, game.tau / 2, game.log_data)


def shorter_point(game, alpha, lengths):
    """tau h + alpha (|y| - |y'|) = r - r' for all pairs: pi_ref exp((r - alpha |y|)/tau)/Z.

    A longer response must win by alpha a token to be held equal.
    """
    return bandit.rlhf_policy(game.rewards - alpha * lengths, game.log_ref, game.tau)


def bradley_terry_policy(game):
    """tau (log pi(y) - log pi(y')) = r - r' for all pairs: exp(r/tau)/Z, whatever pi_ref is.

    SimPO without its margin, CPO without the likelihood.
    """
    return torch.log_softmax(game.rewards / game.tau, 0)


def simpo_lengths_point(game, lengths):
    """Without the margin tau (L(y)/|y| - L(y')/|y'|) = r - r' for all pairs, so L(y)/|y| is
    r/tau + c, and pi = exp(|y| (r/tau + c)), c by sum pi = 1. Means are below 0: twice as long is
    the square of the probability, at one reward. No pi_ref.
    """
    level = game.rewards / game.tau

    def unnormalised(c):
        return lengths * (level + c)

    return normalise(unnormalised, -level.max() - 50, -level.min())


def simpo_point(game, gamma):
    """Solved. Each order's z = tau (L(w) - L(l)) - gamma: p no longer says where a pair stops, but
    a = e^(tau gap) with (1 - p) a^2 - (2p - 1) e^gamma a - p = 0, which is p/(1 - p) at gamma = 0.
    gamma > 0 drives every pair further apart than p does; these gaps do not add up over three
    responses, so the policy is a compromise. Convex in the logits.
    """

    def slopes(log_pi):
        gap = log_pi[:, None] - log_pi[None]
        push = game.tau * torch.sigmoid(gamma - game.tau * gap)
        return -push, push

    return solve_ordered(game, slopes, bradley_terry_policy(game))


def cpo_point(game, alpha):
    """Solved. The likelihood adds -alpha on log pi(w). Alone, its policy is the winners' law
    2 mu(y) p(y > mu); with the contrast, between that and exp(r/tau)/Z. Convex in the logits.
    """

    def slopes(log_pi):
        gap = log_pi[:, None] - log_pi[None]
        push = game.tau * torch.sigmoid(-game.tau * gap)
        return -push - alpha, push

    return solve_ordered(game, slopes, winners(game), bradley_terry_policy(game))


def winners(game):
    """log of the winners' law 2 mu(y) p(y > mu), [n]: it sums to 1, as every pair has one."""
    return torch.log(2 * game.log_data.exp() * bandit.win_rate(game.preferences, game.log_data))


def orpo_point(game, lengths):
    """Solved. logodds = m - log(1 - e^m), m = L/|y|, has the slope 1/(|y| (1 - e^m)) in L. Of one
    token the likelihood's -1 on L(w) leads to the winners' law as tau, its lambda, goes to 0.
    """

    def slopes(log_pi):
        mean = log_pi / lengths
        odds = mean - torch.log1p(-mean.exp())
        push = game.tau * torch.sigmoid(odds[None] - odds[:, None])
        steep = 1 / (lengths * (1 - mean.exp()))
        return -(1 / lengths)[:, None] - push * steep[:, None], push * steep[None]

    return solve_ordered(game, slopes, winners(game), bradley_terry_policy(game))


def slic_hf_point(game, likelihood):
    """While every |L(y) - L(y')| < 1/tau the hinges' slopes are 2p - 1, whatever pi is. Then
    likelihood pi(y) = 2 mu(y) (likelihood w(y) + 2 w(y) - 1), w = p(. > mu): in closed form.

    At a likelihood of (1 - 2 w)/w or less, w the smallest win rate, no such pi is positive: it
    stops on kinks. Raises ValueError there.
    """
    wins = bandit.win_rate(game.preferences, game.log_data)
    pi = 2 * game.log_data.exp() * (likelihood * wins + 2 * wins - 1) / likelihood
    log_pi = pi.log()
    if not (pi > 0).all() or (log_pi.max() - log_pi.min()) >= 1 / game.tau:
        raise ValueError(f"likelihood {likelihood:g}: SLiC-HF stops on kinks")
    return log_pi


def f_dpo_point(game, kind):
    """tau (f'(u) - f'(u')) = r - r' for all pairs, so f'(u(y)) = r(y)/tau + c, c by sum pi = 1.

    Forward KL, -1/u: pi = -pi_ref/(r/tau + c). Jensen-Shannon, log u/(1 + u): u = v/(1 - v) with
    v = exp(r/tau + c). The maximisers of E r - tau D_f(pi, pi_ref).
    """
    level = game.rewards / game.tau

    def unnormalised(c):
        if kind == 1:
            return game.log_ref - torch.log(-level - c)
        return game.log_ref + (level + c) - torch.log1p(-torch.exp(level + c))

    return normalise(unnormalised, -level.max() - 50, -level.max())


def npo_point(game):
    """Solved, and no minimum: pi(y) = c(y) sigmoid(tau d(y))/C, with c = mu(y) (1 - p(y > mu)) the
    losers' law. For tau <= 1 each c log(1 + (pi/pi_ref)^tau) is concave in pi, so descent leaves
    this point for a vertex: recorded losers are unlearnt until one response has all.
    """

    def slopes(log_pi):
        ratio, _ = log_ratios(game, log_pi)
        # Twice sigmoid(tau d) on the loser's log-probability, nothing on the winner's.
        push = 2 * torch.sigmoid(game.tau * ratio)
        return torch.zeros_like(game.preferences), push[None].expand_as(game.preferences)

    return solve_ordered(game, slopes, game.log_ref)


def tdpo_point(game, alpha):
    """Solved. The winner's detached KL makes the logit's value tau h, as the KLs are one number;
    the loser's leaves the slope tau alpha sigmoid(-tau h) on KL(pi_ref, pi), whose gradient on the
    logits is pi - pi_ref. It pulls towards the reference from DPO's policy.
    """

    def field(log_pi):
        _, h = log_ratios(game, log_pi)
        push = won(game, log_pi) * game.tau * torch.sigmoid(-game.tau * h)
        apart = on_logits(log_pi, push.sum(0) - push.sum(1))
        return apart + alpha * push.sum() * (log_pi.exp() - game.log_ref.exp())

    return solve(field, rlhf(game), game.log_ref)


def cringe_point(game, alpha, b):
    """Solved. -gate on log pi(w), and alpha gate sigmoid(s_l - s_k) from the loser's logit to each
    rival's k, weighted by the rival's share pi(k)/(1 - pi(l)); n - 1 rivals are all of them.
    """

    def field(log_pi):
        gap = log_pi[:, None] - log_pi[None]
        gated = won(game, log_pi) * torch.sigmoid((b - gap) / game.tau)
        pi = log_pi.exp()
        # Rows are losers, columns rivals.
        share = pi[None] / (1 - pi[:, None]) * (1 - torch.eye(len(pi), dtype=pi.dtype))
        moved = alpha * gated.sum(0)[:, None] * share * torch.sigmoid(gap)
        return on_logits(log_pi, -gated.sum(1)) + moved.sum(1) - moved.sum(0)

    return solve(field, winners(game), game.log_ref)


# The policy's own pairs of a game with a cycle


def npo_online_point(game):
    """Solved. (1 - p(y > pi)) sigmoid(tau d(y)) is one number for all y: what loses less may rise
    above the reference until it is pushed as hard as the rest. No equilibrium of the game.
    """

    def field(log_pi):
        ratio, _ = log_ratios(game, log_pi)
        lost = 1 - bandit.win_rate(game.preferences, log_pi)
        push = lost * torch.sigmoid(game.tau * ratio)
        return push - (log_pi.exp() * push).sum() + torch.logsumexp(log_pi, 0)

    return solve(field, game.log_ref)


def dpo_online_point(game, smoothing=0.0):
    """sum_y' pi(y') (p - sigmoid(tau h)) = 0 for every y, bandit.dpo_point. A smoothed label is the
    label of a flatter game, (1 - e) p + e (1 - p), whose point this is.
    """
    flatter = dpo.smoothed(game.preferences, smoothing)
    return bandit.dpo_point(flatter, game.log_ref, game.tau)


def inpo_point(game):
    """At the policy that drew the pairs its gradient is a multiple of IPO's, so where it stops to
    move, it stops as online IPO does: Nash at tau, whatever the ratio.
    """
    return bandit.fixed_point(game.preferences, game.log_ref, game.tau)


def nash_point(game):
    """GPO's square pulls by 2 tau (tau h - (2p - 1)): IPO at tau/2, hence Nash at tau/2."""
    return bandit.fixed_point(game.preferences, game.log_ref, game.tau / 2)


# The table


def one_token_tdpo(logp, logp_other, ref_logp, ref_logp_other, p, tau, **constants):
    """tdpo.loss for actions, [n, n]: every response's KL is that of its one token's law."""
    kl = tdpo.forward_kl(logp[:, 0], ref_logp[:, 0])
    sides = logp, logp_other, ref_logp, ref_logp_other
    return tdpo.loss(*sides, p, tau, extra=kl, extra_other=kl, **constants)


def one_token_cringe(logp, logp_other, ref_logp, ref_logp_other, p, tau, **constants):
    """cringe.loss for actions, [n, n]: the log-probabilities of the actions are the logits."""
    count = len(logp)
    laws = logp[:, 0].expand(count, count)
    terms = cringe.token_terms(laws, torch.arange(count))
    sides = logp, logp_other, ref_logp, ref_logp_other
    given = dict(extra=terms[:, None], extra_other=terms[None], **constants)
    return cringe.loss(*sides, p, tau, **given)


def one_step_inpo(logp, logp_other, ref_logp, ref_logp_other, p, tau, **constants):
    """inpo.loss for pairs that the policy itself has just drawn, [n, n]."""
    sides = logp, logp_other, ref_logp, ref_logp_other
    drawn = ipo.log_ratio_gap(*sides).detach()
    return inpo.loss(*sides, p, tau, drawn_gap=drawn, **constants)


def loss_of(name, **constants):
    """A method's loss with some constants."""
    loss = find_method(name).loss
    if name == "inpo":
        loss = one_step_inpo
    if name == "tdpo":
        loss = one_token_tdpo
    if name == "cringe":
        loss = one_token_cringe
    return partial(loss, **constants)


def offline_plan(game):
    """(game, name, loss, where it stops, point) on recorded pairs."""
    lengths = dict(length=LENGTHS[:, None], length_other=LENGTHS[None])
    one = torch.ones(4, dtype=torch.float64)
    shorter = shorter_point(game, 0.2, LENGTHS)
    by_means = simpo_lengths_point(game, LENGTHS)
    orpo, orpo_lengths = orpo_point(game, one), orpo_point(game, LENGTHS)
    lost = 1 - bandit.win_rate(game.preferences, game.log_data).min()
    likelihood = (2 * lost / (1 - lost)).item()  # above slic_hf_point's bound, lost/(1 - lost) - 1
    hinge = game._replace(tau=0.1)  # before its kinks at 1/tau
    rank, slic = "Bradley-Terry, no reference", slic_hf_point(hinge, likelihood)
    forgets, cringe_at = "solved, no reference", cringe_point(game, 1.0, 0.0)
    return (
        (game, "dpop 0.2", loss_of("dpop", penalty=0.2), "solved", dpop_point(game, 0.2)),
        (game, "gpo logistic", loss_of("gpo", kind=0), "RLHF", rlhf(game)),
        (game, "gpo square", loss_of("gpo", kind=1), "offline IPO at tau/2", borda_point(game)),
        (game, "gpo exponential", loss_of("gpo", kind=3), "RLHF, 2 tau", exponential_point(game)),
        (game, "gpo Savage", loss_of("gpo", kind=5), "RLHF", rlhf(game)),
        (game, "r_dpo lengths", loss_of("r_dpo", alpha=0.2, **lengths), "RLHF, r - |y|/5", shorter),
        (game, "simpo gamma 0", loss_of("simpo", gamma=0.0), rank, bradley_terry_policy(game)),
        (game, "simpo lengths", loss_of("simpo", gamma=0.0, **lengths), "no reference", by_means),
        (game, "simpo gamma 1", loss_of("simpo"), forgets, simpo_point(game, 1.0)),
        (game, "cpo alpha 0", loss_of("cpo", alpha=0.0), rank, bradley_terry_policy(game)),
        (game, "cpo alpha 1", loss_of("cpo"), forgets, cpo_point(game, 1.0)),
        (game, "orpo", loss_of("orpo"), forgets, orpo),
        (game, "orpo lengths", loss_of("orpo", **lengths), forgets, orpo_lengths),
        (hinge, "slic_hf", loss_of("slic_hf", likelihood=likelihood), "no reference", slic),
        (game, "f_dpo reverse KL", loss_of("f_dpo", kind=0), "RLHF", rlhf(game)),
        (game, "f_dpo forward KL", loss_of("f_dpo", kind=1), "its RLHF", f_dpo_point(game, 1)),
        (game, "f_dpo JS", loss_of("f_dpo", kind=2), "its RLHF", f_dpo_point(game, 2)),
        (game, "npo", loss_of("npo"), "none: a maximum", npo_point(game)),
        (game, "tdpo 1", loss_of("tdpo", kind=1), "RLHF", rlhf(game)),
        (game, "tdpo 2", loss_of("tdpo"), "solved", tdpo_point(game, 0.5)),
        (game, "cringe", loss_of("cringe", b=0.0), forgets, cringe_at),
    )


def online_plan(game):
    """(game, name, loss, where it stops, point) on the policy's own pairs."""
    own = dpo_online_point(game)
    return (
        (game, "gpo square", loss_of("gpo", kind=1), "Nash at tau/2", nash_point(game)),
        (game, "r_dpo, one length", loss_of("r_dpo"), "online DPO's", own),
        (game, "f_dpo reverse KL", loss_of("f_dpo", kind=0), "online DPO's", own),
        (game, "tdpo 1", loss_of("tdpo", kind=1), "online DPO's", own),
        (
            game,
            "dpo smoothing 0.1",
            partial(dpo.loss, smoothing=0.1),
            "DPO's, a flatter game",
            dpo_online_point(game, 0.1),
        ),
        (game, "npo", loss_of("npo"), "solved", npo_online_point(game)),
        (game, "inpo", loss_of("inpo"), "Nash at tau", inpo_point(game)),
        (game, "inpo ratio 0.9", loss_of("inpo", ratio=0.9), "Nash at tau", inpo_point(game)),
    )


def table(plan):
    """The plan's rows, with each loss's gradient at its point."""
    rows = []
    for game, name, loss, where, point in plan:
        size = gradient(loss, point, game).abs().max().item()
        rows.append(Row(name, where, point, size))
    return rows


def main():
    for title, game, planned in (
        ("recorded pairs, Bradley-Terry labels", bradley_terry_game(), offline_plan),
        ("the policy's own pairs, a game with a cycle", cyclic_game(), online_plan),
    ):
        print(f"\n{title}: reference {text(game.log_ref)}")
        print(f"{'method':<19}{'stops at':<29}{'largest gradient':>17}   policy")
        for row in table(planned(game)):
            print(f"{row.name:<19}{row.where:<29}{row.size:>17.1e}   {text(row.point)}")
    print(
        f"\nDPOP on pairs from the reference does not leave it at a penalty of "
        f"{kept_penalty(bradley_terry_game()):.3g} or more (its paper's is 50)"
    )


def text(log_pi):
    """A policy's probabilities."""
    return " ".join(f"{p:.4f}" for p in log_pi.exp().tolist())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
