"""Scores of detections on a split, for validation in train.py and for evaluate.py."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.dataset import TextDataset
from dbnet.device import all_gather, is_first, progress
from dbnet.errors import ImageError, UserError, library_errors, printable
from dbnet.files import check_regular
from dbnet.formats import read_detections
from dbnet.geometry import Polygons, common_areas, near_pairs
from dbnet.images import read_size
from dbnet.inference import Network, Pipeline, print_full
from dbnet.metric import MAX_DETECTIONS, CLEval, DatasetScore, Flags, ImageScore, Outlines, match_image
from dbnet.splits import check_scorable, find_loss, read_split

IOU_MIN_POINTS = 3  # polygons with fewer have no area
MIN_IOU = 0.5  # a match has more than this
MAX_ON_DONT_CARE = 0.5  # share of a detection's area on one don't-care word, above which it does not count
MORE = 1 + 1e-9  # an area that exceeds a limit does so by more than the rounding of its arithmetic


@dataclass(frozen=True)
class IoUScore:
    """Matches between words and detections of an image or a data set, and the scores that follow, 0 where undefined."""

    precision: float
    recall: float
    hmean: float
    matched: int  # pairs of a word and a detection
    words: int  # ground truths that are not don't-care
    detections: int  # detections that are not on a don't-care word


def score_iou(gt_polygons: Outlines, det_polygons: Outlines, dont_care: Flags = None) -> IoUScore:
    """Match the detections of an image with its words: each word takes the first free one that matches. Coordinates,
    outlines that cross and errors are as in `metric.score_image`. A polygon without area counts and matches nothing."""
    gts, dets = Polygons(gt_polygons, IOU_MIN_POINTS), Polygons(det_polygons, IOU_MIN_POINTS)
    gt_counts = ~np.asarray(dont_care if dont_care is not None else np.zeros(len(gts)), bool)
    det_counts = np.ones(len(dets), bool)
    gt, det = near_pairs(gts, dets)

    on_dont_care = np.flatnonzero(~gt_counts[gt])
    shares = common_areas(gts, dets, gt[on_dont_care], det[on_dont_care])
    is_mostly = shares > MAX_ON_DONT_CARE * MORE * dets.areas[det[on_dont_care]]
    det_counts[det[on_dont_care[is_mostly]]] = False

    # Only pairs whose areas are alike can have an IoU above a half; few neighbours of a word are left to intersect.
    smaller, larger = np.sort([gts.areas[gt], dets.areas[det]], axis=0)
    is_candidate = gt_counts[gt] & det_counts[det] & (smaller > MIN_IOU * larger)
    gt, det = gt[is_candidate], det[is_candidate]
    common = common_areas(gts, dets, gt, det)
    matches = common > MIN_IOU * MORE * (gts.areas[gt] + dets.areas[det] - common)
    free_gt, free_det = np.ones(len(gts), bool), np.ones(len(dets), bool)
    for i, j in zip(gt[matches].tolist(), det[matches].tolist(), strict=True):
        if free_gt[i] and free_det[j]:
            free_gt[i] = free_det[j] = False
    return _iou_score(int((~free_gt).sum()), int(gt_counts.sum()), int(det_counts.sum()))


def _iou_score(matched: int, words: int, detections: int) -> IoUScore:
    precision, recall = matched / max(detections, 1), matched / max(words, 1)
    return IoUScore(precision, recall, 2 * matched / max(words + detections, 1), matched, words, detections)


SIZE_EDGES = (0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.1, 0.5, 1)
"""Edges of the bins; a word on an edge is in the bin above it, and the last bin has all larger words."""


def size_bins(polygons: Outlines, size: tuple[int, int]) -> np.ndarray:
    """(len,) bin of each word by its height over the longer side of the image, of `size` (width, height) pixels. The
    height is the shorter side of the rectangle of least area around a word; for curved text, that of the curve."""
    sides = [cv2.minAreaRect(np.asarray(polygon, np.float32).reshape(-1, 2))[1] for polygon in polygons]
    heights = np.array(sides, np.float64).reshape(-1, 2).min(axis=1)
    return np.searchsorted(SIZE_EDGES[1:-1], heights / max(size), side="right")


SCORES_MARK = "scores by dbnet"  # in every JSON of scores, which may be overwritten therefore
WORST = 10  # images in the list of the worst
RESAMPLINGS = 2000  # for the interval of the H-Mean
MEANS = {"precision": "precision", "recall": "recall", "hmean": "H-Mean"}  # of CLEval, and their titles


class ScoredImage(NamedTuple):
    """The scores of an image: CLEval, and precision and recall by the ICDAR 2015 protocol."""

    score: ImageScore
    iou: IoUScore
    labels: str  # its `label_fingerprint`
    words: np.ndarray | None = None
    """(words, 3) int: bin of the size of each, its characters found and all; None if the image's size is unknown"""
    found: int = 0  # detections, with those beyond the MAX_DETECTIONS that CLEval scores
    highest: float = 0.0  # probability in the probability map, 0..1
    error: str | None = None  # a line if the image could not be read; it counts as an image without detections
    picture: Any = None  # what a report shows of it


@dataclass
class Evaluation:
    """Scores of a split, image by image."""

    images: dict[str, ScoredImage] = field(default_factory=dict)  # by file name, in the order of the split

    def update(
        self, name: str, annotation: Annotation, polygons: Outlines, size: tuple[int, int] | None = None, **more: Any
    ) -> None:
        """Score what was detected in an image of `size` (width, height), if known. `more` are fields of ScoredImage."""
        match = match_image(annotation.polygons, polygons, annotation.dont_care)
        iou = score_iou(annotation.polygons, polygons, annotation.dont_care)
        words = np.column_stack([size_bins(annotation.polygons, size), match.gt_chars]) if size else None
        labels = label_fingerprint(annotation)
        self.images[name] = ScoredImage(match.score, iou, labels, words, len(polygons), **more)

    def compute(self) -> DatasetScore:
        """Means over the images, and totals."""
        return CLEval([image.score for image in self.images.values()]).compute()

    def iou(self) -> IoUScore:
        """Over the words and detections of all images, not a mean over images."""
        scores = [image.iou for image in self.images.values()]
        counts = (sum(getattr(score, name) for score in scores) for name in ("matched", "words", "detections"))
        return _iou_score(*counts)

    def interval(self) -> tuple[float, float]:
        """95% interval of the H-Mean over images of this kind, by resampling (bootstrap); the H-Mean for one image."""
        hmeans = np.array([image.score.hmean for image in self.images.values()] or [0.0])
        rng = np.random.default_rng(0)
        means = [rng.choice(hmeans, len(hmeans)).mean() for _ in range(RESAMPLINGS)]
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        return low, high

    def by_size(self) -> list[dict[str, float]]:
        """Words, those without a character found, characters, those found, and recall by size of text, over all images
        of known size. Penalties for splits are left out."""
        known = [image.words for image in self.images.values() if image.words is not None]
        bins, found, chars = np.concatenate([np.empty((0, 3), int), *known]).T
        rows = []
        for index, (low, high) in enumerate(pairwise(SIZE_EDGES)):
            is_here = (bins == index) & (chars > 0)
            row = {"from": low, "to": high, "words": int(is_here.sum()), "missed": int((found[is_here] == 0).sum())}
            row |= {"chars_gt": int(chars[is_here].sum()), "chars_tp": int(found[is_here].sum())}
            rows.append(row | {"recall": row["chars_tp"] / max(row["chars_gt"], 1)})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals of CLEval and IoU, recall by size of text, and the scores of each image."""
        return {
            **asdict(self.compute()),
            "made_by": SCORES_MARK,
            "hmean_interval": self.interval(),
            "iou": asdict(self.iou()),
            "by_size": self.by_size(),
            "unreadable": [image.error for image in self.images.values() if image.error],
            "per_image": {
                name: {**asdict(image.score), "iou": asdict(image.iou), "labels": image.labels}
                for name, image in self.images.items()
            },
        }

    def table(self) -> str:
        """Text: what could not be read or is not scored, totals, recall by size of text and the worst images."""
        score, iou, (low, high), rows = self.compute(), self.iou(), self.interval(), self.by_size()
        lines = [f"counts 0: {image.error}" for image in self.images.values() if image.error]
        if names := [printable(name) for name, image in self.images.items() if image.found > MAX_DETECTIONS]:
            more = f"{len(names)} images have more detections than the {MAX_DETECTIONS} that CLEval scores"
            lines.append(f"{more}, {names[0]} first: the rest count as not there")
        lines += [
            f"\nprecision {score.precision:.4f}\nrecall    {score.recall:.4f}\nH-Mean    {score.hmean:.4f}",
            f"95% interval of the H-Mean, by resampling the images: {low:.4f} to {high:.4f}\n",
            f"{score.images} images, {score.words} words, {score.detections} detections, "
            f"{score.splits} splits, {score.merges} merges\n",
            f"IoU over 0.5: precision {iou.precision:.4f}, recall {iou.recall:.4f}, H-Mean {iou.hmean:.4f}\n",
            "size of text  " + "".join(f"{row['from']:>8g}" for row in rows) + f"{rows[-1]['to']:>5g}",
            "characters    " + "".join(f"{row['chars_gt']:>8d}" for row in rows),
            "recall        " + "".join(f"{row['recall']:>8.4f}" if row["chars_gt"] else f"{'-':>8}" for row in rows),
        ]
        if without_size := sum(image.words is None for image in self.images.values()):
            lines.append(f"{without_size} images whose files are missing or cannot be opened are left out of these")
        with_text = [name for name, image in self.images.items() if image.score.words or image.found]
        ascending = sorted(with_text, key=lambda name: (self.images[name].score.hmean, name))[:WORST]
        width = max(map(len, ["worst images", *map(printable, ascending)]))
        lines.append(f"\n{'worst images':<{width}}  H-Mean  precision  recall  words  detections")
        for name in ascending:
            each = self.images[name].score
            means = f"{each.hmean:6.4f}  {each.precision:9.4f}  {each.recall:6.4f}"
            lines.append(f"{printable(name):<{width}}  {means}  {each.words:5d}  {each.detections:10d}")
        return "\n".join(lines)


def label_fingerprint(annotation: Annotation) -> str:
    """A short hash of an image's words as the metric sees them, whole pixels and don't care, in any order."""
    words = zip(annotation.polygons, annotation.dont_care, strict=True)
    content = sorted([np.trunc(polygon).astype(int).tolist(), bool(ignore)] for polygon, ignore in words)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


CHANGED = 5  # images in the lists of the most improved and the most worsened
_SAME = 5e-5  # of H-Mean: what its four digits do not show


def read_scores(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the JSON of an earlier evaluation has of each of these images, for those that it has. Raises UserError where
    `evaluate.py --json` did not write the file, or it has none of the images."""
    check_regular(path)
    with library_errors(f"{path}: cannot be read", of=OSError):
        content = path.read_bytes()
    with library_errors(f"{path}: holds no scores by image", "write them with evaluate.py CKPT --json FILE"):
        images = json.loads(content)["per_image"]
        scores = np.array([[image[mean] for mean in MEANS] for image in images.values()])
        if scores.ndim != 2 or scores.dtype.kind not in "if" or not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("not numbers from 0 to 1")
    earlier = {name: images[name] for name in names if name in images}
    if not earlier:
        raise UserError(f"{path}: has no image of this split; name scores of the same --data and --split")
    return earlier


class Comparison:
    """Scores of an earlier evaluation, from `read_scores`, beside those of this one, for the images that both have.

    names: of these images, in the order of the split
    before, after: (images, 3) precision, recall and H-Mean of each
    better, worse: indices of the images whose H-Mean rose, or fell, the most changed first
    other_labels: names of the images whose labels have changed, or may have
    labels_known: whether the earlier scores say which labels they were made on"""

    def __init__(self, path: Path, earlier: dict[str, dict[str, Any]], evaluation: Evaluation) -> None:
        self.path, self.names = path, list(earlier)
        here = [evaluation.images[name] for name in earlier]
        self.before = np.array([[image[mean] for mean in MEANS] for image in earlier.values()], float)
        self.after = np.array([[getattr(image.score, mean) for mean in MEANS] for image in here])
        change = (self.after - self.before)[:, 2]
        order = np.argsort(-change, kind="stable")
        self.better, self.worse = order[change[order] > _SAME], order[change[order] < -_SAME][::-1]
        labels = [image.get("labels") for image in earlier.values()]
        self.labels_known = any(labels)
        self.other_labels = [name for name, old, new in zip(earlier, labels, here, strict=True) if old != new.labels]

    def table(self) -> str:
        """Text: a warning of other labels, the change of the means, and the images that changed most."""
        lines, images = [], len(self.names)
        if self.other_labels:
            warning = "does not say which labels it was made on; if they were others, so are its scores"
            if self.labels_known:
                others = f"{len(self.other_labels)} of {images} images, {printable(self.other_labels[0])} first"
                warning = f"made on other labels for {others}; changes there are not those of the detections alone"
            lines.append(f"\n{self.path}: {warning}")
        lines.append(f"\n{'':<9}  {'there':>6}    here   change   ({self.path}; {images} images in both)")
        for title, there, here in zip(MEANS.values(), self.before.mean(axis=0), self.after.mean(axis=0), strict=True):
            lines.append(f"{title:<9}  {there:6.4f}  {here:6.4f}  {here - there:+z7.4f}")
        same = images - len(self.better) - len(self.worse)
        lines.append(f"\n{len(self.better)} images better, {len(self.worse)} worse, {same} as before")
        for title, changed in (("most improved", self.better[:CHANGED]), ("most worsened", self.worse[:CHANGED])):
            if names := [printable(self.names[index]) for index in changed]:
                width = max(map(len, [title, *names]))
                lines.append(f"\n{title:<{width}}   there    here   H-Mean")
            for name, there, here in zip(names, self.before[changed, 2], self.after[changed, 2], strict=True):
                lines.append(f"{name:<{width}}  {there:6.4f}  {here:6.4f}  {here - there:+z7.4f}")
        return "\n".join(lines)


PictureOf = Callable[..., Any]  # of (path, annotation, polygons, scores, prob_map): the `picture` of a ScoredImage


def evaluate(pipeline: Pipeline, network: Network, title: str = "", picture: PictureOf | None = None) -> Evaluation:
    """Run a network over an annotated split and score what it finds, with a progress bar; each process gets the scores
    of all of them. Raises as `Pipeline.detect` does, and UserError if no image can be read."""
    dataset = pipeline.dataset
    assert isinstance(dataset, TextDataset)
    evaluation = Evaluation()
    for found in progress(pipeline.detect(network), title, len(dataset)):
        path, annotation = dataset.paths[found.index], dataset.annotations[found.index]
        highest = 0.0 if found.prob_map is None else int(found.prob_map.max(initial=0)) / 255
        shown = picture(path, annotation, found.polygons, found.scores, found.prob_map) if picture else None
        more = {"highest": highest, "error": found.error, "picture": shown}
        evaluation.update(dataset.names[found.index], annotation, found.polygons, dataset.size(found.index), **more)
    images = {name: image for share in all_gather(evaluation.images) for name, image in share.items()}
    evaluation.images = {name: images[name] for name in dataset.names}
    check_readable(dataset, [image.error for image in evaluation.images.values()])
    if is_first():
        counts, sizes = (image.found for image in evaluation.images.values()), map(dataset.size, range(len(dataset)))
        print_full(zip(dataset.names, counts, sizes, strict=True), pipeline.config)
    return evaluation


def check_readable(dataset: TextDataset, errors: list[str | None]) -> None:
    """Raise UserError where each image of a data set has an error: their scores would say nothing."""
    if all(errors):
        nothing = f"{dataset.config.data}: none of the {len(errors)} images can be read; {errors[0]}"
        raise UserError(find_loss(dataset.config.data) or nothing)


def evaluate_submission(path: Path, config: Config, split: str, picture: PictureOf | None = None) -> Evaluation:
    """Score a file of detections. Images that it lacks count as without detections, and one line says how many. Raises
    UserError where the file is not of this split."""
    images, annotations, _ = read_split(config.data, split, config.format, need_images=False)
    check_scorable(config.data, split, ((annotation, None) for annotation in annotations.values()))
    submission = read_detections(path, list(annotations))
    if unknown := [name for name in submission if name not in images]:
        where = f"not in the split {split} of {config.data} (nor are {len(unknown) - 1} others)"
        raise UserError(f"{path}: {unknown[0]} is {where}; choose the split with --split and the data set with --data")
    print(f"{path} on {split} of {config.data}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        size, polygons = None, submission[name].polygons if name in submission else []
        with suppress(ImageError):  # a submission can be scored without the images, except by size of text
            size = read_size(images[name])
        shown = picture(images[name], annotation, polygons) if picture else None
        evaluation.update(name, annotation, polygons, size, picture=shown)
    rows = [row.polygons for row in submission.values()]
    if short := sum(len(polygon) < 4 for polygons in rows for polygon in polygons):
        print(f"{short} outlines have fewer than four points and do not count")
    if missing := [name for name in annotations if name not in submission]:
        print(f"{len(missing)} images of the split have no row and count 0, {printable(missing[0])} first")
    return evaluation


def advise_on_collapse(evaluation: Evaluation, config: Config) -> str | None:
    """One line of advice if an evaluation finds no text although there is some; else None. The highest probability
    tells a network that has learned nothing from thresholds that are too high."""
    score, highest = evaluation.compute(), max((image.highest for image in evaluation.images.values()), default=0.0)
    if score.detections or not score.words:
        return None
    if highest <= config.thresh:
        reason = f"no pixel's probability is above {highest:.2f}, and --thresh is {config.thresh:g}"
        advice = "normal in the first epochs from scratch, else look at --show-samples and lower --lr"
    else:
        limits = f"--box-thresh {config.box_thresh:g} and --min-size {config.min_size:g}"
        reason = f"probabilities reach {highest:.2f}, above --thresh {config.thresh:g}, but no region passes {limits}"
        advice = "evaluate with lower ones"
    return f"no detections: {reason}; {advice}"
