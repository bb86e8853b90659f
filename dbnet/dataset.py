"""Samples: an image resized and padded, and for training its augmentation and target maps; and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dbnet.annotations import Annotation, read_split
from dbnet.augment import Augmentation, draw
from dbnet.cache import PixelCache
from dbnet.config import Config
from dbnet.geometry import Letterbox, clip_polygons, padded, split_polygons
from dbnet.images import ImageError, read_image, read_size
from dbnet.memory import keep_freed_memory
from dbnet.targets import draw_targets, make_targets, polygon_mask

__all__ = ["Batches", "ImageDataset", "TextDataset", "make_loader", "make_targets"]

_LIKE_SHAPES_AMONG = 16  # batches whose images are sorted by shape: enough to find company, few enough to stay random


class ImageDataset(Dataset):
    """Images to detect text in. A sample is a dict of

    image: (height, width, 3) uint8 tensor, RGB: the image with its longer side resized to image_size, in the top-left
        corner; below and beside it is black up to the next multiple of 32, or what the rest of its batch needs;
    size: (2,) int64 tensor, width and height of the original image in pixels;
    index: its place in `paths`;

    or of `index` and `error`, a line of text, for an image that cannot be read.
    """

    def __init__(self, paths: list[Path], config: Config, pad: str = "tight") -> None:
        """`pad`: tight, or square for images padded to image_size x image_size."""
        self.paths = paths
        self.config = config
        self.pad = pad
        self._sizes: dict[int, tuple[int, int]] = {}
        keep_freed_memory()  # whoever makes a data set is going to make and drop large arrays by the thousand

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The samples of a batch, all of one shape. (The data loader looks for this name.)"""
        loaded, samples = [], []
        for index in indices:
            try:
                loaded.append((index, *self.load(index), self.augmentation(index)))
            except ImageError as error:
                samples.append({"index": index % len(self), "error": str(error)})
        height, width = self._canvas([drawn.size(*letterbox.resized) for _, _, letterbox, drawn in loaded])
        for image in loaded:
            samples.append(self.sample(*image, canvas=np.zeros((height, width, 3), np.uint8)))
        return samples

    def load(self, index: int) -> tuple[np.ndarray, Letterbox]:
        """The resized image, (height, width, 3) uint8 RGB, and how it was resized.

        Raises ImageError for an image that cannot be read.
        """
        pixels, size = read_image(self.paths[index % len(self)], self.config.image_size)
        letterbox = Letterbox(*size, self.config.image_size)
        return letterbox.resize(pixels), letterbox

    def augmentation(self, index: int) -> Augmentation:
        """What happens to a sample beside resizing and padding: here, nothing."""
        return Augmentation()

    def sample(
        self, index: int, pixels: np.ndarray, letterbox: Letterbox, augmentation: Augmentation, canvas: np.ndarray
    ) -> dict[str, Any]:
        """The sample of what `load` and `augmentation` gave, on the black (height, width, 3) `canvas` of its batch."""
        augmentation.render(pixels, canvas)
        return {
            "image": torch.from_numpy(canvas),
            "size": torch.tensor((letterbox.width, letterbox.height)),
            "index": index,
        }

    def elongation(self, index: int) -> int:
        """Width less height of a padded sample: images of one image_size and like elongation have like shapes.

        Only the header of an image is read, once; an image without one is as good as a square.
        """
        place = index % len(self)
        if place not in self._sizes:
            try:
                self._sizes[place] = read_size(self.paths[place])
            except ImageError:
                self._sizes[place] = (1, 1)
        resized = Letterbox(*self._sizes[place], self.config.image_size).resized
        height, width = self._canvas([self.augmentation(index).size(*resized)])
        return width - height

    def _canvas(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """(height, width) that holds images of these (width, height)."""
        if self.pad == "square":
            return self.config.image_size, self.config.image_size
        widths, heights = zip(*sizes, strict=True) if sizes else ((1,), (1,))
        return padded(max(heights)), padded(max(widths))


@dataclass(frozen=True)
class Words:
    """The polygons of all images in a few arrays. Workers share them with the process that they were forked from:
    unlike lists, arrays do not count references to each element, and counting would copy them page by page."""

    points: np.ndarray
    """(total, 2) float64, in pixels of the originals, polygon after polygon, image after image"""

    counts: np.ndarray
    """(polygons,) points of each"""

    dont_care: np.ndarray
    """(polygons,) bool"""

    first_polygon: np.ndarray
    """(images + 1,) where in `counts` the polygons of each image begin"""

    first_point: np.ndarray
    """(images + 1,) where in `points` the polygons of each image begin"""

    @classmethod
    def gather(cls, annotations: list[Annotation]) -> Self:
        """The polygons of these annotations."""
        polygons = [polygon for annotation in annotations for polygon in annotation.polygons]
        counts = np.array([len(polygon) for polygon in polygons], int)
        first_polygon = np.cumsum([0, *(len(annotation.polygons) for annotation in annotations)])
        first_point = np.concatenate([[0], np.cumsum(counts)])[first_polygon]
        dont_care = np.array([flag for annotation in annotations for flag in annotation.dont_care], bool)
        return cls(np.concatenate([np.empty((0, 2)), *polygons]), counts, dont_care, first_polygon, first_point)

    def of(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points, counts and don't-care flags of the polygons of an image."""
        polygons = slice(*self.first_polygon[image : image + 2])
        points = slice(*self.first_point[image : image + 2])
        return self.points[points], self.counts[polygons], self.dont_care[polygons]


class TextDataset(ImageDataset):
    """A split of an annotated data set. For training (`train=True`) a sample is a dict of

    image: (height, width, 3) uint8 tensor, RGB, augmented; image_size x image_size with `config.pad` "square";
    prob_map: (height, width) uint8 tensor, 1 on text kernels;
    thresh_levels: (height, width) uint8 tensor, 0 to 255 for thresh_min to thresh_max;
    mask: (height, width) uint8 tensor, 0 on don't-care text;
    dropped: how many degenerate polygons were left out;
    index, or `index` and `error`: as in ImageDataset, which is also the sample where `train` is false.

    The augmentation depends on the seed, the index and the epoch alone, not on workers or order. The epoch rides on
    the index: sample `i` of epoch `e` is `dataset[e * len(dataset) + i]`. Decoded images are cached from the first
    epoch on.

    Raises UserError where the split is missing or its annotations are not of the form that the README shows.
    """

    def __init__(self, config: Config, split: str, train: bool) -> None:
        paths, annotations = read_split(Path(config.data), split, config.format)
        super().__init__(paths, config, config.pad if train else "tight")
        self.train = train
        self.annotations = annotations
        if train:
            self.words = Words.gather(annotations)
            self._cache = PixelCache(len(paths), config.image_size, config)

    def augmentation(self, index: int) -> Augmentation:
        if not self.train:
            return super().augmentation(index)
        epoch, place = divmod(index, len(self))
        return draw(self.config, np.random.default_rng((self.config.seed, epoch, place)))

    def load(self, index: int) -> tuple[np.ndarray, Letterbox]:
        if not self.train:
            return super().load(index)
        place, side = index % len(self), self.config.image_size
        try:
            file = self.paths[place].stat()
        except OSError:
            return super().load(index)  # which says what is wrong
        key = (file.st_mtime_ns, file.st_size, side)
        found = self._cache.load(place, key)
        if found:
            pixels, size = found
            return pixels, Letterbox(*size, side)
        pixels, letterbox = super().load(index)
        self._cache.store(place, key, pixels, (letterbox.width, letterbox.height))
        return pixels, letterbox

    def sample(
        self, index: int, pixels: np.ndarray, letterbox: Letterbox, augmentation: Augmentation, canvas: np.ndarray
    ) -> dict[str, Any]:
        if not self.train:
            return super().sample(index, pixels, letterbox, augmentation, canvas)
        height, width = canvas.shape[:2]
        augmentation.render(pixels, canvas)
        text, illegible, dropped = self.polygons(index, letterbox, augmentation)
        prob_map, thresh_levels = draw_targets(text, height, width, self.config.shrink_ratio)
        mask = polygon_mask(illegible, height, width)
        return {
            "image": torch.from_numpy(canvas),
            "prob_map": torch.from_numpy(prob_map),
            "thresh_levels": torch.from_numpy(thresh_levels),
            "mask": torch.from_numpy(np.subtract(1, mask, out=mask)),
            "dropped": dropped,
            "index": index % len(self),
        }

    def polygons(
        self, index: int, letterbox: Letterbox, augmentation: Augmentation
    ) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Text and don't-care polygons of a training sample, (n, 2) each, and how many degenerate ones are left out."""
        points, counts, dont_care = self.words.of(index % len(self))
        points, counts, kept = clip_polygons(points, counts, letterbox.width, letterbox.height)
        polygons = split_polygons(augmentation.move(letterbox.to_network(points), *letterbox.resized), counts)
        text, illegible = [], []
        for polygon, ignore in zip(polygons, dont_care[kept].tolist(), strict=True):
            (illegible if ignore else text).append(polygon)
        return text, illegible, len(kept) - len(polygons)


class Batches(Sampler):
    """Batches of indices, each index once: in order, or with a seed shuffled anew for each epoch.

    The order depends on the seed and the epoch alone. Set `epoch` before iterating; it is also written into the
    indices, as TextDataset reads it. Where the data set pads tightly, images of like shape share a batch.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, seed: int | None = None) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.dataset))
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        if rng:
            rng.shuffle(order)
        order = (order + self.epoch * len(order)).tolist()
        together = self.batch_size * _LIKE_SHAPES_AMONG
        for start in range(0, len(order), together):
            indices = order[start : start + together]
            if self.dataset.pad == "tight":
                indices.sort(key=self.dataset.elongation)
            batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
            if rng:
                rng.shuffle(batches)
            yield from batches


def make_loader(batches: Batches, workers: int, pin_memory: bool) -> DataLoader:
    """Load batches in `workers` processes that live as long as the loader.

    A batch is a dict of the samples' tensors, stacked, and of `failed`, the (index, error) of the samples that could
    not be read; with no readable sample, `image` is missing.
    """
    # The workers are the parallelism; threads inside them would fight for the same cores. It must be said before they
    # are forked: a forked process that inherits OpenCV's threads waits for them for ever when it sets their number.
    cv2.setNumThreads(1)
    return DataLoader(
        batches.dataset,
        batch_sampler=batches,
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
