"""RL against a Bradley-Terry reward: the RLHF baseline, leave-one-out (RLOO, arXiv 2402.14740).

Two responses of a prompt are drawn from the policy; each one's return r - tau log pi/pi_ref is
measured against the other's, which does not depend on it. Written for the pair this is IPO's
gradient with the reward gap r(y) - r(y') in the place of p - 1/2 (ipo.py):
    -(1/2) (r(y) - r(y') - tau h) (grad log pi(y) - grad log pi(y')).
Of K responses RLOO is the mean of this loss over all pairs: losses/rloo.py.
Left out: clipping, value functions, several steps a batch. The paper uses one sample a prompt and
names no baseline.
Run: python rl.py    (both returns and advantages of one pair)
"""

import torch

from ipo import PAIR, log_ratio_gap  # noqa: F401  sampled as IPO is

TAU = 0.2  # the default: for summed log-probabilities, by a sweep on the built-in task
RATE = 1e-3  # the default of --lr, by studies/rates.py
LABEL = "reward"  # a pair's label is the gap r(y) - r(y') of a reward model
LEARNS_FROM = 2  # each response is the other's baseline
OFFLINE = False  # the score-function gradient is right for the policy's own samples only
CONTRASTIVE = False


def loss(logp, logp_other, ref_logp, ref_logp_other, reward_gap, tau):
    """Score-function loss, one value a pair: the mean of the two responses' terms.

    Each one's baseline is the other's return.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    reward_gap:
        [B] r(y) - r(y'), nats: the logit of a Bradley-Terry preference p(y > y' | x).
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced: its value means nothing, its gradient is minus the RLHF direction.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    # of y; the advantage of y' is its negative. Detached: the score function's weight is a number.
    advantage = (reward_gap - tau * h).detach()
    return -advantage * (logp - logp_other) / 2


def gradient_scale(tau):
    """1: the gradient is minus the RLHF direction itself."""
    return 1.0


def target_gap(reward_gap, tau):
    """The h at which neither response has an advantage, nats: (r(y) - r(y'))/tau, [B]."""
    return reward_gap / tau


def worked_example():
    """Prints the returns and advantages of one pair."""
    tau = 0.1
    reward = 1.2
    reward_other = 0.4
    logp = torch.tensor(-3.0, requires_grad=True)
    logp_other = torch.tensor(-2.0, requires_grad=True)
    ref_logp = torch.tensor(-4.0)
    ref_logp_other = torch.tensor(-2.5)
    reward_gap = torch.tensor(reward - reward_other)
    value = loss(logp, logp_other, ref_logp, ref_logp_other, reward_gap, tau)
    slope, slope_other = torch.autograd.grad(value, (logp, logp_other))
    print("r = 1.2 and 0.4, log pi = -3 and -2, log pi_ref = -4 and -2.5, tau = 0.1")
    print("returns r - tau (log pi - log pi_ref): 1.2 - 0.1 = 1.1 and 0.4 - 0.05 = 0.35; ", end="")
    print("advantages +0.75 and -0.75")
    print(f"d loss / d log pi: {slope.item():+.4f} and {slope_other.item():+.4f}  ", end="")
    print("(minus the advantage over two samples)")


if __name__ == "__main__":
    worked_example()
