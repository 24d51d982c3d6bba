"""In place of job/run.py's Run.

A clock without files, which shows a test what align draws, labels and measures.
"""

import contextlib

import pytest

import evaluate
import train
from job.options import find_method


class Clock:
    """Runs the given steps; pairs[step] is (prompt, y, y_other, label), numbers[step] what update
    returned.

    after: called as after(step) once a step is taken, if given.
    """

    def __init__(self, *steps, after=None):
        self.todo = steps
        self.after = after
        self.pairs = {}
        self.numbers = {}

    def steps(self, policy, optimizer, copies):
        yield from self.todo

    @contextlib.contextmanager
    def evidence(self, step, *pairs):
        self.pairs[step] = pairs
        yield

    def log(self, step, numbers):
        if numbers:
            self.numbers[step] = numbers
            if self.after:
                self.after(step)


def align(clock, options, task, policy, reference, preference):
    """train.align by a clock, without its evaluations. Returns the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "validate", lambda *_: {})
        method = find_method(options.loss)
        train.align(clock, options, method, task, policy, reference, preference, task.judge)
    return clock
