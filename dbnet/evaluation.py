"""Scores of detections against a split: what train.py validates with and evaluate.py prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from dbnet.annotations import Annotation
from dbnet.metric import CLEval, DatasetScore, ImageScore, score_image


@dataclass
class Evaluation:
    """CLEval of a split, image by image."""

    per_image: dict[str, ImageScore] = field(default_factory=dict)
    """the score of each file, in the order of the split"""

    unreadable: list[str] = field(default_factory=list)
    """a line for each image that could not be read; it counts as one without detections"""

    def update(
        self, name: str, annotation: Annotation, polygons: Iterable[np.ndarray], error: str | None = None
    ) -> None:
        """Score the detected (n, 2) polygons of the image `name`, in pixels of the original."""
        self.per_image[name] = score_image(annotation.polygons, list(polygons), annotation.dont_care)
        if error:
            self.unreadable.append(error)

    def merge(self, other: Self) -> None:
        """Take in what another process has scored."""
        self.per_image |= other.per_image
        self.unreadable = sorted({*self.unreadable, *other.unreadable})

    def compute(self) -> DatasetScore:
        """Means over the images, and totals."""
        return CLEval(list(self.per_image.values())).compute()

    def worst(self, count: int) -> list[tuple[str, ImageScore]]:
        """The images of lowest H-Mean, worst first."""
        return sorted(self.per_image.items(), key=lambda item: (item[1].hmean, item[0]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: precision, recall, hmean, images and the other totals, and `per_image`."""
        per_image = {name: asdict(score) for name, score in self.per_image.items()}
        return {**asdict(self.compute()), "unreadable": self.unreadable, "per_image": per_image}
