"""Which functions an exercise grades, and how a student's folder is laid over the reference.

The one rule: in the tests of exercise K, the functions of exercise K come from the folder and
everything else from the reference, so a mistake costs its own exercise and no later one. A file of
the folder (bandit.py, ipo.py, ...) is run inside the reference module of its name, after the
reference: it may call whatever that module holds and need define only its exercises' functions.
What it does not define counts as not handed in. A file's other names are put back.
Left out: other layouts than the reference's file names; change this file for one.
Grading: exercises/grade.py.
"""

import ast
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POINTS = 10  # of every exercise

TITLES = {
    1: "preference matrix, win rate, antisymmetry",
    2: "the IPO loss and the pair identity",
    3: "regularised Nash equilibrium, duality gap",
    4: "the geometric mixture and its sampler",
    5: "Nash-MD-PG and the KL of whole responses",
    6: "IPO-MD",
    7: "online DPO is not a Nash solver",
    8: "six runs, six bugs",
}
EXERCISES = {
    1: {"bandit": ("cycle", "bradley_terry", "win_rate")},
    2: {"ipo": ("log_ratio_gap", "loss")},
    3: {"bandit": ("kl", "respond", "duality_gap", "fixed_point")},
    4: {"ipo_md": ("mixture",), "sampler": ("mix", "draw", "sample")},
    5: {"policy": ("token_log_probs", "log_prob"), "nash_md": ("PAIR", "loss")},
    6: {"ipo_md": ("PAIR", "loss"), "bandit": ("expected_loss",)},
    7: {"dpo": ("loss",), "bandit": ("dpo_point",)},
    8: {},
}
# In the order of their imports.
MODULES = ("policy", "ipo", "ipo_md", "nash_md", "sampler", "dpo", "bandit")
# A folder that grade.py --handout wrote: its reference has no solutions.
HANDOUT = (ROOT / "HANDOUT").exists()
# What is handed in besides code.
ANSWERS = {7: "predictions.json", 8: "diagnosis.json"}


def graded_in(module, exercises):
    """What these exercises grade in one module: name -> exercise."""
    found = {}
    for exercise in exercises:
        for name in EXERCISES[exercise].get(module, ()):
            found[name] = exercise
    return found


pristine = {}  # module name -> its names as the reference defines them
laid = {"folder": None}  # the folder that lies over the reference now


def not_handed_in(exercise, module, name):
    """A function that stands in for one that the folder does not define."""

    def missing(*_, **__):
        raise NotImplementedError(f"Exercise {exercise}: {module}.py does not define {name}")

    return missing


def lay(folder, exercise):
    """Puts the reference back, then lays the folder's functions of one exercise over it.

    folder:
        the student's, or None for the reference alone.
    exercise:
        1 to 8.
    """
    for name, content in pristine.items():
        vars(sys.modules[name]).clear()
        vars(sys.modules[name]).update(content)
    laid["folder"] = folder
    # A handout has no reference for the earlier exercises: there, all of the student's functions
    # are laid, whatever is graded.
    exercises = EXERCISES if HANDOUT else [exercise]
    for name in MODULES:
        graded = graded_in(name, exercises)
        if graded:
            lay_module(folder, exercise, name, graded)


def lay_module(folder, exercise, name, graded):
    """The part of lay in one module: graded are the names that come from the folder."""
    module = importlib.import_module(name)
    reference = pristine.setdefault(name, dict(vars(module)))
    if folder is None:
        return
    for item in graded:
        stand_in = None if item == "PAIR" else not_handed_in(exercise, name, item)
        setattr(module, item, stand_in)
    # In a handout even an import such as bandit's mixture is without its solution: the student's
    # own stays.
    kept = set(graded)
    if HANDOUT:
        for other in MODULES:
            kept.update(graded_in(other, EXERCISES))
    file = Path(folder) / f"{name}.py"
    try:
        if file.exists():
            exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(module))
    finally:
        for item, value in reference.items():
            if item not in kept:
                setattr(module, item, value)


def answers(exercise):
    """The answers handed in as JSON: a dictionary.

    Without a folder they are the reference's, which no handout contains.
    """
    folder = laid["folder"] or ROOT / "exercises" / "teacher" / "answers"
    file = Path(folder) / ANSWERS[exercise]
    if not file.exists():
        raise NotImplementedError(f"Exercise {exercise}: {file.name} is not there")
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"Exercise {exercise}: {file.name} must hold one JSON object")
    return found


def without_solutions(source, graded):
    """The source of a reference module, without what is graded.

    graded:
        name -> exercise.

    Bodies of graded functions become NotImplementedError, constants None, and imports of them are
    left out. Docstrings stay; worked_example, which shows some solutions in numbers, goes, too.
    """
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        first, replacement = edit(node, graded)
        if first is None:
            continue
        # Comments between a docstring and the first statement may tell the solution, too.
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        lines[first - 1 : node.end_lineno] = replacement
    return "\n".join(lines) + "\n"


def edit(node, graded):
    """(first line, what stands from there to the node's end), or (None, None) for what stays."""
    if isinstance(node, ast.FunctionDef) and node.name in {*graded, "worked_example"}:
        has_docstring = ast.get_docstring(node) is not None
        body = node.body[1:] if has_docstring else node.body
        message = f"Exercise {graded.get(node.name, '')}"
        return body[0].lineno, [f'    raise NotImplementedError("{message}")']
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in graded:
        return node.lineno, [f"{node.targets[0].id} = None"]
    if isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        kept = [name for name in names if name not in graded]
        if len(kept) < len(names):
            line = f"from {node.module} import {', '.join(kept)}"
            return node.lineno, [line] if kept else []
    return None, None
