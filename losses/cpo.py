"""CPO: DPO without its reference, and the winner's likelihood (2401.08417).

-log sigmoid(tau (L(w) - L(l))) - alpha L(w), L = log pi, summed over tokens in both terms.
tau is the paper's beta, 0.1 there; alpha is 1 there. A published implementation takes the second
term as one mean over the tokens of the whole batch: that couples pairs, and a split into
micro-batches would change it. Here it is each pair's own sum.
There is no pi_ref in it: no tau leads back to it.
Soft labels: the first term weights its orders with p and 1 - p as DPO's does; for the second the
winner is y with weight p and y' with weight 1 - p.
Run: python -m losses.cpo    (both terms of one pair)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 0.1  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, alpha=1.0):
    """CPO loss, one value a pair: both orders, weighted by p and 1 - p.

    The first five arguments, [B] each, are dpo.loss's; ref_logp and ref_logp_other are not used.

    tau:
        above 0, the paper's beta.
    alpha:
        0 or more, the weight of the winner's likelihood; 0 leaves the contrast alone.

    Returns [B], unreduced. At L(y) = L(y') it is log 2 - alpha L(y) for every p.
    """
    z = tau * (logp - logp_other)
    contrast = -preference * logsigmoid(z) - (1 - preference) * logsigmoid(-z)
    likelihood = preference * logp + (1 - preference) * logp_other  # of the winner
    return contrast - alpha * likelihood


def gradient_scale(tau):
    """2 tau, DPO's unit of a step: where all responses are equally likely and alpha is 0."""
    return 2 * tau


def target_gap(preference, tau, *, alpha=1.0):
    """None: the loss has no h, and the likelihood's pull never ends."""
    return None


def worked_example():
    """Prints both terms of one pair."""
    logp = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    logp_other = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    p = 0.8
    print("log pi(y) = -3, log pi(y') = -5, p = 0.8, tau = 0.1: z = 0.1 * 2 = 0.2")
    for alpha in (0.0, 1.0):
        value = loss(logp, logp_other, None, None, p, 0.1, alpha=alpha)
        slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
        print(f"  alpha = {alpha:g}: loss {value.item():.6f}", end="")
        print(f"   slopes {slope.item():+.6f} {slope_other.item():+.6f}")
    print("  contrast 0.8 log(1 + e^-0.2) + 0.2 log(1 + e^0.2); likelihood 0.8 * 3 + 0.2 * 5 = 3.4")


if __name__ == "__main__":
    worked_example()
