"""exercises/lab.ipynb: a valid notebook whose outputs are those of the project's code.

Executed without Jupyter (exercises/teacher/run_lab.py), in a clone and in a handout with the
reference as a student's work.
"""

import ast
import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bandit
import dpo
import ipo
import ipo_md
import nash_md
from exercises.grader import adapters
from exercises.teacher import run_lab

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads(run_lab.NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TREES = [ast.parse("".join(cell["source"])) for cell in CODE]


def texts(notebook):
    """What each code cell prints, with a word in the place of a figure."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            found.append((cell["id"], "".join(output.get("text", "figure"))))
    return found


def test_it_is_a_notebook():
    """The fields that nbformat 4.5 demands, nothing that a run leaves behind but its outputs."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) >= 20
    for cell in NOTEBOOK["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
        assert set(cell) == wanted and cell["metadata"] == {}, cell["id"]
        # A line ends with its newline, but for the last.
        assert all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]
        assert not cell["source"][-1].endswith("\n"), cell["id"]
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_its_outputs_are_there_and_small():
    kinds = [kind for _, kind in texts(NOTEBOOK)]
    assert kinds.count("figure") == 6 and len(kinds) > 12
    for cell in CODE[2:]:  # the first two import
        assert cell["outputs"], cell["id"]
        for output in cell["outputs"]:
            if output["output_type"] == "display_data":
                picture = base64.b64decode(output["data"]["image/png"])
                assert picture.startswith(b"\x89PNG") and len(picture) < 60_000
    assert run_lab.NOTEBOOK.stat().st_size < 300_000


def test_its_cells_show_by_print_and_figure_alone():
    """Jupyter would display the value of a last line, and the runner would not."""
    for cell, tree in zip(CODE, TREES, strict=True):
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            assert ast.unparse(last.value.func) in ("print", "show", "plt.show"), cell["id"]


def test_it_repeats_no_code_of_the_project():
    """Every prediction is asked before its run; no function of the project is written again."""
    project = [vars(module) for module in (bandit, dpo, ipo, ipo_md, nash_md)]
    roots = set()
    for tree in TREES:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert not any(node.name in names for names in project), node.name
            if isinstance(node, ast.Import):
                roots.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
    assert roots <= {"torch", "matplotlib", "exercises"} | sys.stdlib_module_names | {
        *("bandit", "dpo", "ipo", "ipo_md", "nash_md")
    }
    asked = [cell for cell in NOTEBOOK["cells"] if "**Predict.**" in "".join(cell["source"])]
    assert len(asked) == 8
    assert all("*Your prediction:*" in "".join(cell["source"]) for cell in asked)


def test_the_runner_keeps_text_and_figures_in_order(tmp_path):
    source = "import matplotlib.pyplot as plt\nprint('a')\nplt.plot([1])\nplt.show()\nprint(x + 1)"
    outputs = run_lab.run_cell(source, "cell", {"x": 1})
    assert [output["output_type"] for output in outputs] == ["stream", "display_data", "stream"]
    assert outputs[0]["text"] == ["a\n"] and outputs[2]["text"] == ["2\n"]
    file = tmp_path / "lab.ipynb"
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        run_lab.main(["--notebook", str(file)])


@pytest.mark.slow
def test_its_outputs_are_the_projects(tmp_path):
    """Run again, every cell prints what is committed; figures are compared by their number.

    From the file: the command writes it, and what it reads is what it wrote.
    """
    folder = tmp_path / "exercises"
    folder.mkdir()
    file = folder / "lab.ipynb"
    shutil.copy(run_lab.NOTEBOOK, file)
    bare = json.loads(file.read_text(encoding="utf-8"))
    for cell in bare["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    file.write_text(json.dumps(bare), encoding="utf-8")
    assert run_lab.main(["--notebook", str(file)]) == 0
    again = json.loads(file.read_text(encoding="utf-8"))
    assert texts(again) == texts(NOTEBOOK)
    assert [cell["source"] for cell in again["cells"]] == [c["source"] for c in NOTEBOOK["cells"]]


# Runs the notebook of a handout with the handout's files: run_lab.py alone is taken from here.
IN_A_HANDOUT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("run_lab", sys.argv[1])
run_lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_lab)
notebook = json.load(open("lab.ipynb", encoding="utf-8"))
run_lab.run(notebook, ".")
json.dump(notebook, open("run.ipynb", "w", encoding="utf-8"))
"""


def run_in_a_handout(handout):
    """Runs the handout's notebook in a process of its own."""
    command = [sys.executable, "-c", IN_A_HANDOUT, str(ROOT / "exercises/teacher/run_lab.py")]
    folder = handout / "exercises"
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_works_from_a_handout(tmp_path):
    """With stubs it names the exercise that is missing; with the work done it prints the same."""
    handout = tmp_path / "handout"
    command = [sys.executable, "exercises/grade.py", "--handout", str(handout)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    failed = run_in_a_handout(handout)
    assert failed.returncode and "NotImplementedError: Exercise 1" in failed.stderr
    for name in adapters.MODULES:
        shutil.copy(ROOT / f"{name}.py", handout / "work")
    done = run_in_a_handout(handout)
    assert done.returncode == 0, done.stderr
    again = json.loads((handout / "exercises" / "run.ipynb").read_text(encoding="utf-8"))
    assert texts(again) == texts(NOTEBOOK)
