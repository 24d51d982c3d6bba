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
    if method.LABEL == "rewards":
        label = game.rewards[rows]
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


def kto_field(game, **constants):
    """log pi -> KTO's expected gradient on recorded pairs, z0 without gradient."""
    kto = find_method("kto")

    def field(log_pi):
        logits = log_pi.detach().requires_grad_()
        log_now = torch.log_softmax(logits, 0)
        z0 = kto_level(game, log_now).detach()
        first, second = groups(len(logits), 2).T
        sides = log_now[first], log_now[second], game.log_ref[first], game.log_ref[second]
        label = game.preferences[first, second]
        value = kto.loss(*sides, label, game.tau, z0=z0, **constants)
        weight = (game.log_data[first] + game.log_data[second]).exp()
        return torch.autograd.grad((weight * value).sum(), logits)[0]

    return field


# The table


def plan(seed=0, tau=0.5):
    """A Row for every statement."""
    recorded = bradley_terry_game(seed, tau)
    mu = recorded.log_data
    hard = hard_game(seed, tau)
    value = dro_value(recorded)
    three, two = [None] * 3, [hard.log_data] * 2
    given = {"extra": value}
    kto = Row(
        "kto lambda_d 4", "solved", kto_point(recorded, 4.0), kto_field(recorded, lambda_d=4.0)
    )
    return [
        kto,
        row("lipo K 2, hard", "solved", lipo_point(hard), hard, two),
        row("dro recorded", "RLHF, V = tau log Z", rlhf(recorded), recorded, [mu] * 2, **given),
        row("dro online", "RLHF, V = tau log Z", rlhf(recorded), recorded, three[:2], **given),
        row("rloo K 2", "RLHF", rlhf(recorded), recorded, three[:2]),
        row("rloo K 3", "RLHF", rlhf(recorded), recorded, three),
    ]


def main():
    print(f"{'method':<19}{'stops at':<29}{'largest gradient':>17}   policy")
    for line in plan():
        size = line.field(line.point).abs().max().item()
        print(f"{line.name:<19}{line.where:<29}{size:>17.1e}   {text(line.point)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
