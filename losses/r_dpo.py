"""R-DPO: DPO whose logit gains alpha (|w| - |l|), so that length explains a part of a preference.

2403.19159, eq 9. The sign: a longer winner has a larger logit and so a smaller push, its length
accounts for its win; tau multiplies h alone. Under Bradley-Terry the policy of equal lengths is
DPO's, in general pi_ref exp((r - alpha |y|)/tau).
tau is the paper's beta. [From memory, SimPO's grid: beta 0.01, 0.05, 0.1; alpha 0.05, 0.1, 0.5, 1.]
Log-probabilities are sums, as in the formula; a published implementation takes means.
Soft labels weight the two orders with p and 1 - p.
Run: python -m losses.r_dpo    (the same pair with a longer and a shorter winner)

w, l: the winner and the loser. |y|: tokens of a response, end-of-text included.
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO

TAU = 0.1  # the default: the largest beta of the grid
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # it looks at lengths, too


def loss(
    logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, length, length_other, alpha=0.05
):
    """Soft-label R-DPO loss, one value a pair: both orders, weighted by p and 1 - p.

    -p log sigmoid(z) - (1 - p) log sigmoid(-z), with z = tau h + alpha (|y| - |y'|).
    The first five arguments, [B] each, are dpo.loss's.

    tau:
        above 0, the paper's beta.
    length, length_other:
        [B] tokens of y and y', 1 or more.
    alpha:
        0 or more, logits a token; 0 is DPO.

    Returns [B], unreduced. At h = 0 and p = 1 it is log(1 + e^-(alpha (|y| - |y'|))).
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    # In h's precision: whole numbers times alpha would be float32.
    longer = (length - length_other).to(h.dtype)
    # Outside of tau. In the other order all of z changes sign, the lengths' difference with it.
    z = tau * h + alpha * longer
    return -preference * logsigmoid(z) - (1 - preference) * logsigmoid(-z)


def gradient_scale(tau):
    """2 tau, DPO's, where both responses are of one length."""
    return 2 * tau


def target_gap(preference, tau, *, length, length_other, alpha=0.05):
    """The h at which a pair's loss has no slope, nats: (logit(p) - alpha (|y| - |y'|))/tau, [B].

    Infinite at p = 0, 1.
    """
    longer = (length - length_other).to(preference.dtype)
    return (torch.logit(preference) - alpha * longer) / tau


def worked_example():
    """Prints loss and slope of a pair whose winner is as long, longer and shorter."""
    zero = torch.zeros((), dtype=torch.float64)
    print("h = 2, tau = 0.1, p = 1, alpha = 0.05: z = 0.2 + 0.05 (|w| - |l|), loss log(1 + e^-z)")
    for length, length_other in ((10, 10), (20, 10), (10, 20)):
        h = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        lengths = dict(length=torch.tensor(length), length_other=torch.tensor(length_other))
        value = loss(h, zero, zero, zero, 1.0, 0.1, **lengths)
        slope = torch.autograd.grad(value, h)[0].item()
        z = 0.2 + 0.05 * (length - length_other)
        print(f"  |w| = {length}, |l| = {length_other}: z = {z:+.2f}", end="")
        print(f"   loss {value.item():.6f}   slope {slope:+.6f}")


if __name__ == "__main__":
    worked_example()
