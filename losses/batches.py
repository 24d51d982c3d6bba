"""For losses with a number of the whole batch in them: all rows scored before the first backward.

Not a method: it sets no TAU.
"""

import torch

import policy as policies


@torch.no_grad()
def log_ratios(size, policy, reference, prompt, response):
    """log pi(y | x)/pi_ref(y | x) of every row, [B] nats, without gradient.

    size:
        rows of a pass, --micro-batch-size, so that no more memory is needed than for a part with
        gradient; None for all at once.
    prompt, response:
        Tokens [B, P] and [B, T].
    """
    ratios = []
    for begin in range(0, len(response.ids), size or len(response.ids)):
        part = slice(begin, begin + (size or len(response.ids)))
        rows = prompt.rows(part), response.rows(part)
        ratios.append(policies.log_prob(policy, *rows) - policies.log_prob(reference, *rows))
    return torch.cat(ratios)
