"""A run's folder and its clock: locks, checkpoints, signals, metrics. Nothing here changes a number
of the run.

A run that is killed at any moment goes on with --resume and ends in the same bits: a checkpoint
holds the weights and the optimiser, and no random state, since every generator is made from (seed,
stage, step). What is in the folder, and what of it is believed, is job/folder.py's.
"""

import contextlib
import io
import os
import signal
from functools import partial

import filelock
import torch
from safetensors.torch import save_model
from tqdm import tqdm

import files
from files import file_hash, read_object
from job import folder, parallel, progress
from job.folder import LOCK, append_line, checkpoints, write_json
from job.versions import version

# Options that change nothing of a run's result: another value is no other run.
NEUTRAL = ("out", "stages", "resume", "save_every", "keep", "show", "table1")
# Options that came later than some configs, and what runs did before there were any.
LATER = dict(refresh=1, renew_reference=0, epochs=1, ptx=0.0, length_average=False)
LATER |= dict(preference_model=None)


class Run:
    """An open run: `with Run(options, config, tokenizer) as run`.

    Inside the block the folder is locked, and a signal waits for the end of a step. Of several
    processes the first alone holds the lock and writes.
    """

    def __init__(self, options, config, tokenizer):
        self.options = options
        self.config = config
        self.tokenizer = tokenizer
        self.made_from = {}  # hashes of the reference, the preference model and the judge
        self.stepping = False  # inside steps(): the first signal waits for the step's end
        self.signal = None  # the one that waits
        self.open_here = contextlib.ExitStack()
        self.metrics = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:

            def open_folder():
                os.makedirs(self.options.stages, exist_ok=True)  # first: one that fails leaves none
                os.makedirs(self.options.out, exist_ok=True)
                stack.enter_context(locked(self.path(LOCK), self.options.out))
                folder.clear_unfinished(self.options.out)
                write_json(self.path("config.json"), self.config)

            parallel.from_first(open_folder)
            stack.enter_context(signals(self.on_signal))
            self.open_here = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.open_here.close()

    def path(self, name):
        return os.path.join(self.options.out, name)

    def begins_from(self, **paths):
        """Notes the weights that the run is made from, so that it is not resumed with others.

        paths:
            folders of the reference, preference and judge; None where no model was trained.
        """
        for name, path in paths.items():
            self.made_from[name] = None
            if path is not None:
                self.made_from[name] = file_hash(os.path.join(path, "model.safetensors"))

    def on_signal(self, number):
        """Ctrl-C and SIGTERM.

        The first one in a step waits for its end, any other ends the run at once.
        """
        if self.stepping and self.signal is None:
            self.signal = number
        else:
            raise KeyboardInterrupt(number)

    def steps(self, policy, optimizer, copies):
        """The clock: yields the numbers of the steps to do, and saves behind them.

        policy, optimizer, copies:
            brought to the last checkpoint first, if there is one. copies are models by name that
            lag behind the policy, as policy.lagging_copies returns them.

        Raises KeyboardInterrupt after the step in which a signal came to any of the processes, once
        that step is saved.
        """
        options = self.options
        begin = dict(self.made_from, step=0, metrics=0)
        state = restore(options, policy, optimizer, copies, begin)
        parallel.from_first(partial(self.go_on, state))
        label = f"alignment, {options.loss}"
        self.stepping = True
        progress.announce(label)
        steps = range(state["step"], options.steps)
        for step in progress.bar(label)(steps, desc=label, mininterval=1.0):
            yield step
            done = step + 1
            # Of all processes: they stop behind one step, or some would wait for ever.
            came = parallel.largest(self.signal or 0)
            if came or done % options.save_every == 0 or done == options.steps:
                parallel.from_first(partial(self.save, policy, optimizer, copies, done))
            if came:
                raise KeyboardInterrupt(came)
        self.stepping = False

    def go_on(self, state):
        """Makes the folder what it was behind the step of a checkpoint's state, or before any."""
        self.open_metrics(state)
        if state["step"]:  # a run that was killed behind it may have left more than --keep
            self.remove_old(self.checkpoint(state["step"]))

    def checkpoint(self, step):
        return self.path(f"checkpoint-{step:06d}")

    def remove_old(self, newest):
        """Removes the oldest checkpoints beyond --keep, up to the newest that is whole."""
        kept = checkpoints(self.options.out)
        for old in kept[: kept.index(newest) + 1][: -self.options.keep]:
            folder.remove(old)

    def open_metrics(self, state):
        """Opens metrics.jsonl behind the lines of a checkpoint: later ones are written again."""
        path = self.path("metrics.jsonl")
        kept = b""
        if state["metrics"]:
            digest = ""
            if os.path.exists(path):
                digest = file_hash(path, links=False, size=state["metrics"])
            if digest != state.get("metrics_hash", digest or None):  # older ones have none
                raise ValueError(
                    f"--resume: {path} is not as it was at step {state['step']}; "
                    "put it back, or give another --out"
                )
            with open(path, "rb") as file:
                kept = file.read(state["metrics"])
        # A new file of the same name: another program may have linked the old one.
        with folder.whole_file(path, "wb") as file:
            file.write(kept)
        self.metrics = self.open_here.enter_context(open(path, "a", encoding="utf-8"))

    def log(self, step, numbers):
        """Appends a line to metrics.jsonl; with --show a step's line is printed, too."""
        line = dict(step=step, **numbers)
        if self.metrics:
            append_line(self.metrics, line)
        if self.options.show and "loss" in numbers:
            shown = ", ".join(f"{name} {value:.6g}" for name, value in line.items())
            tqdm.write(f"whole batch: {shown}")

    def save(self, policy, optimizer, copies, step):
        """Writes OUT/checkpoint-STEP, whole or not at all; then removes the oldest beyond --keep.

        It is a policy folder, with the optimiser, the state and NAME.safetensors of each copy
        beside the weights.
        """
        metrics = self.path("metrics.jsonl")
        folder.sync(metrics)
        path = self.checkpoint(step)
        with folder.whole(path) as unfinished:
            policy.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            # Through memory: torch.save into a full disk dies in C++ without an OSError.
            buffer, moments = io.BytesIO(), optimizer.state_dict()
            torch.save(moments, buffer)
            with open(os.path.join(unfinished, "optimizer.pt"), "wb") as file:
                file.write(buffer.getbuffer())
            for name, model in copies.items():
                save_model(model, os.path.join(unfinished, f"{name}.safetensors"))
            written = self.metrics.tell()
            state = dict(
                self.made_from,
                step=step,
                metrics=written,
                metrics_hash=file_hash(metrics, size=written),
                moments=folder.steps_taken(moments),
                files=folder.hashes(unfinished),
            )
            write_json(os.path.join(unfinished, "state.json"), state)
        kept = checkpoints(self.options.out)
        # Later than this one are damaged ones, from before the run was resumed.
        for later in kept[kept.index(path) + 1 :]:
            folder.remove(later)
        self.remove_old(path)

    @contextlib.contextmanager
    def evidence(self, step, prompt, *responses_and_label):
        """Around an update.

        Pairs whose loss is not finite are kept in OUT/step-STEP.json, for a look at them; of a
        group all responses are.
        """
        *responses, label = responses_and_label
        try:
            yield
        except FloatingPointError as error:  # in all processes at once: the loss is of all rows
            path = self.path(f"step-{step}.json")
            pairs = {}
            names = ["y", "y_other", *(f"y{place}" for place in range(3, len(responses) + 1))]
            for name, part in zip(("prompt", *names), (prompt, *responses), strict=False):
                pairs[name] = sum(parallel.gather(part.lists()), [])
            pairs["label"] = sum(parallel.gather(label.tolist()), [])
            pairs["text"] = self.tokenizer.batch_decode(pairs["prompt"])
            parallel.from_first(partial(write_json, path, dict(pairs, step=step)))
            raise FloatingPointError(
                f"step {step}: {error}; its prompts and responses are in {path}, "
                "the weights as they were in the last checkpoint, if there is one"
            ) from None


def existing_run(options, data_hash):
    """What is in the run's folder already.

    options:
        of the run that is to begin or to go on.
    data_hash:
        of the records it learns from, or "built-in".

    Returns (this run's config, its summary if it has ended, else None). Raises ValueError if the
    folder holds another run, part of one without --resume, or something else.
    """
    config = {"data": data_hash, "version": version()}
    for name, value in vars(options).items():
        if name not in NEUTRAL:
            config[name] = value
    if options.preference:  # a file that was changed is another run
        config["preference_file"] = file_hash(options.preference)
    if options.preference_model:
        weights = os.path.join(options.preference_model, "model.safetensors")
        if os.path.isfile(weights):  # else it is refused later, by its option's name
            config["preference_model_file"] = file_hash(weights)
    out = options.out
    folder.check_names(out, options.steps)
    check_stages(options.stages)
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        # A kill may have left the lock, or half of the first file.
        if os.path.isdir(out) and set(os.listdir(out)) - {LOCK, "config.json.tmp"}:
            raise ValueError(f"--out {out}: is not a run's folder and not empty; give another")
        return config, None
    try:
        other = LATER | read_object(path, links=False)
    except ValueError:
        raise ValueError(f"--out {out}: its config.json is damaged; give another --out") from None
    changed = []
    for name, value in config.items():
        if other.get(name) != value:
            there = str(other.get(name))[:80]
            changed.append(f"{name} {there} there, {value} here")
    if changed:
        what = "; ".join(changed)
        raise ValueError(f"--out {out}: holds a different run ({what}); give another --out")
    if os.path.exists(os.path.join(out, "summary.json")):
        summary = finished(out)
        remove_left(os.path.join(out, LOCK))
        return config, summary
    if checkpoints(out) and not options.resume:
        raise ValueError(
            f"--out {out}: holds an unfinished run with checkpoints; "
            "add --resume to go on, or give another --out"
        )
    return config, None


def check_stages(path):
    """Raises ValueError if --stages is no folder, nor can be one: found before a run's is made."""
    first = os.path.abspath(path)
    while not os.path.lexists(first):
        first = os.path.dirname(first)
    if not os.path.isdir(first):
        raise ValueError(f"--stages {path}: {first} is no folder; give another")
    if not os.access(first, os.W_OK | os.X_OK):
        raise ValueError(f"--stages {path}: {first} cannot be written to; give another")


def finished(out):
    """The summary of a finished run. Raises ValueError if it, or the policy, is not as it was."""
    advice = "put it back, or remove summary.json and add --resume: the last checkpoint goes on"
    try:
        summary = read_object(os.path.join(out, "summary.json"), links=False)
        wrong = folder.wrong_file(os.path.join(out, "policy"), os.path.join(out, folder.MANIFEST))
    except ValueError as error:
        raise ValueError(f"--out {out}: {error}; {advice}") from None
    if wrong:
        raise ValueError(
            f"--out {out}: is finished, but policy/{wrong} is missing or not as it was written; "
            f"{advice}"
        )
    return summary


def restore(options, policy, optimizer, copies, state):
    """Loads the newest checkpoint that is whole into policy, optimizer and copies.

    copies:
        {name: model that lags behind the policy}.
    state:
        where a run without checkpoints begins, with the hashes of its reference, preference model
        and judge.

    Returns the checkpoint's state, or the given one if there is none. Raises ValueError if the
    checkpoint was made with another of these models.
    """
    for path in reversed(checkpoints(options.out)):
        try:
            with files.nothing_said():
                read = folder.read_checkpoint(path, options, policy, optimizer, copies)
        except Exception as error:  # torch's, safetensors' and json's own, of a damaged file
            if files.is_out_of_memory(error):
                raise
            folder.warn_damaged(path, error)
            continue
        found, weights, moments, of_copies = read
        for name in ("reference", "preference", "judge"):
            # Older checkpoints say nothing of the judge.
            if found.get(name, state[name]) != state[name]:
                raise ValueError(
                    f"--resume: {path} was made with another {name} model; give another --out"
                )
        policy.load_state_dict(weights, strict=False)  # the tied head is not in the file
        for name, model in copies.items():
            model.load_state_dict(of_copies[name], strict=False)
        optimizer.load_state_dict(moments)
        print(f"resumed at step {found['step']} from {path}")
        return found
    return state


def remove_left(path):
    """Removes a lock file that a run left which was killed behind its last line.

    Through the lock, which goes when its block is left: who holds it meanwhile is waited for.
    """
    if os.path.exists(path):
        with locked(path):
            pass


@contextlib.contextmanager
def locked(path, holder=None):
    """Holds the lock file of a path, which dies with the process and goes when the block is left.

    path:
        of the lock file; its folder exists.
    holder:
        the run's folder, to refuse with a ValueError if another run is in it; None to wait for the
        other.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=holder is None)
    except filelock.Timeout:
        raise ValueError(
            f"--out {holder}: another run is writing there; wait for its end or give another --out"
        ) from None
    try:
        yield
    finally:
        # While it is held: whoever waits for the removed file notices and takes a new one. Windows
        # refuses.
        with contextlib.suppress(OSError):
            os.unlink(path)
        lock.release()


@contextlib.contextmanager
def signals(handle):
    """Ctrl-C and SIGTERM call handle(number) inside."""

    def came(number, _frame):
        handle(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, came)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number):
    """The handler outside the steps: ends the run at once."""
    raise KeyboardInterrupt(number)
