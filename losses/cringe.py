"""Pairwise CRINGE: the winner's likelihood, the loser's tokens against their rivals, behind a gate.

    gate * (-L(w) + alpha * sum_t -log(e^s / (e^s + e^(s_t)))),  gate = sigmoid((b - M)/tau)
(2312.16682; the token term is 2211.05826's.) L = log pi, summed. At every token t of the loser, s_t
is its logit and s that of a rival: one drawn by softmax from the k largest other logits. Here the
draw's expectation is taken in its place: its weights have no gradient, as a draw has none, and s
has, as in the source. M = L(w) - L(l): a pair that is b apart and more fades from the loss.
tau is the gate's temperature in nats: no regularisation, and there is no pi_ref in the loss.
[From memory, not verified: b = -10 and tau = 10, k = 5 (one published default is 1), and that the
gate is a number without gradient.] alpha is 1. The sums are each pair's own; the source divides a
batch's by all its tokens. A pair counts in both orders, with weights p and 1 - p.
Run: python -m losses.cringe    (one token's term and one pair's gate)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO
from losses.logits import response_logits

TAU = 10.0  # the default: the gate's temperature [from memory]
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False
RIVALS = 5  # k; a property of `extra`, which no option reaches


def token_terms(logits, ids):
    """Every token's term against its rivals, [...], from logits [..., V] and ids [...]."""
    own = logits.gather(-1, ids[..., None])
    others = logits.scatter(-1, ids[..., None], -torch.inf)
    rivals = others.topk(min(RIVALS, logits.shape[-1] - 1), -1).values
    weight = rivals.softmax(-1).detach()  # the draw's law: a number
    term = -logsigmoid(rivals - own)
    # Ids that the tokenizer lacks are no rivals: 0 times infinity otherwise.
    return (weight * term.masked_fill(rivals == -torch.inf, 0.0)).sum(-1)


def extra(policy, reference, prompt, response):
    """The sum of a response's token terms, as a loser, [B], with gradient in the policy."""
    logits = response_logits(policy, prompt, response)
    return token_terms(logits, response.ids).masked_fill(~response.mask, 0.0).sum(1)


def ordered(logp_w, logp_l, terms_l, tau, alpha, b):
    """The loss of a pair whose winner is known, [B]."""
    # Detached: it says how much a pair counts, and must not be a goal itself.
    gate = torch.sigmoid((b - (logp_w - logp_l)) / tau).detach()
    return gate * (-logp_w + alpha * terms_l)


def loss(
    logp, logp_other, ref_logp, ref_logp_other, p, tau, *, extra, extra_other, alpha=1.0, b=-10.0
):
    """Pairwise CRINGE loss, one value a pair: both orders, weighted by p and 1 - p.

    The first six arguments are dpo.loss's, p its preference; the reference's are not used.

    extra, extra_other:
        [B] the token terms of y and y' as losers, with gradient.
    alpha:
        0 or more, the weight of the loser's tokens.
    b:
        nats, the L(w) - L(l) at which half of a pair counts.

    Returns [B], unreduced.
    """
    first = ordered(logp, logp_other, extra_other, tau, alpha, b)
    second = ordered(logp_other, logp, extra, tau, alpha, b)
    return p * first + (1 - p) * second


def gradient_scale(tau):
    """1: a step in units of the winner's likelihood, of which the gate lets a part through."""
    return 1.0


def target_gap(preference, tau, *, extra, extra_other, alpha=1.0, b=-10.0):
    """None: the gate fades and never closes."""
    return None


def worked_example():
    """Prints the terms of one token against two rivals, and a pair's gate and loss."""
    laws = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    term = token_terms(laws.log(), torch.tensor(2))
    print("probabilities 0.5, 0.3 and 0.2 of the loser's token: rivals with weights 5/8 and 3/8")
    print("  5/8 log(1 + 0.2/0.5) + 3/8 log(1 + 0.2/0.3) =", f"{term.item():.6f}")
    logp, logp_other = torch.tensor([0.5, 0.2], dtype=torch.float64).log()
    given = dict(extra=torch.zeros(()), extra_other=term, b=0.0)
    value = loss(logp, logp_other, None, None, 1.0, 1.0, **given)
    print(
        "w the first, b = 0, tau = 1: gate 1/(1 + 0.5/0.2) = 2/7; loss 2/7 (log 2 + term) =", end=""
    )
    print(f" {value.item():.6f}")


if __name__ == "__main__":
    worked_example()
