"""ORPO: the winner's likelihood and a log-odds ratio, without a reference (2403.07691, eq 4, 7).

-Lbar(w) - tau log sigmoid(logodds(w) - logodds(l)), with Lbar = log pi(y)/|y|, the mean over
tokens, and logodds(y) = Lbar - log(1 - e^Lbar).
tau is the paper's lambda, the weight of the odds' term, 0.1 there: it weighs, it does not multiply
the logit, and there is nothing else to choose. A published implementation takes the likelihood as
one mean over the batch's tokens, prompts included: here it is each response's own mean.
There is no pi_ref in it: no tau leads back to it.
The paper has hard labels only: a pair counts in both orders, with weights p and 1 - p.
Run: python -m losses.orpo    (both terms of one pair)
"""

import torch
from torch.nn.functional import logsigmoid

from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO

TAU = 0.1  # the default: the paper's lambda
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False


def log_odds(mean):
    """log of q/(1 - q) from Lbar = log q, [B], nats."""
    # A response that is all but certain has Lbar = 0 in float32, and infinite odds.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    # expm1: 1 - e^Lbar would lose all digits near Lbar = 0.
    return mean - torch.log(-torch.expm1(mean))


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, length, length_other):
    """ORPO loss, one value a pair: both orders, weighted by p and 1 - p.

    The first five arguments, [B] each, are dpo.loss's; ref_logp and ref_logp_other are not used.

    tau:
        above 0, the paper's lambda.
    length, length_other:
        [B] tokens of y and y', end-of-text included, 1 or more.

    Returns [B], unreduced. At equal means Lbar it is -Lbar + tau log 2 for every p.
    """
    mean, mean_other = logp / length, logp_other / length_other
    z = log_odds(mean) - log_odds(mean_other)
    won = -mean - tau * logsigmoid(z)
    lost = -mean_other - tau * logsigmoid(-z)  # y' is the winner
    return preference * won + (1 - preference) * lost


def gradient_scale(tau):
    """2 tau, of the odds' term alone, where all responses are equally likely and rare.

    There odds are probabilities, and the term is tau times DPO's at tau = 1.
    """
    return 2 * tau


def target_gap(preference, tau, *, length, length_other):
    """None: the loss has no h, and the likelihood's pull never ends."""
    return None


def worked_example():
    """Prints both terms of one pair."""
    half, fifth = torch.tensor([0.5, 0.2], dtype=torch.float64).log()
    logp, logp_other = 3 * half, 4 * fifth
    value = loss(logp, logp_other, None, None, 1.0, 0.1, length=3, length_other=4)
    print("q = e^Lbar is 0.5 for the winner (3 tokens of 1/2) and 0.2 for the loser (4 of 1/5)")
    print("odds 0.5/0.5 = 1 and 0.2/0.8 = 1/4: the ratio is 4, its logarithm", end="")
    print(f" {(log_odds(half) - log_odds(fifth)).item():.6f}")
    print("loss = log 2 + 0.1 log(1 + 1/4), with tau = 0.1:", f"{value.item():.6f}")


if __name__ == "__main__":
    worked_example()
