"""CLEval for text detection: how many characters of the words were found, and at what price in splits and merges.

CLEval (arXiv 2006.06244) cuts every ground truth into pseudo-characters and asks which of their centres lie inside
which detections. A detection may therefore cover several words, or a word several detections; each surplus piece
costs one character. This is the variant of the competition; the README
defines it in full.

    score = score_image(gt_polygons, det_polygons)          # one image
    metric = CLEval()                                       # a data set
    for gt_polygons, det_polygons in images:
        metric.update(gt_polygons, det_polygons)
    print(metric.compute().hmean)

No code here loops over pairs of polygons: bounding boxes tell the detections near each ground truth, and everything
after that is arithmetic on the list of those (ground truth, detection) pairs. Inside, x and y are the first axis and
what there are many of is the last, since numpy is quickest along a long last axis: k quadrilaterals are (2, 4, k).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np
import shapely
from numpy.typing import ArrayLike
from scipy.spatial import ConvexHull, QhullError

from dbnet.geometry import COORDINATE_LIMIT

MIN_POINTS = 4
"""Polygons with fewer points are skipped."""

MAX_DETECTIONS = 500
"""Only so many detections of an image are scored: the first."""

MAX_CHARACTERS = 100
"""No word counts as more characters than this."""

MIN_AREA_PRECISION = np.float32(0.3)
"""Share of a detection's area that must lie inside what it matches. Area precisions are float32, as the competition
keeps them, so that a share of exactly 3/10 is enough however the last bit of a double falls."""

UNEVEN_WEIGHTS = np.array([0.2403, 0.2601, 0.2487, 0.2509])
"""Of the corners of a quadrilateral, for a point inside it."""

UNIT_SQUARE = np.array([[0, 1, 1, 0], [0, 0, 1, 1]])[:, :, None]

FLOAT32_EPS = np.finfo(np.float32).eps


@dataclass(frozen=True)
class ImageScore:
    """CLEval of one image; counts are of pseudo-characters unless they say otherwise."""

    precision: float
    """`max(0, chars_tp - gran_precision) / chars_det`, 0 where there is nothing to divide by."""
    recall: float
    """`max(0, chars_tp - gran_recall) / chars_gt`, 0 where there is nothing to divide by."""
    hmean: float
    """Harmonic mean of precision and recall."""
    words: int
    """Ground truths scored, those that are don't-care among them."""
    detections: int
    """Detections scored, those that are don't-care among them."""
    chars_gt: int
    """In all ground truths that are not don't-care."""
    chars_det: int
    """Inside matched detections (a character inside two counts twice), and `fp_chars`."""
    chars_tp: int
    """Found: inside at least one detection that is matched with their ground truth."""
    fp_chars: int
    """Estimated for the detections that match nothing, from their aspect ratio."""
    overlaps: int
    """How often a found character was found again by a later detection."""
    splits: int
    """Ground truths matched with several detections."""
    merges: int
    """Detections matched with several ground truths."""
    gran_recall: int
    """Penalty of splits: the sum of matched detections - 1 over ground truths."""
    gran_precision: int
    """Penalty of merges: the sum of matched ground truths - 1 over detections."""


@dataclass(frozen=True)
class DatasetScore(ImageScore):
    """CLEval of a data set: precision, recall and hmean are means over its images, all counts are sums."""

    images: int


class Outcome(StrEnum):
    """What became of a ground truth or a detection."""

    CORRECT = "correct"
    """Matched one to one."""
    MISSED = "missed"
    """A ground truth without a match."""
    FALSE = "false"
    """A detection without a match."""
    SPLIT = "split"
    """A ground truth matched with several detections, or one of these."""
    MERGED = "merged"
    """A detection matched with several ground truths, or one of these."""
    DONT_CARE = "dont_care"
    """A don't-care ground truth, or a detection mainly on such: neither right nor wrong."""
    UNSCORED = "unscored"
    """Of fewer than MIN_POINTS points, or after the first MAX_DETECTIONS detections."""


@dataclass(frozen=True)
class ImageMatch:
    """Which ground truths and detections of an image CLEval matched, and what came of it."""

    score: ImageScore
    gt_scored: np.ndarray
    """(ground truths,) which of those given are scored. Below, indices of ground truths are among these."""
    det_scored: np.ndarray
    """(detections,) which of those given are scored. Below, indices of detections are among these."""
    gt_valid: np.ndarray
    """(gt_scored.sum(),) which are not don't-care."""
    det_valid: np.ndarray
    """(det_scored.sum(),) which are not don't-care."""
    gt: np.ndarray
    """(matches,) the ground truth of each matched pair."""
    det: np.ndarray
    """(matches,) the detection of each matched pair."""
    lengths: np.ndarray
    """(gt_scored.sum(),) characters of each ground truth."""
    is_found: np.ndarray
    """(lengths.sum(),) which characters were found, word after word."""

    def gt_outcomes(self) -> list[Outcome]:
        """For each ground truth given. One both split and merged is SPLIT, so those are `score.splits` many."""
        outcomes = _outcomes(self.gt_valid, self.gt, self.det, (Outcome.MISSED, Outcome.SPLIT, Outcome.MERGED))
        return _spread(outcomes, self.gt_scored)

    def det_outcomes(self) -> list[Outcome]:
        """For each detection given. One both split and merged is MERGED, so those are `score.merges` many."""
        outcomes = _outcomes(self.det_valid, self.det, self.gt, (Outcome.FALSE, Outcome.MERGED, Outcome.SPLIT))
        return _spread(outcomes, self.det_scored)

    def gt_chars(self) -> np.ndarray:
        """(ground truths, 2) int, for each given: its characters that were found, and all; 0 where it is unscored or
        don't-care. They sum to `score.chars_tp` and `score.chars_gt`."""
        chars = np.zeros((len(self.gt_scored), 2), np.intp)
        word = np.repeat(np.arange(len(self.lengths)), self.lengths)
        chars[self.gt_scored, 0] = np.bincount(word[self.is_found], minlength=len(self.lengths))
        chars[self.gt_scored, 1] = np.where(self.gt_valid, self.lengths, 0)
        return chars


@dataclass
class CLEval:
    """Collects the scores of images; `compute` sums them up. Processes that share a data set concatenate `images`."""

    images: list[ImageScore] = field(default_factory=list)

    def update(
        self,
        gt_polygons: Sequence[ArrayLike],
        det_polygons: Sequence[ArrayLike],
        dont_care: Sequence[bool] | None = None,
    ) -> ImageScore:
        """Score an image (see `score_image`), remember the score and return it. Call it for images without
        predictions too: they count 0."""
        score = score_image(gt_polygons, det_polygons, dont_care)
        self.images.append(score)
        return score

    def compute(self) -> DatasetScore:
        """Means and sums over the images so far; all 0 where there were none."""

        totals = {of.name: sum(getattr(score, of.name) for score in self.images) for of in fields(ImageScore)}
        means = {name: totals[name] / max(len(self.images), 1) for name in ("precision", "recall", "hmean")}
        return DatasetScore(**totals | means, images=len(self.images))


def score_image(
    gt_polygons: Sequence[ArrayLike],
    det_polygons: Sequence[ArrayLike],
    dont_care: Sequence[bool] | None = None,
) -> ImageScore:
    """CLEval of one image, as the README defines it.

    Args:
        gt_polygons: the words, each (n, 2) points (x, y) in pixels: along the top edge, then back along the bottom.
        det_polygons: the detections, likewise, in the order in which they claim characters.
        dont_care: for each ground truth, whether it shall neither be found nor missed; None for none.

    Coordinates are truncated to integers. Any polygon is scored, be it crossing itself or without area; the time of one
    that crosses itself grows with its crossings, so `dbnet.geometry.fault_of` refuses the worst where files are read.

    Raises:
        ValueError: if a polygon is not (n, 2) or has a coordinate that is not finite or beyond all images, or
            `dont_care` is not one flag for each ground truth.
    """
    return match_image(gt_polygons, det_polygons, dont_care).score


def match_image(
    gt_polygons: Sequence[ArrayLike],
    det_polygons: Sequence[ArrayLike],
    dont_care: Sequence[bool] | None = None,
) -> ImageMatch:
    """`score_image`, and what became of each polygon; arguments and errors are the same."""
    page = _measure(gt_polygons, det_polygons, dont_care)
    return _match_selection(page, np.arange(len(page.dets))[:MAX_DETECTIONS])


def score_selections(
    gt_polygons: Sequence[ArrayLike],
    det_polygons: Sequence[ArrayLike],
    dont_care: Sequence[bool] | None,
    selections: Sequence[np.ndarray],
) -> list[ImageScore]:
    """`score_image` of each of several selections of the detections; polygons are compared once for all of them.

    Each selection is (len(det_polygons),) bool. The other arguments are as in `score_image`.
    """
    page = _measure(gt_polygons, det_polygons, dont_care)
    chosen = [np.flatnonzero(selection[page.det_is_scored])[:MAX_DETECTIONS] for selection in selections]
    return [_match_selection(page, detections).score for detections in chosen]


def _measure(
    gt_polygons: Sequence[ArrayLike], det_polygons: Sequence[ArrayLike], dont_care: Sequence[bool] | None
) -> "_Page":
    """All that there is to say about polygons and pairs of them, whichever detections count in the end."""
    if dont_care is None:
        dont_care = [False] * len(gt_polygons)
    elif len(dont_care) != len(gt_polygons):
        raise ValueError(f"dont_care has {len(dont_care)} flags for {len(gt_polygons)} ground truths")
    gts, gt_is_scored = _read_polygons(gt_polygons)
    dets, det_is_scored = _read_polygons(det_polygons)
    gt_valid = ~np.asarray(dont_care, bool)[gt_is_scored]
    lengths = _lengths(gts, np.arange(len(gts)), _word_length)
    centres = _character_centres(gts, lengths)
    pairs = _pair_up(gts, dets, gt_valid, lengths, centres)
    return _Page(gts, dets, gt_is_scored, det_is_scored, gt_valid, lengths, pairs)


def _match_selection(page: "_Page", chosen: np.ndarray) -> ImageMatch:
    """CLEval of the detections at the indices `chosen`, as if there were no others."""
    is_chosen = np.zeros(len(page.dets), bool)
    is_chosen[chosen] = True
    gts, dets, gt_valid, lengths = page.gts, page.dets, page.gt_valid, page.lengths
    pairs = page.pairs if is_chosen.all() else page.pairs.of_detections(is_chosen)
    det_valid = _valid_detections(pairs, gt_valid, len(dets)) & is_chosen
    is_matched = _match(pairs, gt_valid, det_valid)

    claims = pairs.centre[is_matched[pairs.pair_of_centre]]
    is_claimed = np.zeros(lengths.sum(), bool)
    is_claimed[claims] = True
    chars_tp = int(is_claimed.sum())
    gt, det = pairs.gt[is_matched], pairs.det[is_matched]
    matches_of_gt = np.bincount(gt, minlength=len(gts))
    matches_of_det = np.bincount(det, minlength=len(dets))
    false_positives = np.flatnonzero(det_valid & (matches_of_det == 0))
    fp_chars = int(_lengths(dets, false_positives, _false_positive_length).sum())
    chars_gt = int(lengths[gt_valid].sum())
    chars_det = len(claims) + fp_chars
    gran_recall = int(np.maximum(matches_of_gt - 1, 0).sum())
    gran_precision = int(np.maximum(matches_of_det - 1, 0).sum())
    recall = max(0, chars_tp - gran_recall) / max(chars_gt, 1)
    precision = max(0, chars_tp - gran_precision) / max(chars_det, 1)
    score = ImageScore(
        precision=precision,
        recall=recall,
        hmean=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        words=len(gts),
        detections=len(chosen),
        chars_gt=chars_gt,
        chars_det=chars_det,
        chars_tp=chars_tp,
        fp_chars=fp_chars,
        overlaps=len(claims) - chars_tp,
        splits=int((matches_of_gt > 1).sum()),
        merges=int((matches_of_det > 1).sum()),
        gran_recall=gran_recall,
        gran_precision=gran_precision,
    )
    det_scored = np.zeros(len(page.det_is_scored), bool)
    det_scored[np.flatnonzero(page.det_is_scored)[chosen]] = True
    place = np.cumsum(is_chosen) - 1
    return ImageMatch(
        score, page.gt_is_scored, det_scored, gt_valid, det_valid[chosen], gt, place[det], lengths, is_claimed
    )


def _outcomes(
    is_valid: np.ndarray, own: np.ndarray, partner: np.ndarray, names: tuple[Outcome, Outcome, Outcome]
) -> list[Outcome]:
    """Outcomes of the ground truths or of the detections, from the matched pairs: (k,) indices `own` on this side and
    `partner` on the other. `names` are of those without a partner, with several, and with one that has several."""
    partners = np.bincount(own, minlength=len(is_valid))
    shares_partner = np.zeros(len(is_valid), bool)
    shares_partner[own[np.bincount(partner)[partner] > 1]] = True
    conditions = [~is_valid, partners == 0, partners > 1, shares_partner]
    return [Outcome(name) for name in np.select(conditions, [Outcome.DONT_CARE, *names], Outcome.CORRECT).tolist()]


def _spread(outcomes: list[Outcome], is_scored: np.ndarray) -> list[Outcome]:
    """The outcomes of what is scored, in their places among all."""
    following = iter(outcomes)
    return [next(following) if scored else Outcome.UNSCORED for scored in is_scored]


@dataclass(frozen=True)
class _Polygons:
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

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def previous(self) -> np.ndarray:
        """(2, total) before each point the one that comes before it on its polygon, the last before the first."""
        before = np.arange(-1, self.points.shape[1] - 1)
        before[self.starts] += self.counts
        return self.points.take(before, axis=1)

    @cached_property
    def _rings(self) -> np.ndarray:
        """(len,) shapely polygons, valid or not."""
        polygon_of_point = np.repeat(np.arange(len(self)), self.counts)
        return shapely.polygons(shapely.linearrings(self.points.T, indices=polygon_of_point))

    @cached_property
    def is_simple(self) -> np.ndarray:
        """(len,) whether the outline neither crosses nor touches itself."""
        is_simple = self.is_quad.copy()
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
        """(len,) areas of what is simple."""
        return np.abs(np.add.reduceat(_cross(self.previous, self.points), self.starts)) / 2


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a ground truth and a detection: all that share a character centre, and all near ones of a don't-care."""

    gt: np.ndarray
    """(k,) indices of ground truths."""
    det: np.ndarray
    """(k,) indices of detections."""
    has_centre: np.ndarray
    """(k,) whether a character centre of the ground truth lies inside the detection: M > 0."""
    area_precision: np.ndarray
    """(k,) float32, area of both / area of the detection, 0 where the detection has none: AP."""
    pair_of_centre: np.ndarray
    """(m,) for each time that a centre lies inside a detection, which pair that is, from 0 to k - 1."""
    centre: np.ndarray
    """(m,) and which centre."""

    def of_detections(self, is_chosen: np.ndarray) -> Self:
        """Only the pairs of these detections, (number of detections,) bool; their indices stay as they are."""
        keeps = is_chosen[self.det]
        keeps_centre = keeps[self.pair_of_centre]
        pair_of_centre = (np.cumsum(keeps) - 1)[self.pair_of_centre[keeps_centre]]
        pairs = self.gt[keeps], self.det[keeps], self.has_centre[keeps], self.area_precision[keeps]
        return type(self)(*pairs, pair_of_centre, self.centre[keeps_centre])


@dataclass(frozen=True)
class _Page:
    """The polygons of an image, and what was measured on them."""

    gts: _Polygons
    """ground truths that are scored"""
    dets: _Polygons
    """detections that have points enough to be scored"""
    gt_is_scored: np.ndarray
    """for each ground truth given, whether it is one of `gts`"""
    det_is_scored: np.ndarray
    """for each detection given, whether it is one of `dets`"""
    gt_valid: np.ndarray
    """(len(gts),) which are not don't-care"""
    lengths: np.ndarray
    """(len(gts),) pseudo-characters of each"""
    pairs: _Pairs
    """ground truths and detections that may have to do with each other"""


def _read_polygons(polygons: Sequence[ArrayLike]) -> tuple[_Polygons, np.ndarray]:
    """Those with points enough to be scored, and (len(polygons),) which have."""
    arrays = [np.asarray(polygon) for polygon in polygons]
    counts = np.array([len(array) for array in arrays], np.intp)
    is_scored = counts >= MIN_POINTS
    scored = np.flatnonzero(is_scored)
    arrays, counts = [arrays[index] for index in scored], counts[scored]
    points = np.concatenate(arrays, dtype=np.float64) if arrays else np.empty((0, 2))
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError("a polygon must be an (n, 2) array of points")
    points = np.trunc(points.T, order="C")
    if not (np.abs(points) <= COORDINATE_LIMIT).all():  # nan is not either
        raise ValueError(f"a polygon has a coordinate that is not finite, or beyond {COORDINATE_LIMIT}")
    starts = np.cumsum(counts) - counts
    is_quad, quads = _find_quads(points, starts, counts)
    low, high = np.minimum.reduceat(points, starts, axis=1), np.maximum.reduceat(points, starts, axis=1)
    return _Polygons(points, starts, counts, is_quad, quads, low, high), is_scored


def _find_quads(points: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`is_quad` and `quads` of `_Polygons`. Four turns the same way are a convex quadrilateral."""
    quads = points.take(starts + np.arange(4)[:, None], axis=1)
    edges = _edges(quads)
    turns = _cross(edges, _next_corners(edges))
    turns_back = (turns < 0).all(axis=0)
    quads = np.where(turns_back, quads[:, ::-1], quads)
    is_quad = (counts == 4) & (turns_back | (turns > 0).all(axis=0))
    quads[:, :, ~is_quad] = UNIT_SQUARE
    return is_quad, quads


def _next_corners(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...), after each the next, the first after the last."""
    return np.concatenate([polygons[:, 1:], polygons[:, :1]], axis=1)


def _edges(polygons: np.ndarray) -> np.ndarray:
    """(2, n, ...) corners -> (2, n, ...) steps from each corner to the next."""
    return _next_corners(polygons) - polygons


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products of vectors; x and y are the first axis."""
    return a[0] * b[0] + a[1] * b[1]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """z of the cross products of vectors, positive where b lies from a as y lies from x; x and y are the first axis."""
    return a[0] * b[1] - a[1] * b[0]


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..., one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# Lengths in characters, from aspect ratios. The arithmetic is the competition's, float32 and step by step: a box of
# 30 x 10 pixels can have 4 characters in float32 and has 3 in float64, and a scan is full of such ratios.


def _word_length(ratio: np.ndarray) -> np.ndarray:
    """Characters of ground truths of these float32 aspect ratios, whichever way they read."""
    return _characters(np.maximum(ratio, 1 / (ratio + FLOAT32_EPS)))


def _false_positive_length(ratio: np.ndarray) -> np.ndarray:
    """Characters of detections of these float32 aspect ratios that match nothing."""
    return _characters(1 / (FLOAT32_EPS + ratio))


def _characters(elongation: np.ndarray) -> np.ndarray:
    """float32 -> int of the same shape, halves rounded to even."""
    return np.minimum(np.round(np.float32(0.5) + elongation), MAX_CHARACTERS).astype(np.intp)


def _lengths(polygons: _Polygons, select: np.ndarray, length_of_ratio: Callable[..., np.ndarray]) -> np.ndarray:
    """(k,) int lengths in characters of the polygons at the (k,) indices `select`.

    Of the edges of the convex hull the first with the least rectangle counts, so the order of Qhull matters where two
    of them tie and differ in length, as in a rectangle. Elsewhere a convex quadrilateral is its own hull, and for
    upright boxes, most of a scan, the order is known: Qhull begins with a horizontal edge unless the polygon's first
    two points are its left side.
    """
    quads = polygons.quads.take(select, axis=2)
    areas, ratios = _enclosing_rectangles(quads)
    is_least = areas == areas.min(axis=0)

    is_vertical, is_horizontal = _edges(quads) == 0
    is_upright = (is_horizontal | is_vertical).all(axis=0)
    first_two_x = polygons.points[0, polygons.starts[select] + [[0], [1]]]
    begins_left = (first_two_x == quads[0].min(axis=0)).all(axis=0)
    is_least &= np.where(begins_left, is_vertical, is_horizontal) | ~is_upright

    candidates = length_of_ratio(ratios)
    lengths = candidates[is_least.argmax(axis=0), np.arange(len(select))]
    needs_hull = ~polygons.is_quad[select] | (is_least & (candidates != lengths)).any(axis=0)
    for index in np.flatnonzero(needs_hull):
        start, count = polygons.starts[select[index]], polygons.counts[select[index]]
        lengths[index] = length_of_ratio(_aspect_ratio_by_hull(polygons.points[:, start : start + count]))
    return lengths


def _aspect_ratio_by_hull(points: np.ndarray) -> np.float32:
    """Aspect ratio of any polygon, (2, n) points, in the order of Qhull; 0 where it has no hull."""
    try:
        hull = points[:, ConvexHull(points.T.astype(np.float32)).vertices]
    except QhullError:
        return np.float32(0)
    areas, ratios = _enclosing_rectangles(hull[:, :, None])
    return ratios[areas.argmin(), 0]


def _enclosing_rectangles(hulls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along each edge of (2, n, k) convex polygons, the rectangle that encloses the polygon: (n, k) float32 areas and
    (n, k) float32 ratios of the extent across the edge to that along it."""
    hulls = hulls.astype(np.float32)
    edges = _edges(hulls)
    directions = (edges / np.sqrt(_dot(edges, edges)))[:, :, None]
    corners = hulls[:, None]
    along = np.ptp(_dot(directions, corners), axis=1)
    across = np.ptp(_cross(directions, corners), axis=1)
    return along * across, np.minimum(across / (along + FLOAT32_EPS), np.float32(100))


def _character_centres(gts: _Polygons, lengths: np.ndarray) -> np.ndarray:
    """Pseudo-character centres of all ground truths, (2, lengths.sum()), word after word.

    With s = n // 2 - 1 sections of L steps an edge, the c-th of the L + 1 cuts between characters lies c s steps from
    the edge's start; a character's centre is the mean of the cuts before and after it, of the top and the bottom.
    """
    word = np.repeat(np.arange(len(gts)), lengths + 1)
    cut = _ranges(lengths + 1)
    length, count, start = lengths[word], gts.counts[word], gts.starts[word]
    section, step = np.divmod(cut * (count // 2 - 1), length)
    is_end = cut == length

    def cut_points(index: np.ndarray, next_index: np.ndarray) -> np.ndarray:
        begin, end = gts.points.take(start + index, axis=1), gts.points.take(start + next_index, axis=1)
        return np.trunc(begin + (end - begin) / length * step)

    top = cut_points(section, section + 1)
    # Of an odd number of points the bottom has one more than the top; the last cut is at its last point all the same.
    bottom = cut_points(np.where(is_end, count // 2, count - 1 - section), count - 2 - section)
    middle = top + bottom
    return (middle[:, :-1] + middle[:, 1:])[:, ~is_end[:-1]] / 4


def _pair_up(gts: _Polygons, dets: _Polygons, gt_valid: np.ndarray, lengths: np.ndarray, centres: np.ndarray) -> _Pairs:
    """The pairs that can matter, among those whose bounding boxes meet."""
    boxes_meet = (gts.low[:, :, None] <= dets.high[:, None]) & (dets.low[:, None] <= gts.high[:, :, None])
    gt, det = np.nonzero(boxes_meet[0] & boxes_meet[1])
    first_centres = np.cumsum(lengths) - lengths
    pair = np.repeat(np.arange(len(gt)), lengths[gt])
    centre = np.repeat(first_centres[gt], lengths[gt]) + _ranges(lengths[gt])
    is_inside = _contains(dets, det[pair], centres.take(centre, axis=1))
    pair, centre = pair[is_inside], centre[is_inside]

    has_centre = np.zeros(len(gt), bool)
    has_centre[pair] = True
    is_kept = has_centre | ~gt_valid[gt]
    pair_of_centre = (np.cumsum(is_kept) - 1)[pair]
    gt, det = gt[is_kept], det[is_kept]
    area_precision = _area_precisions(gts, dets, gt_valid, gt, det)
    return _Pairs(gt, det, has_centre[is_kept], area_precision, pair_of_centre, centre)


def _contains(polygons: _Polygons, select: np.ndarray, points: np.ndarray) -> np.ndarray:
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


def _points_of(polygons: _Polygons, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For all points of the polygons at the (k,) indices `select`: which of the k it is, and where in `points`."""
    counts = polygons.counts[select]
    return np.repeat(np.arange(len(select)), counts), np.repeat(polygons.starts[select], counts) + _ranges(counts)


def _area_precisions(
    gts: _Polygons, dets: _Polygons, gt_valid: np.ndarray, gt: np.ndarray, det: np.ndarray
) -> np.ndarray:
    """(k,) float32 area precisions of pairs of a ground truth `gt` and a detection `det`, (k,) indices."""
    common = np.empty(len(gt))
    is_convex = gts.is_quad[gt] & gt_valid[gt]
    by_quads = np.flatnonzero(is_convex & dets.is_quad[det])
    by_outline = np.flatnonzero(is_convex & ~dets.is_quad[det])
    if len(by_outline):
        by_outline = by_outline[dets.is_simple[det[by_outline]]]
    is_other = np.ones(len(gt), bool)
    is_other[by_quads] = is_other[by_outline] = False
    common[by_quads] = _common_area(gts.quads.take(gt[by_quads], axis=2), dets.quads.take(det[by_quads], axis=2))
    if len(by_outline):
        common[by_outline] = _common_area_with_outlines(gts.quads.take(gt[by_outline], axis=2), dets, det[by_outline])
    det_area = dets.areas[det]
    if is_other.any():
        gt_shapes = _cut_out_of_dont_care(gts.shapes, gt_valid)
        det_shapes = dets.shapes[det[is_other]]
        common[is_other] = shapely.area(shapely.intersection(gt_shapes[gt[is_other]], det_shapes))
        det_area[is_other] = shapely.area(det_shapes)
    return np.divide(common, det_area, out=np.zeros(len(gt)), where=det_area > 0).astype(np.float32)


def _cut_out_of_dont_care(shapes: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """The (k,) shapes of ground truths, with the valid ones cut out of the don't-care ones."""
    cut, dont_care, valid = shapes.copy(), np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
    hole_of, hole = shapely.STRtree(shapes[valid]).query(shapes[dont_care], predicate="intersects")
    for index in np.unique(hole_of):
        holes = shapely.union_all(shapes[valid[hole[hole_of == index]]])
        cut[dont_care[index]] = shapely.difference(shapes[dont_care[index]], holes)
    return cut


def _common_area(quads: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(k,) areas common to convex polygons that turn the same way, (2, n, k) and (2, m, k), column by column.

    The outline of what is common is the parts of each outline inside the other polygon; its area is, by Green's
    theorem, half the sum of cross(begin, end) over those parts. A part that both outlines share counts once.
    """
    origin = others[:, :1]
    quads, others = quads - origin, others - origin
    of_quads = _area_under_clipped_edges(quads, others, keep_shared=True)
    of_others = _area_under_clipped_edges(others, quads, keep_shared=False)
    return np.maximum(of_quads + of_others, 0)


def _area_under_clipped_edges(polygons: np.ndarray, clips: np.ndarray, keep_shared: bool) -> np.ndarray:
    """(k,) sums of cross(begin, end) / 2 over the parts of the edges of (2, n, k) polygons inside (2, m, k) clips."""
    steps = _edges(polygons)
    enter, leave = _clip(polygons, steps, clips[:, :, None], _edges(clips)[:, :, None], keep_shared)
    return ((leave - enter) * _cross(polygons, steps)).sum(axis=0) / 2


def _clip(
    begin: np.ndarray, step: np.ndarray, corners: np.ndarray, lines: np.ndarray, keep_shared: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """From and to which t in 0..1 the points begin + t step are inside a convex shape; both the same where none is.

    Cyrus-Beck: each line of the shape cuts t off from below or above. `begin` and `step` are (2, ...). The shape's
    `corners`, and the directions of its `lines` from there, which have the inside on the side on which y lies from x,
    are (2, m, ...). An edge along a line is outside, except, with `keep_shared`, where both run the same way.
    """
    height = _cross(lines, begin[:, None] - corners)
    climb = _cross(lines, step[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -height / climb
    enter = np.where(climb > 0, crossing, 0).max(axis=0, initial=0)
    leave = np.where(climb < 0, crossing, 1).min(axis=0, initial=1)
    is_outside = (climb == 0) & (height <= 0)
    if keep_shared:
        is_outside &= (height < 0) | (_dot(lines, step[:, None]) < 0)
    return enter, np.where(is_outside.any(axis=0), enter, np.maximum(leave, enter))


def _common_area_with_outlines(quads: np.ndarray, polygons: _Polygons, select: np.ndarray) -> np.ndarray:
    """(k,) areas common to (2, 4, k) convex quadrilaterals and the simple polygons at the (k,) indices `select`.

    Seen from a point inside the quadrilateral, each part of the polygon's outline that lies inside it takes the
    place of the sector of the quadrilateral behind it. What is left of the quadrilateral, or of nothing where the
    polygon does not surround that point, is the common area.
    """
    inside = np.tensordot(quads, UNEVEN_WEIGHTS, axes=(1, 0))  # so that no outline of integers runs through it
    quads = quads - inside[:, None]
    which, point = _points_of(polygons, select)
    origin = inside.take(which, axis=1)
    begin, end = polygons.previous.take(point, axis=1) - origin, polygons.points.take(point, axis=1) - origin
    turn = _cross(begin, end)
    winding = ((begin[1] <= 0) & (end[1] > 0) & (turn > 0)).astype(int) - ((begin[1] > 0) & (end[1] <= 0) & (turn < 0))
    quad_area = _cross(quads, _next_corners(quads)).sum(axis=0) / 2
    common = np.bincount(which, winding, minlength=len(select)) * quad_area

    corners = quads.take(which, axis=2)
    enter, leave = _clip(begin, end - begin, corners, _edges(corners))
    is_seen = np.flatnonzero((enter < leave) & (turn != 0))
    begin, step, turn = begin[:, is_seen], (end - begin)[:, is_seen], turn[is_seen]
    enter, leave, corners = enter[is_seen], leave[is_seen], corners[:, :, is_seen]
    first, last = begin + enter * step, begin + leave * step
    wedge = np.stack([first, -last], axis=1) * np.sign(
        turn
    )  # the directions of its sides, from and to the point inside
    start, stop = _clip(corners, _edges(corners), np.zeros((2, 2, 1, 1)), wedge[:, :, None])
    sector = ((stop - start) * _cross(corners, _next_corners(corners))).sum(axis=0) / 2
    gained = (leave - enter) * turn / 2 - np.sign(turn) * sector
    return np.abs(common + np.bincount(which[is_seen], gained, minlength=len(select)))


def _valid_detections(pairs: _Pairs, gt_valid: np.ndarray, num_dets: int) -> np.ndarray:
    """(num_dets,) which detections are not mainly on don't-care polygons."""
    on_dont_care = ~gt_valid[pairs.gt]
    mostly_on_one = on_dont_care & (pairs.area_precision >= MIN_AREA_PRECISION)
    over_several = on_dont_care & pairs.has_centre
    shares = np.bincount(pairs.det[over_several], pairs.area_precision[over_several], minlength=num_dets)
    is_valid = shares.astype(np.float32) < MIN_AREA_PRECISION
    is_valid[pairs.det[mostly_on_one]] = False
    return is_valid


def _match(pairs: _Pairs, gt_valid: np.ndarray, det_valid: np.ndarray) -> np.ndarray:
    """(k,) which pairs are matched: one to one, one ground truth to many detections, or many to one."""
    num_gts, num_dets = len(gt_valid), len(det_valid)
    is_valid = gt_valid[pairs.gt] & det_valid[pairs.det] & pairs.has_centre
    is_candidate = (pairs.area_precision >= MIN_AREA_PRECISION) & pairs.has_centre

    dets_of_gt = np.bincount(pairs.gt[is_candidate], minlength=num_gts)
    gts_of_det = np.bincount(pairs.det[is_candidate], minlength=num_dets)
    one_to_one = is_valid & is_candidate & (dets_of_gt[pairs.gt] == 1) & (gts_of_det[pairs.det] == 1)

    valid_dets_of_gt = np.bincount(pairs.gt[is_valid & is_candidate], minlength=num_gts)
    one_to_many = is_valid & is_candidate & (valid_dets_of_gt[pairs.gt] >= 2)

    valid_gts_of_det = np.bincount(pairs.det[is_valid], minlength=num_dets)
    shares = np.bincount(pairs.det[is_valid], pairs.area_precision[is_valid], minlength=num_dets)
    is_covered = shares.astype(np.float32) >= MIN_AREA_PRECISION
    many_to_one = is_valid & (valid_gts_of_det[pairs.det] >= 2) & is_covered[pairs.det]
    return one_to_one | one_to_many | many_to_one
