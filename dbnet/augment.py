"""Augmentations of a training sample. They are drawn first and applied later: the shape of a sample is known early.

augmentation = draw_augmentation(config, rng, image_size)
augmentation.render(image, canvas)                 # 8-bit pixels; the last step writes them into the canvas
points = augmentation.move(points, width, height)  # the points of all polygons at once
"""

from dataclasses import dataclass

import cv2
import numpy as np

from dbnet.config import Config

_CLAHE_CLIP = 2.0
_CLAHE_TILES = (8, 8)
_ROTATIONS = {1: cv2.ROTATE_90_CLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_COUNTERCLOCKWISE}
_BLUR_SIGMAS = (0.4, 1.6)  # pixels
_NOISE_DEVIATIONS = (2.0, 14.0)  # grey levels
_JPEG_QUALITIES = (15, 70)
_SHADOW_DEPTHS = (0.2, 0.6)  # share of the light that is taken away
_SHADOW_EDGE = 0.02  # softness, as a fraction of the longer side


@dataclass(frozen=True)
class Augmentation:
    """Changes of one sample: first of its values, then of its geometry, in the order of the fields."""

    brightness: float = 0.0  # added to the values, as a fraction of the full range
    contrast: float = 0.0  # values are scaled by 1 + contrast
    clahe_clip: float = 0.0  # clip limit of the contrast-limited adaptive histogram equalization; 0 leaves it out
    shadow: tuple[float, float, float] | None = None  # direction, distance and depth, as `_cast_shadow` takes them
    blur: float = 0.0  # standard deviation of a Gaussian blur in pixels
    noise: tuple[float, int] | None = None  # standard deviation of grey noise, in grey levels, and its seed
    jpeg_quality: int = 0  # 1 to 100; 0 leaves the compression out
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
        """Write the augmented (height, width, 3) uint8 RGB `image` into `canvas`, from its top-left corner; the values
        of `image` may change."""
        scaled = self._scaled(image.shape[1], image.shape[0])
        width, height = self.size(image.shape[1], image.shape[0])
        region = canvas[:height, :width]
        image = self._change_values(image)
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

    def _change_values(self, image: np.ndarray) -> np.ndarray:
        if self.brightness or self.contrast:
            cv2.addWeighted(image, 1 + self.contrast, image, 0, self.brightness * 255, dst=image)
        if self.clahe_clip:  # of the luma: the lightness of CIELAB takes eight times as long
            ycrcb = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
            luma = cv2.createCLAHE(self.clahe_clip, _CLAHE_TILES).apply(cv2.extractChannel(ycrcb, 0))
            cv2.insertChannel(luma, ycrcb, 0)
            cv2.cvtColor(ycrcb, cv2.COLOR_YCrCb2RGB, dst=image)
        if self.shadow:
            _cast_shadow(image, *self.shadow)
        if self.blur:
            image = cv2.GaussianBlur(image, (0, 0), self.blur)
        if self.noise:
            deviation, seed = self.noise
            noise = np.random.default_rng(seed).standard_normal(image.shape[:2], np.float32) * np.float32(deviation)
            image = cv2.add(image, cv2.merge([noise] * 3), dtype=cv2.CV_8U)
        if self.jpeg_quality:  # the order of the channels hardly matters
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
            image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
        return image

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
    probabilities = config.blur_p, config.noise_p, config.jpeg_p, config.shadow_p
    blurred, noisy, compressed, shaded = rng.random(4) < probabilities
    scale = config.scale ** rng.uniform(-1, 1) if config.scale > 1 else 1.0
    largest = config.perspective
    return Augmentation(  # the arguments draw in this order
        brightness,
        contrast,
        _CLAHE_CLIP if equalized else 0.0,
        flip=bool(flip),
        quarter_turns=quarter_turns,
        shadow=(rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3), rng.uniform(*_SHADOW_DEPTHS)) if shaded else None,
        blur=rng.uniform(*_BLUR_SIGMAS) if blurred else 0.0,
        noise=(rng.uniform(*_NOISE_DEVIATIONS), int(rng.integers(2**31))) if noisy else None,
        jpeg_quality=int(rng.integers(*_JPEG_QUALITIES)) if compressed else 0,
        scale=scale * image_size / config.image_size,
        angle=rng.uniform(-config.rotate, config.rotate) if config.rotate else 0.0,
        corners=tuple(map(tuple, rng.uniform(-largest, largest, (4, 2)).tolist())) if largest else (),
        limit=image_size,
        cut_position=tuple(rng.random(2)) if scale > 1 else (0.5, 0.5),
    )


def _cast_shadow(image: np.ndarray, direction: float, distance: float, depth: float) -> None:
    """Take `depth` of the light from (height, width, 3) uint8, in place, on one side of a soft straight edge: in the
    `direction` (radians), from `distance` of the centre on (a fraction of the longer side)."""
    height, width = image.shape[:2]
    longer = max(height, width)
    x = (np.arange(width, dtype=np.float32) - width / 2) * (np.cos(direction) / longer)
    y = (np.arange(height, dtype=np.float32) - height / 2) * (np.sin(direction) / longer)
    shaded = np.clip((x + (y[:, None] - distance)) / _SHADOW_EDGE, 0, 1)
    light = cv2.merge([1 - np.float32(depth) * shaded] * 3)
    cv2.multiply(image, light, dst=image, dtype=cv2.CV_8U)
