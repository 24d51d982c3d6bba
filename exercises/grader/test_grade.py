"""The grading commands.

A loop and a crash cost their exercise only, the handout holds no solution, the symptoms can be
read.
"""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from exercises.grader import adapters, test_exercises
from exercises.teacher import make_symptoms
from exercises.teacher.mutants_table import run

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


def submissions(folder):
    """Two students: one who handed in nothing, and one of whom exercise 1 is right.

    Of the second, 2 loops for ever, 7 takes the process with it, ipo_md.py cannot be parsed.
    """
    (folder / "anyone").mkdir(parents=True)
    student = folder / "someone"
    student.mkdir()
    solved = source_of("bandit", adapters.EXERCISES[1]["bandit"])
    (student / "bandit.py").write_text(f"import torch\n\n\n{solved}")
    (student / "ipo.py").write_text(LOOPS)
    (student / "nash_md.py").write_text("import os\nos._exit(3)\n")
    (student / "ipo_md.py").write_text("def loss(:\n")


@pytest.mark.slow
def test_all_is_continued_and_says_why(tmp_path):
    """Killed after its first report, --all goes on; a loop and a crash cost their exercise only."""
    submissions(tmp_path / "all")
    table, reports = tmp_path / "grades.csv", tmp_path / "grades"
    arguments = ["--all", tmp_path / "all", "--table", table, "--seconds", 5]
    first = subprocess.Popen([sys.executable, EXERCISES / "grade.py", *map(str, arguments)])
    try:
        until = time.monotonic() + 200
        while not (reports / "anyone.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        first.kill()
        first.wait()
    assert not (reports / "someone.json").exists()
    done = command(*arguments)
    output = done.stdout + done.stderr
    assert "anyone: 0 of 80 (graded before)" in output, output
    rows = {row["student"]: row for row in csv.DictReader(table.open())}
    assert rows["anyone"]["total"] == "0"
    assert "ex1 test_cycle -3: NotImplementedError: Exercise 1" in rows["anyone"]["why"]
    row = rows["someone"]
    assert row["total"] == row["ex1"] == "10" and row["of"] == "80", output
    assert "ex2: stopped after 5 s of processor time" in row["why"]
    assert "ex7: ended without a report (exit code 3)" in row["why"]
    assert "ipo_md.py cannot be read" in row["why"]
    kept = json.loads((reports / "someone.json").read_text(encoding="utf-8"))
    assert kept["points"] == 10 and kept["exercises"]["1"]["tests"][0]["points"] == 3


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
    for name in ("answers", "make_symptoms.py", "mistakes.py", "right.py", "teacher"):
        assert not list(handout.rglob(name)), name
    assert command("--handout", handout).returncode == 2


@pytest.mark.slow
def test_a_student_tries_an_exercise_in_the_handout(tmp_path):
    """Plain pytest grades work/: untouched stubs say what is to do; the lab's exercises suffice."""
    handout = tmp_path / "handout"
    assert command("--handout", handout).returncode == 0
    done = pytest_in(handout, "-m", "ex2")
    assert done.returncode == 1 and "2  the IPO loss and the pair identity" in done.stdout
    assert "total                                           0 of 10" in done.stdout, done.stdout
    assert "NotImplementedError: Exercise 2: write h(y, y')" in done.stdout
    solve(handout / "work", lab_plan())
    done = pytest_in(handout)
    assert "total                                          60 of 80" in done.stdout, done.stdout


def lab_plan():
    """The lab's exercises in the README's order."""
    readme = (EXERCISES / "README.md").read_text(encoding="utf-8")
    readme = " ".join(readme.split())
    plan = readme[readme.index("Lab, three hours:") : readme.index("the rest for questions")]
    return [int(number) for number in re.findall(r"\b([1-8])\b", re.sub(r"\(.*?\)", "", plan))]


def solve(folder, exercises):
    """Writes the reference's solutions of some exercises into a folder, and stubs of the others."""
    folder.mkdir(exist_ok=True)
    others = [number for number in adapters.TITLES if number not in exercises]
    for name in adapters.MODULES:
        source = (adapters.ROOT / f"{name}.py").read_text(encoding="utf-8")
        source = adapters.without_solutions(source, adapters.graded_in(name, others))
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    for number, name in adapters.ANSWERS.items():
        where = "teacher/answers" if number in exercises else "work"
        shutil.copy(EXERCISES / where / name, folder)


def points_of(folder, handout):
    """Exercise -> points."""
    found = {}
    try:
        for exercise in adapters.TITLES:
            adapters.lay(folder, exercise, handout)
            found[exercise], _ = run(exercise)
    finally:
        adapters.put_back()
    return found


def solved_cases():
    """(the last exercise that is solved, whether in a handout): the longer runs are slow."""
    cases = [(last, True) for last in range(9)] + [(4, False), (8, False)]
    for last, handout in cases:
        marks = [] if handout and last in (0, 1, 3) else [pytest.mark.slow]
        yield pytest.param(last, handout, marks=marks)


@pytest.mark.parametrize("last, handout", list(solved_cases()))
def test_one_to_k_solved_gets_the_points_of_one_to_k(last, handout, tmp_path):
    """And none of the others: every exercise needs only its own functions and earlier ones."""
    solve(tmp_path / "work", range(1, last + 1))
    wanted = {exercise: 10 if exercise <= last else 0 for exercise in adapters.TITLES}
    assert points_of(tmp_path / "work", handout) == wanted


def test_the_lab_needs_no_homework(tmp_path):
    """The plan's exercises in its order, each with those before it."""
    plan = lab_plan()
    assert plan == sorted(plan) and set(plan) == {1, 2, 3, 4, 5, 6}
    solve(tmp_path / "work", plan)
    found = points_of(tmp_path / "work", handout=True)
    assert [found[exercise] for exercise in plan] == [10] * len(plan)


def test_handout_readme_has_every_exercise():
    text = (EXERCISES / "handout.md").read_text(encoding="utf-8")
    for number, title in adapters.TITLES.items():
        assert f"| {number} | {title} |" in text


@pytest.mark.slow
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


@pytest.mark.parametrize("exercise", adapters.TITLES)
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
