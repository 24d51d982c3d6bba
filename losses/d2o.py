"""D2O, Negating Negatives: samples of the start in the winner's place (2403.03419 eq 3).

-log sigmoid(tau mean_i d(y_i) - alpha d(l)), d = log pi/pi_ref, y_i drawn from the start and l a
loser. tau is the paper's beta, 0.1, alpha 0.1, the number of y_i 11; here 4, the third response and
all after it. Both of the paper's references are the start, as here.
y and y' are the policy's own and none is called good: the loser is y' with weight p and y with
weight 1 - p, and the winner is not learned from. The paper's losers are recorded harmful answers.
Left out: recorded losers, which come without samples of the start.
Run: python -m losses.d2o    (slopes of one group)
"""

import torch
from torch.nn.functional import softplus

from losses.groups import label_first as label_pairs  # noqa: F401
from losses.groups import pair_losses  # noqa: F401

PAIR = ("policy", "policy", "reference")  # one of the first two is the loser
TAU = 0.1  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 6  # the default of --responses: two and the start's
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False
CONTRASTIVE = False


def loss(logp, ref_logp, p, tau, *, alpha=0.1):
    """D2O loss, one value a group: either of the first two as the loser, weighted.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    p:
        [B] p(y_1 > y_2 | x), how much the second is the loser.
    tau:
        above 0, the paper's beta, logits a nat of the start's samples' mean.
    alpha:
        0 or more, logits a nat of the loser.

    Returns [B], unreduced. At pi = pi_ref it is log 2 for every p.
    """
    ratio = logp - ref_logp
    kept = tau * ratio[..., 2:].mean(-1)
    second_lost = softplus(alpha * ratio[..., 1] - kept)
    first_lost = softplus(alpha * ratio[..., 0] - kept)
    return p * second_lost + (1 - p) * first_lost


def worked_example():
    """Prints the loss and slopes of one group with two samples of the start."""
    logp = torch.tensor([[-2.0, -3.0, -4.0, -5.0]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-3.0, -5.0, -4.0, -3.0]], dtype=torch.float64)
    p = torch.tensor([0.75], dtype=torch.float64)
    value = loss(logp, ref_logp, p, 0.1)
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("d = 1, 2 of y, y' and 0, -2 of the start's: tau * mean = -0.1; alpha d = 0.1, 0.2")
    print(f"0.75 log(1 + e^0.3) + 0.25 log(1 + e^0.2) = {value.item():.6f}")
    print("slopes:", "".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
