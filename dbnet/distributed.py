"""Several processes that work together, as torchrun starts them, on one machine or several. Alone, all of it is free.

    distributed.init()                             # nothing in a process that runs by itself
    device = distributed.pick_device("auto")       # each process has a GPU of its own
    [images] = distributed.sum_counts(len(batch))  # over all processes
    rows = distributed.all_gather(rows)            # the rows of each process, in every process

Training does not use DistributedDataParallel: between its collective calls a process may run out of memory, and all
must fall back together. So each accumulates its gradients alone, one boolean says whether all got there
(`all_processes`), and one call sums gradients, losses and batch norm statistics (`all_reduce`). What the host decides
(counts, saves, stops) goes through gloo and never waits for a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dbnet.errors import UserError, is_out_of_memory

if TYPE_CHECKING:  # only several processes need PyTorch
    import torch
    from torch import Tensor

Value = TypeVar("Value")

_rank, _world_size = 0, 1
_gpu_group: Any = None  # of collective calls on tensors of a GPU


def init() -> None:
    """Initialise the process group where torchrun has started several processes."""
    global _rank, _world_size
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _world_size > 1:
        return
    import torch.distributed as dist

    with _one_line_for_lost_processes():
        dist.init_process_group("gloo")
    _rank, _world_size = dist.get_rank(), dist.get_world_size()


def destroy() -> None:
    """Destroy the process group, at the end of the work."""
    global _rank, _world_size, _gpu_group
    if _world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
        _rank, _world_size, _gpu_group = 0, 1, None


def rank() -> int:
    """Number of this process, from 0."""
    return _rank


def world_size() -> int:
    """Number of processes that work together."""
    return _world_size


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def print0(*words: Any, **how: Any) -> None:
    """Print, in the first process only."""
    if is_first():
        print(*words, **how)


def pick_device(name: str) -> torch.device:
    """The device of `--device` for this process; under torchrun, each process of a machine has a GPU of its own.

    Raises UserError where there is none for it.
    """
    global _gpu_group
    import torch
    import torch.distributed as dist

    from dbnet.device import pick_device as pick_one

    device = pick_one(name)
    if world_size() == 1 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.index is not None:
        raise UserError(f"--device {name}: each process takes a GPU of its own under torchrun; leave it out")
    if local >= torch.cuda.device_count():
        raise UserError(f"torchrun --nproc-per-node: process {local + 1} finds {torch.cuda.device_count()} GPUs only")
    torch.cuda.set_device(local)
    if _gpu_group is None:
        _gpu_group = dist.new_group(backend="nccl")
    return torch.device("cuda", local)


def sum_counts(*values: int) -> list[int]:
    """The sum of each value over the processes. All of them call it; none waits for its device."""
    if world_size() == 1:
        return [int(value) for value in values]
    import torch
    import torch.distributed as dist

    sums = torch.tensor([int(value) for value in values])
    with _one_line_for_lost_processes():
        dist.all_reduce(sums)
    return sums.tolist()


def all_processes(flag: bool) -> bool:
    """Whether `flag` is true in all processes. All of them call it."""
    return sum_counts(not flag) == [0]


def all_reduce(numbers: Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    with _one_line_for_lost_processes():
        dist.all_reduce(numbers, group=_gpu_group if numbers.is_cuda else None)


def all_gather(value: Value) -> list[Value]:
    """The value of each process, in the order of their ranks, in every process."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    with _one_line_for_lost_processes():
        dist.all_gather_object(values, value)
    return values


def from_first(compute: Callable[[], Value]) -> Value:
    """Result of `compute` in the first process, in every process: files need to be on its machine only.

    A UserError is raised in the first process; the others end without a message.
    """
    if world_size() == 1:
        return compute()
    import torch.distributed as dist

    answer: list[Any] = [None]
    error = None
    if is_first():
        try:
            answer = [(compute(),)]
        except UserError as mistake:
            error = mistake
    with _one_line_for_lost_processes():
        dist.broadcast_object_list(answer)
    if error:
        raise error
    if answer[0] is None:
        sys.exit(2)
    return answer[0][0]


@contextmanager
def _one_line_for_lost_processes() -> Iterator[None]:
    """Turn the failure of a collective call into a one-line error."""
    try:
        yield
    except RuntimeError as error:  # DistError, or gloo's own
        if is_out_of_memory(error):
            line = "out of memory in a collective call; lower --batch-size and go on with --resume"
        else:
            line = "another process of the run has ended or cannot be reached; its own message says why"
        raise UserError(line) from None
