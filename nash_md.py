"""Nash-MD-PG: a policy gradient against policy and reference mixed (NLHF, 2312.00886, section 7).

y is drawn from the policy and learned from; y' is drawn from the mixture and only plays against it.
The KL term is part of the score-function gradient, through the log-ratio of the *whole* response:
weighting each token's score by its own log-ratio alone is another gradient, and stops at another
policy. beta = 0 is self-play.
Left out: variance reduction beyond the baseline 1/2.
Run: python nash_md.py    (one sample's gradient by hand, and the expectation over all pairs)
"""

import torch

from ipo_md import mixture

PAIR = ("policy", "mixture")  # who draws y and y'
TAU = 0.03  # the default: for summed log-probabilities, by a sweep on the built-in task
RATE = 5e-4  # the default of --lr, by studies/rates.py
BETA = 0.125  # the default weight of the reference in the mixture: the paper's
LABEL = "preference"  # a pair's label is p(y > y')
LEARNS_FROM = 1  # y alone: the opponent's log-probability is not needed
OFFLINE = False  # the score-function gradient is right for the policy's own samples only
CONTRASTIVE = False


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Score-function loss -SG[p - 1/2 - tau log pi(y)/pi_ref(y)] log pi(y), one value a pair.

    logp:
        [B] log pi(y | x), nats, with gradient.
    logp_other, ref_logp_other:
        not used, may be None.
    ref_logp:
        [B] log pi_ref(y | x), nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1].
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced: its value means nothing, its gradient is minus the Nash-MD-PG direction.
    """
    advantage = preference - 0.5 - tau * (logp - ref_logp)  # 1/2: no reward for a draw
    # detached: differentiating the log-ratio here adds a term that is not the KL's
    return -advantage.detach() * logp


def gradient_scale(tau):
    """1: minus the gradient is the Nash-MD-PG direction, the unit of the other methods' scales."""
    return 1.0


def target_gap(preference, tau):
    """The log pi(y)/pi_ref(y) at which a sample has no advantage, nats: (p - 1/2)/tau, [B]."""
    return (preference - 0.5) / tau


def worked_example():
    """Prints one sample's advantage, and the expected gradient with and without a mixture."""
    logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    log_ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    wins = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
    log_pi = torch.log_softmax(logits, 0)
    tau = 0.1
    pi = log_pi.exp()
    log_ratio = (log_pi[0] - log_ref[0]).item()
    advantage = 0.4 - tau * log_ratio

    print("pi = softmax(0.5, 0, -0.5) =", pi.round(decimals=4).tolist(), end="  ")
    print("pi_ref = (0.2, 0.3, 0.5), tau = 0.1")
    print("y = 1st, y' = 2nd, p(y > y') = 0.9:")
    print(f"  log pi(y)/pi_ref(y) = log({pi[0].item():.4f}/0.2) = {log_ratio:.4f}")
    print(f"  advantage = 0.9 - 0.5 - 0.1 * {log_ratio:.4f} = {advantage:.4f}; ", end="")
    print("the step is its multiple of grad log pi(y)")
    # [3, 3]: row y, column y'. The opponent enters through the label alone.
    pairs = loss(log_pi[:, None], None, log_ref[:, None], None, wins, tau)
    for beta in (0.0, 0.5):
        log_opponent = mixture(log_pi, log_ref, beta)
        # Detached: sampling has no gradient.
        weight = (log_pi[:, None] + log_opponent[None]).exp().detach()
        gradient = torch.autograd.grad((weight * pairs).sum(), logits, retain_graph=True)[0]
        print(f"expected gradient over all pairs, beta = {beta}: ", end=" ")
        print(gradient.round(decimals=5).tolist())


if __name__ == "__main__":
    worked_example()
