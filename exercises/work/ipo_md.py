"""Exercises 3 and 4: your ipo_md.py.

Every name of the reference's ipo_md.py is at hand here, beside what you import. Your own helpers
may have any name: they stay yours, and change nothing for others. The handouts: exercise 3 in
fixed_point's docstring of bandit.py; exercise 4 in expected_loss's, there, too.
Run: pytest -m ex3
"""

import torch  # noqa: F401  for your code

# Exercise 3: the geometric mixture


def mixture(log_pi, log_ref, beta):
    """log of pi^(1-beta) pi_ref^beta / Z, the geometric mixture, along the last dimension.

    log_pi, log_ref:
        [..., N] log-probabilities, nats.
    beta:
        in [0, 1], the weight of the reference.

    Returns [..., N], normalised.
    """
    raise NotImplementedError("Exercise 3: write the geometric mixture")


# Exercise 4: IPO-MD

PAIR = None  # Exercise 4: who draws y and y', each "policy" or "mixture"


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

    bandit.expected_loss may pass [..., n, 1] and [..., 1, n] in place of [B]: they broadcast.
    """
    raise NotImplementedError("Exercise 4: which loss is it?")
