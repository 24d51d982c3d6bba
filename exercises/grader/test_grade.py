"""The grading commands: a loop and a crash cost their exercise only, the handout holds no solution, the symptoms can be read."""

import ast
import csv
import json
import subprocess
import sys

import adapters
import make_symptoms
import pytest
import test_exercises

GRADE = adapters.ROOT / "exercises" / "grade.py"


def command(*arguments):
    return subprocess.run(
        [sys.executable, GRADE, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_a_loop_and_a_crash_cost_their_exercise(tmp_path):
    """Exercise 1 right, 2 loops for ever, 5 takes the process with it, 6 cannot be parsed, the rest is missing."""
    student = tmp_path / "all" / "someone"
    student.mkdir(parents=True)
    source = (adapters.ROOT / "bandit.py").read_text()
    wanted = [
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if getattr(node, "name", "") in adapters.EXERCISES[1]["bandit"]
    ]
    (student / "bandit.py").write_text("import torch\n\n\n" + "\n\n\n".join(wanted) + "\n")
    (student / "ipo.py").write_text(
        "def loss(*_):\n    while True:\n        pass\n\n\ndef log_ratio_gap(*_):\n    return loss()\n"
    )
    (student / "nash_md.py").write_text("import os\nos._exit(3)\n")
    (student / "ipo_md.py").write_text("def loss(:\n")
    done = command("--all", tmp_path / "all", "--table", tmp_path / "grades.csv", "--seconds", 15)
    row = next(csv.DictReader((tmp_path / "grades.csv").open()))
    assert (
        row["student"] == "someone" and row["total"] == row["ex1"] == "10" and row["of"] == "80"
    ), done.stdout + done.stderr
    assert (
        "ex2: stopped after 15 s" in row["notes"]
        and "ex5: ended without a report (exit code 3)" in row["notes"]
    )


def test_handout_has_no_solution(tmp_path):
    """Every graded function of the handout's reference raises, imports of them are gone, and the answers are not there."""
    done = command("--handout", tmp_path / "handout")
    assert done.returncode == 0, done.stderr
    for name in adapters.MODULES:
        tree = ast.parse((tmp_path / "handout" / f"{name}.py").read_text())
        graded = {item for modules in adapters.EXERCISES.values() for item in modules.get(name, ())}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in graded:
                assert isinstance(node.body[-1], ast.Raise) and len(node.body) == 2, (
                    f"{name}.{node.name}"
                )
            elif isinstance(node, ast.ImportFrom) and node.module in adapters.MODULES:
                assert not graded & {alias.name for alias in node.names}
    assert not list((tmp_path / "handout").rglob("answers")) and not list(
        (tmp_path / "handout").rglob("make_symptoms.py")
    )
    assert command("--handout", tmp_path / "handout").returncode == 2


@pytest.mark.parametrize("exercise", range(1, 8))
def test_only_the_graded_solutions_are_taken_out(exercise):
    for name, graded in adapters.EXERCISES[exercise].items():
        source = (adapters.ROOT / f"{name}.py").read_text()
        stripped = adapters.without_solutions(source, dict.fromkeys(graded, exercise))
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name != "worked_example":
                code = ast.get_source_segment(source, node)
                assert (code in stripped) == (node.name not in graded), f"{name}.{node.name}"


def read(run):
    """Column -> values of one run."""
    with open(
        adapters.ROOT / "exercises" / "symptoms" / f"run_{run}.csv", encoding="utf-8"
    ) as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


def diagnosis(run):
    """The reasoning the exercise asks for, as rules: from the columns to a name."""
    healthy, columns = read("healthy"), read(run)
    start, end, right = (
        {c: v[0] for c, v in columns.items()},
        {c: v[-1] for c, v in columns.items()},
        {c: v[-1] for c, v in healthy.items()},
    )
    if start["loss"] > 99:
        return "target is 1/tau"  # 1/(4 (tau/2)^2)
    if max(columns["mean |h|"]) < 1e-12 and end["KL to reference"] > 0.1:
        return "reference is the policy itself"  # it moves, and h does not see it
    if end["win rate against reference"] < 0.5:
        return "winner and loser swapped"
    if end["loss"] < right["loss"] - 2:
        return "sampling weights differentiated"  # no honest learner has so little loss: it draws pairs that are easy
    if (
        end["mean |h|"] < 0.7 * right["mean |h|"]
        and end["KL to reference"] > 1.5 * right["KL to reference"]
    ):
        return "mean over tokens instead of sum"  # a smaller h for a larger KL
    if (
        end["win rate against reference"] > right["win rate against reference"] + 0.03
        and end["duality gap"] > 0.03
    ):
        return "pairs from the reference"  # the best answer to the reference, not to itself
    return "none"


@pytest.mark.parametrize("run", "abcdef")
def test_symptoms_show_the_bug(run):
    """The committed logs lead to the key by rules that a student can find; the healthy run to none of them."""
    assert (
        diagnosis(run)
        == json.loads((adapters.ROOT / "tests" / "answers" / "diagnosis.json").read_text())[run]
    )
    assert diagnosis("healthy") == "none"


def test_symptoms_are_made_by_the_command(tmp_path):
    """A short run writes the same files as the committed ones, small, and the key without the names."""
    make_symptoms.main(["--steps", "20", "--out", str(tmp_path)])
    committed = adapters.ROOT / "exercises" / "symptoms"
    assert {file.name for file in tmp_path.iterdir()} == {
        file.name for file in committed.iterdir()
    } - {"README.md"}
    assert sum(file.stat().st_size for file in committed.iterdir()) < 1_000_000
    assert not any(name in (committed / "key.json").read_text() for name in test_exercises.NAMES)
    handout = (committed / "README.md").read_text()
    assert all(f"- `{name}`" in handout for name in test_exercises.NAMES)
