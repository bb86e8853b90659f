"""Probability maps to polygons in image coordinates (DBNet, arXiv 1911.08947, section 3.5, "box formation").

    polygons, scores = extract_polygons(prob_map, config, scale=(1 / letterbox_scale, 1 / letterbox_scale))

The network learned polygons that are shrunk, so each region above the threshold is moved outward again. Nothing here
knows of the network or a GPU. One pass over the map finds the contours; after that the cost is that of the boxes around
them, and only what has passed the score comes to the offset, which is the dear part.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pyclipper

if TYPE_CHECKING:
    from dbnet.config import PostprocessConfig

SIMPLIFY_RATIO = 0.002
"""How far a polygon may stray from its contour, as a share of the contour's perimeter."""


def extract_polygons(
    prob_map: np.ndarray,
    config: PostprocessConfig,
    scale: tuple[float, float] = (1.0, 1.0),
    max_size: tuple[int, int] | None = None,
) -> tuple[list[np.ndarray], list[float]]:
    """The text regions of a probability map, best first.

    `prob_map` is (height, width) float32 in 0..1, nan counting as 0, or uint8 in 0..255, a quarter of the bytes to move
    and to look at. `config` says how: `thresh`, `box_thresh`, `max_candidates`, `min_size` (pixels of the map), and
    `use_polygon` with `polygon_unclip_ratio` for contours or `box_unclip_ratio` for minimum-area rectangles. `scale` is
    what x and y are multiplied by to get from the map to the image. With `max_size`, (width, height) of the image,
    coordinates are clipped to 0..width and 0..height; without it they may lie a little outside, as polygons at the edge
    are offset beyond it.

    Returns polygons as (n, 2) int32 arrays (n = 4 for rectangles, clockwise from the top left) and the mean probability
    in each before the offset, both by descending score. No more than `max_candidates` come back, and these are the
    best. As in the baseline, a region whose offset is not exactly one piece (one that closes around a hole) is dropped.
    """
    prob_map = np.asarray(prob_map)
    if prob_map.dtype != np.uint8:
        prob_map = np.asarray(prob_map, np.float32)
    one = 255 if prob_map.dtype == np.uint8 else 1
    if prob_map.ndim != 2:
        raise ValueError(f"prob_map must be (height, width), not of shape {prob_map.shape}")
    if prob_map.size == 0:
        return [], []
    outline = _simplified_contour if config.use_polygon else _min_area_box
    unclip_ratio = config.polygon_unclip_ratio if config.use_polygon else config.box_unclip_ratio
    binary_map = (prob_map > config.thresh * one).view(np.uint8)
    contours, _ = cv2.findContours(binary_map, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    candidates = []
    for contour in contours:
        shrunk = outline(contour, config.min_size)
        if shrunk is not None:
            score = region_score(prob_map, shrunk) / one
            if score >= config.box_thresh:
                candidates.append((score, shrunk))
    candidates.sort(key=lambda candidate: -candidate[0])

    polygons, scores = [], []
    for score, shrunk in candidates:
        if len(polygons) >= config.max_candidates:
            break
        polygon = unclip(shrunk, unclip_ratio)
        if polygon is None:
            continue
        box = cv2.minAreaRect(polygon)
        if min(box[1]) < config.min_size + 2:
            continue
        polygons.append(_in_image(polygon if config.use_polygon else _corners(box), scale, max_size))
        scores.append(score)
    return polygons, scores


def region_score(prob_map: np.ndarray, polygon: np.ndarray) -> float:
    """Mean of `prob_map` (height, width) float32 or uint8 over the pixels of an (n, 2) polygon, its border included.

    `polygon` is int32, or float32 whose coordinates are cut to whole pixels; what lies outside the map does
    not count, and nan counts as 0. Only the box around the polygon is looked at.
    """
    height, width = prob_map.shape
    polygon = polygon.astype(np.int32, copy=False)
    left, top, box_width, box_height = cv2.boundingRect(polygon)
    right, bottom = min(left + box_width, width), min(top + box_height, height)
    left, top = max(left, 0), max(top, 0)
    if left >= right or top >= bottom:
        return 0.0
    mask = np.zeros((bottom - top, right - left), np.uint8)
    cv2.fillPoly(mask, [polygon], 1, offset=(-left, -top))
    region = prob_map[top:bottom, left:right]
    score = cv2.mean(region, mask)[0]
    return cv2.mean(np.nan_to_num(region), mask)[0] if math.isnan(score) else score


def unclip(polygon: np.ndarray, unclip_ratio: float) -> np.ndarray | None:
    """The polygon moved outward by D' = A unclip_ratio / L (DBNet equation 11), with round corners.

    Takes (n, 2) points and gives (m, 2) int32, both in pixels of the map; None if the outcome is not one piece or the
    polygon is without a perimeter.
    """
    points = polygon.tolist()
    perimeter = sum(map(math.dist, points, points[1:] + points[:1]))  # cv2.arcLength is float32: it rounds ties away
    if perimeter == 0:
        return None
    offset = pyclipper.PyclipperOffset()
    offset.AddPath(points, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    pieces = offset.Execute(cv2.contourArea(polygon) * unclip_ratio / perimeter)
    if len(pieces) != 1:
        return None
    return np.fromiter(chain.from_iterable(pieces[0]), np.int32, 2 * len(pieces[0])).reshape(-1, 2)


def _simplified_contour(contour: np.ndarray, min_size: float) -> np.ndarray | None:
    """(n, 2) int32 polygon of 4 points or more close to the contour; None if fewer are enough for it."""
    polygon = cv2.approxPolyDP(contour, SIMPLIFY_RATIO * cv2.arcLength(contour, True), True)
    return polygon[:, 0] if len(polygon) >= 4 else None


def _min_area_box(contour: np.ndarray, min_size: float) -> np.ndarray | None:
    """(4, 2) float32 minimum-area rectangle of the contour; None if its smaller side is below `min_size`."""
    box = cv2.minAreaRect(contour)
    return _corners(box) if min(box[1]) >= min_size else None


def _corners(box: tuple) -> np.ndarray:
    """(4, 2) float32 corners of OpenCV's (centre, size, angle), clockwise from the top left one.

    OpenCV's own order differs between its versions.
    """
    by_x = sorted(cv2.boxPoints(box).tolist())
    top_left, bottom_left = sorted(by_x[:2], key=lambda point: point[1])
    top_right, bottom_right = sorted(by_x[2:], key=lambda point: point[1])
    return np.array([top_left, top_right, bottom_right, bottom_left], np.float32)


def _in_image(polygon: np.ndarray, scale: tuple[float, float], max_size: tuple[int, int] | None) -> np.ndarray:
    """Map to image coordinates, rounded: (n, 2) int32."""
    polygon = np.rint(polygon * np.asarray(scale, np.float64))
    if max_size is not None:
        polygon = polygon.clip(0, max_size)
    return polygon.astype(np.int32)
