"""Grades exercises.

pytest                            every test, on the reference
pytest --impl DIR                 the graded tests on DIR's files (see adapters.py), with a table
                                  of points; --impl=DIR if DIR lies outside the project, or pytest
                                  would look for tests there
pytest --impl DIR -m ex2          one exercise
pytest --impl DIR --report FILE   and the points as JSON
pytest --impl DIR --course 7      with other inputs than a handout's, where none are shown
Grading for marks, with a process and a time limit for each exercise: exercises/grade.py.
"""

import json
import traceback
from pathlib import Path

import pytest
import torch

from exercises.grader import adapters, checks

# The models are tiny: a second thread only waits, and on a busy machine for long.
torch.set_num_threads(1)


def pytest_configure(config):
    for number, title in adapters.TITLES.items():
        config.addinivalue_line("markers", f"ex{number}(points): exercise {number}, {title}")
    config.points = {}  # test name -> what it is worth and what it got
    config.problems = []  # lines of the student's files that failed while they were read
    adapters.course["seed"] = getattr(config.option, "course", 0)
    folder = getattr(config.option, "impl", None)
    if not folder:
        return
    if not Path(folder).is_dir():
        raise pytest.UsageError(f"--impl {folder}: no such folder")
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"  # the messages follow the table; --tb=short shows where


def exercise_of(item):
    """The exercise and points of a graded test, None for any other."""
    for number in adapters.TITLES:
        mark = item.get_closest_marker(f"ex{number}")
        if mark:
            return number, mark.kwargs["points"]
    return None


def pytest_collection_modifyitems(config, items):
    if not getattr(config.option, "impl", None):
        return
    others = [item for item in items if exercise_of(item) is None]
    if others:
        items[:] = [item for item in items if exercise_of(item)]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def laid_over(request):
    """The student's functions are in place during a graded test, and the reference afterwards."""
    graded = exercise_of(request.node)
    if not graded:
        yield
        return
    exercise, _ = graded
    try:
        adapters.lay(getattr(request.config.option, "impl", None), exercise)
        note_problems(request.config)
        yield
    finally:
        adapters.put_back()


def note_problems(config):
    for problems in adapters.laid["problems"].values():
        config.problems += [problem for problem in problems if problem not in config.problems]


def pytest_runtest_protocol(item):
    graded = exercise_of(item)
    if not graded:
        return
    number, of = graded
    # Noted before it runs: a test that takes the process with it counts 0.
    item.config.points[item.nodeid] = dict(
        exercise=number, test=item.name, of=of, points=0, message="did not finish"
    )


def message_of(error):
    """What a student reads of an exception: its type unless a check failed, and their line."""
    if type(error) is AssertionError:
        return str(error)
    message = f"{type(error).__name__}: {error}"
    lines = [
        checks.line_of(frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if checks.is_students(frame.filename)
    ]
    # A stub's own line says nothing new.
    return f"{message}\n  at {lines[-1]}" if lines and "raise Not" not in lines[-1] else message


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    entry = item.config.points.get(item.nodeid)
    if not entry:
        return report
    if report.failed:
        error = call.excinfo
        entry["points"] = 0
        entry["message"] = message_of(error.value)
    elif report.when == "call" and report.passed:
        entry["points"] = entry["of"]
        entry["message"] = ""
    return report


def totals(entries):
    """Exercise -> (points, of), in the order of the exercises."""
    sums = {}
    for entry in entries:
        points, of = sums.get(entry["exercise"], (0, 0))
        sums[entry["exercise"]] = (points + entry["points"], of + entry["of"])
    return dict(sorted(sums.items()))


def pytest_sessionfinish(session):
    file = getattr(session.config.option, "report", None)
    if not file:
        return
    entries = list(session.config.points.values())
    exercises = {}
    for number, (points, of) in totals(entries).items():
        exercises[str(number)] = dict(points=points, of=of)
    found = dict(exercises=exercises, tests=entries, problems=session.config.problems)
    text = json.dumps(found, indent=1)
    Path(file).write_text(text, encoding="utf-8")


def pytest_terminal_summary(terminalreporter, config):
    """What a student reads: each lost test with its message, then the table."""
    if not (getattr(config.option, "impl", None) or getattr(config.option, "report", None)):
        return
    write = terminalreporter.write_line
    entries = list(config.points.values())
    for problem in config.problems:
        write(f"\nleft out, and nothing else: {problem}")
    for entry in entries:
        if entry["message"]:
            score = f"{entry['points']} of {entry['of']}"
            write(f"\nExercise {entry['exercise']}, {entry['test']}: {score}\n{entry['message']}")
    write("\nexercise                                          points")
    for number, (points, of) in totals(entries).items():
        write(f"{number}  {adapters.TITLES[number]:<46}{points:3} of {of}")
    points = sum(entry["points"] for entry in entries)
    of = sum(entry["of"] for entry in entries)
    write(f"   {'total':<46}{points:3} of {of}")
