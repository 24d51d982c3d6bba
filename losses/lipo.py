"""LiPO-lambda: a ranking loss whose pairs weigh what their exchange would cost (2402.01878 eq 8).

sum over psi_i > psi_j of D_ij log(1 + e^-(s_i - s_j)), s = tau log pi/pi_ref, where
D_ij = |G_i - G_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, G = 2^psi - 1, psi the mean win
probability against the group and rank by the current s, from 1: LambdaLoss for DCG. tau is the
paper's beta, 0.05, K its list of 8; 4 here. The text that was read prints D(rank) without the
inverse; sum G/D, the gain that it is about, fixes it.
A label only puts the responses in order and weighs them: no p is aimed at. At K = 2 it is DPO with
a certain label, times a constant.
Left out: the division by the ideal DCG, as in allRank.
Run: python -m losses.lipo    (the weights of one group in two current orders)
"""

import torch
from torch.nn.functional import softplus

from losses.groups import PAIR, label_pairs, pair_losses, win_rates  # noqa: F401

TAU = 0.05  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 4  # the default of --responses
LABEL = "preference"
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # records are pairs
CONTRASTIVE = False


def lambdas(scores, psi):
    """The pairs' weights D_ij, symmetric, without gradient: [..., K] each -> [..., K, K]."""
    # From 1, the largest score first; of equal ones the earlier response.
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1).to(scores.dtype) + 1
    # Detached, as usual in LambdaLoss: the weight is not to be lowered by a change of ranks.
    discount = 1 / torch.log1p(rank)
    gain = torch.exp2(psi) - 1
    return differences(gain).abs() * differences(discount).abs()


def differences(values):
    """values_i - values_j: [..., K] -> [..., K, K], rows i."""
    return values[..., :, None] - values[..., None, :]


def loss(logp, ref_logp, preferences, tau):
    """LiPO-lambda loss, one value a group.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    preferences:
        [B, K, K] p(y_i > y_j | x), 1/2 on the diagonal.
    tau:
        above 0, the paper's beta, logits a nat.

    Returns [B], unreduced: a sum over pairs, so it grows with K.
    """
    scores = tau * (logp - ref_logp)
    psi = win_rates(preferences)
    # An ordered pair counts once, the better first; equals are no pair.
    ordered = (differences(psi) > 0).to(scores.dtype)
    weight = ordered * lambdas(scores, psi)
    return (weight * softplus(-differences(scores))).sum((-2, -1))


def worked_example():
    """Prints the weights and the loss of three responses, in the right order and in the wrong."""
    p = torch.tensor([[[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]]], dtype=torch.float64)
    psi = win_rates(p)
    print(f"psi = {rounded(psi[0])}, gains 2^psi - 1 = {rounded(torch.exp2(psi[0]) - 1)}")
    print("1/log(1 + rank) for ranks 1, 2, 3: 1.4427 0.9102 0.7213; tau = 1, pi_ref = 1")
    for text, logp in (("right", (-1.0, -2.0, -3.0)), ("wrong", (-3.0, -2.0, -1.0))):
        logp = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
        weight = lambdas(logp, psi)[0]
        value = loss(logp, torch.zeros_like(logp), p, 1.0)
        slope = torch.autograd.grad(value.sum(), logp)[0]
        print(f"  s = {rounded(logp[0])}, {text} order: D_12, D_13, D_23", end=" ")
        print(f"{weight[0, 1]:.4f} {weight[0, 2]:.4f} {weight[1, 2]:.4f}", end="")
        print(f"  loss {value.item():.4f}  slopes {rounded(slope[0])}")


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


if __name__ == "__main__":
    worked_example()
