"""Polygons between the original image and what the network sees, and what pairs of polygons have in common."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pyclipper
import shapely
from numpy.typing import ArrayLike

from dbnet.config import STRIDE

MAX_COORDINATE = 100_000_000  # pixels, in both directions: longer than any image that can be read
WHOLE_UP_TO = 3  # largest ratio of the sides of an image that the network processes as a whole: of two receipts 0.88
PAGE_WIDTH = 0.7
"""Width of a higher image in the network, as a share of image_size, as pages above each other have it alone. Of a wider
one the height is image_size, as that of pages side by side. Measured: benchmarks/RESULTS.md, long strips."""

ZOOM = 1.5  # largest factor by which an image of small text gets longer than image_size for a closer look
MAX_CROSSINGS = 500  # of an outline with itself; with more it is a tangle. They grow with the square of the points
MAX_EFFORT = 50_000
"""Points and self-crossings, summed over pairs of polygons, up to which common areas of an image are exact: a second of
work. A page of words needs a hundredth."""

CROSSING_GRID = 2.0**-24
"""Pixels to which intersections with outlines that cross themselves are rounded: without, shapely's result can be wrong
by far where edges nearly touch, and with it a pair takes twice the time."""

GRID = 48  # rows and columns of the grid that samples common areas beyond that, within two or three percent
BLOCK = 1 << 20  # elements of the arrays that are worked on at once, to bound memory


@dataclass(frozen=True)
class Letterbox:
    """An image resized so that its longer side is `side`, in the top-left corner of what the network sees. Width and
    height have a scale each, because the resized sides are whole pixels."""

    width: int  # of the original image in pixels
    height: int
    side: int  # longer side of the resized image in pixels

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

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 pixels, possibly decoded at reduced size, as the image in the network. To shrink by
        less than two, linear interpolation leaves no pixel out and takes a tenth of the time of averaging."""
        if pixels.shape[1::-1] == self.resized:
            return pixels
        shrinks = max(pixels.shape[:2]) > 2 * max(self.resized)
        return cv2.resize(pixels, self.resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def inference_side(width: int, height: int, image_size: int, enlarge: float) -> int:
    """Longer side in pixels to which an image of these pixels is resized for detection: image_size, but at most
    `enlarge` times the image's own. Text of an image more than WHOLE_UP_TO times as long as broad would get too small:
    there the shorter side becomes that of a page, if the image has as many, and the network looks at `windows`."""
    short, long = sorted((width, height))
    side = min(image_size, enlarge * long)
    if long > WHOLE_UP_TO * short:
        breadth = image_size * (PAGE_WIDTH if height > width else 1)
        side = max(side, min(long * breadth / short, long))
    return max(1, math.floor(side + 0.5))


def windows(length: int, size: int) -> list[tuple[slice, slice]]:
    """Windows of `size` pixels that cover a padded image of `length`, one if that is up to ZOOM times `size`, and what
    counts of the map of each. Both are multiples of the stride. Of their overlap, an eighth or more, half counts."""
    size = length if length <= ZOOM * size else size
    count = max(1, math.ceil((length - size) / (size * 7 / 8)) + 1)
    starts = [round((length - size) * place / max(count - 1, 1) / STRIDE) * STRIDE for place in range(count)]
    middles = [(left + size + right) // 2 for left, right in pairwise(starts)]
    kept = zip(starts, pairwise([0, *middles, length]), strict=True)
    return [(slice(start, start + size), slice(low - start, high - start)) for start, (low, high) in kept]


def in_windows(network: Callable[[Any], Any], images: Any, size: int, join: Callable[[list, int], Any]) -> Any:
    """(N, height, width) maps of (N, height, width, 3) images, arrays or tensors: what `network` makes of the `windows`
    along their longer side, put together by `join`, a concatenation."""
    axis = 1 if images.shape[1] > images.shape[2] else 2
    before = (slice(None),) * axis
    cuts = windows(images.shape[axis], size)
    return join([network(images[(*before, window)])[(*before, kept)] for window, kept in cuts], axis)


def padded(length: int) -> int:
    """A side in pixels rounded up to a multiple of the network's coarsest stride."""
    return -(-length // STRIDE) * STRIDE


# ---- many polygons at once: (total, 2) points, polygon after polygon, and (polygons,) counts, the points of each


def areas(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) areas in square pixels by the shoelace formula, in which parts that turn in opposite ways cancel."""
    return np.abs(_sums(cross(points.T, points[next_point(counts)].T), counts)) / 2


def offset_distances(points: np.ndarray, counts: np.ndarray, ratio: float) -> np.ndarray:
    """(polygons,) distances area x ratio / perimeter in pixels; 0 without a perimeter. With the ratio 1 - r^2 it is the
    distance D of the targets (DBNet equation 10), with the unclip ratio the D' of post-processing (equation 11)."""
    lengths = _perimeters(points, counts)
    return areas(points, counts) * ratio / np.where(lengths > 0, lengths, np.inf)


def regrowth_distances(points: np.ndarray, counts: np.ndarray, shrink_ratio: float) -> np.ndarray:
    """(polygons,) distances D in pixels by which text was shrunk to these polygons, if it and they are rectangles.

    Of sides w and h, D = w h (1 - r^2) / 2 (w + h) (DBNet equation 10) leaves w - 2 D and h - 2 D; that is solved for D
    by the area and the perimeter of what is left. As an unclip ratio it would be 1.45 for a square, 5.25 for a line."""
    half, squared = _perimeters(points, counts) / 2, shrink_ratio**2
    root = np.sqrt(np.square(squared * half) + 4 * (1 - squared**2) * areas(points, counts))
    return (root - squared * half) / (4 * (1 + squared))


def _perimeters(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _sums(np.sqrt(np.square(points[next_point(counts)] - points).sum(axis=1)), counts)


def offset(polygon: list[list[float]], distance: float) -> list[list[list[int]]]:
    """Pieces of a polygon moved outward by `distance` pixels, inward if negative, with round corners; whole pixels."""
    clipper = pyclipper.PyclipperOffset()
    clipper.AddPath(polygon, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return clipper.Execute(distance)


def next_point(counts: np.ndarray) -> np.ndarray:
    """(total,) index of the point that follows each point on its polygon; the first follows the last."""
    following = np.arange(1, counts.sum() + 1)
    ends, has_points = np.cumsum(counts), counts > 0
    following[ends[has_points] - 1] = (ends - counts)[has_points]
    return following


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(polygons,) sums over each polygon of one value for each point."""
    return np.bincount(np.repeat(np.arange(len(counts)), counts), values, minlength=len(counts))


def split_polygons(points: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """A list of (n, 2) arrays."""
    ends = np.cumsum(counts).tolist()
    return [points[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def crossings(points: np.ndarray) -> float:
    """About how many times the closed outline of (n, 2) points crosses or touches itself, judged by 32 of its edges."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]  # an edge of no length meets its neighbours
    edges = shapely.linestrings(np.stack([points, np.roll(points, -1, axis=0)], axis=1).astype(float))
    sample = np.random.default_rng(0).permutation(edges)[:32]
    meets = shapely.STRtree(edges).query(sample, predicate="intersects").shape[1]
    others = meets - 3 * len(sample)  # an edge also meets itself and its neighbours
    return max(0.0, others / max(len(sample), 1) * len(points) / 2)


def is_tangled(points: np.ndarray) -> bool:
    """Whether the outline of (n, 2) points crosses or touches itself more than about MAX_CROSSINGS times."""
    return len(points) * (len(points) - 3) / 2 > MAX_CROSSINGS and crossings(points) > MAX_CROSSINGS


# ---- the polygons of an image, and pairs of them

UNIT_SQUARE = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])[:, :, None]


class Polygons:
    """The polygons of an image, as arrays over all of them. An outline that crosses itself is even-odd.

    points, following: (2, total) float64 of integers, polygon after polygon, and the point after each on its polygon
    counts, starts: (len,) number of points of each, and index of its first point
    low, high: (2, len) least and greatest x and y of each
    is_given: (len,) bool, which have enough points; the others are points at (0, 0), and have nothing in common
    is_quad: (len,) bool, strictly convex quadrilaterals: nearly all words are, and they need no general geometry
    quads: (2, 4, len) their corners, turning from the x axis to the y axis; a unit square where `is_quad` is False
    outline_areas: (len,) in square pixels by the shoelace formula, in which opposite turns cancel"""

    def __init__(self, polygons: Sequence[ArrayLike], min_points: int) -> None:
        """Read (n, 2) polygons, whose coordinates are truncated to integers. `min_points` is 3 or more. Raises
        ValueError if a polygon is not (n, 2) or has a coordinate that is not finite or beyond MAX_COORDINATE."""
        arrays = [np.asarray(polygon) for polygon in polygons]
        counts = np.array([len(array) for array in arrays], np.intp)
        self.is_given = counts >= min_points
        if not self.is_given.all():
            arrays = [array if len(array) >= min_points else np.zeros((3, 2)) for array in arrays]
        if not {array.shape[1:] for array in arrays} <= {(2,)}:
            raise ValueError("a polygon must be an (n, 2) array of points")
        points = np.concatenate([np.empty((0, 2)), *arrays], dtype=np.float64)
        self.points = np.trunc(points.T, order="C")
        if not (np.abs(self.points) <= MAX_COORDINATE).all():  # False for nan as well
            raise ValueError(f"a polygon has a coordinate that is not finite, or beyond {MAX_COORDINATE}")
        self.counts = np.where(self.is_given, counts, 3)
        self.starts = np.cumsum(self.counts) - self.counts
        self.following = self.points.take(next_point(self.counts), axis=1)
        self.low = np.minimum.reduceat(self.points, self.starts, axis=1)
        self.high = np.maximum.reduceat(self.points, self.starts, axis=1)
        self.outline_areas = np.abs(_sums(cross(self.points, self.following), self.counts)) / 2
        quads = self.points.take(self.starts + np.arange(4)[:, None], axis=1, mode="clip")
        turn = turning(quads) * (self.counts == 4)
        self.is_quad = turn != 0
        self.quads = np.where(self.is_quad, np.where(turn < 0, quads[:, ::-1], quads), UNIT_SQUARE)

    def __len__(self) -> int:
        return len(self.counts)

    def outline(self, index: int) -> np.ndarray:
        """(2, n) points of one polygon."""
        return self.points[:, self.starts[index] : self.starts[index] + self.counts[index]]

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
    def effort(self) -> np.ndarray:
        """(len,) points and self-crossings, which exact geometry takes time for; infinite for a tangle."""
        effort = self.counts.astype(float)
        for index in np.flatnonzero(~self.is_simple).tolist():
            count = crossings(self.outline(index).T)
            effort[index] += count if count <= MAX_CROSSINGS else np.inf
        return effort

    def shapes(self, select: np.ndarray, on_top: np.ndarray | None = None) -> np.ndarray:
        """(k,) valid shapely geometries of the polygons at the (k,) indices `select`. With `on_top`, (len,) bool, the
        polygons on top are cut out of the others."""
        unique, place = np.unique(select, return_inverse=True)
        shapes = self._rings[unique]
        for index in np.flatnonzero(~self.is_simple[unique]):
            lines = shapely.node(shapely.linearrings(self.outline(unique[index]).T))
            faces = shapely.get_parts(shapely.polygonize([lines]))
            inner_points = shapely.get_coordinates(shapely.point_on_surface(faces)).T
            shapes[index] = shapely.union_all(faces[contains(self, np.full(len(faces), unique[index]), inner_points)])
        if on_top is not None and not on_top[unique].all():
            below = np.flatnonzero(~on_top[unique])
            top = self.shapes(np.flatnonzero(on_top))
            hole_of, hole = shapely.STRtree(top).query(shapes[below], predicate="intersects")
            for index in np.unique(hole_of):
                holes = shapely.union_all(top[hole[hole_of == index]])
                parts = shapely.get_parts(shapely.difference(shapes[below[index]], holes))
                shapes[below[index]] = shapely.multipolygons(parts[shapely.get_dimensions(parts) == 2])  # no lines
        return shapes[place]

    def on_grid(self, index: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """(GRID, GRID) bool: which cells of a grid from `low` to `high`, (2,) points, have their centre inside."""
        scale = (GRID / np.maximum(high - low, 1))[:, None]
        points = (self.outline(index) - low[:, None]) * scale - 0.5  # in cells: the centres are at 0 .. GRID - 1
        step = np.roll(points, -1, axis=1) - points
        rows = np.arange(GRID)[:, None]
        row, edge = np.nonzero((points[1] > rows) != (points[1] + step[1] > rows))
        x, y = points[:, edge]
        column = np.ceil(x + (row - y) * step[0, edge] / step[1, edge]).clip(0, GRID).astype(int)
        crossed = np.bincount(row * (GRID + 1) + column, minlength=GRID * (GRID + 1)).reshape(GRID, GRID + 1)
        return np.cumsum(crossed, axis=1)[:, :GRID] % 2 == 1

    @cached_property
    def areas(self) -> np.ndarray:
        """(len,) areas in square pixels, even-odd."""
        even_odd, others = self.outline_areas.copy(), np.flatnonzero(~self.is_simple)
        even_odd[others] = common_areas(self, self, others, others)
        return even_odd


def near_pairs(some: Polygons, others: Polygons) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs whose bounding boxes meet, (k,) and (k,), in the order of `some`, then of `others`."""
    level = (some.low[1, :, None] <= others.high[1]) & (others.low[1] <= some.high[1, :, None])
    first, second = np.nonzero(level)  # of a page of lines these are few, so that x is compared for few
    meets = some.low[0].take(first) <= others.high[0].take(second)
    meets &= others.low[0].take(second) <= some.high[0].take(first)
    return first[meets], second[meets]


def blocks(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive indices of items, of which those at once have about BLOCK elements together, or are one item."""
    starts = np.flatnonzero(np.diff(np.cumsum(sizes) // BLOCK)) + 1
    yield from (block for block in np.split(np.arange(len(sizes)), starts) if block.size)


def contains(polygons: Polygons, select: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(k,) whether the polygon at each of the (k,) indices `select` contains that column of the (2, k) `points`. It
    does where a ray along x crosses its outline an odd number of times. So a point on a left or top edge is inside and
    one on a right or bottom edge is not, as in the competition's scorer."""
    is_inside = np.zeros(len(select), bool)
    is_near = (polygons.low.take(select, axis=1) <= points) & (polygons.high.take(select, axis=1) >= points)
    near = np.flatnonzero(is_near.all(axis=0))
    for block in blocks(polygons.counts[select[near]]):
        column, edge = _points_of(polygons, select[near[block]])
        x, y = points.take(near[block].take(column), axis=1)
        straddles = np.flatnonzero((polygons.points[1].take(edge) > y) != (polygons.following[1].take(edge) > y))
        column, edge, x, y = column[straddles], edge[straddles], x[straddles], y[straddles]
        (begin_x, begin_y), (end_x, end_y) = polygons.points.take(edge, axis=1), polygons.following.take(edge, axis=1)
        crosses = x < (begin_x - end_x) * (y - end_y) / (begin_y - end_y) + end_x
        is_inside[near[block]] = np.bincount(column[crosses], minlength=len(block)) % 2 == 1
    return is_inside


def _points_of(polygons: Polygons, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For all points of the polygons at the (k,) indices `select`: position in `select`, and index in `points`."""
    counts = polygons.counts[select]
    return np.repeat(np.arange(len(select)), counts), np.repeat(polygons.starts[select], counts) + ranges(counts)


def common_areas(
    some: Polygons, others: Polygons, first: np.ndarray, second: np.ndarray, on_top: np.ndarray | None = None
) -> np.ndarray:
    """(k,) areas in square pixels common to the polygons at the (k,) indices `first` of some and `second` of others.

    With `on_top`, (len(some),) bool, those of some that are on top are cut out of the others of some. Convex
    quadrilaterals, as nearly all words are, are clipped side by side: shapely takes five times the time. Pairs beyond
    MAX_EFFORT, the most crossed ones, are sampled."""
    on_top = np.ones(len(some), bool) if on_top is None else on_top
    common = np.empty(len(first))
    in_closed_form = some.is_quad[first] & others.is_simple[second] & on_top[first]
    for block in blocks(others.counts[second[in_closed_form]]):
        pairs = np.flatnonzero(in_closed_form)[block]
        _, point = _points_of(others, second[pairs])
        points, counts = others.points.take(point, axis=1), others.counts[second[pairs]]
        common[pairs] = _areas_in_quads(points, counts, some.quads.take(first[pairs], axis=2))
    general = np.flatnonzero(~in_closed_form)
    if not general.size:
        return common
    effort = some.effort[first[general]] + others.effort[second[general]]
    effort[~on_top[first[general]]] += (some.effort - some.counts)[on_top].sum()  # of what is cut out
    order = np.argsort(effort, kind="stable")
    exact, sampled = np.split(general[order], np.searchsorted(effort[order].cumsum(), [MAX_EFFORT]))
    is_simple = some.is_simple[first[exact]] & others.is_simple[second[exact]]
    for pairs, grid_size in ((exact[is_simple], None), (exact[~is_simple], CROSSING_GRID)):
        shapes = some.shapes(first[pairs], on_top), others.shapes(second[pairs])
        common[pairs] = shapely.area(shapely.intersection(*shapes, grid_size=grid_size))
    for index in np.unique(second[sampled]):  # from a grid over this polygon, with nothing cut out
        low, high = others.low[:, index], others.high[:, index]
        inside, pairs = others.on_grid(index, low, high), sampled[second[sampled] == index]
        cells = [np.count_nonzero(inside & some.on_grid(partner, low, high)) for partner in first[pairs]]
        common[pairs] = np.array(cells) * (high - low).prod() / GRID**2
    return common


def _areas_in_quads(points: np.ndarray, counts: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """(k,) areas of k simple polygons, (2, total) points, inside a convex quadrilateral each, (2, 4, k) corners, by
    Sutherland-Hodgman: each side of the quadrilateral cuts off what is beyond it. Where that leaves several pieces,
    edges forth and back along the side join them, which have no area."""
    for corner, side in zip(quads.transpose(1, 0, 2), edges_of(quads).transpose(1, 0, 2), strict=True):
        which, following = np.repeat(np.arange(len(counts)), counts), next_point(counts)
        height = cross(side.take(which, axis=1), points - corner.take(which, axis=1))
        step = points.take(following, axis=1) - points
        is_inside, next_height = height > 0, height.take(following)
        is_cut = is_inside != (next_height > 0)
        cuts = points + step * (height / np.where(is_cut, height - next_height, 1))
        is_kept = np.stack([is_inside, is_cut], axis=1).ravel()
        points = np.stack([points, cuts], axis=2).reshape(2, -1)[:, is_kept]
        counts = np.bincount(which, is_inside.astype(int) + is_cut, minlength=len(counts)).astype(int)
    return areas(points.T, counts)


def edges_of(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...) steps from each corner to the next; the first is after the last."""
    return np.concatenate([polygons[:, 1:], polygons[:, :1]], axis=1) - polygons


def turning(quads: np.ndarray) -> np.ndarray:
    """(k,) of (2, 4, k) corners: 1 if they are strictly convex and turn from x to y, -1 if from y to x, else 0."""
    edges = edges_of(quads)
    turns = cross(edges, edges[:, [1, 2, 3, 0]])
    return (turns > 0).all(axis=0).astype(int) - (turns < 0).all(axis=0)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """z of the cross products of vectors, positive where b lies from a as y lies from x; x and y are the first axis."""
    return a[0] * b[1] - a[1] * b[0]


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..., one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# ---- outlines as annotations have them: from the upper left along the top, then back along the bottom

ELONGATED = 1.5  # ratio of the sides from which a word surely runs along its longer side
MOST_TALL = 0.67  # `tall_share` above which a page lies on its side


def fit_outline(polygon: np.ndarray) -> np.ndarray:
    """(n, 2) outline -> (4, 2) corners of the enclosing rectangle where it fits, else (8, 2): 4 points along the top,
    from the upper left, then 4 back along the bottom. A convex quadrilateral keeps its corners."""
    corners = enclosing_rectangle(polygon)
    if len(polygon) == 4:
        quads, is_convex = _clockwise(polygon[None])
        return _roll(quads, _upper_left(quads))[0] if is_convex[0] else corners
    sides = corners[[1, 3]] - corners[0]
    size = np.hypot(*sides.T)
    if size.prod() < 1 or cv2.contourArea(polygon.astype(np.float32)) > 0.7 * size.prod():
        return corners
    axes = sides / size[:, None]
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
    return (y + (at - x) / np.where(crosses, next_x - x, 1) * (next_y - y))[crosses]


def enclosing_rectangle(polygon: np.ndarray) -> np.ndarray:
    """(4, 2) corners of the least enclosing rectangle, clockwise from the upper left."""
    quads, _ = _clockwise(cv2.boxPoints(cv2.minAreaRect(polygon.astype(np.float32)))[None].astype(np.float64))
    return _roll(quads, _upper_left(quads))[0]


def order_outlines(polygons: list[np.ndarray]) -> tuple[list[np.ndarray], int, int]:
    """The outlines of an image, quadrilaterals from the upper left along the top where that is certain.

    Corners in zigzag (upper left, upper right, lower left, lower right) become the quadrilateral that they mean, and
    closing points go. Quadrilaterals that run anticlockwise or begin at the lower right are turned round, which the
    metric does not notice. Those that begin at one of the other corners are either shifted by one corner or on a page
    that lies on its side: the words longer than high say which. An outline of more points stays as it is.

    Returns the outlines, how many were changed, and how many begin elsewhere and are left since neither is certain."""
    is_closed = [len(polygon) > 4 and bool((polygon[0] == polygon[-1]).all()) for polygon in polygons]
    polygons = [polygon[: len(polygon) - closed] for polygon, closed in zip(polygons, is_closed, strict=True)]
    which = [index for index, polygon in enumerate(polygons) if len(polygon) == 4]
    doubtful = sum(len(polygon) > 4 and not _begins_at_an_end(polygon) for polygon in polygons)
    if not which:
        return polygons, 0, doubtful
    given = np.stack([polygons[index] for index in which])
    quads, is_convex = _clockwise(given)
    upper_left = _upper_left(quads)
    width, height = _sides(_roll(quads, upper_left))
    rolls = np.where(is_convex, upper_left, 0)  # by how many corners each is turned back
    for start in (1, 3):
        starts_there = is_convex & (upper_left == start)
        wide = np.count_nonzero(starts_there & (width > ELONGATED * height))
        tall = np.count_nonzero(starts_there & (height > ELONGATED * width))
        if wide < 2 * tall or not wide:  # words of a page that lies on its side, or nothing to tell
            rolls[starts_there] = 0
            doubtful += 0 if tall > 2 * wide else int(np.count_nonzero(starts_there))
    ordered = _roll(quads, rolls)
    for index, quad in zip(which, ordered, strict=True):
        polygons[index] = quad
    return polygons, int((ordered != given).any(axis=(1, 2)).sum()), doubtful


def _clockwise(quads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, 4, 2) corners in the order that makes each convex and clockwise, and (k,) where there is one; others stay."""
    ordered, is_convex = quads.copy(), np.zeros(len(quads), bool)
    for order in ((0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 1, 3)):  # as it is, and without the crossing of a zigzag
        corners = quads[:, order]
        turn = turning(corners.transpose(2, 1, 0)) * ~is_convex
        ordered[turn > 0], ordered[turn < 0] = corners[turn > 0], corners[turn < 0, ::-1]
        is_convex |= turn != 0
    return ordered, is_convex


def _upper_left(quads: np.ndarray) -> np.ndarray:
    """(k,) index of the upper left corner of clockwise (k, 4, 2): where the side begins that goes furthest right."""
    return np.argmax(np.roll(quads, -1, axis=1)[:, :, 0] - quads[:, :, 0], axis=1)


def _roll(quads: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(k, 4, 2) corners, each from the one at its (k,) index `first` on."""
    return np.take_along_axis(quads, (first[:, None] + np.arange(4))[:, :, None] % 4, axis=1)


def _sides(quads: np.ndarray) -> np.ndarray:
    """(2, k) mean width and height of (k, 4, 2) corners from the upper left."""
    sides = np.hypot(*edges_of(quads.transpose(2, 1, 0)))
    return (sides[:2] + sides[2:]) / 2


def _begins_at_an_end(polygon: np.ndarray) -> bool:
    """Whether the first half of an outline's points is one of its long sides, as far as it has long sides."""
    corners = enclosing_rectangle(polygon)
    sides = corners[[1, 3]] - corners[0]
    lengths = np.hypot(*sides.T)
    if lengths.max() <= 2 * lengths.min():
        return True
    half, along = len(polygon) // 2, polygon @ sides[lengths.argmax()]
    shares = (along - along.min()) / np.ptp(along)
    first, last = (shares[0] + shares[-1]) / 2, (shares[half - 1] + shares[half]) / 2
    return bool(min(first, last) < 0.25 and max(first, last) > 0.75)


def reading_order(polygons: list[np.ndarray]) -> tuple[list[int], list[int]]:
    """Indices of the words of a page line by line from the top, each from the left, and each one's line, from 1. A word
    belongs to the line whose last word so far it overlaps most in height, at least by half of the lower one, so lines
    may be skewed and bent. Where most words are higher than long, the page lies on its side and lines run down."""
    if not polygons:
        return [], []
    quads = np.stack([enclosing_rectangle(polygon) for polygon in polygons])
    if tall_share(polygons) > MOST_TALL:
        quads = np.roll(quads[:, :, ::-1] * (1, -1), -1, axis=1)  # what runs down runs right
    along = quads[:, 1] - quads[:, 0] + quads[:, 2] - quads[:, 3]
    widths, heights = _sides(quads)
    is_long = widths > ELONGATED * heights
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
    numbers = np.argsort(np.argsort(middles, kind="stable"), kind="stable")[line_of] + 1
    return np.lexsort((x, numbers)).tolist(), numbers.tolist()


def tall_share(polygons: list[np.ndarray]) -> float:
    """Share of those that are higher than long among the elongated of (n, 2) polygons; 0 without any."""
    lengths = _lengths(polygons)
    tall, wide = int((lengths < 1 / ELONGATED).sum()), int((lengths > ELONGATED).sum())
    return tall / max(tall + wide, 1)


def median_length(polygons: list[np.ndarray], turned: bool = False) -> float:
    """Median length of (n, 2) polygons in their heights, or, `turned`, of polygons that run down; 0 without any."""
    lengths = _lengths(polygons)
    return float(np.median(1 / lengths if turned else lengths)) if polygons else 0.0


def _lengths(polygons: list[np.ndarray]) -> np.ndarray:
    """(polygons,) width / height of the bounding box of each, in whole pixels."""
    boxes = np.array([cv2.boundingRect(polygon.astype(np.float32)) for polygon in polygons]).reshape(-1, 4)
    return boxes[:, 2] / boxes[:, 3]
