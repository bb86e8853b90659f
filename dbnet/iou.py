"""Precision and recall by intersection over union, as the ICDAR 2015 competition on incidental text computes them.

A detection matches a word where their intersection is more than half of their union; each matches one at most. It is
the second opinion beside CLEval: it counts words rather than characters, and a split or merged word is simply missed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike

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
    gt_polygons: Sequence[ArrayLike], det_polygons: Sequence[ArrayLike], dont_care: Sequence[bool] | None = None
) -> IoUScore:
    """Match the (n, 2) detections of an image with its (n, 2) words.

    Words are served in their order, each takes the first free detection that matches. A polygon that crosses itself
    counts with the area that it encloses, one of fewer than three points has none: it is counted and matches nothing.
    `dont_care` says for each word whether it shall neither be found nor missed; None for none.
    """
    gts, dets = _shapes(gt_polygons), _shapes(det_polygons)
    gt_counts = ~np.asarray(dont_care if dont_care is not None else np.zeros(len(gts)), bool)
    gt_areas, det_areas = shapely.area(gts), shapely.area(dets)
    gt, det = _boxes_meet(gts, dets)

    on_dont_care = ~gt_counts[gt]
    shares = shapely.area(shapely.intersection(gts[gt[on_dont_care]], dets[det[on_dont_care]]))
    det_counts = np.ones(len(dets), bool)
    is_mostly = shares > MAX_ON_DONT_CARE * det_areas[det[on_dont_care]]
    det_counts[det[on_dont_care][is_mostly]] = False

    # Only pairs whose areas are alike can have an IoU above a half; few neighbours of a word are left to intersect.
    areas = np.sort([gt_areas[gt], det_areas[det]], axis=0)
    is_candidate = gt_counts[gt] & det_counts[det] & (areas[0] > MIN_IOU * areas[1])
    gt, det = gt[is_candidate], det[is_candidate]
    common = shapely.area(shapely.intersection(gts[gt], dets[det]))
    matches = common > MIN_IOU * (gt_areas[gt] + det_areas[det] - common)
    free_gt, free_det = np.ones(len(gts), bool), np.ones(len(dets), bool)
    for i, j in zip(gt[matches].tolist(), det[matches].tolist(), strict=True):
        if free_gt[i] and free_det[j]:
            free_gt[i] = free_det[j] = False
    return _score(int((~free_gt).sum()), int(gt_counts.sum()), int(det_counts.sum()))


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


def _shapes(polygons: Sequence[ArrayLike]) -> np.ndarray:
    """(len,) valid shapely geometries, empty ones for polygons without area."""
    arrays = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    shapes = np.full(len(arrays), shapely.Polygon(), object)
    counts = np.array([len(array) for array in arrays], int)
    is_there = np.flatnonzero(counts >= 3)
    if len(is_there):
        points = np.concatenate([arrays[index] for index in is_there])
        polygon_of_point = np.repeat(np.arange(len(is_there)), counts[is_there])
        shapes[is_there] = shapely.polygons(shapely.linearrings(points, indices=polygon_of_point))
        broken = is_there[~shapely.is_valid(shapes[is_there])]
        shapes[broken] = shapely.make_valid(shapes[broken])
    return shapes


def _boxes_meet(gts: np.ndarray, dets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs whose bounding boxes meet, in the order of ground truths, then of detections."""
    gt_boxes, det_boxes = shapely.bounds(gts)[:, None], shapely.bounds(dets)[None]  # nan, which meets nothing, if empty
    meet = (gt_boxes[..., :2] <= det_boxes[..., 2:]) & (det_boxes[..., :2] <= gt_boxes[..., 2:])
    gt, det = np.nonzero(meet.all(axis=2))
    return gt, det
