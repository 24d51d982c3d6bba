"""PRO: each response against all worse ones, with temperatures from the rewards (2306.17492).

sum over k < K of -log(e^(p_k/T_k) / (e^(p_k/T_k) + sum over i > k of e^(p_i/T_ki)))
    - tau (K - 1)^2 log pi(y_1),
responses sorted by reward, the best first; p = log pi/|y|, the mean, 1/T_ki = r_k - r_i, and
1/T_k = max_i 1/T_ki. tau is the likelihood's weight, 0.05 in the authors' code; that log pi is a
sum. Their code adds 1e-10 inside the logarithm, which changes the gradients of unlikely responses.
There is no pi_ref in it: the likelihood of the best response alone holds the policy.
Left out: T = 1, for responses without rewards.
Run: python -m losses.pro    (the terms of one group)
"""

import torch

from losses.groups import PAIR, pair_losses  # noqa: F401
from losses.groups import label_rewards as label_pairs  # noqa: F401

TAU = 0.05  # the default: the likelihood's weight
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 4  # the default of --responses
LABEL = "rewards"  # each response's own reward: differences are the temperatures
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # records have no rewards
CONTRASTIVE = False


def loss(logp, ref_logp, rewards, tau, *, length):
    """PRO loss, one value a group.

    logp:
        [B, K] log pi(y_k | x), nats, with gradient; ref_logp is not used.
    rewards:
        [B, K] r(y_k), nats.
    tau:
        above 0, the likelihood's weight.
    length:
        [B, K] tokens, end-of-text included, 1 or more.

    Returns [B], unreduced: a sum over K - 1 terms.
    """
    order = rewards.argsort(dim=-1, descending=True, stable=True)
    rewards, mean = rewards.gather(-1, order), (logp / length).gather(-1, order)
    value = 0.0
    for place in range(rewards.shape[-1] - 1):
        sharpness = rewards[..., place, None] - rewards[..., place + 1 :]
        # The largest difference is to the last, and it is the better response's own.
        own = mean[..., place] * sharpness[..., -1]
        worse = mean[..., place + 1 :] * sharpness
        value = value + torch.logsumexp(torch.cat([own[..., None], worse], -1), -1) - own
    weight = tau * (rewards.shape[-1] - 1) ** 2
    return value - weight * logp.gather(-1, order)[..., 0]


def worked_example():
    """Prints the two terms and the slopes of three responses."""
    logp = torch.tensor([[-2.0, -4.0, -9.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    value = loss(logp, None, rewards, 0.05, length=torch.tensor([[2, 2, 3]]))
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("r = 2, 1, 0; log pi = -2, -4, -9 over 2, 2, 3 tokens: means -1, -2, -3")
    print("k = 1: p_1 (2 - 0) = -2 against -2 (2 - 1) = -2 and -3 (2 - 0) = -6")
    print("k = 2: p_2 (1 - 0) = -2 against -3 (1 - 0) = -3; likelihood 0.05 * 4 * 2 = 0.4")
    print(f"log(2 + e^-4) + log(1 + e^-1) + 0.4 = {value.item():.6f}  slopes", end="")
    print("".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
