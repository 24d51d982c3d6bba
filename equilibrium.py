"""Is a policy at the equilibrium, and how exploitable is it? Both measured from its own responses.

The residual of eq 12 (eq 13 for mixtures) is a regression within prompts: at the equilibrium
tau log pi/pi_ref and p(y > pi) differ by a constant of the prompt, so the slopes both ways and R2
are 1. The lower bound of exploitability is what some law over the drawn responses gains, chosen by
one half of the opponents and judged by the other. THEORY.md, sections 22 and 23, derives both.
Trap: among its own responses a policy that has lost most of what it could say looks as if it had
arrived. The reference's responses show it: at the equilibrium the same holds among them.
Left out: how exploitable a policy is by what training reaches; the bound is of any law.
Run: python -m studies.equilibrium POLICY REFERENCE --tau T

Shapes: P prompts, N responses y to each, and two sets of M opponents to each.
"""

import math

import torch

import data
import evaluate
import sampler
from policy import Tokens
from preference_model import PreferenceModel

# The columns of what measure returns, a row a prompt.
COLUMNS = ("var_ratio", "cov", "var_preference", "exploitability")


@torch.no_grad()
def measure(
    policy,
    reference,
    preference,
    task,
    tau,
    beta=0.0,
    split="test",
    count=40,
    responses=32,
    opponents=64,
    seed=0,
    chunk=8,
    share=data.everything,
    drawn_from="policy",
):
    """Draws responses and opponents to the prompts of a split, and asks for every preference.

    policy, reference:
        pi and pi_ref, two models with one tokenizer.
    preference:
        preference(prompt, y, y_other) -> p(y > y_other | x), [B], asked 2 N M times a prompt, or 4.
    task:
        where the prompts come from (data.py).
    tau:
        above 0, of the equilibrium in question.
    beta:
        in [0, 1], the reference's weight in the mixture that the opponents of eq 13 come from.
    split, count, seed:
        "validation" or "test", the most prompts of it, and the seed of all draws.
    responses, opponents:
        N and M, two or more and one or more; M is each of the two sets of opponents.
    chunk:
        prompts at a time, the memory's bound. The draws depend on it: a step of the generators.
    share:
        share(prompts) is a slice of a chunk's prompts: only their rows are wanted.
    drawn_from:
        whose responses y are, "policy" or "reference". Opponents are the policy's all the same.

    Returns [P, 4], float64: a prompt's COLUMNS, for summarise.
    """
    count = min(count, task.most(split))
    # Who draws each response of a prompt, as the reference's weight: N responses, then both sets.
    # Opponents must not be the responses: each would meet itself, at p = 1/2.
    own = dict(policy=0.0, reference=1.0)[drawn_from]
    weights = (own,) * responses + (beta,) * (2 * opponents)
    if beta:  # exploitability is about pi as the opponent, never about the mixture
        weights += (0.0,) * (2 * opponents)
    rows = []
    for step in range(-(-count // chunk)):  # rounded up
        prompt = task.prompts(split, step, chunk).rows(slice(0, count - step * chunk))
        rng = data.generator(seed, f"{split} equilibrium", step)
        drawn = data.uniforms(rng, task.max_response, len(weights), len(prompt.ids))
        mine = share(len(prompt.ids))
        if mine.start == mine.stop:  # the last chunk may be smaller than the processes are many
            continue
        prompt = prompt.rows(mine).to(policy.device)
        laws = sample(policy, reference, prompt, weights, drawn[:, :, mine], responses, opponents)
        rows.append(of_prompts(policy, reference, preference, tau, drawn_from, prompt, *laws))
    return torch.cat(rows) if rows else torch.zeros(0, len(COLUMNS), dtype=torch.float64)


def sample(policy, reference, prompt, weights, drawn, responses, opponents):
    """The responses and the sets of opponents: Tokens each, all first ones before all second ones.

    weights:
        of the reference in each response's law, in the order responses, set, set (and two more).
    drawn:
        uniforms [T, len(weights), B].
    """
    count, most = len(prompt.ids), len(drawn)
    ids, mask, _ = sampler.sample(policy, reference, prompt, weights, None, most, drawn.flatten(1))
    sets = (len(weights) - responses) // opponents
    sizes = [responses * count] + [opponents * count] * sets
    return [Tokens(*both) for both in zip(ids.split(sizes), mask.split(sizes), strict=True)]


def of_prompts(policy, reference, preference, tau, drawn_from, prompt, y, *opponents):
    """The COLUMNS of some prompts, [B, 4].

    opponents:
        two sets from the law of eq 12 or 13, then, where that is a mixture, two of the policy.
    """

    def log_ratios(response):
        # Exact, but for float rounding: all noise of the regression is in the preferences.
        asked = prompt.repeat(len(response.ids) // len(prompt.ids))
        log_ratio = evaluate.log_ratio(policy, reference, asked, response).double().cpu()
        return log_ratio.view(-1, len(prompt.ids)).T

    log_ratio = log_ratios(y)
    measured = [win_rates(preference, prompt, y, rivals) for rivals in opponents]
    residual = moments(*measured[:2], log_ratio, tau)
    if drawn_from == "policy":
        bound = gap_bound(*measured[-2:], log_ratio, tau)
    else:
        # Of the reference's own draws d in the law's weight is 0; what the policy itself has of KL
        # is told by draws of the policy.
        bound = gap_bound(*measured[-2:], torch.zeros_like(log_ratio), tau)
        bound = bound + 2 * tau * log_ratios(opponents[-1]).mean(1)
    return torch.cat([residual, bound[:, None]], 1)


def win_rates(preference, prompt, y, rivals):
    """p(y > rival), the mean over a set of rivals, of every response, [B, N] on the CPU.

    prompt, y, rivals:
        Tokens of B, N * B and M * B rows.
    """
    count, rows = len(prompt.ids), len(y.ids)
    asked = prompt.repeat(rows // count)
    is_model = isinstance(preference, PreferenceModel)
    if is_model:  # a pair at a time it would read each response again for all that it meets
        read_y = read(preference, asked, y)
        read_rivals = read(preference, asked, rivals)
    total = torch.zeros(rows, dtype=torch.float64)
    # One rival of every prompt at a time: no more than N * B pairs are held at once.
    for begin in range(0, len(rivals.ids), count):
        one = slice(begin, begin + count)
        if is_model:
            rival = read_rivals[one].repeat(rows // count, 1)
            p = torch.sigmoid(preference.compare_vectors(read_y, rival))
        else:
            p = preference(asked, y, rivals.rows(one).repeat(rows // count))
        total += p.double().cpu()
    return (total / (len(rivals.ids) // count)).view(-1, count).T


def read(preference, asked, response):
    """A preference model's vector of every response, as many at a time as there are prompts asked.

    asked:
        Tokens, the prompts again and again: a response's prompt stands at the same place.
    """
    vectors = []
    for begin in range(0, len(response.ids), len(asked.ids)):
        part = response.rows(slice(begin, begin + len(asked.ids)))
        vectors.append(preference.read(asked.rows(slice(0, len(part.ids))), part))
    return torch.cat(vectors)


def moments(first, second, log_ratio, tau, weight=None):
    """Variance of tau d, its covariance with p, and variance of p, within each prompt, [P, 3].

    first, second:
        [P, N] estimates of p(y > law) from two disjoint sets of opponents; both the exact p, where
        that is known.
    log_ratio:
        [P, N] d(y) = log pi(y)/pi_ref(y), nats.
    tau:
        above 0.
    weight:
        [P, N] probabilities that sum to 1: pi itself, where all responses are counted; None for N
        draws from pi.

    The variance of p is the covariance of the two estimates: that of one would hold its noise, too.
    """
    if weight is None:
        weight = torch.full_like(log_ratio, 1 / log_ratio.shape[1])

    def centred(values):
        # Within a prompt: the constant of eq 12 is another one for every prompt.
        return values - (weight * values).sum(1, keepdim=True)

    ratio = centred(tau * log_ratio)
    first = centred(first)
    second = centred(second)
    var_ratio = (weight * ratio**2).sum(1)
    cov = (weight * ratio * (first + second) / 2).sum(1)
    var_preference = (weight * first * second).sum(1)
    return torch.stack([var_ratio, cov, var_preference], 1)


def gap_bound(first, second, log_ratio, tau):
    """In expectation a lower bound of bandit.duality_gap of each prompt, [P].

    2 tau [sum w (p_second/tau - d) - KL(w, 1/N) + KL(pi, pi_ref)] - 1, w = softmax(p_first/tau - d)
    the law over the N responses that would gain most if the first opponents were all there are.

    first, second:
        [P, N] estimates of p(y > pi) from two disjoint sets of opponents.
    log_ratio:
        [P, N] log mu(y)/pi_ref(y) of draws from mu, nats: d(y) of draws from pi. Of draws from
        pi_ref it is 0, and 2 tau KL(pi, pi_ref) is to be added.
    tau:
        above 0.

    It falls short of the gap where N or M is small, and is negative at an equilibrium.
    """
    log_weight = torch.log_softmax(first / tau - log_ratio, 1)
    weight = log_weight.exp()
    # The second set does not know what the first chose: first in its place would claim a gain
    # where there is none.
    gain = (weight * (second / tau - log_ratio)).sum(1)
    away = (weight * log_weight).sum(1) + math.log(log_ratio.shape[1])  # KL(w, 1/N)
    # KL(pi, pi_ref) from the same draws: a constant in d, which is noise, drops out.
    return 2 * tau * (gain - away + log_ratio.mean(1)) - 1


def statistics(row):
    """(slope, slope_back, r2, exploitability) from mean COLUMNS, [..., 4] each way."""
    var_ratio, cov, var_preference, bound = row.unbind(-1)
    slope = cov / var_ratio
    slope_back = cov / var_preference
    return torch.stack([slope, slope_back, slope * slope_back, bound], -1)


def summarise(rows):
    """The numbers of a policy.

    rows:
        [P, 4] of measure, all processes' one below the other.

    Returns a dict:

    slope:
        of the measured p(y > law) on tau d(y). The noise is all in p, so it is not attenuated.
    slope_back:
        of tau d(y) on p(y > law), free of the noise of p, too.
    r2:
        their product. At the equilibrium all three are 1; chance may put it above.
    exploitability:
        the lower bound of the regularised duality gap, mean over prompts.
    slope_se, slope_back_se, r2_se, exploitability_se:
        standard errors over prompts, delete-one jackknife.
    prompts:
        their number, P.

    NaN where they mean nothing: slope and r2 of the reference itself, errors of one prompt.
    """
    count = len(rows)
    estimate = statistics(rows.mean(0))
    without = statistics((rows.sum(0) - rows) / (count - 1))  # each row: all prompts but one
    spread = (without - without.mean(0)).square().sum(0)
    error = (spread * (count - 1) / count).sqrt()
    numbers = {}
    for column, name in enumerate(("slope", "slope_back", "r2", "exploitability")):
        numbers[name] = estimate[column].item()
        numbers[f"{name}_se"] = error[column].item()
    return numbers | dict(prompts=count)


def both_ways(*given, whole=lambda rows: rows, **size):
    """summarise's numbers among the policy's own responses and among the reference's.

    given, size:
        as measure takes them.
    whole:
        whole(rows) is the rows of all processes, where share gave this one a part.

    Returns {"policy": numbers, "reference": numbers}.
    """
    found = {}
    for drawn_from in ("policy", "reference"):
        rows = measure(*given, **size, drawn_from=drawn_from)
        found[drawn_from] = summarise(whole(rows))
    return found


def or_none(numbers):
    """summarise's numbers with None for those that mean nothing: a .json file has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
