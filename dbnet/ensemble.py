"""Networks that look at an image together: the mean probability map of several checkpoints, sizes and mirror images.

Each network sees images of its own size. Its maps are brought to the geometry of the first one's, and averaged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dbnet.checkpoint import load_model
from dbnet.config import Config
from dbnet.device import compile_model, pick_amp_dtype, pick_device
from dbnet.errors import UserError
from dbnet.geometry import Letterbox, in_windows, inference_side, padded
from dbnet.images import Size
from dbnet.memory import BatchPlan
from dbnet.model import prepare_for_cpu

TTA_SCALES = (1.0, 0.75, 1.25)  # sizes of test-time augmentation, as multiples of image_size
MOST_THREADS = 4  # images that a CPU looks at side by side, at most: each needs the memory of a network at work


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, where inference takes half of the time."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class View(NamedTuple):
    """One look at an image of this longer side in pixels, or at its mirror image, by a network that makes
    (N, height, width) float32 probabilities of (N, height, width, 3) uint8 images."""

    model: nn.Module
    side: int
    flip: bool = False


class Ensemble:
    """One view of an image, or several whose probability maps are averaged, each with the same weight. `config` is the
    first network's: it says the size and the precision of the maps, and how they become polygons."""

    def __init__(self, views: Sequence[View], config: Config, device: torch.device, origin: str = "") -> None:
        """With `origin`, the names of files, maps that are not finite are an error; in training, they are no text."""
        self.views, self.config, self.device, self.origin = list(views), config, device, origin
        self.sides: tuple[int, ...] = (config.image_size, *sorted({view.side for view in views} - {config.image_size}))
        cores = torch.get_num_threads()
        self.threads = 1 if config.compile else min(MOST_THREADS, cores)
        self.cores_each = cores // self.threads

    @classmethod
    def of(cls, model: nn.Module, config: Config, device: torch.device) -> Self:
        """A single network with one view of an image, also where `config.tta` is set: training validates with it."""
        return cls([View(model, config.image_size)], config, device)

    @classmethod
    def load(cls, paths: Sequence[Path], changes: dict[str, Any]) -> Self:
        """The networks of these checkpoints, on the device of the first one's configuration, with `changes` to all.
        With `tta`, each looks at TTA_SCALES, and at mirror images too if it was trained with them. Raises UserError
        where a file is no checkpoint or the device does not exist."""
        loaded = [load_model(path, changes)[:2] for path in paths]
        config = loaded[0][1]
        device = pick_device(config.device)
        if device.type == "cpu" and config.amp == "auto" and has_fast_bf16():
            config = config.changed(amp="bf16")
        views = []
        for model, own in loaded:
            model.to(device).to(memory_format=torch.channels_last)
            if config.compile:
                compile_model(model, freeze=device.type == "cpu")
            elif device.type == "cpu":
                prepare_for_cpu(model, pick_amp_dtype(config, device))
            flips = (False, True) if config.tta and own.flip_p else (False,)
            sides = [padded(round(scale * own.image_size)) for scale in (TTA_SCALES if config.tta else (1.0,))]
            views += [View(model, side, flip) for side in sides for flip in flips]
        return cls(views, config, device, " ".join(map(str, paths)))

    def __str__(self) -> str:
        """What looks at an image, for the line that a script prints: `resnet34, 1024 px`."""
        networks = len({view.model for view in self.views})
        of = f"{networks} networks" if networks > 1 else self.config.backbone
        px = " + ".join(map(str, sorted(self.sides)))
        return f"{of}, {px} px" + (f", {len(self.views)} views" if len(self.views) > networks else "")

    def begin_thread(self) -> None:
        """As `inference.Network` says."""
        torch.set_num_threads(self.cores_each)

    @torch.inference_mode()
    def infer(
        self, images: Sequence[np.ndarray | Tensor], sizes: list[tuple[int, int]], plan: BatchPlan
    ) -> Callable[[], np.ndarray]:
        """As `inference.Network` says, without waiting for the device."""
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = False  # each shape of a batch would be measured anew
        for view in self.views:
            if view.model.training:
                view.model.eval()
        batches = {side: torch.as_tensor(batch) for side, batch in zip(self.sides, images, strict=True)}
        parts = [slice(start, start + plan.micro_batch) for start in range(0, len(sizes), plan.micro_batch)]
        mean_maps = [self._mean_map({side: batches[side][part] for side in self.sides}, sizes[part]) for part in parts]
        mean_map = torch.cat(mean_maps)
        results = [mean_map.isfinite().all(), mean_map.nan_to_num_().round_().to(torch.uint8)]
        if self.device.type != "cpu":
            on_host = [torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for result in results]
            results = [host.copy_(result, non_blocking=True) for host, result in zip(on_host, results, strict=True)]
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))

        def prob_maps() -> np.ndarray:
            if self.device.type != "cpu":
                arrived.synchronize()
            if self.origin and not results[0]:
                raise UserError(f"{self.origin}: gives no finite probabilities; try --amp off, or another checkpoint")
            return results[1].numpy()

        return prob_maps

    def _mean_map(self, images: dict[int, Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """(N, height, width) float32, 0..255, on the device: the mean over the views of images given at each size."""
        amp_dtype = pick_amp_dtype(self.config, self.device)
        resized = {
            side: [Letterbox(*size, inference_side(*size, side, self.config.enlarge)).resized for size in sizes]
            for side in self.sides
        }
        first, shape = self.sides[0], images[self.sides[0]].shape[1:3]
        total = torch.zeros((), device=self.device)
        for view in self.views:
            batch = images[view.side].to(self.device, non_blocking=True)
            if view.flip:
                batch = mirrored(batch, resized[view.side])
            with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype is not None):
                prob_map = in_windows(view.model, batch, view.side, torch.cat)
            if view.flip:
                prob_map = mirrored(prob_map, resized[view.side])
            if view.side != first:
                prob_map = fitted(prob_map, resized[view.side], resized[first], shape)
            total = total + prob_map
        return total.mul_(255 / len(self.views))


def mirrored(batch: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """(N, height, width, ...) images or maps, each mirrored left and right within the (width, height) that it fills."""
    mirrored = batch.clone()
    for image, (width, _) in zip(mirrored, sizes, strict=True):
        image[:, :width] = image[:, :width].flip(1)
    return mirrored


def fitted(prob_maps: Tensor, sizes: list[Size], new_sizes: list[Size], shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) maps: of each of the (N, height, width) `prob_maps` the (width, height) that it fills, resized."""
    fitted = prob_maps.new_zeros(len(prob_maps), *shape)
    for new, old, (width, height), (new_width, new_height) in zip(fitted, prob_maps, sizes, new_sizes, strict=True):
        filled, size = old[None, None, :height, :width], (new_height, new_width)
        new[:new_height, :new_width] = F.interpolate(filled, size=size, mode="bilinear", antialias=True)
    return fitted
