"""Grades a student's folder, or a folder of such folders, on exercises 1 to 8.

Every exercise runs in a process of its own with a limit on its processor time, in a temporary
folder that holds the tests, the student's files, and the reference without the functions that the
exercise grades: an endless loop or a crash costs its exercise. --all keeps a report a student and
goes on where it was stopped.
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
import hashlib
import importlib
import json
import math
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
    *("files", "stopping"),
)
GRADER = (
    "conftest.py",
    "options.py",
    "adapters.py",
    "checks.py",
    "wrong_values.json",
    "test_exercises.py",
)
# What a student hands in.
FILES = sorted({f"{name}.py" for name in adapters.MODULES} | set(adapters.ANSWERS.values()))
# What exercises/grader/run.py trains with: none of it is a solution.
TRAINER = ("train", "data", "summaries", "records", "preference_model", "evaluate", "equilibrium")
# Of a handout and of the folders that are graded: no test of the project's own is there.
SETTINGS = """[tool.pytest.ini_options]
testpaths = ["exercises/grader"]
pythonpath = ["."]
# importlib: no collected file's folder goes on the path, where a stub would shadow the real ipo.py.
addopts = "--import-mode=importlib -p exercises.grader.options{more}"
"""


def assemble(target, exercises, more=""):
    """Fills the folder target with the tests and the reference without the exercises' solutions.

    more:
        for pytest's command line.
    """
    grader = target / "exercises" / "grader"
    grader.mkdir(parents=True)
    for name in GRADER:
        shutil.copy(HERE / "grader" / name, grader)
    shutil.copytree(HERE / "symptoms", target / "exercises" / "symptoms")
    (target / "pyproject.toml").write_text(SETTINGS.format(more=more), encoding="utf-8")
    for name in REFERENCE:
        source = (adapters.ROOT / f"{name}.py").read_text(encoding="utf-8")
        graded = adapters.graded_in(name, exercises)
        if graded:
            source = adapters.without_solutions(source, graded)
        (target / f"{name}.py").write_text(source, encoding="utf-8")


def limit_processor_time(seconds):
    """Has the system end this process after so many seconds of its own from now on.

    Only the clock on the wall is left where there is no such limit.
    """
    try:
        import resource
    except ImportError:
        return
    most = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))


def work(target, exercise, seconds, course):
    """In the child: runs pytest on one exercise.

    Its output goes to a file of target, its points to report.json.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # so that what the student's code starts is stopped with it
    os.chdir(target)
    # The project's own folders go from the path: there is the reference with its solutions.
    hidden = (HERE, HERE.parent)
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() not in hidden]
    sys.path.insert(0, target)
    with open("output.txt", "w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    for name in adapters.HOLDERS:
        importlib.import_module(name)
    limit_processor_time(seconds)  # imports are no student's doing
    options = ["-q", "-m", f"ex{exercise}", "--impl", "student", "--report", "report.json"]
    options += ["-p", "no:cacheprovider", "--rootdir", ".", "--course", str(course)]
    pytest.main([*options, "exercises/grader/test_exercises.py"])


def stop(process):
    """Ends the process, and on Unix everything that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def why_no_report(process, late, seconds):
    """In words, for an exercise whose process left no points."""
    if late:
        return f"stopped after {wall(seconds):g} s on the clock"
    if hasattr(signal, "SIGXCPU") and process.exitcode == -signal.SIGXCPU:
        return f"stopped after {seconds:g} s of processor time"
    return f"ended without a report (exit code {process.exitcode})"


def wall(seconds):
    """The limit on the clock, s: for what waits instead of computing, on a machine that is busy."""
    return 60 + 4 * seconds


def grade_exercise(folder, exercise, options, context):
    """{points, of, seconds, note, tests, problems} of one exercise of one folder."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        target = Path(temporary).resolve() / "work"
        assemble(target, [exercise])
        (target / "student").mkdir()
        for file in handed_in(folder):
            shutil.copy(file, target / "student")
        arguments = str(target), exercise, options.seconds, options.course
        process = context.Process(target=work, args=arguments)
        process.start()
        process.join(wall(options.seconds))
        late = process.is_alive()
        stop(process)
        result = dict(points=0, of=adapters.POINTS, note="", tests=[], problems=[])
        try:
            report = json.loads((target / "report.json").read_text(encoding="utf-8"))
            points = report["exercises"][str(exercise)]["points"]
            result.update(points=points, tests=report["tests"], problems=report["problems"])
        except (OSError, ValueError, KeyError):
            result["note"] = why_no_report(process, late, options.seconds)
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def handed_in(folder):
    """The files of a student's folder that are graded."""
    files = [folder / name for name in FILES]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def grade(folder, options, context):
    """Exercise, as text -> result of one folder, options.jobs exercises at a time."""
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            str(number): pool.submit(grade_exercise, folder, number, options, context)
            for number in adapters.TITLES
        }
        return {number: future.result() for number, future in futures.items()}


def print_result(results):
    """What a student reads: each lost test with its message, then the table."""
    for problem in sorted({text for result in results.values() for text in result["problems"]}):
        print(f"left out, and nothing else: {problem}\n")
    for number, result in results.items():
        for test in result["tests"]:
            if test["message"]:
                score = f"{test['points']} of {test['of']}"
                print(f"Exercise {number}, {test['test']}: {score}\n{test['message']}\n")
    print("exercise                                          points  seconds")
    for number, result in results.items():
        score = f"{result['points']:3} of {result['of']}{result['seconds']:7}"
        print(f"{number}  {adapters.TITLES[int(number)]:<46}{score}  {result['note']}")
    points, of = total(results)
    print(f"   {'total':<46}{points:3} of {of}")


def total(results):
    """(points, of) of a folder's results."""
    points = [result["points"] for result in results.values()]
    return sum(points), sum(result["of"] for result in results.values())


def why(results):
    """Where points were lost, in one line: the exercise, the test, its message's first line."""
    reasons = []
    for number, result in results.items():
        if result["note"]:
            reasons.append(f"ex{number}: {result['note']}")
        for test in result["tests"]:
            if test["message"]:
                line = test["message"].splitlines()[0]
                line = line if len(line) <= 120 else f"{line[:117]}..."
                reasons.append(f"ex{number} {test['test']} -{test['of'] - test['points']}: {line}")
    return "; ".join(reasons)


def fingerprint(folder, options):
    """What a report depends on: what was handed in, the course, the limit, the tests."""
    digest = hashlib.sha256(f"{options.course} {options.seconds}".encode())
    for file in [*handed_in(folder), *(HERE / "grader" / name for name in GRADER)]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def earlier_report(file, mark):
    """A report that is there already and is of the same files, or None."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return report if report["fingerprint"] == mark else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_whole(file, text):
    """Writes a file in one step: a reader, or a run that goes on, never finds half of it."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, file)


def table_of(rows):
    """The table as text, a line for each student."""
    from io import StringIO

    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    exercises = [f"ex{number}" for number in adapters.TITLES]
    writer.writerow(["student", *exercises, "total", "of", "why"])
    for student, results in rows.items():
        points = [result["points"] for result in results.values()]
        writer.writerow([student, *points, *total(results), why(results)])
    return text.getvalue()


def grade_all(options, context):
    """Grades every subfolder: a report for each, kept as soon as it is there, and the table.

    A subfolder whose report is there and of the same files is not graded again.
    """
    reports = options.table.with_suffix("")
    reports.mkdir(parents=True, exist_ok=True)
    students, rows = [], {}
    for entry in sorted(options.all.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            students.append(entry)
    for student in students:
        file, mark = reports / f"{student.name}.json", fingerprint(student, options)
        report = earlier_report(file, mark)
        known = "" if report is None else " (graded before)"
        if report is None:
            exercises = grade(student, options, context)
            report = dict(student=student.name, fingerprint=mark, course=options.course)
            report.update(points=total(exercises)[0], exercises=exercises)
            write_whole(file, json.dumps(report, indent=1))
        rows[student.name] = report["exercises"]
        write_whole(options.table, table_of(rows))
        points, of = total(report["exercises"])
        print(f"{student.name}: {points} of {of}{known}", flush=True)
    print(f"{len(students)} submissions: {options.table}, reports in {reports}")


def hand_out(target):
    """Writes what students get: the stubs in work/ to fill in, and the reference without solutions.

    No answers, and no list of where they are.
    """
    assemble(target, list(adapters.EXERCISES), more=" --impl work")
    note = "Every exercise is laid over the reference at once here"
    text = f"{note}: see exercises/grader/adapters.py.\n"
    (target / "HANDOUT").write_text(text, encoding="utf-8")
    shutil.copy(HERE / "handout.md", target / "README.md")
    for name in TRAINER:
        shutil.copy(adapters.ROOT / f"{name}.py", target)
    shutil.copytree(adapters.ROOT / "job", target / "job", ignore=shutil.ignore_patterns("__*__"))
    shutil.copy(adapters.ROOT / "job" / "__init__.py", target / "job")
    shutil.copy(HERE / "grader" / "run.py", target / "exercises" / "grader")
    shutil.copy(HERE / "lab.ipynb", target / "exercises")
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
        help="where --all writes (default grades.csv; a report a student in a folder grades)",
    )
    add("--seconds", type=float, default=30.0, help="processor time of an exercise (default 30)")
    add("--jobs", type=int, default=2, help="exercises graded at a time (default 2)")
    add(
        "--course",
        type=int,
        metavar="N",
        default=1,
        help="a number of your own decides inputs that no handout shows (default 1; handouts: 0)",
    )
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
        grade_all(options, context)
        return 0
    results = grade(folder, options, context)
    if options.report:
        options.report.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_result(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
