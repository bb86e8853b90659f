"""Augmentations of a training sample, drawn first and applied after: what is drawn tells the sample's shape.

drawn = draw(config, rng)
drawn.render(image, canvas)                 # pixels stay 8-bit; the last step writes them where they belong
points = drawn.move(points, width, height)  # the points of all polygons at once
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dbnet.config import DataConfig

_CLAHE_TILES = (8, 8)
_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


@dataclass(frozen=True)
class Augmentation:
    """What happens to one sample: first to its values, then to its geometry, in the order of the fields."""

    brightness: float = 0.0
    """added to the values, as a fraction of the full range"""

    contrast: float = 0.0
    """values are scaled by 1 + contrast"""

    clahe_clip: float = 0.0
    """clip limit of the contrast-limited adaptive histogram equalization; 0 leaves it out"""

    flip: bool = False
    """mirror left and right"""

    quarter_turns: int = 0
    """clockwise turns by 90 degrees, 0 to 3"""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an augmented image of width x height."""
        return (height, width) if self.quarter_turns % 2 else (width, height)

    def move(self, points: np.ndarray, width: int, height: int) -> np.ndarray:
        """Points (n, 2) of an image of width x height, in pixels of the augmented one."""
        x, y = points.T
        if self.flip:
            x = width - x
        for _ in range(self.quarter_turns):
            x, y = height - y, x
            width, height = height, width
        return np.stack([x, y], axis=1)

    def render(self, image: np.ndarray, canvas: np.ndarray) -> None:
        """Write the augmented (height, width, 3) uint8 RGB `image` into `canvas`, from its top-left corner; the values
        of `image` may change."""
        if self.brightness or self.contrast:
            change_brightness_contrast(image, self.brightness, self.contrast)
        if self.clahe_clip:
            equalize(image, self.clahe_clip)
        width, height = self.size(image.shape[1], image.shape[0])
        place = canvas[:height, :width]
        if self.flip and self.quarter_turns == 2:
            cv2.flip(image, 0, dst=place)  # the mirror image turned by half is upside down
        elif self.quarter_turns:
            cv2.rotate(cv2.flip(image, 1) if self.flip else image, _ROTATIONS[self.quarter_turns], dst=place)
        elif self.flip:
            cv2.flip(image, 1, dst=place)
        else:
            place[:] = image


def draw(config: DataConfig, rng: np.random.Generator) -> Augmentation:
    """Draw the augmentations that `config` gives a probability to. `rng` is the only source of chance."""
    flip, turn, shade, equalized = rng.random(4) < (
        config.flip_p,
        config.rotate90_p,
        config.brightness_contrast_p,
        config.clahe_p,
    )
    return Augmentation(
        brightness=rng.uniform(-config.brightness, config.brightness) if shade else 0.0,
        contrast=rng.uniform(-config.contrast, config.contrast) if shade else 0.0,
        clahe_clip=config.clahe_clip if equalized else 0.0,
        flip=bool(flip),
        quarter_turns=int(rng.integers(1, 4)) if turn else 0,
    )


def change_brightness_contrast(image: np.ndarray, brightness: float, contrast: float) -> None:
    """Scale the values of (height, width, 3) uint8 by 1 + contrast and add brightness x 255, in place."""
    cv2.addWeighted(image, 1 + contrast, image, 0, brightness * 255, dst=image)


def equalize(image: np.ndarray, clip: float) -> None:
    """Contrast-limited adaptive histogram equalization of the luma of (height, width, 3) uint8 RGB, in place.

    Luma (YCrCb) in place of the lightness of CIELAB, which takes eight times as long to convert to and back.
    """
    ycrcb = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    luma = cv2.createCLAHE(clip, _CLAHE_TILES).apply(cv2.extractChannel(ycrcb, 0))
    cv2.insertChannel(luma, ycrcb, 0)
    cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB, dst=image)
