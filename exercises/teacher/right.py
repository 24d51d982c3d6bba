"""Right answers in other styles than the reference's: the grader must give each all its points.

Loops over the batch, one-liners, float32 where it is enough, integer masks, keyword arguments,
other solvers, other formulas. grader/test_mutants.py puts each in the reference's place.
No handout contains this file.
"""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

import bandit
import policy as policies
import sampler
from exercises.teacher.mistakes import RIGHT

SUBMISSIONS = []


def right(exercise, name, *targets):
    """Registers the decorated function as a right answer for targets such as 'ipo.loss'."""

    def register(function):
        also(exercise, name, dict.fromkeys(targets, function))
        return function

    return register


def also(exercise, name, parts):
    """Registers an answer that is not one function: target -> value."""
    SUBMISSIONS.append(SimpleNamespace(exercise=exercise, name=name, parts=parts))


# Exercise 1


@right(1, "cycle: entry by entry, float32", "bandit.cycle")
def _(margin):
    game = torch.full((3, 3), 0.5)
    for row in range(3):
        game[row, (row + 1) % 3] += margin
        game[(row + 1) % 3, row] -= margin
    return game


@right(1, "cycle: a table", "bandit.cycle")
def _(margin):
    up, down = 0.5 + margin, 0.5 - margin
    return torch.tensor([[0.5, up, down], [down, 0.5, up], [up, down, 0.5]]).double()


@right(1, "Bradley-Terry: strengths", "bandit.bradley_terry")
def _(rewards):
    strength = rewards.exp()
    return strength[:, None] / (strength[:, None] + strength[None, :])


@right(1, "Bradley-Terry: two loops", "bandit.bradley_terry")
def _(rewards):
    rows = []
    for reward in rewards:
        rows.append(torch.stack([1 / (1 + torch.exp(rival - reward)) for rival in rewards]))
    return torch.stack(rows)


@right(1, "win rate: einsum", "bandit.win_rate")
def _(preferences, log_opponent):
    return torch.einsum("ij,...j->...i", preferences, torch.exp(log_opponent))


@right(1, "win rate: the transpose on the right", "bandit.win_rate")
def _(preferences, log_opponent):
    return log_opponent.exp() @ preferences.T


@right(1, "win rate: action by action", "bandit.win_rate")
def _(preferences, log_opponent):
    law = log_opponent.exp()
    return torch.stack([(law * row).sum(dim=-1) for row in preferences], dim=-1)


# Exercise 2


@right(2, "h: policy minus reference", "ipo.log_ratio_gap")
def _(logp, logp_other, ref_logp, ref_logp_other):
    return (logp - logp_other) - (ref_logp - ref_logp_other)


@right(2, "IPO: a loop over the pairs", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    values = []
    for row in range(len(logp)):
        h = logp[row] - ref_logp[row] - (logp_other[row] - ref_logp_other[row])
        won, lost = (h - 0.5 / tau) ** 2, (-h - 0.5 / tau) ** 2
        values.append(preference[row] * won + (1 - preference[row]) * lost)
    return torch.stack(values)


@right(2, "IPO: the completed square", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h = RIGHT.gap(
        logp=logp, logp_other=logp_other, ref_logp=ref_logp, ref_logp_other=ref_logp_other
    )
    spread = preference * (1 - preference) / tau**2
    return (h - (2 * preference - 1) / (2 * tau)).square() + spread


@right(2, "IPO: multiplied out", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h = RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other)
    return h * h - (2 * preference - 1) * h / tau + 1 / (4 * tau * tau)


@right(2, "IPO: with mse_loss", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h = RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other)
    target = torch.full_like(h, 1 / (2 * tau))
    won = F.mse_loss(h, target, reduction="none")
    lost = F.mse_loss(-h, target, reduction="none")
    return torch.lerp(lost, won, preference)


@right(2, "IPO: in float32", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h = RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other).float()
    p = preference.float()
    return p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (h + 1 / (2 * tau)) ** 2


# Exercise 3


@right(3, "mixture: powers of probabilities", "ipo_md.mixture")
def _(log_pi, log_ref, beta):
    weights = log_pi.exp() ** (1 - beta) * log_ref.exp() ** beta
    return (weights / weights.sum(dim=-1, keepdim=True)).log()


@right(3, "mixture: logsumexp", "ipo_md.mixture")
def _(log_pi, log_ref, beta):
    mixed = torch.lerp(log_pi, log_ref.expand_as(log_pi), beta)
    return mixed - mixed.logsumexp(-1, keepdim=True)


@right(3, "KL: kl_div", "bandit.kl")
def _(log_pi, log_other):
    log_pi, log_other = torch.broadcast_tensors(log_pi, log_other)
    return F.kl_div(log_other, log_pi, reduction="none", log_target=True).sum(-1)


@right(3, "KL: cross-entropy minus entropy", "bandit.kl")
def _(log_pi, log_other):
    law = log_pi.exp()
    return torch.special.entr(law).sum(-1).neg() - (law * log_other).sum(-1)


@right(3, "response: probabilities", "bandit.respond")
def _(preferences, log_ref, tau, log_opponent):
    wins = torch.einsum("ij,...j->...i", preferences, log_opponent.exp())
    weights = log_ref.exp() * torch.exp(wins / tau - (wins / tau).amax(-1, keepdim=True))
    return torch.log(weights / weights.sum(-1, keepdim=True))


@right(3, "gap: the payoff of the best response", "bandit.duality_gap")
def _(log_pi, preferences, log_ref, tau):
    best = RIGHT.respond(preferences, log_ref, tau, log_pi)
    wins = (best.exp() * RIGHT.win_rate(preferences, log_pi)).sum(-1)
    value = wins - tau * RIGHT.kl(best, log_ref) + tau * RIGHT.kl(log_pi, log_ref)
    return 2 * value - 1


@right(3, "gap: what both players gain", "bandit.duality_gap")
def _(log_pi, preferences, log_ref, tau):
    best = RIGHT.respond(preferences, log_ref, tau, log_pi)

    def paid(one, two):
        wins = (one.exp() * RIGHT.win_rate(preferences, two)).sum(-1)
        return wins - tau * RIGHT.kl(one, log_ref) + tau * RIGHT.kl(two, log_ref)

    return paid(best, log_pi) - paid(log_pi, best)


def damped(step, most, accept=None):
    """A solver of eq 13 by damped iteration."""

    def fixed_point(
        preferences, log_ref, tau, beta=0.0, mixture=RIGHT.mixture, tolerance=accept or 1e-11
    ):
        size = step(tau, beta)
        log_pi = log_ref.clone()
        for _ in range(most):
            opponent = mixture(log_pi=log_pi, log_ref=log_ref, beta=beta)
            towards = RIGHT.respond(preferences, log_ref, tau, opponent)
            if (towards - log_pi).abs().max() <= tolerance:
                return log_pi
            log_pi = torch.log_softmax(log_pi + size * (towards - log_pi), -1)
        raise ValueError("no equilibrium found")

    return fixed_point


def safe(tau, beta):
    """The step that settles in any game, as the hint says."""
    return tau**2 / (tau**2 + 0.25)


also(3, "equilibrium: damped as hinted", {"bandit.fixed_point": damped(safe, 3000)})
also(
    3,
    "equilibrium: small steps, one to 1e-9 is enough",
    {"bandit.fixed_point": damped(lambda tau, beta: min(0.05, tau), 3000, 1e-9)},
)


@right(3, "equilibrium: newton with its own schedule", "bandit.fixed_point")
def _(preferences, log_ref, tau, beta=0.0, mixture=RIGHT.mixture, tolerance=1e-11):
    solution = log_ref
    for now in [tau * 1.5**power for power in range(12, -1, -1)]:

        def field(log_pi, now=now):
            return log_pi - RIGHT.respond(preferences, log_ref, now, mixture(log_pi, log_ref, beta))

        solution = bandit.newton(field, solution, tolerance)
        if solution is None:
            raise ValueError(f"no solution at tau = {now}")
    return solution


# Exercise 4


also(4, "PAIR as a list", {"ipo_md.PAIR": ["mixture", "mixture"]})


@right(4, "IPO-MD: the loss written again", "ipo_md.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h = logp - ref_logp - logp_other + ref_logp_other
    return (h - (preference - 0.5) / tau) ** 2 + preference * (1 - preference) / tau**2


@right(4, "expected loss: keyword arguments and an outer product", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=RIGHT.mixture):
    drawn = {
        "policy": log_pi.exp().detach(),
        "mixture": mixture(log_pi=log_pi, log_ref=log_ref, beta=beta).exp().detach(),
    }
    first, second = (drawn[who] for who in method.PAIR)
    losses = method.loss(
        logp=log_pi.unsqueeze(-1),
        logp_other=log_pi.unsqueeze(-2),
        ref_logp=log_ref.unsqueeze(-1),
        ref_logp_other=log_ref.unsqueeze(-2),
        preference=preferences,
        tau=tau,
    )
    return torch.einsum("...i,...ij,...j->...", first, losses, second)


@right(4, "expected loss: flat vectors of all pairs", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=RIGHT.mixture):
    n = log_pi.shape[-1]
    y = torch.arange(n).repeat_interleave(n)
    other = torch.arange(n).repeat(n)
    with torch.no_grad():
        laws = {"policy": log_pi, "mixture": mixture(log_pi, log_ref, beta)}
        weight = laws[method.PAIR[0]][..., y].exp() * laws[method.PAIR[1]][..., other].exp()
    pairs = log_pi[..., y], log_pi[..., other], log_ref[..., y], log_ref[..., other]
    losses = method.loss(*pairs, preferences[..., y, other], tau)
    return (weight * losses).sum(-1)


@right(4, "expected loss: pair by pair", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=RIGHT.mixture):
    mixed = mixture(log_pi, log_ref, beta).detach()
    laws = {"policy": log_pi.detach(), "mixture": mixed}
    total = 0
    for i in range(log_pi.shape[-1]):
        for j in range(log_pi.shape[-1]):
            weight = (laws[method.PAIR[0]][..., i] + laws[method.PAIR[1]][..., j]).exp()
            pair = log_pi[..., i], log_pi[..., j], log_ref[..., i], log_ref[..., j]
            total = total + weight * method.loss(*pair, preferences[..., i, j], tau)
    return total


# Exercise 5


@right(5, "DPO: softplus", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    h = RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other)
    p = (1 - smoothing) * preference + smoothing * (1 - preference)
    return F.softplus(tau * h) - p * tau * h


@right(5, "DPO: binary cross-entropy", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    h = RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other)
    p = preference + smoothing - 2 * smoothing * preference
    return F.binary_cross_entropy_with_logits(tau * h, p, reduction="none")


@right(5, "DPO: a loop over the pairs", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    values = []
    for a, b, c, d, p in zip(logp, logp_other, ref_logp, ref_logp_other, preference, strict=True):
        z = tau * (a - c - b + d)
        p = (1 - smoothing) * p + smoothing * (1 - p)
        values.append(-p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z))
    return torch.stack(values)


@right(5, "DPO point: damped steps", "bandit.dpo_point")
def _(preferences, log_ref, tau):
    log_pi = log_ref
    for _ in range(4000):
        returns = tau * (log_pi - log_ref)
        pull = (preferences - RIGHT.bradley_terry(returns)) @ log_pi.exp()
        log_pi = torch.log_softmax(log_pi + pull / tau, -1)
        if (pull - pull.mean()).abs().max() < 1e-13:
            return log_pi
    return log_pi if (pull - (log_pi.exp() * pull).sum()).abs().max() < 1e-9 else None


# Exercise 7


def row_by_row(model, prompt, response):
    """Each row alone, without padding."""
    found = torch.zeros(response.ids.shape, dtype=next(model.parameters()).dtype)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    for row, (x, y) in enumerate(zip(prompt.lists(), response.lists(), strict=True)):
        logits = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
        logits = logits.to(found.dtype).log_softmax(-1)
        for column, token in enumerate(y):
            found[row, column] = logits[column, token]
    return found


def whole(each):
    """log_prob from a function of tokens."""
    return lambda model, prompt, response: each(model, prompt, response).sum(dim=-1)


also(
    7,
    "log-probability: row by row",
    {"policy.token_log_probs": row_by_row, "policy.log_prob": whole(row_by_row)},
)


def gathered(model, prompt, response):
    """The library's forward pass on every column, logsumexp and gather."""
    ids = torch.cat([prompt.ids, response.ids], dim=1)
    mask = torch.cat([prompt.mask, response.mask], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    every = logits.gather(2, ids.roll(-1, 1)[..., None])[..., 0] - logits.logsumexp(-1)
    start = prompt.ids.shape[1] - 1
    every = every[:, start : start + response.ids.shape[1]]
    return torch.where(response.mask.bool(), every, torch.zeros_like(every))


also(
    7,
    "log-probability: gather and logsumexp",
    {"policy.token_log_probs": gathered, "policy.log_prob": whole(gathered)},
)


@right(7, "Nash-MD-PG: no_grad, and a loop", "nash_md.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    with torch.no_grad():
        advantage = preference - 0.5 - tau * (logp - ref_logp)
    return torch.stack([-a * score for a, score in zip(advantage, logp, strict=True)])


@right(7, "Nash-MD-PG: the square's half", "nash_md.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    # Its slope in logp is the wanted one: nothing is detached, and nothing needs to be.
    return (0.5 - preference) * logp + tau * (logp - ref_logp) ** 2 / 2


also(7, "Nash-MD-PG: PAIR as a list", {"nash_md.PAIR": ["policy", "mixture"]})


# Exercise 8


@right(8, "mix: row by row", "sampler.mix")
def _(streams, rows):
    total = [0] * rows
    for stream in streams:
        for place, row in enumerate(stream.rows.tolist()):
            total[row] = total[row] + stream.weight[place] * stream.logits[place]
    return torch.stack(total)


@right(8, "draw: counts the sums that are not above", "sampler.draw")
def _(logits, uniform):
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)


@right(8, "draw: a loop, the last possible token in reserve", "sampler.draw")
def _(logits, uniform):
    tokens = []
    for row, u in zip(logits.double().softmax(-1), uniform, strict=True):
        above = (row.cumsum(0) > u).nonzero()
        tokens.append(above[0, 0] if len(above) else row.nonzero()[-1, 0])
    return torch.stack(tokens)


@torch.no_grad()
def without_cache(policy, reference, prompt, beta, generator, max_tokens=48, uniforms=None):
    """The whole text is run again for every token; masks and finished are numbers 0 and 1."""
    betas = beta if isinstance(beta, tuple) else (beta,)
    rows = len(betas) * len(prompt.ids)
    ids, mask = prompt.ids.repeat(len(betas), 1), prompt.mask.repeat(len(betas), 1).long()
    weight = torch.tensor(betas, dtype=torch.float64).repeat_interleave(len(prompt.ids))[:, None]
    running = torch.ones(rows, dtype=torch.long)
    for step in range(max_tokens):
        place = policies.positions(mask)
        logits = [
            model(input_ids=ids, attention_mask=mask, position_ids=place).logits[:, -1]
            for model in (policy, reference)
        ]
        if uniforms is None:
            u = torch.rand(rows, generator=generator, dtype=torch.float64)
        else:
            u = uniforms[step]
        token = RIGHT.draw((1 - weight) * logits[0] + weight * logits[1], u)
        ids = torch.cat([ids, (token * running)[:, None]], 1)
        mask = torch.cat([mask, running[:, None]], 1)
        running = running * (token != policy.config.eos_token_id)
    width = prompt.ids.shape[1]
    return ids[:, width:], mask[:, width:], 1 - running


also(8, "sampler: no cache, integer masks", {"sampler.sample": without_cache})


@torch.no_grad()
def one_response_at_a_time(
    policy, reference, prompt, beta, generator, max_tokens=48, uniforms=None
):
    """A run for each beta, one after the other, padded to one width."""
    if not isinstance(beta, tuple):
        beta = (beta,)
    count, parts = len(prompt.ids), []
    for index, weight in enumerate(beta):
        own = None if uniforms is None else uniforms[:, index * count : (index + 1) * count]
        parts.append(one_beta(policy, reference, prompt, weight, generator, max_tokens, own))
    longest = max(ids.shape[1] for ids, _, _ in parts)
    ids = [F.pad(ids, (0, longest - ids.shape[1])) for ids, _, _ in parts]
    mask = [F.pad(mask, (0, longest - mask.shape[1])) for _, mask, _ in parts]
    return torch.cat(ids), torch.cat(mask), torch.cat([finished for _, _, finished in parts])


def one_beta(policy, reference, prompt, beta, generator, max_tokens, uniforms):
    """The given Stream for each model, on every row, tokens in lists."""
    count = len(prompt.ids)
    rows, end = torch.arange(count), policy.config.eos_token_id
    weight = torch.full((count,), float(beta), dtype=torch.float64)
    streams = [
        sampler.Stream(model=policy, rows=rows, weight=1 - weight, prompt=prompt, max_tokens=48),
        sampler.Stream(model=reference, rows=rows, weight=weight, prompt=prompt, max_tokens=48),
    ]
    running, tokens, masks = torch.ones(count, dtype=torch.bool), [], []
    while len(tokens) < max_tokens and running.any():
        if uniforms is None:
            u = torch.rand(count, generator=generator, dtype=torch.float64)
        else:
            u = uniforms[len(tokens)]
        token = RIGHT.draw(logits=RIGHT.mix(streams, count), uniform=u)
        tokens.append(token.masked_fill(~running, end))
        masks.append(running)
        running = running & (token != end)
        for stream in streams:
            stream.advance(token)
    return torch.stack(tokens, 1), torch.stack(masks, 1), ~running


also(8, "sampler: one response at a time", {"sampler.sample": one_response_at_a_time})
