"""DPOP ("Smaug"): DPO that is fined where the winner's probability falls (2402.13228, eq 3).

The fine penalty * max(0, log pi_ref(w) - log pi(w)) stands inside the logit, so tau multiplies it,
too. tau is the paper's beta, 0.3 there; penalty is its lambda, 50 there.
The paper has hard labels only. Here a pair counts in both orders, with weights p and 1 - p: with
soft labels every response is a winner at times, and a large penalty holds all of them where they
are (studies/stationary.py).
Run: python -m losses.dpop    (loss and slopes of one pair, with the fine and without)

w, l: the winner and the loser. Shapes: B pairs, log-probabilities are sums over tokens, in nats.
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR, log_ratio_gap  # noqa: F401  as IPO

TAU = 0.3  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # the fine looks at the winner alone


def ordered(logp_w, logp_l, ref_logp_w, ref_logp_l, tau, penalty):
    """-log sigmoid(tau (h - penalty max(0, R(w) - L(w)))) of a pair whose winner is known, [B]."""
    h = log_ratio_gap(logp_w, logp_l, ref_logp_w, ref_logp_l)
    # Inside: outside of the logarithm it would pull at pairs that are already apart.
    fine = penalty * torch.relu(ref_logp_w - logp_w)
    return -logsigmoid(tau * (h - fine))


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, penalty=50.0):
    """DPOP loss, one value a pair: both orders, weighted by p and 1 - p.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1]; 1 where y is a recorded winner, 0 where it is the loser.
    tau:
        above 0, the paper's beta.
    penalty:
        0 or more, the paper's lambda; 0 is DPO.

    Returns [B], unreduced. At pi = pi_ref it is log 2 for every p: the fine is 0 there.
    """
    first = ordered(logp, logp_other, ref_logp, ref_logp_other, tau, penalty)
    second = ordered(logp_other, logp, ref_logp_other, ref_logp, tau, penalty)
    return preference * first + (1 - preference) * second


def gradient_scale(tau):
    """2 tau, DPO's: that of the loss at pi = pi_ref where no winner's probability falls."""
    return 2 * tau


def target_gap(preference, tau, *, penalty=50.0):
    """None: the loss depends on both log-ratios, so no h is where it has no slope."""
    return None


def worked_example():
    """Prints a pair whose winner has lost a nat, with and without the fine."""
    start = torch.tensor(-3.0, dtype=torch.float64)
    tau = 0.3
    print("log pi_ref = -3 for both, log pi(w) = -4, log pi(l) = -6, p = 1, tau = 0.3: h = 2")
    for penalty, logit in ((0.0, "0.3 * 2 = 0.6"), (5.0, "0.3 (2 - 5 * 1) = -0.9")):
        logp = (start - 1).requires_grad_()
        logp_other = (start - 3).requires_grad_()
        value = loss(logp, logp_other, start, start, 1.0, tau, penalty=penalty)
        slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
        print(f"  penalty {penalty:g}: logit {logit:23s} loss = log(1 + e^-logit) = ", end="")
        print(f"{value.item():.6f}   slopes {slope.item():+.6f} {slope_other.item():+.6f}")
    print("The fine makes log pi(w) pull 1 + penalty times as hard as log pi(l).")


if __name__ == "__main__":
    worked_example()
