"""Files and folders that somebody may have changed: read within bounds, or refused in one line.

A model's folder comes from anywhere, and a run's folder lies where everybody writes. What is in
them is data: nothing in them is run, no pipe or device is waited for, nothing is read without end,
and no number in a config makes a program compute for ever.
Left out: files in the hub client's own cache, which checks them itself.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import sys

import torch
from safetensors import safe_open

LARGEST_JSON = 2**26  # bytes of a config, a state or a summary, which have a few thousand
# What transformers reads of a folder, and what is an object {...} in each.
OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
# A terminal obeys these, and the last of them turn the direction of writing.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check_regular(path, links=True):
    """Raises ValueError if a path is no regular file, OSError if it is not there.

    links:
        False if it may not be a link to one either.
    """
    mode = (os.stat if links else os.lstat)(path).st_mode
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path}: is a link; put the file itself there")
    if not stat.S_ISREG(mode):  # a pipe keeps its reader waiting, some devices never end
        raise ValueError(f"{path}: is no file; put one there")


def read_object(path, links=True):
    """The object {...} of a .json file as a dict. Arguments as check_regular.

    Raises ValueError, in one line that names the file, if it holds anything else.
    """
    check_regular(path, links)
    with open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"{path}: longer than {LARGEST_JSON} bytes, for what is written there")
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is damaged: it holds no object {{...}}")
    return found


def file_hash(path, links=True, size=None):
    """SHA-256 of a file, or of its first size bytes, as hexadecimal digits.

    links:
        as check_regular, which it asks first.
    """
    check_regular(path, links)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def check_model_folder(folder):
    """Raises ValueError if a folder with a model is not to be read: its config, weights, tokenizer.

    folder:
        a local folder. Links in it are followed, as the hub client's cache has them.
    """
    names = sorted(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(READ) and not os.path.isdir(path):
            check_regular(path)
    for name in OBJECTS:
        if os.path.lexists(os.path.join(folder, name)):
            read_object(os.path.join(folder, name))
    if "adapter_config.json" in names:
        raise ValueError("holds an adapter; merge it into its model and give that")
    config = os.path.join(folder, "config.json")
    found = tensors_of_folder(folder)
    if found and os.path.exists(config):
        check_layers(read_object(config), len(found))


def tensors_of_folder(folder):
    """The tensors of all .safetensors files of a folder: {name: its shape, a list}."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found |= tensors(os.path.join(folder, name))
    return found


def tensors(path):
    """The tensors of a .safetensors file, by its head alone: {name: its shape, a list}."""
    check_regular(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def check_layers(config, most):
    """Raises ValueError if a config asks for more layers than there are tensors.

    config:
        a dict, with dicts in it.
    most:
        the number of tensors. Building a million layers takes hours before any weight is missed.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_layers(value, most)
        # A max_window_layers stands there whatever the number of layers.
        elif "layer" in name and "max" not in name and isinstance(value, int) and value > most:
            raise ValueError(
                f"its config says {name} {value}"[:60] + f", its weights are {most} tensors"
            )


def check_shapes(found, model):
    """Raises ValueError if weights have another shape than a model's of the same name.

    found:
        {name: shape} of a file or folder.
    model:
        may be on the device meta, which has shapes and no numbers.
    """
    wanted = model.state_dict()
    for name, shape in found.items():
        if name in wanted and list(wanted[name].shape) != shape:
            shapes = f"the shape {shape}, its config asks for {list(wanted[name].shape)}"
            raise ValueError(f"the weights {name} have {shapes}")


def check_finite(model):
    """Raises ValueError naming the first of a model's weights that holds NaN or infinity."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the weights {name} hold NaN or infinity; give others")


def is_out_of_memory(error):
    """Whether an exception says that memory is full: the CPU's allocator has no class for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def nothing_said():
    """Inside, nothing is written on the standard error, not even by a library in C++ or Rust.

    Around a reader of somebody's files: what it says of them comes as an exception, too.
    """
    with contextlib.suppress(Exception):  # none, or a test's own
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def escaped(text):
    r"""A text with its control characters written out, such as \x1b; line ends and tabs stay."""
    return CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)
