"""SLiC with soft labels: the hinge loss on tau h (SLiC-HF in its reference-normalised form, arXiv 2309.06657, eq 10).

Online, both responses are drawn from the policy, as for IPO. Left out: the likelihood term of the first SLiC.
Run: python slic.py    (loss and slope on both sides of the kink)
"""

import torch

from ipo import CONTRASTIVE, LEARNS_FROM, PAIR, log_ratio_gap  # noqa: F401  sampled as IPO is


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Soft-label SLiC loss p max(0, 1 - tau h) + (1 - p) max(0, 1 + tau h), one value a pair.

    Arguments as ipo.loss. Returns [B], unreduced. At h = 0 it is 1 for every p. The slope in h is -tau (2p - 1) while
    |h| < 1/tau and tau (1 - p) beyond h = 1/tau: only a hard label (p = 1) gives no gradient there.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    return preference * torch.relu(1 - tau * h) + (1 - preference) * torch.relu(1 + tau * h)


def worked_example():
    """Prints loss and slope on both sides of the kink at h = 1/tau, for a soft and a hard label."""
    zero, tau = torch.zeros((), dtype=torch.float64), 0.1
    print("tau = 0.1: the kink is at h = 1/tau = 10")
    for p in (0.7, 1.0):
        for gap in (0.0, 9.0, 11.0):
            h = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
            value = loss(h, zero, zero, zero, p, tau)
            slope = torch.autograd.grad(value, h)[0].item()
            print(f"  p = {p}   h = {gap:4.1f}   loss {value.item():.4f}   slope {slope:+.4f}")


if __name__ == "__main__":
    worked_example()
