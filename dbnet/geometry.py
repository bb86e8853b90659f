"""Polygons between the original image and what the network sees."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike

from dbnet.config import STRIDE

MAX_COORDINATE = 100_000_000
"""Pixels, in both directions: longer than any image that can be read (`dbnet.images.MAX_PIXELS`)."""

WHOLE_UP_TO = 4
"""Largest ratio of the sides of an image that the network processes as a whole."""

PAGE_BREADTH = 0.6
"""Shorter side of a longer image in the network, as a share of image_size: a page of paper in each window. Of what is
found in eight receipts alone, a strip of them has 98%, and 97% with an IoU above 0.5 (benchmarks/RESULTS.md)."""

MAX_CROSSINGS = 500
"""Self-crossings up to which the area of an outline is exact. Their number can grow with the square of the points."""

GRID = 64
"""Rows and columns of the grid that samples the area of an outline with more crossings, within two or three percent."""

MAX_EDGES = 1 << 22
"""Pairs of a point and an edge that `contains` compares at once, to bound its memory."""


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


def in_windows(network: Callable[[Any], Any], images: Any, size: int, join: Callable[[list, int], Any]) -> Any:
    """(N, height, width) maps of (N, height, width, 3) images, arrays or tensors: what `network` makes of the `windows`
    along their longer side, put together by `join`, a concatenation."""
    axis = 1 if images.shape[1] > images.shape[2] else 2
    before = (slice(None),) * axis
    maps = []
    for window in windows(images.shape[axis], size):
        prob_maps = network(images[(*before, slice(window.start, window.stop))])
        maps.append(prob_maps[(*before, slice(window.kept_from - window.start, window.kept_to - window.start))])
    return join(maps, axis)


def padded(length: int) -> int:
    """A side in pixels rounded up to a multiple of the network's coarsest stride."""
    return -(-length // STRIDE) * STRIDE


def fault_of(polygon: np.ndarray) -> str | None:
    """The reason why an (n, 2) float64 polygon of a file cannot be scored or learned; None if it can."""
    if not np.isfinite(polygon).all():
        return "a coordinate is not a finite number"
    if np.abs(polygon).max(initial=0) > MAX_COORDINATE:
        return f"a coordinate is beyond {MAX_COORDINATE} pixels"
    return None


def clip_polygons(points: np.ndarray, counts: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Move points outside the image to its border.

    Args:
        points: (total, 2), polygon after polygon.
        counts: (polygons,) number of points of each.

    Returns:
        The points, and (polygons,) bool, which polygons are degenerate then: they have fewer than three points, or less
        than a square pixel.
    """
    clipped = np.clip(points, 0, (width, height))
    return clipped, (counts < 3) | (areas(clipped, counts) < 1)


def visible_shares(points: np.ndarray, counts: np.ndarray, width: int, height: int) -> np.ndarray:
    """(polygons,) share of each polygon's area, 0..1, that is left when its points are moved to the image border.

    Arguments as in `clip_polygons`. For upright rectangles this is the share of their area inside the image. It is 0
    without an area.
    """
    whole = areas(points, counts)
    return areas(np.clip(points, 0, (width, height)), counts) / np.where(whole > 0, whole, np.inf)


def areas(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) areas in square pixels by the shoelace formula; arguments as in `clip_polygons`.

    In an outline that crosses itself, parts that turn in opposite directions cancel.
    """
    x, y = points.T
    next_x, next_y = points[next_point(counts)].T
    return np.abs(_sums(x * next_y - y * next_x, counts)) / 2


def perimeters(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) lengths of the closed outlines in pixels; arguments as in `clip_polygons`."""
    return _sums(np.sqrt(np.square(points[next_point(counts)] - points).sum(axis=1)), counts)


def offset_distances(points: np.ndarray, counts: np.ndarray, ratio: float) -> np.ndarray:
    """(polygons,) distances area x ratio / perimeter in pixels; 0 without a perimeter. Arguments as in `clip_polygons`.

    With the ratio 1 - r^2 it is the distance D of the targets (DBNet equation 10), with the unclip ratio the distance
    D' of post-processing (equation 11).
    """
    lengths = perimeters(points, counts)
    return areas(points, counts) * ratio / np.where(lengths > 0, lengths, np.inf)


def next_point(counts: np.ndarray) -> np.ndarray:
    """(total,) index of the point that follows each point on its polygon; the first follows the last."""
    following = np.arange(1, counts.sum() + 1)
    ends = np.cumsum(counts)
    has_points = counts > 0
    following[ends[has_points] - 1] = (ends - counts)[has_points]
    return following


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) sums over each polygon of one value for each point."""
    sums = np.zeros(len(counts))
    has_points = counts > 0
    if has_points.any():
        sums[has_points] = np.add.reduceat(values, (np.cumsum(counts) - counts)[has_points])
    return sums


def split_polygons(points: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """A list of (n, 2) arrays; arguments as in `clip_polygons`."""
    ends = np.cumsum(counts).tolist()
    return [points[start:end] for start, end in zip([0, *ends], ends, strict=False)]


UNEVEN_WEIGHTS = np.array([0.2403, 0.2601, 0.2487, 0.2509])
"""Weights of a quadrilateral's corners whose mean is a point inside it."""

UNIT_SQUARE = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])[:, :, None]


@dataclass(frozen=True)
class Polygons:
    """The polygons of an image, as arrays over all of them."""

    points: np.ndarray
    """(2, total) float64 of integers, polygon after polygon."""
    starts: np.ndarray
    """(len,) index in `points` at which each polygon begins."""
    counts: np.ndarray
    """(len,) number of points of each."""
    is_quad: np.ndarray
    """(len,) strictly convex quadrilaterals: nearly all words are, and they need no general geometry."""
    quads: np.ndarray
    """(2, 4, len) their corners, turning from the x axis to the y axis; a unit square where `is_quad` is False."""
    low: np.ndarray
    """(2, len) least x and y of each."""
    high: np.ndarray
    """(2, len) greatest x and y of each."""

    is_given: np.ndarray
    """(given polygons,) bool: which of the polygons passed to `read` have enough points and are among these."""

    @classmethod
    def read(cls, polygons: "Sequence[ArrayLike] | Polygons", min_points: int) -> "Polygons":
        """Read those of the (n, 2) polygons that have `min_points`, 3 or more; `Polygons` are not read again.

        Coordinates are truncated to integers.

        Raises ValueError if a polygon is not (n, 2) or has a coordinate that is not finite or beyond MAX_COORDINATE.
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
        if not (np.abs(points) <= MAX_COORDINATE).all():  # False for nan as well
            raise ValueError(f"a polygon has a coordinate that is not finite, or beyond {MAX_COORDINATE}")
        return cls._of_outlines(points, counts[is_given], is_given)

    def _of_points(self, min_points: int) -> "Polygons":
        """Only the polygons of at least so many points."""
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
        """(2, total) the point before each point on its polygon; the last is before the first."""
        before = np.arange(-1, self.points.shape[1] - 1)
        before[self.starts] += self.counts
        return self.points.take(before, axis=1)

    @cached_property
    def is_upright(self) -> np.ndarray:
        """(len,) rectangles along the axes."""
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
        """(len,) valid shapely geometries; of an outline that crosses itself its even-odd inside."""
        shapes = self._rings.copy()
        for index in np.flatnonzero(~self.is_simple).tolist():
            shapes[index] = self._even_odd_shape(index)
        return shapes

    def _even_odd_shape(self, index: int) -> shapely.Geometry:
        """What a ray from outside reaches by crossing the outline an odd number of times."""
        points = self.points[:, self.starts[index] : self.starts[index] + self.counts[index]].T
        if is_tangled(points):
            return _even_odd_cells(points)
        faces = shapely.get_parts(shapely.polygonize([shapely.node(shapely.linearrings(points))]))
        inner_points = shapely.get_coordinates(shapely.point_on_surface(faces)).T
        return shapely.union_all(faces[contains(self, np.full(len(faces), index), inner_points)])

    @cached_property
    def outline_areas(self) -> np.ndarray:
        """(len,) areas in square pixels by the shoelace formula, in which opposite turns cancel."""
        return areas(self.points.T, self.counts)

    @cached_property
    def areas(self) -> np.ndarray:
        """(len,) areas in square pixels; of an outline that crosses itself that of its even-odd inside."""
        if self.is_simple.all():
            return self.outline_areas
        return np.where(self.is_simple, self.outline_areas, shapely.area(self.shapes))


def _find_quads(points: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`is_quad` and `quads` of `Polygons`. Four turns in the same direction are a convex quadrilateral."""
    quads = points.take(starts + np.arange(4)[:, None], axis=1, mode="clip")  # the last may have fewer than four
    edges = edges_of(quads)
    turns = cross(edges, next_corners(edges))
    turns_back = (turns < 0).all(axis=0)
    quads = np.where(turns_back, quads[:, ::-1], quads)
    is_quad = (counts == 4) & (turns_back | (turns > 0).all(axis=0))
    quads[:, :, ~is_quad] = UNIT_SQUARE
    return is_quad, quads


def is_tangled(points: np.ndarray) -> bool:
    """Whether the outline of (n, 2) points crosses or touches itself more than about MAX_CROSSINGS times.

    Their number is estimated from 32 of its edges, in a time that grows as n.
    """
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]  # an edge of no length meets its neighbours
    count = len(points)
    if count * (count - 3) / 2 <= MAX_CROSSINGS:  # an edge meets all edges but itself and its neighbours at most
        return False
    begin, end = points.T[:, None].astype(float), np.roll(points, -1, axis=0).T[:, None].astype(float)
    sample = np.random.default_rng(0).permutation(count)[:32]
    first, last = begin[:, 0, sample, None], end[:, 0, sample, None]
    meets = cross(last - first, begin - first) * cross(last - first, end - first) <= 0
    meets &= cross(end - begin, first - begin) * cross(end - begin, last - begin) <= 0
    meets &= (np.maximum(first, last) >= np.minimum(begin, end)).all(axis=0)
    meets &= (np.minimum(first, last) <= np.maximum(begin, end)).all(axis=0)
    crossings = (meets.sum() / len(sample) - 3) * count / 2  # an edge also meets itself and its neighbours
    return bool(crossings > MAX_CROSSINGS)


def _even_odd_cells(points: np.ndarray) -> shapely.Geometry:
    """The cells of a GRID x GRID grid over the (n, 2) outline whose centres are inside by the even-odd rule.

    A ray from the left along each row of centres crosses edges; a centre is inside after an odd number of crossings.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    begin = (points - low) * (GRID / np.maximum(high - low, 1)) - 0.5  # in cells: the centres are at 0 .. GRID - 1
    end = np.roll(begin, -1, axis=0)
    rows = np.arange(GRID)[:, None]
    row, edge = np.nonzero((begin[:, 1] > rows) != (end[:, 1] > rows))
    slope = (end[edge, 0] - begin[edge, 0]) / (end[edge, 1] - begin[edge, 1])
    column = np.ceil(begin[edge, 0] + (row - begin[edge, 1]) * slope).astype(int)
    crossings = np.bincount(row * (GRID + 1) + column, minlength=GRID * (GRID + 1)).reshape(GRID, GRID + 1)
    row, column = np.nonzero(np.cumsum(crossings, axis=1)[:, :GRID] % 2)
    x, y = np.linspace(low, high, GRID + 1).T
    return shapely.coverage_union_all(shapely.box(x[column], y[row], x[column + 1], y[row + 1]))


def near_pairs(some: Polygons, others: Polygons) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs whose bounding boxes meet, (k,) and (k,), in the order of `some`, then of `others`."""
    level = (some.low[1, :, None] <= others.high[1]) & (others.low[1] <= some.high[1, :, None])
    first, second = np.nonzero(level)  # of a page of lines these are few, so that x is compared for few
    meets = some.low[0].take(first) <= others.high[0].take(second)
    meets &= others.low[0].take(second) <= some.high[0].take(first)
    return first[meets], second[meets]


def contains(polygons: Polygons, select: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(k,) whether the polygon at each of the (k,) indices `select` contains that column of the (2, k) `points`.

    It does where a ray along x crosses its outline an odd number of times. So a point on a left or top edge is inside
    and one on a right or bottom edge is not, as in the competition's scorer.
    """
    if len(select) > 1 and polygons.counts[select].sum() > MAX_EDGES:
        half = len(select) // 2
        halves = (select[:half], points[:, :half]), (select[half:], points[:, half:])
        return np.concatenate([contains(polygons, *each) for each in halves])
    is_near = (polygons.low.take(select, axis=1) <= points) & (polygons.high.take(select, axis=1) >= points)
    near = np.flatnonzero(is_near[0] & is_near[1])

    column, edge = _points_of(polygons, select[near])
    column = near[column]
    y, begin_y, end_y = points[1, column], polygons.previous[1, edge], polygons.points[1, edge]
    straddles = np.flatnonzero((end_y > y) != (begin_y > y))
    column, edge = column[straddles], edge[straddles]
    y, begin_y, end_y = y[straddles], begin_y[straddles], end_y[straddles]
    begin_x, end_x = polygons.previous[0, edge], polygons.points[0, edge]
    crosses = points[0, column] < (begin_x - end_x) * (y - end_y) / (begin_y - end_y) + end_x
    return np.bincount(column[crosses], minlength=len(select)) % 2 == 1


def _points_of(polygons: Polygons, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For all points of the polygons at the (k,) indices `select`: position in `select`, and index in `points`."""
    counts = polygons.counts[select]
    return np.repeat(np.arange(len(select)), counts), np.repeat(polygons.starts[select], counts) + ranges(counts)


def common_areas(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(k,) areas in square pixels common to the polygons at the (k,) indices `first` of some and `second` of others.

    In closed form where `some` are convex quadrilaterals, as nearly all words are, and `others` do not cross
    themselves: shapely takes twice the time for a page of words. Outlines that cross themselves are even-odd.
    """
    in_closed_form = some.is_quad[first] & others.is_simple[second]
    common = np.empty(len(first))
    if in_closed_form.any():
        common[in_closed_form] = _common_areas_with_quads(some, others, first[in_closed_form], second[in_closed_form])
    if not in_closed_form.all():
        shapes, other_shapes = some.shapes[first[~in_closed_form]], others.shapes[second[~in_closed_form]]
        common[~in_closed_form] = shapely.area(shapely.intersection(shapes, other_shapes))
    return common


def _common_areas_with_quads(some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`common_areas` of convex quadrilaterals and simple polygons.

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


def _clip(begin: np.ndarray, step: np.ndarray, corners: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From and to which t in 0..1 the points begin + t step are inside a convex shape; both the same where none is.

    Cyrus-Beck: each line of the shape cuts t off from below or above. `begin` and `step` are (2, ...). The shape's
    `corners`, and the directions of its `lines` from there, which have the inside on the side on which y lies from x,
    are (2, m, ...). An edge along a line is outside.
    """
    height = cross(lines, begin[:, None] - corners)
    climb = cross(lines, step[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -height / climb
    enter = np.where(climb > 0, crossing, 0).max(axis=0, initial=0)
    leave = np.where(climb < 0, crossing, 1).min(axis=0, initial=1)
    is_outside = ((climb == 0) & (height <= 0)).any(axis=0)
    return enter, np.where(is_outside, enter, np.maximum(leave, enter))


def next_corners(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...) the corner after each; the first is after the last."""
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


# ---- outlines as annotations have them: from the upper left along the top, then back along the bottom

ELONGATED = 1.5
"""Ratio of the sides from which a word surely runs along its longer side."""


def fit_outline(polygon: np.ndarray) -> np.ndarray:
    """(n, 2) outline -> (4, 2) corners of the enclosing rectangle where it fits, else (8, 2): 4 points along the top,
    from the upper left, then 4 back along the bottom. A convex quadrilateral keeps its corners."""
    corners = enclosing_rectangle(polygon)
    if len(polygon) == 4:
        quads, is_convex = _clockwise(polygon[None])
        return np.roll(quads[0], -int(_upper_left(quads)[0]), axis=0) if is_convex[0] else corners
    size = np.hypot(*(corners[[1, 3]] - corners[0]).T)
    if size.prod() < 1 or areas(polygon.astype(np.float64), np.array([len(polygon)]))[0] > 0.7 * size.prod():
        return corners
    axes = (corners[[1, 3]] - corners[0]) / size[:, None]
    x, y = axes @ (polygon - corners[0]).T
    columns = [_crossings(x, y, share * size[0]) for share in (0.03, 1 / 3, 2 / 3, 0.97)]
    at = np.array([0, 1 / 3, 2 / 3, 1]) * size[0]
    top = np.stack([at, [column.min() for column in columns]], axis=1)
    bottom = np.stack([at, [column.max() for column in columns]], axis=1)
    return np.concatenate([top, bottom[::-1]]) @ axes + corners[0]


def _crossings(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """y at each crossing of a closed outline with the line x = at; it must cross it."""
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    crosses = (np.minimum(x, next_x) <= at) & (np.maximum(x, next_x) >= at) & (x != next_x)
    x, y, next_x, next_y = x[crosses], y[crosses], next_x[crosses], next_y[crosses]
    return y + (at - x) / (next_x - x) * (next_y - y)


def enclosing_rectangle(polygon: np.ndarray) -> np.ndarray:
    """(4, 2) corners of the least enclosing rectangle, clockwise from the upper left."""
    quads = cv2.boxPoints(cv2.minAreaRect(polygon.astype(np.float32)))[None].astype(np.float64)
    quads, _ = _clockwise(quads)
    return np.roll(quads[0], -int(_upper_left(quads)[0]), axis=0)


def order_outlines(polygons: list[np.ndarray]) -> tuple[list[np.ndarray], int, int]:
    """The outlines of an image, quadrilaterals from the upper left along the top where that is certain.

    Corners in zigzag (upper left, upper right, lower left, lower right) become the quadrilateral that they mean, and
    closing points go. Quadrilaterals that run anticlockwise or begin at the lower right are turned round, which the
    metric does not notice. Those that begin at one of the other corners are either shifted by one corner or on a page
    that lies on its side: the words longer than high say which. An outline of more points stays as it is.

    Returns:
        the outlines, how many were changed, and how many begin elsewhere and are left since neither is certain.
    """
    polygons = [_opened(polygon) for polygon in polygons]
    which = [index for index, polygon in enumerate(polygons) if len(polygon) == 4]
    doubtful = sum(len(polygon) > 4 and not _begins_at_an_end(polygon) for polygon in polygons)
    if not which:
        return polygons, 0, doubtful
    given = np.stack([polygons[index] for index in which])
    quads, is_convex = _clockwise(given)
    upper_left = _upper_left(quads)
    upright = np.take_along_axis(quads, (upper_left[:, None] + np.arange(4))[:, :, None] % 4, axis=1)
    sides = np.hypot(*np.moveaxis(np.roll(upright, -1, axis=1) - upright, 2, 0))
    width, height = sides[:, 0] + sides[:, 2], sides[:, 1] + sides[:, 3]
    rolls = np.where(is_convex, upper_left, 0)  # by how many corners each is turned back
    for start in (1, 3):
        starts_there = is_convex & (upper_left == start)
        wide = np.count_nonzero(starts_there & (width > ELONGATED * height))
        tall = np.count_nonzero(starts_there & (height > ELONGATED * width))
        if wide < 2 * tall or not wide:  # words of a page that lies on its side, or nothing to tell
            rolls[starts_there] = 0
            doubtful += 0 if tall > 2 * wide else int(np.count_nonzero(starts_there))
    ordered = np.take_along_axis(quads, (rolls[:, None] + np.arange(4))[:, :, None] % 4, axis=1)
    for index, quad in zip(which, ordered, strict=True):
        polygons[index] = quad
    return polygons, int((ordered != given).any(axis=(1, 2)).sum()), doubtful


def _opened(polygon: np.ndarray) -> np.ndarray:
    """The outline without a last point that repeats the first, if four are left."""
    return polygon[:-1] if len(polygon) > 4 and (polygon[0] == polygon[-1]).all() else polygon


def _clockwise(quads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, 4, 2) corners in the order that makes each quadrilateral convex and clockwise, and (k,) where there is one.

    Others, as an arrowhead, stay as they are.
    """
    ordered, is_convex = quads.copy(), np.zeros(len(quads), bool)
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3)):  # as it is, and without the crossing of a zigzag
        corners = quads[:, order]
        edges = np.moveaxis(np.roll(corners, -1, axis=1) - corners, 2, 0)
        turns = cross(edges, np.roll(edges, -1, axis=2))
        clockwise, anticlockwise = (turns > 0).all(axis=1) & ~is_convex, (turns < 0).all(axis=1) & ~is_convex
        ordered[clockwise], ordered[anticlockwise] = corners[clockwise], corners[anticlockwise, ::-1]
        is_convex |= clockwise | anticlockwise
    return ordered, is_convex


def _upper_left(quads: np.ndarray) -> np.ndarray:
    """(k,) index of the upper left corner of clockwise (k, 4, 2): where the side begins that goes furthest right."""
    return np.argmax(np.roll(quads, -1, axis=1)[:, :, 0] - quads[:, :, 0], axis=1)


def _begins_at_an_end(polygon: np.ndarray) -> bool:
    """Whether the first half of an outline's points is one of its long sides, as far as it has long sides."""
    corners = enclosing_rectangle(polygon)
    axis = max(corners[1] - corners[0], corners[2] - corners[1], key=lambda side: math.hypot(*side))
    length, area = math.hypot(*axis), areas(corners, np.array([4]))[0]
    if length**2 <= 2 * area:
        return True
    half, along = len(polygon) // 2, polygon @ axis / length
    shares = (along - along.min()) / np.ptp(along)
    first, last = (shares[0] + shares[-1]) / 2, (shares[half - 1] + shares[half]) / 2
    return bool(min(first, last) < 0.25 and max(first, last) > 0.75)


def reading_order(polygons: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """Order of the words of a page: line by line from the top, each from the left.

    A word belongs to the line whose last word so far it overlaps most in height, at least by half of the lower one, so
    lines may be skewed and bent. Where most words are higher than long, the page lies on its side and lines run down.

    Returns:
        indices of the polygons in reading order, and the line number of each polygon, from 1.
    """
    if not polygons:
        return [], []
    quads = np.stack([enclosing_rectangle(polygon) for polygon in polygons])
    if is_turned(quads):
        quads = np.roll(quads[:, :, ::-1] * (1, -1), -1, axis=1)  # what runs down runs right
    along = quads[:, 1] - quads[:, 0] + quads[:, 2] - quads[:, 3]
    heights = np.hypot(*(quads[:, 3] - quads[:, 0]).T)
    is_long = np.hypot(*along.T) / 2 > ELONGATED * heights
    angle = np.median(np.arctan2(*(along[is_long] if is_long.any() else along).T[::-1]))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    x, y = (quads.mean(axis=1) @ turn).T
    line_of, lasts = np.zeros(len(polygons), int), list[int]()
    for index in np.argsort(x, kind="stable").tolist():
        low = np.minimum(heights[index], heights[lasts])
        shared = (heights[index] + heights[lasts]) / 2 - np.abs(y[index] - y[lasts])
        share = np.minimum(shared, low) / np.maximum(low, 1e-9)
        best = int(share.argmax()) if lasts else 0
        if not lasts or share[best] < 0.5:
            best = len(lasts)
            lasts.append(index)
        lasts[best], line_of[index] = index, best
    middles = np.bincount(line_of, y) / np.bincount(line_of)
    number_of = np.argsort(np.argsort(middles, kind="stable"), kind="stable") + 1
    numbers = number_of[line_of]
    return np.lexsort((x, numbers)).tolist(), numbers.tolist()


def is_turned(quads: np.ndarray) -> bool:
    """Whether most of the elongated words among (k, 4, 2) upright rectangles are higher than long: the page lies on its
    side."""
    width, height = (np.hypot(*(quads[:, 1] - quads[:, corner]).T) for corner in (0, 2))
    tall, wide = np.count_nonzero(height > ELONGATED * width), np.count_nonzero(width > ELONGATED * height)
    return bool(tall > 2 * wide)
