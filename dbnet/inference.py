"""From image files to polygons: the one path that validation, evaluate.py, predict.py and `Detector` share."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dbnet import distributed
from dbnet.config import Config
from dbnet.dataset import Batches, ImageDataset, TextDataset, make_loader
from dbnet.device import count_workers, pick_amp_dtype
from dbnet.evaluation import Evaluation
from dbnet.geometry import Letterbox
from dbnet.images import ImageError
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.model import DBNet
from dbnet.postprocess import extract_polygons

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


class ProbMaps(NamedTuple):
    """Probability maps on their way from the device to the host."""

    maps: Tensor
    """(N, H, W) uint8 on the host, probability x 255; not to be read before `numpy` returns"""

    arrived: torch.cuda.Event | None
    """the copy's end; None where there is nothing to wait for"""

    def numpy(self) -> np.ndarray:
        """The maps, once they are there."""
        if self.arrived:
            self.arrived.synchronize()
        return self.maps.numpy()


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

    def __init__(self, dataset: ImageDataset, config: Config, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        on_gpu = device.type == "cuda"
        workers = count_workers(config) if on_gpu else 0
        share = distributed.Share(Batches(dataset, config.batch_size))
        self.loader = make_loader(share, workers, pin_memory=on_gpu)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._extractors: Executor = ProcessPoolExecutor(workers) if workers else AtOnce()

    def detect(self, model: DBNet) -> Iterator[Detection]:
        """Every image of the data set exactly once, in the order in which they are done; of several processes that
        torchrun has started, each has its share.

        The model is put in eval mode. When memory runs out the batch is halved for the rest of the images. Raises
        ImageError for an image that cannot be read where config.strict is set; else its Detection has an `error`.
        """
        model.eval()
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = False  # each shape of a batch would be measured anew
        plan = BatchPlan(self.config.batch_size)
        waiting: deque[tuple[int, np.ndarray, Future]] = deque()
        launched: tuple[dict[str, Any], ProbMaps] | None = None
        batches = iter(self.loader)
        batch = next(batches, None)
        while batch or launched:
            last = launched
            launched = None
            if batch and "image" in batch:
                images = batch["image"]
                launched = (
                    batch,
                    run_until_it_fits(lambda images=images: infer(model, images, self.config, self.device, plan), plan),
                )
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

    def evaluate(self, model: DBNet, title: str = "") -> Evaluation:
        """CLEval of what `detect` finds in an annotated split, a TextDataset, with a progress bar; raises as it does.

        Every process that torchrun has started gets the scores of all of them. Scores are in the order of the data set.
        """
        dataset: TextDataset = self.dataset
        evaluation = Evaluation()
        for detection in tqdm(
            self.detect(model),
            title,
            len(dataset),
            unit="img",
            leave=False,
            dynamic_ncols=True,
            smoothing=0,
            disable=not distributed.is_first(),
        ):
            name, annotation = dataset.paths[detection.index].name, dataset.annotations[detection.index]
            evaluation.update(name, annotation, detection.polygons, detection.error)
        for other in distributed.gather(evaluation):
            if other is not evaluation:
                evaluation.merge(other)
        evaluation.per_image = {path.name: evaluation.per_image[path.name] for path in dataset.paths}
        return evaluation

    def _extract(self, batch: dict[str, Any], prob_maps: ProbMaps) -> Iterator[tuple[int, np.ndarray, Future]]:
        """The index of each image of a batch, its probability map, and its polygons and scores to be."""
        for index, size, prob_map in zip(
            batch["index"].tolist(), batch["size"].tolist(), prob_maps.numpy(), strict=True
        ):
            width, height = Letterbox(*size, self.config.image_size).resized
            prob_map = prob_map[:height, :width]
            yield index, prob_map, self._extractors.submit(read_off, prob_map, size, self.config)


@torch.inference_mode()
def infer(model: DBNet, images: Tensor, config: Config, device: torch.device, plan: BatchPlan) -> ProbMaps:
    """Probability maps of (N, H, W, 3) uint8 images, `plan.micro_batch` at a time. Does not wait for the device."""
    amp_dtype = pick_amp_dtype(config, device)
    prob_maps = []
    for micro in images.split(plan.micro_batch):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            prob_map = model(micro.to(device, non_blocking=True))
        prob_maps.append((prob_map.nan_to_num() * 255).round().to(torch.uint8))
    prob_maps = torch.cat(prob_maps)
    if device.type == "cpu":
        return ProbMaps(prob_maps, None)
    on_host = torch.empty(prob_maps.shape, dtype=torch.uint8, pin_memory=True)
    on_host.copy_(prob_maps, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return ProbMaps(on_host, arrived)


def read_off(prob_map: np.ndarray, size: tuple[int, int], config: Config) -> tuple[list[np.ndarray], list[float]]:
    """Polygons in pixels of the original image and their scores.

    Args:
        prob_map: (height, width) uint8, probability x 255, of the resized image without its padding.
        size: (width, height) of the original image.
    """
    scale = 1 / Letterbox(*size, config.image_size).scale
    return extract_polygons(prob_map, config, tuple(scale), tuple(size))
