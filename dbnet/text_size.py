"""CLEval's recall by size of text: what size is missed?

The size of a word is its height as a share of the image's longer side, so that it does not depend on how the image was
scanned, and says how many pixels high the word is in a network that sees the longer side in `image_size` pixels.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike

SIZE_EDGES = (0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.1, 0.5, 1)
"""Between these lie the bins; a word on an edge is in the bin above it, and the last bin takes all that is larger."""


def text_heights(polygons: Sequence[ArrayLike]) -> np.ndarray:
    """(len,) heights in pixels of (n, 2) words: the shorter side of the rectangle of least area around each.

    So the height does not depend on which way a word runs or how it is turned; of curved text it is that of the curve.
    """
    sides = [cv2.minAreaRect(np.asarray(polygon, np.float32).reshape(-1, 2))[1] for polygon in polygons]
    return np.array(sides, np.float64).reshape(-1, 2).min(axis=1)


def bin_of_size(heights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(len,) which bin words of these heights in pixels are in, on an image of (width, height) pixels."""
    return np.searchsorted(SIZE_EDGES[1:-1], heights / max(size), side="right")


def chars_by_size(polygons: Sequence[ArrayLike], size: tuple[int, int], gt_chars: np.ndarray) -> np.ndarray:
    """(bins, 2) int: characters of the words in each bin that were found, and all.

    `gt_chars` are those of each word of an image of `size` (width, height) pixels, as `ImageMatch.gt_chars` gives them.
    The columns sum to `chars_tp` and `chars_gt` of the image. The penalties for splits are no matter of size.
    """
    bins = bin_of_size(text_heights(polygons), size)
    counts = [np.bincount(bins, chars, minlength=len(SIZE_EDGES) - 1) for chars in gt_chars.T]
    return np.stack(counts, axis=1).astype(int)


def size_rows(counts: Iterable[np.ndarray]) -> list[dict[str, float]]:
    """The sum over images as plain values, a dict for each bin: its edges, characters, found ones and recall."""
    totals = sum(counts, np.zeros((len(SIZE_EDGES) - 1, 2), int))
    return [
        {"from": low, "to": high, "chars_gt": chars, "chars_tp": found, "recall": found / max(chars, 1)}
        for low, high, (found, chars) in zip(SIZE_EDGES, SIZE_EDGES[1:], totals.tolist(), strict=False)
    ]
