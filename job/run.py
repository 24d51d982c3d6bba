"""A run's folder and its clock: locks, checkpoints, signals, metrics. Nothing here changes a number
of the run.

A run that is killed at any moment goes on with --resume and ends in the same bits: a checkpoint
holds the weights and the optimiser, and no random state, since every generator is made from (seed,
stage, step). Files and folders get their names once their bytes are on the disk, so whoever finds
the name finds all of it.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import sys
from functools import partial

import filelock
import torch
from safetensors.torch import load_file, save_model
from tqdm import tqdm

import policy as policies
from job import parallel, progress
from job.versions import version

# Options that change nothing of a run's result: another value is no other run.
NEUTRAL = ("out", "stages", "resume", "save_every", "keep", "show")
# Options that came later than some configs, and what runs did before there were any.
LATER = dict(refresh=1, renew_reference=0, epochs=1, ptx=0.0, length_average=False)
LATER |= dict(preference_model=None)
LOCK = ".lock"


class Run:
    """An open run: `with Run(options, config, tokenizer) as run`.

    Inside the block the folder is locked, and a signal waits for the end of a step. Of several
    processes the first alone holds the lock and writes.
    """

    def __init__(self, options, config, tokenizer):
        self.options = options
        self.config = config
        self.tokenizer = tokenizer
        self.made_from = {}  # hashes of the reference and the preference model
        self.stepping = False  # inside steps(): the first signal waits for the step's end
        self.signal = None  # the one that waits
        self.open_here = contextlib.ExitStack()
        self.metrics = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:

            def open_folder():
                os.makedirs(self.options.out, exist_ok=True)
                stack.enter_context(locked(self.path(LOCK), self.options.out))
                write_json(self.path("config.json"), self.config)
                metrics = open(self.path("metrics.jsonl"), "a", encoding="utf-8")
                self.metrics = stack.enter_context(metrics)

            parallel.from_first(open_folder)
            stack.enter_context(signals(self.on_signal))
            self.open_here = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.open_here.close()

    def path(self, name):
        return os.path.join(self.options.out, name)

    def begins_from(self, reference_path, preference_path):
        """Notes the weights that the run is made from, so that it is not resumed with others.

        preference_path is None where no preference model was trained.
        """
        for name, folder in (("reference", reference_path), ("preference", preference_path)):
            self.made_from[name] = None
            if folder is not None:
                self.made_from[name] = file_hash(os.path.join(folder, "model.safetensors"))

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
        if self.metrics:
            self.metrics.truncate(state["metrics"])  # lines after the checkpoint are written again
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
        path = self.path(f"checkpoint-{step:06d}")
        unfinished = f"{path}.tmp"
        sync(self.path("metrics.jsonl"))
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        policy.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        # Through memory: torch.save into a full disk dies in C++ without an OSError.
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        with open(os.path.join(unfinished, "optimizer.pt"), "wb") as file:
            file.write(buffer.getbuffer())
        names = ["model.safetensors", "optimizer.pt"]
        for name, model in copies.items():
            names.append(f"{name}.safetensors")
            save_model(model, os.path.join(unfinished, names[-1]))
        files = {name: file_hash(os.path.join(unfinished, name)) for name in names}
        state = dict(self.made_from, step=step, metrics=self.metrics.tell(), files=files)
        write_json(os.path.join(unfinished, "state.json"), state)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step
        publish(unfinished, path)
        kept = checkpoints(self.options.out)
        # Later than this one are damaged ones, from before the run was resumed.
        later = kept[kept.index(path) + 1 :]
        for old in [*later, *kept[: kept.index(path) + 1][: -self.options.keep]]:
            shutil.rmtree(old)

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
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        # A kill may have left the lock, or half of the first file.
        if os.path.isdir(out) and set(os.listdir(out)) - {LOCK, "config.json.tmp"}:
            raise ValueError(f"--out {out}: is not a run's folder and not empty; give another")
        return config, None
    try:
        other = LATER | dict(read_json(path))
    except (ValueError, TypeError):
        raise ValueError(f"--out {out}: its config.json is damaged; give another --out") from None
    changed = []
    for name, value in config.items():
        if other.get(name) != value:
            changed.append(f"{name} {other.get(name)} there, {value} here")
    if changed:
        what = "; ".join(changed)
        raise ValueError(f"--out {out}: holds a different run ({what}); give another --out")
    summary = os.path.join(out, "summary.json")
    if os.path.exists(summary):
        return config, read_json(summary)
    if checkpoints(out) and not options.resume:
        raise ValueError(
            f"--out {out}: holds an unfinished run with checkpoints; "
            "add --resume to go on, or give another --out"
        )
    return config, None


def checkpoints(folder):
    """A run's checkpoint folders, oldest first."""
    names = [name for name in os.listdir(folder) if name.startswith("checkpoint-")]
    return sorted(os.path.join(folder, name) for name in names if not name.endswith(".tmp"))


def restore(options, policy, optimizer, copies, state):
    """Loads the newest checkpoint that is whole into policy, optimizer and copies.

    copies:
        {name: model that lags behind the policy}.
    state:
        where a run without checkpoints begins, with the hashes of its reference and preference
        model.

    Returns the checkpoint's state, or the given one if there is none. Raises ValueError if the
    checkpoint's reference or preference model is another.
    """
    for path in reversed(checkpoints(options.out)):
        try:
            found, weights, moments = read_checkpoint(path, options.device)
            of_copies = {name: load_file(f"{path}/{name}.safetensors") for name in copies}
        except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = policies.first_line(error)
            warning = f"warning: {path} is damaged ({reason}); trying the checkpoint before it"
            print(warning, file=sys.stderr)
            continue
        for name in ("reference", "preference"):
            if found[name] != state[name]:
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


def read_checkpoint(path, device):
    """(state, weights, the optimiser's state) of a checkpoint.

    Raises an error of any kind if it is damaged.
    """
    state = read_json(os.path.join(path, "state.json"))
    for name, digest in state["files"].items():
        if file_hash(os.path.join(path, name)) != digest:
            raise ValueError("a file is not as it was written")
    weights = load_file(os.path.join(path, "model.safetensors"))
    optimizer = os.path.join(path, "optimizer.pt")
    moments = torch.load(optimizer, map_location=device, weights_only=True)  # nothing in it is run
    return state, weights, moments


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


def publish(unfinished, path):
    """Gives a folder its name once its bytes are on the disk.

    Whoever finds the name finds all of it.
    """
    for name in os.listdir(unfinished):
        sync(os.path.join(unfinished, name))
    if os.name == "posix":  # elsewhere a folder cannot be opened
        sync(unfinished)
    os.rename(unfinished, path)


def sync(path):
    """Waits until a file, or on Unix a folder, is on the disk."""
    # Windows flushes only what was opened for writing.
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def file_hash(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(file, record):
    """Appends a record to an open .jsonl file, at once."""
    file.write(json.dumps(record) + "\n")
    file.flush()


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value):
    """Writes a file whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    sync(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
