"""Run it: a student's own loss, mixture and sampler train a language model that must improve.

Trains IPO-MD on the built-in task by train.py as it stands, with the functions of a student's
folder in the reference's place wherever they are used: ipo.loss and ipo_md.PAIR, log_prob, the
sampler with its mixture. The trained policy is then held against gates: it must win against the
policy that it began as, and must not have paid for that with its language.
In a full checkout the stages before the alignment and the last measurement are the reference's. A
handout has no reference: there the student's functions do everything.
Left out: points. A gate is passed or missed.
Run: python exercises/grader/run.py work    (minutes on two cores; train.py's options may follow)
"""

import argparse
import functools
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# (name, of the summary's numbers, least, most). Twenty default runs had win rates of 0.82 to 0.88
# and KLs of 7.4 to 8.7 nats (README.md, studies/gates.py).
GATES = (
    ("win rate against the start", lambda s: s["win_rate"], 0.76, 1.0),
    ("KL to the start, nats", lambda s: s["kl"], 0.5, 10.0),
    ("unfinished responses", lambda s: s["unfinished"], 0.0, 0.02),
    ("length over the start's", lambda s: s["length"] / s["length_other"], 0.6, 1.5),
    ("distinct responses", lambda s: s["distinct"], 0.5, 1.0),
)


def fingerprint(folder):
    """Of the files in a folder: a run is of these files and no others."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def train_with(folder, arguments):
    """train.py's main on IPO-MD with the folder's functions. Returns its exit status."""
    # First of the project's: it sets how torch's threads wait, before torch is there.
    import train

    # isort: split
    from exercises.grader import adapters

    if adapters.HANDOUT:
        lay(folder)
        return train.main(arguments)
    align = train.align

    @functools.wraps(align)
    def with_the_students(*given):
        lay(folder)
        try:
            return align(*given)
        finally:
            adapters.put_back()

    train.align = with_the_students
    try:
        return train.main(arguments)
    finally:
        train.align = align


def lay(folder):
    """Puts the folder's functions in place, and says what of its files was left out."""
    from exercises.grader import adapters

    adapters.lay(folder, None, handout=True)
    for problems in adapters.laid["problems"].values():
        for problem in problems:
            print(f"left out, and nothing else: {problem}")


def judge(summary):
    """Prints each gate with its value and bounds. Returns how many are missed."""
    missed = 0
    for name, of, least, most in GATES:
        value = of(summary)
        passed = least <= value <= most
        missed += not passed
        word = "" if passed else "MISSED"
        print(f"{name:<30}{value:8.3f}   {least:g} to {most:g}   {word}")
    return missed


def main(argv=None):
    """Trains and judges. Returns 0 if every gate is passed, 1 if not, train.py's status if it
    ended early.
    """
    parser = argparse.ArgumentParser(description="Trains IPO-MD with a student's own functions.")
    parser.add_argument("folder", type=Path, help="the student's files, such as work")
    options, more = parser.parse_known_args(argv)
    if not options.folder.is_dir():
        parser.error(f"{options.folder}: no such folder")
    sys.path.insert(0, str(ROOT))
    folder = options.folder.resolve()
    mark = fingerprint(folder)
    out = Path("runs") / f"run-it-{mark}"
    arguments = ["--loss", "ipo_md", "--out", str(out), *more]
    if (ROOT / "HANDOUT").exists():  # what the student's functions made is of these files, too
        arguments += ["--stages", str(Path("runs") / f"stages-{mark}")]
    status = train_with(folder, arguments)
    if status:
        return status
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    missed = judge(summary)
    print("passed" if not missed else f"{missed} of {len(GATES)} gates missed")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
