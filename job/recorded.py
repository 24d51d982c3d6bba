"""Models of preferences from recorded comparisons: how long they are trained, where they stop, and
what they are worth.

Recorded comparisons are few and each has one vote, so that a model soon knows them by heart. A
fifth of its prompts is kept apart, and the weights that tell those best are the ones kept. What it
is worth is said beside what the lengths alone would tell: annotators like longer answers, or
shorter ones, and a model that knows no more than that judges no more than that.
The rates were chosen by python -m studies.judge.
Left out: training on the fifth, too, once it has said when to stop.
"""

import math

import torch

import data
import preference_model
from job import parallel, progress

PAIRS = 32  # a step
PASSES = 8  # over the training pairs, at most: the best weights come from an earlier one
LOOKS = 8  # at the pairs kept apart, in all, besides the one before the first step
# Passes over the demonstrations, and over the prompts that the alignment asks.
IMITATION = {"from scratch": 8, "pretrained": 3}
PROMPTS = 4
LONGEST = 10**6  # tokens of a prompt that are counted
TOLD = 960  # pairs at most that a model is tested on
# Of preference_model.train_on_votes.
RECIPE = dict(lr=5e-4, finetune=True, weight_decay=0.0)


def train_and_test(options, task, reference, model, role, label, recipe=RECIPE, spy=False):
    """Trains a model on the recorded comparisons of a role and tests it on those that it has no
    part in.

    options:
        of the run, of which preference_steps and device are read.
    task:
        data.Records.
    reference:
        the supervised policy.
    model:
        a PreferenceModel, changed in place.
    role:
        "preference" or "judge".
    label:
        text for the progress bar.
    recipe:
        lr, finetune and weight_decay, as preference_model.train_on_votes takes them.
    spy:
        True for what a run must not know, a study's: every look is at the unseen pairs, too.

    Returns preference_model.worth's numbers with steps, stopped (after which of them the weights
    were taken), passes (over the training pairs until then), training and validation (their pairs)
    and looks (at the validation pairs: step, loss, accuracy). Raises ValueError if a part is empty.
    """
    check_parts(task, role, label)

    def comparisons(step):
        given = f"{role} training", step, 2 * PAIRS, reference
        return task.comparisons(*given, share=parallel.share).to(options.device)

    def validate(model):
        numbers = told(options, task, reference, model, f"{role} validation")
        found = dict(loss=numbers["loss"], accuracy=numbers["accuracy"])
        if spy:
            numbers = told(options, task, reference, model, f"{role} unseen")
            found.update(unseen_loss=numbers["loss"], unseen_accuracy=numbers["accuracy"])
        return found

    steps = options.preference_steps
    every = max(1, steps // LOOKS)
    rates = recipe["lr"], recipe["finetune"]
    given = model, comparisons, validate, every, steps, *rates, label, parallel.add_gradients
    more = dict(weight_decay=recipe["weight_decay"], bar=progress.bar(label))
    looks = preference_model.train_until_best(*given, **more)
    stopped = min(looks, key=lambda look: look["loss"])["step"]
    training = len(task.parts[f"{role} training"])
    return dict(
        told(options, task, reference, model, f"{role} unseen"),
        steps=steps,
        stopped=stopped,
        passes=stopped * PAIRS / training,
        training=training,
        validation=len(task.parts[f"{role} validation"]),
        looks=looks,
    )


def choose_sizes(options, task, pretrained):
    """Sets what was not given to what the data are enough for, and says so in one line.

    options:
        of the run, changed in place: from_data has the names of what was not given, and goes.
        Without from_data, as of the built-in task, nothing is chosen.
    task:
        where the data come from; its max_prompt follows --max-prompt-tokens.
    pretrained:
        whether the policy comes with weights: it needs fewer demonstrations.

    A step costs seconds on long prompts, and a small file's rows come again after a few of them.
    """
    not_given = vars(options).pop("from_data", [])
    if not not_given:
        return
    found = {}
    if task.demonstrations:
        passes = IMITATION["pretrained" if pretrained else "from scratch"]
        found["supervised_steps"] = steps_for(len(task.demonstrations), passes)
    if task.parts["preference training"]:
        found["preference_steps"] = steps_for(len(task.parts["preference training"]))
    found["steps"] = steps_for(task.most("align"), PROMPTS, options.batch_size)
    found["max_prompt_tokens"] = prompt_length(task)
    said = []
    for name in not_given:
        if name in found:
            # Not above what train.py does without knowing the data.
            value = min(found[name], getattr(options, name))
            setattr(options, name, value)
            said.append(f"--{name.replace('_', '-')} {value}")
    task.max_prompt = options.max_prompt_tokens
    if said:
        print(f"chosen from the data: {' '.join(said)}")


def steps_for(count, passes=PASSES, batch=PAIRS):
    """How many steps of a batch are so many passes over count rows, at least one."""
    return math.ceil(passes * count / batch)


def prompt_length(task):
    """Tokens that 95 % of the prompts have at most: a long one makes its whole batch long."""
    texts = task.prompts_of["align"][:1000]
    lengths = []
    for text in texts:
        lengths.append(len(data.encode_prompt(task.tokenizer, text, LONGEST)[0]))
    return sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1]


def check_parts(task, role, label):
    """Raises ValueError if no comparison of a role is left to learn from, or to stop by."""
    for part in ("training", "validation", "unseen"):
        if not task.parts[f"{role} {part}"]:
            raise ValueError(
                f"--comparisons: no prompt is left for the {label}'s {part} pairs; "
                "give more records, at least about 100 prompts"
            )


def told(options, task, reference, model, part):
    """preference_model.worth of a model on a part of the comparisons, TOLD pairs at most.

    part:
        a key of task.parts. Of several processes each reads its share; all return the same.
    """
    batches, pairs = batches_of(min(TOLD, len(task.parts[part])))

    def comparisons(step):
        given = part, step, 2 * pairs, reference
        return task.comparisons(*given, share=parallel.share).to(options.device)

    guessed = preference_model.guesses(model, comparisons, batches).float().cpu()
    return preference_model.worth(*torch.cat(parallel.gather(guessed), 1))


def batches_of(count, most=96):
    """(batches, pairs a batch) that hold count pairs but for fewer than there are batches.

    All batches are of one size: where a batch began depends on the size of those before.
    """
    batches = math.ceil(count / most)
    return batches, count // batches


def curves(looks, stopped):
    """The panels of a model's training for report.plot: loss and accuracy of the looks."""
    steps = [look["step"] for look in looks]
    panels = []
    for name, title in (("loss", "loss, nats a pair"), ("accuracy", "share of right signs")):
        values = [look[name] for look in looks]
        kept = values[steps.index(stopped)]
        series = {"validation pairs": (steps, values), "kept": ([stopped], [kept])}
        panels.append((title, "step", "", series))
    return panels
