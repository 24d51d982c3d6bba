"""The limits that keep the tree readable: width, length of functions, nesting, and which room may
import which.

They are limits on formatted code (ruff, pyproject.toml): a line that says too much is not mended by
breaking it.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("losses", "job", "studies", "exercises", "tests")
METHODS = ("ipo", "ipo_md", "nash_md", "dpo", "slic", "rl")
# They bring their own function in place of one of the trainer's, not a loss alone: a value network
# and clipped steps, rejection sampling, a merge of two policies.
PROCEDURES = ("ppo", "rso", "paft")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def python_files():
    """Every file of the project, by its path from the root: {"job/run.py": Path}."""
    paths = list(ROOT.glob("*.py"))
    for room in ROOMS:
        paths += (ROOT / room).rglob("*.py")
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(paths)}


FILES = python_files()
CODE = [name for name in FILES if not name.startswith(("tests/", "exercises/"))]


def parse(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def room_of(name):
    return name.split("/")[0] if "/" in name else "top"


def modules():
    """Module name -> file, for every module that a file of the project may import."""
    found = {}
    for name in FILES:
        dotted = name.removesuffix(".py").replace("/", ".")
        found[dotted.removesuffix(".__init__")] = name
    return found


def imported(name):
    """The module names that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def arrows():
    """File -> the files of the project that it imports."""
    known, found = modules(), {}
    for name in FILES:
        found[name] = {known[module] for module in imported(name) if module in known} - {name}
    return found


def others(name):
    """The packages outside the project and Python's own library that a file imports."""
    known = modules()
    found = {module.split(".")[0] for module in imported(name) if module not in known}
    return found - set(sys.stdlib_module_names) - {module.split(".")[0] for module in known}


def test_no_line_is_wider_than_100():
    wide = []
    for name, path in FILES.items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                wide.append(f"{name}:{number}")
    assert len(FILES) > 40 and not wide


def test_no_function_is_longer_than_60_lines():
    long = []
    for name in FILES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{name}:{node.name}")
    assert not long


def depth(node):
    """How many comprehensions are inside one another at most, below a node."""
    below = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return below + isinstance(node, COMPREHENSIONS)


def crowded(tree):
    """Lines with nested comprehensions, lambdas in loops, conditional expressions as statements."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and depth(node) > 1:
            found.append(node.lineno)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp):
            found.append(node.lineno)
        if isinstance(node, (ast.For, ast.While)):
            found += [child.lineno for child in ast.walk(node) if isinstance(child, ast.Lambda)]
    return found


def test_no_line_does_several_things():
    found = []
    for name in CODE:
        found += [f"{name}:{line}" for line in crowded(parse(name))]
    assert not found


def test_crowded_lines_are_found():
    """The finder finds each of its three kinds, and leaves a single comprehension alone."""
    assert not crowded(ast.parse("x = [a for a in b]"))
    assert crowded(ast.parse("x = [[a for a in b] for b in c]")) == [1]
    assert crowded(ast.parse("f() if x else g()")) == [1]
    assert crowded(ast.parse("for a in b:\n    c(lambda: a)")) == [2]


def test_imports_form_no_circle():
    """Nor through a third file, nor by an import inside a function."""
    graph = arrows()

    def reach(name, seen):
        for other in graph[name] - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    circles = [name for name in graph if name in reach(name, set())]
    assert not circles


def test_arrows_go_down():
    """studies, exercises -> train, evaluate -> job, losses -> the paper's files.

    Nothing imports a study.
    """
    wrong = []
    for name, targets in arrows().items():
        for target in targets:
            here, there = room_of(name), room_of(target)
            allowed = {"top", here}
            if name in ("train.py", "evaluate.py"):
                allowed.add("job")
            if here in ("studies", "exercises", "tests"):
                allowed |= {"job", "losses"}
            if here == "tests":
                allowed |= {"studies", "exercises"}
            if there not in allowed or here in ("losses", "job") and target == "train.py":
                wrong.append(f"{name} -> {target}")
    assert not wrong


@pytest.mark.parametrize("name", [*METHODS, "bandit"])
def test_a_method_and_the_lab_stand_alone(name):
    """They import torch, numpy and one another.

    Pictures are drawn by matplotlib, imported where they are.
    """
    losses = {f"{method}.py" for method in METHODS}
    # The lab is a command, too: Ctrl-C in it is one line.
    assert arrows()[f"{name}.py"] <= losses | ({"stopping.py"} if name == "bandit" else set())
    allowed = {"torch", "numpy", "matplotlib"} if name == "bandit" else {"torch"}
    assert others(f"{name}.py") <= allowed


def test_every_loss_is_a_short_file():
    """At most 80 lines without the worked example, but for the procedures.

    Losses/ imports torch and the paper's losses only.
    """
    room = [name for name in FILES if name.startswith("losses/")]
    procedures = [f"losses/{name}.py" for name in PROCEDURES]
    for name in [f"{method}.py" for method in METHODS] + room:
        source = FILES[name].read_text(encoding="utf-8")
        short = source.split("\ndef worked_example")[0].count("\n") <= 80
        assert short or name in procedures, name
        assert others(name) <= {"torch"}, name


def test_heavy_packages_are_imported_where_they_are_used():
    """datasets and matplotlib only inside functions: the main job needs neither to begin."""
    for name in CODE:
        for node in parse(name).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"datasets", "matplotlib"} & set(ast.unparse(node).split()), name


def test_train_is_the_algorithm():
    """At most 240 lines, and the step follows its loop within 80 lines."""
    lines = FILES["train.py"].read_text(encoding="utf-8").splitlines()
    loop = next(number for number, line in enumerate(lines) if line.lstrip().startswith("for step"))
    step = next(number for number, line in enumerate(lines) if "optimizer.step()" in line)
    assert len(lines) <= 240 and 0 < step - loop <= 80


def test_tests_hold_tests_only():
    """No command and no change of the import path."""
    for name in FILES:
        if name.startswith("tests/"):
            source = FILES[name].read_text(encoding="utf-8")
            for word in ("__" + "main__", "sys." + "path"):
                assert word not in source, name
