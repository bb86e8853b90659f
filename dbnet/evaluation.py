"""Scores of detections against a split: what train.py validates with and evaluate.py prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.errors import printable
from dbnet.iou import MIN_POINTS, IoUScore, score_iou, total_iou
from dbnet.metric import CLEval, DatasetScore, ImageScore, match_image
from dbnet.polygons import Polygons
from dbnet.text_size import chars_by_size, size_rows

WORST = 10  # images in the list of the worst


@dataclass
class Evaluation:
    """CLEval of a split, image by image, and beside it CLEval's recall by size of text, and IoU."""

    per_image: dict[str, ImageScore] = field(default_factory=dict)
    """the score of each file, in the order of the split"""

    iou_per_image: dict[str, IoUScore] = field(default_factory=dict)
    """precision and recall by the ICDAR 2015 protocol, likewise"""

    chars_per_image: dict[str, np.ndarray] = field(default_factory=dict)
    """(bins, 2) characters and found ones by size of text; of images whose size is known"""

    highest: float = 0.0
    """greatest probability, 0..1, in all probability maps that were looked at"""

    unreadable: list[str] = field(default_factory=list)
    """a line for each image that could not be read; it counts as one without detections"""

    def update(
        self,
        name: str,
        annotation: Annotation,
        polygons: Iterable[np.ndarray],
        error: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Score the detected (n, 2) polygons of the image `name`, in pixels of the original; `size` is that one's width
        and height, None if it is not known."""
        words, detections = (Polygons.read(each, MIN_POINTS) for each in (annotation.polygons, list(polygons)))
        match = match_image(words, detections, annotation.dont_care)
        self.per_image[name] = match.score
        self.iou_per_image[name] = score_iou(words, detections, annotation.dont_care)
        if size:
            self.chars_per_image[name] = chars_by_size(annotation.polygons, size, match.gt_chars())
        if error:
            self.unreadable.append(error)

    def merge(self, other: Self) -> None:
        """Take in what another process has scored."""
        self.per_image |= other.per_image
        self.iou_per_image |= other.iou_per_image
        self.highest = max(self.highest, other.highest)
        self.chars_per_image |= other.chars_per_image
        self.unreadable = sorted({*self.unreadable, *other.unreadable})

    def compute(self) -> DatasetScore:
        """Means over the images, and totals."""
        return CLEval(list(self.per_image.values())).compute()

    def total_iou(self) -> IoUScore:
        """IoU over the words and detections of all images."""
        return total_iou(self.iou_per_image.values())

    def by_size(self) -> list[dict[str, float]]:
        """Characters, found ones and recall in each bin of the size of text, over all images of known size."""
        return size_rows(self.chars_per_image.values())

    def worst(self, count: int) -> list[tuple[str, ImageScore]]:
        """The images of lowest H-Mean, worst first."""
        return sorted(self.per_image.items(), key=lambda item: (item[1].hmean, item[0]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: precision, recall, hmean, images and the other totals, `iou`, `by_size`, and
        `per_image` with the `iou` of each."""
        return {
            **asdict(self.compute()),
            "iou": asdict(self.total_iou()),
            "by_size": self.by_size(),
            "unreadable": self.unreadable,
            "per_image": {
                name: {**asdict(score), "iou": asdict(self.iou_per_image[name])}
                for name, score in self.per_image.items()
            },
        }

    def table(self) -> str:
        """Totals, recall by size of text and the worst images, as text."""
        score, iou = self.compute(), self.total_iou()
        lines = [
            *(f"counts 0: {line}" for line in self.unreadable),
            f"\nprecision {score.precision:.4f}\nrecall    {score.recall:.4f}\nH-Mean    {score.hmean:.4f}\n",
            f"{score.images} images, {score.words} words, {score.detections} detections, "
            f"{score.splits} splits, {score.merges} merges\n",
            f"IoU over 0.5: precision {iou.precision:.4f}, recall {iou.recall:.4f}, H-Mean {iou.hmean:.4f}\n",
            *self._size_lines(),
        ]
        worst = [(printable(name), image) for name, image in self.worst(WORST)]
        width = max(len("worst images"), *(len(name) for name, _ in worst))
        lines.append(f"\n{'worst images':<{width}}  H-Mean  precision  recall  words  detections")
        for name, image in worst:
            lines.append(
                f"{name:<{width}}  {image.hmean:6.4f}  {image.precision:9.4f}  {image.recall:6.4f}  "
                f"{image.words:5d}  {image.detections:10d}"
            )
        return "\n".join(lines)

    def _size_lines(self) -> list[str]:
        """CLEval's characters, and the share of them that was found, by height of text over the longer side."""
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


def advise_on_collapse(score: DatasetScore, highest: float, config: Config) -> str | None:
    """One line on what to look at when a validation finds no text though there is some; None where it is all right.

    `highest` is the greatest probability, 0..1, in all of its maps (nan where the network gives no numbers): it tells a
    network that has learned nothing from thresholds that it does not reach.
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
