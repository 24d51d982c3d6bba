"""A limit for tests of rough input: what hangs fails, and says that it hung.

Of the processor's time: how long anything takes by the wall says more of a busy machine than of the
program. Waiting, as for a pipe, takes none of it, so the wall has a limit, too, of minutes.
"""

import contextlib
import signal
import subprocess

import pytest

CPU = 30  # seconds; what these tests do takes one or two of them, torch's import some five
WALL = 300


class Hung(BaseException):
    """Not an Exception: who reads somebody's files takes any of those for the file's fault."""


@contextlib.contextmanager
def within(cpu=CPU):
    """Fails the test if what is inside takes longer; in the main thread. No limit on Windows.

    cpu:
        seconds of all threads, in the program and in the system's calls for it.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, cpu, f"took {cpu} s of the processor"),
        signal.ITIMER_REAL: (signal.SIGALRM, WALL, f"waited for {WALL} s"),
    }
    before, rung = {}, []

    def ring(number, _frame):
        for _, (its_number, _, said) in timers.items():
            if number == its_number:
                rung.append(f"hung: {said}")
        raise Hung(rung[-1])

    for timer, (number, seconds, _) in timers.items():
        before[number] = signal.signal(number, ring)
        signal.setitimer(timer, seconds)
    try:
        yield
    except BaseException:
        if not rung:  # else it is Hung, or what somebody made of it
            raise
    finally:
        for timer, (number, _, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    if rung:
        pytest.fail(rung[0])


def limit_itself():
    """Called in a new process before its program begins: over its limit it dies of SIGXCPU."""
    import resource  # here: Unix has it

    resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 5))


def end_of(program):
    """(exit status, standard error) of a subprocess.Popen begun with limit_itself. It is killed,
    and the test fails, if it hangs."""
    try:
        _, error = program.communicate(timeout=WALL)
    except subprocess.TimeoutExpired:
        program.kill()
        pytest.fail(f"hung: {program.args} waited for {WALL} s")
    if program.returncode == -signal.SIGXCPU:
        pytest.fail(f"hung: {program.args} took {CPU} s of the processor")
    return program.returncode, error
