"""Online IPO: the squared loss on the log-ratio gap h, with soft labels (2403.08635, eq 10, 11).

Both responses are drawn from the policy itself. The loss never sees how: drawing them from the
mixture makes it IPO-MD (ipo_md.py), reading them from a file makes it offline IPO
(`train.py --offline`).
Left out: sampling and models (sampler.py, policy.py). Here are only the numbers of one pair.
Run: python ipo.py    (the identity that explains the paper, on numbers to check with a calculator)

Shapes: B pairs. Every log-probability is a sum over the response's tokens, in nats.
"""

import torch

PAIR = ("policy", "policy")  # who draws y and y'
TAU = 0.03  # the default: for summed log-probabilities, by a sweep on the built-in task
RATE = 2e-3  # the default of --lr, by studies/rates.py
LABEL = "preference"  # a pair's label is p(y > y'); "reward" would be the gap r(y) - r(y')
LEARNS_FROM = 2  # responses of the pair whose log-probability carries a gradient
OFFLINE = True  # it may also learn from recorded pairs
CONTRASTIVE = True  # Table 1: the loss depends on the pair through h alone


def log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other):
    """h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y'), nats. Arguments and result: [B]."""
    return (logp - ref_logp) - (logp_other - ref_logp_other)


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
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    target = 1 / (2 * tau)  # not 1/tau: a certain preference, (p - 1/2)/tau at p = 1
    return preference * (h - target) ** 2 + (1 - preference) * (h + target) ** 2


def gradient_scale(tau):
    """Prop 4.2: the expected gradient is -4/tau times the self-play direction.

    That is nash_md.py's at beta = 0, here with both responses drawn from the policy.
    """
    return 4 / tau


def target_gap(preference, tau):
    """The h at which a pair's loss has no slope, nats: (p - 1/2)/tau, [B]."""
    return (preference - 0.5) / tau


def worked_example():
    """Prints one pair of a three-response policy: h, the loss, its gradient in two forms."""
    logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    log_ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    p = torch.tensor(0.7, dtype=torch.float64)
    tau = 0.1
    log_pi = torch.log_softmax(logits, 0)
    pair = log_pi[0], log_pi[2], log_ref[0], log_ref[2]
    h = log_ratio_gap(*pair)
    value = loss(*pair, p, tau)
    square = (h - 2) ** 2 + 21

    def gradient(scalar):
        # The graph is kept: three gradients are taken of it.
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    by_autograd = gradient(value)
    # Detached: in the identity's right side the factor is a number, only the scores are gradients.
    factor = -(2 / tau) * (p - 0.5 - tau * h).detach()
    by_scores = factor * (gradient(log_pi[0]) - gradient(log_pi[2]))

    print("One pair: pi = softmax(0.5, 0, -0.5), pi_ref = (0.2, 0.3, 0.5), ", end="")
    print("y = 1st, y' = 3rd, p(y > y') = 0.7, tau = 0.1")
    left = "h = (log pi - log pi_ref)(y) - (log pi - log pi_ref)(y') = 1 + log(0.5/0.2)"
    print(f"{left}     {h.item():10.6f}")
    left = "loss = 0.7 (h - 5)^2 + 0.3 (h + 5)^2"
    print(f"{left:<76}{value.item():10.6f}")
    left = "     = (h - (2p-1)/(2 tau))^2 + p (1-p)/tau^2 = (h - 2)^2 + 21"
    print(f"{left:<76}{square.item():10.6f}")
    print("The identity, on the logits:")
    left = "gradient of the loss, by autograd"
    print(f"  {left:<62} ", by_autograd.round(decimals=6).tolist())
    left = "-(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y'))"
    print(f"  {left:<62} ", by_scores.round(decimals=6).tolist())
    print(f"  largest difference {(by_autograd - by_scores).abs().max().item():.1e}")
    print("So one IPO pair is two self-play policy-gradient terms: y played against y', ", end="")
    print("and y' against y, each with")
    print("the opponent's log-ratio as control variate (App. D's X1 + X2).")


if __name__ == "__main__":
    worked_example()
