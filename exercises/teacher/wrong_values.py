"""Writes grader/wrong_values.json: which value each mistake with a hint gives in each check.

Each mistake of mistakes.py is planted alone in the reference and the tests of its exercise run;
what the first failing check of each observes is noted: a program that has passed the checks before
it is compared with mistakes that pass them, too. Mistakes that give one value are noted together: a
student then reads all their hints. The file holds numbers only, so the handout
has no wrong or nearly right function in it.
Run: python -m exercises.teacher.wrong_values    (after a change of tests or mistakes)
"""

import contextlib
import json

import torch

from exercises.grader import adapters, checks
from exercises.teacher import mistakes
from exercises.teacher.mutants_table import graded_tests

FILE = adapters.ROOT / "exercises" / "grader" / "wrong_values.json"


def noted(one):
    """What the first failing check of each test observes with a mistake planted: {key: observed}.

    Nothing of a test that fails otherwise: there the message is another.
    """
    adapters.put_back()
    found = {}
    for test, _ in graded_tests(one.exercise):
        checks.failed.clear()
        with mistakes.planted(one), contextlib.suppress(Exception):
            test()
        if checks.failed:
            found[checks.failed["key"]] = checks.failed["observed"]
    return found


def add(entries, hint, observed):
    """Notes one value, together with other hints that give it."""
    values = [float(f"{value:.9g}") for value in observed.flatten().tolist()]
    for entry in entries:
        known = torch.tensor(entry["values"], dtype=torch.float64).view(entry["shape"])
        if checks.close(observed, known):
            if hint not in entry["hints"]:
                entry["hints"].append(hint)
            return
    entries.append(dict(hints=[hint], shape=list(observed.shape), values=values))


def wrong_values():
    """The file's content: key of a check -> [{hints, shape, values}]."""
    found = {}
    for one in mistakes.MISTAKES:
        if one.hint is None:
            continue
        for key, observed in noted(one).items():
            if observed.numel() and observed.isfinite().all():
                add(found.setdefault(key, []), one.hint, observed)
    return found


def text(found):
    """As JSON, a line for each check."""
    lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(text(wrong_values()), encoding="utf-8")
    print(f"{FILE.relative_to(adapters.ROOT)}: {FILE.stat().st_size / 1000:.0f} kB")
