"""list-MLE, DPO's Plackett-Luce form: the likelihood of the labels' whole order (2402.01878 eq 7).

-sum_k log(e^s_(k) / sum over j >= k of e^s_(j)), s = tau log pi/pi_ref, responses in the order of
their mean win probability against the group. tau is the paper's beta, 0.05 as LiPO's.
A label only puts the responses in order: no p is aimed at. At K = 2 it is DPO with a certain label.
Run: python -m losses.list_mle    (the factors of one group)
"""

import torch

from losses.groups import PAIR, label_pairs, pair_losses, win_rates  # noqa: F401

TAU = 0.05  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 4  # the default of --responses
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # records are pairs
CONTRASTIVE = False


def loss(logp, ref_logp, preferences, tau):
    """list-MLE loss, one value a group.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    preferences:
        [B, K, K] p(y_i > y_j | x), 1/2 on the diagonal.
    tau:
        above 0, the paper's beta, logits a nat.

    Returns [B], unreduced: a sum over K - 1 choices, so it grows with K.
    """
    scores = tau * (logp - ref_logp)
    # The best first; of equal ones the earlier response.
    order = win_rates(preferences).argsort(dim=-1, descending=True, stable=True)
    scores = scores.gather(-1, order)
    value = 0.0
    for place in range(scores.shape[-1] - 1):
        # Chosen among those that are left: itself and all worse ones.
        left = scores[..., place:]
        value = value + torch.logsumexp(left, -1) - left[..., 0]
    return value


def worked_example():
    """Prints the choices' probabilities for three responses, the order right and wrong."""
    p = torch.tensor([[[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]], dtype=torch.float64)
    print("win rates 0.7, 0.5333, 0.2667: the order is 1, 2, 3; e^s = 4, 2, 1 and 1, 2, 4")
    for text, weights in (("4/7 * 2/3", (4.0, 2.0, 1.0)), ("1/7 * 2/6", (1.0, 2.0, 4.0))):
        logp = torch.tensor([weights], dtype=torch.float64).log().requires_grad_()
        value = loss(logp, torch.zeros_like(logp), p, 1.0)
        slope = torch.autograd.grad(value.sum(), logp)[0][0]
        print(f"  -log({text}) = {value.item():.6f}  slopes", end="")
        print("".join(f" {number:+.4f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
