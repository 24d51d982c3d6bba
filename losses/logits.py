"""The logits of whole responses, for losses that look at more than each token's own probability.

Not a method: it sets no TAU. [B, T, vocabulary] numbers are the largest thing in a step's memory;
--micro-batch-size makes B smaller.
"""

import torch

import policy as policies


def response_logits(model, prompt, response):
    """A model's logits at each token of the responses, as token_log_probs reads them.

    prompt, response:
        Tokens [B, P] and [B, T].

    Returns [B, T, vocabulary], -inf for ids that the tokenizer lacks; what they are where the
    response's mask is False means nothing.
    """
    ids = torch.cat([prompt.ids, response.ids], 1)
    mask = torch.cat([prompt.mask, response.mask], 1)
    # A position's logits are of the token after it: the last prompt column's come first.
    keep = torch.arange(prompt.ids.shape[1] - 1, ids.shape[1] - 1, device=ids.device)
    return policies.run_model(model, ids, mask, policies.positions(mask), keep)
