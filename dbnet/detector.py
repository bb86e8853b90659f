"""The detector as a library: load a checkpoint once, then hand it images."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from dbnet.checkpoint import load_model
from dbnet.config import Config
from dbnet.device import pick_device
from dbnet.errors import UserError
from dbnet.geometry import Letterbox, padded
from dbnet.images import read_image
from dbnet.inference import infer, read_off
from dbnet.memory import BatchPlan
from dbnet.model import DBNet


class Text(NamedTuple):
    """One detected piece of text."""

    polygon: np.ndarray
    """(n, 2) int array, x and y in pixels of the upright image"""

    score: float
    """mean probability inside the polygon's region, 0..1"""


class Detector:
    """A trained network with its configuration, ready for single images."""

    def __init__(self, model: DBNet, config: Config, device: torch.device) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.config = config
        self.device = device

    @classmethod
    def load(cls, path: str | Path, device: str | None = None, **changes: Any) -> Self:
        """Load a checkpoint onto `device` (auto by default), with fields of its configuration changed by keyword.

        Raises UserError where the file is no checkpoint or the device does not exist.
        """
        model, config, _ = load_model(Path(path), changes)
        return cls(model, config, pick_device(device or "auto"))

    def detect(self, image: str | Path | np.ndarray) -> list[Text]:
        """Text in an image file, or in (height, width, 3) uint8 RGB pixels that stand upright.

        Raises UserError for a file that cannot be read or an array of another kind.
        """
        side = self.config.image_size
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise UserError(f"takes (height, width, 3) uint8 RGB pixels, not {image.shape} {image.dtype}")
            pixels, size = image, (image.shape[1], image.shape[0])
        else:
            pixels, size = read_image(Path(image), side)
        pixels = Letterbox(*size, side).resize(pixels)
        height, width = pixels.shape[:2]
        canvas = torch.zeros(1, padded(height), padded(width), 3, dtype=torch.uint8)
        canvas[0, :height, :width] = torch.from_numpy(pixels)
        prob_map = infer(self.model, canvas, self.config, self.device, BatchPlan(1)).numpy()[0]
        polygons, scores = read_off(prob_map[:height, :width], size, self.config)
        return [Text(polygon, score) for polygon, score in zip(polygons, scores, strict=True)]
