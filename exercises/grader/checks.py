"""How a graded test compares, and what a student reads when the comparison fails.

A message names a mistake only where the observed value is the one that this mistake alone gives on
a right program. Those values are stored as numbers in wrong_values.json, so that no wrong or nearly
right function is handed out; the teacher's command that writes them is no part of a handout.
Otherwise the message has what was observed, what was expected, their ratio, and the student's line.
"""

import functools
import json
import linecache
import sys
import zlib
from pathlib import Path

import torch

from exercises.grader import adapters

HERE = Path(__file__).resolve().parent
# "exercise/equation" -> the values that mistakes give: [{"hints": [...], "shape", "values"}].
WRONG = {}
if (HERE / "wrong_values.json").exists():
    WRONG = json.loads((HERE / "wrong_values.json").read_text(encoding="utf-8"))
# The last public check that failed, {"key", "observed"}: a teacher's command asks for it.
failed = {}


def close(observed, expected, relative=1e-6):
    """Relative, and absolute relative to the smallest expected magnitude that is not zero."""
    if observed.shape != expected.shape:
        return False
    if not (expected != 0).any():  # an observed value of zeros, compared with a mistake's
        return not (observed != 0).any()
    smallest = expected.abs()[expected != 0].min()
    allowed = relative * expected.abs() + relative * smallest
    return bool(((observed - expected).abs() <= allowed).all())


def numbers(value):
    """Any result as float64, and the relative error that its own precision is allowed."""
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{type(value).__name__} was returned, a tensor is wanted") from None
    # Where float32 is enough it is right; a half has no precision to spare.
    return tensor.double(), 1e-5 if tensor.dtype == torch.float32 else 1e-6


def show(value):
    entries = [float(f"{entry:.6g}") for entry in value.flatten()[:8].tolist()]
    return f"{entries} ..." if value.numel() > 8 else str(entries)


def compared(observed, expected):
    """In words, how observed differs from expected."""
    if observed.shape != expected.shape:
        return f"the shape is {list(observed.shape)}, expected {list(expected.shape)}"
    if not observed.isfinite().all():
        return "not every entry is finite"
    ratio = (observed / expected)[expected != 0]
    if len(ratio) > 1 and (ratio - ratio[0]).abs().max() < 1e-6 * ratio[0].abs().clamp(min=1):
        return f"exactly {ratio[0]:.6g} times the expected value"
    return f"the ratio to the expected value is {show(ratio)}"


def named(key, observed):
    """What is known of the observed value: the mistakes that give it on a right program, or None.

    Several mistakes may give one value; then each is named.
    """
    for entry in WRONG.get(key, ()):
        value = torch.tensor(entry["values"], dtype=torch.float64).view(entry["shape"])
        if close(observed, value, 1e-5 if observed.numel() > 8 else 2e-6):
            return " / or: ".join(entry["hints"])
    return None


def line_of(frame_file, number):
    """A line of the student's, with its text."""
    text = linecache.getline(frame_file, number).strip()
    return f"{Path(frame_file).name}, line {number}: {text}"


def is_students(file):
    folder = adapters.laid["folder"]
    return folder is not None and Path(file).parent == folder


def last_return(observe):
    """The student's line that returned last when observe() runs, or None."""
    found = []

    def look(frame, event, _):
        if event == "return" and is_students(frame.f_code.co_filename):
            found[:] = [(frame.f_code.co_filename, frame.f_lineno)]

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        observe()
    except Exception:
        return None
    finally:
        sys.setprofile(before)
    return line_of(*found[0]) if found else None


def check(exercise, equation, observe, expected, *arguments, public=True):
    """Asserts that observe(*arguments) gives expected.

    expected must not be all zeros, or an empty answer would pass. observe must look a graded
    function up when it is called, as in ipo.loss(...): it is called again for the message.

    equation:
        what is checked, in words: unique among the exercise's public checks.
    public:
        whether the inputs are the same in every course, so that mistakes' values are known.
    """
    observe = functools.partial(observe, *arguments)
    expected, _ = numbers(expected)
    assert (expected != 0).any(), "the grader itself: nothing to compare with"
    key = f"{exercise}/{equation}"
    observed, relative = numbers(observe())
    if close(observed, expected, relative):
        return
    cause = None
    if public:
        failed.update(key=key, observed=observed)
        cause = named(key, observed)
    if cause:
        cause = f"this is what a right program with one mistake gives: {cause}"
    message = f"{equation}: {cause or compared(observed, expected)}"
    message += f"\n  observed {show(observed)}\n  expected {show(expected)}"
    line = last_return(observe)
    raise AssertionError(f"{message}\n  from {line}" if line else message)


def require(holds, message):
    """An assertion with a sentence for the student; pytest's rewriting would add our variables."""
    if not holds:
        raise AssertionError(message)


def course_random(name):
    """A generator of inputs that only the course's seed decides, and the test's name."""
    return torch.Generator().manual_seed(zlib.crc32(f"{adapters.course['seed']}/{name}".encode()))


def random_law(random, *shape):
    """log-probabilities, [..., n] float64, no action rare."""
    logits = 0.7 * torch.randn(*shape, generator=random, dtype=torch.float64)
    return logits.log_softmax(-1)


def random_game(random, *shape):
    """Preferences [..., n, n] float64, antisymmetric around 1/2; shape ends with n, not n, n."""
    half = 0.9 * (torch.rand(*shape, shape[-1], generator=random, dtype=torch.float64) - 0.5)
    return 0.5 + (half - half.transpose(-1, -2)) / 2
