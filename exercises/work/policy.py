"""Exercise 5: your policy.py. Copy it to a folder of your own and fill it in.

This file is run on top of the reference's policy.py: every other name of that file is at hand, and
what you define here takes the place of its own. The handouts: exercise 5 in loss's docstring of
nash_md.py.
Run: pytest --impl DIR -m ex5    (DIR: your folder)
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
    raise NotImplementedError("Exercise 5: score the response's tokens")


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
    raise NotImplementedError("Exercise 5: score the whole response")
