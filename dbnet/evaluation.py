"""Scores of detections on a split, for validation in train.py and for evaluate.py."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import ArrayLike

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.dataset import TextDataset
from dbnet.device import all_gather, progress
from dbnet.errors import ImageError, UserError, printable
from dbnet.files import check_regular
from dbnet.formats import read_detections
from dbnet.geometry import Polygons, common_areas, near_pairs
from dbnet.images import read_size
from dbnet.inference import Network, Pipeline
from dbnet.metric import MAX_DETECTIONS, CLEval, DatasetScore, ImageScore, match_image
from dbnet.splits import read_split

IOU_MIN_POINTS = 3  # polygons with fewer have no area
MIN_IOU = 0.5  # a match has more than this
MAX_ON_DONT_CARE = 0.5  # share of a detection's area on one don't-care word, above which it does not count


@dataclass(frozen=True)
class IoUScore:
    """Matches between words and detections of an image or a data set, and the scores that follow, 0 where undefined."""

    precision: float
    recall: float
    hmean: float
    matched: int
    """Pairs of a word and a detection"""
    words: int
    """Ground truths that are not don't-care"""
    detections: int
    """Detections that are not on a don't-care word"""


def score_iou(
    gt_polygons: Sequence[ArrayLike],
    det_polygons: Sequence[ArrayLike],
    dont_care: Sequence[bool] | None = None,
) -> IoUScore:
    """Match the (n, 2) detections of an image with its (n, 2) words: each word takes the first free one that matches.

    Coordinates are truncated to integers, outlines that cross themselves are even-odd. A polygon without area is
    counted and matches nothing. `dont_care` None stands for none. Raises ValueError as `metric.score_image` does.
    """
    gts, dets = Polygons.read(gt_polygons, IOU_MIN_POINTS), Polygons.read(det_polygons, IOU_MIN_POINTS)
    gt_counts = ~np.asarray(dont_care if dont_care is not None else np.zeros(len(gts)), bool)
    det_counts = np.ones(len(dets), bool)
    gt, det = near_pairs(gts, dets)

    on_dont_care = np.flatnonzero(~gt_counts[gt])
    shares = common_areas(gts, dets, gt[on_dont_care], det[on_dont_care])
    is_mostly = _exceeds(shares, MAX_ON_DONT_CARE * dets.areas[det[on_dont_care]])
    det_counts[det[on_dont_care[is_mostly]]] = False

    # Only pairs whose areas are alike can have an IoU above a half; few neighbours of a word are left to intersect.
    smaller, larger = np.sort([gts.areas[gt], dets.areas[det]], axis=0)
    is_candidate = gt_counts[gt] & det_counts[det] & (smaller > MIN_IOU * larger)
    gt, det = gt[is_candidate], det[is_candidate]
    common = common_areas(gts, dets, gt, det)
    matches = _exceeds(common, MIN_IOU * (gts.areas[gt] + dets.areas[det] - common))
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
    precision, recall = matched / max(detections, 1), matched / max(words, 1)
    return IoUScore(precision, recall, 2 * matched / max(words + detections, 1), matched, words, detections)


def _exceeds(areas: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Which areas are above their limits by more than the rounding of their arithmetic."""
    return areas > limits * (1 + 1e-9)


SIZE_EDGES = (0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.1, 0.5, 1)
"""Edges of the bins; a word on an edge is in the bin above it, and the last bin has all larger words."""


def text_heights(polygons: Sequence[ArrayLike]) -> np.ndarray:
    """(len,) heights in pixels of (n, 2) words: the shorter side of the rectangle of least area around each.

    It does not depend on the direction or rotation of a word; for curved text it is the height of the curve.
    """
    sides = [cv2.minAreaRect(np.asarray(polygon, np.float32).reshape(-1, 2))[1] for polygon in polygons]
    return np.array(sides, np.float64).reshape(-1, 2).min(axis=1)


def bin_of_size(heights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(len,) bin of each word, from its height in pixels and the (width, height) of the image in pixels."""
    return np.searchsorted(SIZE_EDGES[1:-1], heights / max(size), side="right")


def chars_by_size(polygons: Sequence[ArrayLike], size: tuple[int, int], gt_chars: np.ndarray) -> np.ndarray:
    """(bins, 2) int: characters of the words in each bin that were found, and all.

    `gt_chars` are those of each word of an image of `size` (width, height) pixels, as `ImageMatch.gt_chars` has them.
    The columns sum to `chars_tp` and `chars_gt` of the image. Penalties for splits are left out.
    """
    bins = bin_of_size(text_heights(polygons), size)
    counts = [np.bincount(bins, chars, minlength=len(SIZE_EDGES) - 1) for chars in gt_chars.T]
    return np.stack(counts, axis=1).astype(int)


def size_rows(counts: Iterable[np.ndarray]) -> list[dict[str, float]]:
    """Sum over images as plain values, a dict for each bin: its edges, characters, found characters and recall."""
    totals = sum(counts, np.zeros((len(SIZE_EDGES) - 1, 2), int))
    return [
        {"from": low, "to": high, "chars_gt": chars, "chars_tp": found, "recall": found / max(chars, 1)}
        for low, high, (found, chars) in zip(SIZE_EDGES, SIZE_EDGES[1:], totals.tolist(), strict=False)
    ]


CHANGED = 5  # images in the lists of the most improved and the most worsened
_SAME = 5e-5  # of H-Mean: what its four digits do not show


class PrecisionRecall(NamedTuple):
    """CLEval of an image, or means over images, 0..1."""

    precision: float
    recall: float
    hmean: float


@dataclass
class Comparison:
    """Scores of an earlier evaluation beside those of this one, for the images that both have."""

    path: Path
    before: dict[str, PrecisionRecall]
    """The earlier scores, by file name"""
    after: dict[str, PrecisionRecall] = field(default_factory=dict)
    """The scores of this evaluation, in the order of the split, for the names in `before`"""
    labels: dict[str, str | None] = field(default_factory=dict)
    """`label_fingerprint` of each image of the earlier evaluation; None where its file has none"""
    other_labels: list[str] = field(default_factory=list)
    """Images in both whose labels have changed, or may have"""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The earlier scores, from a file that `evaluate.py --json` wrote. Raises UserError for anything else."""
        check_regular(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images = content["per_image"]
            before = {name: _read_scores(image) for name, image in images.items()}
            return cls(path, before, labels={name: image.get("labels") for name, image in images.items()})
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: holds no scores by image; write them with evaluate.py CKPT --json FILE") from None

    def check_shares(self, names: Iterable[str]) -> None:
        """Raise UserError unless one of these images has earlier scores; to be called before the long work."""
        if self.before.keys().isdisjoint(names):
            raise UserError(f"{self.path}: has no image of this split; name scores of the same --data and --split")

    def compare(self, evaluation: "Evaluation") -> None:
        """Add the scores of this evaluation."""
        scores = evaluation.per_image.items()
        self.after = {
            name: PrecisionRecall(each.precision, each.recall, each.hmean)
            for name, each in scores
            if name in self.before
        }
        self.other_labels = [name for name in self.after if self.labels.get(name) != evaluation.labels[name]]

    def means(self) -> tuple[PrecisionRecall, PrecisionRecall]:
        """Before and after, over the images that both evaluations have."""
        columns_before = zip(*(self.before[name] for name in self.after), strict=True)
        columns_after = zip(*self.after.values(), strict=True)
        return PrecisionRecall(*map(fmean, columns_before)), PrecisionRecall(*map(fmean, columns_after))

    def better(self) -> list[tuple[str, float]]:
        """Images whose H-Mean rose and by how much, the most improved first."""
        return sorted((change for change in self._changes() if change[1] > _SAME), key=lambda change: -change[1])

    def worse(self) -> list[tuple[str, float]]:
        """Images whose H-Mean fell and by how much (below 0), the most worsened first."""
        return sorted((change for change in self._changes() if change[1] < -_SAME), key=lambda change: change[1])

    def table(self) -> str:
        """Text: the change of the means, and the images that changed most."""
        before, after = self.means()
        better, worse = self.better(), self.worse()
        lines = [f"\n{'':<9}  {'there':>6}    here   change   ({self.path}; {len(self.after)} images in both)"]
        if self.other_labels:
            lines.insert(0, f"\n{self.warning()}")
        for name, there, here in zip(("precision", "recall", "H-Mean"), before, after, strict=True):
            lines.append(f"{name:<9}  {there:6.4f}  {here:6.4f}  {here - there:+z7.4f}")
        same = len(self.after) - len(better) - len(worse)
        lines.append(f"\n{len(better)} images better, {len(worse)} worse, {same} as before")
        for title, changes in (("most improved", better[:CHANGED]), ("most worsened", worse[:CHANGED])):
            if changes:
                width = max(len(title), *(len(printable(name)) for name, _ in changes))
                lines.append(f"\n{title:<{width}}   there    here   H-Mean")
            for name, change in changes:
                here = self.after[name].hmean
                lines.append(f"{printable(name):<{width}}  {here - change:6.4f}  {here:6.4f}  {change:+z7.4f}")
        return "\n".join(lines)

    def warning(self) -> str:
        """One line if the scores were made on other labels; empty if the labels are the same."""
        if not self.other_labels:
            return ""
        if not any(self.labels.values()):
            return f"{self.path}: does not say which labels it was made on; if they were others, so are its scores"
        return (
            f"{self.path}: made on other labels for {len(self.other_labels)} of {len(self.after)} images, "
            f"{printable(self.other_labels[0])} first; changes there are not those of the detections alone"
        )

    def _changes(self) -> list[tuple[str, float]]:
        return [(name, scores.hmean - self.before[name].hmean) for name, scores in self.after.items()]


def _read_scores(image: dict[str, Any]) -> PrecisionRecall:
    scores = PrecisionRecall(image["precision"], image["recall"], image["hmean"])
    if not all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
        raise ValueError
    return scores


SCORES_MARK = "scores by dbnet"  # in every JSON of scores, which may be overwritten therefore
WORST = 10  # images in the list of the worst
RESAMPLINGS = 2000  # for the interval of the H-Mean


@dataclass
class Evaluation:
    """Scores of a split, image by image: CLEval, its recall by size of text, and IoU."""

    per_image: dict[str, ImageScore] = field(default_factory=dict)
    """CLEval of each file, in the order of the split"""
    iou_per_image: dict[str, IoUScore] = field(default_factory=dict)
    """Precision and recall by the ICDAR 2015 protocol of each file"""
    chars_per_image: dict[str, np.ndarray] = field(default_factory=dict)
    """(bins, 2) characters found and all, by size of text; only of images whose size is known"""
    highest: float = 0.0
    """Highest probability, 0..1, in all probability maps"""
    unreadable: list[str] = field(default_factory=list)
    """A line for each image that could not be read; it counts as an image without detections"""
    pictures: dict[str, Any] = field(default_factory=dict)
    """What a report shows of each file"""
    labels: dict[str, str] = field(default_factory=dict)
    """`label_fingerprint` of each file"""
    unscored: dict[str, int] = field(default_factory=dict)
    """Number of detections of files with more than the MAX_DETECTIONS that CLEval scores"""
    at_limit: list[str] = field(default_factory=list)
    """Files with as many detections as max_candidates allows: there may be more text"""

    def update(
        self,
        name: str,
        annotation: Annotation,
        polygons: Iterable[np.ndarray],
        error: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Score the detected (n, 2) polygons in pixels of an original of `size` (width, height), None if unknown."""
        words, detections = annotation.polygons, list(polygons)
        match = match_image(words, detections, annotation.dont_care)
        self.per_image[name] = match.score
        self.iou_per_image[name] = score_iou(words, detections, annotation.dont_care)
        self.labels[name] = label_fingerprint(annotation)
        if len(detections) > MAX_DETECTIONS:
            self.unscored[name] = len(detections)
        if size:
            self.chars_per_image[name] = chars_by_size(annotation.polygons, size, match.gt_chars)
        if error:
            self.unreadable.append(error)

    def merge(self, other: Self) -> None:
        """Add the scores of another process."""
        for name, value in vars(self).items():
            if isinstance(value, dict):
                value.update(getattr(other, name))
        self.highest = max(self.highest, other.highest)
        self.at_limit = sorted({*self.at_limit, *other.at_limit})
        self.unreadable = sorted({*self.unreadable, *other.unreadable})

    def compute(self) -> DatasetScore:
        """Means over the images, and totals."""
        return CLEval(list(self.per_image.values())).compute()

    def interval(self) -> tuple[float, float]:
        """95% interval of the H-Mean over images of this kind, by resampling (bootstrap); the H-Mean for one image."""
        hmeans = np.array([score.hmean for score in self.per_image.values()])
        if len(hmeans) < 2:
            return (self.compute().hmean,) * 2
        rng = np.random.default_rng(0)
        means = [rng.choice(hmeans, len(hmeans)).mean() for _ in range(RESAMPLINGS)]
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        return low, high

    def by_size(self) -> list[dict[str, float]]:
        """Characters, found characters and recall by size of text, over all images of known size."""
        return size_rows(self.chars_per_image.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals of CLEval and IoU, recall by size of text, and the scores of each image."""
        return {
            **asdict(self.compute()),
            "made_by": SCORES_MARK,
            "hmean_interval": self.interval(),
            "iou": asdict(total_iou(self.iou_per_image.values())),
            "by_size": self.by_size(),
            "unreadable": self.unreadable,
            "per_image": {
                name: {**asdict(score), "iou": asdict(self.iou_per_image[name]), "labels": self.labels[name]}
                for name, score in self.per_image.items()
            },
        }

    def table(self) -> str:
        """Text: totals, recall by size of text and the worst images."""
        score, iou, (low, high) = self.compute(), total_iou(self.iou_per_image.values()), self.interval()
        lines = [
            *(f"counts 0: {line}" for line in self.unreadable),
            *self._limit_lines(),
            f"\nprecision {score.precision:.4f}\nrecall    {score.recall:.4f}\nH-Mean    {score.hmean:.4f}",
            f"95% interval of the H-Mean, by resampling the images: {low:.4f} to {high:.4f}\n",
            f"{score.images} images, {score.words} words, {score.detections} detections, "
            f"{score.splits} splits, {score.merges} merges\n",
            f"IoU over 0.5: precision {iou.precision:.4f}, recall {iou.recall:.4f}, H-Mean {iou.hmean:.4f}\n",
            *self._size_lines(),
        ]
        ascending = sorted(self.per_image.items(), key=lambda item: (item[1].hmean, item[0]))
        worst = [(printable(name), image) for name, image in ascending[:WORST]]
        width = max(len("worst images"), *(len(name) for name, _ in worst))
        lines.append(f"\n{'worst images':<{width}}  H-Mean  precision  recall  words  detections")
        for name, image in worst:
            lines.append(
                f"{name:<{width}}  {image.hmean:6.4f}  {image.precision:9.4f}  {image.recall:6.4f}  "
                f"{image.words:5d}  {image.detections:10d}"
            )
        return "\n".join(lines)

    def _limit_lines(self) -> list[str]:
        """A line for detections that are not scored, and one for those that max_candidates may have cut."""
        lines = []
        if self.unscored:
            name, count = max(self.unscored.items(), key=lambda item: item[1])
            lines.append(
                f"{len(self.unscored)} images have more detections than the {MAX_DETECTIONS} that CLEval scores, "
                f"{printable(name)} has {count}: the rest count as not there"
            )
        if self.at_limit:
            lines.append(
                f"{len(self.at_limit)} images have as many detections as --max-candidates allows, "
                f"{printable(self.at_limit[0])} first: text may be missing; raise it"
            )
        return lines

    def _size_lines(self) -> list[str]:
        """CLEval's characters and their recall, by the height of text over the longer side."""
        rows = self.by_size()
        lines = [
            "size of text  " + "".join(f"{row['from']:>8g}" for row in rows) + f"{rows[-1]['to']:>5g}",
            "characters    " + "".join(f"{row['chars_gt']:>8d}" for row in rows),
            "recall        " + "".join(f"{row['recall']:>8.4f}" if row["chars_gt"] else f"{'-':>8}" for row in rows),
        ]
        without_size = len(self.per_image) - len(self.chars_per_image)
        if without_size:
            lines.append(f"{without_size} images whose files are not there to tell their size are left out of these")
        return lines


def label_fingerprint(annotation: Annotation) -> str:
    """A short hash of an image's words as the metric sees them, whole pixels and don't care, in any order."""
    words = [
        [np.trunc(polygon).astype(int).tolist(), bool(ignore)]
        for polygon, ignore in zip(annotation.polygons, annotation.dont_care, strict=True)
    ]
    return hashlib.sha256(json.dumps(sorted(words)).encode()).hexdigest()[:12]


def evaluate(
    pipeline: Pipeline, network: Network, title: str = "", picture: Callable[..., Any] | None = None
) -> Evaluation:
    """Run a network over an annotated split and score what it finds, with a progress bar.

    Scores are in the order of the data set. Each process that torchrun has started gets the scores of all of them.
    What `picture(path, annotation, polygons, scores, prob_map)` returns for each image is kept in `pictures`.
    Raises as `Pipeline.detect` does.
    """
    dataset = pipeline.dataset
    assert isinstance(dataset, TextDataset)
    evaluation = Evaluation()
    for detection in progress(pipeline.detect(network), title, len(dataset)):
        name, annotation = dataset.names[detection.index], dataset.annotations[detection.index]
        size = dataset.size(detection.index)
        evaluation.update(name, annotation, detection.polygons, detection.error, size)
        if detection.prob_map is not None:
            evaluation.highest = max(evaluation.highest, int(detection.prob_map.max(initial=0)) / 255)
        if len(detection.polygons) >= pipeline.config.max_candidates:
            evaluation.at_limit.append(name)
        if picture:
            found = detection.polygons, detection.scores, detection.prob_map
            evaluation.pictures[name] = picture(dataset.paths[detection.index], annotation, *found)
    for others in all_gather(evaluation):
        evaluation.merge(others)
    evaluation.per_image = {name: evaluation.per_image[name] for name in dataset.names}
    return evaluation


def evaluate_submission(
    path: Path,
    config: Config,
    split: str,
    comparison: Comparison | None = None,
    picture: Callable[..., Any] | None = None,
) -> Evaluation:
    """Score a file of detections; images that it lacks count as without detections, and are printed.

    `picture` is as for `evaluate`. Raises UserError where the file or the `comparison` is not of this split.
    """
    images, annotations, _ = read_split(config.data, split, config.format, need_images=False)
    submission = read_detections(path, list(annotations))
    unknown = [name for name in submission if name not in images]
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} is not in the split {split} of {config.data} (nor are {len(unknown) - 1} others); "
            f"choose the split with --split and the data set with --data"
        )
    if comparison:
        comparison.check_shares(annotations)
    print(f"{path} on {split} of {config.data}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        try:
            size = read_size(images[name])
        except ImageError:  # a submission can be scored without the images, except by size of text
            size = None
        polygons = submission[name].polygons if name in submission else []
        evaluation.update(name, annotation, polygons, size=size)
        if picture:
            evaluation.pictures[name] = picture(images[name], annotation, polygons)
    missing = [name for name in annotations if name not in submission]
    if missing:
        print(f"{len(missing)} images of the split have no row and count 0, {printable(missing[0])} first")
    return evaluation


def advise_on_collapse(score: DatasetScore, highest: float, config: Config) -> str | None:
    """One line of advice if a validation finds no text although there is some; else None.

    `highest` is the highest probability, 0..1, in all maps (nan if the network's output is not finite): it tells a
    network that has learned nothing from thresholds that are too high.
    """
    if score.detections or not score.words:
        return None
    if not highest >= 0:
        return "no detections: the network's output is not finite; lower --lr, use --amp off, or go back to best.pt"
    if highest <= config.thresh:
        return (
            f"no detections: no pixel's probability is above {highest:.2f}, and --thresh is {config.thresh:g}; normal "
            f"in the first epochs from scratch, else look at --show-samples and lower --lr"
        )
    return (
        f"no detections: probabilities reach {highest:.2f}, above --thresh {config.thresh:g}, but no region passes "
        f"--box-thresh {config.box_thresh:g} and --min-size {config.min_size:g}; evaluate with lower ones"
    )
