"""At a run's end: how near is the policy to the equilibrium that its tau and beta have?"""

from functools import partial

import torch

import data
import equilibrium
from job import parallel
from preference_model import PreferenceModel


def measure(options, policy, reference, preference, task):
    """How near a finished policy is to the equilibrium that its tau and beta have, of some test
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
    # The model reads each response with its prompt. A post from a file may be thirty times as long
    # as a built-in one: as many of them would take longer than the alignment itself.
    size = dict(count=20, responses=16, opponents=32)
    if not isinstance(task, data.BuiltIn):
        size = dict(count=8, responses=16, opponents=16)
    rows = equilibrium.measure(
        policy,
        reference,
        preference,
        task,
        options.tau,
        options.beta,
        **size,
        share=partial(parallel.share, least=0),
    )
    found = equilibrium.summarise(torch.cat(parallel.gather(rows)))
    del found["prompts"]  # evaluate's are more
    return equilibrium.or_none(found)  # of a policy that has not moved no slope is defined
