"""Online IPO: the squared loss on the log-ratio gap h, with soft labels (arXiv 2403.08635, eq 10, 11).

Both responses are drawn from the policy itself. The loss never sees how: drawing them from the mixture
makes it IPO-MD (ipo_md.py), reading them from a file makes it offline IPO (`train.py --offline`).
Left out: sampling and models (sampler.py, policy.py). Here are only the numbers of one pair.
Run: python ipo.py    (the identity that explains the paper, on numbers to check with a calculator)

Shapes: B pairs. Every log-probability is a sum over the response's tokens, in nats.
"""

import torch

PAIR = ("policy", "policy")  # who draws y and y'
TAU = 0.03  # the default: for summed log-probabilities, by a sweep on the built-in task
LABEL = "preference"  # a pair's label is p(y > y'); "reward" would be the gap r(y) - r(y')
LEARNS_FROM = 2  # responses of the pair whose log-probability carries a gradient
OFFLINE = True  # it may also learn from recorded pairs
CONTRASTIVE = True  # Table 1: the loss depends on the pair through h alone


def log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other):
    """h(y, y') = log pi(y)/pi_ref(y) - log pi(y')/pi_ref(y'), nats. Arguments and result: [B]."""
    return (logp - ref_logp) - (logp_other - ref_logp_other)


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Soft-label IPO loss p (h - 1/(2 tau))^2 + (1 - p) (h + 1/(2 tau))^2, one value a pair (eq 10, 11).

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
    """Prop 4.2: the expected gradient is -4/tau times the self-play direction (nash_md.py, beta = 0)."""
    return 4 / tau


def target_gap(preference, tau):
    """The h at which a pair's loss has no slope, nats: (p - 1/2)/tau, [B]."""
    return (preference - 0.5) / tau


def worked_example():
    """Prints one pair of a three-response policy: h, the loss, and its gradient in the two forms of the identity."""
    logits = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    p, tau = torch.tensor(0.7, dtype=torch.float64), 0.1
    log_pi = torch.log_softmax(logits, 0)
    y, y_other = 0, 2
    h = log_ratio_gap(log_pi[y], log_pi[y_other], reference[y], reference[y_other])
    value = loss(log_pi[y], log_pi[y_other], reference[y], reference[y_other], p, tau)

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    score_difference = gradient(log_pi[y]) - gradient(log_pi[y_other])
    pair_gradient = -(2 / tau) * (p - 0.5 - tau * h).detach() * score_difference
    print(
        "One pair: pi = softmax(0.5, 0, -0.5), pi_ref = (0.2, 0.3, 0.5), y = 1st, y' = 3rd, p(y > y') = 0.7, tau = 0.1"
    )
    print(
        f"h = (log pi - log pi_ref)(y) - (log pi - log pi_ref)(y') = 1 + log(0.5/0.2)     {h.item():10.6f}"
    )
    print(
        f"loss = 0.7 (h - 5)^2 + 0.3 (h + 5)^2                                        {value.item():10.6f}"
    )
    print(
        f"     = (h - (2p-1)/(2 tau))^2 + p (1-p)/tau^2 = (h - 2)^2 + 21              {((h - 2) ** 2 + 21).item():10.6f}"
    )
    print("The identity, on the logits:")
    print(
        "  gradient of the loss, by autograd                              ",
        [round(g, 6) for g in gradient(value).tolist()],
    )
    print(
        "  -(2/tau) (p - 1/2 - tau h) (grad log pi(y) - grad log pi(y'))  ",
        [round(g, 6) for g in pair_gradient.tolist()],
    )
    print(f"  largest difference {(gradient(value) - pair_gradient).abs().max().item():.1e}")
    print(
        "So one IPO pair is two self-play policy-gradient terms: y played against y', and y' against y, each with"
    )
    print("the opponent's log-ratio as control variate (App. D's X1 + X2).")


if __name__ == "__main__":
    worked_example()
