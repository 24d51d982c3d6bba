"""The first SLiC: a hinge without a reference, and the winner's likelihood (SLiC-HF, 2305.10425).

max(0, delta - L(w) + L(l)) - lambda L(y_sft), L = log pi, summed (2210.00045, 2305.10425). The
margin delta is 1/tau, so the kink is at L(w) - L(l) = 1/tau as slic.py's is at h = 1/tau; delta is
1.0 and lambda 0.1 in a published implementation (HALOs), which takes the winner as y_sft, as is
done here. slic.py at the top is the later form with a reference, on tau h.
There is no pi_ref in it: no tau leads back to it.
Soft labels: the hinges are weighted by p and 1 - p; the winner is y with weight p, else y'.
Left out: y_sft from the demonstrations, the source's other choice; ranking by a reward model.
Run: python -m losses.slic_hf    (loss and slopes on both sides of the kink)
"""

import torch

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 1.0  # the default: margin 1/tau = 1 nat
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, likelihood=0.1):
    """SLiC-HF loss, one value a pair: both orders, weighted by p and 1 - p.

    The first five arguments, [B] each, are dpo.loss's; ref_logp and ref_logp_other are not used.

    tau:
        above 0, one over the paper's delta, 1/nats.
    likelihood:
        0 or more, the paper's lambda, the weight of the winner's log-probability.

    Returns [B], unreduced. At L(y) = L(y') it is 1/tau - likelihood L(y) for every p.
    """
    gap = logp - logp_other
    hinge = torch.relu(1 / tau - gap)
    hinge_other = torch.relu(1 / tau + gap)  # of the pair in the other order
    contrast = preference * hinge + (1 - preference) * hinge_other
    return contrast - likelihood * (preference * logp + (1 - preference) * logp_other)


def gradient_scale(tau):
    """4, whatever tau is: the slope in the gap is -(2p - 1) between the kinks, on two sides."""
    return 4.0


def target_gap(preference, tau, *, likelihood=0.1):
    """None: the loss has no h, and the likelihood's pull never ends."""
    return None


def worked_example():
    """Prints loss and slopes on both sides of the kink at L(w) - L(l) = 1/tau."""
    print("log pi(l) = -5, p = 1, tau = 0.5: the margin is 2; likelihood = 0.1")
    for log_winner in (-4.0, -2.0):
        logp = torch.tensor(log_winner, dtype=torch.float64, requires_grad=True)
        logp_other = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
        value = loss(logp, logp_other, None, None, 1.0, 0.5)
        slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
        gap = log_winner + 5
        print(f"  log pi(w) = {log_winner:g}: max(0, 2 - {gap:g}) + 0.1 * {-log_winner:g}", end="")
        print(f" = {value.item():.4f}   slopes {slope.item():+.4f} {slope_other.item():+.4f}")


if __name__ == "__main__":
    worked_example()
