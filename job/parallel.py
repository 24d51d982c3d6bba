"""Several processes that are one run: torchrun starts them, each takes its rows of every batch.

Every process holds all models and makes the same draws' uniforms for the whole batch, of which it
keeps its rows; gradients are summed over all of them before each step. So N processes take the
steps that one would take, up to the order in which numbers are added, and a run may go on with
another number of processes.
The gradients are added once a step, after the last backward pass, as one long vector. PyTorch's
DistributedDataParallel would send them while the backward pass still runs, but asks for a second
name of the policy, averages where a sum is meant, and needs care with micro-batches. What that
would hide, by two processes on one CPU: 2 ms of the default's step of 0.3 s, 0.65 s of a step of
GPT-2 124M that takes tens of seconds (python -m studies.processes).
Left out: weights that are split over devices (FSDP, tensor parallelism): see torchtitan or TRL.
Run: torchrun --nproc-per-node=2 train.py --loss ipo_md
     torchrun --nnodes=2 --node-rank=0 --nproc-per-node=8 --master-addr=HOST train.py ...    and 1

With several machines, --out, --stages and the data lie where all of them see them.
"""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed

# For ever: process 0 may wait for another run that makes a stage. A process that dies is noticed
# at once, its connections close and torchrun ends the others.
PATIENCE = datetime.timedelta(days=30)
LOST = (
    "no answer from another process of this run, which may have ended; "
    "what is saved is kept, --resume goes on from there"
)


def rank():
    """This process's number, from 0; process 0 alone writes and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size():
    """The number of processes, 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Joins the processes that torchrun started, and parts from them; alone it does nothing.

    Inside, all but process 0 are silent. Yields say(line), which writes a line on the standard
    error unless another process has: what all of them find out is said once.
    """
    # All of what torchrun sets: a cluster's own WORLD_SIZE alone starts no other process.
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if not launched or os.environ.get("WORLD_SIZE", "1") == "1" or distributed.is_initialized():
        yield lambda line: print(line, file=sys.stderr)
        return
    if torch.cuda.is_available():
        # The remainder: more processes than GPUs is right with --device cpu.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        store, number, count = next(distributed.rendezvous("env://"))
        distributed.init_process_group(
            backends(), store=store, rank=number, world_size=count, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"error: cannot join the run's other processes: {reason}")
    loud = sys.stderr

    def say(line):
        """A count that all processes share says who came first."""
        with contextlib.suppress(RuntimeError):  # the machine that keeps it may be gone: say it
            if store.add("lines said", 1) > 1:
                return
        print(line, file=loud)

    try:
        with contextlib.ExitStack() as muted:
            if number > 0:
                nothing = muted.enter_context(open(os.devnull, "w"))
                muted.enter_context(contextlib.redirect_stdout(nothing))
                muted.enter_context(contextlib.redirect_stderr(nothing))
            yield say
    finally:
        distributed.destroy_process_group()


def backends():
    """Who carries what: gloo the CPU's tensors, nccl CUDA's where there is a GPU.

    Both are named: unnamed, a process with a GPU gets nccl alone, which carries no numbers and no
    objects from the CPU, and refuses two processes of --device cpu that share that GPU.
    """
    if torch.cuda.is_available() and distributed.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


@contextlib.contextmanager
def lost_is_named():
    """Inside, the many errors of a connection that closed become one ConnectionError.

    With the library's reason: of two processes that share a GPU, say, nccl tells why it will not.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, too, but this process's own
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(f"{LOST} ({reason[:400]})") from None


def share(count, least=1):
    """Which of count rows are this process's, as a slice: parts in order, even but for one row.

    count:
        the rows of all processes.
    least:
        how many every process must get, 0 or 1; ValueError if there are too few.
    """
    if count < size() * least:
        raise ValueError(
            f"{size()} processes are more than the {count} rows of a batch; start fewer"
        )
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def total(numbers):
    """The sums over the processes of numbers by name, {name: float}, in every process."""
    if size() == 1:
        return numbers
    summed = torch.tensor(list(numbers.values()), dtype=torch.float64)
    with lost_is_named():
        distributed.all_reduce(summed)
    return dict(zip(numbers, summed.tolist(), strict=True))


def add_gradients(parameters):
    """Makes every process's gradients the sums of all processes'.

    parameters:
        with gradients after the backward pass, equal ones in every process; changed in place.
    """
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with lost_is_named():
        distributed.all_reduce(flat)
    summed = flat.split([gradient.numel() for gradient in gradients])
    for gradient, values in zip(gradients, summed, strict=True):
        gradient.copy_(values.view_as(gradient))


def gather(value):
    """The values of all processes, in their order, as a list. value: anything that can be sent."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with lost_is_named():
        distributed.all_gather_object(values, value)
    return values


def from_first(work):
    """What work() returns or raises in process 0, in every process; the others do not call it.

    work:
        a function without arguments that looks at files, or writes them.
    """
    if size() == 1:
        return work()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    with lost_is_named():
        distributed.broadcast_object_list(answer, src=0)
    value, error = answer
    if error is not None:
        raise error
    return value


def largest(number):
    """The largest of the processes' whole numbers, in every process."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    with lost_is_named():
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return found.item()
