"""beta-DPO: DPO with a beta of each batch, on the pairs that are not outliers (2407.08639).

DPO at beta_b = max(1e-3, tau (1 + a (M - M0))) over the kept part of a batch: a 0.6, tau the
paper's beta0, 0.1. h is the winner's gap; M its mean over the kept pairs, M0 and s0 running means
of the batches' means and standard deviations (n - 1), which start at 0 and take in a batch before
they are used: 0.9 of the old and 0.1 of the new. Kept are n (1 - rho) pairs, rho 0.2, drawn without
replacement with weights exp(-(h - M0)^2/(2 s0^2)). All of it without gradient.
All numbers are of the whole batch of all micro-batches and processes, which is scored once more for
them. The running means lie in the policy, so in its checkpoints; the draw comes from their count.
A soft label only says who the winner of a pair is for h, the likelier one; the loss takes p itself.
Run: python -m losses.beta_dpo    (the weights and the beta of one batch)
"""

import torch

import data
import dpo
from ipo import LABEL, LEARNS_FROM, OFFLINE, PAIR  # noqa: F401  as IPO
from losses.batches import log_ratios

TAU = 0.1  # the default: the paper's beta0
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
CONTRASTIVE = False  # the batch's other pairs are in it
OF_BATCH = ("shift", "kept")  # what of_batch gives
RHO = 0.2  # the share of a batch that is left out
KEEPS = 0.9  # of the running means


def prepare(policy):
    """Gives the policy the running mean M0, deviation s0 and the count of batches, all 0."""
    policy.register_buffer("margins", torch.zeros(3, dtype=torch.float64, device=policy.device))


def of_batch(parallel, size, policy, drawer, reference, prompt, y, y_other, label):
    """{"shift": M - M0, "kept": 1/(1 - rho) or 0}, [B] each. Takes the batch into the means."""
    ratios = [log_ratios(size, policy, reference, prompt, side) for side in (y, y_other)]
    own = ((ratios[0] - ratios[1]) * torch.where(label < 0.5, -1.0, 1.0)).double().cpu()
    parts = parallel.gather(own)
    h = torch.cat(parts)
    mean, spread, count = policy.margins.tolist()
    mean = KEEPS * mean + (1 - KEEPS) * h.mean()
    spread = KEEPS * spread + (1 - KEEPS) * (h.std() if len(h) > 1 else 0.0)
    policy.margins.copy_(torch.tensor([mean, spread, count + 1]))
    chosen = draw(h, mean, spread, data.generator(0, "beta_dpo", int(count)))
    kept = torch.zeros_like(h)
    # The trainer divides by all rows: this makes it the mean over the kept ones.
    kept[chosen] = len(h) / len(chosen)
    begin = sum(len(part) for part in parts[: parallel.rank()])
    rows = kept[begin : begin + len(own)].to(ratios[0])
    return {"shift": torch.full_like(rows, h[chosen].mean() - mean), "kept": rows}


def draw(h, mean, spread, generator):
    """Row numbers of the kept pairs, drawn one after another without replacement, at least one."""
    # Logarithms: the weights themselves underflow. Largest weight times an exponential race.
    log_weight = -((h - mean) ** 2) / (2 * spread**2 + 1e-300)
    uniform = torch.rand(len(h), generator=generator, dtype=torch.float64)
    race = log_weight - torch.log(-torch.log1p(-uniform))
    return race.topk(max(1, int(len(h) * (1 - RHO)))).indices


def loss(logp, logp_other, ref_logp, ref_logp_other, p, tau, *, shift, kept, a=0.6):
    """DPO's loss at the batch's beta, times kept, [B].

    shift, kept: [B], as of_batch gives them. a: 0 or more; at 0 beta is tau. Others as dpo.loss.
    """
    beta = (tau * (1 + a * shift)).clamp(min=1e-3)
    return kept * dpo.loss(logp, logp_other, ref_logp, ref_logp_other, p, beta)


def gradient_scale(tau):
    """2 tau, DPO's: at h = 0 the shift is 0."""
    return 2 * tau


def target_gap(p, tau, *, shift, kept, a=0.6):
    """DPO's at the batch's beta: logit(p)/beta, [B]."""
    return dpo.target_gap(p, (tau * (1 + a * shift)).clamp(min=1e-3))


def worked_example():
    """Prints the weights and the beta of a batch of five with an outlier."""
    h = torch.tensor([0.0, 1.0, 2.0, 3.0, 14.0], dtype=torch.float64)
    mean, spread = h.mean(), h.std()
    weights = torch.exp(-((h - mean) ** 2) / (2 * spread**2))
    print("h = 0, 1, 2, 3, 14; as if M0 = 4 and s0 = 5.7009 were its own mean and deviation")
    print("weights of being kept:", "".join(f" {number:.4f}" for number in weights.tolist()))
    for left_out in (0, 4):
        rest = h[torch.arange(5) != left_out].mean()
        beta = 0.1 * (1 + 0.6 * (rest - mean))
        print(f"  without h = {h[left_out]:g}: M = {rest:g}, ", end="")
        print(f"beta = 0.1 (1 + 0.6 (M - 4)) = {beta:.3f}, not below {beta.clamp(min=1e-3):.3f}")


if __name__ == "__main__":
    worked_example()
