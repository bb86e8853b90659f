"""Search for the best post-processing settings: CLEval of a grid of them, from probability maps computed once.

Every combination scores exactly what `extract_polygons` and `score_image` give with it on these maps. A closer look is
that of the configuration's own values. Most work is shared: contours and their scores depend on thresh alone, polygons
and their matches on thresh and the unclip ratio, and box_thresh and min_size only select among the polygons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.dataset import TextDataset, count_workers, map_in_processes
from dbnet.device import all_gather, from_first, is_first, progress
from dbnet.errors import UserError
from dbnet.evaluation import SCORES_MARK, check_readable, evaluate
from dbnet.files import write_json
from dbnet.inference import Network, Pipeline, most_polygons, print_full
from dbnet.metric import score_selections
from dbnet.postprocess import Region, find_regions, grow_regions, to_image_pixels

BEST = 10  # combinations in the table of the best
MIN_IMAGES = 10  # on fewer, values are not saved


class ScoredMap(NamedTuple):
    """The probability map of an annotated image."""

    name: str
    prob_map: np.ndarray | None  # as in inference.Detection
    size: tuple[int, int] | None  # width and height of the image in pixels; None only where there is no map
    annotation: Annotation
    error: str | None = None  # a line if the image could not be read
    found: int = 0  # polygons with the configuration's own values


Grid = dict[str, tuple[float, ...]]


def grid_of(config: Config) -> Grid:
    """The values of each field that are tried, in all combinations; the last field varies fastest."""
    ratio = "polygon_unclip_ratio" if config.use_polygon else "box_unclip_ratio"
    growth = {"growth": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)}
    return {
        "thresh": (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
        "box_thresh": (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7),
        **(growth if config.growth else {ratio: (1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4)}),
        "min_size": (1.0, 3.0, 5.0),
    }


@dataclass(frozen=True)
class Tuning:
    """Scores of each combination on each image."""

    combinations: list[dict[str, float]]
    """values by field: the configuration's own first, then by their distance to these on the grid, so that of two that
    score the same the first changes less"""
    scores: np.ndarray  # (combinations, images, 3) CLEval precision, recall and H-Mean; images sorted by name

    @cached_property
    def means(self) -> np.ndarray:
        """(combinations, 3) precision, recall and H-Mean of the data set."""
        return self.scores.mean(axis=1)

    @property
    def best(self) -> int:
        """Index of the combination with the highest H-Mean, even if its lead is small; the first of equals."""
        return int(self.means[:, 2].argmax())

    @cached_property
    def held_out(self) -> np.ndarray:
        """(images,) H-Means, each with the values that are best on the half of the images that it does not belong to.
        The halves are the first and the last images by name: receipts of a series look alike and mostly have
        neighbouring names; on both sides they would make the check too easy."""
        first, last = np.array_split(self.scores[..., 2], [self.scores.shape[1] // 2], axis=1)
        return np.concatenate([first[last.mean(axis=1).argmax()], last[first.mean(axis=1).argmax()]])

    @property
    def cross_validated(self) -> float:
        """Expected H-Mean on other images of values that are chosen as `best` is."""
        return float(self.held_out.mean())

    @property
    def doubt(self) -> str:
        """The reason not to trust the best values on other images; empty if there is none."""
        images = int(self.scores.any(axis=(0, 2)).sum())  # that can be read, and in which any values find text
        if images < MIN_IMAGES:
            return f"{images} images are too few to choose on; label {MIN_IMAGES} or more"
        gains = self.held_out - self.scores[0, :, 2]
        gain, error = float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(images))
        if gain <= 0:
            return "cross-validated, other values are no better"
        return f"the gain of {gain:.4f} is within its standard error of {error:.4f}" if gain <= error else ""

    def ranking(self) -> list[int]:
        """Indices of the combinations, best first; of those with equal scores on every image only the first."""
        _, distinct = np.unique(self.scores, axis=0, return_index=True)
        return sorted(distinct.tolist(), key=lambda index: (-self.means[index, 2], index))

    def table(self) -> str:
        """Text: the best combinations, the configuration's own, and the cross-validated gain."""
        own = self.means[0, 2]
        header = [f"{name:>6}" for name in self.combinations[0]]
        lines = [
            f"\n{len(self.combinations)} combinations on {self.scores.shape[1]} images\n",
            "  ".join([f"{'':>6}", *header, "precision", "recall", "H-Mean", "   gain"]),
        ]
        for place, index in [("own", 0), *enumerate(self.ranking()[:BEST], start=1)]:
            precision, recall, hmean = self.means[index]
            values = self.combinations[index].values()
            cells = [f"{value:>{len(name)}g}" for value, name in zip(values, header, strict=True)]
            cells += [f"{precision:9.4f}", f"{recall:6.4f}", f"{hmean:6.4f}", f"{hmean - own:+z7.4f}"]
            lines.append("  ".join([f"{place:>6}", *cells]))
        lines.append(
            f"\ncross-validated, each half of the images with the values that are best on the other half:\n"
            f"H-Mean {self.cross_validated:.4f}, {self.cross_validated - own:+z.4f} to the checkpoint's own {own:.4f}\n"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: own and cross-validated H-Mean, and all combinations, best first."""
        order = np.argsort(-self.means[:, 2], kind="stable").tolist()
        scores = [dict(zip(("precision", "recall", "hmean"), means, strict=True)) for means in self.means.tolist()]
        return {
            "made_by": SCORES_MARK,
            "images": self.scores.shape[1],
            "own_hmean": float(self.means[0, 2]),
            "cross_validated_hmean": self.cross_validated,
            "combinations": [self.combinations[index] | scores[index] for index in order],
        }


def tune(maps: Sequence[ScoredMap], config: Config, grid: Grid | None = None, workers: int = 0) -> Tuning:
    """Score the combinations of `grid` and of the configuration's own values on all images, in `workers` processes.
    Raises UserError for fewer than two images, which cannot be cross-validated."""
    if len(maps) < 2:
        raise UserError(f"--tune: needs two images or more, not {len(maps)}; half of them check the other half")
    own = {name: getattr(config, name) for name in grid_of(config)}
    grid = {name: tuple(sorted({*values, own[name]})) for name, values in (grid or grid_of(config)).items()}
    maps = sorted(maps, key=lambda each: each.name)
    score = partial(score_map, config=config, grid=grid)
    scores = np.stack(list(progress(map_in_processes(score, maps, workers), "tuning", len(maps))), axis=1)
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    place_of_own = [[values.index(own[name])] for name, values in grid.items()]
    steps = np.abs(np.indices(tuple(map(len, grid.values()))).reshape(len(grid), -1) - place_of_own).sum(axis=0)
    order = np.argsort(steps, kind="stable").tolist()
    return Tuning([combinations[index] for index in order], scores[order])


def score_map(image: ScoredMap, config: Config, grid: Grid) -> np.ndarray:
    """(combinations, 3) CLEval precision, recall and H-Mean of one image with each combination of the grid."""
    (_, threshs), _, (unclip_ratio, ratios), _ = grid.items()
    scores = np.zeros((*map(len, grid.values()), 3))
    if image.prob_map is not None:
        loosest = config.changed(box_thresh=min(grid["box_thresh"]), min_size=min(grid["min_size"]))
        for t, thresh in enumerate(threshs):
            regions = find_regions(image.prob_map, loosest.changed(thresh=thresh))
            for u, ratio in enumerate(ratios):
                scores[t, :, u] = _score_selections(image, regions, config.changed(**{unclip_ratio: ratio}), grid)
    return scores.reshape(-1, 3)


def _score_selections(image: ScoredMap, regions: list[Region], config: Config, grid: Grid) -> np.ndarray:
    """(box_thresh, min_size, 3) scores of the `regions`, best first, that each pair of values selects. They are offset
    by the unclip ratio of `config`."""
    assert image.prob_map is not None and image.size  # `regions` come from it
    grown = list(grow_regions(regions, config, max(grid["min_size"]) + 2))
    nothing = np.empty((0, 2), np.int32)  # for a region that is not one piece; it has no breadth
    whole = [nothing if polygon is None else polygon for polygon, _ in grown]
    scale = 1 / (np.array(image.prob_map.shape[::-1]) / image.size)  # as Letterbox has it, to the last bit
    polygons = to_image_pixels(whole, tuple(scale), image.size)

    measures = [(region.score, region.breadth, breadth) for region, (_, breadth) in zip(regions, grown, strict=True)]
    measured = np.array(measures).reshape(-1, 3)
    selections, most = [], most_polygons(image.size, config)
    for box_thresh, min_size in product(grid["box_thresh"], grid["min_size"]):
        is_chosen = (measured >= (box_thresh, min_size, min_size + 2)).all(axis=1)
        selections.append(is_chosen & (is_chosen.cumsum() <= most))
    distinct, place = np.unique(selections, axis=0, return_inverse=True)
    found = score_selections(image.annotation.polygons, polygons, image.annotation.dont_care, list(distinct))
    scores = np.array([(score.precision, score.recall, score.hmean) for score in found])
    return scores[place.reshape(len(grid["box_thresh"]), -1)]


def tune_checkpoint(pipeline: Pipeline, network: Network, split: str, scores: Path | None, target: Path | None) -> None:
    """Run a network over an annotated split, score all combinations, run it with the best, and write and print these.
    `scores` is where all combinations go as JSON, `target` the checkpoint that gets the best values if there is no
    `Tuning.doubt` and the second run is better. Raises UserError as `tune` does, and where a file cannot be written."""
    dataset, config = pipeline.dataset, pipeline.config
    assert isinstance(dataset, TextDataset)
    maps = []
    for found in progress(pipeline.detect(network), total=len(dataset)):
        name, annotation = dataset.names[found.index], dataset.annotations[found.index]
        maps.append(ScoredMap(name, found.prob_map, found.size, annotation, found.error, len(found.polygons)))
    maps = [each for share in all_gather(maps) for each in share]
    check_readable(dataset, [each.error for each in maps])
    tuning = from_first(lambda: tune(maps, config, workers=count_workers(config)))
    own, best = tuning.combinations[0], tuning.combinations[tuning.best]
    anew = evaluate(Pipeline(dataset, config.changed(**best), network.device), network, "the best").compute().hmean
    if not is_first():
        return
    print_full(((each.name, each.found, each.size) for each in maps), config)
    print("".join(f"counts 0: {each.error}\n" for each in maps if each.error) + tuning.table())
    print(f"evaluated with the best values, which also choose what is looked at twice: H-Mean {anew:.4f}")
    doubt = tuning.doubt or ("" if anew > tuning.means[0, 2] else "evaluated with them, the network is no better")
    if scores:
        write_json(scores, tuning.to_dict())
        print(f"all combinations: {scores}")
    if target and doubt:
        print(f"not saved: {doubt}; {target} keeps its own values")
    elif target:
        from dbnet.checkpoint import change_checkpoint, load_checkpoint  # with PyTorch, which a .onnx file does without

        hmeans = {"own_hmean": float(tuning.means[0, 2]), "cross_validated_hmean": tuning.cross_validated}
        tunings = load_checkpoint(target).get("tunings", [])
        change_checkpoint(target, best, tunings=[*tunings, {"before": own, "after": best, "split": split, **hmeans}])
        print(f"saved: {target} now has the best values; its old ones are kept in it, under `tunings`")
