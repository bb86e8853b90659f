"""Augmentations of a training sample: polygons move with the pixels, pixels stay 8-bit."""

import cv2
import numpy as np

from dbnet.config import DataConfig

_CLAHE_TILES = (8, 8)


def augment(
    image: np.ndarray, polygons: list[np.ndarray], config: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw and apply the augmentations that `config` gives a probability to.

    Args:
        image: (height, width, 3) uint8 RGB.
        polygons: (n, 2) arrays in pixels of `image`.
        rng: the only source of chance, so that the same generator gives the same sample.

    Returns:
        the image, its sides swapped by a quarter turn, and the polygons in its pixels.
    """
    if rng.random() < config.flip_p:
        image, polygons = flip(image, polygons)
    if rng.random() < config.rotate90_p:
        image, polygons = rotate90(image, polygons, turns=int(rng.integers(1, 4)))
    if rng.random() < config.brightness_contrast_p:
        brightness = rng.uniform(-config.brightness, config.brightness)
        contrast = rng.uniform(-config.contrast, config.contrast)
        image = change_brightness_contrast(image, brightness, contrast)
    if rng.random() < config.clahe_p:
        image = equalize(image, config.clahe_clip)
    return image, polygons


def flip(image: np.ndarray, polygons: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mirror left and right."""
    width = image.shape[1]
    return cv2.flip(image, 1), [polygon * (-1, 1) + (width, 0) for polygon in polygons]


def rotate90(image: np.ndarray, polygons: list[np.ndarray], turns: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Turn clockwise by `turns` (1 to 3) times 90 degrees."""
    height, width = image.shape[:2]
    code, matrix, shift = {
        1: (cv2.ROTATE_90_CLOCKWISE, [[0, 1], [-1, 0]], (height, 0)),
        2: (cv2.ROTATE_180, [[-1, 0], [0, -1]], (width, height)),
        3: (cv2.ROTATE_90_COUNTERCLOCKWISE, [[0, -1], [1, 0]], (0, width)),
    }[turns]
    return cv2.rotate(image, code), [polygon @ np.array(matrix) + shift for polygon in polygons]


def change_brightness_contrast(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Scale the values of (height, width, 3) uint8 by 1 + contrast and add brightness x 255, through a table."""
    table = np.clip(np.arange(256) * (1 + contrast) + brightness * 255, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def equalize(image: np.ndarray, clip: float) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization of the lightness of (height, width, 3) uint8 RGB."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lightness = cv2.createCLAHE(clip, _CLAHE_TILES).apply(cv2.extractChannel(lab, 0))
    cv2.insertChannel(lightness, lab, 0)
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
