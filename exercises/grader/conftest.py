"""Puts the project's root on the import path, so that tests import the flat scripts by name; and grades exercises.

pytest                            every test, on the reference
pytest --impl DIR                 the graded tests on DIR's files (see adapters.py), with a table of points;
                                  --impl=DIR if DIR lies outside the project, or pytest would look for tests there
pytest --impl DIR -m ex2          one exercise
pytest --impl DIR --report FILE   and the points as JSON
Grading for marks, with a process and a time limit for each exercise: exercises/grade.py.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(
    1
)  # the models are tiny: a second thread only waits, and on a busy machine for long

import adapters  # noqa: E402  it needs the path above


def pytest_configure(config):
    for number, title in adapters.TITLES.items():
        config.addinivalue_line("markers", f"ex{number}(points): exercise {number}, {title}")
    config.points = {}  # test name -> what it is worth and what it got
    if getattr(config.option, "impl", None):
        if not Path(config.option.impl).is_dir():
            raise pytest.UsageError(f"--impl {config.option.impl}: no such folder")
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
    others = [item for item in items if exercise_of(item) is None]
    if getattr(config.option, "impl", None) and others:
        items[:] = [item for item in items if exercise_of(item)]
        config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def laid_over(request):
    """The student's functions are in place during a graded test, and the reference afterwards."""
    graded, folder = exercise_of(request.node), getattr(request.config.option, "impl", None)
    if not graded:
        yield
        return
    try:
        adapters.lay(folder, graded[0])
        yield
    finally:
        adapters.lay(None, graded[0])


def pytest_runtest_protocol(item):
    graded = exercise_of(item)
    if graded:  # noted before it runs: a test that takes the process with it counts 0
        number, of = graded
        item.config.points[item.nodeid] = dict(
            exercise=number, test=item.name, of=of, points=0, message="did not finish"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    entry = item.config.points.get(item.nodeid)
    if entry and report.failed:
        entry["points"], error = 0, call.excinfo
        entry["message"] = (
            str(error.value)
            if error.type is AssertionError
            else f"{error.type.__name__}: {error.value}"
        )
    elif entry and report.when == "call" and report.passed:
        entry["points"], entry["message"] = entry["of"], ""
    return report


def totals(points):
    """Exercise -> (points, of) over the entries."""
    return {
        number: tuple(
            sum(entry[key] for entry in points if entry["exercise"] == number)
            for key in ("points", "of")
        )
        for number in sorted({entry["exercise"] for entry in points})
    }


def pytest_sessionfinish(session):
    if getattr(session.config.option, "report", None):
        points = list(session.config.points.values())
        sums = {
            str(number): dict(points=got, of=of) for number, (got, of) in totals(points).items()
        }
        Path(session.config.option.report).write_text(
            json.dumps(dict(exercises=sums, tests=points), indent=1), encoding="utf-8"
        )


def pytest_terminal_summary(terminalreporter, config):
    if not (getattr(config.option, "impl", None) or getattr(config.option, "report", None)):
        return
    write, points = terminalreporter.write_line, list(config.points.values())
    for entry in points:
        if entry["message"]:
            write(
                f"\nExercise {entry['exercise']}, {entry['test']}: {entry['points']} of {entry['of']}\n{entry['message']}"
            )
    write("\nexercise                                          points")
    for number, (got, of) in totals(points).items():
        write(f"{number}  {adapters.TITLES[number]:<46}{got:3} of {of}")
    write(f"   {'total':<46}{sum(e['points'] for e in points):3} of {sum(e['of'] for e in points)}")
