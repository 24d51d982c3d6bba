"""DPO with soft labels: the logistic loss on tau h (Rafailov et al. 2023, 2305.18290; a baseline).

Online, both responses are drawn from the policy, as for IPO. tau multiplies h here, where IPO's
divides the target. Unlike online IPO, online DPO does not stop at the regularised Nash equilibrium:
`python claims.py` shows App. F on random games.
`--set smoothing=0.1` is label smoothing, the conservative DPO of E. Mitchell's note (2023): a label
is taken to be flipped with that probability.
Left out: every later variant (losses/).
Run: python dpo.py    (loss and slope at a few h)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import CONTRASTIVE, LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO

TAU = 0.2  # the default: for summed log-probabilities, by a sweep on the built-in task
RATE = 2e-3  # the default of --lr, by studies/rates.py


def smoothed(preference, smoothing):
    """(1 - e) p + e (1 - p), the label's p if it is flipped with probability e; at 0 p, exactly."""
    return (1 - smoothing) * preference + smoothing * (1 - preference)


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    """Soft-label DPO loss -p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h), one value a pair.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1]; 1 where y is a recorded winner, 0 where it is the loser.
    tau:
        above 0, the regularisation strength.
    smoothing:
        from 0, the source's DPO, to 1/2, where every label is a draw.

    Returns [B], unreduced. At h = 0 it is log 2 for every p.
    """
    preference = smoothed(preference, smoothing)
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    # logsigmoid, not log(sigmoid): finite for h of thousands of nats.
    return -preference * logsigmoid(tau * h) - (1 - preference) * logsigmoid(-tau * h)


def gradient_scale(tau):
    """At h = 0 the expected gradient is -2 tau times the self-play direction.

    Elsewhere it bends away from it: sigmoid(tau h) is not 1/2 + tau h.
    """
    return 2 * tau


def target_gap(preference, tau, *, smoothing=0.0):
    """The h at which a pair's loss has no slope, nats: logit(p)/tau, [B], of the smoothed p.

    Without smoothing it is infinite at p = 0, 1.
    """
    return torch.logit(smoothed(preference, smoothing)) / tau


def worked_example():
    """Prints loss and slope over h at p = 0.7, tau = 0.1: no slope where sigmoid(tau h) = p."""
    zero = torch.zeros((), dtype=torch.float64)
    tau = 0.1
    p = 0.7
    print("p(y > y') = 0.7, tau = 0.1. The slope is -tau (p - sigmoid(tau h)): ", end="")
    print("zero at h = logit(0.7)/0.1 = 8.473")
    for gap in (-10.0, 0.0, 8.472979, 20.0):
        h = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
        value = loss(h, zero, zero, zero, p, tau)
        slope = torch.autograd.grad(value, h)[0].item()
        print(f"  h = {gap:8.3f}   loss {value.item():.6f}   slope {slope:+.6f}")
    print("IPO stops at h = (p - 1/2)/tau = 2: a bounded target, ", end="")
    print("even at p = 1, where DPO's is infinite.")


if __name__ == "__main__":
    worked_example()
