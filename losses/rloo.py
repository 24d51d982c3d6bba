"""RLOO: the score function with the mean of the others' returns as baseline (2402.14740).

ascent on sum_i grad log pi(y_i) (R_i - mean over j != i of R_j)/K, R = r - tau log pi/pi_ref: the
KL is a part of the return. The same as K/(K-1) (R_i - mean of all R).
An average over all pairs of a group of rl.py's loss, which is RLOO at K = 2: each pair is each
other's baseline, and the mean of (R_i - R_j)(L_i - L_j)/2 over pairs is the sum above.
K is 2 or 4 in the paper; its beta, our tau, is of the size of 0.03 to 0.1 there (from memory).
Left out: clipping, several steps a batch.
Run: python -m losses.rloo    (returns, baselines and slopes of one group)
"""

import torch

import rl
from losses.groups import PAIR, pair_losses  # noqa: F401
from losses.groups import label_rewards as label_pairs  # noqa: F401

TAU = rl.TAU  # the default: by a sweep on the built-in task
RATE = rl.RATE  # the default of --lr
RESPONSES = 4  # the default of --responses
LABEL = "rewards"  # each response's own reward
LEARNS_FROM = 2  # all of a group: each is the others' baseline
OFFLINE = False  # the score-function gradient is right for the policy's own samples only
CONTRASTIVE = False


def loss(logp, ref_logp, rewards, tau):
    """Score-function loss, one value a group: the mean of rl.loss over its pairs.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    rewards:
        [B, K] r(y_k), nats; a constant of the prompt cancels.
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced: its value means nothing, its gradient is minus the RLHF direction.
    """
    count = logp.shape[-1]
    i, j = torch.triu_indices(count, count, 1, device=logp.device)
    sides = logp[..., i], logp[..., j], ref_logp[..., i], ref_logp[..., j]
    return rl.loss(*sides, rewards[..., i] - rewards[..., j], tau).mean(-1)


def worked_example():
    """Prints the returns and slopes of three responses."""
    logp = torch.tensor([[-3.0, -2.0, -4.0]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-4.0, -2.5, -4.0]], dtype=torch.float64)
    rewards = torch.tensor([[1.2, 0.4, 0.0]], dtype=torch.float64)
    value = loss(logp, ref_logp, rewards, 0.1)
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("r = 1.2, 0.4, 0, log pi/pi_ref = 1, 0.5, 0, tau = 0.1: returns 1.1, 0.35, 0")
    print("baselines (0.35 + 0)/2 = 0.175, (1.1 + 0)/2 = 0.55, (1.1 + 0.35)/2 = 0.725")
    print("advantages 0.925, -0.2, -0.725, the slopes minus a third of them:", end="")
    print("".join(f" {number:+.6f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
