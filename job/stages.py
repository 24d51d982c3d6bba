"""The stages before the alignment, kept under --stages and used again by every run with the same
data and options.

They depend neither on --loss nor on --seed. What trains them is policy.imitate's and
preference_model's; here is which one is kept under which name. A folder's name ends in a hash of
everything that decides its content.
"""

import contextlib
import hashlib
import json
import os
import time
from functools import partial

import torch

import data
import policy as policies
import preference_model
from files import read_object
from job import folder, parallel, progress, recorded, report
from job.options import precision
from job.run import locked, remove_left, write_json
from job.versions import BFLOAT16, RECORDED, VERSIONS

POOL = 40  # batches of comparisons that the preference model visits again and again, with new votes


def keep_or_make(stages, name, key, make, write, load):
    """What load reads from a kept stage, which is made first if there is none.

    stages:
        the folder where they are kept.
    name:
        of the stage, such as "supervised".
    key:
        what decides its content, as a value of JSON.
    make:
        make() trains, in every process.
    write:
        write(folder, made) writes what make returns into an empty folder; process 0 alone does.
    load:
        load(folder) reads them.

    Returns (what load returns, the stage's folder).
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    path = os.path.join(stages, f"{name}-{digest.hexdigest()[:12]}")
    begun = time.time()

    def is_kept_already():
        """Before the lock: a run that was killed behind the last line of the making left one."""
        kept = is_kept(path)
        if kept:
            remove_left(f"{path}.lock")
        return kept

    found = parallel.from_first(is_kept_already)
    with contextlib.ExitStack() as held:

        def is_there():
            """After the lock: a run beside this one may be making it."""
            os.makedirs(stages, exist_ok=True)
            held.enter_context(locked(f"{path}.lock"))
            return is_kept(path)

        if not found and not parallel.from_first(is_there):
            made = make()

            def publish_it():
                with folder.whole(path) as unfinished:
                    write(unfinished, made)
                    hashes = folder.hashes(unfinished)
                    write_json(os.path.join(unfinished, folder.MANIFEST), hashes)

            parallel.from_first(publish_it)
    if found:
        print(f"{name}: reused {path}")
    else:
        print(f"{name}: {time.time() - begun:.0f} s, kept in {path}")
    return load(path), path


def is_kept(path):
    """Whether a stage's folder is there. Raises ValueError if it is not as it was made."""
    if not os.path.isdir(path):
        return False
    wrong = folder.wrong_file(path, os.path.join(path, folder.MANIFEST))
    if wrong:
        raise ValueError(
            f"{path}: {wrong} is missing or not as it was made; "
            "remove the folder, and it is made again"
        )
    return True


def supervised(options, task, start, data_hash):
    """The policy that imitates the demos: the reference, and every method's start.

    options:
        of the run.
    task:
        where the demos come from (data.py).
    start:
        the policy before supervision, or None to build one of --policy's size.
    data_hash:
        of the records, or "built-in".

    Returns (model, its folder).
    """
    names = ("policy", "supervised_steps", "supervised_lr", "max_prompt_tokens")
    names += ("max_response_tokens", "data_seed", "dtype")
    values = [getattr(options, name) for name in names]
    key = [VERSIONS["supervised"], data_hash, values]
    if start is not None:
        key.append(weights_hash(start))  # the folder's name says nothing of what is in it

    def make():
        progress.announce("supervised policy")
        model = start
        if model is None:
            room = options.max_prompt_tokens + options.max_response_tokens
            context = 128 if data_hash == "built-in" else max(128, room)
            model = policies.build(options.policy, task.tokenizer, context, options.data_seed)
        model = model.to(options.device)
        lr = options.supervised_lr or (3e-3 if options.policy == "tiny" else 1e-4)

        groups = [dict(params=list(model.parameters()), lr=lr)]
        policies.minimise(
            groups,
            partial(demo_loss, options, task, model),
            options.supervised_steps,
            "supervised policy",
            add_gradients=parallel.add_gradients,
            bar=progress.bar("supervised policy"),
        )
        return model

    def write(folder, model):
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)

    def load(folder):
        return policies.load(folder)[0].to(options.device)

    return keep_or_make(options.stages, "supervised", key, make, write, load)


def demo_loss(options, task, model, step):
    """The loss of a step's 32 demos, nats a token: this process's part of it, with gradient.

    options:
        of the run: device and precision.
    task:
        where the demos come from.
    model:
        the policy.
    step:
        an integer from 0; every step has its own demos.
    """
    prompt, response = task.demos(step, 32)
    prompt, response = prompt.to(options.device), response.to(options.device)
    mine = parallel.share(len(prompt.ids))
    with precision(options):
        # Mean over the batch's tokens: every word of the demos counts alike.
        total = policies.log_prob(model, prompt.rows(mine), response.rows(mine)).sum()
        return -total / response.mask.sum()


def weights_hash(model):
    """SHA-256 of a model's weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def labels_and_judge(options, method, task, reference, reference_path, asked):
    """Who says which response is better, while training and while evaluating.

    options:
        of the run.
    method:
        the method's file: its LABEL says whether it takes preferences or rewards.
    task:
        where the comparisons come from; its judge judges, if it has one.
    reference, reference_path:
        the supervised policy and its folder.
    asked:
        the preference of --preference's file, or None to train a model of it.

    Returns (preference, judge, {"preference": its folder, "judge": its folder}, what the judge is
    worth: report.judge_worth's numbers). Preference and folder are None where nobody is asked, as
    of --offline, folders also where no model was trained. Preference and judge are called with
    (prompt, y, y_other) and return [B]. A preference is p(y > y'), or r(y) - r(y'); or, where LABEL
    is "rewards", it is called with (prompt, y) and returns r(y).
    """
    if asked is not None:
        judge = task.judge or asked
        if judge is asked:
            print(f"preference and judge: {asked.path} is asked, no model is trained")
        else:
            print(
                f"preference: {asked.path} is asked, no model is trained; judge: the task's own "
                f"panel (python evaluate.py A B --judge {asked.path} asks the file)"
            )
        return asked, judge, dict(preference=None, judge=None), {}
    pairwise = method.LABEL == "preference"  # or Bradley-Terry, which has rewards
    made_of = options, task, reference, reference_path
    labels, model, path = {}, None, None
    if options.offline:
        print("preference: --offline learns from recorded votes and asks no model, none is trained")
    elif options.preference_model:
        model, path = reused(options, method, task, reference), options.preference_model
        print(f"preference: {path} is used, none is trained")
        numbers = numbers_of(path)
        if numbers:
            print(report.held_out(numbers))
    else:
        model, path = preference(*made_of, "preference", pairwise=pairwise)
    if model is not None:
        # Of Bradley-Terry, the logit is r(y) - r(y').
        labels = dict(preference=model, reward=model.logit, rewards=model.reward)
    judge, judge_path, worth = task.judge, None, {}
    if judge is None:
        judge, judge_path = model, path
        if options.comparisons:
            judge, judge_path = preference(*made_of, "judge")
        else:
            print("judge: no --comparisons to train another; the preference judges, too")
        worth = report.judge_worth(numbers_of(judge_path))
    return labels.get(method.LABEL), judge, dict(preference=path, judge=judge_path), worth


def reused(options, method, task, policy):
    """--preference-model's model, or None without the option.

    options, method, task:
        of the run: the model must be the method's kind, and prompt and response must fit in.
    policy:
        whose tokens it must read, or None for one that is to be built.

    Raises ValueError that names the option if the model cannot be read or does not fit.
    """
    folder = options.preference_model
    if folder is None:
        return None
    option = f"--preference-model {folder}"
    size = len(task.tokenizer) if policy is None else policy.config.vocab_size
    try:
        model = preference_model.load_for(folder, task.tokenizer, size).to(options.device)
    except ValueError as error:
        raise ValueError(f"--preference-model {error}") from None
    pairwise = method.LABEL == "preference"
    if model.pairwise != pairwise:
        kinds = {True: "a pairwise preference", False: "a Bradley-Terry reward"}
        raise ValueError(
            f"{option}: is {kinds[model.pairwise]}, --loss {options.loss} needs {kinds[pairwise]}; "
            "give another folder or --loss"
        )
    if policies.context(model.body) < task.max_prompt + task.max_response:
        raise ValueError(
            f"{option}: has {policies.context(model.body)} positions, fewer than "
            "--max-prompt-tokens and --max-response-tokens together; lower one"
        )
    return model


def numbers_of(folder):
    """The numbers on pairs that a model has not seen, from its folder; {} if they are not there."""
    path = os.path.join(folder, "accuracy.json")

    def look():
        return read_object(path) if os.path.exists(path) else {}

    return parallel.from_first(look)


def preference(options, task, reference, reference_path, role, pairwise=True):
    """A preference model, or the reward, trained on votes; prints how well it does on held-out
    pairs.

    options:
        of the run.
    task:
        where the comparisons come from.
    reference, reference_path:
        the supervised policy, whose body the model begins with, and its folder.
    role:
        whose comparisons: "preference" for what one trains on, "judge" for what one evaluates with.
    pairwise:
        False for the Bradley-Terry reward.

    Returns (model, its folder).
    """
    name = role
    if role == "preference" and not pairwise:
        name = "reward"
    key = [VERSIONS["preference"], os.path.basename(reference_path), options.preference_steps]
    key += [role, pairwise]
    if isinstance(task, data.Records):
        key.append(RECORDED)
    if options.dtype == "bfloat16":
        key.append(BFLOAT16)

    def make():
        progress.announce(f"{name} model")
        model = empty_model(options, reference, role, pairwise)
        with precision(options):
            numbers = train_and_test(options, task, reference, model, role, f"{name} model")
        return model, numbers

    def write(folder, made):
        model, numbers = made
        vocabulary = preference_model.vocabulary_hash(task.tokenizer)
        preference_model.save(model, folder, vocabulary)
        write_json(os.path.join(folder, "accuracy.json"), numbers)
        if "looks" in numbers:
            panels = recorded.curves(numbers["looks"], numbers["stopped"])
            report.plot(os.path.join(folder, "accuracy.png"), panels)

    def load(folder):
        model = preference_model.load(folder).to(options.device)
        return model, read_object(os.path.join(folder, "accuracy.json"))

    (model, numbers), path = keep_or_make(options.stages, name, key, make, write, load)
    print(report.held_out(numbers))
    return model, path


def empty_model(options, reference, role, pairwise):
    """The preference model before its first step: the reference's body, two random networks."""
    with torch.random.fork_rng():
        # The judge's differ from those of the model that one trains on.
        torch.manual_seed(options.data_seed + (role == "judge"))
        return preference_model.PreferenceModel(reference, pairwise).to(options.device)


def train_and_test(options, task, reference, model, role, label):
    """Trains a model on the comparisons of a role. Returns its numbers on held-out pairs."""
    if isinstance(task, data.Records):
        return recorded.train_and_test(options, task, reference, model, role, label)
    pool, share = {}, parallel.share

    def comparisons(step):
        # Fresh posts are cheap but votes are what is scarce: the same batches again, with new
        # votes. Their features are computed once.
        place = step % POOL
        if place not in pool:
            pool[place] = task.comparisons(role, place, 144, reference, share=share)
        return pool[place]

    def held_out(step):
        found = task.comparisons("held out", step, 192, reference, share=share)
        return found.to(options.device)

    steps, lr = options.preference_steps, 2e-3
    given = model, comparisons, steps, lr, False, label, parallel.add_gradients
    preference_model.train_on_votes(*given, bar=progress.bar(label))
    guessed = parallel.gather(preference_model.guesses(model, held_out, 10).cpu())
    return preference_model.accuracy(*torch.cat(guessed, 1))
