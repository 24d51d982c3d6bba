"""SimPO: the logistic loss on mean log-probabilities, without a reference (2405.14734).

-log sigmoid(tau (Lbar(w) - Lbar(l)) - gamma), Lbar(y) = log pi(y)/|y|, the mean over tokens.
tau is the paper's beta, 2 to 2.5 there, up to 10; it multiplies nats a token: for responses of ten
tokens, 2 is the size of 0.2 in DPO. gamma is a margin in logits, outside of tau; the paper's
gamma/beta is 0.3 to 0.8, to begin with 0.5, hence 1 at tau = 2.
There is no pi_ref in it: nothing holds the policy near it but few steps and a small rate. No tau
leads back to pi_ref.
Soft labels weight the two orders with p and 1 - p. gamma then widens what p asks for.
Run: python -m losses.simpo    (loss and slope with and without the margin)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 2.0  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # not a function of h: the reference and with it h are not in the loss


def loss(
    logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, length, length_other, gamma=1.0
):
    """Soft-label SimPO loss, one value a pair: both orders, weighted by p and 1 - p.

    The first five arguments, [B] each, are dpo.loss's; ref_logp and ref_logp_other are not used.

    tau:
        above 0, the paper's beta, logits a nat a token.
    length, length_other:
        [B] tokens of y and y', end-of-text included, 1 or more.
    gamma:
        0 or more, the margin in logits; 0 is the plain logistic loss.

    Returns [B], unreduced. At equal means it is log(1 + e^gamma) for every p.
    """
    z = tau * (logp / length - logp_other / length_other)
    # The margin is on the winner's side in both orders: it does not change sign with z.
    return -preference * logsigmoid(z - gamma) - (1 - preference) * logsigmoid(-z - gamma)


def gradient_scale(tau):
    """2 tau, DPO's unit of a step: where all responses are equally likely and gamma is 0."""
    return 2 * tau


def target_gap(preference, tau, *, length, length_other, gamma=1.0):
    """None: it stops at a gap of means, mean_gap, which is no h."""
    return None


def mean_gap(preference, tau, *, gamma=1.0):
    """The Lbar(y) - Lbar(y') at which a pair's loss has no slope, nats a token, [B].

    a = e^(tau gap) solves (1 - p) a^2 - (2p - 1) e^gamma a - p = 0; at gamma = 0 it is p/(1 - p).
    """
    middle = (2 * preference - 1) * torch.exp(torch.as_tensor(gamma, dtype=preference.dtype))
    root = torch.sqrt(middle**2 + 4 * preference * (1 - preference))
    return torch.log((middle + root) / (2 * (1 - preference))) / tau


def worked_example():
    """Prints loss and slopes of one pair for gamma = 0 and 1."""
    print("log pi = -12 over 10 tokens and -10 over 5: means -1.2 and -2, tau = 2: 2 * 0.8 = 1.6")
    for gamma in (0.0, 1.0):
        logp = torch.tensor(-12.0, dtype=torch.float64, requires_grad=True)
        logp_other = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
        asked = dict(length=10, length_other=5, gamma=gamma)
        value = loss(logp, logp_other, None, None, 1.0, 2.0, **asked)
        slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
        print(f"  gamma = {gamma:g}: log(1 + e^-{1.6 - gamma:.1f}) = {value.item():.6f}", end="")
        print(f"   slopes {slope.item():+.6f} {slope_other.item():+.6f}")
    p = torch.tensor([0.6, 0.9], dtype=torch.float64)
    for gamma in (0.0, 1.0):
        gaps = [round(gap, 4) for gap in mean_gap(p, 2.0, gamma=gamma).tolist()]
        print(f"  p = 0.6 and 0.9 stop at gaps of means of {gaps} for gamma = {gamma:g}")


if __name__ == "__main__":
    worked_example()
