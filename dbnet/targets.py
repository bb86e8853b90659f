"""Polygons to what the network learns: probability map and threshold map (DBNet, arXiv 1911.08947, section 3.4).

A polygon of area A and perimeter L has the distance D = A (1 - r^2) / L. The probability map is 1 inside the polygon
shrunk by D; the threshold map falls from `thresh_max` on the polygon's outline to `thresh_min` at D from it, on both
sides. Both maps are drawn for every training sample: each polygon costs work on the box around it only, boxes of like
size are computed together, and a quarter of the box and two sides are enough for an upright rectangle."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
import pyclipper

from dbnet.geometry import is_tangled, offset, offset_distances

if TYPE_CHECKING:
    from torch import Tensor

Map = TypeVar("Map", np.ndarray, "Tensor")

MAX_EFFORT = 300  # sum over polygons of points x share of the image in their box, beyond which none is drawn
BLOCK_ELEMENTS = 1 << 17  # float32 elements of the distance planes worked on at once: they fit the processor's cache
AT_ONCE = 12  # polygons of like size that are worked on at once
OUTSIDE_CIRCLE = 1 << 20  # makes an edge too far to matter outside its circle; a power of two keeps integers exact
LEVELS = 255  # steps of a threshold map's byte, from the lowest threshold to the highest
COARSE_DISTANCE = 1.3  # pixels; below it, rounding and the clipper's coarse arcs cost a dilated polygon some pixels
MAX_DRAWN_COORDINATE = 1 << 15  # pixels; polygons with a point further out are not drawn: OpenCV and float32 end there


def make_targets(
    polygons: Sequence[np.ndarray],
    height: int,
    width: int,
    shrink_ratio: float = 0.4,
    thresh_min: float = 0.3,
    thresh_max: float = 0.7,
) -> tuple[np.ndarray, np.ndarray]:
    """The two target maps of an image, as `draw_targets` makes them, but the second in its own unit: (height, width)
    float32 from `thresh_min` (at D and more from every outline) to `thresh_max` (on an outline), in 255 steps."""
    prob_map, thresh_levels, _ = draw_targets(polygons, height, width, shrink_ratio)
    return prob_map, thresh_of_levels(thresh_levels.astype(np.float32), thresh_min, thresh_max)


def draw_targets(
    polygons: Sequence[np.ndarray], height: int, width: int, shrink_ratio: float = 0.4
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw the two target maps of an image (DBNet section 3.4, "Label generation"), one byte for each pixel.

    `polygons` are (n, 2) arrays of (x, y) in pixels, integer or float; they are rounded to integer pixels, and cut off
    at the edges of the image. The inside of an outline that crosses itself is drawn as far as it can be shrunk.

    Returns `prob_map`, (height, width) uint8, 1 inside the shrunk polygons and 0 elsewhere; `thresh_levels`,
    (height, width) uint8 from 0 (at D and more from every outline) to 255 (on an outline); and the indices of the
    polygons without area, vanishing when shrunk, tangled or beyond MAX_EFFORT: mask these, or they are background."""
    prob_map, thresh_levels = np.zeros((2, height, width), np.uint8)
    lost, effort = set(range(len(polygons))), 0.0
    for indices, points in _stacked_by_point_count(polygons):
        flat, counts = points.reshape(-1, 2).astype(float), np.full(*points.shape[:2])
        distances = offset_distances(flat, counts, 1 - shrink_ratio**2)
        can_be_shrunk = (distances > 0) & ~np.fromiter(map(is_tangled, points), bool, len(points))
        efforts = effort_of(points, (width, height))
        order = efforts.argsort(kind="stable")  # so that the large ones are left out
        efforts = effort + efforts[order].cumsum()
        effort = efforts.max(initial=effort)
        order = order[(efforts <= MAX_EFFORT) & can_be_shrunk[order]]
        indices, points, distances = indices[order], points[order], distances[order]
        for index, polygon, distance in zip(indices.tolist(), points.tolist(), distances.tolist(), strict=True):
            for kernel in offset(polygon, -distance):  # one piece or several
                cv2.fillPoly(prob_map, [np.array(kernel, np.int32)], 1)
                lost.discard(index)
        _raise_near_outlines(thresh_levels, points, distances)
    return prob_map, thresh_levels, sorted(lost)


def effort_of(polygons: np.ndarray, size: Sequence[float]) -> np.ndarray:
    """(...) of (..., n, 2) polygons: n times the share that the box around each has of an image of (width, height)."""
    return polygons.shape[-2] * (np.ptp(polygons, axis=-2) / size).clip(0, 1).prod(axis=-1)


def thresh_of_levels(levels: Map, thresh_min: float, thresh_max: float) -> Map:
    """Thresholds from `thresh_min` to `thresh_max` of levels from 0 to 255: float arrays or tensors of any shape."""
    return levels * ((thresh_max - thresh_min) / LEVELS) + thresh_min


def thresh_mask(prob_map: Map, thresh_levels: Map) -> Map:
    """Where the threshold loss counts: inside the dilated polygons (DBNet section 3.5). Bool, shaped as the maps. Those
    are the pixels within D of an outline, where `thresh_levels` is above 0, and the shrunk polygons further in."""
    return (thresh_levels > 0) | (prob_map > 0)


def polygon_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """(height, width) uint8, 1 inside any polygon, or on the outline of one without area: no loss looks there. An
    outline that runs round twice is filled, and so is the hull of a tangled one, which would take minutes."""
    mask = np.zeros((height, width), np.uint8)
    for _, points in _stacked_by_point_count(polygons):
        for polygon in points:
            polygon = cv2.convexHull(polygon)[:, 0] if is_tangled(polygon) else polygon
            loops = pyclipper.SimplifyPolygon(polygon.tolist(), pyclipper.PFT_NONZERO) if len(polygon) > 4 else []
            for piece in (polygon, *loops):
                cv2.fillPoly(mask, [np.array(piece, np.int32)], 1)
    return mask


def _stacked_by_point_count(polygons: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The polygons that can be drawn, for each number of points n: their indices, and one (count, n, 2) int32 array."""
    by_point_count = defaultdict(list)
    arrays = [np.asarray(polygon) for polygon in polygons]
    for index, polygon in enumerate(arrays):
        if polygon.shape[1:] == (2,) and len(polygon):
            by_point_count[len(polygon)].append(index)
    for point_count, group in sorted(by_point_count.items()):
        points = np.concatenate([arrays[index] for index in group]).reshape(-1, point_count, 2)
        can_be_drawn = np.abs(points).max(axis=(1, 2)) < MAX_DRAWN_COORDINATE  # False for nan as well
        yield np.array(group)[can_be_drawn], np.rint(points[can_be_drawn]).astype(np.int32)


def _raise_near_outlines(thresh_levels: np.ndarray, points: np.ndarray, distances: np.ndarray) -> None:
    """Raise `thresh_levels`, in place, to its values for these polygons, (count, n, 2) int32 with their D."""
    boxes = _boxes_within(distances, points, thresh_levels.shape)
    edges = np.stack([points, np.roll(points, -1, axis=1)])
    low, high = points.min(axis=1), points.max(axis=1)
    along_x, along_y = np.moveaxis(edges[0] == edges[1], 2, 0)
    is_upright = (along_x != along_y).all(axis=1) & (points.shape[1] == 4)  # rectangles with sides along x and y
    is_mirrored = is_upright & (boxes.sum(axis=0) - 1 == low + high).all(axis=1)  # nothing of them is cut off
    path = np.where([[0, 1], [0, 0], [1, 0]], high[:, None], low[:, None])  # their left and their upper side
    is_seen = (boxes[0] < boxes[1]).all(axis=1)
    for mirrored, sides in ((False, edges), (True, np.stack([path[:, :2], path[:, 1:]]))):
        which = is_seen & (is_mirrored == mirrored)
        if which.any():
            _raise_in_boxes(thresh_levels, boxes[:, which], sides[:, which], distances[which], mirrored)


def _raise_in_boxes(
    thresh_levels: np.ndarray, boxes: np.ndarray, edges: np.ndarray, distances: np.ndarray, is_mirrored: bool
) -> None:
    """Raise `thresh_levels` in (2, count, 2) boxes of `_boxes_within`, near (2, count, n, 2) edges: starts, then ends.
    With `is_mirrored`, they are those of the upper left quarter of a box, and all quarters are alike."""
    first, last = boxes
    sizes = (last - first + 1) // 2 if is_mirrored else last - first
    coefficients = _plane_coefficients(*(edges - first[:, None]))
    slopes = (-LEVELS / distances).astype(np.float32)[:, None]
    width, height = sizes.max(axis=0).tolist()
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    basis = np.stack(np.broadcast_arrays(np.float32(1), x, y, np.square(x) + np.square(y)))
    planes, order = coefficients.shape[1], np.lexsort(sizes.T[::-1])
    corners = np.concatenate([first, last, sizes], axis=1).tolist()
    for group in np.split(order, range(AT_ONCE, len(order), AT_ONCE)):
        width, height = sizes[group].max(axis=0).tolist()
        rows_at_once = max(1, BLOCK_ELEMENTS // (len(group) * planes * width))
        for row in range(0, height, rows_at_once):
            pixels = basis[:, row : min(row + rows_at_once, height), :width]
            distance = np.dot(coefficients[group].reshape(-1, 4), pixels.reshape(4, -1))
            value = np.sqrt(_nearest(distance.reshape(len(group), planes, -1)))
            value *= slopes[group]
            value += LEVELS + 0.5  # so that cutting off the fraction rounds
            levels = np.maximum(value, 0, out=value).astype(np.uint8).reshape(len(group), -1, width)
            for index, level in zip(group.tolist(), levels, strict=True):
                left, top, right, bottom, own_width, own_height = corners[index]
                box, level = thresh_levels[top:bottom, left:right], level[: max(0, own_height - row), :own_width]
                if is_mirrored:
                    level = np.concatenate([level, level[:, : (right - left) // 2][:, ::-1]], axis=1)
                for part in (box, box[::-1]) if is_mirrored else (box,):
                    part = part[row : row + len(level)]
                    np.maximum(part, level, out=part)


def _boxes_within(distances: np.ndarray, points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The boxes around dilated polygons, cut to the image: the first pixels and those past the last, (2, count, 2)."""
    margins = distances.astype(np.int32)[:, None]  # pixels and points are integers: further out a pixel is at D
    first = points.min(axis=1) - margins
    last = points.max(axis=1) + margins + 1
    for index in np.flatnonzero((distances > 1) & (distances < COARSE_DISTANCE)):
        dilated = np.array(offset(points[index].tolist(), distances[index])[0], np.int32)
        first[index], last[index] = dilated.min(axis=0), dilated.max(axis=0) + 1
    return np.stack([np.maximum(first, 0), np.minimum(last, shape[::-1])])


def _plane_coefficients(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Weights of 1, x, y and x^2 + y^2 of a pixel in three functions for each of (count, n, 2) edges.

    With u and v the vectors from the pixel to the ends of the edge: u . v, which is at most 0 in the circle that has
    the edge as its diameter; u x v / |v - u|, the distance to the edge's line; |u|^2, the squared distance to its first
    end. One matrix product computes them for all edges and pixels.

    Returns (count, 3 n, 4) float32: the weights of the n circles, then of the lines, then of the first ends."""
    start, end = start.astype(np.float64), end.astype(np.float64)
    edge = end - start
    length = np.maximum(np.sqrt(np.square(edge).sum(axis=2)), 1)  # a repeated point stands for its edge
    normal = np.stack([edge[..., 1], -edge[..., 0]], axis=-1) / length[..., None]
    coefficients = np.zeros((len(start), 3, start.shape[1], 4), np.float32)
    circle, line, point = coefficients.transpose(1, 0, 2, 3)
    circle[..., 0] = (start * end).sum(axis=2)
    circle[..., 1:3] = -(start + end)
    circle[..., 3] = 1
    circle *= OUTSIDE_CIRCLE
    line[..., 0] = -(normal * start).sum(axis=2)
    line[..., 1:3] = normal
    point[..., 0] = np.square(start).sum(axis=2)
    point[..., 1:3] = -2 * start
    point[..., 3] = 1
    return coefficients.reshape(len(start), 3 * start.shape[1], 4)


def _nearest(planes: np.ndarray) -> np.ndarray:
    """(count, pixels) squared distances to each outline, from (count, 3 n, pixels) planes, which are overwritten. As in
    the baseline, an edge counts only for pixels in its circle; elsewhere its ends do. (Near the ends of edges the
    threshold differs by up to 0.03 from that of the exact distance.)"""
    edges = planes.shape[1] // 3
    circle, line = planes[:, :edges], planes[:, edges : 2 * edges]
    np.multiply(line, line, out=line)
    np.maximum(line, circle, out=line)
    return planes[:, edges:].min(axis=1)
