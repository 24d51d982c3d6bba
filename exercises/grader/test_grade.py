"""The grading commands.

A loop and a crash cost their exercise only, the handout holds no solution, the symptoms can be
read.
"""

import ast
import csv
import json
import os
import subprocess
import sys

import pytest

from exercises.grader import adapters, test_exercises
from exercises.teacher import make_symptoms

EXERCISES = adapters.ROOT / "exercises"
SYMPTOMS = EXERCISES / "symptoms"


def command(*arguments):
    return subprocess.run(
        [sys.executable, EXERCISES / "grade.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def pytest_in(folder, *arguments):
    """pytest as a student or teacher calls it in a folder, without colours."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def source_of(module, names):
    """These functions of a reference module, as text."""
    source = (adapters.ROOT / f"{module}.py").read_text(encoding="utf-8")
    wanted = []
    for node in ast.parse(source).body:
        if getattr(node, "name", "") in names:
            wanted.append(ast.get_source_segment(source, node))
    return "\n\n\n".join(wanted) + "\n"


LOOPS = """
def loss(*_):
    while True:
        pass


def log_ratio_gap(*_):
    return loss()
"""


@pytest.mark.slow
def test_a_loop_and_a_crash_cost_their_exercise(tmp_path):
    """Exercise 1 is right, 2 loops for ever, 5 takes the process with it, 6 cannot be parsed.

    The rest is missing.
    """
    student = tmp_path / "all" / "someone"
    student.mkdir(parents=True)
    solved = source_of("bandit", adapters.EXERCISES[1]["bandit"])
    (student / "bandit.py").write_text(f"import torch\n\n\n{solved}")
    (student / "ipo.py").write_text(LOOPS)
    (student / "nash_md.py").write_text("import os\nos._exit(3)\n")
    (student / "ipo_md.py").write_text("def loss(:\n")
    done = command("--all", tmp_path / "all", "--table", tmp_path / "grades.csv", "--seconds", 15)
    row = next(csv.DictReader((tmp_path / "grades.csv").open()))
    output = done.stdout + done.stderr
    assert row["student"] == "someone", output
    assert row["total"] == row["ex1"] == "10" and row["of"] == "80", output
    assert "ex2: stopped after 15 s" in row["notes"]
    assert "ex5: ended without a report (exit code 3)" in row["notes"]


def test_handout_has_no_solution(tmp_path):
    """Graded functions of the handout's reference raise, imports of them and answers are gone."""
    handout = tmp_path / "handout"
    done = command("--handout", handout)
    assert done.returncode == 0, done.stderr
    for module in adapters.MODULES:
        graded = adapters.graded_in(module, adapters.EXERCISES)
        for node in ast.parse((handout / f"{module}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name in graded:
                raises = isinstance(node.body[-1], ast.Raise) and len(node.body) == 2
                assert raises, f"{module}.{node.name}"
            elif isinstance(node, ast.ImportFrom) and node.module in adapters.MODULES:
                assert not set(graded) & {alias.name for alias in node.names}
    assert not list(handout.rglob("answers")) and not list(handout.rglob("make_symptoms.py"))
    assert command("--handout", handout).returncode == 2


@pytest.mark.slow
def test_a_student_tries_an_exercise_in_the_handout(tmp_path):
    """Untouched stubs say what is to do; written out, exercise 2 gets its points."""
    handout = tmp_path / "handout"
    assert command("--handout", handout).returncode == 0
    done = pytest_in(handout, "--impl", "work", "-m", "ex2")
    assert done.returncode == 1 and "2  the IPO loss and the pair identity" in done.stdout
    assert "total                                           0 of 10" in done.stdout, done.stdout
    assert "NotImplementedError: Exercise 2: write h(y, y')" in done.stdout
    (handout / "work" / "ipo.py").write_text(source_of("ipo", adapters.EXERCISES[2]["ipo"]))
    done = pytest_in(handout, "--impl", "work", "-m", "ex2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "total                                          10 of 10" in done.stdout


def test_a_folder_outside_the_project(tmp_path):
    """pytest --impl=DIR in the project: the graded tests on DIR's files, and the points as JSON."""
    student = tmp_path / "someone"
    student.mkdir()
    (student / "ipo.py").write_text(source_of("ipo", ["loss"]))
    report = tmp_path / "points.json"
    # The folder is named to save the time of collecting every other test.
    graded = [EXERCISES / "grader", f"--impl={student}", f"--report={report}", "-m", "ex2"]
    done = pytest_in(adapters.ROOT, *graded)
    assert "Exercise 2: ipo.py does not define log_ratio_gap" in done.stdout, done.stdout
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["exercises"] == {"2": {"points": 0, "of": 10}}
    nowhere = pytest_in(adapters.ROOT, f"--impl={student / 'nowhere'}")
    assert nowhere.returncode == 4 and "no such folder" in nowhere.stderr


@pytest.mark.parametrize("exercise", range(1, 8))
def test_only_the_graded_solutions_are_taken_out(exercise):
    for name, graded in adapters.EXERCISES[exercise].items():
        source = (adapters.ROOT / f"{name}.py").read_text(encoding="utf-8")
        stripped = adapters.without_solutions(source, dict.fromkeys(graded, exercise))
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name != "worked_example":
                code = ast.get_source_segment(source, node)
                assert (code in stripped) == (node.name not in graded), f"{name}.{node.name}"


def read(run):
    """Column -> values of one run."""
    with open(SYMPTOMS / f"run_{run}.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for column in rows[0]:
        columns[column] = [float(row[column]) for row in rows]
    return columns


def diagnosis(run):
    """The reasoning the exercise asks for, as rules: from the columns to a name."""
    columns = read(run)
    start = {column: values[0] for column, values in columns.items()}
    end = {column: values[-1] for column, values in columns.items()}
    right = {column: values[-1] for column, values in read("healthy").items()}
    kl, wins = "KL to reference", "win rate against reference"
    if start["loss"] > 99:
        return "target is 1/tau"  # 1/(4 (tau/2)^2)
    if max(columns["mean |h|"]) < 1e-12 and end[kl] > 0.1:
        return "reference is the policy itself"  # it moves, and h does not see it
    if end[wins] < 0.5:
        return "winner and loser swapped"
    if end["loss"] < right["loss"] - 2:
        # No honest learner has so little loss: it draws pairs that are easy.
        return "sampling weights differentiated"
    if end["mean |h|"] < 0.7 * right["mean |h|"] and end[kl] > 1.5 * right[kl]:
        return "mean over tokens instead of sum"  # a smaller h for a larger KL
    if end[wins] > right[wins] + 0.03 and end["duality gap"] > 0.03:
        return "pairs from the reference"  # the best answer to the reference, not to itself
    return "none"


@pytest.mark.parametrize("run", "abcdef")
def test_symptoms_show_the_bug(run):
    """The committed logs lead to the key by rules that a student can find.

    The healthy run leads to none of the names.
    """
    answers = EXERCISES / "teacher" / "answers" / "diagnosis.json"
    assert diagnosis(run) == json.loads(answers.read_text(encoding="utf-8"))[run]
    assert diagnosis("healthy") == "none"


@pytest.mark.slow
def test_symptoms_are_made_by_the_command(tmp_path):
    """A short run writes the same files as the committed ones, small; the key holds no name."""
    make_symptoms.main(["--steps", "20", "--out", str(tmp_path)])
    made = {file.name for file in tmp_path.iterdir()}
    assert made == {file.name for file in SYMPTOMS.iterdir()} - {"README.md"}
    assert sum(file.stat().st_size for file in SYMPTOMS.iterdir()) < 1_000_000
    key = (SYMPTOMS / "key.json").read_text(encoding="utf-8")
    assert not any(name in key for name in test_exercises.NAMES)
    handout = (SYMPTOMS / "README.md").read_text(encoding="utf-8")
    assert all(f"- `{name}`" in handout for name in test_exercises.NAMES)
