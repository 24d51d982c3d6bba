"""The built-in task's panel as a --preference file: asked of texts, exact probabilities.

For posts of the task's kind that come from files, such as those of studies.middle. The built-in
task itself needs no file: its panel is its judge.
Run: python train.py --preference studies/panel_of_texts.py --demos FILE
"""

import summaries


def preference(prompts, ys, ys_other):
    """p(y > y' | x) of each pair, a list of numbers in [0, 1]: the mean of summaries.votes.

    prompts, ys, ys_other:
        lists of texts.
    """
    found = []
    for prompt, y, y_other in zip(prompts, ys, ys_other, strict=True):
        votes = summaries.votes(prompt, y, y_other)
        found.append(sum(votes) / len(votes))
    return found
