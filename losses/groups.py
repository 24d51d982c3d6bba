"""What all methods of groups share: K responses of a prompt, labelled and scored.

Not a method: it sets no TAU. A group's file takes two of these in place of train.py's functions of
the same name, and its loss takes a row a prompt and a column a response.
"""

import itertools
from functools import partial

import torch

import policy as policies
import side_by_side
from ipo import PAIR  # noqa: F401  y and y' from the policy, and all others as y'


@torch.no_grad()  # a label is a number: no gradient flows through it
def label_pairs(preference, prompt, *responses):
    """Every response against every other, [B, K, K]: p(y_i > y_j | x), and 1/2 on the diagonal.

    preference:
        preference(prompt, y, y_other) -> [B], asked K (K - 1)/2 times: p(y_j > y_i) is the rest.
    prompt, responses:
        Tokens [B, P], and K Tokens with a row a prompt.
    """
    count = len(responses)
    ask = partial(preference, prompt)
    if hasattr(preference, "compare_vectors"):  # a model reads a response once, not K - 1 times
        responses = [preference.read(prompt, response) for response in responses]

        def ask(vector, vector_other):
            return torch.sigmoid(preference.compare_vectors(vector, vector_other))

    columns = {}
    for first, second in itertools.combinations(range(count), 2):
        p = ask(responses[first], responses[second])
        columns[first, second], columns[second, first] = p, 1 - p
    for row in range(count):
        columns[row, row] = torch.full_like(p, 0.5)
    places = itertools.product(range(count), repeat=2)  # row by row
    return torch.stack([columns[place] for place in places], 1).view(-1, count, count)


@torch.no_grad()
def label_first(preference, prompt, y, y_other, *others):
    """The first against the second alone, [B], for methods whose other responses are no rivals."""
    return preference(prompt, y, y_other)


@torch.no_grad()
def label_rewards(reward, prompt, *responses):
    """Every response's own reward(prompt, y), nats, [B, K]."""
    return torch.stack([reward(prompt, response) for response in responses], 1)


def pair_losses(options, method, policy, reference, prompt, *responses_and_label, **asked):
    """The method's loss of every group, and its mean log pi(y)/pi_ref(y), nats: [B] each.

    Arguments as train.pair_losses, with K responses; asked holds [B, K] each.
    """
    *responses, label = responses_and_label
    of_policy = partial(score, policy, prompt, responses)
    of_reference = torch.no_grad()(partial(score, reference, prompt, responses))
    logp, ref_logp = side_by_side.run([of_policy, of_reference], options.device)
    value = method.loss(logp, ref_logp, label, options.tau, **options.set, **asked)
    return value, (logp - ref_logp).mean(1)


def score(model, prompt, responses):
    """log pi(y_k | x), [B, K] nats: sums over tokens."""
    return torch.stack([policies.log_prob(model, prompt, response) for response in responses], 1)


def win_rates(preferences):
    """Each response's mean p against its group, itself with 1/2 included, [..., K, K] -> [..., K].

    As a score it puts the responses in order; a group's own mean is 1/2.
    """
    return preferences.mean(-1)
