"""CLEval for text detection: which characters of the words were found, less a penalty for splits and merges.

CLEval (arXiv 2006.06244) cuts every ground truth into pseudo-characters and asks which of their centres lie inside
which detections. A detection may therefore cover several words, or a word several detections; each surplus piece
costs one character. This is the variant of the competition; docs/how-it-works.md defines it.

    score = score_image(gt_polygons, det_polygons)          # one image
    metric = CLEval()                                       # a data set: `update` for each image, then
    print(metric.compute().hmean)

Pairs of polygons are arrays, so that no code here loops over them; their geometry is in `dbnet/geometry.py`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from dbnet.geometry import Polygons, blocks, common_areas, contains, cross, edges_of, near_pairs, ranges

CLEVAL_MIN_POINTS = 4  # polygons with fewer are skipped
MAX_DETECTIONS = 500  # of an image are scored, the first ones
MAX_CHARACTERS = 100  # that a word or a detection counts as

MIN_AREA_PRECISION = np.float32(0.3)
"""Share of a detection's area that must lie inside what it matches. Area precisions are float32, as the competition
keeps them, so that a share of exactly 3/10 is enough however the last bit of a double falls."""

FLOAT32_EPS = np.finfo(np.float32).eps
Outlines = Sequence[ArrayLike]  # (n, 2) points (x, y) in pixels of each polygon
Flags = Sequence[bool] | None  # for each ground truth whether it is don't-care; None for none


@dataclass(frozen=True)
class ImageScore:
    """CLEval of one image; counts are of pseudo-characters unless stated otherwise."""

    precision: float  # max(0, chars_tp - gran_precision) / chars_det, 0 if the divisor is 0
    recall: float  # max(0, chars_tp - gran_recall) / chars_gt, 0 if the divisor is 0
    hmean: float  # harmonic mean of precision and recall
    words: int  # ground truths scored, including don't-care ones
    detections: int  # detections scored, including don't-care ones
    chars_gt: int  # in all ground truths that are not don't-care
    chars_det: int  # inside matched detections (a character inside two counts twice), and `fp_chars`
    chars_tp: int  # found: inside at least one detection that is matched with their ground truth
    fp_chars: int  # estimated from the aspect ratio of detections without a match
    overlaps: int  # number of times that a later detection found a character again
    splits: int  # ground truths matched with several detections
    merges: int  # detections matched with several ground truths
    gran_recall: int  # penalty of splits: the sum of matched detections - 1 over ground truths
    gran_precision: int  # penalty of merges: the sum of matched ground truths - 1 over detections


@dataclass(frozen=True)
class DatasetScore(ImageScore):
    """CLEval of a data set: precision, recall and hmean are means over its images, all counts are sums."""

    images: int


class Outcome(StrEnum):
    """Match outcome of a ground truth or a detection."""

    CORRECT = "correct"  # matched one to one
    MISSED = "missed"  # a ground truth without a match
    FALSE = "false"  # a detection without a match
    SPLIT = "split"  # a ground truth matched with several detections, or one of these
    MERGED = "merged"  # a detection matched with several ground truths, or one of these
    DONT_CARE = "dont_care"  # a don't-care ground truth, or a detection mainly on such ones: neither right nor wrong
    UNSCORED = "unscored"  # it has fewer than CLEVAL_MIN_POINTS points, or comes after the first MAX_DETECTIONS


@dataclass(frozen=True)
class ImageMatch:
    """The matches of CLEval between the ground truths and detections of an image, and their score."""

    score: ImageScore
    gt_scored: np.ndarray  # (ground truths,) bool: which are scored
    det_scored: np.ndarray  # (detections,) bool, likewise
    gt_valid: np.ndarray  # (ground truths,) bool: which are scored and not don't-care
    det_valid: np.ndarray  # (detections,) bool, likewise
    gt: np.ndarray  # (matches,) index of the ground truth of each matched pair
    det: np.ndarray  # (matches,) index of its detection
    gt_chars: np.ndarray
    """(ground truths, 2) int: found characters and all characters of each, 0 if it is unscored or don't-care; they sum
    to `score.chars_tp` and `score.chars_gt`"""

    def gt_outcomes(self) -> list[Outcome]:
        """The outcome of each ground truth; SPLIT if it is both split and merged: they add up to `score.splits`."""
        outcomes = [Outcome.MISSED, Outcome.SPLIT, Outcome.MERGED]
        return _outcomes(self.gt_scored, self.gt_valid, self.gt, self.det, outcomes)

    def det_outcomes(self) -> list[Outcome]:
        """The outcome of each detection; MERGED if it is both split and merged: they add up to `score.merges`."""
        outcomes = [Outcome.FALSE, Outcome.MERGED, Outcome.SPLIT]
        return _outcomes(self.det_scored, self.det_valid, self.det, self.gt, outcomes)


@dataclass
class CLEval:
    """Collect the scores of images; `compute` sums them up. Processes that share a data set concatenate `images`."""

    images: list[ImageScore] = field(default_factory=list)

    def update(self, gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags = None) -> ImageScore:
        """Keep and return the `score_image` of an image. Images without predictions belong here too: they count 0."""
        self.images.append(score_image(gt_polygons, det_polygons, dont_care))
        return self.images[-1]

    def compute(self) -> DatasetScore:
        """Means and sums over the images so far; all 0 if there were none."""
        totals = {of.name: sum(getattr(score, of.name) for score in self.images) for of in fields(ImageScore)}
        means = {name: totals[name] / max(len(self.images), 1) for name in ("precision", "recall", "hmean")}
        return DatasetScore(**totals | means, images=len(self.images))


def score_image(gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags = None) -> ImageScore:
    """CLEval of one image, as docs/how-it-works.md defines it.

    The points of a word run along its top edge, then back along the bottom. Detections claim characters in their order.
    A word that is `dont_care` counts as neither found nor missed. Coordinates are truncated to integers. An outline
    that crosses itself is even-odd.

    Raises ValueError if a polygon is not (n, 2) or has a coordinate that is not finite or beyond
    `geometry.MAX_COORDINATE`, or if `dont_care` is not one flag for each ground truth."""
    return match_image(gt_polygons, det_polygons, dont_care).score


def match_image(gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags = None) -> ImageMatch:
    """`score_image` with the matches behind the score; arguments and errors are the same."""
    return _match(_compare(gt_polygons, det_polygons, dont_care), np.ones(len(det_polygons), bool))


def score_selections(
    gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags, selections: Iterable[np.ndarray]
) -> list[ImageScore]:
    """`score_image` of several selections of the detections, (len(det_polygons),) bool; they are compared only once."""
    image = _compare(gt_polygons, det_polygons, dont_care)
    return [_match(image, selection).score for selection in selections]


@dataclass(frozen=True)
class _Comparison:
    """Ground truths and detections of an image, and the pairs of them that share a character centre or are near and
    don't care: all that does not depend on which detections are selected."""

    gts: Polygons
    dets: Polygons
    gt_valid: np.ndarray  # (len(gts),) bool: which are scored and not don't-care
    lengths: np.ndarray  # (len(gts),) pseudo-characters of each
    gt: np.ndarray  # (k,) indices of the ground truths of pairs
    det: np.ndarray  # (k,) indices of the detections of pairs
    has_centre: np.ndarray  # (k,) whether a character centre of the ground truth lies inside the detection: M > 0
    area_precision: np.ndarray  # (k,) float32, area of both / area of the detection, 0 where it has none: AP
    pair_of_centre: np.ndarray  # (m,) for each centre inside a detection: index of the pair, 0 to k - 1
    centre: np.ndarray  # (m,) for each centre inside a detection: index of the centre


def _compare(gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags) -> _Comparison:
    """Measure the polygons of an image and the pairs of them that can match."""
    gts, dets = Polygons(gt_polygons, CLEVAL_MIN_POINTS), Polygons(det_polygons, CLEVAL_MIN_POINTS)
    if dont_care is not None and len(dont_care) != len(gts):
        raise ValueError(f"dont_care has {len(dont_care)} flags for {len(gts)} ground truths")
    gt_valid = gts.is_given & ~np.asarray(dont_care if dont_care is not None else np.zeros(len(gts)), bool)
    lengths = np.ones(len(gts), np.intp)
    lengths[gts.is_given] = _lengths(gts, np.flatnonzero(gts.is_given), are_words=True)
    centres, first_centres = _character_centres(gts, lengths), np.cumsum(lengths) - lengths

    near_gt, near_det = near_pairs(gts, dets)
    count, pairs, inside = lengths[near_gt], [np.empty(0, int)], [np.empty(0, int)]
    for block in blocks(count):
        pair = np.repeat(block, count[block])
        centre = np.repeat(first_centres[near_gt[block]], count[block]) + ranges(count[block])
        is_inside = contains(dets, near_det[pair], centres.take(centre, axis=1))
        pairs.append(pair[is_inside])
        inside.append(centre[is_inside])
    pair, centre = np.concatenate(pairs), np.concatenate(inside)
    has_centre = np.bincount(pair, minlength=len(near_gt)) > 0
    is_kept = has_centre | (gts.is_given & ~gt_valid)[near_gt]
    pair_of_centre = (np.cumsum(is_kept) - 1)[pair]
    gt, det, has_centre = near_gt[is_kept], near_det[is_kept], has_centre[is_kept]

    common = common_areas(gts, dets, gt, det, on_top=gt_valid)
    det_area = dets.outline_areas[det]  # as the competition divides: opposite lobes of an outline cancel
    area_precision = np.divide(common, det_area, out=np.zeros(len(gt)), where=det_area > 0).astype(np.float32)
    return _Comparison(gts, dets, gt_valid, lengths, gt, det, has_centre, area_precision, pair_of_centre, centre)


def _match(image: _Comparison, selection: np.ndarray) -> ImageMatch:
    """CLEval of the first MAX_DETECTIONS of the selected detections, (len(dets),) bool, as if there were no others."""
    scored = selection & image.dets.is_given
    scored &= np.cumsum(scored) <= MAX_DETECTIONS
    det_valid = scored & _is_off_dont_care(image)
    is_matched = _matched_pairs(image, scored, det_valid)

    gt, det = image.gt[is_matched], image.det[is_matched]
    matches_of_gt = np.bincount(gt, minlength=len(image.gts))
    matches_of_det = np.bincount(det, minlength=len(image.dets))
    claims = image.centre[is_matched[image.pair_of_centre]]
    word_of_centre = np.repeat(np.arange(len(image.gts)), image.lengths)
    found = np.bincount(word_of_centre[np.unique(claims)], minlength=len(image.gts))
    gt_chars = np.stack([found, image.lengths * image.gt_valid], axis=1)
    chars_tp, chars_gt = gt_chars.sum(axis=0).tolist()
    fp_chars = int(_lengths(image.dets, np.flatnonzero(det_valid & (matches_of_det == 0)), are_words=False).sum())
    chars_det = len(claims) + fp_chars
    gran_recall, gran_precision = (len(gt) - int(np.count_nonzero(each)) for each in (matches_of_gt, matches_of_det))
    recall = max(0, chars_tp - gran_recall) / max(chars_gt, 1)
    precision = max(0, chars_tp - gran_precision) / max(chars_det, 1)
    score = ImageScore(
        precision=precision,
        recall=recall,
        hmean=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        words=int(image.gts.is_given.sum()),
        detections=int(scored.sum()),
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
    return ImageMatch(score, image.gts.is_given, scored, image.gt_valid, det_valid, gt, det, gt_chars)


def _is_off_dont_care(image: _Comparison) -> np.ndarray:
    """(detections,) which are not mainly on don't-care polygons."""
    on_dont_care, count = ~image.gt_valid[image.gt], len(image.dets)
    on_one = on_dont_care & (image.area_precision >= MIN_AREA_PRECISION)
    on_several = on_dont_care & image.has_centre
    shares = np.bincount(image.det[on_several], image.area_precision[on_several], minlength=count)
    is_off = shares.astype(np.float32) < MIN_AREA_PRECISION
    is_off[image.det[on_one]] = False
    return is_off


def _matched_pairs(image: _Comparison, scored: np.ndarray, det_valid: np.ndarray) -> np.ndarray:
    """(k,) which pairs are matched: one to one, one ground truth to many detections, or many to one."""
    gt, det = image.gt, image.det
    is_valid = image.gt_valid[gt] & det_valid[det] & image.has_centre
    is_candidate = (image.area_precision >= MIN_AREA_PRECISION) & image.has_centre & scored[det]

    def partners(own: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """(k,) how many of these pairs each pair's ground truth, or detection, has."""
        return np.bincount(own[pairs], minlength=max(len(image.gts), len(image.dets)))[own]

    one_to_one = is_candidate & (partners(gt, is_candidate) == 1) & (partners(det, is_candidate) == 1)
    one_to_many = is_candidate & (partners(gt, is_valid & is_candidate) >= 2)
    shares = np.bincount(det[is_valid], image.area_precision[is_valid], minlength=len(image.dets))
    many_to_one = (partners(det, is_valid) >= 2) & (shares.astype(np.float32) >= MIN_AREA_PRECISION)[det]
    return is_valid & (one_to_one | one_to_many | many_to_one)


def _outcomes(
    is_scored: np.ndarray, is_valid: np.ndarray, own: np.ndarray, partner: np.ndarray, outcomes: list[Outcome]
) -> list[Outcome]:
    """Outcomes of the ground truths, or of the detections, from the matched pairs: (k,) indices `own` on this side and
    `partner` on the other. `outcomes` are those without a partner, with several, and with one that has several."""
    partners = np.bincount(own, minlength=len(is_valid))
    shares_partner = np.zeros(len(is_valid), bool)
    shares_partner[own[np.bincount(partner)[partner] > 1]] = True
    conditions = [~is_scored, ~is_valid, partners == 0, partners > 1, shares_partner]
    names = np.select(conditions, [Outcome.UNSCORED, Outcome.DONT_CARE, *outcomes], Outcome.CORRECT)
    return [Outcome(name) for name in names.tolist()]


def _characters(ratio: np.ndarray | np.float32, are_words: bool) -> np.ndarray:
    """int lengths in characters for float32 aspect ratios of the same shape: words are horizontal or vertical,
    detections that match nothing are horizontal. Halves are rounded to even. The arithmetic is the competition's, step
    by step in float32: a box of 30 x 10 pixels (scans have many) can have 4 characters there; in float64 it has 3."""
    elongation = 1 / (ratio + FLOAT32_EPS)
    if are_words:
        elongation = np.maximum(ratio, elongation)
    return np.minimum(np.round(np.float32(0.5) + elongation), MAX_CHARACTERS).astype(np.intp)


def _lengths(polygons: Polygons, select: np.ndarray, are_words: bool) -> np.ndarray:
    """(k,) int lengths in characters of the polygons at the (k,) indices `select`. The first edge of the convex hull
    with the least rectangle counts. A convex quadrilateral is its own hull; where its edges tie and give different
    lengths, the order of Qhull matters, as for all other polygons. For upright boxes, most words of a scan, it begins
    with a horizontal edge unless the polygon's first two points are its left side."""
    quads = polygons.quads.take(select, axis=2)
    areas, ratios = _enclosing_rectangles(quads)
    is_least, candidates = areas == areas.min(axis=0), _characters(ratios, are_words)
    is_vertical, is_horizontal = edges_of(quads) == 0
    first_two_x = polygons.points[0, polygons.starts[select] + [[0], [1]]]
    begins_left = (first_two_x == quads[0].min(axis=0)).all(axis=0)
    is_upright = (is_vertical | is_horizontal).all(axis=0)
    is_least &= np.where(begins_left, is_vertical, is_horizontal) | ~is_upright
    lengths = candidates[is_least.argmax(axis=0), np.arange(len(select))]
    needs_hull = ~polygons.is_quad[select] | (is_least & (candidates != lengths)).any(axis=0)
    for index in np.flatnonzero(needs_hull):
        lengths[index] = _characters(_aspect_ratio(polygons.outline(select[index])), are_words)
    return lengths


def _aspect_ratio(points: np.ndarray) -> np.float32:
    """float32 aspect ratio of (2, n) points from their hull, in Qhull's order of edges; 0 if they lie on a line."""
    from scipy.spatial import ConvexHull, QhullError  # most words need none

    try:
        hull = points[:, ConvexHull(points.T.astype(np.float32)).vertices]
    except QhullError:
        return np.float32(0)
    areas, ratios = _enclosing_rectangles(hull[:, :, None])
    return ratios[areas.argmin(), 0]


def _enclosing_rectangles(hulls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The enclosing rectangles along each edge of (2, n, k) convex polygons: (n, k) float32 areas, and (n, k) float32
    ratios of the extent across the edge to the extent along it."""
    hulls = hulls.astype(np.float32)
    edges = edges_of(hulls)
    directions = (edges / np.sqrt((edges * edges).sum(axis=0)))[:, :, None]
    corners = hulls[:, None]
    along = np.ptp((directions * corners).sum(axis=0), axis=1)
    across = np.ptp(cross(directions, corners), axis=1)
    return along * across, np.minimum(across / (along + FLOAT32_EPS), np.float32(100))


def _character_centres(gts: Polygons, lengths: np.ndarray) -> np.ndarray:
    """Pseudo-character centres of all ground truths, (2, lengths.sum()), word after word. With s = n // 2 - 1 sections
    of L steps an edge, the c-th of the L + 1 cuts between characters lies c s steps from the edge's start; a
    character's centre is the mean of the cuts before and after it, of the top and the bottom."""
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
