"""Samples: an image resized and padded, and for training its augmentation and target maps; and their batches.

All are numpy arrays; only `make_loader`, whose batches are tensors, needs PyTorch.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import cv2
import numpy as np

from dbnet.annotations import Annotation
from dbnet.augment import Augmentation, draw_augmentation
from dbnet.config import STRIDE, Config
from dbnet.device import keep_freed_memory, rank, world_size
from dbnet.errors import ImageError, UserError, is_out_of_memory
from dbnet.files import stamp
from dbnet.geometry import Letterbox, areas, clip_polygons, inference_side, padded, split_polygons, visible_shares
from dbnet.images import read_image, read_size
from dbnet.splits import read_split
from dbnet.targets import draw_targets, make_targets, polygon_mask

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["ArrayLoader", "Batches", "ImageDataset", "TextDataset", "count_workers", "make_loader", "make_targets"]

# Forked workers share the annotations. Elsewhere than on Linux forking is not safe, or there is no such thing.
_START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"
_MIN_FREE = 1 << 28  # bytes of the disk that the cache leaves to others
_LIKE_SHAPES_AMONG = 16  # batches whose images are sorted by shape: few, so that the order stays random
MOSTLY_VISIBLE = 0.9
"""Share of a word's area inside an augmented image from which it is still learned; with less it is masked."""


class PixelCache:
    """A slot on disk for the decoded pixels of each image, in one temporary file that all workers map into memory.

    It lies in the system's temporary folder (TMPDIR) and takes at most half of the free space there; images beyond that
    are not cached. The system keeps in memory what is used often, as long as there is room. Where workers are forked,
    the file has no name and goes with the last process that maps it; else the process that made it removes it.
    """

    def __init__(self, images: int, image_size: int, config: Config) -> None:
        """`images` slots for (height, width, 3) uint8 pixels, each side at most image_size, within config.cache_gb."""
        numbers = [("key", "i8", 3), ("shape", "i8", 2), ("size", "i8", 2)]
        slot = np.dtype([*numbers, ("pixels", "u1", 3 * image_size**2)])
        self._slots: np.ndarray | None = None
        self._file: str | None = None
        try:
            count = min(images, int(min(config.cache_gb * 1e9, _free_bytes() / 2)) // slot.itemsize)
            if count:
                opened, self._file = tempfile.mkstemp(prefix="dbnet-cache-")
                os.close(opened)
                self._slots = np.asarray(np.memmap(self._file, slot, "w+", shape=count))
        except (OSError, MemoryError) as error:
            print(f"images are not cached ({error})", file=sys.stderr)
        if _START_METHOD == "fork":
            self._remove()

    def __del__(self) -> None:
        self._slots = None
        self._remove()

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is spawned: it maps the file by its name."""
        return {"file": self._file, "slot": None if self._slots is None else self._slots.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = None  # the process that made it removes it
        self._slots = np.asarray(np.memmap(state["file"], state["slot"], "r+")) if state["slot"] else None

    def load(self, index: int, key: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]] | None:
        """The pixels and the (width, height) stored for an image under this key, or None."""
        if self._slots is None or index >= len(self._slots):
            return None
        slot = self._slots[index]
        if slot["key"].tolist() != list(key):
            return None
        shape = (*slot["shape"].tolist(), 3)
        return slot["pixels"][: math.prod(shape)].reshape(shape).copy(), tuple(slot["size"].tolist())

    def store(self, index: int, key: tuple[int, int, int], pixels: np.ndarray, size: tuple[int, int]) -> None:
        """Keep `pixels` for the key, which stands for all that they are made from, and the image's (width, height).

        Where the disk gets full this process caches no more, and prints a line: writing to a mapped file on a full disk
        would end it.
        """
        if self._slots is None or index >= len(self._slots):
            return
        if _free_bytes() < _MIN_FREE + self._slots.itemsize:
            self._slots = None
            print(f"\nimages are no longer cached ({tempfile.gettempdir()} is nearly full)", file=sys.stderr)
            return
        slot = self._slots[index]
        slot["key"] = 0  # a slot half written does not count
        slot["pixels"][: pixels.size] = pixels.reshape(-1)
        slot["shape"], slot["size"] = pixels.shape[:2], size
        slot["key"] = key

    def _remove(self) -> None:
        """Remove the file's name."""
        if self._file:
            with suppress(OSError):
                os.unlink(self._file)
            self._file = None


def _free_bytes() -> float:
    """Free space on the disk of the temporary folder; infinite where the system does not say."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except AttributeError:
        return math.inf


class Draw(NamedTuple):
    """Which sample: all that its content depends on, beside the configuration."""

    place: int
    """of the image in the data set"""

    epoch: int = 0

    side: int | None = None
    """longer side of the resized image in pixels; None is config.image_size"""

    repeat: int = 0
    """how often the image has come in this epoch before"""


class ImageDataset:
    """Images to detect text in, each with a path and a name of its own. A sample is a dict of

    image: (height, width, 3) uint8 array, RGB: the image with its longer side resized to image_size, in the top-left
        corner; below and beside it is black up to the next multiple of 32, or what the rest of its batch needs;
    image_SIDE: for each SIDE of `further_sizes`, what `image` is at that image_size;
    size: (2,) int64 array, width and height of the original image in pixels;
    index: its place in `paths`;

    or of `index` and `error`, a line of text, for an image that cannot be read.
    """

    def __init__(
        self, paths: Sequence[Path], config: Config, pad: str = "tight", names: Sequence[str] | None = None
    ) -> None:
        """`pad`: tight, or square for images padded to image_size x image_size. `names`: else those of the files."""
        self.paths = list(paths)
        self.names = [path.name for path in paths] if names is None else list(names)
        self.config = config
        self.pad = pad
        self.further_sizes: tuple[int, ...] = ()
        self._sizes: dict[int, tuple[int, int] | None] = {}
        keep_freed_memory()  # loading allocates and frees thousands of large arrays

    def __len__(self) -> int:
        return len(self.paths)

    def draws(self, epoch: int) -> list[Draw]:
        """The samples of an epoch: each image once."""
        return [Draw(place, epoch) for place in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`; of an augmented split, that of epoch `index // len(self)`."""
        epoch, place = divmod(index, len(self))
        return self.__getitems__([Draw(place, epoch)])[0]

    def __getitems__(self, draws: list[Draw]) -> list[dict[str, Any]]:
        """The samples of a batch, all of one shape. (The data loader looks for this name.)"""
        samples = self._at_one_size(draws)
        for side in self.further_sizes:
            resized = copy.copy(self)
            resized.config = self.config.changed(image_size=side)
            found = {sample["index"]: sample for sample in resized._at_one_size(draws)}
            for sample in samples:
                other = found[sample["index"]]
                sample.update({"error": other["error"]} if "error" in other else {f"image_{side}": other["image"]})
        return samples

    def _at_one_size(self, draws: list[Draw]) -> list[dict[str, Any]]:
        """The samples of a batch without their further sizes."""
        loaded, samples = [], []
        for draw in draws:
            try:
                loaded.append((draw, *self.load(draw.place), self.augmentation(draw)))
            except ImageError as error:
                samples.append({"index": draw.place, "error": str(error)})
        sizes = [augmentation.size(*letterbox.resized) for _, _, letterbox, augmentation in loaded]
        height, width = self._canvas(sizes, draws[0].side)
        for image in loaded:
            samples.append(self.sample(*image, canvas=np.zeros((height, width, 3), np.uint8)))
        return samples

    def load(self, place: int) -> tuple[np.ndarray, Letterbox]:
        """The resized image, (height, width, 3) uint8 RGB, and how it was resized.

        Raises ImageError for an image that cannot be read.
        """
        side = self.side(place)
        pixels, size = self.read(place, side)
        letterbox = Letterbox(*size, side)
        return letterbox.resize(pixels), letterbox

    def read(self, place: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """As `images.read_image`."""
        return read_image(self.paths[place], side)

    def side(self, place: int) -> int:
        """Longer side in pixels of an image in the network; one that cannot be read counts as a square."""
        size = self.size(place) or (self.config.image_size, self.config.image_size)
        return inference_side(*size, self.config.image_size, self.config.enlarge)

    def augmentation(self, draw: Draw) -> Augmentation:
        """The augmentation of a sample in addition to resizing and padding: here, none."""
        return Augmentation()

    def sample(
        self, draw: Draw, pixels: np.ndarray, letterbox: Letterbox, augmentation: Augmentation, canvas: np.ndarray
    ) -> dict[str, Any]:
        """The sample of what `load` and `augmentation` gave, on the black (height, width, 3) `canvas` of its batch."""
        augmentation.render(pixels, canvas)
        return {"image": canvas, "size": np.array((letterbox.width, letterbox.height)), "index": draw.place}

    def size(self, place: int) -> tuple[int, int] | None:
        """Width and height of the original image in pixels, from its header, which is read once; None without one."""
        if place not in self._sizes:
            try:
                self._sizes[place] = read_size(self.paths[place])
            except ImageError:
                self._sizes[place] = None
        return self._sizes[place]

    def elongation(self, draw: Draw) -> int:
        """Width less height of a padded sample: images of one image_size and like elongation have like shapes.

        An image without a readable header counts as a square.
        """
        resized = Letterbox(*(self.size(draw.place) or (1, 1)), self.side(draw.place)).resized
        height, width = self._canvas([self.augmentation(draw).size(*resized)], draw.side)
        return width - height

    def padded_shapes(self, draw: Draw) -> list[tuple[int, int]]:
        """(height, width) in pixels of a padded image, at image_size and at the further sizes."""
        size = self.size(draw.place) or (1, 1)
        shapes = []
        for image_size in (self.config.image_size, *self.further_sizes):
            side = inference_side(*size, image_size, self.config.enlarge)
            shapes.append(self._canvas([Letterbox(*size, side).resized], side))
        return shapes

    def _canvas(self, sizes: list[tuple[int, int]], side: int | None) -> tuple[int, int]:
        """(height, width) that holds images of these (width, height), none longer than `side` (config.image_size)."""
        if self.pad == "square":
            square = max(side or self.config.image_size, 2 * STRIDE)  # of one pixel, as below
            return square, square
        widths, heights = zip(*sizes, strict=True) if sizes else ((1,), (1,))
        height, width = padded(max(heights)), padded(max(widths))
        # At the coarsest stride a single pixel would be left, which a batch norm in training cannot normalize.
        return (2 * STRIDE, width) if height == width == STRIDE else (height, width)


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


class WordCounts(NamedTuple):
    """What training makes of the words of a data set, before any augmentation."""

    learned: int

    dont_care: int
    """masked, as their annotations say"""

    degenerate: int
    """masked, because they have fewer than three points or no area"""

    outside: int
    """left out, because they lie outside of their image"""

    def __str__(self) -> str:
        return (
            f"{self.learned} words are learned; masked: {self.dont_care} don't care and {self.degenerate} without "
            f"area; {self.outside} lie outside of their images"
        )


class TextDataset(ImageDataset):
    """A split of an annotated data set. For training (`train=True`) a sample is a dict of

    image: (height, width, 3) uint8 array, RGB, augmented; image_size x image_size with `config.pad` "square";
    prob_map: (height, width) uint8 array, 1 on text kernels;
    thresh_levels: (height, width) uint8 array, 0 to 255 for thresh_min to thresh_max;
    mask: (height, width) uint8 array, 0 on don't-care text and on what a cut has left of words;
    dropped: how many words are masked because they are degenerate or vanish when shrunk;
    side: the image size that the sample was made for;
    index, or `index` and `error`: as in ImageDataset, which is also the sample where `train` is false.

    The augmentation depends on the seed, the image, the epoch and the side alone, not on workers or order: sample `i`
    of epoch `e` is `dataset[e * len(dataset) + i]`. Decoded images are cached from the first epoch on.

    Raises UserError where the split is missing or its annotations are not of the form that the README shows.
    """

    def __init__(self, config: Config, split: str, train: bool) -> None:
        images, annotations, folder_sizes = read_split(config.data, split, config.format)
        super().__init__(list(images.values()), config, config.pad if train else "tight", list(images))
        self.train = train
        self.annotations = list(annotations.values())
        if train:
            self.words = Words.gather(self.annotations)
            self._folders = list(zip(folder_sizes, _folder_weights(config, len(folder_sizes)), strict=True))
            self._cache = PixelCache(len(images), config.image_size, config)

    def draws(self, epoch: int) -> list[Draw]:
        """The samples of an epoch: each image as often as config.data_weights says.

        With a weight of 2.3, each image of the folder twice and 0.3 of them once more. They take turns from epoch to
        epoch, in an order that depends on the seed alone, so that all come equally often over the epochs.
        """
        if not (self.train and self.config.data_weights):
            return super().draws(epoch)
        draws: list[Draw] = []
        first = 0
        for folder, (size, weight) in enumerate(self._folders):
            times = int(weight)
            draws += [Draw(first + i, epoch, repeat=repeat) for repeat in range(times) for i in range(size)]
            more = round((weight - times) * size)
            order = np.random.default_rng((self.config.seed, folder)).permutation(size)
            for i in order.take(range(epoch * more, (epoch + 1) * more), mode="wrap").tolist():
                draws.append(Draw(first + i, epoch, repeat=times))
            first += size
        return draws

    def count_words(self) -> WordCounts:
        """How many words are learned, and how many are not and why; of an image that cannot be read, none is outside.

        Raises UserError where there is nothing to learn.
        """
        words = self.words
        sizes = np.array([self.size(place) or (np.inf, np.inf) for place in range(len(self))])
        limits = np.repeat(sizes, np.diff(words.first_polygon), axis=0)  # (polygons, 2)
        clipped = np.clip(words.points, 0, np.repeat(limits, words.counts, axis=0))
        has_area = areas(words.points, words.counts) > 0
        outside = has_area & (areas(clipped, words.counts) == 0) & ~words.dont_care
        degenerate = ((words.counts < 3) | (areas(clipped, words.counts) < 1)) & ~outside & ~words.dont_care
        ignored, no_area, gone = (int(which.sum()) for which in (words.dont_care, degenerate, outside))
        counts = WordCounts(len(words.counts) - ignored - no_area - gone, ignored, no_area, gone)
        if not counts.learned:
            hint = "compare the annotations with the images; --show-samples draws them"
            raise UserError(f"{self.config.data}: there is nothing to learn: {counts}; {hint}")
        return counts

    def augmentation(self, draw: Draw) -> Augmentation:
        if not self.train:
            return super().augmentation(draw)
        seeds = (self.config.seed, draw.epoch, draw.place)
        rng = np.random.default_rng((*seeds, draw.repeat) if draw.repeat else seeds)
        return draw_augmentation(self.config, rng, draw.side)

    def side(self, place: int) -> int:
        return self.config.image_size if self.train else super().side(place)

    def load(self, place: int) -> tuple[np.ndarray, Letterbox]:
        if not self.train:
            return super().load(place)
        side = self.config.image_size
        stamped = stamp(self.paths[place])
        key = (*stamped, side) if stamped else None
        found = self._cache.load(place, key) if key else None
        if found:
            return found[0], Letterbox(*found[1], side)
        pixels, letterbox = super().load(place)
        if key:
            self._cache.store(place, key, pixels, (letterbox.width, letterbox.height))
        return pixels, letterbox

    def sample(
        self, draw: Draw, pixels: np.ndarray, letterbox: Letterbox, augmentation: Augmentation, canvas: np.ndarray
    ) -> dict[str, Any]:
        if not self.train:
            return super().sample(draw, pixels, letterbox, augmentation, canvas)
        height, width = canvas.shape[:2]
        augmentation.render(pixels, canvas)
        text, illegible, dropped = self.polygons(draw.place, letterbox, augmentation)
        prob_map, thresh_levels, lost = draw_targets(text, height, width, self.config.shrink_ratio)
        mask = polygon_mask(illegible + [text[index] for index in lost], height, width)
        return {
            "image": canvas,
            "prob_map": prob_map,
            "thresh_levels": thresh_levels,
            "mask": np.subtract(1, mask, out=mask),
            "dropped": dropped + len(lost),
            "side": draw.side or self.config.image_size,
            "index": draw.place,
        }

    def polygons(
        self, place: int, letterbox: Letterbox, augmentation: Augmentation
    ) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """Text polygons of a training sample, those to be masked, (n, 2) each, and how many of these are degenerate.

        Masked are don't-care and degenerate polygons, and words that the augmentation has cut; those that it has moved
        out of the image are gone.
        """
        points, counts, dont_care = self.words.of(place)
        points, is_degenerate = clip_polygons(points, counts, letterbox.width, letterbox.height)
        points = augmentation.move(letterbox.to_network(points), *letterbox.resized)
        visible = visible_shares(points, counts, *augmentation.size(*letterbox.resized))
        is_masked = dont_care | is_degenerate | (visible < MOSTLY_VISIBLE)
        is_gone = ~is_degenerate & (visible == 0)
        text: list[np.ndarray] = []
        masked: list[np.ndarray] = []
        for polygon, gone, mask in zip(split_polygons(points, counts), is_gone, is_masked, strict=True):
            if not gone:
                (masked if mask else text).append(polygon)
        return text, masked, int((is_degenerate & ~dont_care).sum())


@dataclass(eq=False)
class Batches:
    """Batches of Draws, each image once: in order, or with a seed, for training, shuffled anew for each epoch.

    The order depends on the seed and the epoch alone. Of several processes, each has every world_size-th batch. `start`
    batches of all of them are left out: those that an interrupted epoch has had. Where the data set pads tightly,
    images of like shape share a batch in training. Without a seed only images of one padded shape do, so that what is
    found in an image does not depend on the others. With config.train_sizes, one of them is drawn for each `accumulate`
    batches, those of an optimizer step.
    """

    dataset: ImageDataset
    batch_size: int
    seed: int | None = None
    accumulate: int = 1
    epoch: int = 0
    start: int = 0

    @property
    def samples(self) -> int:
        """How many samples an epoch has, over all processes."""
        return len(self.dataset.draws(self.epoch))

    def __len__(self) -> int:
        batches = -(-self.samples // self.batch_size)
        return len(range(self.start + rank(), batches, world_size()))

    def __iter__(self) -> Iterator[list[Draw]]:
        return islice(self._of_all_processes(), self.start + rank(), None, world_size())

    def _of_all_processes(self) -> Iterator[list[Draw]]:
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        sizes = self.dataset.config.train_sizes if rng else ()
        side = None
        for number, batch in enumerate(self._batches(rng)):
            if rng and sizes and number % self.accumulate == 0:
                side = min(int(rng.choice(sizes)), self.dataset.config.image_size)
            yield [draw._replace(side=side) for draw in batch]

    def _batches(self, rng: np.random.Generator | None) -> Iterator[list[Draw]]:
        epoch = self.dataset.draws(self.epoch)
        order = np.arange(len(epoch))
        if rng:
            rng.shuffle(order)
        together = self.batch_size * _LIKE_SHAPES_AMONG
        for start in range(0, len(order), together):
            draws = [epoch[i] for i in order[start : start + together].tolist()]
            if self.dataset.pad == "tight" and (rng or self.batch_size > 1):
                draws.sort(key=self.dataset.elongation)
            groups = [draws] if rng else [list(group) for _, group in groupby(draws, self.dataset.padded_shapes)]
            batches = [
                group[i : i + self.batch_size] for group in groups for i in range(0, len(group), self.batch_size)
            ]
            if rng:
                rng.shuffle(batches)
            yield from batches


class ArrayLoader:
    """Batches of arrays, read where and when they are asked for.

    A batch is a dict of the samples' arrays, stacked, and of `failed`, the (index, error) of the samples that could
    not be read; with no readable sample, `image` is missing.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for draws in self.batches:
            yield _collate(self.batches.dataset.__getitems__(draws), _stack)


def make_loader(batches: Batches, workers: int, pin_memory: bool) -> DataLoader:
    """The batches of ArrayLoader, but of tensors, loaded in `workers` processes that live as long as the loader."""
    import torch
    from torch.utils.data import DataLoader, default_collate

    if workers:
        _prepare_process()  # before workers are forked: one that inherits OpenCV's threads waits without end
    dataset: Any = batches.dataset  # has what a torch Dataset has, but is none: most uses of one need no PyTorch
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, stack=default_collate),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context=_START_METHOD if workers else None,
        worker_init_fn=_prepare_process,
        generator=torch.Generator(),  # else each pass draws from the one that the network's layers draw from
    )


def _prepare_process(_: int = 0) -> None:
    """Set up a process that loads images, or starts such processes.

    The workers are the parallelism; threads would compete for the same cores. Tensors travel by the names of files in
    shared memory: by default each holds a descriptor in both processes, and a long accumulation needs thousands.
    """
    import torch.multiprocessing

    cv2.setNumThreads(1)
    keep_freed_memory()
    torch.multiprocessing.set_sharing_strategy("file_system")


def describe_failure(error: BaseException) -> str:
    """One line on an error that comes from the workers of a loader, with what to do about it."""
    text = str(error)
    if "Bus error" in text or "shared memory" in text or "torch_shm" in text or "/torch_" in text:
        return (
            "the data workers have no shared memory left; in Docker give the container more (--shm-size 8g), or use "
            "--workers 0"
        )
    if is_out_of_memory(error):
        return "the data workers have no memory left; lower --workers, or use --workers 0"
    return f"{text.strip().splitlines()[-1]}; if memory is short, lower --workers, or use --workers 0"


def _folder_weights(config: Config, folders: int) -> tuple[float, ...]:
    """The weight of each folder of --data. Raises UserError where there is not one for each."""
    if config.data_weights and len(config.data_weights) != folders:
        weights = ",".join(f"{weight:g}" for weight in config.data_weights)
        raise UserError(f"--data-weights {weights}: must be a number for each of the {folders} folders of --data")
    return config.data_weights or (1.0,) * folders


def count_workers(config: Config) -> int:
    """Loader processes of `--workers`, where -1 means one a core, at most 8."""
    if config.workers >= 0:
        return config.workers
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun has started on these cores
    return max(1, min(8, count_cores() // sharing))


def count_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` by `workers` spawned processes, which share neither threads nor a GPU with this one; below 2, by this one.

    OpenCV has one thread in each of them. Results come in the order of `items`.
    """
    if workers < 2:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), cv2.setNumThreads, (1,)) as processes:
        yield from processes.map(function, items)


def _collate(samples: list[dict[str, Any]], stack: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    readable = [sample for sample in samples if "error" not in sample]
    batch = stack(readable) if readable else {}
    batch["failed"] = [(sample["index"], sample["error"]) for sample in samples if "error" in sample]
    return batch


def _stack(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
