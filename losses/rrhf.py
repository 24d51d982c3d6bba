"""RRHF: hinges on the order of mean log-probabilities, and the best response's likelihood
(2304.05302).

tau sum over r_i < r_j of max(0, p_i - p_j) - log pi(y_best), p = log pi(y)/|y|^power, no margin.
power is 1 in the paper; tau is the weight of the ranking, 1 in the authors' scripts and 100 by
their code's default. The likelihood is a sum over tokens as in the formula; their code takes a mean
over a padded row.
There is no pi_ref in it: the likelihood of the best response alone holds the policy.
Run: python -m losses.rrhf    (the hinges of one group)
"""

import torch

from losses.groups import PAIR, pair_losses  # noqa: F401
from losses.groups import label_rewards as label_pairs  # noqa: F401

TAU = 1.0  # the default: the ranking's weight
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 4  # the default of --responses
LABEL = "rewards"  # each response's own reward; only their order counts
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # records have no rewards
CONTRASTIVE = False


def loss(logp, ref_logp, rewards, tau, *, length, power=1.0):
    """RRHF loss, one value a group.

    logp:
        [B, K] log pi(y_k | x), nats, with gradient; ref_logp is not used.
    rewards:
        [B, K] r(y_k); equals are no pair.
    tau:
        above 0, the weight of the ranking.
    length:
        [B, K] tokens, end-of-text included, 1 or more.
    power:
        0 or more, of the length that a log-probability is divided by; 0 leaves sums.

    Returns [B], unreduced: a sum over pairs, so it grows with K.
    """
    mean = logp / length**power
    worse = rewards[..., :, None] < rewards[..., None, :]
    # Rows i, columns j: what is worse must not be more likely.
    hinges = torch.relu(mean[..., :, None] - mean[..., None, :])
    ranking = (worse * hinges).sum((-2, -1))
    best = rewards.argmax(-1, keepdim=True)
    return tau * ranking - logp.gather(-1, best)[..., 0]


def worked_example():
    """Prints the loss and slopes of three responses, of which one pair is in the wrong order."""
    logp = torch.tensor([[-6.0, -4.0, -9.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    length = torch.tensor([[3, 4, 3]])
    value = loss(logp, None, rewards, 1.0, length=length)
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("r = 2, 1, 0; log pi = -6, -4, -9 over 3, 4, 3 tokens: means -2, -1, -3")
    print(f"one hinge, -1 - (-2) = 1, and the best's -log pi = 6: {value.item():.4f}")
    print("slopes -1/3 - 1, 1/4, 0:", "".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
