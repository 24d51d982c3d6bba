"""SLiC with soft labels: the hinge on tau h (SLiC-HF, reference-normalised, 2309.06657, eq 10).

Online, both responses are drawn from the policy, as for IPO.
Left out: the first SLiC's likelihood term.
Run: python slic.py    (loss and slope on both sides of the kink)
"""

import torch

from ipo import CONTRASTIVE, LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO

TAU = 0.1  # the default: for summed log-probabilities, by a sweep on the built-in task
RATE = 2e-3  # the default of --lr, by studies/rates.py


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, margin=1.0):
    """Soft-label SLiC loss, one value a pair: the two orders' hinges, weighted by p.

    p max(0, m - tau h) + (1 - p) max(0, m + tau h), with h the pair's log-ratio gap, m the margin.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1]; 1 where y is a recorded winner, 0 where it is the loser.
    tau:
        above 0, the regularisation strength.
    margin:
        above 0: the kink is at h = margin/tau. 1 in the source.

    Returns [B], unreduced. At h = 0 it is the margin for every p. The slope in h is -tau (2p - 1)
    while |h| < margin/tau and tau (1 - p) beyond h = margin/tau: only a hard label (p = 1) has no
    gradient there.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    hinge = torch.relu(margin - tau * h)
    hinge_other = torch.relu(margin + tau * h)  # of the pair in the other order: h changes sign
    return preference * hinge + (1 - preference) * hinge_other


def gradient_scale(tau):
    """2 tau, the unit of DPO and of bandit.py's steps; the gradient at h = 0 is twice that.

    The slope in h is -tau (2p - 1) between the kinks, where DPO's is -tau (p - 1/2) at h = 0: at
    pi = pi_ref the expected gradient is -4 tau times the self-play direction.
    """
    return 2 * tau


def target_gap(preference, tau, *, margin=1.0):
    """The h of a pair's smallest loss, nats: the kink on the winner's side, margin/tau, [B].

    0 for p = 1/2, where the loss is flat between the kinks.
    """
    return (preference - 0.5).sign() * margin / tau


def worked_example():
    """Prints loss and slope on both sides of the kink at h = 1/tau, for a soft and a hard label."""
    zero = torch.zeros((), dtype=torch.float64)
    tau = 0.1
    print("tau = 0.1: the kink is at h = 1/tau = 10")
    for p in (0.7, 1.0):
        for gap in (0.0, 9.0, 11.0):
            h = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
            value = loss(h, zero, zero, zero, p, tau)
            slope = torch.autograd.grad(value, h)[0].item()
            print(f"  p = {p}   h = {gap:4.1f}   loss {value.item():.4f}   slope {slope:+.4f}")


if __name__ == "__main__":
    worked_example()
