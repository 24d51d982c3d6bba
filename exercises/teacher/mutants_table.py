"""Plants each mistake of mistakes.py in the reference and prints which tests catch it.

What it prints is the table at the end of exercises/README.md.
Run: python -m exercises.teacher.mutants_table    (about a minute)
"""

import functools

import torch

from exercises.grader import adapters, test_exercises
from exercises.teacher import mistakes


def graded_tests(exercise):
    """[(test function, points)] of one exercise."""
    found = []
    for name, function in vars(test_exercises).items():
        if not name.startswith("test_"):
            continue
        for mark in getattr(function, "pytestmark", []):
            if mark.name == f"ex{exercise}":
                found.append((function, mark.kwargs["points"]))
    return found


def run(exercise):
    """Runs an exercise's tests here and now: (points, {failed test: message})."""
    points = 0
    failed = {}
    for function, worth in graded_tests(exercise):
        try:
            function()
            points += worth
        except Exception as error:
            failed[function.__name__] = f"{type(error).__name__}: {error}"
    return points, failed


@functools.cache
def outcome(index):
    """run on a mistake's exercise with it planted: (points, failed tests). index: in MISTAKES."""
    one = mistakes.MISTAKES[index]
    adapters.lay(None, one.exercise)
    with mistakes.planted(one):
        return run(one.exercise)


def table():
    """The table of mistakes: exercise, mistake, points it keeps, the tests that catch it."""
    rows = ["| exercise | mistake | points left | caught by |", "|---|---|---|---|"]
    for index, one in enumerate(mistakes.MISTAKES):
        points, failed = outcome(index)
        caught = ", ".join(f"`{name}`" for name in failed)
        rows.append(f"| {one.exercise} | {one.name} | {points} | {caught} |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
