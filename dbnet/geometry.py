"""Polygons between the original image and what the network sees."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from dbnet.config import STRIDE

COORDINATE_LIMIT = 100_000_000
"""Pixels, either way: no image that can be read is longer (`dbnet.images.MAX_PIXELS`)."""

MAX_TANGLED_POINTS = 64
"""Points of an outline that crosses itself: with n of them it can do so n^2 / 2 times, each a point of its geometry."""


@dataclass(frozen=True)
class Letterbox:
    """An image resized so that its longer side is `side`, in the top-left corner of what the network sees.

    Width and height have a scale each, because the resized sides are whole pixels; `to_network` and `to_image` are
    exact inverses of each other.
    """

    width: int
    """width of the original image in pixels"""

    height: int
    """height of the original image in pixels"""

    side: int
    """longer side of the resized image in pixels"""

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) in pixels of the image in the network; halves are rounded up, as decoders that halve do."""
        scale = self.side / max(self.width, self.height)
        return max(1, math.floor(self.width * scale + 0.5)), max(1, math.floor(self.height * scale + 0.5))

    @property
    def scale(self) -> np.ndarray:
        """(2,) float64: pixels of the resized image for a pixel of the original, along x and y."""
        return np.array(self.resized) / (self.width, self.height)

    def to_network(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) of the original image, in pixels of the resized image."""
        return points * self.scale

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) of the resized image, in pixels of the original image."""
        return points / self.scale

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 pixels, possibly decoded at reduced size, as the image in the network.

        To shrink by less than two, linear interpolation leaves no pixel out and takes a tenth of the time of averaging.
        """
        if pixels.shape[1::-1] == self.resized:
            return pixels
        shrinks = max(pixels.shape[:2]) > 2 * max(self.resized)
        return cv2.resize(pixels, self.resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def padded(length: int) -> int:
    """A side in pixels rounded up to a multiple of the network's coarsest stride."""
    return -(-length // STRIDE) * STRIDE


def fault_of(polygon: np.ndarray) -> str | None:
    """What keeps an (n, 2) float64 polygon of a file from being scored or learned, in words; None for nothing."""
    if not np.isfinite(polygon).all():
        return "a coordinate is not a finite number"
    if np.abs(polygon).max(initial=0) > COORDINATE_LIMIT:
        return f"a coordinate is beyond {COORDINATE_LIMIT} pixels"
    if len(polygon) > MAX_TANGLED_POINTS:
        import shapely  # rarely needed

        if not shapely.is_simple(shapely.linearrings(polygon)):
            return f"an outline of {len(polygon)} points, more than {MAX_TANGLED_POINTS}, crosses itself"
    return None


def clip_polygons(
    points: np.ndarray, counts: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move points outside of the image to its border; drop polygons that are degenerate then.

    Args:
        points: (total, 2), polygon after polygon.
        counts: (polygons,) how many points each has.

    Returns:
        points and counts of the polygons kept, and (polygons,) bool, which those are. Dropped are polygons of fewer
        than three points or of less than a square pixel.
    """
    clipped = np.clip(points, 0, (width, height))
    kept = (counts >= 3) & (areas(clipped, counts) >= 1)
    return clipped[np.repeat(kept, counts)], counts[kept], kept


def visible_shares(points: np.ndarray, counts: np.ndarray, width: int, height: int) -> np.ndarray:
    """(polygons,) how much of each polygon's area is left, 0..1, when its points are moved to the border of the image.

    Arguments as in clip_polygons, every polygon with an area. For polygons that stand upright this is the share of
    their area inside the image.
    """
    return areas(np.clip(points, 0, (width, height)), counts) / areas(points, counts)


def areas(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) areas in square pixels, whichever way each runs (shoelace formula); arguments as in clip_polygons."""
    x, y = points.T
    next_x, next_y = points[_next_point(counts)].T
    return np.abs(_sums(x * next_y - y * next_x, counts)) / 2


def perimeters(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) lengths of the closed outlines in pixels; arguments as in clip_polygons."""
    return _sums(np.sqrt(np.square(points[_next_point(counts)] - points).sum(axis=1)), counts)


def _next_point(counts: np.ndarray) -> np.ndarray:
    """(total,) for each point the index of the next one of its polygon, the first after the last."""
    following = np.arange(1, counts.sum() + 1)
    ends = np.cumsum(counts)
    is_there = counts > 0
    following[ends[is_there] - 1] = (ends - counts)[is_there]
    return following


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) sums of a value for each point, polygon by polygon."""
    sums = np.zeros(len(counts))
    is_there = counts > 0
    if is_there.any():
        sums[is_there] = np.add.reduceat(values, (np.cumsum(counts) - counts)[is_there])
    return sums


def split_polygons(points: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """A list of (n, 2) arrays; arguments as in clip_polygons."""
    ends = np.cumsum(counts).tolist()
    return [points[start:end] for start, end in zip([0, *ends], ends, strict=False)]
