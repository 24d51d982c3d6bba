"""Two passes that wait for nothing of each other, at the same time on one CPU.

Policy and reference read the same tokens, each with its own weights. One after the other, each
would share its small matrix products out over all cores, which gains little: threads spend their
time waiting for each other at every product. Side by side each has half of the cores to itself.
Left out: CUDA, which runs what it is given in order and has its own ways to overlap.
Run: python side_by_side.py    (two passes, their values and what a thread sees)
"""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def run(works, device):
    """Calls every work; where it pays, two at a time, each on a thread of its own.

    works:
        functions without arguments. None may change what another reads.
    device:
        where their tensors are. On CUDA, or where torch has one thread, they run one after
        the other in the calling thread, and so does a work that is alone.

    Returns their values, in order. Waits for all of them; what a work raises is raised here, the
    first one's first. Values and gradients are those of one after the other but for float
    rounding: a product that is shared out over another number of threads may add in another order.
    """
    threads = torch.get_num_threads()
    if len(works) < 2 or threads < 2 or torch.device(device).type != "cpu":
        return [work() for work in works]
    state = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
    }
    # By process: a fork copies the pool but not its threads, and would wait for them for ever.
    threads_of_two = pool(os.getpid(), threads // 2)
    futures = []
    try:
        for work in works:
            futures.append(threads_of_two.submit(as_caller, work, **state))
        wait(futures)
    finally:
        # Ctrl-C comes while waiting: nothing may go on behind the caller's back.
        wait(futures)
    return [future.result() for future in futures]


def as_caller(work, grad, inference, autocast, dtype, cache):
    """work() under the caller's grad and autocast modes, which torch keeps for each thread."""
    with (
        torch.inference_mode(inference),
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", dtype, enabled=autocast, cache_enabled=cache),
    ):
        return work()


@functools.cache
def pool(process, threads):
    """Two waiting threads, kept until the process ends.

    process:
        its id; a part of the key only.
    threads:
        over how many torch shares out one operation of each. A work that itself runs others side
        by side has half of these for them, in a pool of their own.
    """
    before = torch.get_num_threads()
    both = threading.Barrier(2)
    made = ThreadPoolExecutor(2, "side by side", limit_threads, (threads,))
    wait([made.submit(both.wait), made.submit(both.wait)])
    # Each thread keeps its own number, but one that starts later takes the last that was set
    # anywhere in the process: that must be the caller's again.
    torch.set_num_threads(before)
    return made


def limit_threads(threads):
    """Sets over how many threads torch shares out an operation of the calling thread."""
    torch.set_num_threads(threads)
    # A thread's first question makes it take the last number set anywhere: asked now, while that is
    # this one.
    torch.get_num_threads()


def worked_example():
    """Prints two passes' values, one after the other and side by side, and their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    matrix = torch.arange(6.0, dtype=torch.float64).view(2, 3)

    def squares():
        return (matrix @ matrix.T).tolist()

    def doubles():
        return (2 * matrix).tolist()

    def where():
        return threading.current_thread().name, torch.get_num_threads()

    print("one after the other:", squares(), doubles())
    print("side by side:       ", *run([squares, doubles], "cpu"))
    print("alone, a work runs in   ", *run([where], "cpu"))
    for name, threads in run([where, where], "cpu"):
        print(
            "of two works, one runs in", name.rstrip("_01"), "with", threads, "thread an operation"
        )
    torch.set_num_threads(before)


if __name__ == "__main__":
    worked_example()
