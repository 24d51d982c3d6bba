"""Exercise 7: your policy.py.

Every name of the reference's policy.py is at hand here, beside what you import. Your own helpers
may have any name: they stay yours, and change nothing for others. The handout: loss's docstring of
nash_md.py.
Run: pytest -m ex7
"""

import torch  # noqa: F401  for your code


def token_log_probs(model, prompt, response):
    """log pi(y_n | x, y_<n) of each response token, 0 where the response's mask is False.

    model:
        the policy or the reference.
    prompt:
        Tokens [B, P], padded on the left.
    response:
        Tokens [B, T], padded on the right, as sampler.sample returns them.

    Returns [B, T], nats.
    """
    raise NotImplementedError("Exercise 7: score the response's tokens")


def log_prob(model, prompt, response):
    """log pi(y | x): the sum over the response's tokens, end-of-text included where it was sampled.

    model:
        the policy or the reference.
    prompt:
        Tokens [B, P], padded on the left.
    response:
        Tokens [B, T], padded on the right, as sampler.sample returns them.

    Returns [B], nats, in float32, or in the model's precision if that is higher. Not a mean over
    tokens: pi(y | x) is the probability of the whole response.
    """
    raise NotImplementedError("Exercise 7: score the whole response")
