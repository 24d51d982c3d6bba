"""README.md.

What it names exists, and its quick commands run. Renaming a function that the map names fails here.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    """The text from a heading to the next."""
    return TEXT.split(f"## {title}", 1)[1].split("\n## ", 1)[0]


def rows(title):
    """The cells of a section's table, without its head."""
    return [
        line.strip("| ").split(" | ")
        for line in section(title).splitlines()
        if line.startswith("|")
    ][2:]


def defined(path):
    """Functions, methods' classes and top-level names of a file."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    }


def test_every_file_function_and_test_it_names_exists():
    named = re.findall(r"`((?:\w+/)*\w+\.py)::?(\w+)`", TEXT)
    assert len(named) > 25, "the pattern must find the references, or the test is empty"
    assert not [
        f"{path}:{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in defined(path)
    ]
    files = re.findall(r"`(?:python )?((?:\w+/)*\w+\.py)[` ]", TEXT) + re.findall(
        r"\]\(([\w/]+\.\w+)\)", TEXT
    )
    assert not [path for path in files if not (ROOT / path).is_file()]


def test_the_map_names_code_and_proof_in_every_row():
    for paper, code, proof, figure in rows("The map"):
        assert ".py:" in code and (".py" in proof or "python" in proof) and figure, paper


def test_notation_occurs_in_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    for symbol, here, *_ in rows("Notation"):
        for name in re.findall(r"`(\w+)`", here):
            assert re.search(rf"\b{name}\b", code), f"{name}, for {symbol}"


NUMBERS = (
    *("loss", "grad_norm", "log_ratio", "label", "same", "length"),
    *("win_rate", "win_rate_se", "kl", "length_other", "unfinished", "distinct"),
)


def test_metrics_are_the_ones_that_a_run_writes():
    """Every number of metrics.jsonl and of measure() has its row under Reading the output."""
    cells = "".join(row[0] for row in rows("Reading the output"))
    explained = set(re.findall(r"`(\w+)`", cells))
    source = "".join(
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("train.py", "evaluate.py", "job/report.py")
    )
    for name in NUMBERS:
        assert re.search(rf"\b{name}=", source) and name in explained, name


def test_ci_runs_the_second_command():
    commands = [line for line in TEXT.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and "train.py --loss ipo_md" in commands[0]
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


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
