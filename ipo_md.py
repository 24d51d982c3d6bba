"""IPO-MD: the IPO loss on pairs drawn from the mixture of policy and reference (2403.08635, sec 5).

The whole difference to ipo.py is PAIR: both responses come from pi^(1-beta) pi_ref^beta, normalised
token by token (sampler.py), and no gradient flows through the sampling. beta = 0 is online IPO, bit
for bit; beta = 1 is offline IPO on data drawn from the reference.
Left out: the sequence-level mixture of the theory, which no language model can sample directly
(bandit.py has it).
Run: python ipo_md.py    (the mixture and the two limits on three responses)
"""

import torch

# The loss is IPO's: only the sampling differs.
from ipo import CONTRASTIVE, LABEL, LEARNS_FROM, gradient_scale, loss, target_gap  # noqa: F401

PAIR = ("mixture", "mixture")  # who draws y and y': both, or it is Nash-MD's sampling
TAU = 0.03  # the default, as for IPO
RATE = 2e-3  # the default of --lr, by studies/rates.py
BETA = 0.125  # the default weight of the reference in the mixture: one of the paper's two
OFFLINE = False  # recorded pairs are from no mixture


def mixture(log_pi, log_ref, beta):
    """log of pi^(1-beta) pi_ref^beta / Z, the geometric mixture, along the last dimension.

    log_pi, log_ref:
        [..., N] log-probabilities, nats.
    beta:
        in [0, 1], the weight of the reference.

    Returns [..., N], normalised.
    """
    return torch.log_softmax((1 - beta) * log_pi + beta * log_ref, dim=-1)


def worked_example():
    """Prints the mixture of two distributions over three responses for several beta."""
    log_pi = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64).log()
    log_ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    print("pi = (0.8, 0.1, 0.1), pi_ref = (0.2, 0.3, 0.5)")
    for beta in (0.0, 0.125, 0.5, 1.0):
        law = mixture(log_pi, log_ref, beta).exp()
        print(f"  mixture, beta = {beta:<6}", law.round(decimals=4).tolist())
    print("beta = 0.5 by hand: sqrt(0.8*0.2), sqrt(0.1*0.3), sqrt(0.1*0.5) ", end="")
    print("= 0.4, 0.1732, 0.2236; divide by 0.7968.")
    print("The arithmetic mean, (0.5, 0.2, 0.3), is another distribution: the usual mistake.")


if __name__ == "__main__":
    worked_example()
