"""CLEval for text detection: which characters of the words were found, less a penalty for splits and merges.

CLEval (arXiv 2006.06244) cuts every ground truth into pseudo-characters and asks which of their centres lie inside
which detections. A detection may therefore cover several words, or a word several detections; each surplus piece
costs one character. This is the variant of the competition; docs/how-it-works.md defines it.

    score = score_image(gt_polygons, det_polygons)          # one image
    metric = CLEval()                                       # a data set
    for gt_polygons, det_polygons in images:
        metric.update(gt_polygons, det_polygons)
    print(metric.compute().hmean)

Pairs of polygons are arrays, so that no code here loops over them; their geometry is in `dbnet/geometry.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Self

import numpy as np
import shapely
from numpy.typing import ArrayLike
from scipy.spatial import ConvexHull, QhullError

from dbnet.geometry import Polygons, common_areas, contains, cross, dot, edges_of, near_pairs, ranges

CLEVAL_MIN_POINTS = 4
"""Polygons with fewer points are skipped."""

MAX_DETECTIONS = 500
"""Only the first detections of an image, this many, are scored."""

MAX_CHARACTERS = 100
"""Most characters that a word or a detection counts as."""

MIN_AREA_PRECISION = np.float32(0.3)
"""Share of a detection's area that must lie inside what it matches. Area precisions are float32, as the competition
keeps them, so that a share of exactly 3/10 is enough however the last bit of a double falls."""

FLOAT32_EPS = np.finfo(np.float32).eps


@dataclass(frozen=True)
class ImageScore:
    """CLEval of one image; counts are of pseudo-characters unless stated otherwise."""

    precision: float
    """`max(0, chars_tp - gran_precision) / chars_det`, 0 if the divisor is 0."""
    recall: float
    """`max(0, chars_tp - gran_recall) / chars_gt`, 0 if the divisor is 0."""
    hmean: float
    """Harmonic mean of precision and recall."""
    words: int
    """Ground truths scored, including don't-care ones."""
    detections: int
    """Detections scored, including don't-care ones."""
    chars_gt: int
    """In all ground truths that are not don't-care."""
    chars_det: int
    """Inside matched detections (a character inside two counts twice), and `fp_chars`."""
    chars_tp: int
    """Found: inside at least one detection that is matched with their ground truth."""
    fp_chars: int
    """Estimated from the aspect ratio of detections without a match."""
    overlaps: int
    """Number of times that a later detection found a character again."""
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
    """Match outcome of a ground truth or a detection."""

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
    """A don't-care ground truth, or a detection mainly on such ones: neither right nor wrong."""
    UNSCORED = "unscored"
    """It has fewer than CLEVAL_MIN_POINTS points, or comes after the first MAX_DETECTIONS detections."""


@dataclass(frozen=True)
class ImageMatch:
    """The matches of CLEval between ground truths and detections of an image, and their score."""

    score: ImageScore
    gt_scored: np.ndarray
    """(ground truths,) bool: which of those given are scored. Indices of ground truths below count only these."""
    det_scored: np.ndarray
    """(detections,) bool: which of those given are scored. Indices of detections below count only these."""
    gt_valid: np.ndarray
    """(gt_scored.sum(),) bool: which are not don't-care."""
    det_valid: np.ndarray
    """(det_scored.sum(),) bool: which are not don't-care."""
    gt: np.ndarray
    """(matches,) the ground truth of each matched pair."""
    det: np.ndarray
    """(matches,) the detection of each matched pair."""
    lengths: np.ndarray
    """(gt_scored.sum(),) characters of each ground truth."""
    is_found: np.ndarray
    """(lengths.sum(),) bool: which characters were found, word after word."""

    def gt_outcomes(self) -> list[Outcome]:
        """The outcome of each ground truth given; SPLIT if it is both split and merged, so that they add up to
        `score.splits`."""
        outcomes = _outcomes(self.gt_valid, self.gt, self.det, (Outcome.MISSED, Outcome.SPLIT, Outcome.MERGED))
        return _spread(outcomes, self.gt_scored)

    def det_outcomes(self) -> list[Outcome]:
        """The outcome of each detection given; MERGED if it is both split and merged, so that they add up to
        `score.merges`."""
        outcomes = _outcomes(self.det_valid, self.det, self.gt, (Outcome.FALSE, Outcome.MERGED, Outcome.SPLIT))
        return _spread(outcomes, self.det_scored)

    def gt_chars(self) -> np.ndarray:
        """(ground truths, 2) int: found characters and all characters of each ground truth given, 0 if it is unscored
        or don't-care. They sum to `score.chars_tp` and `score.chars_gt`."""
        chars = np.zeros((len(self.gt_scored), 2), np.intp)
        word = np.repeat(np.arange(len(self.lengths)), self.lengths)
        chars[self.gt_scored, 0] = np.bincount(word[self.is_found], minlength=len(self.lengths))
        chars[self.gt_scored, 1] = np.where(self.gt_valid, self.lengths, 0)
        return chars


@dataclass
class CLEval:
    """Collect the scores of images; `compute` sums them up. Processes that share a data set concatenate `images`."""

    images: list[ImageScore] = field(default_factory=list)

    def update(
        self,
        gt_polygons: Sequence[ArrayLike] | Polygons,
        det_polygons: Sequence[ArrayLike] | Polygons,
        dont_care: Sequence[bool] | None = None,
    ) -> ImageScore:
        """Score an image (see `score_image`), remember the score and return it. Call it for images without
        predictions too: they count 0."""
        score = score_image(gt_polygons, det_polygons, dont_care)
        self.images.append(score)
        return score

    def compute(self) -> DatasetScore:
        """Means and sums over the images so far; all 0 if there were none."""
        totals = {of.name: sum(getattr(score, of.name) for score in self.images) for of in fields(ImageScore)}
        means = {name: totals[name] / max(len(self.images), 1) for name in ("precision", "recall", "hmean")}
        return DatasetScore(**totals | means, images=len(self.images))


def score_image(
    gt_polygons: Sequence[ArrayLike] | Polygons,
    det_polygons: Sequence[ArrayLike] | Polygons,
    dont_care: Sequence[bool] | None = None,
) -> ImageScore:
    """CLEval of one image, as docs/how-it-works.md defines it.

    Args:
        gt_polygons: the words, each (n, 2) points (x, y) in pixels: along the top edge, then back along the bottom.
        det_polygons: the detections, likewise, in the order in which they claim characters.
        dont_care: for each ground truth, whether it counts as neither found nor missed; None for none.

    `Polygons` that were read for another metric are not read again. Coordinates are truncated to integers. An outline
    that crosses itself is even-odd, as in the competition's scorer.

    Raises:
        ValueError: if a polygon is not (n, 2) or has a coordinate that is not finite or beyond
            `geometry.MAX_COORDINATE`, or if `dont_care` is not one flag for each ground truth.
    """
    return match_image(gt_polygons, det_polygons, dont_care).score


def match_image(
    gt_polygons: Sequence[ArrayLike] | Polygons,
    det_polygons: Sequence[ArrayLike] | Polygons,
    dont_care: Sequence[bool] | None = None,
) -> ImageMatch:
    """`score_image` with the matches behind the score; arguments and errors are the same."""
    image = _compare(gt_polygons, det_polygons, dont_care)
    return _match_selection(image, np.arange(len(image.dets))[:MAX_DETECTIONS])


def score_selections(
    gt_polygons: Sequence[ArrayLike] | Polygons,
    det_polygons: Sequence[ArrayLike] | Polygons,
    dont_care: Sequence[bool] | None,
    selections: Sequence[np.ndarray],
) -> list[ImageScore]:
    """`score_image` of each of several selections of the detections; the polygons are compared only once.

    Each selection is (len(det_polygons),) bool. The other arguments are as in `score_image`.
    """
    image = _compare(gt_polygons, det_polygons, dont_care)
    chosen = [np.flatnonzero(selection[image.dets.is_given])[:MAX_DETECTIONS] for selection in selections]
    return [_match_selection(image, detections).score for detections in chosen]


def _compare(
    gt_polygons: Sequence[ArrayLike] | Polygons,
    det_polygons: Sequence[ArrayLike] | Polygons,
    dont_care: Sequence[bool] | None,
) -> "_Comparison":
    """Measure the polygons and pairs of them: all that does not depend on which detections are selected."""
    gts, dets = Polygons.read(gt_polygons, CLEVAL_MIN_POINTS), Polygons.read(det_polygons, CLEVAL_MIN_POINTS)
    given = len(gts.is_given)
    if dont_care is not None and len(dont_care) != given:
        raise ValueError(f"dont_care has {len(dont_care)} flags for {given} ground truths")
    gt_valid = ~np.asarray(dont_care if dont_care is not None else np.zeros(given), bool)[gts.is_given]
    lengths = _lengths(gts, np.arange(len(gts)), _word_length)
    centres = _character_centres(gts, lengths)
    pairs = _pair_up(gts, dets, gt_valid, lengths, centres)
    return _Comparison(gts, dets, gt_valid, lengths, pairs)


def _match_selection(image: "_Comparison", chosen: np.ndarray) -> ImageMatch:
    """CLEval of the detections at the indices `chosen`, as if there were no others."""
    gts, dets, gt_valid, lengths = image.gts, image.dets, image.gt_valid, image.lengths
    is_chosen = np.zeros(len(dets), bool)
    is_chosen[chosen] = True
    pairs = image.pairs if is_chosen.all() else image.pairs.of_detections(is_chosen)
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
    det_scored = np.zeros(len(dets.is_given), bool)
    det_scored[np.flatnonzero(dets.is_given)[chosen]] = True
    index_in_chosen = np.cumsum(is_chosen) - 1
    return ImageMatch(
        score, gts.is_given, det_scored, gt_valid, det_valid[chosen], gt, index_in_chosen[det], lengths, is_claimed
    )


def _outcomes(
    is_valid: np.ndarray, own: np.ndarray, partner: np.ndarray, names: tuple[Outcome, Outcome, Outcome]
) -> list[Outcome]:
    """Outcomes of the ground truths, or of the detections, from the matched pairs.

    The pairs are (k,) indices `own` on this side and `partner` on the other. `names` are the outcomes of those without
    a partner, with several partners, and with one partner that has several.
    """
    partners = np.bincount(own, minlength=len(is_valid))
    shares_partner = np.zeros(len(is_valid), bool)
    shares_partner[own[np.bincount(partner)[partner] > 1]] = True
    conditions = [~is_valid, partners == 0, partners > 1, shares_partner]
    return [Outcome(name) for name in np.select(conditions, [Outcome.DONT_CARE, *names], Outcome.CORRECT).tolist()]


def _spread(outcomes: list[Outcome], is_scored: np.ndarray) -> list[Outcome]:
    """Insert UNSCORED among the outcomes of the scored polygons, so that there is one for each polygon given."""
    scored_outcomes = iter(outcomes)
    return [next(scored_outcomes) if scored else Outcome.UNSCORED for scored in is_scored]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a ground truth and a detection: those that share a character centre, and those near a don't-care one."""

    gt: np.ndarray
    """(k,) indices of ground truths."""
    det: np.ndarray
    """(k,) indices of detections."""
    has_centre: np.ndarray
    """(k,) whether a character centre of the ground truth lies inside the detection: M > 0."""
    area_precision: np.ndarray
    """(k,) float32, area of both / area of the detection, 0 where the detection has none: AP."""
    pair_of_centre: np.ndarray
    """(m,) for each centre inside a detection: index of the pair, 0 to k - 1."""
    centre: np.ndarray
    """(m,) for each centre inside a detection: index of the centre."""

    def of_detections(self, is_chosen: np.ndarray) -> Self:
        """Only the pairs of these detections, (number of detections,) bool; their indices stay as they are."""
        keeps = is_chosen[self.det]
        keeps_centre = keeps[self.pair_of_centre]
        pair_of_centre = (np.cumsum(keeps) - 1)[self.pair_of_centre[keeps_centre]]
        pairs = self.gt[keeps], self.det[keeps], self.has_centre[keeps], self.area_precision[keeps]
        return type(self)(*pairs, pair_of_centre, self.centre[keeps_centre])


@dataclass(frozen=True)
class _Comparison:
    """The ground truths and detections of an image, compared."""

    gts: Polygons
    """Ground truths that are scored."""
    dets: Polygons
    """Detections with enough points to be scored."""
    gt_valid: np.ndarray
    """(len(gts),) bool: which are not don't-care."""
    lengths: np.ndarray
    """(len(gts),) pseudo-characters of each."""
    pairs: _Pairs
    """Ground truths and detections that can match."""


# Lengths in characters, from aspect ratios. The arithmetic is the competition's, step by step in float32: a box of
# 30 x 10 pixels can have 4 characters in float32 and has 3 in float64, and scans have many boxes of such ratios.


def _word_length(ratio: np.ndarray) -> np.ndarray:
    """Characters of ground truths of these float32 aspect ratios, horizontal or vertical."""
    return _characters(np.maximum(ratio, 1 / (ratio + FLOAT32_EPS)))


def _false_positive_length(ratio: np.ndarray) -> np.ndarray:
    """Characters of detections of these float32 aspect ratios that match nothing."""
    return _characters(1 / (FLOAT32_EPS + ratio))


def _characters(elongation: np.ndarray) -> np.ndarray:
    """float32 -> int of the same shape, halves rounded to even."""
    return np.minimum(np.round(np.float32(0.5) + elongation), MAX_CHARACTERS).astype(np.intp)


def _lengths(polygons: Polygons, select: np.ndarray, length_of_ratio: Callable[..., np.ndarray]) -> np.ndarray:
    """(k,) int lengths in characters of the polygons at the (k,) indices `select`.

    The first edge of the convex hull with the least rectangle counts, so the order of Qhull matters where two edges tie
    and give different lengths, as in a rectangle. Where none tie, a convex quadrilateral is its own hull. For upright
    boxes, most words of a scan, the order is known: Qhull begins with a horizontal edge unless the polygon's first two
    points are its left side.
    """
    quads = polygons.quads.take(select, axis=2)
    areas, ratios = _enclosing_rectangles(quads)
    is_least = areas == areas.min(axis=0)

    is_vertical, is_horizontal = edges_of(quads) == 0
    first_two_x = polygons.points[0, polygons.starts[select] + [[0], [1]]]
    begins_left = (first_two_x == quads[0].min(axis=0)).all(axis=0)
    is_least &= np.where(begins_left, is_vertical, is_horizontal) | ~polygons.is_upright[select]

    candidates = length_of_ratio(ratios)
    lengths = candidates[is_least.argmax(axis=0), np.arange(len(select))]
    needs_hull = ~polygons.is_quad[select] | (is_least & (candidates != lengths)).any(axis=0)
    if needs_hull.any():
        lengths[needs_hull] = length_of_ratio(_aspect_ratios_by_hull(polygons, select[needs_hull]))
    return lengths


def _aspect_ratios_by_hull(polygons: Polygons, select: np.ndarray) -> np.ndarray:
    """(k,) float32 aspect ratios of the polygons at the (k,) indices `select`, in Qhull's order; 0 without a hull."""
    ends = polygons.starts + polygons.counts
    hulls = [_hull(polygons.points[:, polygons.starts[index] : ends[index]]) for index in select]
    counts = np.array([hull.shape[1] for hull in hulls])
    ratios = np.zeros(len(select), np.float32)
    for count in np.unique(counts[counts > 0]):
        same = np.flatnonzero(counts == count)
        areas, ratios_of_edges = _enclosing_rectangles(np.stack([hulls[index] for index in same], axis=2))
        ratios[same] = ratios_of_edges[areas.argmin(axis=0), np.arange(len(same))]
    return ratios


def _hull(points: np.ndarray) -> np.ndarray:
    """The (2, m) corners of the convex hull of (2, n) points, as Qhull orders them; none where they lie on a line."""
    try:
        return points[:, ConvexHull(points.T.astype(np.float32)).vertices]
    except QhullError:
        return points[:, :0]


def _enclosing_rectangles(hulls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The enclosing rectangles along each edge of (2, n, k) convex polygons.

    Returns (n, k) float32 areas, and (n, k) float32 ratios of the extent across the edge to the extent along it.
    """
    hulls = hulls.astype(np.float32)
    edges = edges_of(hulls)
    directions = (edges / np.sqrt(dot(edges, edges)))[:, :, None]
    corners = hulls[:, None]
    along = np.ptp(dot(directions, corners), axis=1)
    across = np.ptp(cross(directions, corners), axis=1)
    return along * across, np.minimum(across / (along + FLOAT32_EPS), np.float32(100))


def _character_centres(gts: Polygons, lengths: np.ndarray) -> np.ndarray:
    """Pseudo-character centres of all ground truths, (2, lengths.sum()), word after word.

    With s = n // 2 - 1 sections of L steps an edge, the c-th of the L + 1 cuts between characters lies c s steps from
    the edge's start; a character's centre is the mean of the cuts before and after it, of the top and the bottom.
    """
    word = np.repeat(np.arange(len(gts)), lengths + 1)
    cut = ranges(lengths + 1)
    length, count, start = lengths[word], gts.counts[word], gts.starts[word]
    section, step = np.divmod(cut * (count // 2 - 1), length)
    is_end = cut == length

    def cut_points(index: np.ndarray, next_index: np.ndarray) -> np.ndarray:
        begin, end = gts.points.take(start + index, axis=1), gts.points.take(start + next_index, axis=1)
        return np.trunc(begin + (end - begin) / length * step)

    top = cut_points(section, section + 1)
    # With an odd number of points the bottom has one more than the top; the last cut is still at its last point.
    bottom = cut_points(np.where(is_end, count // 2, count - 1 - section), count - 2 - section)
    middle = top + bottom
    return (middle[:, :-1] + middle[:, 1:])[:, ~is_end[:-1]] / 4


def _pair_up(gts: Polygons, dets: Polygons, gt_valid: np.ndarray, lengths: np.ndarray, centres: np.ndarray) -> _Pairs:
    """The pairs that can match, among those whose bounding boxes meet."""
    gt, det = near_pairs(gts, dets)
    first_centres = np.cumsum(lengths) - lengths
    pair = np.repeat(np.arange(len(gt)), lengths[gt])
    centre = np.repeat(first_centres[gt], lengths[gt]) + ranges(lengths[gt])
    is_inside = contains(dets, det[pair], centres.take(centre, axis=1))
    pair, centre = pair[is_inside], centre[is_inside]

    has_centre = np.zeros(len(gt), bool)
    has_centre[pair] = True
    is_kept = has_centre | ~gt_valid[gt]
    pair_of_centre = (np.cumsum(is_kept) - 1)[pair]
    gt, det = gt[is_kept], det[is_kept]
    area_precision = _area_precisions(gts, dets, gt_valid, gt, det)
    return _Pairs(gt, det, has_centre[is_kept], area_precision, pair_of_centre, centre)


def _area_precisions(
    gts: Polygons, dets: Polygons, gt_valid: np.ndarray, gt: np.ndarray, det: np.ndarray
) -> np.ndarray:
    """(k,) float32 area precisions of pairs of a ground truth `gt` and a detection `det`, (k,) indices."""
    common = np.empty(len(gt))
    is_valid = gt_valid[gt]
    common[is_valid] = common_areas(gts, dets, gt[is_valid], det[is_valid])
    if not is_valid.all():
        dont_care = _cut_out_of_dont_care(gts.shapes, gt_valid)
        common[~is_valid] = shapely.area(shapely.intersection(dont_care[gt[~is_valid]], dets.shapes[det[~is_valid]]))
    det_area = dets.outline_areas[det]  # as the competition divides: opposite lobes of an outline cancel
    return np.divide(common, det_area, out=np.zeros(len(gt)), where=det_area > 0).astype(np.float32)


def _cut_out_of_dont_care(shapes: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """The (k,) shapes of ground truths, after cutting the valid ones out of the don't-care ones."""
    cut, dont_care, valid = shapes.copy(), np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
    hole_of, hole = shapely.STRtree(shapes[valid]).query(shapes[dont_care], predicate="intersects")
    for index in np.unique(hole_of):
        holes = shapely.union_all(shapes[valid[hole[hole_of == index]]])
        cut[dont_care[index]] = shapely.difference(shapes[dont_care[index]], holes)
    return cut


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
