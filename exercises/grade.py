"""Grades a student's folder, or a folder of such folders, on exercises 1 to 8.

Every exercise runs in a process of its own with a time limit, in a temporary folder that holds the
tests, the student's files, and the reference without the functions that the exercise grades: an
endless loop or a crash costs its exercise.
What this does not defend against is in exercises/README.md: the student's code runs as you, on your
machine.
Run: python exercises/grade.py DIR [--report FILE]
     python exercises/grade.py --all FOLDER --table grades.csv
     python exercises/grade.py --handout DIR      the reference without any solution, the stubs,
                                                  tests and symptoms
"""

import argparse
import concurrent.futures
import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from grader import adapters

HERE = Path(__file__).resolve().parent
REFERENCE = (
    "bandit",
    "ipo",
    "ipo_md",
    "nash_md",
    "dpo",
    "slic",
    "rl",
    "policy",
    "side_by_side",
    "sampler",
    "enumerated",
)
GRADER = ("conftest.py", "options.py", "adapters.py", "mistakes.py", "test_exercises.py")
# What a student hands in.
FILES = sorted({f"{name}.py" for name in adapters.MODULES} | set(adapters.ANSWERS.values()))


def assemble(target, exercises):
    """Fills the folder target with the tests and the reference without the exercises' solutions."""
    grader = target / "exercises" / "grader"
    grader.mkdir(parents=True)
    for name in GRADER:
        shutil.copy(HERE / "grader" / name, grader)
    shutil.copytree(HERE / "symptoms", target / "exercises" / "symptoms")
    shutil.copy(adapters.ROOT / "pyproject.toml", target)
    for name in REFERENCE:
        source = (adapters.ROOT / f"{name}.py").read_text(encoding="utf-8")
        graded = adapters.graded_in(name, exercises)
        if graded:
            source = adapters.without_solutions(source, graded)
        (target / f"{name}.py").write_text(source, encoding="utf-8")


def work(target, exercise):
    """In the child: runs pytest on one exercise.

    Its output goes to a file of target, its points to report.json.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # so that what the student's code starts is stopped with it
    os.chdir(target)
    # The project's own folders go from the path: there is the reference with its solutions.
    hidden = (HERE, HERE.parent)
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in hidden]
    with open("output.txt", "w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    options = ["-q", "-m", f"ex{exercise}", "--impl", "student", "--report", "report.json"]
    options += ["-p", "no:cacheprovider", "--rootdir", "."]
    pytest.main([*options, "exercises/grader/test_exercises.py"])


def stop(process):
    """Ends the process, and on Unix everything that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def grade_exercise(folder, exercise, seconds, context):
    """{points, of, seconds, note, tests} of one exercise of one folder."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        target = Path(temporary).resolve() / "work"
        assemble(target, [exercise])
        (target / "student").mkdir()
        for name in FILES:
            file = folder / name
            if file.is_file() and not file.is_symlink():
                shutil.copy(file, target / "student")
        process = context.Process(target=work, args=(str(target), exercise))
        process.start()
        process.join(seconds)
        late = process.is_alive()
        stop(process)
        result = dict(points=0, of=adapters.POINTS, note="", tests=[])
        try:
            report = json.loads((target / "report.json").read_text(encoding="utf-8"))
            points = report["exercises"][str(exercise)]["points"]
            result.update(points=points, tests=report["tests"])
        except (OSError, ValueError, KeyError):
            result["note"] = f"ended without a report (exit code {process.exitcode})"
            if late:
                result["note"] = f"stopped after {seconds:g} s"
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def grade(folder, seconds, jobs, context):
    """Exercise -> result of one folder, jobs exercises at a time."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {
            number: pool.submit(grade_exercise, folder, number, seconds, context)
            for number in adapters.TITLES
        }
        return {number: future.result() for number, future in futures.items()}


def print_result(results):
    """What a student reads: each lost test with its message, then the table."""
    for number, result in results.items():
        for test in result["tests"]:
            if test["message"]:
                score = f"{test['points']} of {test['of']}"
                print(f"Exercise {number}, {test['test']}: {score}\n{test['message']}\n")
    print("exercise                                          points  seconds")
    for number, result in results.items():
        score = f"{result['points']:3} of {result['of']}{result['seconds']:7}"
        print(f"{number}  {adapters.TITLES[number]:<46}{score}  {result['note']}")
    points = sum(result["points"] for result in results.values())
    of = sum(result["of"] for result in results.values())
    print(f"   {'total':<46}{points:3} of {of}")


def grade_all(folder, table, seconds, jobs, context):
    """Grades every subfolder and writes a row for each as soon as it is there."""
    students = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            students.append(entry)
    exercises = [f"ex{number}" for number in adapters.TITLES]
    of = adapters.POINTS * len(exercises)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", *exercises, "total", "of", "notes"])
        for student in students:
            results = grade(student, seconds, jobs, context)
            points = [result["points"] for result in results.values()]
            notes = []
            for number, result in results.items():
                if result["note"]:
                    notes.append(f"ex{number}: {result['note']}")
            notes = "; ".join(notes)
            writer.writerow([student.name, *points, sum(points), of, notes])
            file.flush()
            print(f"{student.name}: {sum(points)} of {of} {notes}", flush=True)
    print(f"{len(students)} submissions: {table}")


def hand_out(target):
    """Writes what students get: the stubs in work/ to fill in, and the reference without solutions.

    No answers, and no list of where they are.
    """
    assemble(target, list(adapters.EXERCISES))
    note = "Every exercise is laid over the reference at once here"
    text = f"{note}: see exercises/grader/adapters.py.\n"
    (target / "HANDOUT").write_text(text, encoding="utf-8")
    (target / "work").mkdir()
    for name in FILES:
        shutil.copy(HERE / "work" / name, target / "work")


def parser():
    """The command's options."""
    options = argparse.ArgumentParser(description="Grades exercises 1 to 8.")
    add = options.add_argument
    files = "one student's folder: files with the reference's names"
    add("folder", nargs="?", type=Path, help=files)
    add("--report", type=Path, metavar="FILE", help="write the result as JSON")
    add("--all", type=Path, metavar="FOLDER", help="grade every subfolder instead")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        default=Path("grades.csv"),
        help="where --all writes (default grades.csv)",
    )
    add("--seconds", type=float, default=30.0, help="time limit of an exercise (default 30)")
    add("--jobs", type=int, default=2, help="exercises graded at a time (default 2)")
    add(
        "--handout",
        type=Path,
        metavar="DIR",
        help="write the students' folder instead; DIR must not exist",
    )
    return options


def processes():
    """How an exercise's process is started.

    Where it can be, a process that has imported torch once is copied for every exercise; elsewhere
    each starts anew, some seconds slower.
    """
    # Inherited by every process.
    os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "transformers.models.gpt2.modeling_gpt2"])
    return context


def main(argv=None):
    command = parser()
    options = command.parse_args(argv)
    if options.handout:
        if options.handout.exists():
            command.error(f"--handout {options.handout}: exists already")
        hand_out(options.handout)
        return 0
    folder = options.all or options.folder
    if folder is None:
        command.error("give a student's folder, or --all FOLDER")
    if not folder.is_dir():
        command.error(f"{folder}: no such folder")
    context = processes()
    if options.all:
        grade_all(folder, options.table, options.seconds, options.jobs, context)
        return 0
    results = grade(folder, options.seconds, options.jobs, context)
    if options.report:
        options.report.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_result(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
