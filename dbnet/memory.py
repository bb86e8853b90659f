"""Memory: one plan of the batch in force, and one way to run a piece of work until it fits.

    plan = BatchPlan(batch_size=8, accumulate=2, image_size=1024)
    losses = run_until_it_fits(lambda: optimizer_step(samples, plan.micro_batch, plan.image_size), plan)

Training shrinks the micro-batch at a constant effective batch (8 x 2 -> 4 x 4 -> 2 x 8 -> 1 x 16), then the image
(1024 -> 896 -> 800, at the batch that it started with). Inference shrinks the batch alone, because another image
size would be another result.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dbnet import distributed
from dbnet.config import STRIDE
from dbnet.errors import UserError
from dbnet.geometry import padded

if TYPE_CHECKING:  # most of this is used without PyTorch
    import torch
    from torch import Tensor

Result = TypeVar("Result")

SMALLER_SIZES = (896, 800)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "failed to allocate",
    "unable to find an engine",  # of cuDNN: what it tried had no room to work in
    "unable to find a valid cudnn algorithm",
)


@dataclass
class BatchPlan:
    """How the samples of an optimizer step go through the network, and every fallback so far."""

    batch_size: int
    """micro-batch that the run was asked for"""

    accumulate: int = 1
    """accumulation that the run was asked for"""

    image_size: int | None = None
    """side of the images in force, in pixels; None where it must not change (inference)"""

    halvings: int = 0
    """how often the micro-batch in force is halved"""

    fallbacks: list[str] = field(default_factory=list)
    """a line for each fallback, oldest first"""

    @property
    def micro_batch(self) -> int:
        """Images that go through the network together now."""
        return max(1, self.batch_size >> self.halvings)

    @property
    def in_force(self) -> str:
        """Micro-batch x accumulation now, e.g. `4 x 4`."""
        return f"{self.micro_batch} x {-(-self.batch_size * self.accumulate // self.micro_batch)}"

    def shrink(self) -> None:
        """Go to the next smaller plan and say so in one line on stderr.

        Raises UserError, which says what was tried, when there is none.
        """
        before = self._describe()
        smaller = [size for size in SMALLER_SIZES if self.image_size is not None and size < self.image_size]
        if self.micro_batch > 1:
            self.halvings += 1
        elif smaller:
            self.image_size, self.halvings = smaller[0], 0
        else:
            tried = "; ".join([*self.fallbacks, f"{before} does not fit either"])
            raise UserError(
                f"out of memory: {tried}; lower --image-size, take a smaller --backbone, or use --device cpu"
            )
        self.fallbacks.append(f"{before} -> {self._describe()}")
        distributed.print0(f"\nout of memory: {self.fallbacks[-1]}", file=sys.stderr)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and logs."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The plan that `to_dict` made."""
        return cls(**values)

    def _describe(self) -> str:
        if self.image_size is None:
            return f"batch {self.micro_batch}"
        return f"{self.in_force} at {self.image_size} px"


def run_until_it_fits(work: Callable[[], Result], plan: BatchPlan, reset: Callable[[], None] = lambda: None) -> Result:
    """Call `work` until memory suffices, and `plan.shrink()` after each time that it does not.

    `work` must start from the beginning at each call and read the plan then. `reset` undoes what a half-done call
    left behind; it runs after the memory that the call held is free.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, past the except block, are the traceback and the tensors in its frames gone.
        reset()
        free_memory()
        plan.shrink()


class OutOfMemoryElsewhere(MemoryError):
    """Another process of the run has run out of memory, and all of them fall back together."""


def agree(fits: bool) -> None:
    """Say whether the memory of this rank sufficed, and hear it from the others; OutOfMemoryElsewhere if one's did not.

    All ranks make the same sequence of agreements, and one that runs out takes part in the next with its bad news,
    wherever in the step the others are: so nobody waits for it in vain.
    """
    if distributed.world_size() > 1 and any(distributed.sum_counts(not fits)) and fits:
        raise OutOfMemoryElsewhere("out of memory in another process")


@contextmanager
def all_or_none() -> Iterator[None]:
    """A part of an optimizer step that may run out of memory: it succeeds on all ranks, or on none.

    What follows must not run out: there, the ranks could no longer fall back together.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and not isinstance(error, OutOfMemoryElsewhere):
            agree(False)
        raise
    agree(True)


@contextmanager
def agreed() -> Iterator[None]:
    """What follows an agreement of several ranks: out of memory is the end of the run here, in one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if distributed.world_size() == 1 or not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory after the ranks had agreed on a step ({error}); lower --batch-size and go on with --resume"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the GPU's, the CPU allocator's or Python's way to say that memory ran out."""
    torch = sys.modules.get("torch")  # where nobody has imported it, none of its memory can be short
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)


def free_memory() -> None:
    """Give what no tensor uses back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Let the C library keep what arrays have freed for the next ones, in this process and those forked from it.

    By default glibc maps each large array anew, and the system fills it with zeros page by page: on a CPU that is half
    of the time of a training step (benchmarks/RESULTS.md). With another C library this does nothing.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    set_option(_M_MMAP_MAX, 0)
    set_option(_M_TRIM_THRESHOLD, -1)


def micro_batches(batches: list[dict[str, Any]], plan: BatchPlan, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The tensors of `batches` on the device, in micro-batches and at the image size of the plan in force."""
    for batch in batches:
        for start in range(0, len(batch["image"]), plan.micro_batch):
            micro = {
                name: batch[name][start : start + plan.micro_batch].to(device, non_blocking=True)
                for name in ("image", "prob_map", "thresh_levels", "mask")
            }
            loaded_at = int(batch["side"][0])
            side = plan.image_size or loaded_at
            yield micro if loaded_at <= side else resize_sample(micro, side / loaded_at)


def as_many_on_each_rank(
    micros: Iterator[dict[str, Tensor]], batches: list[dict[str, Any]], plan: BatchPlan, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of `batches`, and empty ones where another rank has more: for a network whose layers wait for
    those of the other ranks. All ranks call it, before any of them can run out of memory."""
    import torch

    count = sum(-(-len(batch["image"]) // plan.micro_batch) for batch in batches)
    missing = max(distributed.all_gather(count)) - count
    empty = {name: torch.zeros(0, STRIDE, STRIDE, device=device) for name in ("prob_map", "thresh_levels", "mask")}
    image = torch.zeros(0, STRIDE, STRIDE, 3, dtype=torch.uint8, device=device)
    return chain(micros, repeat({"image": image, **empty}, missing))


def resize_sample(micro: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Images and target maps loaded before a fallback of the image size, at the new size."""
    import torch
    from torch.nn import functional as F

    size = tuple(padded(round(side * scale)) for side in micro["image"].shape[1:3])

    def resize(maps: Tensor, **how: Any) -> Tensor:
        return F.interpolate(maps.float(), size=size, **how)

    image = resize(micro["image"].permute(0, 3, 1, 2), mode="bilinear", antialias=True)
    return {
        "image": image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1),
        "prob_map": resize(micro["prob_map"][:, None], mode="nearest-exact")[:, 0],
        "thresh_levels": resize(micro["thresh_levels"][:, None], mode="bilinear")[:, 0],
        "mask": resize(micro["mask"][:, None], mode="nearest-exact")[:, 0],
    }
