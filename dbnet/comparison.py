"""What got better and what worse since another evaluation of the same split, image by image."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

from dbnet.errors import UserError
from dbnet.metric import ImageScore

CHANGED = 5  # images in the lists of the most improved and the most worsened
_SAME = 5e-5  # of H-Mean: what its four digits do not show


class Scores(NamedTuple):
    """CLEval of an image, or means over images, 0..1."""

    precision: float
    recall: float
    hmean: float


@dataclass
class Comparison:
    """Scores of an earlier evaluation, and those of this one for the images that both have."""

    path: Path
    """file of the earlier scores"""

    before: dict[str, Scores]
    """all of them, by file name"""

    after: dict[str, Scores] = field(default_factory=dict)
    """those of this evaluation, in the order of the split, for the names in `before`"""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The earlier scores, from a file that `evaluate.py --json` wrote. Raises UserError for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, {name: _read_scores(image) for name, image in content["per_image"].items()})
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path}: holds no scores by image; write them with evaluate.py CKPT --json FILE") from None

    def check_shares(self, names: Iterable[str]) -> None:
        """Raise UserError unless one of these images has earlier scores; for before the work that would be lost."""
        if self.before.keys().isdisjoint(names):
            raise UserError(f"{self.path}: has no image of this split; name scores of the same --data and --split")

    def compare(self, scores: dict[str, ImageScore]) -> None:
        """Take in the scores of this evaluation."""
        self.after = {
            name: Scores(score.precision, score.recall, score.hmean)
            for name, score in scores.items()
            if name in self.before
        }

    def means(self) -> tuple[Scores, Scores]:
        """Before and after, over the images that both evaluations have."""
        columns_before = zip(*(self.before[name] for name in self.after), strict=True)
        columns_after = zip(*self.after.values(), strict=True)
        return Scores(*map(fmean, columns_before)), Scores(*map(fmean, columns_after))

    def better(self) -> list[tuple[str, float]]:
        """Images whose H-Mean rose and by how much, the most improved first."""
        return sorted((change for change in self._changes() if change[1] > _SAME), key=lambda change: -change[1])

    def worse(self) -> list[tuple[str, float]]:
        """Images whose H-Mean fell and by how much (below 0), the most worsened first."""
        return sorted((change for change in self._changes() if change[1] < -_SAME), key=lambda change: change[1])

    def table(self) -> str:
        """The change of the means, and the images that changed most, as text."""
        before, after = self.means()
        better, worse = self.better(), self.worse()
        lines = [f"\n{'':<9}  {'there':>6}    here   change   ({self.path}; {len(self.after)} images in both)"]
        for name, there, here in zip(("precision", "recall", "H-Mean"), before, after, strict=True):
            lines.append(f"{name:<9}  {there:6.4f}  {here:6.4f}  {here - there:+z7.4f}")
        same = len(self.after) - len(better) - len(worse)
        lines.append(f"\n{len(better)} images better, {len(worse)} worse, {same} as before")
        for title, changes in (("most improved", better[:CHANGED]), ("most worsened", worse[:CHANGED])):
            if changes:
                width = max(len(title), *(len(name) for name, _ in changes))
                lines.append(f"\n{title:<{width}}   there    here   H-Mean")
            for name, change in changes:
                here = self.after[name].hmean
                lines.append(f"{name:<{width}}  {here - change:6.4f}  {here:6.4f}  {change:+z7.4f}")
        return "\n".join(lines)

    def _changes(self) -> list[tuple[str, float]]:
        return [(name, scores.hmean - self.before[name].hmean) for name, scores in self.after.items()]


def _read_scores(image: dict[str, Any]) -> Scores:
    scores = Scores(image["precision"], image["recall"], image["hmean"])
    if not all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
        raise ValueError
    return scores
