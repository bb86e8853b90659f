"""From image files to polygons: the one path that validation, evaluate.py, predict.py and `Detector` share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from dbnet import distributed
from dbnet.config import Config
from dbnet.dataset import ArrayLoader, Batches, ImageDataset, TextDataset, count_workers, make_loader
from dbnet.errors import UserError
from dbnet.evaluation import Evaluation
from dbnet.geometry import Letterbox
from dbnet.images import ImageError
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.postprocess import extract_polygons
from dbnet.report import Report

if TYPE_CHECKING:
    import torch

_WAITING_IMAGES = 64  # on a GPU, more maps than this do not wait for their polygons; then the network does


class Detection(NamedTuple):
    """What was found in one image."""

    index: int
    """place of the image in the data set"""

    polygons: list[np.ndarray]
    """(n, 2) int arrays, x and y in pixels of the upright original"""

    scores: list[float]
    """mean probability inside each polygon's region, 0..1"""

    prob_map: np.ndarray | None
    """(height, width) uint8, probability x 255, of the resized image without its padding; None where there is none"""

    error: str | None
    """one line, where the image could not be read"""


class Network(Protocol):
    """What makes probability maps: an `ensemble.Ensemble` of checkpoints, or an `onnx.OnnxNetwork`."""

    config: Config
    """the configuration that it was trained with, as the user changed it"""

    device: torch.device | str
    """where it runs; `str` of it begins with cpu or cuda"""

    sides: tuple[int, ...]
    """the image sizes that it looks at, config.image_size first"""

    def infer(self, images: Sequence[Any], sizes: list[tuple[int, int]], plan: BatchPlan) -> Callable[[], np.ndarray]:
        """Start on the (N, height, width, 3) uint8 images of a batch, one batch for each of `sides`.

        `sizes` holds (width, height) of the originals. Returns a function that waits for the (N, height, width) uint8
        maps, probability x 255, in the geometry of the first size.
        """


def load_network(paths: Sequence[Path], changes: dict[str, Any]) -> Network:
    """The network of one checkpoint, the average of several, or a network that was exported to ONNX.

    `changes` are made to the configuration that came with it. PyTorch is imported for checkpoints alone.

    Raises UserError where a file cannot be used.
    """
    if not any(path.suffix.lower() == ".onnx" for path in paths):
        from dbnet.ensemble import Ensemble

        return Ensemble.load(paths, changes)
    if len(paths) > 1:
        raise UserError(
            f"{paths[0]} {paths[1]}: a .onnx file runs alone; name its checkpoint to average it with others"
        )
    from dbnet.onnx import OnnxNetwork

    return OnnxNetwork(paths[0], changes)


def shipped_weights() -> Path:
    """The trained `lite` that comes with the program. Raises UserError where it does not."""
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):  # installed, and in a checkout
        if (folder / "lite.pt").is_file():
            return folder / "lite.pt"
    raise UserError("weights/lite.pt: is missing from this copy of dbnet; name a checkpoint, or train one")


class AtOnce(Executor):
    """Runs what is submitted before it returns: where another process or thread would gain nothing."""

    def submit(self, function: Callable, *args: Any) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


class Pipeline:
    """Detect text in the images of a data set, as often as asked: reading, network and post-processing overlap.

    While a GPU computes, loader workers read the next batches and other processes make polygons of the last ones. On a
    CPU the network takes all the cores, and whoever takes one from it delays the others too; so there the next batch is
    read while the polygons of the last are made and used, between two batches.
    """

    def __init__(self, dataset: ImageDataset, config: Config, device: torch.device | str) -> None:
        self.dataset, self.config = dataset, config
        self.on_gpu = str(device).startswith("cuda")
        self.workers = count_workers(config) if self.on_gpu else 0
        self.loader: Iterable[dict[str, Any]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._extractors: Executor = ProcessPoolExecutor(self.workers) if self.workers else AtOnce()

    def detect(self, network: Network) -> Iterator[Detection]:
        """Every image of the data set exactly once, in the order in which they are done; of several processes that
        torchrun has started, each has its share.

        When memory runs out the batch is halved for the rest of the images. Raises ImageError for an image that cannot
        be read where config.strict is set; else its Detection has an `error`.
        """
        plan = BatchPlan(self.config.batch_size)
        waiting: deque[tuple[int, np.ndarray, Future]] = deque()
        launched: tuple[dict[str, Any], Callable[[], np.ndarray]] | None = None
        batches = iter(self._load(network.sides[1:]))
        batch = next(batches, None)
        while batch or launched:
            last = launched
            launched = None
            if batch and "image" in batch:
                images = [batch["image"], *(batch[f"image_{side}"] for side in network.sides[1:])]
                sizes = batch["size"].tolist()
                launched = batch, run_until_it_fits(partial(network.infer, images, sizes, plan), plan)
            following = self._reader.submit(next, batches, None) if batch else None
            for index, error in batch["failed"] if batch else []:
                if self.config.strict:
                    raise ImageError(error)
                yield Detection(index, [], [], None, error)
            if last:  # its maps have arrived while the device was busy with those of this batch
                waiting.extend(self._extract(*last))
            while waiting and (len(waiting) > _WAITING_IMAGES or waiting[0][-1].done()):
                index, prob_map, future = waiting.popleft()
                yield Detection(index, *future.result(), prob_map, None)
            batch = following.result() if following else None
        for index, prob_map, future in waiting:
            yield Detection(index, *future.result(), prob_map, None)

    def evaluate(self, network: Network, title: str = "", report: Report | None = None) -> Evaluation:
        """CLEval of what `detect` finds in an annotated split, a TextDataset, with a progress bar; raises as it does.

        Every process that torchrun has started gets the scores of all of them. Scores are in the order of the data set.
        A `report` takes in each image.
        """
        dataset: TextDataset = self.dataset
        evaluation = Evaluation()
        for detection in tqdm(
            self.detect(network),
            title,
            len(dataset),
            unit="img",
            leave=False,
            dynamic_ncols=True,
            smoothing=0,
            disable=not distributed.is_first(),
        ):
            path, annotation = dataset.paths[detection.index], dataset.annotations[detection.index]
            size = dataset.size(detection.index)
            evaluation.update(path.name, annotation, detection.polygons, detection.error, size)
            if detection.prob_map is not None:
                evaluation.highest = max(evaluation.highest, int(detection.prob_map.max(initial=0)) / 255)
            if report:
                report.add(path, annotation, detection.polygons, detection.scores, detection.prob_map)
        for others, pictures in distributed.gather((evaluation, report.pictures if report else {})):
            evaluation.merge(others)
            if report:
                report.pictures |= pictures
        evaluation.per_image = {path.name: evaluation.per_image[path.name] for path in dataset.paths}
        return evaluation

    def _load(self, further_sizes: tuple[int, ...]) -> Iterable[dict[str, Any]]:
        """The batches, with the images at these sizes too."""
        if self.loader is None or self.dataset.further_sizes != further_sizes:
            self.dataset.further_sizes = further_sizes
            batches = distributed.Share(Batches(self.dataset, self.config.batch_size))
            self.loader = make_loader(batches, self.workers, pin_memory=True) if self.on_gpu else ArrayLoader(batches)
        return self.loader

    def _extract(
        self, batch: dict[str, Any], prob_maps: Callable[[], np.ndarray]
    ) -> Iterator[tuple[int, np.ndarray, Future]]:
        """The index of each image of a batch, its probability map, and its polygons and scores to be."""
        for index, size, prob_map in zip(batch["index"].tolist(), batch["size"].tolist(), prob_maps(), strict=True):
            width, height = Letterbox(*size, self.config.image_size).resized
            prob_map = prob_map[:height, :width]
            yield index, prob_map, self._extractors.submit(read_off, prob_map, size, self.config)


def read_off(prob_map: np.ndarray, size: tuple[int, int], config: Config) -> tuple[list[np.ndarray], list[float]]:
    """Polygons in pixels of the original image and their scores.

    Args:
        prob_map: (height, width) uint8, probability x 255, of the resized image without its padding.
        size: (width, height) of the original image.
    """
    scale = 1 / Letterbox(*size, config.image_size).scale
    return extract_polygons(prob_map, config, tuple(scale), tuple(size))
