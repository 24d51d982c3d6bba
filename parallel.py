"""Several processes: what the copies of train.py that torchrun starts have in common. Without torchrun nothing here does anything.

Data parallel: every process holds the policy, the reference and the preference model whole, samples for its share of the prompts,
and DistributedDataParallel averages the gradients. Rank 0 makes the stages, evaluates and writes; the folders must be shared.
Left out: weights split over devices (FSDP), stages made in parallel, runs that go on after a process has died.
Run: torchrun --nproc_per_node=2 train.py --loss ipo_md
"""

import contextlib
import datetime
import os
import sys

import torch
from torch import distributed


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def world():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(device):
    """Joins the group that torchrun announces, by nccl on CUDA and gloo on the CPU. Ranks above 0 print nothing more."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Long, because the others wait while rank 0 makes a stage; a process that dies is noticed at once.
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=24))
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # closed with the process


def share(tensors):
    """This process's rows of every tensor: rank, rank + world, ..."""
    return tuple(part[rank() :: world()] for part in tensors)


def replicate(policy):
    """The policy as its gradients are averaged over the processes. Sampling goes on with the policy itself."""
    return policy if world() == 1 else torch.nn.parallel.DistributedDataParallel(policy, broadcast_buffers=False)


def hold(policy, last):
    """Around all micro-batches but the last: gradients add up here and are averaged once."""
    return contextlib.nullcontext() if last or world() == 1 else policy.no_sync()


def total(numbers):
    """Sums of a list of numbers over all processes, as a list."""
    if world() == 1:
        return numbers
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(summed)
    return summed.tolist()
