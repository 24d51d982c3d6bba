"""The limit on tests of rough input: what hangs is ended and fails, whatever catches exceptions."""

import os
import signal
import subprocess
import sys

import pytest

import limit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="timers and limits of Unix")


def compute():
    while True:
        pass


def wait():
    os.read(os.pipe()[0], 1)  # for ever: nobody writes


def blame_a_file():
    """As policy.load_tokenizer, which takes a panic for the file's fault."""
    try:
        compute()
    except BaseException:
        raise ValueError("the file is damaged") from None


@pytest.mark.parametrize("hangs", [compute, wait, blame_a_file])
def test_what_hangs_fails(monkeypatch, hangs):
    """And the handlers and timers are as they were."""
    monkeypatch.setattr(limit, "WALL", 1 if hangs is wait else 300)
    before = signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)
    with pytest.raises(pytest.fail.Exception, match="hung: "), limit.within(cpu=0.2):
        hangs()
    assert (signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_PROF)[0] == signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_does_not_hang_is_left_alone():
    with pytest.raises(ValueError, match="own"), limit.within():
        raise ValueError("its own")


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(999)"])
def test_a_program_that_hangs_fails(monkeypatch, code):
    """Of a second of the processor, or two by the wall; nothing is left running."""
    monkeypatch.setattr(limit, "CPU", 1)
    monkeypatch.setattr(limit, "WALL", 2 if "sleep" in code else 300)
    words = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(words, preexec_fn=limit.limit_itself) as program:
        with pytest.raises(pytest.fail.Exception, match="hung: "):
            limit.end_of(program)
    assert program.returncode < 0
