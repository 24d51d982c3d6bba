"""How long a run will still take, over all of its stages.

A bar knows the steps of its own stage alone. Here those of the stages behind it are added, as far
as anything is known of them: work is counted in responses, once for a pass forward and twice for
the way back, and the steps that were taken say how long one takes. Looks at validation pairs, the
drawing of responses and evaluations are not counted before they are seen: what is said of later
stages is the least that they take, and nothing is said where nothing is known.
"""

import time

from tqdm import tqdm

FORWARD, BOTH_WAYS = 1, 3
# The stages of the run of this process that are still to do, in order, {name: (steps, responses a
# step or None)}, how many there were, and the seconds that a response takes, None before any step.
ahead = dict(stages={}, count=0, seconds=None)


def begin(stages):
    """A run begins. stages: {name: (steps, responses a step, or None if they cannot be told)}."""
    ahead.update(stages=dict(stages), count=len(stages), seconds=None)


def plan(options, method, task, asked):
    """The stages of a run, as begin takes them.

    options, method, task, asked:
        as train.run_job has them.
    """
    own = not task.judge  # records: models of them learn with the whole body
    pairs = 2 * 32 * BOTH_WAYS if own else None
    stages = {"supervised policy": (options.supervised_steps, 32 * BOTH_WAYS)}
    models = []
    if asked is None and not options.offline and not options.preference_model:
        models.append("preference model" if method.LABEL == "preference" else "reward model")
    if asked is None and own and options.comparisons:
        models.append("judge model")
    for name in models:
        stages[name] = (options.preference_steps, pairs)
    # The policy's and the reference's pass over every response that is learned from.
    sides = options.responses or method.LEARNS_FROM
    each = options.batch_size * sides * (BOTH_WAYS * options.epochs + FORWARD)
    stages[f"alignment, {options.loss}"] = (options.steps, each)
    return stages


def announce(name):
    """A stage begins to train: says which it is, and what comes after it."""
    stages = ahead["stages"]
    if name not in stages:
        return
    while next(iter(stages)) != name:  # those before it were kept
        del stages[next(iter(stages))]
    number = ahead["count"] - len(stages) + 1
    own, *later = [f"{key}, {steps} steps" for key, (steps, _) in stages.items()]
    then = f"; then {'; '.join(later)}" if later else ""
    known = least(stages)
    time_left = f"at least {minutes(known)} in all" if known else "no time is known yet"
    print(f"stage {number} of {ahead['count']}: {own}{then}: {time_left}")


def least(stages):
    """Seconds that stages take at least, as far as it is known; 0 if nothing is."""
    total = 0.0
    for steps, responses in stages.values():
        if responses and ahead["seconds"]:
            total += steps * responses * ahead["seconds"]
    return total


def bar(name):
    """A stage's progress bar that shows the time of the whole run, too: called as tqdm is."""

    def show(steps, **options):
        stages = ahead["stages"]
        shown = tqdm(steps, **options)
        begun = time.monotonic()
        for count, step in enumerate(shown, start=1):
            yield step
            if name not in stages:
                continue
            each = (time.monotonic() - begun) / count
            if stages[name][1]:
                ahead["seconds"] = each / stages[name][1]
            later = {key: stage for key, stage in stages.items() if key != name}
            left = minutes(each * (len(steps) - count) + least(later))
            unknown = [f" + {key}" for key, stage in later.items() if not least({key: stage})]
            over = "over " if later else ""
            shown.set_postfix_str(f"all: {over}{left}{''.join(unknown)}", refresh=False)

    return show


def minutes(seconds):
    """A time as text, such as 50 s, 7 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
