"""The grader is graded: every mistake of mistakes.py loses points in its exercise, stubs get none, the reference all.

Run: python tests/test_mutants.py    (the table of mistakes and the tests that catch them, as in exercises/README.md)
"""

import functools
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # when run as a command

import adapters  # noqa: E402
import mistakes  # noqa: E402
import test_exercises  # noqa: E402

STUBS = adapters.ROOT / "exercises"


def graded_tests(exercise):
    """[(test function, points)] of one exercise."""
    found = []
    for name, function in vars(test_exercises).items():
        for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
            if mark.name == f"ex{exercise}":
                found.append((function, mark.kwargs["points"]))
    return found


def run(exercise):
    """Runs an exercise's tests here and now: (points, {failed test: message})."""
    points, failed = 0, {}
    for function, worth in graded_tests(exercise):
        try:
            function()
            points += worth
        except Exception as error:
            failed[function.__name__] = f"{type(error).__name__}: {error}"
    return points, failed


@functools.cache
def outcome(index):
    """run on the mistake's exercise with it planted: (points, failed tests)."""
    one = mistakes.MISTAKES[index]
    adapters.lay(None, one.exercise)
    with mistakes.planted(one):
        return run(one.exercise)


@pytest.fixture(autouse=True)
def the_reference_afterwards():
    """No planted mistake outlives its test."""
    yield
    adapters.lay(None, 1)


@pytest.mark.parametrize("exercise", adapters.TITLES)
def test_mutant_free_reference_gets_all_points(exercise):
    adapters.lay(None, exercise)
    assert sum(worth for _, worth in graded_tests(exercise)) == adapters.POINTS
    assert run(exercise) == (adapters.POINTS, {})


@pytest.mark.parametrize("exercise", adapters.TITLES)
def test_mutant_stubs_get_no_points(exercise):
    """And each graded test says which exercise is not done, so no test passes without the student's code."""
    adapters.lay(STUBS, exercise)
    points, failed = run(exercise)
    assert points == 0 and len(failed) == len(graded_tests(exercise))
    if exercise < 8:
        assert any(f"Exercise {exercise}" in message for message in failed.values())


@pytest.mark.parametrize(
    "index",
    range(len(mistakes.MISTAKES)),
    ids=[f"ex{one.exercise}-{one.name}" for one in mistakes.MISTAKES],
)
def test_mutant_loses_points_in_its_exercise(index):
    one, (points, failed) = mistakes.MISTAKES[index], outcome(index)
    assert points < adapters.POINTS, f"{one.name}: every test of exercise {one.exercise} passes"
    assert not any("AttributeError" in message for message in failed.values()), (
        failed
    )  # it ran, and was wrong


def test_mutant_list_is_long_enough_and_in_the_readme():
    assert len(mistakes.MISTAKES) >= 20 and {one.exercise for one in mistakes.MISTAKES} == set(
        adapters.TITLES
    )
    names = [(one.exercise, one.name) for one in mistakes.MISTAKES]
    assert len(names) == len(set(names))
    assert table() in (STUBS / "README.md").read_text(encoding="utf-8"), (
        "python tests/test_mutants.py prints what belongs there"
    )


TAUGHT = [
    "IPO: target 1/tau",
    "IPO: each pair counted twice",
    "gap: one player",
    "mixture: arithmetic",
    "Nash-MD-PG: missing stop-gradient",
    "Nash-MD-PG: per-token KL",
    "IPO-MD: one from the policy",
    "IPO-MD: uncentred one-sided loss",
    "DPO: h over tau",
]


@pytest.mark.parametrize("name", TAUGHT)
def test_mutant_is_told_what_it_did(name):
    """The message holds the mistake's own hint, and names an equation."""
    index, one = next(
        (index, one) for index, one in enumerate(mistakes.MISTAKES) if one.name == name
    )
    _, failed = outcome(index)
    assert any(one.hint in message for message in failed.values()), failed


def test_mutant_hint_is_not_given_to_another_value():
    """A wrong value that no listed mistake gives is described by its factor, not blamed on a mistake."""
    message = ""
    try:
        test_exercises.check(
            2, "eq 11", lambda: test_exercises.number(3.0, 6.0), test_exercises.number(1.0, 2.0)
        )
    except AssertionError as error:
        message = str(error)
    assert "exactly 3 times" in message and "eq 11" in message


def test_mutant_of_zeros_never_equals_an_expected_value():
    """check refuses an expectation of zeros, and its tolerance is a millionth of the smallest expected magnitude."""
    tiny = test_exercises.number(1e-7, 1.0)
    assert not test_exercises.close(0 * tiny, tiny) and not test_exercises.close(2 * tiny, tiny)
    with pytest.raises(AssertionError, match="grader itself"):
        test_exercises.check(1, "", lambda: 0 * tiny, 0 * tiny)


@pytest.mark.parametrize("exercise", range(1, 8))
def test_mutant_of_a_signature_cannot_come_from_the_stubs(exercise):
    """Stub and reference have one signature, and the stub's docstring begins with the reference's."""
    adapters.lay(STUBS, exercise)
    handouts = 0
    for module, names in adapters.EXERCISES[exercise].items():
        for name in names:
            stub, reference = getattr(sys.modules[module], name), adapters.pristine[module][name]
            if name == "PAIR":
                assert stub is None
                continue
            assert inspect.signature(stub) == inspect.signature(reference), f"{module}.{name}"
            theirs, ours = (
                re.sub(r"\s+", " ", function.__doc__ or "") for function in (stub, reference)
            )
            assert theirs.startswith(ours.strip()), (
                f"{module}.{name}: the docstring has drifted from the reference's"
            )
            handouts += all(
                word in stub.__doc__
                for word in ("Goal.", "Background.", "Task.", "Hints.", "Tests.", "Questions.")
            )
            source = inspect.getsource(stub)
            assert f'raise NotImplementedError("Exercise {exercise}: ' in source
    assert handouts == 1, "one handout an exercise"


def table():
    """The table of mistakes: exercise, mistake, points it keeps, the tests that catch it."""
    rows = ["| exercise | mistake | points left | caught by |", "|---|---|---|---|"]
    for index, one in enumerate(mistakes.MISTAKES):
        points, failed = outcome(index)
        rows.append(
            f"| {one.exercise} | {one.name} | {points} | {', '.join(f'`{name}`' for name in failed)} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
