"""Memory: the batch in force, what is tried next when memory runs out, and micro-batches.

Training (train.optimizer_step) shrinks the micro-batch at a constant effective batch (8 x 2 -> 4 x 4 -> 2 x 8 ->
1 x 16), then the image (1024 -> 896 -> 800, at the batch that it started with). Inference (`run_until_it_fits`) shrinks
the batch only, because another image size would give another result."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from dbnet.dataset import Batch
from dbnet.device import Value, print0
from dbnet.errors import UserError, is_out_of_memory
from dbnet.geometry import padded

if TYPE_CHECKING:  # most of this is used without PyTorch
    import torch

SMALLER_SIZES = (896, 800)
_TENSORS = ("image", "prob_map", "thresh_levels", "mask")  # of a batch, that go to the device


@dataclass
class BatchPlan:
    """Micro-batch, accumulation and image size in force, and every fallback so far."""

    batch_size: int  # micro-batch asked for
    accumulate: int = 1  # micro-batches of an optimizer step asked for, in each process
    image_size: int | None = None  # in force, in pixels; None where it must not change (inference)
    halvings: int = 0  # of the micro-batch so far
    fallbacks: list[str] = field(default_factory=list)  # a line for each, oldest first

    @property
    def micro_batch(self) -> int:
        """Images that go through the network together now."""
        return max(1, self.batch_size >> self.halvings)

    @property
    def in_force(self) -> str:
        """Micro-batch x accumulation now, e.g. `4 x 4`."""
        return f"{self.micro_batch} x {-(-self.batch_size * self.accumulate // self.micro_batch)}"

    def shrink(self) -> None:
        """Go to the next smaller plan and say so. Raises UserError, with what was tried, where there is none."""
        before = self._describe()
        smaller = [size for size in SMALLER_SIZES if self.image_size is not None and size < self.image_size]
        if self.micro_batch > 1:
            self.halvings += 1
        elif smaller:
            self.image_size, self.halvings = smaller[0], 0
        else:
            tried = "; ".join([*self.fallbacks, f"{before} does not fit either"])
            fix = "lower --image-size, take a smaller --backbone, or use --device cpu"
            raise UserError(f"out of memory: {tried}; {fix}")
        self.fallbacks.append(f"{before} -> {self._describe()}")
        print0(f"\nout of memory: {self.fallbacks[-1]}", file=sys.stderr)

    def _describe(self) -> str:
        return f"{self.in_force} at {self.image_size} px" if self.image_size else f"batch {self.micro_batch}"


def run_until_it_fits(work: Callable[[], Value], plan: BatchPlan) -> Value:
    """Call `work`, which reads the plan, from its beginning until memory suffices, each time under a smaller plan."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, past the except block, are the traceback and the tensors in its frames gone.
        free_memory()
        plan.shrink()


def free_memory() -> None:
    """Return cached memory that no tensor uses to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def micro_batches(batches: list[Batch], plan: BatchPlan, device: torch.device) -> Iterator[Batch]:
    """The tensors of `batches` on the device, in micro-batches and at the image size of the plan in force. A GPU copies
    each of them while it works on the one before."""
    import torch

    stream = _copy_stream(device)
    copies = _copies(batches, plan, device, stream)
    following = next(copies, None)
    while following:
        micro, loaded_at = following
        if stream:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)  # for this copy: the following one has not been asked for
            for tensor in micro.values():
                tensor.record_stream(computing)  # nothing else gets its memory before that is done
        following = next(copies, None)
        side = plan.image_size or loaded_at
        yield micro if loaded_at <= side else resize_sample(micro, side / loaded_at)


def _copies(batches: list[Batch], plan: BatchPlan, device: torch.device, stream: Any) -> Iterator[tuple[Batch, int]]:
    """Micro-batches on the device, copied on `stream`, and the image size that each was loaded at."""
    import torch

    for batch in batches:
        loaded_at = int(batch["side"].numpy()[0])  # on the host, so nothing waits for the device
        for start in range(0, len(batch["image"]), plan.micro_batch):
            part = slice(start, start + plan.micro_batch)
            with torch.cuda.stream(stream) if stream else nullcontext():
                micro = {name: batch[name][part].to(device, non_blocking=True) for name in _TENSORS}
            yield micro, loaded_at


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream of all copies to a GPU: one, because each keeps the memory that was freed on it."""
    import torch

    return torch.cuda.Stream(device) if device.type == "cuda" else None


def resize_sample(micro: Batch, scale: float) -> Batch:
    """Images and target maps loaded before a fallback of the image size, at the new size."""
    from torch.nn import functional as F

    size = tuple(padded(round(side * scale)) for side in micro["image"].shape[1:3])
    modes = {"prob_map": "nearest-exact", "thresh_levels": "bilinear", "mask": "nearest-exact"}
    maps = {name: F.interpolate(micro[name][:, None].float(), size, mode=mode)[:, 0] for name, mode in modes.items()}
    image = F.interpolate(micro["image"].permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True)
    return {**maps, "image": image.round().clamp(0, 255).byte().permute(0, 2, 3, 1)}
