"""NPO: learn from losers only, for unlearning (2404.05868).

-(2/tau) log sigmoid(-tau d(l)), d = log pi/pi_ref: DPO's loss with the winner left out, times
2/tau, so that at pi = pi_ref its gradient is that of plain ascent on the loser's loss for every
tau. Further off it fades, which plain ascent does not. tau is the paper's beta, 0.1 there; pi_ref
is the model before forgetting.
Of a pair with a soft label y' is the loser with weight p and y with weight 1 - p. On the policy's
own samples what loses less than the rest rises against it, until it is pushed down as hard; on
recorded pairs nothing ends the fall (studies/stationary.py).
Left out: the variants with a term that retains other data, its likelihood or a KL.
Run: python -m losses.npo    (the fading slope)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 0.1  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # each response has a term of its own


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """NPO loss, one value a pair: each response's term, weighted by its probability of losing.

    The first five arguments, [B] each, are dpo.loss's.

    tau:
        above 0, the paper's beta.

    Returns [B], unreduced. At pi = pi_ref it is 2 log(2)/tau for every p.
    """
    lost = -logsigmoid(-tau * (logp - ref_logp))
    lost_other = -logsigmoid(-tau * (logp_other - ref_logp_other))
    # 2/tau: without it the gradient at pi = pi_ref would vanish with tau.
    return (2 / tau) * ((1 - preference) * lost + preference * lost_other)


def gradient_scale(tau):
    """2, whatever tau is, at pi = pi_ref: each response's slope there is its chance to lose."""
    return 2.0


def target_gap(preference, tau):
    """None: each response is pushed down alone, and no h stops it."""
    return None


def worked_example():
    """Prints loss and slope on a loser's log-probability as it falls, and plain ascent's."""
    zero = torch.zeros((), dtype=torch.float64)
    print("A certain loser (p = 1), tau = 0.1: loss 20 log(1 + e^(0.1 d)), ", end="")
    print("slope 2 sigmoid(0.1 d), 1 at d = 0")
    for fall in (0.0, -10.0, -50.0):
        gap = torch.tensor(fall, dtype=torch.float64, requires_grad=True)
        value = loss(zero, gap, zero, zero, 1.0, 0.1)
        slope = torch.autograd.grad(value, gap)[0].item()
        print(f"  d = {fall:5.0f}   loss {value.item():9.6f}   slope {slope:.6f}   ascent's 1")


if __name__ == "__main__":
    worked_example()
