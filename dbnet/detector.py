"""The detector as a library: load a checkpoint once, then hand it images.

    detector = Detector.load("best.pt")
    for polygon, score in detector.detect("receipt.jpg"):
        ...

A detector has no state that a call changes, so several threads may use one at the same time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
from PIL import Image, ImageOps

from dbnet.config import Config
from dbnet.dataset import ImageDataset
from dbnet.errors import UserError
from dbnet.geometry import Letterbox
from dbnet.images import to_rgb
from dbnet.inference import Detection, Network, Pipeline, load_network, shipped_weights

Picture = str | Path | np.ndarray | Image.Image


class Text(NamedTuple):
    """One detected piece of text."""

    polygon: np.ndarray
    """(n, 2) int array, x and y in pixels of the upright image"""

    score: float
    """mean probability inside the polygon's region, 0..1"""


class Detector:
    """A trained network with its configuration, ready for images.

    An image is a file, a Pillow image of any mode, or an array of (height, width, 3) uint8 pixels. Files and Pillow
    images are turned upright by their EXIF orientation. Arrays are taken to stand upright, and to be RGB: for those of
    OpenCV, which are BGR, say `bgr=True`.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.config = network.config

    @classmethod
    def load(
        cls, path: str | Path | Sequence[str | Path] | None = None, device: str | None = None, **changes: Any
    ) -> Self:
        """Load a checkpoint or an exported .onnx file; of several checkpoints, the probability maps are averaged.

        Without a path, the weights that come with the program. `device` is auto, cpu, cuda or cuda:N (auto); fields of
        the configuration are changed by keyword, e.g. `box_thresh=0.4, tta=True`.

        Raises UserError where a file is no checkpoint, the device does not exist, or a field does not take the value.
        """
        if path is None:
            path = shipped_weights()
        paths = [path] if isinstance(path, str | Path) else path
        return cls(load_network([Path(each) for each in paths], changes | {"device": device or "auto"}))

    def detect(self, image: Picture, bgr: bool = False) -> list[Text]:
        """Text in an image, best first.

        Raises UserError for a file that cannot be read or an array of another kind.
        """
        return self.detect_batch([image], bgr)[0]

    def detect_batch(self, images: Sequence[Picture], bgr: bool = False) -> list[list[Text]]:
        """The text in each of the images, in their order; images of like shape go through the network together.

        Raises as `detect` does.
        """
        found: list[list[Text]] = [[] for _ in images]
        for detection in self._run(images, bgr):
            found[detection.index] = [Text(*each) for each in zip(detection.polygons, detection.scores, strict=True)]
        return found

    def prob_map(self, image: Picture, bgr: bool = False) -> np.ndarray:
        """(height, width) uint8, the probability of text x 255, of the image resized to image_size at its longer side.

        Raises as `detect` does.
        """
        [detection] = self._run([image], bgr)
        return detection.prob_map.copy()

    def _run(self, images: Sequence[Picture], bgr: bool) -> Iterator[Detection]:
        config = self.config.changed(workers=0, strict=True)  # processes would take longer to start than they save
        return Pipeline(_Pictures(images, config, bgr), config, self.network.device).detect(self.network)


class _Pictures(ImageDataset):
    """Images that are in memory, or in files."""

    def __init__(self, images: Sequence[Picture], config: Config, bgr: bool) -> None:
        in_files = [image if isinstance(image, str | Path) else "" for image in images]
        super().__init__(list(map(Path, in_files)), config)
        self.pixels = {
            place: _pixels(image, bgr) for place, image in enumerate(images) if not isinstance(image, str | Path)
        }
        self._sizes = {place: pixels.shape[1::-1] for place, pixels in self.pixels.items()}

    def load(self, place: int) -> tuple[np.ndarray, Letterbox]:
        if place not in self.pixels:
            return super().load(place)
        letterbox = Letterbox(*self._sizes[place], self.config.image_size)
        return letterbox.resize(self.pixels[place]), letterbox


def _pixels(image: np.ndarray | Image.Image, bgr: bool) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright."""
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow decodes only now, and says in many ways what it cannot
            raise UserError(f"{image}: cannot be decoded ({' '.join(str(error).split())})") from None
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        kind = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"takes a file, a Pillow image or (height, width, 3) uint8 RGB pixels, not {kind}")
    if not image.size:
        raise UserError(f"takes an image with pixels in it, not {image.shape}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if bgr else image
