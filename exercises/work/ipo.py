"""Exercise 2: your ipo.py.

Every name of the reference's ipo.py is at hand here, beside what you import. Your own helpers may
have any name: they stay yours, and change nothing for others. The handout: loss's docstring.
Run: pytest -m ex2
"""

import torch  # noqa: F401  for your code


def log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other):
    """h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y'), nats. Arguments and result: [B]."""
    raise NotImplementedError("Exercise 2: write h(y, y')")


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

    Exercise 2: the IPO loss with soft labels, and the pair identity. Functions: log_ratio_gap,
    loss.

    Goal. Write the loss of the paper, and see that its gradient is a policy gradient of a policy
    playing against itself.
    Background. A pair (y, y') of answers has four numbers: the log-probabilities of both under the
    policy pi, and under the reference pi_ref, which never changes. Only one combination matters,
    h(y, y'): how much more the policy has raised y than y', in nats. IPO wants h to be (p -
    1/2)/tau, where p = p(y > y') is the judge's preference: a strong preference asks for a large
    gap, a large tau for a small one. The paper writes it as a squared loss on the winner-loser
    order, whose target is 1/(2 tau), the gap for a certain preference. Who won is drawn with
    probability p; with a preference model at hand one takes the expectation over both orders
    instead of drawing: that is the soft label. Differentiate what you have written for a softmax
    policy and you find -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y')): y played
    against y' and y' against y, each pulled back to pi_ref by its log-ratio. Everything else in the
    paper follows from this line.
    Task. log_ratio_gap, then loss as a function of it. Return one value a pair: who averages is the
    caller's business. The tests pass float64 [B] and accept float32; h may have hundreds of nats.
    Change no argument.
    Hints. The order in which the loser is first has the gap -h. (-h - t)^2 = (h + t)^2. Nothing
    here is detached.
    Tests. h, its slopes and the loss of three pairs by hand; the completed square (h - (2p-1)/(2
    tau))^2 + p (1-p)/tau^2; value and slope at h = 0; the pair identity by autograd on a softmax
    policy.
    Questions. (1) For which h is the loss smallest, and why does p = 1 not send h to infinity, as
    it does in DPO?
    (2) Swap y and y' and replace p by 1 - p: what changes? Why must it be so?
    """
    raise NotImplementedError("Exercise 2: write the soft-label IPO loss")
