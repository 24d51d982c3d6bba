"""Two passes at the same time: their values, modes, errors, and processes made by fork."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import side_by_side


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def ctrl_c():
    """SIGINT raises, although a shell ignores it in what it starts behind itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_values_in_order_on_two_threads(two_threads):
    """Both run at once.

    Each waits for the other at a barrier, which one after the other would break.
    """
    barrier = threading.Barrier(2, timeout=10)

    def work(value):
        barrier.wait()
        return value, torch.get_num_threads()

    assert side_by_side.run([lambda: work("a"), lambda: work("b")], "cpu") == [("a", 1), ("b", 1)]
    assert torch.get_num_threads() == 2, "the caller keeps its own number"


def test_one_thread_or_one_work_stays_where_it_is(two_threads):
    def here():
        return threading.current_thread()

    assert side_by_side.run([here], "cpu") == [here()]
    torch.set_num_threads(1)
    assert side_by_side.run([here, here], "cpu") == [here()] * 2


@pytest.mark.parametrize("mode", ["no_grad", "autocast", "inference"])
def test_modes_are_the_callers(two_threads, mode):
    """grad, autocast and inference mode are kept by each thread: they must be handed over."""
    context = {
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode(),
    }[mode]
    weight = torch.ones(2, 2, requires_grad=True)

    def work():
        product = weight @ weight
        return product.requires_grad, product.dtype, product.is_inference()

    with context:
        expected = work()
        assert side_by_side.run([work, work], "cpu") == [expected] * 2
    assert side_by_side.run([work, work], "cpu") == [work()] * 2 != [expected] * 2


def test_gradients_pass_through(two_threads):
    """A loss of two passes on two threads has the gradient of one after the other, to the bit."""

    def gradient(threads):
        torch.set_num_threads(threads)
        weight = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
        one, two = side_by_side.run([lambda: weight.sin().sum(), lambda: weight.exp().sum()], "cpu")
        (one * two).backward()
        return weight.grad

    assert torch.equal(gradient(1), gradient(2))


def test_an_error_is_raised_after_both_have_ended(two_threads):
    ended = []

    def fails():
        raise FloatingPointError("wrong")

    def works():
        ended.append(True)

    with pytest.raises(FloatingPointError, match="wrong"):
        side_by_side.run([fails, works], "cpu")
    assert ended


def test_an_interrupt_is_raised_after_both_have_ended(two_threads, ctrl_c):
    """Ctrl-C reaches the waiting caller, and one raised in a work does as well."""
    ended = []

    def interrupted():
        # The main thread's handler raises while it waits; the work goes on to its end.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.append(True)

    def raises():
        raise KeyboardInterrupt

    for first in (interrupted, raises):
        with pytest.raises(KeyboardInterrupt):
            side_by_side.run([first, lambda: ended.append(True)], "cpu")
    assert len(ended) == 3
    assert side_by_side.run([lambda: 1, lambda: 2], "cpu") == [1, 2]


def test_a_later_thread_has_the_callers_number(two_threads):
    """torch gives a new thread the last number set anywhere: the pool's would slow it down."""
    side_by_side.pool.cache_clear()
    side_by_side.run([torch.get_num_threads] * 2, "cpu")
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


def test_works_may_run_works_side_by_side(two_threads):
    """With four threads: two works of two, and two of one in each. None waits for its own pool."""
    torch.set_num_threads(4)

    def inner():
        return side_by_side.run([torch.get_num_threads] * 2, "cpu")

    assert side_by_side.run([inner, torch.get_num_threads], "cpu") == [[1, 1], 2]


def test_a_program_that_used_it_ends():
    """Waiting threads hold no exit up, not even one by an error."""
    code = """
import torch, side_by_side
torch.set_num_threads(2)
side_by_side.run([int, int], "cpu")
raise SystemExit(3)
"""
    root = Path(side_by_side.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60)
    assert done.returncode == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    """A pool that a child took over from its parent would have no threads, and wait for ever."""
    assert side_by_side.run([lambda: 1, lambda: 2], "cpu") == [1, 2]
    child = os.fork()
    if child == 0:
        found = side_by_side.run([lambda: 1, lambda: 2], "cpu")
        os._exit(0 if found == [1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0
