"""Trains one preference model of recorded comparisons, says what it is worth, and keeps it.

It is the model that train.py would train with the same options, to the bit, from the same kept
stages; the folder is one for --preference-model, and for evaluate.py's --judge.
Run: python -m studies.preference --comparisons FILE [--demos FILE] [--policy ...] --out FOLDER
     python train.py --comparisons FILE [--demos FILE] [--policy ...] --preference-model FOLDER
All of train.py's options may be given; --loss rl makes it the Bradley-Terry reward.
"""

import os
import shutil
import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import data
import job.options
import policy as policies
import stopping
from job import folder, recorded, report, stages


def train_one(options):
    """Trains the model, or finds it among the stages, and copies it to --out.

    options:
        train.py's; out is a folder that is not there yet.

    Returns its numbers on the pairs that it has no part in. Raises ValueError naming the option.
    """
    if not options.comparisons:
        raise ValueError("--comparisons: give a file of prompt, chosen, rejected")
    if os.path.exists(options.out):
        raise ValueError(f"--out {options.out}: is there already; give another")
    task, start, data_hash = data.open_task(options)
    recorded.choose_sizes(options, task, pretrained=start is not None)
    reference, reference_path = stages.supervised(options, task, start, data_hash)
    pairwise = job.options.find_method(options.loss).LABEL == "preference"
    given = options, task, reference, reference_path, "preference"
    _, path = stages.preference(*given, pairwise=pairwise)
    with folder.whole(options.out) as unfinished:
        shutil.copytree(path, unfinished, dirs_exist_ok=True)
    return stages.numbers_of(options.out)


def main(argv=None):
    """The command; returns the exit status."""
    stopping.begun()
    policies.quiet()
    try:
        options = job.options.parse(argv)
        worth = report.judge_worth(train_one(options))
    except report.EXPECTED as error:
        status, line = report.ending(error)
        print(f"studies.preference: {line}", file=sys.stderr)
        return status
    if "warning" in worth:
        print(f"warning: {worth['warning'].replace('the judge', 'the model', 1)}")
    print(f"kept in {options.out}: python train.py ... --preference-model {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
