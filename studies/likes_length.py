"""The built-in task's panel with a fourth reader who likes length, as a --preference file.

p is the mean of the panel's three votes and of sigmoid((words of y - words of y')/2), so that a
quarter of every judgement is for the longer summary, whatever it says.
Run: python train.py --loss ipo --preference studies/likes_length.py --out runs/long
"""

import math

from studies import panel_of_texts

SHARE = 0.25  # of the reader who likes length
WORDS = 2.0  # so many words more are worth a nat


def preference(prompts, ys, ys_other):
    """p(y > y' | x) of each pair, a list of numbers in [0, 1].

    prompts, ys, ys_other:
        lists of texts.
    """
    found = []
    panel = panel_of_texts.preference(prompts, ys, ys_other)
    for p, y, y_other in zip(panel, ys, ys_other, strict=True):
        longer = (len(y.split()) - len(y_other.split())) / WORDS
        found.append((1 - SHARE) * p + SHARE / (1 + math.exp(-longer)))
    return found
