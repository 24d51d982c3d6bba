"""At a run's end: how near is the policy to the equilibrium that its tau and beta have?

Trap: among its own responses a policy that has lost most of what it could say looks as if it had
arrived (THEORY.md, section 22). So the reference's responses are asked about as well.
"""

from functools import partial

import torch

import data
import equilibrium
from job import parallel
from preference_model import PreferenceModel

# Prompts, responses and opponents that are asked about: of the built-in task, and of others. The
# model reads each response with its prompt. A post from a file may be thirty times as long as a
# built-in one: as many of them would take longer than the alignment itself.
BUILT_IN = dict(count=20, responses=16, opponents=32)
FILES = dict(count=8, responses=16, opponents=16)
OF_REFERENCE = ("r2", "exploitability")  # what is told of the reference's responses


def measure(options, policy, reference, preference, task):
    """How near a finished policy is to the equilibrium that its tau and beta have, of some test
    prompts: equilibrium.summarise's numbers of its own responses and, with _ref behind their names,
    those of OF_REFERENCE. {} where there is nothing to ask.

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
    size = BUILT_IN if isinstance(task, data.BuiltIn) else FILES
    found = equilibrium.both_ways(
        policy,
        reference,
        preference,
        task,
        options.tau,
        options.beta,
        **size,
        share=partial(parallel.share, least=0),
        whole=lambda rows: torch.cat(parallel.gather(rows)),
    )
    numbers = found["policy"]
    del numbers["prompts"]  # evaluate's are more
    for name in OF_REFERENCE:
        numbers[f"{name}_ref"] = found["reference"][name]
        numbers[f"{name}_ref_se"] = found["reference"][f"{name}_se"]
    return equilibrium.or_none(numbers)  # of a policy that has not moved no slope is defined
