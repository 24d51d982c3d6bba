"""How a program ends that somebody stops, or whose output nobody takes. Import it first of all.

Torch takes seconds to import, and Ctrl-C in them would print a traceback: what is set here holds
from the first line on. An output that is closed, full, or a pipe whose reader has left, is one
line, too. Nothing in here changes what a program does otherwise.
Left out: signals in a run, which wait for the end of a step (job/run.py).
"""

import atexit
import contextlib
import os
import signal
import sys


def is_command():
    """Whether this is imported by one of the project's commands, at its beginning."""
    if sys.argv[:1] == ["-m"]:  # python -m studies.NAME, whose file is not read yet
        return True
    path = getattr(sys.modules["__main__"], "__file__", None) or ""
    here = os.path.dirname(os.path.abspath(__file__))
    return os.path.dirname(os.path.abspath(path)) == here


def end_at_once(number, _frame):
    """In place of KeyboardInterrupt, which an import may swallow, or take for its own failure."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def begun():
    """From here on Ctrl-C is a KeyboardInterrupt: a program that says more of it calls this."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def open_closed():
    """Opens those of standard input, output and error that are closed, on nothing.

    Otherwise the next file that is opened takes the number, and gets what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def give_up(stream):
    """Turns a stream that cannot be written to nothing: what waits in it would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def in_one_line(kind, error, trace):
    """In place of sys.excepthook: Ctrl-C and a reader that left are no mistakes of the program."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        give_up(sys.stdout)
        print("stopped: the reader of the output has left", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def flush_at_the_end():
    """Writes what waits for the standard output; exit status 1 and a line if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        give_up(sys.stdout)
    except OSError as error:
        give_up(sys.stdout)
        print(f"error: cannot write the standard output: {error.strerror}", file=sys.stderr)
        os._exit(1)  # registered first, this is the last that is done
    except ValueError:  # it was closed on purpose
        pass


open_closed()
# Not where a shell ignores the signal for what it starts behind itself.
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
sys.excepthook = in_one_line
atexit.register(flush_at_the_end)
