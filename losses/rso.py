"""RSO: candidates from the start, accepted by their rewards, then a contrastive loss (2309.06657).

Algorithm 1: of K candidates from the supervised policy, our pi_ref, n are accepted with probability
exp((r - r_max)/T), in passes over those left; the accepted are nearly samples of
pi_ref exp(r/T)/Z, the law that the loss looks for. Its loss, over all pairs of the n:
    eq 8    sigmoid-norm    dpo.py's, here the default
    eq 10   hinge-norm      slic.py's at margin 1, --set hinge=1
tau is the paper's gamma, 0.05 a nat. T is its beta, 0.5 nats of reward: a constant of this file, as
draw_pairs is asked before any loss. Its N is 64 and n 8; here K = 16 (--responses) and n is an
eighth of K, at least 2. Under Bradley-Terry labels eq 8 stops at pi_ref exp(r/tau)/Z, whoever drew.
Candidates must be distinct: repeats are dropped before. If fewer than n are left all of them are
accepted, and again from the first until there are n: two equal responses have no slope. Where
repeats are frequent, as among short responses, the law of the accepted is not the one above.
A pair's label is sigmoid(r_i - r_j), soft: both orders are counted, weighted by p and 1 - p. The
paper's is the sign, by a model of pairs, for n/2 pairs (first round) or the n - 1 of a tournament.
Left out: these rankings; temperature 0.7 and top-k 40 of the candidates; eq 9, without reference.
Run: python -m losses.rso    (one prompt's candidates, pass after pass, and the loss of a pair)
"""

import math
import random

import torch

import dpo
import policy as policies
import sampler
import slic
from losses.groups import label_rewards, pair_losses  # noqa: F401

PAIR = ("reference", "reference")  # all candidates are the start's
TAU = 0.05  # the default: the paper's gamma
TEMPERATURE = 0.5  # the paper's beta, nats of reward
RATE = 2e-3  # the default of --lr: dpo's, not tuned for this loss
RESPONSES = 16  # the default of --responses: candidates, of which few are accepted
LABEL = "rewards"  # acceptance asks for each response's own reward
LEARNS_FROM = 2  # all that are accepted
OFFLINE = False  # recorded pairs were not accepted by a reward
CONTRASTIVE = True  # each of the pairs counts through its h alone


def accepted_of(candidates):
    """How many of so many candidates are accepted, n: the paper's share, 8 of 64."""
    return max(2, candidates // 8)


def accept(rewards, count, uniform):
    """Algorithm 1 on one prompt's distinct candidates.

    rewards:
        list of K finite numbers, nats.
    count:
        how many are wanted, at least 1.
    uniform:
        uniform() -> a number in [0, 1), one for every question.

    Returns the accepted candidates' numbers in the order of their acceptance, a list of count; all
    K if there are no more. Raises FloatingPointError for a reward that is not finite.
    """
    if not all(math.isfinite(reward) for reward in rewards):  # no pass would ever end
        raise FloatingPointError("a candidate's reward is not finite; give another --stages")
    left, accepted = list(range(len(rewards))), []
    while left and len(accepted) < count:
        # Of those left, not of all: the best of all is gone after the first pass, and beside it the
        # others' probabilities would stay as small as they were.
        best = max(rewards[candidate] for candidate in left)
        for candidate in list(left):
            # The best one's probability is 1, so that every pass accepts somebody.
            if uniform() < math.exp((rewards[candidate] - best) / TEMPERATURE):
                accepted.append(candidate)
                left.remove(candidate)  # nobody is accepted twice
            if len(accepted) == count:
                break
    return accepted


def distinct(responses):
    """The numbers of those responses, lists of ids, that none before them is equal to."""
    first = {}
    for number, response in enumerate(responses):
        first.setdefault(tuple(response), number)
    return list(first.values())


@torch.no_grad()
def draw_pairs(pair, policy, reference, prompt, beta, uniforms, reward):
    """The accepted responses to every prompt, in place of sampler.draw_pairs.

    pair, policy, reference, prompt, beta, uniforms:
        as sampler.draw_pairs takes them, for K candidates; uniforms is [T, K, B].
    reward:
        reward(prompt, y) -> [B], nats.

    Returns n Tokens with a row a prompt. A row depends on its own uniforms alone.
    """
    candidates = sampler.draw_pairs(pair, policy, reference, prompt, beta, uniforms)
    rewards = label_rewards(reward, prompt, *candidates).tolist()
    # A seed of the row's own, so that neither processes nor other rows change what it accepts: its
    # first candidate's last number, by which a token was drawn only if that response was cut.
    seeds = uniforms[-1, 0].tolist()
    lists = zip(*[candidate.lists() for candidate in candidates], strict=True)
    chosen, wanted = [], accepted_of(len(candidates))
    for row, responses in enumerate(lists):
        numbers = distinct(responses)
        uniform = random.Random(int(seeds[row] * 2**53)).random
        accepted = accept([rewards[row][number] for number in numbers], wanted, uniform)
        # Taken round and round: fewer than wanted if there are too few distinct candidates.
        chosen.append([numbers[accepted[turn % len(accepted)]] for turn in range(wanted)])
    chosen = torch.tensor(chosen, device=prompt.ids.device)
    every_row = torch.arange(len(chosen), device=prompt.ids.device)
    ids = torch.stack([candidate.ids for candidate in candidates], 1)
    mask = torch.stack([candidate.mask for candidate in candidates], 1)
    picked = []
    for column in chosen.unbind(1):
        picked.append(policies.Tokens(ids[every_row, column], mask[every_row, column]))
    return picked


@torch.no_grad()  # a label is a number: no gradient flows through it
def label_pairs(reward, prompt, *responses):
    """Every response against every other by Bradley-Terry, sigmoid(r_i - r_j), [B, n, n].

    reward:
        reward(prompt, y) -> [B], nats.
    prompt, responses:
        Tokens [B, P], and n Tokens with a row a prompt.
    """
    rewards = label_rewards(reward, prompt, *responses)
    return torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])


def loss(logp, ref_logp, preferences, tau, *, hinge=0):
    """RSO loss, one value a group: the mean over its pairs of dpo.loss, or of slic.loss.

    logp, ref_logp:
        [B, n] log pi(y_k | x) and the reference's, nats; the first with gradient.
    preferences:
        [B, n, n] p(y_i > y_j | x), 1/2 on the diagonal.
    tau:
        above 0, the paper's gamma.
    hinge:
        0 for the logistic loss (eq 8), 1 for the hinge (eq 10).

    Returns [B], unreduced. At pi = pi_ref it is log 2, the hinge's 1. Raises ValueError for another
    hinge.
    """
    if hinge not in (0, 1):
        raise ValueError(f"hinge={hinge}: give 0 (eq 8) or 1 (eq 10)")
    count = logp.shape[-1]
    first, second = torch.triu_indices(count, count, 1, device=logp.device)
    sides = logp[..., first], logp[..., second], ref_logp[..., first], ref_logp[..., second]
    of_pair = slic.loss if hinge else dpo.loss
    return of_pair(*sides, preferences[..., first, second], tau).mean(-1)


def worked_example():
    """Prints Algorithm 1 on four candidates with given uniform numbers, and one pair's losses."""
    rewards = [0.2, 1.0, -0.5, 0.7]
    print("Four candidates, r = 0.2, 1, -0.5, 0.7, T = 0.5; two are wanted")
    for best, left in ((1.0, [0, 1, 2, 3]), (0.7, [0, 2, 3])):
        print(f"  r_max = {best}: accepted with probability", end="")
        chances = [math.exp((rewards[candidate] - best) / TEMPERATURE) for candidate in left]
        print("".join(f" {chance:.4f}" for chance in chances), end="")
        print("  of the candidates", ", ".join(str(1 + candidate) for candidate in left))
    drawn = [0.5, 0.9, 0.3, 0.6, 0.2]
    accepted = accept(rewards, 2, iter(drawn).__next__)
    print("  uniform numbers 0.5, 0.9, 0.3, 0.6: only the 2nd; then 0.2: ", end="")
    print("accepted", ", ".join(str(1 + candidate) for candidate in accepted))
    logp = torch.tensor([[-2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-4.0, -3.0]], dtype=torch.float64)
    first, second = (rewards[candidate] for candidate in accepted)
    p = 1 / (1 + math.exp(second - first))
    preferences = torch.tensor([[[0.5, p], [1 - p, 0.5]]], dtype=torch.float64)
    print(f"Their pair: p = sigmoid({first} - {second}) = {p:.4f}; h = 2, tau = 0.05")
    for hinge, name in ((0, "sigmoid-norm"), (1, "hinge-norm")):
        value = loss(logp, ref_logp, preferences, TAU, hinge=hinge)
        slope = torch.autograd.grad(value.sum(), logp)[0][0]
        print(f"  {name:13s} loss {value.item():.6f}  slopes", end="")
        print("".join(f" {number:+.6f}" for number in slope.tolist()))


if __name__ == "__main__":
    worked_example()
