"""Augmentations of a training sample. They are drawn first and applied later: the shape of a sample is known early."""

from dataclasses import dataclass

import cv2
import numpy as np

from dbnet.config import Config

_CLAHE_CLIP = 2.0
_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}


@dataclass(frozen=True)
class Augmentation:
    """Changes of one sample: first of its values, then of its geometry, in the order of the fields."""

    brightness: float = 0.0  # added to the values, as a fraction of the full range
    contrast: float = 0.0  # values are scaled by 1 + contrast
    clahe_clip: float = 0.0  # clip limit of the contrast-limited adaptive histogram equalization; 0 leaves it out
    flip: bool = False  # left and right
    quarter_turns: int = 0  # clockwise turns by 90 degrees, 0 to 3
    scale: float = 1.0  # factor on both sides
    angle: float = 0.0  # clockwise rotation about the centre in degrees
    corners: tuple[tuple[float, float], ...] = ()  # shifts, clockwise from the top left, as fractions of the sides
    limit: int | None = None  # longest side in pixels of the result; what is longer after scaling is cut
    cut_position: tuple[float, float] = (0.5, 0.5)  # of the part that stays, from 0 (left, top) to 1 (right, bottom)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an augmented image of width x height."""
        width, height = self._scaled(width, height)
        return (min(width, self.limit), min(height, self.limit)) if self.limit else (width, height)

    def move(self, points: np.ndarray, width: int, height: int) -> np.ndarray:
        """Points (n, 2) of an image of width x height, in pixels of the augmented one."""
        x, y = points.T
        scaled = np.array(self._scaled(width, height))
        if self.flip:
            x = width - x
        for _ in range(self.quarter_turns):
            x, y = height - y, x
            width, height = height, width
        points = np.stack([x, y], axis=1) * (scaled / (width, height))
        if self.angle or self.corners:
            projected = np.column_stack([points, np.ones(len(points))]) @ self._homography(*scaled).T
            return projected[:, :2] / projected[:, 2:]
        return points - self._cut(*scaled)

    def render(self, image: np.ndarray, canvas: np.ndarray) -> None:
        """Write the augmented (height, width, 3) uint8 RGB `image` into `canvas`, from its top-left corner."""
        scaled = self._scaled(image.shape[1], image.shape[0])
        width, height = self.size(image.shape[1], image.shape[0])
        region = canvas[:height, :width]
        if self.brightness or self.contrast:
            image = cv2.addWeighted(image, 1 + self.contrast, image, 0, self.brightness * 255)
        if self.clahe_clip:  # of the luma: the lightness of CIELAB takes eight times as long
            ycrcb = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
            luma = cv2.createCLAHE(self.clahe_clip, tileGridSize=(8, 8)).apply(cv2.extractChannel(ycrcb, 0))
            cv2.insertChannel(luma, ycrcb, 0)
            image = cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB)
        image = cv2.flip(image, 1) if self.flip else image
        image = cv2.rotate(image, _ROTATIONS[self.quarter_turns]) if self.quarter_turns else image
        if image.shape[1::-1] != scaled:
            image = cv2.resize(image, scaled, interpolation=cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR)
        if self.angle or self.corners:
            to_corner = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV counts from the centre of pixel 0
            homography = np.linalg.inv(to_corner) @ self._homography(*scaled) @ to_corner
            cv2.warpPerspective(image, homography, (width, height), dst=region, borderMode=cv2.BORDER_REPLICATE)
        else:
            left, top = self._cut(*scaled)
            region[:] = image[top : top + height, left : left + width]

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after turns and scaling, before anything is cut off."""
        if self.quarter_turns % 2:
            width, height = height, width
        return max(1, round(self.scale * width)), max(1, round(self.scale * height))

    def _cut(self, width: int, height: int) -> tuple[int, int]:
        """Left and top, in pixels of a scaled image, of the part that stays."""
        limit = self.limit or max(width, height)
        return round(self.cut_position[0] * max(0, width - limit)), round(self.cut_position[1] * max(0, height - limit))

    def _homography(self, width: int, height: int) -> np.ndarray:
        """(3, 3) from a scaled image to the result: perspective, rotation about the centre, cut."""
        outline = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        shift = np.array(self.corners or np.zeros((4, 2)), np.float32) * (width, height)
        perspective = cv2.getPerspectiveTransform(outline, (outline + shift).astype(np.float32))
        rotation = np.eye(3)
        rotation[:2] = cv2.getRotationMatrix2D((width / 2, height / 2), -self.angle, 1)
        rotation[:2, 2] -= self._cut(width, height)
        return rotation @ perspective


def draw_augmentation(config: Config, rng: np.random.Generator, image_size: int | None = None) -> Augmentation:
    """Draw the augmentations that have a probability or a range in `config`. `rng` is the only source of chance.
    `image_size`: longer side of images before a random scaling, and of the result; what comes has config.image_size."""
    image_size = image_size or config.image_size
    probabilities = config.flip_p, config.rotate90_p, config.brightness_contrast_p, config.clahe_p
    flip, turn, shade, equalized = rng.random(4) < probabilities
    brightness = rng.uniform(-config.brightness, config.brightness) if shade else 0.0
    contrast = rng.uniform(-config.contrast, config.contrast) if shade else 0.0
    quarter_turns = int(rng.integers(1, 4)) if turn else 0
    scale = config.scale ** rng.uniform(-1, 1) if config.scale > 1 else 1.0
    largest = config.perspective
    return Augmentation(  # the arguments draw in this order
        brightness,
        contrast,
        _CLAHE_CLIP if equalized else 0.0,
        flip=bool(flip),
        quarter_turns=quarter_turns,
        scale=scale * image_size / config.image_size,
        angle=rng.uniform(-config.rotate, config.rotate) if config.rotate else 0.0,
        corners=tuple(map(tuple, rng.uniform(-largest, largest, (4, 2)).tolist())) if largest else (),
        limit=image_size,
        cut_position=tuple(rng.random(2)) if scale > 1 else (0.5, 0.5),
    )
