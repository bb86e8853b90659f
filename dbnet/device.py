"""Device, precision, memory and processes of a run. PyTorch is imported where it is used: a process that runs
an exported network works without it.

Several processes work together as torchrun starts them. Training does not use DistributedDataParallel: between its
collective calls a process may run out of memory, and all must fall back together. So each accumulates its gradients
alone, one boolean of each says whether it got there (`all_gather`), and one call sums gradients, losses and batch norm
statistics (`all_reduce`). What the host decides (counts, saves, stops) goes through gloo and never waits for a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from dbnet.config import Config
from dbnet.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

_rank, _world_size = 0, 1
_distributed: Any = None  # torch.distributed, where there are several processes
_gpu_group: Any = None  # of collective calls on tensors of a GPU


def pick_device(name: str) -> torch.device:
    """The device of `--device`; under torchrun, a GPU of its own for each process. Raises UserError without one."""
    global _gpu_group
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # By default images of many shapes leave the memory in useless pieces. Read when the GPU is first used.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here; use auto, cpu, cuda or cuda:N") from None
    if world_size() == 1 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.index is not None:
        raise UserError(f"--device {name}: each process takes a GPU of its own under torchrun; leave it out")
    if local >= torch.cuda.device_count():
        raise UserError(f"torchrun --nproc-per-node: process {local + 1} finds {torch.cuda.device_count()} GPUs only")
    torch.cuda.set_device(local)
    if _gpu_group is None:
        _gpu_group = _distributed.new_group(backend="nccl")
    return torch.device("cuda", local)


def pick_amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on `device`, None for float32 throughout."""
    import torch

    if config.amp == "auto":
        if device.type == "cpu":
            return None
        # GPUs before Ampere only emulate bfloat16, at a fraction of the speed that they have with float16.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.amp]


def compile_model(model: torch.nn.Module, freeze: bool = False) -> None:
    """Compile `model` in place at its first call, for batches of any shape, and keep that in the user's cache folder.
    With `freeze`, for inference on a CPU, its weights become constants. Raises UserError without a C++ compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise UserError("--compile: needs a C++ compiler (g++, or CXX in the environment); leave it out")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "dbnet" / "inductor"))
    model.compile(dynamic=True, options={"freezing": freeze})


def peak_memory(device: torch.device) -> float:
    """Most memory that tensors took on the GPU, or the process on the host, in GB; 0 where the system does not say."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed arrays, in this process and in those forked from it. By default it maps each
    large array anew, and the system fills it with zeros: on a CPU, half of the time of a training step."""
    with suppress(AttributeError, OSError, TypeError):  # musl, macOS, Windows
        set_option = ctypes.CDLL(None).mallopt
        set_option(-4, 0)  # M_MMAP_MAX of glibc's malloc.h
        set_option(-1, -1)  # M_TRIM_THRESHOLD


def init_process_group() -> None:
    """Initialise the process group of the processes that torchrun has started, if it has."""
    global _rank, _world_size, _distributed
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _world_size > 1:
        return
    import torch.distributed as _distributed

    with _one_line_for_lost_processes():
        store, _rank, _world_size = next(_distributed.rendezvous("env://"))
        # torchrun's store still has the addresses of the processes that these may have been started in place of.
        attempt = _distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        _distributed.init_process_group("gloo", store=attempt, rank=_rank, world_size=_world_size)


def destroy_process_group() -> None:
    global _rank, _world_size, _gpu_group
    if _world_size > 1:
        _distributed.destroy_process_group()
        _rank, _world_size, _gpu_group = 0, 1, None


def rank() -> int:
    return _rank


def world_size() -> int:
    """Number of processes that work together."""
    return _world_size


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return _rank == 0


def print0(*words: Any, **how: Any) -> None:
    """Print, in the first process only."""
    if is_first():
        print(*words, **how)


def progress(items: Iterable[Value] | None, title: str = "", total: int | None = None, **how: Any) -> tqdm[Value]:
    """A progress bar over images, in the first process only."""
    settings = {"unit": "img", "leave": False, "dynamic_ncols": True, "smoothing": 0, "disable": not is_first()}
    return tqdm(items, title, total, **settings | how)


def all_reduce(numbers: torch.Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    if _world_size > 1:
        with _one_line_for_lost_processes():
            _distributed.all_reduce(numbers, group=_gpu_group if numbers.is_cuda else None)


def all_gather(value: Value) -> list[Value]:
    """The value of each process, in the order of their ranks, in every process. None waits for its device."""
    values = [value] * _world_size
    if _world_size > 1:
        with _one_line_for_lost_processes():
            _distributed.all_gather_object(values, value)
    return values


def from_first(compute: Callable[[], Value]) -> Value:
    """Result of `compute` in the first process, in every process: files need to be on its machine only. An error is
    raised in the first process; the others end without a message."""
    if _world_size == 1:
        return compute()
    answer: list[Any] = [None]
    try:
        if is_first():
            answer = [(compute(),)]
    finally:
        with _one_line_for_lost_processes():
            _distributed.broadcast_object_list(answer)
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
            raise UserError("out of memory in a collective call; lower --batch-size, go on with --resume") from None
        raise UserError("another process of the run has ended or cannot be reached; its own message says why") from None
