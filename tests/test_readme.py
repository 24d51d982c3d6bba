"""README.md and the pages of docs/.

What they name exists, their commands are understood, and the quick ones run. Renaming a function or
an option that a page names fails here. docs/map.md has a file of its own (test_map.py).
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_map import anchors, defined

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
ALL = "\n".join(TEXTS.values())


def rows(name, title):
    """The cells of a section's tables, without their heads."""
    text = TEXTS[ROOT / name].split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [list(map(str.strip, line.strip().strip("|").split(" | "))) for line in lines][2:]


def commands():
    """The commands of the pages as (program, words after it); a program: FILE.py or -m MODULE."""
    found = set()
    pattern = r"(?:python |torchrun [^`\n]*?)((?:-m [\w.]+)|(?:[\w/]+\.py))([^`\n|]*)"
    for program, rest in re.findall(pattern, re.sub(r"(`[^`\n]*)\n([^`\n]*`)", r"\1 \2", ALL)):
        found.add((program, rest.split("#")[0].strip()))
    return sorted(found)


def test_readme_is_read_in_one_sitting():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 200


def test_line_counts_are_about_right():
    """The column of the reading order, within a tenth: it says what one is in for."""
    counted = 0
    for files, lines, _ in rows("README.md", "The files, in reading order"):
        paths = []
        for name in re.findall(r"`([\w/]+\.py)`", files):
            paths.append(ROOT / name)
        for room in re.findall(r"`(\w+/)`|\[(\w+/)\]", files):
            paths += (ROOT / "".join(room)).glob("*.py")
        if not lines:
            continue
        true = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        assert abs(int(lines) - true) <= 0.1 * true, (files, true)
        counted += len(paths)
    assert counted > 80


def test_every_file_function_and_test_it_names_exists():
    named = re.findall(r"`((?:\w+/)*\w+\.py)::?(\w+)`", ALL)
    assert len(named) > 25, "the pattern must find the references, or the test is empty"
    assert not [
        f"{path}:{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in defined(path)
    ]
    files = re.findall(r"`(?:python )?((?:\w+/)*\w+\.py)[` ]", ALL)
    assert not [path for path in files if not (ROOT / path).is_file()]


def test_every_link_leads_somewhere():
    followed = 0
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            there = (page.parent / name).resolve() if name else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                known = anchors(there.read_text(encoding="utf-8"))
                assert anchor in known, f"{page.name}: {target}"
            followed += 1
    assert followed > 50


def test_notation_occurs_in_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for symbol, here, *_ in rows("docs/differences.md", "Notation"):
        for name in re.findall(r"`(\w+)`", here):
            assert re.search(rf"\b{name}\b", code), f"{name}, for {symbol}"


NUMBERS = (
    *("loss", "grad_norm", "log_ratio", "label", "same", "length"),
    *("win_rate", "win_rate_se", "kl", "length_other", "unfinished", "distinct"),
)


def test_metrics_are_the_ones_that_a_run_writes():
    """Every number of metrics.jsonl and of measure() has its row in docs/metrics.md."""
    cells = "".join(row[0] for row in rows("docs/metrics.md", "The numbers"))
    explained = set(re.findall(r"`(\w+)`", cells))
    source = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("train.py", "evaluate.py", "job/report.py")
    )
    for name in NUMBERS:
        assert re.search(rf"\b{name}=", source) and name in explained, name


def test_ci_runs_the_second_command():
    text = TEXTS[ROOT / "README.md"]
    setups = [line for line in text.splitlines() if line.startswith("python3 -m venv")]
    assert len(setups) == 2 and "train.py --loss ipo_md" in setups[0]
    assert setups[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_command_names_a_program():
    programs = {program for program, _ in commands()}
    assert len(programs) > 30
    for program in programs - {"-m pytest", "-m venv"}:
        path = (
            program.removeprefix("-m ").replace(".", "/") if program.startswith("-m") else program
        )
        assert (ROOT / path).is_file() or (ROOT / f"{path}.py").is_file(), program


@pytest.mark.slow
def test_every_option_of_a_command_is_known_to_it():
    """--help of each program lists each option that a page gives it."""
    wanted = {}
    for program, rest in commands():
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
        if options and program != "-m pytest":
            wanted.setdefault(program, set()).update(options)
    assert len(wanted) > 8
    for program, options in wanted.items():
        command = [sys.executable, *program.split(), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))
        assert done.returncode == 0 and options <= known, (program, options - known)


@pytest.mark.parametrize(
    "name",
    [
        "ipo",
        "ipo_md",
        "nash_md",
        "dpo",
        "slic",
        "rl",
        "policy",
        "summaries",
        pytest.param("sampler", marks=pytest.mark.slow),
        pytest.param("enumerated", marks=pytest.mark.slow),
    ],
)
def test_worked_example_runs(name):
    done = subprocess.run(
        [sys.executable, f"{name}.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr
