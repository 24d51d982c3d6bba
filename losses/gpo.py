"""GPO: one convex function f of z = tau h for every contrastive loss (2402.05749) [from memory].

    kind   f(z)                  at pi = pi_ref   a method of its own
    0      log(1 + e^-z)         log 2            dpo.py
    1      (z - 1)^2             1                ipo.py at tau/2, times tau^2
    2      max(0, 1 - z)         1                slic.py
    3      e^-z                  1                exponential
    4      max(0, 1 - z)^2       1                truncated quadratic
    5      1/(1 + e^z)^2         1/4              Savage, convex for z > -log 2 only
The family asks for f convex with f'(0) < 0. tau is the paper's beta; TAU is not from it. Soft
labels weight the two orders with p and 1 - p, as in all of the top's contrastive losses.
Left out: the paper's analysis of how f regularises.
Run: python -m losses.gpo    (all six at one h)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import CONTRASTIVE, LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO

TAU = 0.1  # the default: of dpo's size, not the paper's
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
SLOPES = (-0.5, -2.0, -1.0, -1.0, -2.0, -0.25)  # f'(0) of every kind
LARGEST = 80.0  # e^80 is below float32's largest number: a kind-3 pair beyond has no slope left


def convex(z, kind):
    """f(z) of one kind, [B]."""
    if kind == 0:
        return -logsigmoid(z)
    if kind == 1:
        return (z - 1) ** 2
    if kind == 2:
        return torch.relu(1 - z)
    if kind == 3:
        return (-z).clamp(max=LARGEST).exp()
    if kind == 4:
        return torch.relu(1 - z) ** 2
    if kind == 5:
        return torch.sigmoid(-z) ** 2  # 1/(1 + e^z), without an e^z that overflows
    raise ValueError(f"kind={kind}: give 0 to 5, losses/gpo.py's table")


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, kind=3):
    """Soft-label GPO loss p f(tau h) + (1 - p) f(-tau h), one value a pair.

    The first five arguments, [B] each, are ipo.loss's.

    tau:
        above 0, the paper's beta.
    kind:
        0 to 5, which f.

    Returns [B], unreduced. At h = 0 it is f(0) for every p. Raises ValueError for another kind.
    """
    z = tau * log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    return preference * convex(z, kind) + (1 - preference) * convex(-z, kind)


def gradient_scale(tau, *, kind=3):
    """-4 tau f'(0), at h = 0: the slope in h is 2 tau f'(0) (p - 1/2), and a pair has two sides."""
    return -4 * tau * SLOPES[kind]


def target_gap(preference, tau, *, kind=3):
    """The h of a pair's smallest loss, nats, [B]: where p f'(z) = (1 - p) f'(-z), z = tau h."""
    if kind in (1, 4):
        return (2 * preference - 1) / tau
    if kind == 2:
        return (preference - 0.5).sign() / tau  # the kink on the winner's side
    z = torch.logit(preference)  # kinds 0 and 5: sigmoid(z) = p
    return z / (2 * tau) if kind == 3 else z / tau


def worked_example():
    """Prints loss, slope and target of every kind at h = 2, p = 0.7, tau = 0.5, so at z = 1."""
    zero = torch.zeros((), dtype=torch.float64)
    p = torch.tensor(0.7, dtype=torch.float64)
    print("h = 2, tau = 0.5: z = 1; p = 0.7: loss 0.7 f(1) + 0.3 f(-1)")
    names = ("log(1 + e^-z)", "(z - 1)^2", "max(0, 1 - z)", "e^-z", "max(0, 1 - z)^2", "Savage")
    for kind, name in enumerate(names):
        h = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        value = loss(h, zero, zero, zero, p, 0.5, kind=kind)
        slope = torch.autograd.grad(value, h)[0].item()
        target = target_gap(p, 0.5, kind=kind).item()
        print(f"  kind {kind}  {name:16s} loss {value.item():.6f}   slope {slope:+.6f}", end="")
        print(f"   no pull at h = {target:.6f}")


if __name__ == "__main__":
    worked_example()
