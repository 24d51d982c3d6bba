"""KTO: each response alone is desirable or not, held against the batch's KL (2402.01306).

desirable: lambda_d (1 - sigmoid(tau (d - z0))), undesirable: lambda_u (1 - sigmoid(tau (z0 - d))),
d = log pi(y)/pi_ref(y), sums; tau is the paper's beta, 0.1, both lambdas 1. The paper keeps
lambda_d n_d/(lambda_u n_u) between 1 and 4/3.
z0 = max(0, mean of log pi(y')/pi_ref(y') over mismatched (x, y')), without gradient: an estimate of
the KL. Here y' is the next prompt's y, over the whole batch of all micro-batches and processes; it
costs another pass of policy and reference over half of the batch, a micro-batch at a time without
gradient. Other programs mismatch all responses.
A pair is two points: y is desirable with weight p and undesirable with 1 - p, y' the reverse, and
the value is the mean of the two.
Run: python -m losses.kto    (slopes of one response by its distance from z0)
"""

import torch

import policy as policies
from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO
from losses.batches import log_ratios

TAU = 0.1  # the default: the paper's beta
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # z0 is in it, and each response alone
OF_BATCH = ("z0",)  # what of_batch gives


def of_batch(parallel, size, policy, drawer, reference, prompt, y, y_other, label):
    """{"z0": [B]}, one number of the whole batch, repeated, nats, 0 or more.

    parallel: job/parallel.py, for the other processes' rows. size: rows of a pass, or None.
    """
    own = y.lists()
    # The next row's y; the last row has the next process's first, the last of all the very first.
    firsts = parallel.gather(own[0])
    if len(firsts) == 1 and len(own) == 1:
        raise ValueError("--loss kto: one prompt has no mismatched response; raise --batch-size")
    following = firsts[(parallel.rank() + 1) % len(firsts)]
    other = policies.pad([*own[1:], following], "right", 0, y.ids.device)
    ratio = log_ratios(size, policy, reference, prompt, other)
    mean = parallel.total(dict(ratio=ratio.sum().item(), count=len(own)))
    # Clamped: a KL is not below 0, its estimate from few pairs may be.
    z0 = max(0.0, mean["ratio"] / mean["count"])
    return {"z0": ratio.new_full((len(own),), z0)}


def loss(logp, logp_other, ref_logp, ref_logp_other, p, tau, *, z0, lambda_d=1.0, lambda_u=1.0):
    """KTO loss, one value a pair: the mean of its two responses'.

    The first six arguments are dpo.loss's, p its preference.

    z0:
        [B] nats, 0 or more, the level that a response is held against; without gradient.
    lambda_d, lambda_u:
        above 0, the weights of desirable and undesirable responses.

    Returns [B], unreduced. At pi = pi_ref, z0 = 0, it is 1/2 for every p.
    """
    value = point(logp - ref_logp, p, tau, z0, lambda_d, lambda_u)
    return (value + point(logp_other - ref_logp_other, 1 - p, tau, z0, lambda_d, lambda_u)) / 2


def point(ratio, desirable, tau, z0, lambda_d, lambda_u):
    """The loss of one response, desirable with a weight in [0, 1], [B]."""
    z = tau * (ratio - z0)
    # 1 - sigmoid(z) is sigmoid(-z), without the difference of two numbers near 1.
    good, bad = lambda_d * torch.sigmoid(-z), lambda_u * torch.sigmoid(z)
    return desirable * good + (1 - desirable) * bad


def gradient_scale(tau):
    """tau/2: a sigmoid's slope at 0 is 1/4, p - (1 - p) is 2 (p - 1/2); both lambdas 1, z0 0."""
    return tau / 2


def target_gap(preference, tau, *, z0, lambda_d=1.0, lambda_u=1.0):
    """None: it never stops to pull a response, it only pulls less far from z0."""
    return None


def worked_example():
    """Prints the loss and slope of a desirable response at three distances from z0."""
    print("tau = 0.1, z0 = 2, a desirable response: the loss is 1 - sigmoid(0.1 (d - 2))")
    zero = torch.zeros((), dtype=torch.float64)
    for d in (-8.0, 2.0, 12.0):
        ratio = torch.tensor(d, dtype=torch.float64, requires_grad=True)
        value = point(ratio, 1.0, 0.1, 2.0 + zero, 1.0, 1.0)
        (slope,) = torch.autograd.grad(value, ratio)
        print(
            f"  d = {d:+3.0f}: loss 1 - sigmoid({0.1 * (d - 2):+.1f}) = {value.item():.6f}", end=""
        )
        print(f"   slope {slope.item():+.6f}")
    print("  steepest at z0: what is far above it is good enough, what is far below is given up")


if __name__ == "__main__":
    worked_example()
