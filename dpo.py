"""DPO with soft labels: the logistic loss on tau h (Rafailov et al. 2023, arXiv 2305.18290; the paper's baseline).

Online, both responses are drawn from the policy, as for IPO. tau multiplies h here, where IPO's divides the target.
Unlike online IPO, online DPO does not stop at the regularised Nash equilibrium (App. F; `python bandit.py --check`).
Left out: label smoothing and every later variant.
Run: python dpo.py    (loss and slope at a few h)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import CONTRASTIVE, LEARNS_FROM, PAIR, log_ratio_gap  # noqa: F401  sampled as IPO is


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Soft-label DPO loss -p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h), one value a pair.

    Arguments as ipo.loss. Returns [B], unreduced. At h = 0 it is log 2 for every p.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    # logsigmoid, not log(sigmoid): finite for h of thousands of nats.
    return -preference * logsigmoid(tau * h) - (1 - preference) * logsigmoid(-tau * h)


def worked_example():
    """Prints loss and slope over h at p = 0.7, tau = 0.1; the slope is zero where sigmoid(tau h) = p."""
    zero, tau, p = torch.zeros((), dtype=torch.float64), 0.1, 0.7
    print(
        "p(y > y') = 0.7, tau = 0.1. The slope is -tau (p - sigmoid(tau h)): zero at h = logit(0.7)/0.1 = 8.473"
    )
    for gap in (-10.0, 0.0, 8.472979, 20.0):
        h = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
        value = loss(h, zero, zero, zero, p, tau)
        print(
            f"  h = {gap:8.3f}   loss {value.item():.6f}   slope {torch.autograd.grad(value, h)[0].item():+.6f}"
        )
    print(
        "IPO stops at h = (p - 1/2)/tau = 2: a bounded target, even at p = 1, where DPO's is infinite."
    )


if __name__ == "__main__":
    worked_example()
