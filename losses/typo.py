"""TYPO: the preferences' cross-entropy without a reference, and a KL that keeps it (2407.09072).

log(1 + pi(l)/pi(w)) + tau KL(pi_ref, pi); for a soft label the cross-entropy of p and
pi(w)/(pi(w) + pi(l)), sums, slope 1. tau is the paper's lambda, its only parameter; its value on
language models is not known. (The compositional loss of EXPO, 2506.07492, is the same.)
The KL is the forward one, of the reference's samples: -log pi(y) of responses drawn from pi_ref, a
supervised loss. log pi_ref is added, a constant, so that its value is an estimate of the KL.
y and y' are the policy's, the third response and all after it the reference's.
tau to 0 leads to the Bradley-Terry policy, a large tau to pi_ref, and where pi_ref is already that
policy it stays for every tau; DPO and IPO do neither.
Left out: recorded pairs, which come without a sample of the reference.
Run: python -m losses.typo    (slopes of one group, at the reference and beside it)
"""

import torch
from torch.nn.functional import softplus

from losses.groups import label_first as label_pairs  # noqa: F401
from losses.groups import pair_losses  # noqa: F401

PAIR = ("policy", "policy", "reference")  # the first two are compared, the others are kept likely
TAU = 1.0  # the default: the paper's lambda, a guess
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 3  # the default of --responses: more are more samples of the reference
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False
CONTRASTIVE = False


def loss(logp, ref_logp, p, tau):
    """TYPO loss, one value a group.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    p:
        [B] p(y_1 > y_2 | x).
    tau:
        above 0, the paper's lambda, the weight of the KL.

    Returns [B], unreduced. At pi = pi_ref the KL's part is 0.
    """
    gap = logp[..., 0] - logp[..., 1]
    entropy = p * softplus(-gap) + (1 - p) * softplus(gap)
    kl = (ref_logp[..., 2:] - logp[..., 2:]).mean(-1)
    return entropy + tau * kl


def worked_example():
    """Prints the loss and slopes of one group, for two weights of the KL."""
    print("pi = 0.4, 0.2 of y, y' and 0.1 of the reference's y, pi_ref 0.2 of that, p = 0.9")
    for tau in (0.1, 1.0):
        logp = torch.tensor([[0.4, 0.2, 0.1]], dtype=torch.float64).log().requires_grad_()
        ref_logp = torch.tensor([[0.4, 0.2, 0.2]], dtype=torch.float64).log()
        value = loss(logp, ref_logp, torch.tensor([0.9], dtype=torch.float64), tau)
        slope = torch.autograd.grad(value.sum(), logp)[0][0]
        print(f"  0.9 log(3/2) + 0.1 log 3 + {tau:g} log 2 = {value.item():.6f}  slopes", end="")
        print("".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
