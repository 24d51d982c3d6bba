"""Which functions are graded in which exercise, and how a student's folder is laid over the reference.

The one rule: in the tests of exercise K, the functions of exercise K come from the folder and everything else from the
reference, so a mistake costs its own exercise and no later one. A file of the folder (bandit.py, ipo.py, ...) is run
inside the reference module of its name, after the reference: it may call whatever that module holds and need define only
its exercises' functions. What it does not define counts as not handed in. A file's other names are put back.
Left out: other layouts than the reference's file names; change this file for one. Grading: exercises/grade.py.
"""

import ast
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
MODULES = (
    "policy",
    "ipo",
    "ipo_md",
    "nash_md",
    "sampler",
    "dpo",
    "bandit",
)  # in the order of their imports
HANDOUT = (
    ROOT / "HANDOUT"
).exists()  # a folder that grade.py --handout wrote: the reference has no solutions
ANSWERS = {7: "predictions.json", 8: "diagnosis.json"}  # what is handed in besides code

SOLUTIONS = {
    item for exercise in EXERCISES.values() for graded in exercise.values() for item in graded
}

pristine = {}  # module name -> its names as the reference defines them
place = {"folder": None}


def not_handed_in(exercise, module, name):
    """A function that stands in for one that the folder does not define."""

    def missing(*_, **__):
        raise NotImplementedError(f"Exercise {exercise}: {module}.py does not define {name}")

    return missing


def lay(folder, exercise):
    """Puts the reference back, then lays the folder's functions of one exercise over it; folder None: the reference alone."""
    for name, content in pristine.items():
        vars(sys.modules[name]).clear()
        vars(sys.modules[name]).update(content)
    place["folder"] = folder
    wanted = EXERCISES[exercise]
    if (
        HANDOUT
    ):  # no reference for the earlier exercises: all of the student's functions, whatever is graded
        wanted = {
            name: [item for graded in EXERCISES.values() for item in graded.get(name, ())]
            for name in MODULES
        }
    for name, graded in wanted.items():
        module = importlib.import_module(name)
        reference = pristine.setdefault(name, dict(vars(module)))
        if folder is None:
            continue
        for item in graded:
            setattr(module, item, None if item == "PAIR" else not_handed_in(exercise, name, item))
        file = Path(folder) / f"{name}.py"
        try:
            if file.exists():
                exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(module))
        finally:
            # In a handout even an import such as bandit's mixture is without its solution: the student's own stays.
            kept = SOLUTIONS if HANDOUT else graded
            vars(module).update(
                {item: value for item, value in reference.items() if item not in kept}
            )


def answers(exercise):
    """The answers handed in as JSON: a dictionary. Without a folder the reference's, which no handout contains."""
    file = Path(place["folder"] or ROOT / "tests" / "answers") / ANSWERS[exercise]
    if not file.exists():
        raise NotImplementedError(f"Exercise {exercise}: {file.name} is not there")
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"Exercise {exercise}: {file.name} must hold one JSON object")
    return found


def without_solutions(source, graded):
    """Source with the graded functions' bodies replaced by NotImplementedError, constants by None, imports of them left out.

    graded: name -> exercise. Docstrings stay; worked_example, which shows some solutions in numbers, goes too.
    """
    lines, edits = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (
            node.name in graded or node.name == "worked_example"
        ):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring else node.body
            edits.append(
                (
                    body[0].lineno,
                    node.end_lineno,
                    [f'    raise NotImplementedError("Exercise {graded.get(node.name, "")}")'],
                )
            )
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in graded:
            edits.append((node.lineno, node.end_lineno, [f"{node.targets[0].id} = None"]))
        elif isinstance(node, ast.ImportFrom) and any(alias.name in graded for alias in node.names):
            kept = [alias.name for alias in node.names if alias.name not in graded]
            edits.append(
                (
                    node.lineno,
                    node.end_lineno,
                    [f"from {node.module} import {', '.join(kept)}"] if kept else [],
                )
            )
    for first, last, replacement in reversed(edits):
        # Comments between a docstring and the first statement may tell the solution, too.
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        lines[first - 1 : last] = replacement
    return "\n".join(lines) + "\n"
