"""What is for the teacher, and the last exercise: they hold together, and the commands run."""

import re
import subprocess
import sys

import pytest

from exercises.grader import adapters, run
from exercises.grader.test_grade import command, solve
from exercises.teacher.gradescope.results import results

TEACHER = adapters.ROOT / "exercises" / "teacher"


def test_gradescope_reads_a_report():
    """Every test, with what the student reads; an exercise that was stopped, with its note."""
    passed = dict(test="test_gap", of=2, points=2, message="")
    lost = dict(test="test_ipo_loss", of=2, points=0, message="eq 11: exactly 2 times")
    report = {
        "2": dict(points=2, of=10, note="", tests=[passed, lost]),
        "3": dict(points=0, of=10, note="stopped after 30 s", tests=[]),
    }
    found = results(report)
    assert found["score"] == 2
    wanted = [(2, 2, "passed"), (0, 2, "eq 11: exactly 2 times"), (0, 10, "stopped after 30 s")]
    assert [(test["score"], test["max_score"], test["output"]) for test in found["tests"]] == wanted
    assert found["tests"][2]["name"] == "Exercise 3"


def test_scripts_are_well_formed():
    for name in ("make_zip.sh", "setup.sh", "run_autograder"):
        subprocess.run(["bash", "-n", TEACHER / "gradescope" / name], check=True)


def test_classroom_grades_every_exercise():
    text = (TEACHER / "classroom" / "classroom.yml").read_text(encoding="utf-8")
    for number in adapters.TITLES:
        assert f"pytest -q -m ex{number}\n" in text and f"EX{number}_RESULTS: " in text
    assert text.count("max-score: 10\n") == len(adapters.TITLES)


def test_two_answers_for_each_exercise():
    text = (TEACHER / "written.md").read_text(encoding="utf-8")
    parts = re.split(r"\n## (\d)\. ", text)[1:]
    assert list(map(int, parts[::2])) == list(adapters.TITLES)
    for answers in parts[1::2]:
        assert re.findall(r"\n\*\*\((\d)\)", answers) == ["1", "2"]


def test_the_slides_figures_are_there():
    text = (TEACHER / "slides.md").read_text(encoding="utf-8")
    files = re.findall(r"`((?:results|exercises)/[\w/.]+)`", text)
    assert len(files) >= 4 and all((adapters.ROOT / file).exists() for file in files)
    assert [int(number) for number in re.findall(r"\n\| (\d+) \|", text)] == list(range(1, 23))


SUMMARY = dict(win_rate=0.85, kl=8.0, unfinished=0.0, length=9.0, length_other=10.0, distinct=0.9)


@pytest.mark.parametrize(
    "change, missed",
    [({}, 0), (dict(win_rate=0.2), 1), (dict(kl=15.0), 1), (dict(length=20.0, distinct=0.1), 2)],
)
def test_gates_of_the_last_exercise(change, missed, capsys):
    assert run.judge(SUMMARY | change) == missed
    assert capsys.readouterr().out.count("MISSED") == missed


SHORT = "--steps 2 --supervised-steps 3 --preference-steps 3 --eval-prompts 8 --batch-size 4"


@pytest.mark.slow
def test_the_last_exercise_trains_with_the_students_functions(tmp_path):
    """In a handout, where there is no reference: two steps run; with a broken loss they do not."""
    handout = tmp_path / "handout"
    assert command("--handout", handout).returncode == 0
    solve(handout / "work", adapters.TITLES)

    def train():
        arguments = [sys.executable, "exercises/grader/run.py", "work", *SHORT.split()]
        return subprocess.run(arguments, cwd=handout, capture_output=True, text=True, timeout=300)

    done = train()
    assert "win rate against the start" in done.stdout, done.stdout + done.stderr
    ipo_md = handout / "work" / "ipo_md.py"
    ipo_md.write_text(ipo_md.read_text().replace("from ipo import", "from ipo import nothing,"))
    done = train()
    assert done.returncode != 0
    assert "left out, and nothing else: ipo_md.py, line" in done.stdout
    assert "Exercise 4: ipo_md.py does not define loss" in done.stdout + done.stderr
