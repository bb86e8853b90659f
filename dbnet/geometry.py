"""Polygons between the original image and the square that the network sees."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Letterbox:
    """An image resized so that its longer side is `side`, in the top-left corner of a square of that side.

    Width and height have a scale each, because the resized sides are whole pixels; `to_square` and `to_image` are
    exact inverses of each other.
    """

    width: int
    """width of the original image in pixels"""

    height: int
    """height of the original image in pixels"""

    side: int
    """side of the square in pixels"""

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) in pixels of the image inside the square."""
        longer = max(self.width, self.height)
        return max(1, round(self.width * self.side / longer)), max(1, round(self.height * self.side / longer))

    @property
    def scale(self) -> np.ndarray:
        """(2,) float64: pixels of the square for a pixel of the original, along x and y."""
        return np.array(self.resized) / (self.width, self.height)

    def to_square(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) of the original image, in pixels of the square."""
        return points * self.scale

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) of the square, in pixels of the original image."""
        return points / self.scale

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 pixels, possibly decoded at reduced size, as the image inside the square."""
        shrinks = max(self.resized) < max(pixels.shape[:2])
        return cv2.resize(pixels, self.resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def pad_to_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Put (height, width, 3) uint8 pixels in the top-left corner of a black (side, side, 3) square."""
    height, width = pixels.shape[:2]
    square = np.zeros((side, side, 3), np.uint8)
    square[:height, :width] = pixels
    return square


def clip_polygons(polygons: list[np.ndarray], width: int, height: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Move points outside of the image to its border; drop polygons that are degenerate then.

    Returns:
        the polygons kept, and the positions in `polygons` of those kept. Dropped are polygons of fewer than three
        points or of less than a square pixel.
    """
    clipped = [np.clip(polygon, 0, (width, height)) for polygon in polygons]
    kept = [i for i, polygon in enumerate(clipped) if len(polygon) >= 3 and area(polygon) >= 1]
    return [clipped[i] for i in kept], np.array(kept, dtype=int)


def area(polygon: np.ndarray) -> float:
    """Area in square pixels of an (n, 2) polygon, whichever way it runs (shoelace formula)."""
    x, y = polygon.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))
