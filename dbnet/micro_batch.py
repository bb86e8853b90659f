"""The samples of an optimizer step as the network gets them: in parts that fit into memory, at the size that fits."""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dbnet import distributed
from dbnet.config import STRIDE
from dbnet.geometry import padded
from dbnet.memory import BatchPlan


def micro_batches(batches: list[dict[str, Any]], plan: BatchPlan, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The tensors of `batches` on the device, in micro-batches and at the image size of the plan in force."""
    for batch in batches:
        for start in range(0, len(batch["image"]), plan.micro_batch):
            micro = {
                name: batch[name][start : start + plan.micro_batch].to(device, non_blocking=True)
                for name in ("image", "prob_map", "thresh_levels", "mask")
            }
            loaded_at = int(batch["side"][0])
            yield micro if loaded_at <= plan.image_size else resize_sample(micro, plan.image_size / loaded_at)


def as_many_on_each_rank(
    micros: Iterator[dict[str, Tensor]], batches: list[dict[str, Any]], plan: BatchPlan, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The micro-batches of `batches`, and empty ones where another rank has more: for a network whose layers wait for
    those of the other ranks. All ranks call it, before any of them can run out of memory."""
    count = sum(-(-len(batch["image"]) // plan.micro_batch) for batch in batches)
    missing = max(distributed.gather(count)) - count
    empty = {name: torch.zeros(0, STRIDE, STRIDE, device=device) for name in ("prob_map", "thresh_levels", "mask")}
    image = torch.zeros(0, STRIDE, STRIDE, 3, dtype=torch.uint8, device=device)
    return chain(micros, repeat({"image": image, **empty}, missing))


def resize_sample(micro: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Images and target maps loaded before a fallback of the image size, at the new size."""
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
