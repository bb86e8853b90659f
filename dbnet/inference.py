"""From image files to polygons: the one path that validation, evaluate.py, predict.py and `Detector` share."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dbnet.config import Config
from dbnet.dataset import ImageDataset, TextDataset, make_loader
from dbnet.device import count_workers, pick_amp_dtype
from dbnet.errors import UserError
from dbnet.evaluation import Evaluation
from dbnet.geometry import Letterbox
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.model import DBNet
from dbnet.postprocess import extract_polygons


class Detection(NamedTuple):
    """What was found in one image."""

    index: int
    """place of the image in the data set"""

    polygons: list[np.ndarray]
    """(n, 2) int arrays, x and y in pixels of the upright original"""

    scores: list[float]
    """mean probability inside each polygon's region, 0..1"""

    error: str | None
    """one line, where the image could not be read"""


def detect(model: DBNet, dataset: ImageDataset, config: Config, device: torch.device) -> Iterator[Detection]:
    """Detect text in every image of `dataset`, each exactly once.

    The model is put in eval mode. When memory runs out the batch is halved for the rest of the images. Raises
    UserError for an image that cannot be read where config.strict is set; else its Detection has an `error`.
    """
    model.eval()
    plan = BatchPlan(config.batch_size)
    loader = make_loader(dataset, count_workers(config), pin_memory=device.type == "cuda")
    for batch in loader:
        for index, error in batch["failed"]:
            if config.strict:
                raise UserError(error)
            yield Detection(index, [], [], error)
        if "image" not in batch:
            continue
        images = batch["image"]
        prob_maps = run_until_it_fits(lambda images=images: infer(model, images, config, device, plan), plan)
        for index, size, prob_map in zip(
            batch["index"].tolist(), batch["size"].tolist(), prob_maps.numpy(), strict=True
        ):
            yield Detection(index, *read_off(prob_map, size, config), None)


def evaluate(model: DBNet, dataset: TextDataset, config: Config, device: torch.device, title: str = "") -> Evaluation:
    """CLEval of what `detect` finds in an annotated split, with a progress bar; raises as `detect` does."""
    evaluation = Evaluation()
    detections = detect(model, dataset, config, device)
    for detection in tqdm(detections, title, len(dataset), unit="img", leave=False, dynamic_ncols=True):
        name, annotation = dataset.paths[detection.index].name, dataset.annotations[detection.index]
        evaluation.update(name, annotation, detection.polygons, detection.error)
    return evaluation


@torch.inference_mode()
def infer(model: DBNet, images: Tensor, config: Config, device: torch.device, plan: BatchPlan) -> Tensor:
    """Probability maps (N, H, W), float32 on the CPU, of (N, H, W, 3) uint8 images, `plan.micro_batch` at a time."""
    amp_dtype = pick_amp_dtype(config, device)
    prob_maps = []
    for micro in images.split(plan.micro_batch):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            prob_maps.append(model(micro.to(device, non_blocking=True)).cpu())
    return torch.cat(prob_maps)


def read_off(prob_map: np.ndarray, size: tuple[int, int], config: Config) -> tuple[list[np.ndarray], list[float]]:
    """Polygons in pixels of the original image and their scores, from the map of its letterboxed square.

    Args:
        prob_map: (image_size, image_size) float32 in 0..1.
        size: (width, height) of the original image.
    """
    letterbox = Letterbox(*size, config.image_size)
    width, height = letterbox.resized
    polygons, scores = extract_polygons(prob_map[:height, :width], config, tuple(1 / letterbox.scale), tuple(size))
    return list(polygons), [float(score) for score in scores]
