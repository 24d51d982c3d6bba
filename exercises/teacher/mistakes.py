"""Mistakes in the exercises, each a small wrong function: usual ones with a hint, and other kinds.

The list serves twice. teacher/wrong_values.py notes which values a mistake with a hint gives on the
otherwise right program: a student who gets such a value reads the hint. grader/test_mutants.py
plants every one and shows that its exercise loses points; teacher/mutants_table.py prints the table
of exercises/README.md. No handout contains this file.
Signatures are the reference's. RIGHT holds the reference's functions, whatever is planted.
"""

import contextlib
import importlib
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import bandit
import ipo
import ipo_md
import policy as policies
import sampler
from exercises.grader import adapters

MISTAKES = []
RIGHT = SimpleNamespace(
    win_rate=bandit.win_rate,
    respond=bandit.respond,
    kl=bandit.kl,
    duality_gap=bandit.duality_gap,
    fixed_point=bandit.fixed_point,
    bradley_terry=bandit.bradley_terry,
    rlhf_policy=bandit.rlhf_policy,
    fit_reward=bandit.fit_reward,
    gap=ipo.log_ratio_gap,
    ipo=ipo.loss,
    mixture=ipo_md.mixture,
    token_log_probs=policies.token_log_probs,
    mix=sampler.mix,
    draw=sampler.draw,
)


def mistake(exercise, name, hint, *targets):
    """Registers the decorated function as a mistake in targets such as 'ipo.loss'."""

    def register(function):
        also(exercise, name, hint, dict.fromkeys(targets, function))
        return function

    return register


def other(exercise, name, *targets):
    """Registers a mistake of another kind: it must be caught, and nothing is said of its cause."""
    return mistake(exercise, name, None, *targets)


def also(exercise, name, hint, parts):
    """Registers a mistake that is not one function: target -> value."""
    MISTAKES.append(SimpleNamespace(exercise=exercise, name=name, hint=hint, parts=parts))


@contextlib.contextmanager
def planted(one):
    """The mistake, or another program, is in place inside the with block.

    A mixture is fixed_point's default argument, too: a student's own would be.
    """
    before = []
    default = RIGHT.fixed_point.__defaults__
    for target, value in one.parts.items():
        module, name = target.rsplit(".", 1)
        owner = adapters if module == "adapters" else importlib.import_module(module)
        before.append((owner, name, getattr(owner, name, None)))
        setattr(owner, name, adapters.guard(target, value))
        if target == "ipo_md.mixture":
            RIGHT.fixed_point.__defaults__ = (default[0], ipo_md.mixture, *default[2:])
    try:
        yield
    finally:
        RIGHT.fixed_point.__defaults__ = default
        for owner, name, value in before:
            setattr(owner, name, value)


def attention(mask):
    """The arguments of GPT-2 for a mask: each row's positions begin at its first real token."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return dict(attention_mask=mask.long(), position_ids=positions)


# Exercise 1


@mistake(
    1,
    "cycle: transposed",
    "row and column are exchanged: preferences[i, j] is p(i > j), the row's action wins",
    "bandit.cycle",
)
def _(margin):
    beats = torch.eye(3).double().roll(1, 1)
    return 0.5 - margin * (beats - beats.T)


@mistake(
    1,
    "cycle: not antisymmetric",
    "p(j > i) must be 1 - p(i > j): if one wins more often, the other wins less",
    "bandit.cycle",
)
def _(margin):
    return 0.5 + margin * torch.eye(3).double().roll(1, 1)


@mistake(
    1,
    "Bradley-Terry: sign",
    "the higher reward must win: sigmoid(r_i - r_j), i the row",
    "bandit.bradley_terry",
)
def _(rewards):
    return torch.sigmoid(rewards[None] - rewards[:, None])


@mistake(
    1,
    "Bradley-Terry: rewards as strengths",
    "rewards are logarithms: exp(r_i)/(exp(r_i) + exp(r_j)), not r_i/(r_i + r_j)",
    "bandit.bradley_terry",
)
def _(rewards):
    return rewards[:, None] / (rewards[:, None] + rewards[None])


@mistake(1, "win rate: all zeros", "the answer is zero everywhere", "bandit.win_rate")
def _(preferences, log_opponent):
    return torch.zeros_like(log_opponent)


@mistake(
    1,
    "win rate: of the loser",
    "this is p(opponent > y): sum over the columns, the opponent's actions, not over the rows",
    "bandit.win_rate",
)
def _(preferences, log_opponent):
    return (preferences.transpose(-1, -2) @ log_opponent.exp()[..., None])[..., 0]


@mistake(
    1,
    "win rate: uniform opponent",
    "the opponent's probabilities are missing: every y' was weighted alike",
    "bandit.win_rate",
)
def _(preferences, log_opponent):
    return preferences.mean(-1).expand(log_opponent.shape)


@mistake(
    1,
    "win rate: logarithms as weights",
    "the opponent comes as log-probabilities: exponentiate before weighting",
    "bandit.win_rate",
)
def _(preferences, log_opponent):
    return (preferences @ log_opponent[..., None])[..., 0]


@other(1, "cycle: one margin only", "bandit.cycle")
def _(margin):
    beats = torch.eye(3).double().roll(1, 1)
    return 0.5 + 0.4 * (beats - beats.T)


@other(1, "cycle: the margin's sign is lost", "bandit.cycle")
def _(margin):
    beats = torch.eye(3).double().roll(1, 1)
    return 0.5 + abs(margin) * (beats - beats.T)


@other(1, "Bradley-Terry: gaps cut at 2 nats", "bandit.bradley_terry")
def _(rewards):
    return torch.sigmoid((rewards[:, None] - rewards[None]).clamp(-2, 2))


@other(1, "Bradley-Terry: the visible answer for every input", "bandit.bradley_terry")
def _(rewards):
    return RIGHT.bradley_terry(torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64))


@other(1, "win rate: one opponent only", "bandit.win_rate")
def _(preferences, log_opponent):
    return (preferences * log_opponent.exp()).sum(-1)


@other(1, "win rate: stacks of one dimension only", "bandit.win_rate")
def _(preferences, log_opponent):
    if log_opponent.ndim == 1:
        return preferences @ log_opponent.exp()
    return torch.einsum("ij,kj->ki", preferences, log_opponent.exp())


@other(1, "win rate: changes its argument", "bandit.win_rate")
def _(preferences, log_opponent):
    before = log_opponent.clone()
    wins = RIGHT.win_rate(preferences, log_opponent.sub_(log_opponent.logsumexp(-1, True)))
    log_opponent.copy_(before)  # or the tests after this one would see it, too
    return wins


@other(1, "win rate: sets the default dtype", "bandit.win_rate")
def _(preferences, log_opponent):
    torch.set_default_dtype(torch.float64)
    return RIGHT.win_rate(preferences, log_opponent)


@other(1, "win rate: the game's mean in place of a rare action's", "bandit.win_rate")
def _(preferences, log_opponent):
    law = log_opponent.exp()
    return RIGHT.win_rate(preferences, torch.where(law < 0.12, law.mean(), law).log())


# Exercise 2


@mistake(
    2,
    "h: policy and reference exchanged",
    "h has the policy above and the reference below: log pi - log pi_ref",
    "ipo.log_ratio_gap",
)
def _(logp, logp_other, ref_logp, ref_logp_other):
    return (ref_logp - logp) - (ref_logp_other - logp_other)


@mistake(
    2,
    "h: no reference",
    "the reference is missing from h: that regularises towards uniform, not towards pi_ref",
    "ipo.log_ratio_gap",
)
def _(logp, logp_other, ref_logp, ref_logp_other):
    return logp - logp_other


@mistake(
    2,
    "h: detached",
    "h carries no gradient: detach what samples, not what is learned",
    "ipo.log_ratio_gap",
)
def _(logp, logp_other, ref_logp, ref_logp_other):
    return ((logp - ref_logp) - (logp_other - ref_logp_other)).detach()


def squared(pair, p, target):
    """p (h - target)^2 + (1 - p) (h + target)^2 of a pair (log pi twice, log pi_ref twice)."""
    h = (pair[0] - pair[2]) - (pair[1] - pair[3])
    return p * (h - target) ** 2 + (1 - p) * (h + target) ** 2


@mistake(2, "IPO: all zeros", "the answer is zero everywhere", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    return 0 * logp


@mistake(
    2,
    "IPO: target 1/tau",
    "the target is 1/(2 tau), a certain preference 1 - 1/2 over tau; here it is 1/tau",
    "ipo.loss",
)
def _(*arguments):
    return squared(arguments, arguments[4], 1 / arguments[5])


@mistake(
    2,
    "IPO: target tau/2",
    "tau divides in the target: 1/(2 tau). A larger tau must pull harder towards pi_ref",
    "ipo.loss",
)
def _(*arguments):
    return squared(arguments, arguments[4], arguments[5] / 2)


@mistake(
    2,
    "IPO: winner and loser swapped",
    "winner and loser are exchanged: preference is p(y > y'), and h must grow with it",
    "ipo.loss",
)
def _(*arguments):
    return squared(arguments, 1 - arguments[4], 1 / (2 * arguments[5]))


@mistake(
    2,
    "IPO: hard label",
    "the label was rounded to a winner: weight both orders, by p and 1 - p",
    "ipo.loss",
)
def _(*arguments):
    return squared(arguments, (arguments[4] > 0.5).double(), 1 / (2 * arguments[5]))


@mistake(
    2,
    "IPO: each pair counted twice",
    "exactly 2x: did you count each pair twice? p and 1 - p already hold both orders",
    "ipo.loss",
)
def _(*arguments):
    return 2 * squared(arguments, arguments[4], 1 / (2 * arguments[5]))


@mistake(
    2,
    "IPO: mean over the batch",
    "the loss returns one value a pair; the caller weights and averages",
    "ipo.loss",
)
def _(*arguments):
    return squared(arguments, arguments[4], 1 / (2 * arguments[5])).mean()


@mistake(
    2,
    "IPO: expanded form",
    "this is the expanded form tau h^2 - (2p - 1) h: the same minimiser, another value and 1/tau "
    "of the gradient",
    "ipo.loss",
)
def _(*arguments):
    h = (arguments[0] - arguments[2]) - (arguments[1] - arguments[3])
    return arguments[5] * h**2 - (2 * arguments[4] - 1) * h


@other(2, "h: of the other response detached", "ipo.log_ratio_gap")
def _(logp, logp_other, ref_logp, ref_logp_other):
    return (logp - ref_logp) - (logp_other - ref_logp_other).detach()


@other(2, "h: changes its argument", "ipo.log_ratio_gap")
def _(logp, logp_other, ref_logp, ref_logp_other):
    before = ref_logp.clone()
    ref_logp -= ref_logp_other
    h = logp - logp_other - ref_logp
    ref_logp.copy_(before)
    return h


def of_gap(wrong):
    """An IPO loss as a function (h, p, tau)."""

    def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
        return wrong(RIGHT.gap(logp, logp_other, ref_logp, ref_logp_other), preference, tau)

    return loss


def costs(h, p, tau):
    """The right loss of h."""
    return p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (h + 1 / (2 * tau)) ** 2


@other(2, "IPO: h cut at 10 nats", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h.clamp(-10, 10), p, tau)


@other(2, "IPO: labels cut at 0.05 and 0.95", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h, p.clamp(0.05, 0.95), tau)


@other(2, "IPO: the size of h alone", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h.abs(), p, tau)


@other(2, "IPO: computed in half precision", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h.half(), p, tau).double()


@other(2, "IPO: tau is always 0.1", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h, p, 0.1)


@other(2, "IPO: absolute differences for squares", "ipo.loss")
@of_gap
def _(h, p, tau):
    return p * (h - 1 / (2 * tau)).abs() + (1 - p) * (h + 1 / (2 * tau)).abs()


@other(2, "IPO: the constant p (1 - p)/tau^2 missing", "ipo.loss")
@of_gap
def _(h, p, tau):
    return (h - (2 * p - 1) / (2 * tau)) ** 2


@other(2, "IPO: target 2/tau", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h, p, tau / 4)


@other(2, "IPO: the first pair's label for all", "ipo.loss")
@of_gap
def _(h, p, tau):
    return costs(h, p.flatten()[0], tau)


@other(2, "IPO: changes the labels", "ipo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    value = RIGHT.ipo(logp, logp_other, ref_logp, ref_logp_other, preference, tau)
    preference.clamp_(0, 1)
    return value


# Exercise 3


@mistake(
    3,
    "mixture: weight inverted",
    "beta is the weight of the reference: beta = 0 must give the policy",
    "ipo_md.mixture",
)
def _(log_pi, log_ref, beta):
    return torch.log_softmax(beta * log_pi + (1 - beta) * log_ref, -1)


@mistake(
    3,
    "mixture: arithmetic",
    "probabilities were averaged; the mixture is geometric: average the logarithms, then normalise",
    "ipo_md.mixture",
)
def _(log_pi, log_ref, beta):
    return ((1 - beta) * log_pi.exp() + beta * log_ref.exp()).log()


@mistake(
    3, "mixture: unnormalised", "the probabilities do not sum to 1: Z is missing", "ipo_md.mixture"
)
def _(log_pi, log_ref, beta):
    return (1 - beta) * log_pi + beta * log_ref


@mistake(
    3,
    "KL: reversed",
    "this is KL(pi_ref, pi): the first argument is the law of the expectation",
    "bandit.kl",
)
def _(log_pi, log_other):
    return (log_other.exp() * (log_other - log_pi)).sum(-1)


def wins_of(preferences, log_opponent):
    """The win rate of every action, for the mistakes that need a right one."""
    return (preferences @ log_opponent.exp()[..., None])[..., 0]


def answer(preferences, log_ref, tau, log_opponent):
    """The best response, for the mistakes that need a right one."""
    return torch.log_softmax(log_ref + wins_of(preferences, log_opponent) / tau, -1)


@mistake(
    3,
    "response: unnormalised",
    "the response is not a law: its probabilities do not sum to 1 (the Z in eq 12)",
    "bandit.respond",
)
def _(preferences, log_ref, tau, log_opponent):
    return log_ref + wins_of(preferences, log_opponent) / tau


@mistake(
    3,
    "response: times tau",
    "tau multiplies the win rate; in eq 12 it divides: a small tau must follow the preferences "
    "closely",
    "bandit.respond",
)
def _(preferences, log_ref, tau, log_opponent):
    return torch.log_softmax(log_ref + wins_of(preferences, log_opponent) * tau, -1)


@mistake(
    3,
    "response: no reference",
    "pi_ref is missing in front of the exponential of eq 12",
    "bandit.respond",
)
def _(preferences, log_ref, tau, log_opponent):
    return torch.log_softmax(wins_of(preferences, log_opponent) / tau, -1)


def one_side(log_pi, preferences, log_ref, tau):
    """What the best response to pi wins, less 1/2: half the duality gap."""
    best = tau * torch.logsumexp(log_ref + wins_of(preferences, log_pi) / tau, -1)
    return best + tau * leaving(log_pi, log_ref) - 0.5


def leaving(log_pi, log_ref):
    """KL(pi, pi_ref)."""
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


@mistake(
    3,
    "gap: one player",
    "exactly half: the gap adds what both players could gain",
    "bandit.duality_gap",
)
def _(log_pi, preferences, log_ref, tau):
    return one_side(log_pi, preferences, log_ref, tau)


@mistake(
    3,
    "gap: own KL missing",
    "the policy's own KL term is missing: both players pay for leaving pi_ref",
    "bandit.duality_gap",
)
def _(log_pi, preferences, log_ref, tau):
    right = 2 * one_side(log_pi, preferences, log_ref, tau)
    return right - 2 * tau * leaving(log_pi, log_ref)


@mistake(
    3,
    "gap: value of the game missing",
    "the value of the game, 1/2 a player, was not subtracted: the gap of an equilibrium is 0",
    "bandit.duality_gap",
)
def _(log_pi, preferences, log_ref, tau):
    return 2 * one_side(log_pi, preferences, log_ref, tau) + 1


@mistake(
    3,
    "equilibrium: response to pi_ref",
    "this is one response to pi_ref (offline IPO's point): the opponent must be the answer itself",
    "bandit.fixed_point",
)
def _(preferences, log_ref, tau, beta=0.0, mixture=None, tolerance=1e-11):
    return answer(preferences, log_ref, tau, log_ref)


@mistake(
    3,
    "equilibrium: plain iteration",
    "plain iteration of eq 12 does not settle on a cycle: it jumps to and fro; damp it or use "
    "newton",
    "bandit.fixed_point",
)
def _(preferences, log_ref, tau, beta=0.0, mixture=None, tolerance=1e-11):
    log_pi = log_ref
    for _ in range(500):
        blend = log_pi if mixture is None else mixture(log_pi, log_ref, beta)
        log_pi = answer(preferences, log_ref, tau, blend)
    return log_pi


@mistake(
    3,
    "equilibrium: beta ignored",
    "this is the point for beta = 0: in eq 13 the opponent is the mixture",
    "bandit.fixed_point",
)
def _(preferences, log_ref, tau, beta=0.0, mixture=None, tolerance=1e-11):
    return nash(preferences, log_ref, tau)


def nash(preferences, log_ref, tau):
    """The Nash equilibrium, for the mistakes that take it for another point."""
    log_pi = log_ref
    for _ in range(3000):  # damped enough for every game here
        towards = answer(preferences, log_ref, tau, log_pi)
        log_pi = torch.log_softmax(0.97 * log_pi + 0.03 * towards, -1)
    return log_pi


@other(3, "mixture: normalised over the first dimension", "ipo_md.mixture")
def _(log_pi, log_ref, beta):
    return torch.log_softmax((1 - beta) * log_pi + beta * log_ref, 0)


@other(3, "mixture: rare actions cut", "ipo_md.mixture")
def _(log_pi, log_ref, beta):
    return torch.log_softmax(((1 - beta) * log_pi + beta * log_ref).clamp(min=-2), -1)


@other(3, "mixture: policy at beta = 0, else one half", "ipo_md.mixture")
def _(log_pi, log_ref, beta):
    return RIGHT.mixture(log_pi, log_ref, beta if beta in (0, 1) else 0.5)


@other(3, "KL: summed over everything", "bandit.kl")
def _(log_pi, log_other):
    return RIGHT.kl(log_pi, log_other).sum()


@other(3, "KL: every term positive", "bandit.kl")
def _(log_pi, log_other):
    return (log_pi.exp() * (log_pi - log_other)).abs().sum(-1)


@other(3, "KL: in bits", "bandit.kl")
def _(log_pi, log_other):
    return RIGHT.kl(log_pi, log_other) / torch.tensor(2.0).double().log()


@other(3, "response: to the mean opponent of a stack", "bandit.respond")
def _(preferences, log_ref, tau, log_opponent):
    law = log_opponent.exp()
    if law.ndim > 1:
        law = law.flatten(0, -2).mean(0).expand(log_opponent.shape)
    return RIGHT.respond(preferences, log_ref, tau, law.log())


@other(3, "gap: one policy only", "bandit.duality_gap")
def _(log_pi, preferences, log_ref, tau):
    return RIGHT.duality_gap(log_pi, preferences, log_ref, tau).mean()


@other(3, "gap: KL of the response", "bandit.duality_gap")
def _(log_pi, preferences, log_ref, tau):
    return 2 * tau * RIGHT.kl(RIGHT.respond(preferences, log_ref, tau, log_pi), log_pi)


@other(3, "equilibrium: another law as mixture ignored", "bandit.fixed_point")
def _(preferences, log_ref, tau, beta=0.0, mixture=None, tolerance=1e-11):
    return RIGHT.fixed_point(preferences, log_ref, tau, beta)


@other(3, "equilibrium: ValueError never raised", "bandit.fixed_point")
def _(preferences, log_ref, tau, beta=0.0, mixture=RIGHT.mixture, tolerance=1e-11):
    try:
        return RIGHT.fixed_point(preferences, log_ref, tau, beta, mixture, tolerance)
    except ValueError:
        return log_ref


@other(3, "equilibrium: tau not below 0.15", "bandit.fixed_point")
def _(preferences, log_ref, tau, beta=0.0, mixture=RIGHT.mixture, tolerance=1e-11):
    return RIGHT.fixed_point(preferences, log_ref, max(tau, 0.15), beta, mixture, tolerance)


@other(3, "equilibrium: a hundred damped steps", "bandit.fixed_point")
def _(preferences, log_ref, tau, beta=0.0, mixture=RIGHT.mixture, tolerance=1e-11):
    log_pi = log_ref
    for _ in range(100):
        towards = answer(preferences, log_ref, tau, mixture(log_pi, log_ref, beta))
        log_pi = torch.log_softmax(0.97 * log_pi + 0.03 * towards, -1)
    return log_pi


# Exercise 4


def law(log_pi, log_ref, beta):
    """The geometric mixture, for exercise 6's default argument."""
    return torch.log_softmax((1 - beta) * log_pi + beta * log_ref, -1)


def expectation(
    method, log_pi, log_ref, preferences, tau, beta, mixture, detach=True, weigh=True, weight=None
):
    """The expected loss over all pairs, with places to break it."""
    if weight is None:
        weight = beta
    mixture = mixture or law
    laws = {"policy": log_pi, "mixture": mixture(log_pi, log_ref, weight)}
    first, second = (laws[who] for who in method.PAIR)
    if detach:
        first, second = first.detach(), second.detach()
    pairs = method.loss(
        log_pi[..., :, None],
        log_pi[..., None, :],
        log_ref[..., :, None],
        log_ref[..., None, :],
        preferences,
        tau,
    )
    if not weigh:
        return pairs.mean((-2, -1))
    return ((first[..., :, None] + second[..., None, :]).exp() * pairs).sum((-2, -1))


also(
    4,
    "IPO-MD: one from the policy",
    "only y' comes from the mixture: that is Nash-MD's sampling; IPO-MD draws both from it",
    {"ipo_md.PAIR": ("policy", "mixture")},
)
also(
    4,
    "IPO-MD: both from the policy",
    "both responses come from the policy: that is online IPO",
    {"ipo_md.PAIR": ("policy", "policy")},
)


@mistake(
    4,
    "IPO-MD: missing stop-gradient",
    "the sampling weights were differentiated: detach them, sampling has no gradient",
    "bandit.expected_loss",
)
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return expectation(method, log_pi, log_ref, preferences, tau, beta, mixture, detach=False)


@mistake(
    4,
    "IPO-MD: pairs not weighted",
    "all pairs count alike: weight each with the probability of drawing it",
    "bandit.expected_loss",
)
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return expectation(method, log_pi, log_ref, preferences, tau, beta, mixture, weigh=False)


@mistake(
    4,
    "IPO-MD: mixture weight inverted",
    "the mixture got 1 - beta where it wants beta, the weight of the reference",
    "bandit.expected_loss",
)
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    weight = 1 - beta
    return expectation(method, log_pi, log_ref, preferences, tau, beta, mixture, weight=weight)


@mistake(
    4,
    "IPO-MD: beta taken for tau",
    "tau and beta are exchanged: beta mixes, tau regularises",
    "bandit.expected_loss",
)
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    if beta:
        tau, beta = beta, tau
    return expectation(method, log_pi, log_ref, preferences, tau, beta, mixture)


@mistake(
    4,
    "IPO-MD: every pair twice",
    "exactly 2x: the n x n pairs already hold (y, y') and (y', y)",
    "bandit.expected_loss",
)
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return 2 * expectation(method, log_pi, log_ref, preferences, tau, beta, mixture)


@mistake(
    4,
    "IPO-MD: uncentred one-sided loss",
    "Nash-MD's one-sided loss on samples of the mixture: E[grad log pi] is not 0 there (Prop 5.1); "
    "use the pair loss",
    "ipo_md.loss",
)
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    return -(preference - 0.5 - tau * (logp - ref_logp)).detach() * logp * 4 / tau


@other(4, "expected loss: mixture ignored", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return expectation(method, log_pi, log_ref, preferences, tau, beta, None)


@other(4, "expected loss: labels cut to [0, 1]", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return expectation(method, log_pi, log_ref, preferences.clamp(0, 1), tau, beta, mixture)


@other(4, "expected loss: one policy only", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    value = expectation(method, log_pi, log_ref, preferences, tau, beta, mixture)
    return value.flatten()[0]


@other(4, "expected loss: one game only", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    game = preferences.flatten(0, -3)[0] if preferences.ndim > 2 else preferences
    return expectation(method, log_pi, log_ref, game, tau, beta, mixture)


@other(4, "expected loss: PAIR ignored", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    both = SimpleNamespace(PAIR=("mixture", "mixture"), loss=method.loss)
    return expectation(both, log_pi, log_ref, preferences, tau, beta, mixture)


@other(4, "expected loss: its own IPO loss for every method", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    own = SimpleNamespace(PAIR=method.PAIR, loss=RIGHT.ipo)
    return expectation(own, log_pi, log_ref, preferences, tau, beta, mixture)


@other(4, "expected loss: summed over a stack", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    return expectation(method, log_pi, log_ref, preferences, tau, beta, mixture).sum(0)


@other(4, "expected loss: y = y' left out", "bandit.expected_loss")
def _(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=None):
    diagonal = torch.eye(log_pi.shape[-1], dtype=torch.bool)
    masked = SimpleNamespace(
        PAIR=method.PAIR, loss=lambda *pairs: method.loss(*pairs).masked_fill(diagonal, 0.0)
    )
    return expectation(masked, log_pi, log_ref, preferences, tau, beta, mixture)


# Exercise 5


def logistic(z, p):
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z)."""
    return p * F.softplus(-z) + (1 - p) * F.softplus(z)


def of_h(wrong):
    """A DPO loss as a function (h, p, tau)."""

    def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
        h = (logp - ref_logp) - (logp_other - ref_logp_other)
        return wrong(h, preference, tau)

    return loss


def underflowing(h, p, tau):
    """The right loss, with the logarithm and the sigmoid apart."""
    return -p * torch.sigmoid(tau * h).log() - (1 - p) * torch.sigmoid(-tau * h).log()


also(
    5,
    "DPO: all zeros",
    "the answer is zero everywhere",
    {"dpo.loss": of_h(lambda h, p, tau: 0 * h)},
)
also(
    5,
    "DPO: winner and loser swapped",
    "winner and loser are exchanged: the loss must fall as h grows when p is near 1",
    {"dpo.loss": of_h(lambda h, p, tau: logistic(-tau * h, p))},
)
also(
    5,
    "DPO: h over tau",
    "tau multiplies h in DPO; it divides in IPO's target",
    {"dpo.loss": of_h(lambda h, p, tau: logistic(h / tau, p))},
)
also(
    5,
    "DPO: tau missing",
    "tau is missing: sigmoid(tau h)",
    {"dpo.loss": of_h(lambda h, p, tau: logistic(h, p))},
)
also(
    5,
    "DPO: hard label",
    "the label was rounded to a winner: weight both orders, by p and 1 - p",
    {"dpo.loss": of_h(lambda h, p, tau: logistic(tau * h, (p > 0.5).double()))},
)
also(
    5,
    "DPO: log of sigmoid",
    "log(sigmoid(z)) underflows for large |z|: use logsigmoid",
    {"dpo.loss": of_h(underflowing)},
)


@mistake(5, "DPO: no reference", "the reference is missing from h", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    return logistic(tau * (logp - logp_other), preference)


@mistake(
    5,
    "DPO point: the Nash equilibrium",
    "this is the Nash equilibrium: the very policy at which online DPO does not stop",
    "bandit.dpo_point",
)
def _(preferences, log_ref, tau):
    return nash(preferences, log_ref, tau)


GAMES = (
    "two_actions_0.7",
    "two_actions_0.5",
    "rock_paper_scissors_uniform",
    "rock_paper_scissors_biased",
    "bradley_terry_three",
)
also(
    5,
    "prediction: always Nash",
    "online DPO does not stop at Nash in general: try F.5's condition on two actions",
    {"adapters.answers": lambda exercise: dict.fromkeys(GAMES, True)},
)
also(
    5,
    "prediction: never Nash",
    "there are exceptions: where every action wins half the time against pi_ref, pi_ref is the "
    "answer to everything",
    {"adapters.answers": lambda exercise: dict.fromkeys(GAMES, False)},
)


@other(5, "DPO: smoothing ignored", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    return logistic(tau * (logp - ref_logp - logp_other + ref_logp_other), preference)


@other(5, "DPO: h cut at 30 nats", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    h = logp - ref_logp - logp_other + ref_logp_other
    p = (1 - smoothing) * preference + smoothing * (1 - preference)
    return logistic(tau * h.clamp(-30, 30), p)


@other(5, "DPO: base 2", "dpo.loss")
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    h = logp - ref_logp - logp_other + ref_logp_other
    p = (1 - smoothing) * preference + smoothing * (1 - preference)
    return logistic(tau * h, p) / torch.tensor(2.0).double().log()


@other(5, "DPO point: the RLHF policy of a fitted reward", "bandit.dpo_point")
def _(preferences, log_ref, tau):
    return RIGHT.rlhf_policy(RIGHT.fit_reward(preferences, log_ref), log_ref, tau)


@other(5, "DPO point: the reference", "bandit.dpo_point")
def _(preferences, log_ref, tau):
    return log_ref


# Exercise 6: the runs' names in another order, and one name for all


RUNS = "abcdef"
also(
    6,
    "diagnosis: one name for all",
    "six runs, six different bugs: a name given twice counts for neither",
    {"adapters.answers": lambda exercise: dict.fromkeys(RUNS, "target is 1/tau")},
)
also(
    6,
    "diagnosis: empty",
    "no name was given",
    {"adapters.answers": lambda exercise: dict.fromkeys(RUNS)},
)


# Exercise 7


def joined(prompt, response):
    """ids and mask of prompt and response in one row each, [B, P + T]."""
    ids = torch.cat([prompt.ids, response.ids], 1)
    mask = torch.cat([prompt.mask, response.mask], 1)
    return ids, mask


def scores(model, prompt, response, prompt_positions=True):
    """log-probability of every token given what is before it, [B, P + T - 1], and its mask."""
    ids, mask = joined(prompt, response)
    extra = attention(mask)
    if not prompt_positions:
        del extra["position_ids"]
    logits = model(input_ids=ids, **extra).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0], mask[:, 1:]


def response_scores(model, prompt, response, **extra):
    """The response's part of scores, 0 where masked: right, if extra is empty."""
    every, _ = scores(model, prompt, response, **extra)
    return every[:, prompt.ids.shape[1] - 1 :] * response.mask


def summed(wrong):
    """Wrong log-probabilities of tokens, and of responses as their sums."""

    def log_prob(model, prompt, response):
        return wrong(model, prompt, response).sum(1)

    return {"policy.token_log_probs": wrong, "policy.log_prob": log_prob}


@mistake(
    7,
    "log-probability: mean over tokens",
    "this is the mean over the tokens; the theory needs the sum",
    "policy.log_prob",
)
def _(model, prompt, response):
    return response_scores(model, prompt, response).sum(1) / response.lengths()


@mistake(
    7,
    "log-probability: prompt scored too",
    "the prompt's tokens were scored, too: log pi(y | x) is the response's alone",
    "policy.log_prob",
)
def _(model, prompt, response):
    every, mask = scores(model, prompt, response)
    return (every * mask).sum(1)


def without_end(model, prompt, response):
    """EOS found by comparing ids and left out."""
    words = response.ids != model.config.eos_token_id
    return response_scores(model, prompt, response) * words


also(
    7,
    "log-probability: EOS dropped",
    "the end-of-text token was left out of the sum: ending is a decision of the policy",
    summed(without_end),
)


def without_positions(model, prompt, response):
    """Positions counted from the padding's first column."""
    return response_scores(model, prompt, response, prompt_positions=False)


also(
    7,
    "log-probability: left padding counted",
    "positions were counted from the padding: count each row's from its first real token",
    summed(without_positions),
)


def shifted(model, prompt, response):
    """The logits at a token's own place instead of the place before."""
    ids, mask = joined(prompt, response)
    logits = model(input_ids=ids, **attention(mask)).logits
    every = torch.log_softmax(logits, -1).gather(2, ids[..., None])[..., 0]
    return every[:, prompt.ids.shape[1] :] * response.mask


also(
    7,
    "log-probability: off by one",
    "the logits at a position predict the next token, not the one that stands there",
    summed(shifted),
)


def score_function(advantage):
    """A Nash-MD-PG loss with another advantage (p, d, tau), d = log pi/pi_ref."""

    def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
        return -advantage(preference, logp - ref_logp, tau).detach() * logp

    return loss


also(
    7,
    "Nash-MD-PG: all zeros",
    "the gradient is zero",
    {"nash_md.loss": score_function(lambda p, d, tau: 0 * d)},
)
also(
    7,
    "Nash-MD-PG: sign",
    "the sign is wrong: descending on this loss makes losing answers likelier",
    {"nash_md.loss": score_function(lambda p, d, tau: -(p - 0.5 - tau * d))},
)
also(
    7,
    "Nash-MD-PG: no 1/2",
    "the baseline 1/2 is missing: a draw must give no reward",
    {"nash_md.loss": score_function(lambda p, d, tau: p - tau * d)},
)
also(
    7,
    "Nash-MD-PG: no KL",
    "the KL term is missing: nothing holds the policy near pi_ref",
    {"nash_md.loss": score_function(lambda p, d, tau: p - 0.5 + 0 * d)},
)
also(
    7,
    "Nash-MD-PG: KL with wrong sign",
    "the log-ratio is added; it must be subtracted, or the policy flees from pi_ref",
    {"nash_md.loss": score_function(lambda p, d, tau: p - 0.5 + tau * d)},
)
also(
    7,
    "Nash-MD-PG: KL twice",
    "the log-ratio counts twice: tau, not 2 tau",
    {"nash_md.loss": score_function(lambda p, d, tau: p - 0.5 - 2 * tau * d)},
)
also(
    7,
    "Nash-MD-PG: 1/tau",
    "tau multiplies the log-ratio here; IPO's target is what it divides",
    {"nash_md.loss": score_function(lambda p, d, tau: p - 0.5 - d / tau)},
)


@mistake(
    7,
    "Nash-MD-PG: missing stop-gradient",
    "the advantage was differentiated: detach it, or the log-ratio adds a term that is not the "
    "KL's",
    "nash_md.loss",
)
def _(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    return -(preference - 0.5 - tau * (logp - ref_logp)) * logp


def per_token(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """On tokens' log-probabilities [B, T]: each score weighted with its own log-ratio alone."""
    preference = torch.as_tensor(preference)
    if preference.ndim < 2:
        preference = preference[..., None]
    advantage = preference - 0.5 - tau * (logp - ref_logp)
    return -advantage.detach() * logp


also(
    7,
    "Nash-MD-PG: per-token KL",
    "each token was held against its own log-ratio alone: the KL term needs the whole response's",
    {"policy.log_prob": response_scores, "nash_md.loss": per_token},
)
also(
    7,
    "Nash-MD-PG: both from the policy",
    "the opponent is drawn from the mixture: PAIR",
    {"nash_md.PAIR": ("policy", "policy")},
)


def in_half(model, prompt, response):
    """Every log-probability rounded to the eight bits of bfloat16."""
    precise = RIGHT.token_log_probs(model, prompt, response)
    return precise.bfloat16().to(precise.dtype)


also(7, "log-probability: in half precision", None, summed(in_half))


def half_only_for_half(model, prompt, response):
    """The softmax in the model's own precision: right for float64, coarse for bfloat16."""
    ids, mask = joined(prompt, response)
    logits = model(input_ids=ids, **attention(mask)).logits[:, prompt.ids.shape[1] - 1 : -1]
    every = torch.log_softmax(logits, -1).gather(2, response.ids[..., None])[..., 0]
    return every * response.mask


also(7, "log-probability: softmax in the model's bfloat16", None, summed(half_only_for_half))


def junk_scored(model, prompt, response):
    """What follows the mask is scored, too."""
    every, _ = scores(model, prompt, response)
    return every[:, prompt.ids.shape[1] - 1 :]


also(7, "log-probability: junk after the mask scored", None, summed(junk_scored))


def without_attention_mask(model, prompt, response):
    """The pads on the left are read like tokens."""
    ids, mask = joined(prompt, response)
    positions = attention(mask)["position_ids"]
    logits = model(input_ids=ids, position_ids=positions).logits[:, prompt.ids.shape[1] - 1 : -1]
    every = torch.log_softmax(logits, -1).gather(2, response.ids[..., None])[..., 0]
    return every * response.mask


also(7, "log-probability: padding attended", None, summed(without_attention_mask))


def pads_as_end(model, prompt, response):
    """The response's mask found anew: through the first end-of-text, and no further."""
    before = (response.ids == 0).long().cumsum(1) - (response.ids == 0).long()
    every, _ = scores(model, prompt, response)
    return every[:, prompt.ids.shape[1] - 1 :] * (before == 0)


also(7, "log-probability: mask guessed from the ids", None, summed(pads_as_end))
also(
    7,
    "Nash-MD-PG: PAIR exchanged",
    None,
    {"nash_md.PAIR": ("mixture", "policy")},
)
also(
    7,
    "Nash-MD-PG: advantage cut at 1/4",
    None,
    {"nash_md.loss": score_function(lambda p, d, tau: (p - 0.5 - tau * d).clamp(-0.25, 0.25))},
)
also(
    7,
    "Nash-MD-PG: the batch's mean as baseline",
    None,
    {"nash_md.loss": score_function(lambda p, d, tau: p - p.mean() - tau * d)},
)


# Exercise 8


@mistake(
    8,
    "mix: weights forgotten",
    "the models' logits were added without their weights 1 - beta and beta",
    "sampler.mix",
)
def _(streams, rows):
    mixed = torch.zeros(rows, streams[0].logits.shape[1], dtype=streams[0].logits.dtype)
    for stream in streams:
        mixed[stream.rows] += stream.logits
    return mixed


@mistake(
    8,
    "draw: greedy",
    "the most probable token was taken every time; a sampler draws",
    "sampler.draw",
)
def _(logits, uniform):
    return logits.argmax(-1)


def invert(cumulative, uniform, right=True):
    """The token whose interval holds each uniform number."""
    token = torch.searchsorted(cumulative, uniform[:, None], right=right)[:, 0]
    return token.clamp(max=cumulative.shape[1] - 1)


@mistake(
    8,
    "draw: temperature 2",
    "the logits were halved (temperature 2): the losses assume temperature 1",
    "sampler.draw",
)
def _(logits, uniform):
    return invert(torch.softmax(logits / 2, -1).cumsum(-1).double(), uniform)


@other(8, "draw: uniforms rounded to float32", "sampler.draw")
def _(logits, uniform):
    return invert(torch.softmax(logits.float(), -1).cumsum(-1), uniform.float())


@other(8, "draw: uniform 0 draws an impossible token", "sampler.draw")
def _(logits, uniform):
    return invert(torch.softmax(logits.double(), -1).cumsum(-1), uniform, right=False)


@other(8, "draw: in half precision", "sampler.draw")
def _(logits, uniform):
    cumulative = torch.softmax(logits, -1).bfloat16().double().cumsum(-1)
    return invert(cumulative / cumulative[:, -1:], uniform)


@other(8, "draw: the likeliest tokens first", "sampler.draw")
def _(logits, uniform):
    law, order = torch.softmax(logits.double(), -1).sort(-1, descending=True)
    return order.gather(1, invert(law.cumsum(-1), uniform)[:, None])[:, 0]


@other(8, "draw: top-p 0.95", "sampler.draw")
def _(logits, uniform):
    law = torch.softmax(logits.double(), -1)
    order = law.argsort(-1, descending=True)
    before = law.gather(1, order).cumsum(-1) - law.gather(1, order)
    kept = torch.zeros_like(law).scatter(1, order, (before < 0.95).double())
    return RIGHT.draw((law * kept).log(), uniform)


@other(8, "mix: rows taken from the top", "sampler.mix")
def _(streams, rows):
    mixed = torch.zeros(rows, streams[0].logits.shape[1], dtype=streams[0].logits.dtype)
    for stream in streams:
        mixed[: len(stream.logits)] += stream.weight * stream.logits
    return mixed


@other(8, "mix: probabilities added", "sampler.mix")
def _(streams, rows):
    mixed = torch.zeros(rows, streams[0].logits.shape[1], dtype=streams[0].logits.dtype)
    for stream in streams:
        mixed[stream.rows] += stream.weight * stream.logits.softmax(-1)
    return mixed.log()


def numbers_from(generator, shape, count):
    """[T, B] uniform numbers. count: the prompts, for those who mean to use them again."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def next_logits(models, ids, mask):
    """Each model's logits of the next token, [B, V]. Equal rows are run once."""
    width = ids.shape[1]
    both, row = torch.cat([ids, mask.long()], 1).unique(dim=0, return_inverse=True)
    ids, extra = both[:, :width], attention(both[:, width:])
    return [model(input_ids=ids, **extra).logits[:, -1][row] for model in models]


def sample_wrongly(
    mask_of=None,
    weigh=None,
    finish=None,
    numbers=numbers_from,
    arrange=lambda part, times: part.repeat(times, 1),
    given=lambda uniforms: uniforms,
):
    """A slow sampler without caches, with places to break it."""

    @torch.no_grad()
    def sample(policy, reference, prompt, beta, generator, max_tokens=48, uniforms=None):
        betas = beta if isinstance(beta, tuple) else (beta,)
        ids, mask = arrange(prompt.ids, len(betas)), arrange(prompt.mask, len(betas))
        width, end = ids.shape[1], policy.config.eos_token_id
        weight = torch.tensor(betas).double()
        weight = (weigh(weight) if weigh else weight).repeat_interleave(len(prompt.ids))[:, None]
        uniforms = given(uniforms)
        if uniforms is None:
            uniforms = numbers(generator, (max_tokens, len(ids)), len(prompt.ids))
        running = torch.ones(len(ids), dtype=torch.bool)
        for draws in uniforms:
            logits, ref_logits = next_logits((policy, reference), ids, mask)
            token = RIGHT.draw((1 - weight) * logits + weight * ref_logits, draws)
            ids = torch.cat([ids, torch.where(running, token, end)[:, None]], 1)
            mask = torch.cat([mask, running[:, None]], 1)
            running = running & (token != end)
        ids, mask = ids[:, width:], mask[:, width:]
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        if mask_of:
            mask = mask_of(ids, mask, end)
        return ids, mask, finish(~running) if finish else ~running

    return sample


also(
    8,
    "sampler: EOS dropped",
    "the end-of-text token is part of the response: the mask holds through it",
    {"sampler.sample": sample_wrongly(mask_of=lambda ids, mask, end: mask & (ids != end))},
)
also(
    8,
    "sampler: tokens after EOS kept",
    "a response ends at its first end-of-text token: nothing after it belongs to the mask",
    {"sampler.sample": sample_wrongly(mask_of=lambda ids, mask, end: torch.ones_like(mask))},
)
also(
    8,
    "sampler: weight inverted",
    "beta is the weight of the reference: beta = 0 must sample the policy",
    {"sampler.sample": sample_wrongly(weigh=lambda beta: 1 - beta)},
)
also(
    8,
    "sampler: cut counts as finished",
    "a response cut at max_tokens has no end-of-text token: it is not finished",
    {"sampler.sample": sample_wrongly(finish=torch.ones_like)},
)


def elsewhere(generator, shape, count):
    """From torch's global generator."""
    return torch.rand(*shape, dtype=torch.float64)


def seeded_anew(generator, shape, count):
    generator.manual_seed(0)
    return numbers_from(generator, shape, count)


def globally_seeded(generator, shape, count):
    torch.manual_seed(generator.initial_seed())
    return torch.rand(*shape, dtype=torch.float64)


def shared_by_responses(generator, shape, count):
    """The second response's numbers are the first's."""
    steps, rows = shape
    return numbers_from(generator, (steps, count), count).repeat(1, rows // count)


def shared_by_rows(generator, shape, count):
    """One number for all rows."""
    return numbers_from(generator, (shape[0], 1), count).expand(*shape)


def shared_by_steps(generator, shape, count):
    """One number for all tokens of a row."""
    return numbers_from(generator, (1, shape[1]), count).expand(*shape)


def second_reversed(part, times):
    """The second response's prompts in reverse order."""
    return torch.cat([part, part.flip(0).repeat(times - 1, 1)])


def response_by_response(part, times):
    """Both responses of a prompt side by side."""
    return part.repeat_interleave(times, 0)


SAMPLERS = {
    "sampler: another generator": dict(numbers=elsewhere),
    "sampler: the generator seeded anew": dict(numbers=seeded_anew),
    "sampler: torch's global generator seeded": dict(numbers=globally_seeded),
    "sampler: y' has y's uniform numbers": dict(numbers=shared_by_responses),
    "sampler: one uniform number for all rows": dict(numbers=shared_by_rows),
    "sampler: one uniform number for all tokens": dict(numbers=shared_by_steps),
    "sampler: second prompts in reverse": dict(arrange=second_reversed),
    "sampler: responses side by side": dict(arrange=response_by_response),
    "sampler: two betas exchanged": dict(weigh=lambda beta: beta.flip(0)),
    "sampler: first beta for both": dict(weigh=lambda beta: beta[:1].expand(len(beta))),
    "sampler: mean of two betas": dict(weigh=lambda beta: beta.mean().expand(len(beta))),
    "sampler: given uniforms ignored": dict(given=lambda uniforms: None),
}
for name, broken in SAMPLERS.items():
    also(8, name, None, {"sampler.sample": sample_wrongly(**broken)})
