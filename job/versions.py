"""What a kept stage, a run's folder and a line of results were made by.

Raise one of the numbers by hand when a number of its part changes: tests/test_golden.py says when,
and which. Moving or renaming code changes none, so what was kept is used again.
"""

VERSIONS = {
    "supervised": 1,  # the built-in task's posts, the supervised policy
    "preference": 1,  # votes, the preference model, the reward, the judge
    "alignment": 2,  # pairs, labels, losses, the step, its rate
    "measure": 1,  # the panel, evaluation
}
# Of the models of recorded comparisons, besides "preference": raise it when theirs change alone,
# so that what was kept of the built-in task, and its results, stay. 1 was trained for a fixed
# number of steps; 2 stops where pairs kept apart are told best.
RECORDED = 2
# Of the models that learnt in bfloat16, besides "preference", so that float32's stay: 1 never saw
# its own steps; 2 casts the weights anew for each.
BFLOAT16 = 2


def version():
    """All of VERSIONS as one text, such as 1.1.1.1."""
    return ".".join(str(number) for number in VERSIONS.values())
