"""TDPO: DPO with the forward KL along both responses, token by token (2404.11999).

-log sigmoid(tau (h - alpha (K(l) - sg K(w)))), sg: no gradient, where
K(y) = sum over y's tokens of KL(pi_ref(. | x, y_<t), pi(. | x, y_<t)), over the whole vocabulary.
That is TDPO2 (kind=2; alpha 0.5). TDPO1 (kind=1) has alpha = 1 and gradient through both K;
the authors' code defaults to it. tau is the paper's beta, 0.1.
The paper has hard labels only: a pair counts in both orders, with weights p and 1 - p, each order
with its own K detached.
The full-vocabulary KL needs both models' logits: `extra` reads each response once more.
Run: python -m losses.tdpo    (one pair's logit in both kinds)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO
from losses.logits import response_logits

TAU = 0.1  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # the KLs are not h


def forward_kl(log_pi, log_ref):
    """KL(pi_ref, pi) in nats over the last axis, [..., V] -> [...]; not KL(pi, pi_ref)."""
    # Ids that the tokenizer lacks have -inf on both sides: they add nothing, not inf - inf.
    log_ratio = (log_ref - log_pi).masked_fill(log_ref == -torch.inf, 0.0)
    return (log_ref.exp() * log_ratio).sum(-1)


def extra(policy, reference, prompt, response):
    """K(y), [B] nats, with gradient in the policy: the sum of the tokens' forward KLs."""
    log_pi = response_logits(policy, prompt, response).log_softmax(-1)
    with torch.no_grad():
        log_ref = response_logits(reference, prompt, response).log_softmax(-1)
    return forward_kl(log_pi, log_ref).masked_fill(~response.mask, 0.0).sum(1)


def ordered(h, kl_w, kl_l, tau, alpha, kind):
    """The loss of a pair whose winner is known, [B]."""
    if kind == 1:
        return -logsigmoid(tau * (h - (kl_l - kl_w)))
    # Detached: the winner's KL is a level to compare with, the loser's alone is lowered.
    return -logsigmoid(tau * (h - alpha * (kl_l - kl_w.detach())))


def loss(
    logp, logp_other, ref_logp, ref_logp_other, p, tau, *, extra, extra_other, alpha=0.5, kind=2
):
    """TDPO loss, one value a pair: both orders, weighted by p and 1 - p.

    The first six arguments are dpo.loss's, p its preference.

    extra, extra_other:
        [B] K(y) and K(y'), nats, with gradient.
    alpha:
        0 or more, the weight of the KLs in TDPO2; 0 is DPO.
    kind:
        1 or 2, for TDPO1 and TDPO2.

    Returns [B], unreduced. At pi = pi_ref it is log 2 for every p.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    first = ordered(h, extra, extra_other, tau, alpha, kind)
    second = ordered(-h, extra_other, extra, tau, alpha, kind)
    return p * first + (1 - p) * second


def gradient_scale(tau):
    """2 tau, DPO's: at pi = pi_ref the KLs and their gradients are 0."""
    return 2 * tau


def target_gap(preference, tau, *, extra, extra_other, alpha=0.5, kind=2):
    """The h at which a pair's loss has no slope in h: logit(p)/tau + alpha (K(y') - K(y)), [B]."""
    weight = 1.0 if kind == 1 else alpha
    return torch.logit(preference) / tau + weight * (extra_other - extra)


def worked_example():
    """Prints the logit and the loss of one pair in both kinds, and the slopes on the two K."""
    zero = torch.zeros((), dtype=torch.float64)
    print("h = 2, K(w) = 0.5, K(l) = 1.5, tau = 0.1, p = 1: the loss is log(1 + e^-z)")
    for kind, text in ((1, "0.1 (2 - (1.5 - 0.5)) = 0.1 "), (2, "0.1 (2 - 0.5 * 1) = 0.15")):
        h = torch.tensor(2.0, dtype=torch.float64)
        kl_w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        kl_l = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        given = dict(extra=kl_w, extra_other=kl_l, kind=kind)
        value = loss(h, zero, zero, zero, 1.0, 0.1, **given)
        slopes = torch.autograd.grad(value, (kl_w, kl_l), materialize_grads=True)
        print(f"  TDPO{kind}: z = {text}  loss {value.item():.6f}", end="")
        print(f"   slopes on K(w), K(l): {slopes[0].item():+.6f} {slopes[1].item():+.6f}")


if __name__ == "__main__":
    worked_example()
