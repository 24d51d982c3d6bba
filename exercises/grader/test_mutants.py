"""The grader is graded.

Every mistake of teacher/mistakes.py loses points in its exercise, every answer of teacher/right.py
gets all, stubs get none, the reference all; no message names a mistake that was not made.
"""

import inspect
import json
import re
import sys

import pytest
import torch

from exercises.grader import adapters, checks, test_exercises
from exercises.teacher import mistakes, right, wrong_values
from exercises.teacher.mutants_table import graded_tests, outcome, run, table

EXERCISES = adapters.ROOT / "exercises"
STUBS = EXERCISES / "work"
NAMES = [f"ex{one.exercise}-{one.name}" for one in mistakes.MISTAKES]
# What stands in a message where a mistake is named.
NAMED = "what a right program with one mistake gives"
# In the fast suite a few of each exercise and kind; the others are slow.
FAST = {
    "ex1-cycle: transposed",
    "ex1-win rate: changes its argument",
    "ex1-win rate: sets the default dtype",
    "ex1-win rate: stacks of one dimension only",
    "ex2-h: detached",
    "ex2-IPO: target 1/tau",
    "ex2-IPO: h cut at 10 nats",
    "ex3-mixture: arithmetic",
    "ex3-equilibrium: another law as mixture ignored",
    "ex3-equilibrium: ValueError never raised",
    "ex4-IPO-MD: missing stop-gradient",
    "ex4-expected loss: labels cut to [0, 1]",
    "ex5-DPO: log of sigmoid",
    "ex6-diagnosis: empty",
    "ex7-log-probability: softmax in the model's bfloat16",
    "ex7-Nash-MD-PG: per-token KL",
    "ex8-sampler: y' has y's uniform numbers",
    "ex8-draw: uniforms rounded to float32",
}


def marked(names, fast):
    """The indices of names as parameters, slow unless they are among the fast ones."""
    found = []
    for index, name in enumerate(names):
        marks = [] if name in fast else [pytest.mark.slow]
        found.append(pytest.param(index, id=name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def the_reference_afterwards():
    """No planted mistake outlives its test."""
    yield
    adapters.put_back()


@pytest.mark.parametrize("exercise", adapters.TITLES)
def test_mutant_free_reference_gets_all_points(exercise, monkeypatch):
    """In two courses."""
    for seed in (0, 1):
        monkeypatch.setitem(adapters.course, "seed", seed)
        adapters.put_back()
        assert sum(worth for _, worth in graded_tests(exercise)) == adapters.POINTS
        assert run(exercise) == (adapters.POINTS, {})


@pytest.mark.parametrize("exercise", adapters.TITLES)
def test_mutant_stubs_get_no_points(exercise):
    """Each graded test says which exercise is not done: none passes without the student's code."""
    adapters.lay(STUBS, exercise)
    points, failed = run(exercise)
    assert points == 0 and len(failed) == len(graded_tests(exercise))
    if exercise != 6:
        assert any(f"Exercise {exercise}" in message for message in failed.values())


@pytest.mark.parametrize("index", marked(NAMES, FAST))
def test_mutant_loses_points_in_its_exercise(index):
    """And is told of a cause only if it is on the list with a hint: then of its own, if any."""
    one = mistakes.MISTAKES[index]
    points, failed = outcome(index)
    assert points < adapters.POINTS, f"{one.name}: every test of exercise {one.exercise} passes"
    # It ran, and was wrong.
    assert not any("AttributeError" in message for message in failed.values()), failed
    for message in failed.values():
        if NAMED in message:
            assert one.hint and one.hint in message, message


def test_mutant_list_is_long_enough():
    kinds = [one for one in mistakes.MISTAKES if one.hint is None]
    assert len(mistakes.MISTAKES) >= 140 and len(kinds) >= 60
    assert {one.exercise for one in mistakes.MISTAKES} == set(adapters.TITLES)
    assert len(NAMES) == len(set(NAMES)) and set(NAMES) > FAST


@pytest.mark.slow
def test_mutant_list_is_in_the_readme():
    readme = (EXERCISES / "README.md").read_text(encoding="utf-8")
    assert table() in readme, "python -m exercises.teacher.mutants_table prints what belongs there"


OTHER_STYLES = [f"ex{one.exercise}-{one.name}" for one in right.SUBMISSIONS]
FAST_STYLES = {
    "ex1-cycle: entry by entry, float32",
    "ex2-IPO: a loop over the pairs",
    "ex3-mixture: logsumexp",
    "ex3-equilibrium: damped as hinted",
    "ex4-expected loss: keyword arguments and an outer product",
    "ex5-DPO: binary cross-entropy",
    "ex7-log-probability: row by row",
    "ex8-draw: counts the sums that are not above",
}


@pytest.mark.parametrize("index", marked(OTHER_STYLES, FAST_STYLES))
def test_right_in_another_style_gets_all_points(index):
    one = right.SUBMISSIONS[index]
    assert len(right.SUBMISSIONS) >= 40 and set(OTHER_STYLES) > FAST_STYLES
    adapters.put_back()
    with mistakes.planted(one):
        assert run(one.exercise) == (adapters.POINTS, {})


@pytest.mark.slow
def test_wrong_values_are_those_of_the_mistakes():
    """The committed numbers are what the command writes, within the digits that are compared."""
    found, stored = wrong_values.wrong_values(), json.loads(wrong_values.FILE.read_text())
    assert found.keys() == stored.keys() and len(stored) >= 30
    for key, entries in found.items():
        assert [entry["hints"] for entry in entries] == [entry["hints"] for entry in stored[key]]
        for entry, other in zip(entries, stored[key], strict=True):
            values = (torch.tensor(one["values"]).double() for one in (entry, other))
            assert entry["shape"] == other["shape"] and torch.allclose(*values, 1e-5, 1e-12), key


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


def message_of(*arguments, **named):
    """What check says of a wrong value."""
    with pytest.raises(AssertionError) as caught:
        checks.check(*arguments, **named)
    return str(caught.value)


def test_mutant_hint_is_not_given_to_another_value():
    """A wrong value of no listed mistake is described by its ratio, not blamed on a mistake."""
    expected = test_exercises.number(1.0, 2.0)
    message = message_of(2, "eq 11", lambda: 3 * expected, expected)
    assert "exactly 3 times" in message and "eq 11" in message and NAMED not in message
    message = message_of(2, "eq 11", lambda: expected + 1, expected)
    assert "the ratio to the expected value is [2.0, 1.5]" in message


def test_mutant_hint_needs_the_public_inputs():
    """The stored number of a mistake is its value on the inputs that every course has."""
    key, entries = next((key, entries) for key, entries in checks.WRONG.items() if key[0] == "2")
    value = torch.tensor(entries[0]["values"]).double().view(entries[0]["shape"])
    equation = key.split("/", 1)[1]
    assert entries[0]["hints"][0] in message_of(2, equation, lambda: value, 7 * value + 1)
    assert NAMED not in message_of(2, equation, lambda: value, 7 * value + 1, public=False)


def test_mutant_of_zeros_never_equals_an_expected_value():
    """check refuses an expectation of zeros; it allows a millionth of the smallest magnitude."""
    tiny = test_exercises.number(1e-7, 1.0)
    assert not checks.close(0 * tiny, tiny) and not checks.close(2 * tiny, tiny)
    with pytest.raises(AssertionError, match="grader itself"):
        checks.check(1, "", lambda: 0 * tiny, 0 * tiny)


def arguments_of(function):
    """Names, kinds and defaults, a function's name standing for the function."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = getattr(parameter.default, "__name__", parameter.default)
        found.append((name, parameter.kind, default))
    return found


PARTS = ("Goal.", "Background.", "Task.", "Hints.", "Tests.", "Questions.")


@pytest.mark.parametrize("exercise", [1, 2, 3, 4, 5, 7, 8])
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
            assert arguments_of(stub) == arguments_of(reference), f"{module}.{name}"
            theirs = re.sub(r"\s+", " ", stub.__doc__ or "")
            ours = re.sub(r"\s+", " ", reference.__doc__ or "").strip()
            assert theirs.startswith(ours), (
                f"{module}.{name}: the docstring has drifted from the reference's"
            )
            handouts += all(word in stub.__doc__ for word in PARTS)
            source = inspect.getsource(stub)
            assert f'raise NotImplementedError("Exercise {exercise}: ' in source
    assert handouts == 1, "one handout an exercise"
