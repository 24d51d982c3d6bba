"""Which functions an exercise grades, and how a student's folder is laid over the reference.

The one rule: in the tests of exercise K, the functions of exercise K come from the folder and
everything else from the reference, so a mistake costs its own exercise and no later one. A file of
the folder (bandit.py, ipo.py, ...) runs in a namespace of its own that begins as a copy of the
reference module's: it may call whatever that module holds, and what it defines beside its
exercises' functions, whatever the name, is its own helper and touches nothing else. What it does
not define counts as not handed in. Statements run one at a time: one that fails costs itself.
In a handout there are no solutions: there all exercises' functions come from the folder. The order
of the exercises is such that each needs only earlier ones.
Left out: other layouts than the reference's file names; change this file for one.
Grading: exercises/grade.py.
"""

import ast
import functools
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
POINTS = 10  # of every exercise

TITLES = {
    1: "preference matrix, win rate, antisymmetry",
    2: "the IPO loss and the pair identity",
    3: "mixture, Nash equilibrium, duality gap",
    4: "IPO-MD",
    5: "online DPO is not a Nash solver",
    6: "six runs, six bugs",
    7: "Nash-MD-PG and the KL of whole responses",
    8: "the mixture's sampler",
}
EXERCISES = {
    1: {"bandit": ("cycle", "bradley_terry", "win_rate")},
    2: {"ipo": ("log_ratio_gap", "loss")},
    3: {"ipo_md": ("mixture",), "bandit": ("kl", "respond", "duality_gap", "fixed_point")},
    4: {"ipo_md": ("PAIR", "loss"), "bandit": ("expected_loss",)},
    5: {"dpo": ("loss",), "bandit": ("dpo_point",)},
    6: {},
    7: {"policy": ("token_log_probs", "log_prob"), "nash_md": ("PAIR", "loss")},
    8: {"sampler": ("mix", "draw", "sample")},
}
# In the order of their imports.
MODULES = ("policy", "ipo", "ipo_md", "nash_md", "sampler", "dpo", "bandit")
# They, and what holds some of their functions under its own name.
HOLDERS = (*MODULES, "enumerated")
# A folder that grade.py --handout wrote: its reference has no solutions.
HANDOUT = (ROOT / "HANDOUT").exists()
# What is handed in besides code.
ANSWERS = {5: "predictions.json", 6: "diagnosis.json"}


def graded_in(module, exercises):
    """What these exercises grade in one module: name -> exercise."""
    found = {}
    for exercise in exercises:
        for name in EXERCISES[exercise].get(module, ()):
            found[name] = exercise
    return found


pristine = {}  # module name -> its names as the reference defines them
defaults = {}  # of the reference's functions that another default was given to, as they were
# The folder that lies over the reference now, and what went wrong while its files ran.
laid = {"folder": None, "problems": {}}
course = {"seed": 0}  # the inputs that no handout shows: pytest --course N


def not_handed_in(exercise, module, name):
    """A function that stands in for one that the folder does not define."""

    def missing(*_, **__):
        problems = "; ".join(laid["problems"].get(module, ()))
        message = f"Exercise {exercise}: {module}.py does not define {name}"
        raise NotImplementedError(f"{message} ({problems})" if problems else message)

    return missing


def put_back():
    """The reference alone."""
    for name in HOLDERS:
        module = importlib.import_module(name)
        content = pristine.setdefault(name, dict(vars(module)))
        vars(module).clear()
        vars(module).update(content)
    for function, given in defaults.items():
        function.__defaults__ = given
    defaults.clear()
    laid.update(folder=None, problems={})


def lay(folder, exercise, handout=HANDOUT):
    """Puts the reference back, then lays the folder's functions of one exercise over it.

    folder:
        the student's, or None for the reference alone.
    exercise:
        1 to 8.
    handout:
        whether all exercises' functions come from the folder, as where there is no reference.
    """
    put_back()
    if folder is None:
        return
    laid["folder"] = Path(folder).resolve()
    for name in MODULES:
        graded = graded_in(name, EXERCISES if handout else [exercise])
        if graded:
            lay_module(name, graded)
    if handout:
        for name in MODULES:
            for item in graded_in(name, EXERCISES):
                take_as_default(pristine[name].get(item), vars(sys.modules[name])[item])


def take_as_default(stub, value):
    """Gives a student's function to those of the reference that have its stub as a default."""
    for holder in HOLDERS:
        for function in vars(sys.modules[holder]).values():
            given = getattr(function, "__defaults__", None) or ()
            if callable(stub) and any(default is stub for default in given):
                defaults.setdefault(function, given)
                function.__defaults__ = tuple(value if one is stub else one for one in given)


def lay_module(name, graded):
    """The part of lay in one module. graded: what comes from the folder, name -> exercise."""
    module = sys.modules[name]
    own = dict(vars(module))
    for item, exercise in graded.items():
        own[item] = None if item == "PAIR" else not_handed_in(exercise, name, item)
    broken = run_file(laid["folder"] / f"{name}.py", own)
    for item in graded_in(name, EXERCISES):
        if item not in graded and hasattr(module, item):
            own[item] = getattr(module, item)  # another exercise's: right, whatever the file says
    for item in graded:
        original = pristine[name].get(item)  # an import that was left out is not there
        value = own[item] if item == "PAIR" else guard(f"{name}.{item}", own[item], broken)
        setattr(module, item, value)
        if item == "PAIR" or original is None:
            continue
        for holder in HOLDERS:  # bandit's mixture is ipo_md's
            graded_there = item in graded_in(holder, EXERCISES)
            if not graded_there and pristine[holder].get(item) is original:
                setattr(sys.modules[holder], item, value)


def run_file(file, namespace):
    """Runs a student's file in a namespace, each statement by itself, and notes what failed.

    Returns why none of its functions may be used, or None.
    """
    if not file.exists():
        return None
    problems = laid["problems"].setdefault(file.stem, [])
    try:
        # Bytes: Python itself then reads a byte-order mark, any line ends, a line with the coding.
        statements = ast.parse(file.read_bytes(), str(file)).body
    except (SyntaxError, ValueError) as error:
        problems.append(f"{file.name} cannot be read: {error}")
        return None
    dtype = torch.get_default_dtype()
    for statement in statements:
        try:
            code = compile(ast.Module([statement], []), str(file), "exec", dont_inherit=True)
            exec(code, namespace)
        except (Exception, SystemExit) as error:
            where = f"{file.name}, line {statement.lineno}"
            problems.append(f"{where}: {type(error).__name__}: {error}")
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
        return f"{file.name} {DTYPE_CHANGED}"
    return None


DTYPE_CHANGED = (
    "changes torch's default dtype, which every other file sees: "
    "give dtype=torch.float64 where a tensor is made"
)


def guard(target, function, broken=None):
    """The function, which must leave its arguments, torch's default dtype and grad mode alone.

    target:
        such as "ipo.loss", for the message.
    broken:
        why it may not be used at all, or None.
    """
    if not callable(function):
        return function
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def guarded(*arguments, **named):
        if broken:
            raise AssertionError(broken)
        given = dict(zip(names, arguments, strict=False)) | named
        before = {name: versions(value) for name, value in given.items()}
        dtype, learns = torch.get_default_dtype(), torch.is_grad_enabled()
        try:
            result = function(*arguments, **named)
        finally:
            after = torch.get_default_dtype(), torch.is_grad_enabled()
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(learns)
        if after != (dtype, learns):
            what = DTYPE_CHANGED if after[0] != dtype else "leaves gradients switched on or off"
            raise AssertionError(f"{target} {what}")
        for name, value in given.items():
            if versions(value) != before[name]:
                raise AssertionError(f"{target} changes its argument {name}: make a new tensor")
        return result

    return guarded


def versions(value):
    """How often each tensor of an argument was written to: in-place operations count it up."""
    if isinstance(value, torch.Tensor):
        return [value._version]
    if isinstance(value, torch.nn.Module):
        return [parameter._version for parameter in value.parameters()] + [value.training]
    if isinstance(value, (tuple, list)):
        found = []
        for part in value:
            found += versions(part)
        return found
    return []


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
