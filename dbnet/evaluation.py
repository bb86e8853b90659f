"""Scores of detections against a split: what train.py validates with and evaluate.py prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dbnet.annotations import Annotation
from dbnet.config import Config
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
