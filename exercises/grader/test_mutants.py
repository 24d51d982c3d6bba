"""The grader is graded.

Every mistake of mistakes.py loses points in its exercise, stubs get none, the reference all.
"""

import inspect
import re
import sys

import pytest

from exercises.grader import adapters, mistakes, test_exercises
from exercises.teacher.mutants_table import graded_tests, outcome, run, table

EXERCISES = adapters.ROOT / "exercises"
STUBS = EXERCISES / "work"


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
    """Each graded test says which exercise is not done: none passes without the student's code."""
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
    one = mistakes.MISTAKES[index]
    points, failed = outcome(index)
    assert points < adapters.POINTS, f"{one.name}: every test of exercise {one.exercise} passes"
    # It ran, and was wrong.
    assert not any("AttributeError" in message for message in failed.values()), failed


def test_mutant_list_is_long_enough_and_in_the_readme():
    assert len(mistakes.MISTAKES) >= 20
    assert {one.exercise for one in mistakes.MISTAKES} == set(adapters.TITLES)
    names = [(one.exercise, one.name) for one in mistakes.MISTAKES]
    assert len(names) == len(set(names))
    readme = (EXERCISES / "README.md").read_text(encoding="utf-8")
    assert table() in readme, "python -m exercises.teacher.mutants_table prints what belongs there"


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
    index = [one.name for one in mistakes.MISTAKES].index(name)
    _, failed = outcome(index)
    hint = mistakes.MISTAKES[index].hint
    assert any(hint in message for message in failed.values()), failed


def test_mutant_hint_is_not_given_to_another_value():
    """A wrong value of no listed mistake is described by its factor, not blamed on a mistake."""
    message = ""
    observed, expected = test_exercises.number(3.0, 6.0), test_exercises.number(1.0, 2.0)
    try:
        test_exercises.check(2, "eq 11", lambda: observed, expected)
    except AssertionError as error:
        message = str(error)
    assert "exactly 3 times" in message and "eq 11" in message


def test_mutant_of_zeros_never_equals_an_expected_value():
    """check refuses an expectation of zeros; it allows a millionth of the smallest magnitude."""
    tiny = test_exercises.number(1e-7, 1.0)
    assert not test_exercises.close(0 * tiny, tiny) and not test_exercises.close(2 * tiny, tiny)
    with pytest.raises(AssertionError, match="grader itself"):
        test_exercises.check(1, "", lambda: 0 * tiny, 0 * tiny)


PARTS = ("Goal.", "Background.", "Task.", "Hints.", "Tests.", "Questions.")


@pytest.mark.parametrize("exercise", range(1, 8))
def test_mutant_of_a_signature_cannot_come_from_the_stubs(exercise):
    """Stub and reference have one signature; the stub's docstring begins with the reference's."""
    adapters.lay(STUBS, exercise)
    handouts = 0
    for module, names in adapters.EXERCISES[exercise].items():
        for name in names:
            stub = getattr(sys.modules[module], name)
            reference = adapters.pristine[module][name]
            if name == "PAIR":
                assert stub is None
                continue
            assert inspect.signature(stub) == inspect.signature(reference), f"{module}.{name}"
            theirs = re.sub(r"\s+", " ", stub.__doc__ or "")
            ours = re.sub(r"\s+", " ", reference.__doc__ or "").strip()
            assert theirs.startswith(ours), (
                f"{module}.{name}: the docstring has drifted from the reference's"
            )
            handouts += all(word in stub.__doc__ for word in PARTS)
            source = inspect.getsource(stub)
            assert f'raise NotImplementedError("Exercise {exercise}: ' in source
    assert handouts == 1, "one handout an exercise"
