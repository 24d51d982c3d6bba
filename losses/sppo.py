"""SPPO: each response's log-ratio is driven to its win rate against the group (2405.00675).

(log pi(y)/pi_ref(y) - (P(y) - 1/2)/tau)^2, the mean over the group, P(y) the mean win probability
against the prompt's K samples, itself with 1/2 among them as in the authors' code. Their pairs take
the best and the worst of the samples only; at K = 2 that is this loss, and the same as half the sum
over the two.
The paper's reference is the previous iterate, and 1/tau its eta, 1000 (from memory): then the
average of its iterates is the unregularised Nash policy. Here pi_ref is the start and stays, so
tau is what it is for IPO, and the policy itself stops: at tau K/(K-1), as the sample's own 1/2
brings P nearer to 1/2.
Left out: the hard targets P = 1 and 0.
Run: python -m losses.sppo    (targets and slopes of one group)
"""

import torch

import ipo
from losses.groups import PAIR, label_pairs, pair_losses, win_rates  # noqa: F401

TAU = ipo.TAU  # the default: the targets are of the size of IPO's
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 4  # the default of --responses; 5 in the paper
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # the win rates are against the policy's own samples
CONTRASTIVE = False  # each response has a target of its own, log Z taken for 1/(2 tau)


def loss(logp, ref_logp, preferences, tau):
    """SPPO loss, one value a group: the mean of its responses' squares.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    preferences:
        [B, K, K] p(y_i > y_j | x), 1/2 on the diagonal.
    tau:
        above 0, the paper's 1/eta.

    Returns [B], unreduced.
    """
    target = (win_rates(preferences) - 0.5) / tau
    return ((logp - ref_logp - target) ** 2).mean(-1)


def worked_example():
    """Prints the targets of three responses, and the slopes at pi = pi_ref."""
    p = torch.tensor([[[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]], dtype=torch.float64)
    logp = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = loss(logp, torch.zeros_like(logp), p, 0.5)
    slope = torch.autograd.grad(value.sum(), logp)[0][0]
    print("P = (0.5 + 0.7 + 0.9)/3 = 0.7, 0.5333, 0.2667; tau = 0.5: targets 0.4, 0.0667, -0.4667")
    print(f"at pi = pi_ref the loss is the mean of their squares, {value.item():.6f}")
    print("slopes -2/3 of the targets:", "".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
