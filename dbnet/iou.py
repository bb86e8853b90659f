"""Precision and recall by intersection over union, as the ICDAR 2015 competition on incidental text computes them.

A detection matches a word where their intersection is more than half of their union; each matches one at most. It is
the second opinion beside CLEval: it counts words rather than characters, and a split or merged word is simply missed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dbnet.polygons import Polygons, common_areas, near_pairs

MIN_POINTS = 3
"""Polygons with fewer points have no area."""

MIN_IOU = 0.5
"""A match has more than this."""

MAX_ON_DONT_CARE = 0.5
"""A detection with more than this share of its area on one don't-care word does not count."""


@dataclass(frozen=True)
class IoUScore:
    """Counts of words and detections of an image or a data set, and what follows from them."""

    precision: float
    """`matched / detections`, 0 where there are none"""
    recall: float
    """`matched / words`, 0 where there are none"""
    hmean: float
    """harmonic mean of precision and recall"""
    matched: int
    """pairs of a word and a detection"""
    words: int
    """ground truths that are not don't-care"""
    detections: int
    """detections that are not on a don't-care word"""


def score_iou(
    gt_polygons: Sequence[ArrayLike] | Polygons,
    det_polygons: Sequence[ArrayLike] | Polygons,
    dont_care: Sequence[bool] | None = None,
) -> IoUScore:
    """Match the (n, 2) detections of an image with its (n, 2) words.

    Words are served in their order, each takes the first free detection that matches. Coordinates are truncated to
    integers, and a polygon that crosses itself is mended, as for CLEval. One without area is counted, and matches
    nothing. `dont_care` says for each word whether it shall neither be found nor missed, None for none.

    Raises ValueError as `metric.score_image` does.
    """
    gts, dets = Polygons.read(gt_polygons, MIN_POINTS), Polygons.read(det_polygons, MIN_POINTS)
    is_valid = ~np.asarray(dont_care if dont_care is not None else np.zeros(len(gts.is_given)), bool)
    gt_counts, det_counts = is_valid[gts.is_given], np.ones(len(dets), bool)
    gt, det = near_pairs(gts, dets)

    on_dont_care = np.flatnonzero(~gt_counts[gt])
    shares = common_areas(gts, dets, gt[on_dont_care], det[on_dont_care])
    is_mostly = _exceeds(shares, MAX_ON_DONT_CARE * dets.areas[det[on_dont_care]])
    det_counts[det[on_dont_care[is_mostly]]] = False

    # Only pairs whose areas are alike can have an IoU above a half; few neighbours of a word are left to intersect.
    smaller, larger = np.sort([gts.areas[gt], dets.areas[det]], axis=0)
    is_candidate = gt_counts[gt] & det_counts[det] & (smaller > MIN_IOU * larger)
    gt, det = gt[is_candidate], det[is_candidate]
    common = common_areas(gts, dets, gt, det)
    matches = _exceeds(common, MIN_IOU * (gts.areas[gt] + dets.areas[det] - common))
    free_gt, free_det = np.ones(len(gts), bool), np.ones(len(dets), bool)
    for i, j in zip(gt[matches].tolist(), det[matches].tolist(), strict=True):
        if free_gt[i] and free_det[j]:
            free_gt[i] = free_det[j] = False
    detections = int(det_counts.sum() + (~dets.is_given).sum())
    return _score(int((~free_gt).sum()), int(is_valid.sum()), detections)


def total_iou(scores: Iterable[IoUScore]) -> IoUScore:
    """The score of a data set: over the words and detections of all images, not a mean over images."""
    scores = list(scores)
    return _score(*(sum(getattr(score, name) for score in scores) for name in ("matched", "words", "detections")))


def _score(matched: int, words: int, detections: int) -> IoUScore:
    return IoUScore(
        precision=matched / max(detections, 1),
        recall=matched / max(words, 1),
        hmean=2 * matched / max(words + detections, 1),
        matched=matched,
        words=words,
        detections=detections,
    )


def _exceeds(areas: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Which areas are above their limits by more than the rounding of their arithmetic."""
    return areas > limits * (1 + 1e-9)
