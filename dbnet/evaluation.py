"""Scores of detections against a split: what train.py validates with and evaluate.py prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dbnet.annotations import Annotation
from dbnet.iou import IoUScore, score_iou, total_iou
from dbnet.metric import CLEval, DatasetScore, ImageScore, score_words
from dbnet.text_size import chars_by_size, size_rows


@dataclass
class Evaluation:
    """CLEval of a split, image by image, and beside it CLEval's recall by size of text, and IoU."""

    per_image: dict[str, ImageScore] = field(default_factory=dict)
    """the score of each file, in the order of the split"""

    iou_per_image: dict[str, IoUScore] = field(default_factory=dict)
    """precision and recall by the ICDAR 2015 protocol, likewise"""

    chars_per_image: dict[str, np.ndarray] = field(default_factory=dict)
    """(bins, 2) characters and found ones by size of text; of images whose size is known"""

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
        polygons = list(polygons)
        self.per_image[name], words = score_words(annotation.polygons, polygons, annotation.dont_care)
        self.iou_per_image[name] = score_iou(annotation.polygons, polygons, annotation.dont_care)
        if size:
            self.chars_per_image[name] = chars_by_size(annotation.polygons, size, words.chars, words.found)
        if error:
            self.unreadable.append(error)

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
