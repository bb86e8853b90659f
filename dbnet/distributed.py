"""Several processes that work together: what torchrun starts, on one machine or on several. Alone, all of it is free.

    distributed.init()                            # no-op in a process that runs by itself
    device = distributed.pick_device("auto")      # each process has a GPU of its own
    [images] = distributed.sum_counts(len(batch))  # over all ranks
    rows = distributed.all_gather(rows)            # the rows of each rank, on every rank

Training does not use DistributedDataParallel. Between its collective calls a rank may run out of memory, and all of
them must fall back then; so the loop accumulates gradients locally, the ranks agree that everybody got there
(`memory.all_or_none`), and only then gradients and losses are added up, in one call (`all_reduce`) an optimizer step.
What the host decides (counts, saves, stops) goes through gloo and never waits for a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from dbnet.errors import UserError

if TYPE_CHECKING:  # PyTorch is needed by several processes only: who works alone need not have it
    import torch
    from torch import Tensor

Value = TypeVar("Value")

_NAME = "dbnet/run"  # in torchrun's store
_rank, _world_size = 0, 1
_on_device: Any = None  # the group of collective calls on tensors of a GPU


def init() -> None:
    """Meet the other processes that torchrun has started; in a process that runs alone, do nothing."""
    global _rank, _world_size
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _world_size > 1:
        return
    import torch.distributed as dist

    store = _agent_store()
    with _while_others_live():
        if store:
            # In torchrun's store are still the addresses of the processes that these may be started in place of.
            attempt = dist.PrefixStore(f"dbnet/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", store=attempt, rank=number, world_size=count)
        else:
            dist.init_process_group("gloo")
    _rank, _world_size = dist.get_rank(), dist.get_world_size()


def destroy() -> None:
    """Part from the others in good order, at the end of the work."""
    global _rank, _world_size, _on_device
    if _world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
        _rank, _world_size, _on_device = 0, 1, None


def rank() -> int:
    """Number of this process, from 0."""
    return _rank


def world_size() -> int:
    """How many processes work together."""
    return _world_size


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def print0(*words: Any, **how: Any) -> None:
    """Print, in the first process only."""
    if is_first():
        print(*words, **how)


def pick_device(name: str) -> torch.device:
    """The device of `--device` for this process: under torchrun, the GPUs of a machine are dealt out one a process.

    Raises UserError where there is none for it.
    """
    global _on_device
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
    if _on_device is None:
        _on_device = dist.new_group(backend="nccl")
        dist.all_reduce(torch.zeros(1, device="cuda"), group=_on_device)  # it allocates what it needs at the first call
    return torch.device("cuda", local)


def sum_counts(*values: int) -> list[int]:
    """The sum of each value over the ranks. All of them call it; none waits for its device."""
    if world_size() == 1:
        return [int(value) for value in values]
    import torch
    import torch.distributed as dist

    sums = torch.tensor([int(value) for value in values])
    with _while_others_live():
        dist.all_reduce(sums)
    return sums.tolist()


def all_gather(value: Value) -> list[Value]:
    """The value of each rank, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    with _while_others_live():
        dist.all_gather_object(values, value)
    return values


def from_first(compute: Callable[[], Value]) -> Value:
    """What `compute` gives in the first process, on every rank: files need to be on its machine only.

    Where that is a UserError, it is raised there and the other processes end without a word.
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
    with _while_others_live():
        dist.broadcast_object_list(answer)
    if error:
        raise error
    if answer[0] is None:
        sys.exit(2)
    return answer[0][0]


def remember(name: str) -> None:
    """Keep the name of the run for the processes that torchrun may start in place of these."""
    if is_first() and (store := _agent_store()):
        store.set(_NAME, name)


def remembered() -> str | None:
    """What `remember` kept before torchrun started these processes in place of others (--max-restarts). All ranks call
    it."""
    return from_first(_read_name)


def _read_name() -> str | None:
    store = _agent_store()
    return store.get(_NAME).decode() if store and store.check([_NAME]) else None


def _agent_store() -> Any:
    """What lives as long as torchrun itself, where it offers that."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def all_reduce(numbers: Tensor) -> None:
    """Replace a tensor by its sum over the ranks."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    with _while_others_live():
        dist.all_reduce(numbers, group=_on_device if numbers.is_cuda else None)


@contextmanager
def _while_others_live() -> Iterator[None]:
    """Turn the end of a process at the other end of a collective call into one line."""
    try:
        yield
    except RuntimeError:  # DistError, or gloo's own
        raise UserError("another process of the run has ended or cannot be reached; its own message says why") from None
