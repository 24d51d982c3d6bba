"""f-DPO: DPO for another divergence from the reference than the reverse KL (2309.16240).

-log sigmoid(tau (f'(u(w)) - f'(u(l)))), u = pi/pi_ref: the loss whose optimum is that of
E r - tau D_f(pi, pi_ref), where DPO's is f(u) = u log u. With d = log u:
    kind   divergence       f'(u), up to a constant that cancels
    0      reverse KL       log u            = d: DPO
    1      forward KL       -1/u             = -e^-d
    2      Jensen-Shannon   log(u/(1 + u))   = log sigmoid(d)
tau is the paper's beta, which multiplies the whole difference. The log-ratio forms matter: u itself
overflows. Soft labels weight the two orders with p and 1 - p.
Left out: the alpha divergences between kinds 0 and 1.
Run: python -m losses.f_dpo    (the three on one pair)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 0.1  # the default: DPO's paper's; f-DPO's own was not looked up
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # kind 0 alone depends on the pair through h
# e^80 is below float32's largest number. A response that is e^80 times rarer than under pi_ref has
# no slope left in kind 1: its own, of e^80 and more, would be infinite.
LARGEST = 80.0


def f_slope(log_ratio, kind):
    """f'(u) without its constant, [B], from log u."""
    if kind == 0:
        return log_ratio
    if kind == 1:
        return -(-log_ratio).clamp(max=LARGEST).exp()
    if kind == 2:
        return logsigmoid(log_ratio)
    raise ValueError(f"kind={kind}: give 0 to 2, losses/f_dpo.py's table")


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, kind=2):
    """Soft-label f-DPO loss, one value a pair: both orders, weighted by p and 1 - p.

    The first five arguments, [B] each, are dpo.loss's.

    tau:
        above 0, the paper's beta.
    kind:
        0 to 2, which divergence.

    Returns [B], unreduced. At pi = pi_ref it is log 2 for every p. Raises ValueError for another
    kind.
    """
    z = tau * (f_slope(logp - ref_logp, kind) - f_slope(logp_other - ref_logp_other, kind))
    return -preference * logsigmoid(z) - (1 - preference) * logsigmoid(-z)


def gradient_scale(tau, *, kind=2):
    """2 tau f''(1), at pi = pi_ref: DPO's for both KLs, half of it for Jensen-Shannon."""
    return tau if kind == 2 else 2 * tau


def target_gap(preference, tau, *, kind=2):
    """logit(p)/tau, [B], nats, for kind 0; None for the others, whose loss has no h."""
    return torch.logit(preference) / tau if kind == 0 else None


def worked_example():
    """Prints loss and slopes of one pair for the three divergences."""
    zero = torch.zeros((), dtype=torch.float64)
    print("pi/pi_ref = 2 for y and 1/2 for y', p = 1, tau = 1: loss log(1 + e^-z), z = ", end="")
    print("log 4, -1/2 + 2, log(2/3) - log(1/3)")
    for kind, name in enumerate(("reverse KL", "forward KL", "Jensen-Shannon")):
        logp, logp_other = torch.tensor([2.0, 0.5], dtype=torch.float64).log()
        logp.requires_grad_()
        logp_other.requires_grad_()
        value = loss(logp, logp_other, zero, zero, 1.0, 1.0, kind=kind)
        slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
        print(f"  kind {kind}  {name:15s} loss {value.item():.6f}", end="")
        print(f"   slopes {slope.item():+.6f} {slope_other.item():+.6f}")


if __name__ == "__main__":
    worked_example()
