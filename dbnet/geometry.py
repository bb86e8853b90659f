"""Polygons between the original image and what the network sees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike

from dbnet.config import STRIDE

COORDINATE_LIMIT = 100_000_000
"""Pixels, either way: no image that can be read is longer (`dbnet.images.MAX_PIXELS`)."""

WHOLE_UP_TO = 4
"""Times that an image may be as long as it is broad for the network to look at it as a whole."""

PAGE_BREADTH = 0.65
"""Shorter side of a longer image in the network, as a share of image_size: a page of paper in each window. Of eight
receipts in a strip 98% are found so of what is found in each alone, and 96% with 0.5 (benchmarks/RESULTS.md)."""

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


def inference_side(width: int, height: int, image_size: int, enlarge: float) -> int:
    """Longer side in pixels to which an image of these pixels is resized for detection.

    That is image_size, but at most `enlarge` times the image's own. Text of an image more than WHOLE_UP_TO times as
    long as broad would get too small: there the shorter side becomes that of a page, if the image has that many pixels,
    and the network looks at windows (`windows`).
    """
    short, long = sorted((width, height))
    side = min(image_size, enlarge * long)
    if long > WHOLE_UP_TO * short:
        side = max(side, min(long * image_size * PAGE_BREADTH / short, long))
    return max(1, math.floor(side + 0.5))


class Window(NamedTuple):
    """A part of a long image, along its longer side, in pixels."""

    start: int
    stop: int
    kept_from: int
    """from here on its probability map counts, measured from the start of the image"""
    kept_to: int


def windows(length: int, size: int) -> list[Window]:
    """Windows of `size` pixels that cover a padded image of `length`; both are multiples of the network's stride.

    They overlap by an eighth or more, and of the map of each the outer half of an overlap is not used.
    """
    if length <= size:
        return [Window(0, length, 0, length)]
    count = math.ceil((length - size) / (size * 7 / 8)) + 1
    starts = [round((length - size) * place / (count - 1) / STRIDE) * STRIDE for place in range(count)]
    middles = [(left + size + right) // 2 for left, right in pairwise(starts)]
    return [
        Window(start, start + size, *kept) for start, kept in zip(starts, pairwise([0, *middles, length]), strict=True)
    ]


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


UNEVEN_WEIGHTS = np.array([0.2403, 0.2601, 0.2487, 0.2509])
"""Of the corners of a quadrilateral, for a point inside it."""

UNIT_SQUARE = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])[:, :, None]


@dataclass(frozen=True)
class Polygons:
    """The polygons of an image, as arrays over all of them."""

    points: np.ndarray
    """(2, total) float64 of integers, polygon after polygon."""
    starts: np.ndarray
    """(len,) where in `points` each polygon begins."""
    counts: np.ndarray
    """(len,) how many points each has."""
    is_quad: np.ndarray
    """(len,) which are strictly convex quadrilaterals: nearly all words are, and they need no general geometry."""
    quads: np.ndarray
    """(2, 4, len) those, turning from the x axis to the y axis; a unit square where `is_quad` is False."""
    low: np.ndarray
    """(2, len) least x and y of each."""
    high: np.ndarray
    """(2, len) greatest x and y of each."""

    is_given: np.ndarray
    """for each polygon that was given, whether it is one of these, in their order"""

    @classmethod
    def read(cls, polygons: "Sequence[ArrayLike] | Polygons", min_points: int) -> "Polygons":
        """Those of the (n, 2) polygons that have `min_points`, 3 or more; what has been read is not read again.

        Coordinates are truncated to integers.

        Raises ValueError if a polygon is not (n, 2) or has a coordinate that is not finite or beyond all images.
        """
        if isinstance(polygons, Polygons):
            return polygons if (polygons.counts >= min_points).all() else polygons._of_points(min_points)
        arrays = [np.asarray(polygon) for polygon in polygons]
        counts = np.array([len(array) for array in arrays], np.intp)
        is_given = counts >= min_points
        arrays = [arrays[index] for index in np.flatnonzero(is_given)]
        points = np.concatenate(arrays, dtype=np.float64) if arrays else np.empty((0, 2))
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError("a polygon must be an (n, 2) array of points")
        points = np.trunc(points.T, order="C")
        if not (np.abs(points) <= COORDINATE_LIMIT).all():  # nan is not either
            raise ValueError(f"a polygon has a coordinate that is not finite, or beyond {COORDINATE_LIMIT}")
        return cls._of_outlines(points, counts[is_given], is_given)

    def _of_points(self, min_points: int) -> "Polygons":
        """Only those that have so many points."""
        keeps = self.counts >= min_points
        is_given = self.is_given.copy()
        is_given[is_given] = keeps
        return self._of_outlines(self.points[:, np.repeat(keeps, self.counts)], self.counts[keeps], is_given)

    @classmethod
    def _of_outlines(cls, points: np.ndarray, counts: np.ndarray, is_given: np.ndarray) -> "Polygons":
        starts = np.cumsum(counts) - counts
        is_quad, quads = _find_quads(points, starts, counts)
        low, high = np.minimum.reduceat(points, starts, axis=1), np.maximum.reduceat(points, starts, axis=1)
        return cls(points, starts, counts, is_quad, quads, low, high, is_given)

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def previous(self) -> np.ndarray:
        """(2, total) before each point the one that comes before it on its polygon, the last before the first."""
        before = np.arange(-1, self.points.shape[1] - 1)
        before[self.starts] += self.counts
        return self.points.take(before, axis=1)

    @cached_property
    def is_upright(self) -> np.ndarray:
        """(len,) which are rectangles along the axes."""
        return self.is_quad & (edges_of(self.quads) == 0).any(axis=0).all(axis=0)

    @cached_property
    def _rings(self) -> np.ndarray:
        """(len,) shapely polygons, valid or not."""
        polygon_of_point = np.repeat(np.arange(len(self)), self.counts)
        return shapely.polygons(shapely.linearrings(self.points.T, indices=polygon_of_point))

    @cached_property
    def is_simple(self) -> np.ndarray:
        """(len,) whether the outline neither crosses nor touches itself."""
        is_simple = self.is_quad.copy()
        if not is_simple.all():
            is_simple[~self.is_quad] = shapely.is_valid(self._rings[~self.is_quad])
        return is_simple

    @cached_property
    def shapes(self) -> np.ndarray:
        """(len,) valid shapely geometries: `buffer(0)` mends what crosses itself and empties what has no area."""
        shapes = self._rings.copy()
        shapes[~self.is_simple] = shapely.buffer(shapes[~self.is_simple], 0)
        return shapes

    @cached_property
    def areas(self) -> np.ndarray:
        """(len,) in square pixels, of what crosses itself that of its shape."""
        areas = np.abs(np.add.reduceat(cross(self.previous, self.points), self.starts)) / 2
        if not self.is_simple.all():
            areas[~self.is_simple] = shapely.area(self.shapes[~self.is_simple])
        return areas


def _find_quads(points: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`is_quad` and `quads` of `Polygons`. Four turns the same way are a convex quadrilateral."""
    quads = points.take(starts + np.arange(4)[:, None], axis=1, mode="clip")  # the last may have fewer than four
    edges = edges_of(quads)
    turns = cross(edges, next_corners(edges))
    turns_back = (turns < 0).all(axis=0)
    quads = np.where(turns_back, quads[:, ::-1], quads)
    is_quad = (counts == 4) & (turns_back | (turns > 0).all(axis=0))
    quads[:, :, ~is_quad] = UNIT_SQUARE
    return is_quad, quads


def near_pairs(some: Polygons, others: Polygons) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs whose bounding boxes meet, (k,) and (k,), in the order of `some`, then of `others`."""
    level = (some.low[1, :, None] <= others.high[1]) & (others.low[1] <= some.high[1, :, None])
    first, second = np.nonzero(level)  # of a page of lines, few: the others need not be compared any further
    meets = some.low[0].take(first) <= others.high[0].take(second)
    meets &= others.low[0].take(second) <= some.high[0].take(first)
    return first[meets], second[meets]


def contains(polygons: Polygons, select: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(k,) whether the polygon at each of the (k,) indices `select` contains that column of the (2, k) `points`.

    It does where a ray along x crosses its outline an odd number of times. So a point on a left or top edge is inside
    and one on a right or bottom edge is not, as in the competition's scorer.
    """
    is_near = (polygons.low.take(select, axis=1) <= points) & (polygons.high.take(select, axis=1) >= points)
    near = np.flatnonzero(is_near[0] & is_near[1])

    column, edge = _points_of(polygons, select[near])
    column = near[column]
    y, begin_y, end_y = points[1, column], polygons.previous[1, edge], polygons.points[1, edge]
    straddles = np.flatnonzero((end_y > y) != (begin_y > y))
    column, edge, y, begin_y, end_y = (
        column[straddles],
        edge[straddles],
        y[straddles],
        begin_y[straddles],
        end_y[straddles],
    )
    begin_x, end_x = polygons.previous[0, edge], polygons.points[0, edge]
    crosses = points[0, column] < (begin_x - end_x) * (y - end_y) / (begin_y - end_y) + end_x
    return np.bincount(column[crosses], minlength=len(select)) % 2 == 1


def _points_of(polygons: Polygons, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For all points of the polygons at the (k,) indices `select`: which of the k it is, and where in `points`."""
    counts = polygons.counts[select]
    return np.repeat(np.arange(len(select)), counts), np.repeat(polygons.starts[select], counts) + ranges(counts)


def common_areas(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(k,) areas in square pixels common to the polygons at the (k,) indices `first` of some and `second` of others.

    In closed form where some have four convex corners, as nearly all words do, and others do not cross themselves; the
    quickest where some are upright rectangles, as most words of a scan are.
    """
    is_quad = some.is_quad[first] & others.is_simple[second]
    is_upright = is_quad & some.is_upright[first]
    are_quads = is_quad & ~is_upright & others.is_quad[second]
    common = np.empty(len(first))
    for which, areas_of in (
        (is_upright, _common_areas_with_upright),
        (are_quads, _common_areas_of_quads),
        (is_quad & ~is_upright & ~are_quads, _common_areas_with_quads),
        (~is_quad, _common_areas_of_shapes),
    ):
        if which.any():
            common[which] = areas_of(some, others, first[which], second[which])
    return common


# The ways in which `common_areas` computes them; arguments and results are its own.


def _common_areas_with_upright(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of upright rectangles and simple polygons.

    By Green's theorem the sum over the polygon's edges, between the rectangle's top and bottom, of the integral along y
    of how far the edge lies past the rectangle's left side: not less than 0, and not more than its width.
    """
    which, point = _points_of(others, second)
    low, high = some.low.take(first, axis=1).take(which, axis=1), some.high.take(first, axis=1).take(which, axis=1)
    begin, end = others.previous.take(point, axis=1), others.points.take(point, axis=1)
    step, width = end - begin, high[0] - low[0]
    y = np.clip([begin[1], end[1]], low[1], high[1])
    x = (y - begin[1]) * np.divide(step[0], step[1], out=np.zeros_like(width), where=step[1] != 0) + begin[0] - low[0]
    run = x[1] - x[0]
    between, beyond = np.clip(x, 0, width), np.maximum(x, width)
    area = (between[1] + between[0]) / 2 * (between[1] - between[0]) + width * (beyond[1] - beyond[0])
    mean_distance = np.divide(area, run, out=between[0], where=run != 0)
    return np.abs(np.bincount(which, mean_distance * (y[1] - y[0]), minlength=len(first)))


def _common_areas_of_shapes(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of any polygons, one pair after the other."""
    return shapely.area(shapely.intersection(some.shapes[first], others.shapes[second]))


def _common_areas_of_quads(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of convex quadrilaterals.

    The outline of what is common is the parts of each outline inside the other polygon; its area is, by Green's
    theorem, half the sum of cross(begin, end) over those parts. A part that both outlines share counts once.
    """
    quads, clips = some.quads.take(first, axis=2), others.quads.take(second, axis=2)
    origin = clips[:, :1]
    quads, clips = quads - origin, clips - origin
    of_quads = _area_under_clipped_edges(quads, clips, keep_shared=True)
    of_clips = _area_under_clipped_edges(clips, quads, keep_shared=False)
    return np.maximum(of_quads + of_clips, 0)


def _area_under_clipped_edges(polygons: np.ndarray, clips: np.ndarray, keep_shared: bool) -> np.ndarray:
    """(k,) sums of cross(begin, end) / 2 over the parts of the edges of (2, n, k) polygons inside (2, m, k) clips."""
    steps = edges_of(polygons)
    enter, leave = _clip(polygons, steps, clips[:, :, None], edges_of(clips)[:, :, None], keep_shared)
    return ((leave - enter) * cross(polygons, steps)).sum(axis=0) / 2


def _clip(
    begin: np.ndarray, step: np.ndarray, corners: np.ndarray, lines: np.ndarray, keep_shared: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """From and to which t in 0..1 the points begin + t step are inside a convex shape; both the same where none is.

    Cyrus-Beck: each line of the shape cuts t off from below or above. `begin` and `step` are (2, ...). The shape's
    `corners`, and the directions of its `lines` from there, which have the inside on the side on which y lies from x,
    are (2, m, ...). An edge along a line is outside, except, with `keep_shared`, where both run the same way.
    """
    height = cross(lines, begin[:, None] - corners)
    climb = cross(lines, step[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -height / climb
    enter = np.where(climb > 0, crossing, 0).max(axis=0, initial=0)
    leave = np.where(climb < 0, crossing, 1).min(axis=0, initial=1)
    is_outside = (climb == 0) & (height <= 0)
    if keep_shared:
        is_outside &= (height < 0) | (dot(lines, step[:, None]) < 0)
    return enter, np.where(is_outside.any(axis=0), enter, np.maximum(leave, enter))


def _common_areas_with_quads(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of convex quadrilaterals and simple polygons.

    Seen from a point inside the quadrilateral, each part of the polygon's outline that lies inside it takes the
    place of the sector of the quadrilateral behind it. What is left of the quadrilateral, or of nothing where the
    polygon does not surround that point, is the common area.
    """
    quads = some.quads.take(first, axis=2)
    inside = np.tensordot(quads, UNEVEN_WEIGHTS, axes=(1, 0))  # so that no outline of integers runs through it
    quads = quads - inside[:, None]
    which, point = _points_of(others, second)
    origin = inside.take(which, axis=1)
    begin, end = others.previous.take(point, axis=1) - origin, others.points.take(point, axis=1) - origin
    turn = cross(begin, end)
    winding = ((begin[1] <= 0) & (end[1] > 0) & (turn > 0)).astype(int) - ((begin[1] > 0) & (end[1] <= 0) & (turn < 0))
    quad_area = cross(quads, next_corners(quads)).sum(axis=0) / 2
    common = np.bincount(which, winding, minlength=len(first)) * quad_area

    corners = quads.take(which, axis=2)
    enter, leave = _clip(begin, end - begin, corners, edges_of(corners))
    is_seen = np.flatnonzero((enter < leave) & (turn != 0))
    begin, step, turn = begin[:, is_seen], (end - begin)[:, is_seen], turn[is_seen]
    enter, leave, corners = enter[is_seen], leave[is_seen], corners[:, :, is_seen]
    # The directions of the sector's sides, from and to the point inside.
    wedge = np.stack([begin + enter * step, -(begin + leave * step)], axis=1) * np.sign(turn)
    start, stop = _clip(corners, edges_of(corners), np.zeros((2, 2, 1, 1)), wedge[:, :, None])
    sector = ((stop - start) * cross(corners, next_corners(corners))).sum(axis=0) / 2
    gained = (leave - enter) * turn / 2 - np.sign(turn) * sector
    return np.abs(common + np.bincount(which[is_seen], gained, minlength=len(first)))


def next_corners(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...), after each the next, the first after the last."""
    return np.concatenate([polygons[:, 1:], polygons[:, :1]], axis=1)


def edges_of(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...) steps from each corner to the next."""
    return next_corners(polygons) - polygons


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products of vectors; x and y are the first axis."""
    return a[0] * b[0] + a[1] * b[1]


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """z of the cross products of vectors, positive where b lies from a as y lies from x; x and y are the first axis."""
    return a[0] * b[1] - a[1] * b[0]


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..., one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
