"""Samples: an image letterboxed into a square, and for training its augmentation and target maps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dbnet.annotations import read_split
from dbnet.augment import augment
from dbnet.config import Config
from dbnet.geometry import Letterbox, clip_polygons, pad_to_square
from dbnet.images import ImageError, read_image
from dbnet.targets import make_targets, polygon_mask

__all__ = ["ImageDataset", "ShuffledBatches", "TextDataset", "make_loader", "make_targets"]


class ImageDataset(Dataset):
    """Images to detect text in. A sample is a dict of

    image: (image_size, image_size, 3) uint8 tensor, RGB;
    size: (2,) int64 tensor, width and height of the original image in pixels;
    index: its place in `paths`;

    or of `index` and `error`, a line of text, for an image that cannot be read.
    """

    def __init__(self, paths: list[Path], config: Config) -> None:
        self.paths = paths
        self.config = config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        side = self.config.image_size
        try:
            pixels, size = read_image(self.paths[index], side)
        except ImageError as error:
            return {"index": index, "error": str(error)}
        image = pad_to_square(Letterbox(*size, side).resize(pixels), side)
        return {"image": torch.from_numpy(image), "size": torch.tensor(size), "index": index}


class TextDataset(ImageDataset):
    """A split of an annotated data set. For training (`train=True`) a sample is a dict of

    image: (image_size, image_size, 3) uint8 tensor, RGB, augmented;
    prob_map: (image_size, image_size) uint8 tensor, 1 on text kernels;
    thresh_map: (image_size, image_size) float32 tensor, thresh_min to thresh_max;
    mask: (image_size, image_size) uint8 tensor, 0 on don't-care text;
    dropped: how many degenerate polygons were left out;
    index, or `index` and `error`: as in ImageDataset, which is also the sample where `train` is false.

    The augmentation depends on the seed, the index and the epoch alone, not on workers or order. The epoch rides on
    the index: sample `i` of epoch `e` is `dataset[e * len(dataset) + i]`.

    Raises UserError where the split is missing or its annotations are not of the form that the README shows.
    """

    def __init__(self, config: Config, split: str, train: bool) -> None:
        paths, self.annotations = read_split(Path(config.data), split)
        super().__init__(paths, config)
        self.train = train

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.train:
            return super().__getitem__(index)
        config, side = self.config, self.config.image_size
        try:
            image, text, illegible = self.augmented(index)
        except ImageError as error:
            return {"index": index % len(self), "error": str(error)}
        prob_map, thresh_map = make_targets(text, side, side, config.shrink_ratio, config.thresh_min, config.thresh_max)
        annotated = len(self.annotations[index % len(self)].polygons)
        return {
            "image": torch.from_numpy(image),
            "prob_map": torch.from_numpy(prob_map),
            "thresh_map": torch.from_numpy(thresh_map),
            "mask": torch.from_numpy(1 - polygon_mask(illegible, side, side)),
            "dropped": annotated - len(text) - len(illegible),
            "index": index % len(self),
        }

    def augmented(self, index: int) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """The augmented image, (image_size, image_size, 3) uint8 RGB, and its text and don't-care polygons.

        Raises ImageError for an image that cannot be read.
        """
        epoch, index = divmod(index, len(self))
        side = self.config.image_size
        pixels, (width, height) = read_image(self.paths[index], side)
        letterbox = Letterbox(width, height, side)
        annotation = self.annotations[index]
        polygons, kept = clip_polygons(annotation.polygons, width, height)
        image, polygons = augment(
            letterbox.resize(pixels),
            [letterbox.to_square(polygon) for polygon in polygons],
            self.config,
            np.random.default_rng((self.config.seed, epoch, index)),
        )
        ignored = [annotation.dont_care[i] for i in kept]
        text = [polygon for polygon, ignore in zip(polygons, ignored, strict=True) if not ignore]
        illegible = [polygon for polygon, ignore in zip(polygons, ignored, strict=True) if ignore]
        return pad_to_square(image, side), text, illegible


class ShuffledBatches(Sampler):
    """Batches of indices for one epoch after another, in an order that depends on the seed and the epoch alone.

    Set `epoch` before iterating; it is also written into the indices, as TextDataset reads it.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length) + self.epoch * self.length
        for start in range(0, self.length, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


def make_loader(dataset: ImageDataset, workers: int, pin_memory: bool, batches: Sampler | None = None) -> DataLoader:
    """Load batches in `workers` processes that live as long as the loader.

    A batch is a dict of the samples' tensors, stacked, and of `failed`, the (index, error) of the samples that could
    not be read; with no readable sample, `image` is missing. Without `batches` the samples come in order, in batches of
    config.batch_size.
    """
    # The workers are the parallelism; threads inside them would fight for the same cores. It must be said before they
    # are forked: a forked process that inherits OpenCV's threads waits for them for ever when it sets their number.
    cv2.setNumThreads(1)
    batching = {"batch_sampler": batches} if batches else {"batch_size": dataset.config.batch_size}
    return DataLoader(
        dataset,
        **batching,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    readable = [sample for sample in samples if "error" not in sample]
    batch = default_collate(readable) if readable else {}
    batch["failed"] = [(sample["index"], sample["error"]) for sample in samples if "error" in sample]
    return batch
