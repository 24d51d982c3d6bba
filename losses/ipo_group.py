"""Online IPO on all pairs of K samples: eq 11's expectation, estimated with less noise.

The mean of ipo.loss over all K(K-1)/2 pairs of a prompt's K responses. Its expectation is online
IPO's, and so is the point where it stops. The noise is less: the part of it that is of a pair, and
of neither response alone, falls with the number of pairs, K/2 if each sample is used once.
On enumerated.py's GPT-2 that is most of the noise near the equilibrium (studies.rungs: crossed).
Not the paper's, whose pairs are independent. A preference is asked for every pair.
Left out: mixtures, for which y and y' have laws of their own.
Run: python -m losses.ipo_group    (the loss of one group, pair by pair)
"""

import torch

import ipo
from losses.groups import PAIR, label_pairs, pair_losses  # noqa: F401

TAU = ipo.TAU
RATE = ipo.RATE
RESPONSES = 8  # the default of --responses
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # a group is drawn by the policy
CONTRASTIVE = True  # differences of log-ratios alone


def loss(logp, ref_logp, preferences, tau):
    """Mean of ipo.loss over the pairs of each group.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    preferences:
        [B, K, K] p(y_i > y_j | x), 1/2 on the diagonal.
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced.
    """
    count = logp.shape[1]
    # Each pair once: exchanged it has the same loss, and with itself a loss of 0.
    first, second = torch.triu_indices(count, count, 1)
    pair = logp[:, first], logp[:, second], ref_logp[:, first], ref_logp[:, second]
    return ipo.loss(*pair, preferences[:, first, second], tau).mean(1)


def worked_example():
    """Prints the three pairs of a group of three at pi = pi_ref."""
    p = torch.tensor([[[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]], dtype=torch.float64)
    logp = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = loss(logp, torch.zeros_like(logp), p, 0.5)
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("p(1 > 2) = 0.7, p(1 > 3) = 0.9, p(2 > 3) = 0.8; tau = 0.5: the h that pairs aim at,")
    print("(p - 1/2)/tau, are 0.4, 0.8 and 0.6; at pi = pi_ref h is 0, a pair's slope -2 of that")
    print(f"the loss there is 1/(4 tau^2) for every pair: {value.item():.6f}")
    print("slopes on log pi, -2/3 of 0.4 + 0.8, 0.6 - 0.4 and -0.8 - 0.6:", end="")
    print("".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
