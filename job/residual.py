"""At a run's end: how near is the policy to the equilibrium that its tau and beta have?"""

import math
from functools import partial

import torch

import equilibrium
from job import parallel
from preference_model import PreferenceModel


def measure(options, policy, reference, preference, task):
    """How near a finished policy is to the equilibrium that its tau and beta have, of 20 test
    prompts: equilibrium.summarise's numbers. {} where there is nothing to ask.

    options:
        of the run.
    policy, reference:
        as evaluate.measure takes them.
    preference:
        what the policy was trained on. Only a model of preferences is asked: a file of the user's
        would get some ten thousand questions more, and a reward has another equilibrium.
    task:
        its prompts.
    """
    if not isinstance(preference, PreferenceModel):
        return {}
    rows = equilibrium.measure(
        policy,
        reference,
        preference,
        task,
        options.tau,
        options.beta,
        count=20,
        responses=16,
        opponents=32,
        share=partial(parallel.share, least=0),
    )
    found = equilibrium.summarise(torch.cat(parallel.gather(rows)))
    del found["prompts"]  # evaluate's are more
    # Of a policy that has not moved no slope is defined: null in a .json file, which has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
