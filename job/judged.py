"""A preference from a user's own file: a person, an API, a rule, a judge model.

FILE.py holds a function on lists of texts, in the policy's own words without special tokens:

    def preference(prompts, ys, ys_other):  # the shorter is better, the more surely the shorter
        lengths = [(len(y), len(other)) for y, other in zip(ys, ys_other)]
        return [(1 + other) / (2 + one + other) for one, other in lengths]

It returns a number for each pair, p(y > y' | x) in [0, 1], as a list, tuple, array or tensor. The
file is code that is run, with the rights of whoever started the run; its own folder is not on the
import path. Everything that it returns is checked, and whatever it raises ends the run in one line
that names the file.

What it costs: every step asks for its pairs once, and the first call of all asks a second time,
with y and y' exchanged, since p(y > y') + p(y' > y) must be 1. Where the file judges, too, every
evaluation asks for its prompts. Of several processes each asks for its own rows. A resumed run is
the same to the bit only if the file answers the same question the same way.
Left out: batches of its own size, answers kept from run to run; the file can do both itself.
"""

import os
import sys
import traceback
import types

import torch

import policy as policies

# How far p(y > y') + p(y' > y) may be from 1: an API's two decimals pass, a bias does not.
TOLERANCE = 0.01


class Asked:
    """FILE.py as a preference on tokens: asked(prompt, y, y_other) -> p(y > y' | x).

    option:
        that named the file, such as "--preference", for messages.
    path:
        of FILE.py, which is run here.
    tokenizer:
        of the policy, to make texts of tokens.

    Raises ValueError, in one line that names option and file, if there is no such file, it cannot
    be run or has no function preference.
    """

    def __init__(self, option, path, tokenizer):
        self.path = path
        self.name = f"{option} {path}"
        self.tokenizer = tokenizer
        self.function = self.find_function()
        self.checked = False  # whether it was asked in both orders

    def __call__(self, prompt, y, y_other):
        """The file's p(y > y' | x) of every pair.

        prompt, y, y_other:
            Tokens with a row a pair.

        Returns [B] in [0, 1], float32, on the prompt's device. Raises ValueError, naming the file,
        for anything else that the function returns, and for what it raises.
        """
        parts = (prompt, y, y_other)
        texts = [
            self.tokenizer.batch_decode(part.lists(), skip_special_tokens=True) for part in parts
        ]
        # The file's own models compute as they would without --dtype bfloat16.
        with torch.autocast(prompt.ids.device.type, enabled=False):
            p = self.ask(*texts)
            if not self.checked:
                self.check_orders(p, self.ask(texts[0], texts[2], texts[1]))
                self.checked = True
        return p.to(prompt.ids.device)

    def ask(self, prompts, ys, ys_other):
        """One call of the function: [B] on the CPU, checked. Arguments: B texts each."""
        count = len(prompts)
        try:
            returned = self.function(prompts, ys, ys_other)
        except (Exception, SystemExit) as error:
            raise self.failure(error) from None
        p = self.numbers(returned)
        if p.shape != (count,):
            raise ValueError(
                f"{self.name}: preference returned numbers of shape {list(p.shape)} for "
                f"{count} pairs; return a list of {count}"
            )
        wrong = ~((p >= 0) & (p <= 1))  # NaN fails every comparison
        if wrong.any():
            row = wrong.nonzero()[0].item()
            raise ValueError(
                f"{self.name}: preference returned {p[row].item():.8g} for pair {row + 1} of "
                f"{count}; return probabilities from 0 to 1"
            )
        return p

    def numbers(self, returned):
        """What the function returned as a float32 tensor on the CPU."""
        try:
            # Arrays and tensors, wherever they are, become lists of plain numbers first.
            plain = returned.tolist() if hasattr(returned, "tolist") else returned
            return torch.tensor(plain, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = type(returned).__name__
            raise ValueError(
                f"{self.name}: preference returned no numbers but {kind} "
                f"{returned!r:.40}; return a list of probabilities".replace("\n", " ")
            ) from None

    def check_orders(self, forth, back):
        """Raises ValueError where p(y > y') + p(y' > y) is not 1. forth, back: [B] each."""
        off = (forth + back - 1).abs()
        row = off.argmax().item()
        if off[row] > TOLERANCE:
            raise ValueError(
                f"{self.name}: p(y > y') is {forth[row].item():g} and p(y' > y) "
                f"{back[row].item():g} for pair {row + 1} of {len(off)}, which must add up to 1; "
                "average both orders: (p(y, y') + 1 - p(y', y)) / 2"
            )

    def find_function(self):
        """Runs the file and returns its function preference."""
        if not os.path.isfile(self.path):
            raise ValueError(f"{self.name}: no such file; give a .py file")
        module = types.ModuleType("preference_file")
        module.__file__ = self.path
        sys.modules[module.__name__] = module  # dataclasses and pickles look there
        try:
            # By hand, not by import: an import leaves its bytecode beside the user's file.
            with open(self.path, "rb") as file:
                exec(compile(file.read(), self.path, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            raise self.failure(error) from None
        function = getattr(module, "preference", None)
        if not callable(function):
            raise ValueError(
                f"{self.name}: has no function preference; "
                "define preference(prompts, ys, ys_other), which returns probabilities"
            )
        return function

    def failure(self, error):
        """An exception of the file's as a ValueError of one line: where, what kind, what it says.

        The line is the file's own, however deep in a library the exception arose.
        """
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == self.path]
        if isinstance(error, SyntaxError) and error.filename == self.path:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        kind = type(error).__name__
        said = policies.first_line(error)
        what = kind if said == kind else f"{kind}: {said}"
        return ValueError(f"{self.name}{where}: {what}")


def asked_file(options, tokenizer):
    """--preference's file as a preference, or None without the option.

    options:
        of the run.
    tokenizer:
        of the policy.
    """
    if options.preference is None:
        return None
    return Asked("--preference", options.preference, tokenizer)
