"""Exercises 4 and 6: your ipo_md.py. Copy it to a folder of your own and fill it in.

This file is run on top of the reference's ipo_md.py: every other name of that file is at hand, and
what you define here takes the place of its own. The handouts: exercise 4 in sample's docstring of
sampler.py; exercise 6 in expected_loss's docstring of bandit.py.
Run: pytest --impl DIR -m ex4    (DIR: your folder)
"""

import torch  # noqa: F401  for your code

# Exercise 4: the geometric mixture and its sampler


def mixture(log_pi, log_ref, beta):
    """log of pi^(1-beta) pi_ref^beta / Z, the geometric mixture, along the last dimension.

    log_pi, log_ref:
        [..., N] log-probabilities, nats.
    beta:
        in [0, 1], the weight of the reference.

    Returns [..., N], normalised.
    """
    raise NotImplementedError("Exercise 4: write the geometric mixture")


# Exercise 6: IPO-MD

PAIR = None  # Exercise 6: who draws y and y', each "policy" or "mixture"


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Soft-label IPO loss, one value a pair (eq 10, 11): the two orders' squares, weighted by p.

    p (h - 1/(2 tau))^2 + (1 - p) (h + 1/(2 tau))^2, with h the pair's log-ratio gap.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1]; 1 where y is a recorded winner, 0 where it is the loser.
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced. At h = 0 it is 1/(4 tau^2) for every p.
    """
    raise NotImplementedError("Exercise 6: which loss is it?")
