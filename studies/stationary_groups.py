"""Where the losses of groups stop, and KTO: as studies/stationary.py, for K responses of a prompt.

Every group of K actions is enumerated with its probability, which has no gradient, and the method's
own loss is asked for each: the gradient is the exact expectation, of any K and label.
    hard   the order of the labels alone counts, so a game without a cycle has no point: its best
           response gets ever more. The rows are of a game with a cycle.
Run: python -m studies.stationary_groups    (some seconds)
Left out: the same for responses of several tokens.
"""

import math
from typing import NamedTuple

import torch

import bandit
from job.options import find_method
from losses.groups import label_first, label_rewards
from studies.stationary import (
    bradley_terry_game,
    cyclic_game,
    on_logits,
    rlhf,
    solve,
    text,
)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    where: str  # what the point is
    point: torch.Tensor  # [n], log pi
    field: object  # log pi [n] -> the loss's expected gradient on the logits [n]


def groups(count, responses):
    """All tuples of actions, [count^responses, responses]."""
    return torch.cartesian_prod(*[torch.arange(count)] * responses)


def group_gradient(method, game, laws, log_pi, **given):
    """A group loss's exact expected gradient on the logits, [n], and on what is given beside it.

    laws:
        the law of each response, [n] in nats; None is the policy's own.
    given:
        keywords of the loss; a tensor of no dimensions among them gets its gradient, too.
    """
    logits = log_pi.detach().requires_grad_()
    log_now = torch.log_softmax(logits, 0)
    rows = groups(len(logits), len(laws))
    weight = 0.0
    for place, law in enumerate(laws):
        # Detached: no gradient flows through the sampling.
        weight = weight + (log_now.detach() if law is None else law)[rows[:, place]]
    if method.label_pairs is label_rewards:
        label = game.rewards[rows]
    elif method.label_pairs is label_first:
        label = game.preferences[rows[:, 0], rows[:, 1]]
    else:
        label = game.preferences[rows[:, :, None], rows[:, None, :]]
    value = method.loss(log_now[rows], game.log_ref[rows], label, game.tau, **given)
    inputs = [logits, *(value for value in given.values() if isinstance(value, torch.Tensor))]
    inputs = [value for value in inputs if value.requires_grad]
    return torch.cat(
        [part.view(-1) for part in torch.autograd.grad((weight.exp() * value).sum(), inputs)]
    )


def row(name, where, point, game, laws, **given):
    """A Row of a method by its name, which may have more words."""
    method = find_method(name.split()[0])

    def field(log_pi):
        return group_gradient(method, game, laws, log_pi, **given)

    return Row(name, where, point, field)


def hard_game(seed=0, tau=0.5):
    """Three actions in a cycle, each of which wins and loses, with recorded responses."""
    generator = torch.Generator().manual_seed(seed)
    margin = 0.1 + 0.35 * torch.rand(3, generator=generator, dtype=torch.float64)
    gap = torch.zeros(3, 3, dtype=torch.float64)
    for first in range(3):
        gap[first, (first + 1) % 3] = margin[first]
    ref, data = 0.5 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
    game = cyclic_game(seed, tau)
    return game._replace(
        preferences=0.5 + gap - gap.T,
        log_ref=ref.log_softmax(0),
        log_data=data.log_softmax(0),
    )


# The points


def hard_point(game, weight):
    """Solved: sum over pairs of weight (winner first) times log(1 + e^-tau h), a hard label each.

    weight:
        [n, n], 0 where the row does not win. Convex in the logits.
    """

    def field(log_pi):
        ratio = log_pi - game.log_ref
        push = game.tau * weight * torch.sigmoid(-game.tau * (ratio[:, None] - ratio[None]))
        return on_logits(log_pi, push.sum(0) - push.sum(1))

    return solve(field, game.log_ref)


def pair_weights(game):
    """2 mu(y) mu(y') where p(y > y') > 1/2, [n, n]: how often an unordered pair is drawn."""
    law = game.log_data.exp()
    return 2 * law[:, None] * law[None] * (game.preferences > 0.5)


def lipo_point(game):
    """At K = 2 the exchange of ranks costs 1/log 2 - 1/log 3 whatever the scores, times the gap
    of 2^psi, psi = (p + 1/2)/2.
    """
    psi = (game.preferences + 0.5) / 2
    discount = 1 / math.log(2) - 1 / math.log(3)
    gain = torch.exp2(psi) - torch.exp2(1 - psi)
    return hard_point(game, pair_weights(game) * gain * discount)


def best_of(game, responses):
    """log of the law of the best of so many recorded responses, [n]."""
    law, order = game.log_data.exp(), game.rewards.argsort()
    below = torch.cat([torch.zeros(1, dtype=law.dtype), law[order].cumsum(0)])
    best = torch.empty_like(law)
    best[order] = (below**responses).diff()
    return best.log()


def rrhf_point(game, responses):
    """The best's law, if in it the better are the likelier: then no hinge is on, and what is left
    is the likelihood of the best. Raises ValueError where a hinge is on.
    """
    point = best_of(game, responses)
    if (point[game.rewards.argsort()].diff() <= 0).any():
        raise ValueError("the best's law has a hinge on: RRHF stops on kinks")
    return point


def pro_point(game, weight):
    """Solved, K = 2: log(1 + e^-z), z = (r - r') (L(w) - L(l)), the winner certain, and the
    likelihood of the best. Convex in the logits. No pi_ref.
    """
    law, apart = game.log_data.exp(), torch.relu(game.rewards[:, None] - game.rewards[None])
    best = best_of(game, 2).exp()

    def field(log_pi):
        push = apart * torch.sigmoid(-apart * (log_pi[:, None] - log_pi[None]))
        push = 2 * law[:, None] * law[None] * push
        return on_logits(log_pi, push.sum(0) - push.sum(1) - weight * best)

    return solve(field, best_of(game, 2))


def nash(game):
    """Every pair of a group is one of online IPO's: eq 12."""
    return bandit.fixed_point(game.preferences, game.log_ref, game.tau)


def sppo_point(game, responses):
    """The targets' mean is (K-1)/K (p(y > pi) - 1/2)/tau: Nash at tau K/(K-1)."""
    tau = game.tau * responses / (responses - 1)
    return bandit.fixed_point(game.preferences, game.log_ref, tau)


def typo_point(game, law):
    """Solved. 2 law(y) sum_y' law(y') (p(y > y') - sigmoid(L(y) - L(y'))) is
    tau (pi(y) - pi_ref(y)): between the Bradley-Terry projection of p and pi_ref. On recorded
    pairs convex in the logits.

    law:
        [n] log of the law that y and y' are from; None for the policy's own.
    """

    def field(log_pi):
        drawn = (log_pi if law is None else law).exp()
        wrong = torch.sigmoid(log_pi[:, None] - log_pi[None]) - game.preferences
        push = 2 * drawn * (wrong * drawn[None]).sum(1)
        return on_logits(log_pi, push - game.tau * game.log_ref.exp())

    return solve(field, game.log_ref)


def d2o_point(game, alpha):
    """Solved, with one sample of the start: tau on it, -alpha on the loser, of the losers' law
    2 mu(y) (1 - p(y > mu)), each times sigmoid(alpha d(l) - tau d(y)).
    """
    lost = 1 - bandit.win_rate(game.preferences, game.log_data)
    losers = 2 * game.log_data.exp() * lost

    def field(log_pi):
        ratio = log_pi - game.log_ref
        push = torch.sigmoid(alpha * ratio[None] - game.tau * ratio[:, None])
        push = game.log_ref.exp()[:, None] * losers[None] * push
        return on_logits(log_pi, alpha * push.sum(0) - game.tau * push.sum(1))

    return solve(field, game.log_ref)


def dro_value(game):
    """V = tau log sum pi_ref e^(r/tau), with gradient, for the field's last entry."""
    level = torch.logsumexp(game.log_ref + game.rewards / game.tau, 0)
    return (game.tau * level).requires_grad_()


def kto_level(game, log_pi):
    """z0 of a single prompt: the mean log-ratio of recorded responses, 0 or more."""
    ratio = log_pi - game.log_ref
    return torch.relu((game.log_data.exp() * ratio).sum())


def kto_point(game, lambda_d):
    """Solved. mu(y) sigmoid'(tau (d - z0)) (lambda_d w - (1 - w)) = C pi(y), w = p(. > mu).

    The slope on d(y) never changes its sign, and adds up to 0 only if all have one: without such a
    lambda_d, so at 1, there is no point. What wins less than half falls for ever.
    """
    wins = bandit.win_rate(game.preferences, game.log_data)

    def field(log_pi):
        z = game.tau * (log_pi - game.log_ref - kto_level(game, log_pi))
        push = torch.sigmoid(z) * torch.sigmoid(-z) * (lambda_d * wins - (1 - wins))
        return on_logits(log_pi, -game.tau * game.log_data.exp() * push)

    return solve(field, game.log_ref, game.log_data)


def batch_field(name, game, of_batch, **constants):
    """log pi -> a batch-coupled loss's expected gradient on recorded pairs.

    of_batch:
        log pi -> the numbers of the batch by name; they get no gradient.
    """
    loss = find_method(name).loss

    def field(log_pi):
        logits = log_pi.detach().requires_grad_()
        log_now = torch.log_softmax(logits, 0)
        first, second = groups(len(logits), 2).T
        sides = log_now[first], log_now[second], game.log_ref[first], game.log_ref[second]
        label, given = game.preferences[first, second], of_batch(log_now.detach())
        value = loss(*sides, label, game.tau, **given, **constants)
        weight = (game.log_data[first] + game.log_data[second]).exp()
        return torch.autograd.grad((weight * value).sum(), logits)[0]

    return field


def kto_field(game, **constants):
    """KTO's field, with the z0 of the policy it is at."""
    return batch_field("kto", game, lambda log_pi: {"z0": kto_level(game, log_pi)}, **constants)


def ppo_field(game, value):
    """log pi -> PPO's expected gradient on the logits, [n], and on V, with responses of one token.

    The batch is as it was drawn: pi_old is pi, V_old is V.

    value:
        V of the prompt, nats, a tensor of no dimensions with gradient.
    """
    loss = find_method("ppo").loss

    def field(log_pi):
        logits = log_pi.detach().requires_grad_()
        log_now = torch.log_softmax(logits, 0)
        # A row an action, a group of one response of one token.
        logp, ref_logp = log_now[:, None, None], game.log_ref[:, None, None]
        old = {"old_logp": logp.detach(), "old_value": value.detach().expand_as(logp)}
        old["length"] = torch.ones(len(logits), 1, dtype=torch.long)
        given = logp, ref_logp, game.rewards[:, None], game.tau, value.expand_as(logp)
        expected = (log_now.detach().exp() * loss(*given, **old)).sum()
        return torch.cat([part.view(-1) for part in torch.autograd.grad(expected, (logits, value))])

    return field


def beta_dpo_field(game):
    """beta-DPO's field where its running mean has come to rest, so M = M0, with uneven weights."""
    count = len(game.log_ref) ** 2
    kept = 0.5 + torch.arange(count, dtype=torch.float64) / count
    at_rest = {"shift": torch.zeros(count, dtype=torch.float64), "kept": kept}
    return batch_field("beta_dpo", game, lambda log_pi: at_rest)


# The table


def plan(seed=0, tau=0.5):
    """A Row for every statement."""
    recorded, cyclic, hard = bradley_terry_game(seed, tau), cyclic_game(seed, tau), hard_game(seed)
    flat = recorded._replace(log_data=torch.full_like(recorded.log_ref, 0.25).log())
    mu, ref, even = recorded.log_data, recorded.log_ref, flat.log_data
    three, two, one = [None] * 3, [hard.log_data] * 2, torch.ones((), dtype=torch.float64)
    given, length = {"extra": dro_value(recorded)}, {"length": one}
    rest, winner = rlhf(recorded), "solved, no reference"
    kto = kto_field(recorded, lambda_d=4.0)
    typo, own_typo = typo_point(recorded, mu), typo_point(cyclic, None)
    return [
        Row("kto lambda_d 4", "solved", kto_point(recorded, 4.0), kto),
        Row("beta_dpo at rest", "RLHF", rest, beta_dpo_field(recorded)),
        row("lipo K 2, hard", "solved", lipo_point(hard), hard, two),
        row("list_mle K 2, hard", "solved", hard_point(hard, pair_weights(hard)), hard, two),
        row("dro recorded", "RLHF, V = tau log Z", rest, recorded, [mu] * 2, **given),
        row("dro online", "RLHF, V = tau log Z", rest, recorded, three[:2], **given),
        Row("ppo", "RLHF, V = tau log Z", rest, ppo_field(recorded, dro_value(recorded))),
        row("rloo K 2", "RLHF", rest, recorded, three[:2]),
        row("rloo K 3", "RLHF", rest, recorded, three),
        row("rso from the start", "RLHF", rest, recorded, [ref] * 2),
        row("rso n 3, recorded", "RLHF", rest, recorded, [mu] * 3),
        row("ipo_group K 3", "Nash", nash(cyclic), cyclic, three),
        row("sppo K 2, cycle", "Nash at 2 tau", sppo_point(cyclic, 2), cyclic, three[:2]),
        row("sppo K 3, cycle", "Nash at 3 tau/2", sppo_point(cyclic, 3), cyclic, three),
        row("typo recorded", "solved", typo, recorded, [mu, mu, ref]),
        row("typo online, cycle", "solved", own_typo, cyclic, [None, None, cyclic.log_ref]),
        row("rrhf K 3", "the best's law", rrhf_point(flat, 3), flat, [even] * 3, **length),
        row("pro K 2", winner, pro_point(recorded, tau), recorded, [mu] * 2, **length),
        row("d2o one sample", "solved", d2o_point(recorded, 0.1), recorded, [mu, mu, ref]),
    ]


def main():
    print(f"{'method':<19}{'stops at':<29}{'largest gradient':>17}   policy")
    for line in plan():
        size = line.field(line.point).abs().max().item()
        print(f"{line.name:<19}{line.where:<29}{size:>17.1e}   {text(line.point)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
