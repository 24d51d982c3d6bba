"""INPO: online IPO whose steps are also held near the policy that drew the pair (2407.00617).

With pi_t the policy that drew y and y', D_q = log q(y) - log q(y') and ratio = tau/eta, the loss is
(D_pi - ratio D_ref - (1 - ratio) D_t - 1/(2 eta))^2 on the winner first. In gaps to the reference
that is IPO's square on h - (1 - ratio) h_t with the target ratio/(2 tau); soft labels as in ipo.py.
Its minimum over all policies is pi_ref^ratio pi_t^(1-ratio) exp(p(. > pi_t)/eta)/Z.
At pi = pi_t its gradient is ratio times online IPO's. So with one step a batch INPO is online IPO;
they part where pi_t lags behind: with several steps a batch, --epochs, or a copy that is renewed
every N steps, --refresh. At ratio 1 pi_t is gone, and it is IPO on any pairs.
COMAL (2410.23223) is INPO with a reference that follows: --renew-reference N.
The authors' ratio is 1/3 (from memory), eta a constant of theirs and here tau/ratio.
Run: python -m losses.inpo    (one pair at the policy that drew it, and a step away)
"""

import torch

import ipo
from ipo import LABEL, LEARNS_FROM, PAIR, log_ratio_gap  # noqa: F401  as IPO
from losses.batches import log_ratios

TAU = ipo.TAU  # the default: IPO's, whose equilibrium it shares
RATE = 2e-3  # the default of --lr: ipo's, not tuned for this loss
OFFLINE = False  # pi_t is who drew the pair, and records do not say who that was
CONTRASTIVE = True  # the pair counts through h and h_t alone
OF_BATCH = ("drawn_gap",)  # what of_batch gives
RATIO = 1 / 3


def of_batch(parallel, size, policy, drawer, reference, prompt, y, y_other, label):
    """{"drawn_gap": [B]}, h of the policy that drew the batch, nats, before the batch's steps."""
    ratio = log_ratios(size, drawer, reference, prompt, y)
    return {"drawn_gap": ratio - log_ratios(size, drawer, reference, prompt, y_other)}


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, drawn_gap, ratio=RATIO):
    """Soft-label INPO loss, one value a pair. The first six arguments are ipo.loss's.

    drawn_gap:
        [B] h of the policy that drew the pair, nats, without gradient.
    ratio:
        above 0, at most 1: tau/eta, the share of the reference; the rest holds pi near pi_t.

    Returns [B], unreduced. At pi = pi_t = pi_ref it is ratio^2/(4 tau^2) for every p.
    """
    h = log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other)
    moved = h - (1 - ratio) * drawn_gap
    target = ratio / (2 * tau)
    return preference * (moved - target) ** 2 + (1 - preference) * (moved + target) ** 2


def gradient_scale(tau):
    """IPO's 4/tau times the ratio, at the policy that drew the pairs."""
    return RATIO * ipo.gradient_scale(tau)


def target_gap(preference, tau, *, drawn_gap, ratio=RATIO):
    """The h at which a pair's loss has no slope, nats, [B]: between h_t and IPO's target."""
    return (1 - ratio) * drawn_gap + ratio * ipo.target_gap(preference, tau)


def worked_example():
    """Prints INPO's and IPO's slopes on h at h_t, and INPO's at its target."""
    p, tau, drawn = (torch.tensor(value, dtype=torch.float64) for value in (0.7, 0.1, 0.5))
    zero = torch.zeros((), dtype=torch.float64)
    print("p = 0.7, tau = 0.1, h_t = 0.5, ratio 1/3: IPO's target is 2, INPO's", end=" ")
    target = target_gap(p, tau, drawn_gap=drawn)
    print(f"2/3 * 0.5 + 1/3 * 2 = {target.item():.4f}")
    for start in (drawn, target):
        h = start.clone().requires_grad_()
        slopes = []
        for value in (
            loss(h, zero, zero, zero, p, tau, drawn_gap=drawn),
            ipo.loss(h, zero, zero, zero, p, tau),
        ):
            slopes.append(torch.autograd.grad(value, h)[0].item())
        print(f"  h = {start.item():.4f}: slope {slopes[0]:+.4f}, IPO's {slopes[1]:+.4f}")
    print("at h_t a third of IPO's, 2 (0.5 - 2) = -3; INPO stops half-way, IPO goes on")


if __name__ == "__main__":
    worked_example()
