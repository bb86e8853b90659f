"""Search for the best post-processing settings: CLEval of a grid of them, from probability maps computed once.

    tuning = tune(maps, config)                  # of annotated images
    print(tuning.combinations[tuning.best])      # thresh, box_thresh, unclip ratio and min_size
    print(tuning.cross_validated)                # expected H-Mean of values that are chosen like this

Every combination scores exactly what `extract_polygons` and `score_image` give with it, but most of the work is shared:
contours and their scores depend on thresh alone, offset polygons and their matches on thresh and the unclip ratio, and
box_thresh and min_size only select among the polygons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.dataset import TextDataset, count_workers, map_in_processes
from dbnet.device import all_gather, is_first, progress
from dbnet.errors import UserError
from dbnet.evaluation import SCORES_MARK
from dbnet.files import write_json
from dbnet.inference import Network, Pipeline
from dbnet.metric import score_selections
from dbnet.pictures import draw_heat_map, write_figure
from dbnet.postprocess import Region, find_regions, grow_regions, to_image_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEST = 10  # combinations in the table of the best
MIN_IMAGES = 10  # on fewer, values are not saved


class ScoredMap(NamedTuple):
    """The probability map of an annotated image."""

    name: str
    prob_map: np.ndarray | None
    """(height, width) uint8, probability x 255, without padding; None if the image could not be read"""
    size: tuple[int, int] | None
    """width and height of the image in pixels; None only where there is no map"""
    annotation: Annotation


class Values(NamedTuple):
    """One combination of the settings that are tuned, named like the fields of the configuration."""

    thresh: float
    box_thresh: float
    unclip_ratio: float
    """polygon_unclip_ratio with use_polygon, else box_unclip_ratio"""
    min_size: float

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(*(getattr(config, name) for name in cls.names(config)))

    @staticmethod
    def names(config: Config) -> tuple[str, str, str, str]:
        """The fields of the configuration that the values belong to."""
        unclip_ratio = "polygon_unclip_ratio" if config.use_polygon else "box_unclip_ratio"
        return "thresh", "box_thresh", unclip_ratio, "min_size"

    def changes(self, config: Config) -> dict[str, float]:
        """The values by field, for `config.changed`."""
        return dict(zip(self.names(config), self, strict=True))


class Grid(NamedTuple):
    """The values of each setting; the search tries all combinations."""

    thresh: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
    box_thresh: Sequence[float] = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
    unclip_ratio: Sequence[float] = (1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4)
    min_size: Sequence[float] = (1.0, 3.0, 5.0)

    def including(self, values: Values) -> Self:
        """The grid with each of `values` on its axis, so that they are one of the combinations."""
        return type(self)(*(tuple(sorted({*axis, value})) for axis, value in zip(self, values, strict=True)))

    def combinations(self) -> list[Values]:
        """All combinations, the last setting varying fastest."""
        return [Values(*values) for values in product(*self)]


@dataclass(frozen=True)
class Tuning:
    """Scores of each combination on each image."""

    grid: Grid
    """the values that were combined, including those of the configuration"""
    combinations: list[Values]
    """the configuration's own values first, then by their distance to these on the grid: of two that score the same,
    the first changes less"""
    scores: np.ndarray
    """(combinations, images, 3) CLEval precision, recall and H-Mean; images sorted by name"""

    @cached_property
    def means(self) -> np.ndarray:
        """(combinations, 3) precision, recall and H-Mean of the data set."""
        return self.scores.mean(axis=1)

    @property
    def best(self) -> int:
        """Index of the combination with the highest H-Mean, even if its lead is small."""
        return choose(self.scores[..., 2])

    @cached_property
    def held_out(self) -> np.ndarray:
        """(images,) H-Means with values that are chosen as `best` is, on the half without the image."""
        return cross_validate(self.scores[..., 2])

    @property
    def cross_validated(self) -> float:
        """Expected H-Mean on other images of values that are chosen as `best` is."""
        return float(self.held_out.mean())

    @property
    def doubt(self) -> str:
        """The reason not to trust the best values on other images; empty if there is none."""
        images = self.scores.shape[1]
        if images < MIN_IMAGES:
            return f"{images} images are too few to choose on; label {MIN_IMAGES} or more"
        gains = self.held_out - self.scores[0, :, 2]
        gain, error = float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(images))
        if gain <= 0:
            return "cross-validated, other values are no better"
        return f"the gain of {gain:.4f} is within its standard error of {error:.4f}" if gain <= error else ""

    def ranking(self, count: int) -> list[int]:
        """Indices of the best combinations, best first; of those with equal scores on every image only the first."""
        first: dict[bytes, int] = {}
        for index in np.argsort(-self.means[:, 2], kind="stable").tolist():
            first.setdefault(self.scores[index].tobytes(), index)
        return list(first.values())[:count]

    def table(self, config: Config) -> str:
        """Text: the best combinations, the configuration's own, and the cross-validated gain."""
        own = self.means[0, 2]
        header = [f"{name:>{max(len(name), 6)}}" for name in Values.names(config)]
        lines = [
            f"\n{len(self.combinations)} combinations on {self.scores.shape[1]} images\n",
            "  ".join([f"{'':>6}", *header, "precision", "recall", "H-Mean", "   gain"]),
        ]
        for place, index in [("own", 0), *enumerate(self.ranking(BEST), start=1)]:
            precision, recall, hmean = self.means[index]
            cells = [f"{value:>{len(cell)}g}" for value, cell in zip(self.combinations[index], header, strict=True)]
            cells += [f"{precision:9.4f}", f"{recall:6.4f}", f"{hmean:6.4f}", f"{hmean - own:+z7.4f}"]
            lines.append("  ".join([f"{place:>6}", *cells]))
        lines.append(
            f"\ncross-validated, each half of the images with the values that are best on the other half:\n"
            f"H-Mean {self.cross_validated:.4f}, {self.cross_validated - own:+z.4f} to the checkpoint's own {own:.4f}\n"
        )
        return "\n".join(lines)

    def by_thresholds(self) -> np.ndarray:
        """(box_thresh, thresh) H-Means, with the unclip ratio and min_size of the best combination."""
        best, hmeans = self.combinations[self.best], dict(zip(self.combinations, self.means[:, 2], strict=True))
        rows, columns = self.grid.box_thresh, self.grid.thresh
        return np.array([[hmeans[best._replace(thresh=x, box_thresh=y)] for x in columns] for y in rows])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: own and cross-validated H-Mean, and all combinations, best first."""
        names = (*Values._fields, "precision", "recall", "hmean")
        order = np.argsort(-self.means[:, 2], kind="stable")
        rows = [(*self.combinations[index], *self.means[index].tolist()) for index in order]
        return {
            "made_by": SCORES_MARK,
            "images": self.scores.shape[1],
            "own_hmean": float(self.means[0, 2]),
            "cross_validated_hmean": self.cross_validated,
            "combinations": [dict(zip(names, row, strict=True)) for row in rows],
        }


def tune(maps: Sequence[ScoredMap], config: Config, grid: Grid | None = None, workers: int = 0) -> Tuning:
    """Score the combinations of `grid` and of the configuration's own values on all images, in `workers` processes.

    Raises UserError for fewer than two images, which cannot be cross-validated.
    """
    if len(maps) < 2:
        raise UserError(f"--tune: needs two images or more, not {len(maps)}; half of them check the other half")
    own = Values.of(config)
    grid = (grid or Grid()).including(own)
    score = partial(score_map, config=config, grid=grid)
    maps = sorted(maps, key=lambda each: each.name)
    scores = list(progress(map_in_processes(score, maps, workers), "tuning", len(maps)))
    combinations = grid.combinations()
    place_of_own = [[axis.index(value)] for axis, value in zip(grid, own, strict=True)]
    steps = np.abs(np.indices(tuple(map(len, grid))).reshape(len(grid), -1) - place_of_own).sum(axis=0)
    order = np.argsort(steps, kind="stable").tolist()
    return Tuning(grid, [combinations[index] for index in order], np.stack(scores, axis=1)[order])


def score_map(image: ScoredMap, config: Config, grid: Grid) -> np.ndarray:
    """(combinations, 3) CLEval precision, recall and H-Mean of one image with each of `grid.combinations()`."""
    scores = np.zeros((*map(len, grid), 3))
    if image.prob_map is not None:
        for t, thresh in enumerate(grid.thresh):
            loosest = config.changed(thresh=thresh, box_thresh=min(grid.box_thresh), min_size=min(grid.min_size))
            regions = find_regions(image.prob_map, loosest)
            for u, unclip_ratio in enumerate(grid.unclip_ratio):
                values = Values.of(loosest)._replace(unclip_ratio=unclip_ratio)
                scores[t, :, u] = _score_selections(image, regions, config.changed(**values.changes(config)), grid)
    return scores.reshape(-1, 3)


def _score_selections(image: ScoredMap, regions: list[Region], config: Config, grid: Grid) -> np.ndarray:
    """(box_thresh, min_size, 3) scores of the `regions` that each pair of values selects.

    The regions come best first and are offset by the unclip ratio of `config`.
    """
    assert image.prob_map is not None  # `regions` come from it
    grown = list(grow_regions(regions, config, max(grid.min_size) + 2))
    nothing = np.empty((0, 2), np.int32)  # for a region that is not one piece; it has no breadth
    whole = [nothing if polygon is None else polygon for polygon, _ in grown]
    scale = 1 / (np.array(image.prob_map.shape[::-1]) / image.size)  # as Letterbox has it, to the last bit
    polygons = to_image_pixels(whole, tuple(scale), image.size)

    region_scores = np.array([region.score for region in regions])
    breadths = np.array([region.breadth for region in regions])
    grown_breadths = np.array([breadth for _, breadth in grown])
    selections = []
    for box_thresh, min_size in product(grid.box_thresh, grid.min_size):
        is_chosen = (region_scores >= box_thresh) & (breadths >= min_size) & (grown_breadths >= min_size + 2)
        selections.append(is_chosen & (is_chosen.cumsum() <= config.max_candidates))
    distinct, place = np.unique(selections, axis=0, return_inverse=True)
    annotation = image.annotation
    found = score_selections(annotation.polygons, polygons, annotation.dont_care, list(distinct))
    scores = np.array([(score.precision, score.recall, score.hmean) for score in found])
    return scores[place.reshape(len(grid.box_thresh), len(grid.min_size))]


def tune_checkpoint(
    pipeline: Pipeline, network: Network, split: str, picture: Path, scores: Path | None, save_to: Path | None
) -> None:
    """Run a network over an annotated split once, score all combinations, and write and print the best.

    `picture` is where H-Mean over the thresholds is drawn, `scores` where all combinations go as JSON, `save_to` the
    checkpoint that gets the best values, if values chosen like that score better on images that they were not chosen
    on. Raises UserError as `tune` does, and where a file cannot be written.
    """
    dataset, config = pipeline.dataset, pipeline.config
    assert isinstance(dataset, TextDataset)
    maps, unreadable = [], []
    for found in progress(pipeline.detect(network), total=len(dataset)):
        name, annotation = dataset.paths[found.index].name, dataset.annotations[found.index]
        maps.append(ScoredMap(name, found.prob_map, dataset.size(found.index), annotation))
        if found.error:
            unreadable.append(found.error)
    maps = [each for share in all_gather(maps) for each in share]
    if not is_first():
        return
    tuning = tune(maps, config, workers=count_workers(config))
    print("".join(f"counts 0: {line}\n" for line in unreadable) + tuning.table(config))
    write_figure(picture, draw_tuning(tuning))
    print(f"picture of H-Mean over thresh and box_thresh: {picture}")
    if scores:
        write_json(scores, tuning.to_dict())
        print(f"all combinations: {scores}")
    if save_to and tuning.doubt:
        print(f"not saved: {tuning.doubt}; {save_to} keeps its own values")
    elif save_to:
        from dbnet.checkpoint import change_checkpoint, load_checkpoint  # with PyTorch, which a .onnx file does without

        own, best = (tuning.combinations[index].changes(config) for index in (0, tuning.best))
        record = {"before": own, "after": best, "split": split, "own_hmean": float(tuning.means[0, 2])}
        record["cross_validated_hmean"] = tuning.cross_validated
        tunings = [*load_checkpoint(save_to).get("tunings", []), record]
        change_checkpoint(save_to, best, tunings=tunings)
        print(f"saved: {save_to} now has the best values; its old ones are kept in it, under `tunings`")


def draw_tuning(tuning: Tuning) -> "Figure":
    """Picture of H-Mean over thresh and box_thresh, around the best combination."""
    grid, own, best = tuning.grid, tuning.combinations[0], tuning.combinations[tuning.best]
    own_label = f"own thresholds; with unclip ratio {own.unclip_ratio:g} and min_size {own.min_size:g}"
    labels = f"best: {tuning.means[tuning.best, 2]:.4f}", f"{own_label}: {tuning.means[0, 2]:.4f}"
    places = [(grid.box_thresh.index(each.box_thresh), grid.thresh.index(each.thresh)) for each in (best, own)]
    title = f"CLEval H-Mean of {tuning.scores.shape[1]} images; unclip ratio {best.unclip_ratio:g}, "
    return draw_heat_map(
        tuning.by_thresholds(),
        rows=grid.box_thresh,
        columns=grid.thresh,
        labels=("box_thresh", "thresh"),
        title=f"{title}min_size {best.min_size:g}",
        marks=dict(zip(labels, places, strict=True)),
    )


def choose(hmeans: np.ndarray) -> int:
    """Index of the combination with the highest mean of (combinations, images) H-Means, the first of equals."""
    return int(hmeans.mean(axis=1).argmax())


def cross_validate(hmeans: np.ndarray) -> np.ndarray:
    """(images,) H-Means, each with the values chosen on the half of the images that it does not belong to.

    `hmeans` is (combinations, images). The halves are the first and the last images by name: receipts of a series look
    alike and mostly have neighbouring names; on both sides they would make the check too easy.
    """
    is_first = np.arange(hmeans.shape[1]) < hmeans.shape[1] // 2
    held_out = np.empty(hmeans.shape[1])
    for half in (is_first, ~is_first):
        held_out[half] = hmeans[choose(hmeans[:, ~half]), half]
    return held_out
