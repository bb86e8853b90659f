"""Probability maps to polygons in image coordinates (DBNet, arXiv 1911.08947, section 3.5, "box formation").

    polygons, scores = extract_polygons(prob_map, config, scale=(1 / letterbox_scale, 1 / letterbox_scale))

The network has learned shrunk polygons, so each region above the threshold is moved outward again. One pass over the
map finds the contours; after that each region costs work on the box around it. The offset takes the most time, and is
computed only for regions with a sufficient score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from dbnet.geometry import offset, offset_distances, regrowth_distances, split_polygons

if TYPE_CHECKING:
    from dbnet.config import Config
    from dbnet.images import Size

SIMPLIFY_RATIO = 0.002  # distance allowed between a polygon and its contour, as a share of the contour's perimeter
SIMPLIFY_BREADTH = 0.25
"""The same, as a share of the region's breadth, 2 x area / perimeter. A line of text across a page is hundreds of
pixels long and a few high: by its perimeter alone it would become a stroke without area, and be dropped."""

OFFSET_ERROR = 2  # pixels by which rounding and coarse arcs may make an offset polygon narrower than twice the distance


def extract_polygons(
    prob_map: np.ndarray, config: Config, scale: Sequence[float] = (1.0, 1.0), max_size: tuple[int, int] | None = None
) -> tuple[list[np.ndarray], list[float]]:
    """The text regions of a probability map, best first.

    `prob_map` is (height, width) float32 in 0..1, nan counting as 0, or uint8 in 0..255, which is quicker. `config` has
    the settings: `thresh`, `box_thresh`, `max_candidates`, `min_size` (pixels of the map), and `use_polygon` with
    `polygon_unclip_ratio` for contours or `box_unclip_ratio` for minimum-area rectangles; it may have `growth`, which
    takes their place, and `shrink_ratio`. `scale` are the factors of x and y from the map to the image. With
    `max_size`, (width, height) of the image, coordinates are clipped to 0..width and 0..height; without it they may lie
    a little outside, because polygons at the edge are offset beyond it.

    Returns polygons as (n, 2) int32 arrays (n = 4 for rectangles, clockwise from the top left) and the mean probability
    in each before the offset, both by descending score. No more than `max_candidates` come back, and these are the
    best. As in the baseline, a region whose offset is not exactly one piece (one that closes around a hole) is dropped.
    """
    regions = find_regions(prob_map, config)
    most, enough = config.max_candidates, config.min_size + 2
    polygons, scores = list[np.ndarray](), list[float]()
    while regions and len(polygons) < most:
        best, regions = regions[:most], regions[most:]
        for region, (polygon, breadth) in zip(best, grow_regions(best, config, enough), strict=True):
            if polygon is not None and breadth >= enough:
                polygons.append(polygon)
                scores.append(region.score)
    return to_image_pixels(polygons[:most], scale, max_size), scores[:most]


class Region(NamedTuple):
    """Text as the network learned it: shrunk."""

    score: float  # mean probability inside, 0..1
    shrunk: np.ndarray  # (n, 2) int32 simplified contour or (4, 2) float32 least rectangle, in pixels of the map
    breadth: float  # shorter side of the rectangle; infinite for a contour, which is measured after the offset


def find_regions(prob_map: np.ndarray, config: Config) -> list[Region]:
    """The regions above `config.thresh` whose score reaches `config.box_thresh`, best first. `prob_map` as in
    `extract_polygons`. Rectangles (`config.use_polygon` false) are at least `config.min_size` wide."""
    prob_map, thresh = np.asarray(prob_map), config.thresh
    if prob_map.dtype == np.uint8:
        thresh = math.floor(thresh * 255)  # the same whole numbers are above the product rounded down as above it
    else:
        prob_map = np.asarray(prob_map, np.float32)
    if prob_map.ndim != 2:
        raise ValueError(f"prob_map must be (height, width), not of shape {prob_map.shape}")
    if prob_map.size == 0:
        return []
    binary_map = (prob_map > thresh).view(np.uint8)
    contours, tree = cv2.findContours(binary_map, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    regions = []
    for contour, (*_, parent) in zip(contours, tree[0] if contours else (), strict=True):
        if parent >= 0:  # a hole: grown outward, it would be a second polygon over the text around it
            continue
        if config.use_polygon:
            perimeter = max(1.0, cv2.arcLength(contour, True))
            breadth = 2 * cv2.contourArea(contour) / perimeter
            error = min(SIMPLIFY_RATIO * perimeter, SIMPLIFY_BREADTH * breadth)
            shrunk = cv2.approxPolyDP(contour, error, True)[:, 0]
            breadth = math.inf if len(shrunk) >= 4 else 0.0
        else:
            box = cv2.minAreaRect(contour)
            shrunk, breadth = corners(box), min(box[1])
        if breadth >= config.min_size and breadth > 0:
            score = region_score(prob_map, shrunk)
            if score >= config.box_thresh:
                regions.append(Region(score, shrunk, breadth))
    return sorted(regions, key=lambda region: -region.score)


def grow_regions(regions: list[Region], config: Config, enough: float) -> Iterator[tuple[np.ndarray | None, float]]:
    """Move each region outward, to the outline of its text, by its `unclip_distances`. Gives the (m, 2) int32 polygon
    or (4, 2) float32 rectangle in pixels of the map, None where it is not one piece, and the shorter side of its
    minimum-area rectangle: at least, where the offset alone makes it `enough` pixels wide."""
    shrunk = [region.shrunk for region in regions]
    distances = unclip_distances(shrunk, config)
    for distance, polygon in zip(distances, offset_polygons(shrunk, distances), strict=True):
        least = 2 * distance - OFFSET_ERROR
        if polygon is None:
            yield None, 0.0
        elif not config.use_polygon:
            box = cv2.minAreaRect(polygon)
            yield corners(box), min(box[1])
        else:
            yield polygon, least if least >= enough else max(least, min(cv2.minAreaRect(polygon)[1]))


def to_image_pixels(polygons: list[np.ndarray], scale: Sequence[float], max_size: Size | None) -> list[np.ndarray]:
    """(n, 2) int32 polygons of the image from those of the map; `scale` and `max_size` as in `extract_polygons`."""
    if not polygons:
        return []
    points = np.rint(np.concatenate(polygons) * np.asarray(scale, np.float64))
    points = points if max_size is None else points.clip(0, max_size)
    return split_polygons(points.astype(np.int32), np.array([len(polygon) for polygon in polygons]))


def region_score(prob_map: np.ndarray, polygon: np.ndarray) -> float:
    """Mean probability, 0..1, over the pixels of an (n, 2) polygon, its border included. `prob_map` as in
    `extract_polygons`. Of a float32 `polygon` the coordinates are truncated; pixels outside the map do not count."""
    polygon = polygon.astype(np.int32, copy=False)
    left, top, width, height = cv2.boundingRect(polygon)  # nothing beyond it is read
    right, bottom, left, top = left + width, top + height, max(left, 0), max(top, 0)
    region = prob_map[top : max(bottom, 0), left : max(right, 0)]
    if not region.size:
        return 0.0
    mask = np.zeros(region.shape, np.uint8)
    cv2.fillPoly(mask, [polygon], 1, offset=(-left, -top))
    score = cv2.mean(region, mask)[0]
    if math.isnan(score):
        score = cv2.mean(np.nan_to_num(region), mask)[0]
    return score / 255 if prob_map.dtype == np.uint8 else score


def unclip_distances(polygons: list[np.ndarray], config: Config) -> list[float]:
    """How far (n, 2) polygons are moved outward, in pixels: by `growth` times their `regrowth_distances`; without that,
    by D' = A unclip_ratio / L (DBNet equation 11). 0 for one without a perimeter."""
    if not polygons:
        return []
    points, counts = np.concatenate(polygons).astype(np.float64), np.array([len(polygon) for polygon in polygons])
    if growth := getattr(config, "growth", 0):
        return (growth * regrowth_distances(points, counts, config.shrink_ratio)).tolist()
    ratio = config.polygon_unclip_ratio if config.use_polygon else config.box_unclip_ratio
    return offset_distances(points, counts, ratio).tolist()  # cv2.arcLength is float32: it rounds ties away


def offset_polygons(polygons: list[np.ndarray], distances: list[float]) -> list[np.ndarray | None]:
    """(n, 2) polygons moved outward by distances in pixels, with round corners, within `OFFSET_ERROR` / 2. Each result
    is (m, 2) int32, or None if it is not exactly one piece."""
    offsets = (offset(polygon.tolist(), distance) for polygon, distance in zip(polygons, distances, strict=True))
    grown = [pieces[0] if len(pieces) == 1 else [] for pieces in offsets]
    counts = np.array([len(polygon) for polygon in grown], int)
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(grown)), np.int32, 2 * counts.sum())
    return [polygon if len(polygon) else None for polygon in split_polygons(flat.reshape(-1, 2), counts)]


def corners(box: tuple) -> np.ndarray:
    """(4, 2) float32 corners of OpenCV's (centre, size, angle), clockwise from the top left in all versions."""
    by_x = sorted(cv2.boxPoints(box).tolist())
    top_left, bottom_left = sorted(by_x[:2], key=lambda point: point[1])
    top_right, bottom_right = sorted(by_x[2:], key=lambda point: point[1])
    return np.array([top_left, top_right, bottom_right, bottom_left], np.float32)
