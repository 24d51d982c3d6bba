"""What lies in a run's folder or a kept stage's, and whether it is what was written there.

Files and folders get their names once their bytes are on the disk, and a folder that is to go
loses its name first: whoever finds a name finds all of what it stands for. Unfinished things end in
.tmp; a run that was killed leaves some, which go with its next start.
A manifest holds the SHA-256 of every file beside it. A checkpoint's state is one, and is compared
with the run, too: the step with the folder's name, the weights with the policy's names, shapes and
types, the optimiser's moments with the parameters.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import sys

import torch
from safetensors.torch import load_file

import files
from files import file_hash, read_object

LOCK = ".lock"
MANIFEST = "manifest.json"
FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.txt", "curves.png", MANIFEST)
CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
UNFINISHED = re.compile(
    rf"({'|'.join(map(re.escape, FILES))}|policy|checkpoint-\d+|step-\d+\.json)(\.old)?\.tmp"
)


def checkpoints(folder):
    """A run's checkpoint folders, oldest first. Those that it did not write are not among them."""
    found = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if CHECKPOINT.fullmatch(name) and is_checkpoint(path):
            found.append(path)
    return sorted(found, key=step_of)


def is_checkpoint(path):
    """Whether a folder is a checkpoint, whole or damaged: a link or a user's folder is none."""
    has = any(os.path.lexists(os.path.join(path, name)) for name in ("state.json", "optimizer.pt"))
    return has and os.path.isdir(path) and not os.path.islink(path)


def step_of(path):
    """The step in a checkpoint's name."""
    return int(CHECKPOINT.fullmatch(os.path.basename(path)).group(1))


def check_names(folder, steps):
    """Raises ValueError if a name that a run writes is taken by something else, or by a link.

    folder:
        the run's, which need not be there.
    steps:
        of the run: checkpoints of later ones are in nobody's way.
    """
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise ValueError(f"--out {folder}: is no folder; give another")
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        kind = os.lstat(path).st_mode
        fits = True
        if name in FILES or name == LOCK:
            fits = stat.S_ISREG(kind)
        elif name == "policy":
            fits = stat.S_ISDIR(kind)
        elif CHECKPOINT.fullmatch(name) and step_of(path) <= steps:
            fits = is_checkpoint(path)
        if not fits:
            what = "is a link" if stat.S_ISLNK(kind) else "is not what a run writes there"
            raise ValueError(f"--out {folder}: its {name} {what}; move it away")


def clear_unfinished(folder):
    """Removes what a killed run left half-written in its folder, which is locked."""
    for name in os.listdir(folder):
        if UNFINISHED.fullmatch(name):
            discard(os.path.join(folder, name))


def discard(path):
    """Removes a file, a link or a folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def remove(path):
    """Removes a folder, which loses its name first: nobody finds half of it."""
    gone = f"{path}.old.tmp"
    discard(gone)
    os.rename(path, gone)
    shutil.rmtree(gone)


@contextlib.contextmanager
def whole(path):
    """Gives an empty folder to write into, which gets its name once the block is done.

    If the block fails, the folder goes, and what had the name before keeps it.
    """
    unfinished = f"{path}.tmp"
    discard(unfinished)  # left by a run that was killed
    os.makedirs(unfinished)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if os.path.lexists(path):
        remove(path)
    publish(unfinished, path)


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


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Opens a file to write, which gets its name once the block is done; it goes if that fails."""
    unfinished = f"{path}.tmp"
    discard(unfinished)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(unfinished, mode, encoding=encoding) as file:
            yield file
        sync(unfinished)
    except BaseException:
        discard(unfinished)
        raise
    os.replace(unfinished, path)


def write_json(path, value):
    """Writes a file whole or not at all."""
    with whole_file(path) as file:
        json.dump(value, file, indent=1)


def append_line(file, record):
    """Appends a record to an open .jsonl file, at once."""
    file.write(json.dumps(record) + "\n")
    file.flush()


def hashes(folder):
    """SHA-256 of every file of a folder, by name."""
    names = sorted(os.listdir(folder))
    return {name: file_hash(os.path.join(folder, name), links=False) for name in names}


def wrong_file(folder, manifest):
    """The first file of a folder that is missing or not as a manifest says, or None.

    manifest:
        the path of the .json file that has them; one that is not there, as folders of before have
        none, finds nothing wrong.
    """
    if not os.path.lexists(manifest):
        return None
    for name, digest in read_object(manifest, links=False).items():
        try:
            same = file_hash(os.path.join(folder, name), links=False) == digest
        except (OSError, ValueError):
            same = False
        if not same:
            return name
    return None


# Checkpoints


def read_checkpoint(path, options, policy, optimizer, copies):
    """(state, weights, the optimiser's state, the copies' weights) of a checkpoint.

    options, policy, optimizer, copies:
        of the run, as job.run.restore takes them.

    Raises an error of any kind if it is damaged, or does not fit the run.
    """
    state = read_object(os.path.join(path, "state.json"), links=False)
    step, metrics, digests = state["step"], state["metrics"], state["files"]
    if type(step) is not int or step != step_of(path) or step > options.steps:
        raise ValueError("state.json: its step is none of this checkpoint")
    if type(metrics) is not int or metrics < 0:
        raise ValueError("state.json: its metrics are no number of bytes")
    needed = {"model.safetensors", "optimizer.pt", *(f"{name}.safetensors" for name in copies)}
    if missing := needed - digests.keys() or {"reference", "preference"} - state.keys():
        raise ValueError(f"state.json: says nothing of {min(missing)}")
    for name, digest in digests.items():
        if file_hash(os.path.join(path, name), links=False) != digest:
            raise ValueError(f"{name}: is not as it was written")
    weights = load_file(os.path.join(path, "model.safetensors"))
    check_weights(weights, policy)
    of_copies = {}
    for name, model in copies.items():
        of_copies[name] = load_file(os.path.join(path, f"{name}.safetensors"))
        check_weights(of_copies[name], model)
    file = os.path.join(path, "optimizer.pt")
    moments = torch.load(file, map_location=options.device, weights_only=True)  # nothing is run
    check_moments(moments, optimizer, state.get("moments"))
    return state, weights, moments, of_copies


def check_weights(weights, model):
    """Raises ValueError if weights are not all of a model's, by names, shapes and types.

    weights:
        {name: tensor} of a file, where a tied weight's second name is left out.
    """
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
            raise ValueError(f"model.safetensors: {name} is no weight of this policy")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"model.safetensors: {name} holds NaN or infinity")
    there = {own[name].data_ptr() for name in weights}
    for name, value in own.items():
        if value.numel() and value.data_ptr() not in there:
            raise ValueError(f"model.safetensors: lacks {name}")


def steps_taken(moments):
    """How many steps an optimiser took of each parameter: {number of the parameter, a text: int}.

    moments:
        the optimiser's state_dict().
    """
    return {str(number): int(values["step"]) for number, values in moments["state"].items()}


def check_moments(moments, optimizer, taken):
    """Raises an error if an optimiser's state does not fit its parameters and settings.

    taken:
        what steps_taken said when it was written; None in older checkpoints.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = []
    for group, there in zip(own, moments["param_groups"], strict=True):
        for name, value in group.items():
            if name != "lr" and there.get(name, value) != value:  # each step sets the rate
                raise ValueError(f"optimizer.pt: its {name} is not this run's")
    for group in optimizer.param_groups:
        parameters += group["params"]
    for number, values in moments["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if values[name].shape != parameters[number].shape:
                raise ValueError(f"optimizer.pt: the {name} of parameter {number} does not fit it")
            if not values[name].isfinite().all():
                raise ValueError(f"optimizer.pt: the {name} of parameter {number} is not finite")
    if not moments["state"] or taken is not None and steps_taken(moments) != taken:
        raise ValueError("optimizer.pt: lacks the moments of some parameters")


def warn_damaged(path, error):
    """Says on the standard error which checkpoint is passed over, and why."""
    reason = files.escaped(str(error).strip().partition("\n")[0]).replace(f"{path}/", "")
    what = f"{files.escaped(path)} is damaged ({reason})"
    print(f"warning: {what}; trying the checkpoint before it", file=sys.stderr)
