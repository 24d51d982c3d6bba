"""How a program ends that is stopped, or whose output nobody takes: one line, the right status."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from job import report, terminal
from limit import end_of, limit_itself

ROOT = Path(__file__).resolve().parent.parent
MANY = "import stopping\nfor _ in range(9999): print('x' * 99)"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and devices of Unix")


def python(*words, **given):
    """A program in a process of its own: (status, its standard error's lines)."""
    given = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) | given
    given["env"] = dict(os.environ, PYTHONUNBUFFERED="")  # or each print would be a write
    status, error = ended([sys.executable, *words], **given)
    return status, (error or "").splitlines()


def ended(words, **given):
    """(exit status, standard error) of a program."""
    with subprocess.Popen(words, cwd=ROOT, text=True, preexec_fn=limit_itself, **given) as program:
        return end_of(program)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("code", ["import stopping; print('x')", MANY])
def test_a_full_output(code):
    """Full at the end, or while it is printed: status 1 and a line; the latter has a traceback
    only where no command catches it."""
    with open("/dev/full", "w") as full:
        status, error = python("-c", code, stdout=full)
    assert status == 1 and "No space left" in error[-1]
    assert len(error) == 1 or code is MANY


def test_a_reader_that_left():
    read, write = os.pipe()
    os.close(read)
    assert python("-c", MANY, stdout=write) == (1, ["stopped: the reader of the output has left"])
    os.close(write)


def test_closed_streams_are_nothing():
    """A file that is opened does not take the standard output's number, and what is printed."""
    code = "import stopping, os, sys; print('x'); print('y', file=sys.stderr)"
    code += "; sys.exit(os.open(os.devnull, os.O_RDONLY))"
    shell = f'exec "{sys.executable}" -c "{code}" >&- 2>&-'
    assert ended(["sh", "-c", shell])[0] > 2


def test_what_is_shown_is_escaped():
    """And what the stream has no letters for; a stream that fails says which it is, once."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    shown = terminal.Shown(stream)
    print("a\x1b]0;title\x07 \udcff ä", file=shown)
    shown.flush()
    assert stream.buffer.getvalue() == b"a\\x1b]0;title\\x07 \\udcff \\xe4\n"

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the standard output: No space"):
        terminal.Shown(Full()).write("x")


@pytest.mark.parametrize("saves", [True, False])
def test_endings(saves):
    """Every expected error has its status and one line; control characters are escaped."""
    endings = {
        KeyboardInterrupt(signal.SIGTERM): 143,
        KeyboardInterrupt(): 130,
        MemoryError(): 2,
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."): 2,
        OSError("a\x1b[31m\nb"): 2,
        ValueError("a\x1b[31m\nb"): 2,
        BrokenPipeError(errno.EPIPE, "Broken pipe"): 2,
        ConnectionError("another process"): 1,
    }
    for error, status in endings.items():
        found, line = report.ending(error, saves)
        assert found == status and line.isprintable() and ("--resume" in line) <= saves, error


USAGE = {
    "nothing": ([], "required"),
    "no such option": (["a", "b", "--nope"], "--nope"),
    "no prompts": (["a", "b", "--prompts", ""], "--prompts: is empty"),
    "no judge": (["a", "b", "--judge", " "], "--judge: is empty"),
    "no policy": (["", "b"], "a: is empty"),
    "count 0": (["a", "b", "--count", "0"], "--count: 0: give"),
    "count, a word": (["a", "b", "--count", "x"], "--count: x: give"),
    "count 10^400": (["a", "b", "--count", "1" + "0" * 400], "--count"),
    "seed -1": (["a", "b", "--seed", "-1"], "--seed"),
    "seed 2^64": (["a", "b", "--seed", str(2**64)], "--seed"),
    "max-response-tokens 0": (["a", "b", "--max-response-tokens", "0"], "--max-response-tokens"),
    "no such folder": (["./nowhere", "b"], "./nowhere: no such folder"),
}


@pytest.mark.parametrize("case", USAGE)
def test_evaluates_usage_errors(case, capsys):
    argv, expected = USAGE[case]
    assert evaluate.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1
    assert expected in error


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.5, 1.5])
@pytest.mark.parametrize(
    "words", [["train.py"], ["evaluate.py", "a", "b"], ["bandit.py"], ["-m", "studies.solvers"]]
)
def test_interrupted_while_it_imports(words, wait):
    """Torch takes seconds: one line and 130, from the first moments on."""
    begins = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def heard():  # a shell ignores the signal for what it starts behind itself
        limit_itself()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen([sys.executable, *words], preexec_fn=heard, **begins) as program:
        time.sleep(wait)
        program.send_signal(signal.SIGINT)
        assert end_of(program) == (130, "stopped\n")
