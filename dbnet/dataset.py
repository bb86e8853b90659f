"""Samples: an image resized and padded, and for training its augmentation and target maps; and their batches.

All are numpy arrays; only `make_loader`, whose batches are tensors, needs PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import compress, groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from dbnet.annotations import Annotation
from dbnet.augment import Augmentation, draw_augmentation
from dbnet.config import STRIDE, Config
from dbnet.device import keep_freed_memory, rank, world_size
from dbnet.errors import ImageError, UserError, is_out_of_memory
from dbnet.files import stamp
from dbnet.geometry import Letterbox, areas, inference_side, is_tangled, padded, split_polygons
from dbnet.images import file_of, read_image, read_size
from dbnet.splits import check_scorable, read_split
from dbnet.targets import MAX_EFFORT, draw_targets, effort_of, polygon_mask
from dbnet.targets import make_targets as make_targets  # its home for those who import it

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

Sample = dict[str, Any]
Batch = dict[str, Any]  # of samples: their arrays or tensors by name, stacked

# Forked workers share the annotations. Elsewhere than on Linux forking is not safe, or there is no such thing.
_START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else "spawn"
_MIN_FREE = 1 << 28  # bytes of the disk that the cache leaves to others
_LIKE_SHAPES_AMONG = 16  # batches whose images are sorted by shape: few, so that the order stays random
MOSTLY_VISIBLE = 0.9  # share of a word's area in an augmented image; with less, it is masked


class PixelCache:
    """A slot for the decoded pixels of each image, in one temporary file that all workers map into memory. It takes at
    most config.cache_gb and half of the free space there; images beyond that are not cached. Where workers are forked,
    the file has no name and vanishes with the last of them; else the process that made it removes it."""

    def __init__(self, images: int, config: Config) -> None:
        slot = np.dtype([("key", "i8", 3), ("size", "i8", 2), ("pixels", "u1", 3 * config.image_size**2)])
        self._slots: np.ndarray = np.empty(0, slot)
        self._file = ""
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

    def _remove(self) -> None:
        with suppress(OSError):
            os.unlink(self._file)
        self._file = ""

    def __del__(self) -> None:
        self._slots = np.empty(0)  # Windows removes no file that is mapped
        self._remove()

    def __getstate__(self) -> tuple[str, np.dtype]:
        """For a process that is spawned: it maps the file by its name."""
        return self._file if len(self._slots) else "", self._slots.dtype

    def __setstate__(self, state: tuple[str, np.dtype]) -> None:
        file, slot = state
        self._file = ""  # the process that made it removes it
        self._slots = np.asarray(np.memmap(file, slot, "r+")) if file else np.empty(0, slot)

    def load(self, index: int, key: list[int]) -> tuple[np.ndarray, Letterbox] | None:
        """What is stored for an image under this key, to be read only, or None."""
        if index >= len(self._slots) or self._slots[index]["key"].tolist() != key:
            return None
        original_width, original_height = self._slots[index]["size"].tolist()
        letterbox = Letterbox(original_width, original_height, key[-1])
        width, height = letterbox.resized
        return self._slots[index]["pixels"][: height * width * 3].reshape(height, width, 3), letterbox

    def store(self, index: int, key: list[int], pixels: np.ndarray, letterbox: Letterbox) -> None:
        """Keep a resized image under a key of what it is made from; the last is the side that it is resized to."""
        if index >= len(self._slots):
            return
        if _free_bytes() < _MIN_FREE + self._slots.itemsize:
            self._slots = np.empty(0, self._slots.dtype)  # writing to a mapped file on a full disk ends the process
            print(f"\nimages are no longer cached ({tempfile.gettempdir()} is nearly full)", file=sys.stderr)
            return
        slot = self._slots[index]
        slot["key"] = 0  # a slot half written does not count
        slot["pixels"][: pixels.size] = pixels.reshape(-1)
        slot["size"] = letterbox.width, letterbox.height
        slot["key"] = key


def _free_bytes() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free


class Draw(NamedTuple):
    """Which sample: all that its content depends on, beside the configuration."""

    place: int  # of the image in the data set
    epoch: int = 0
    side: int | None = None  # its image_size in pixels; None is config.image_size
    repeat: int = 0  # how often the image has come in this epoch before


class ImageDataset:
    """Images to detect text in, each with a path and a name of its own. A sample is a dict of

    image: (height, width, 3) uint8 array, RGB: the image with its longer side resized to image_size, in the top-left
        corner; below and beside it is black up to the next multiple of 32, or what the rest of its batch needs;
    image_SIDE: for each SIDE of `further_sizes`, what `image` is at that image_size;
    size: (2,) int64 array, width and height of the original image in pixels;
    index: its place in `paths`;

    or of `index` and `error`, a line of text, for an image that cannot be read."""

    pad = "tight"  # or "square": all samples are image_size x image_size

    def __init__(self, paths: Sequence[Path], config: Config) -> None:
        self.paths, self.names = list(paths), [path.name for path in paths]
        self.config = config
        self.further_sizes: tuple[int, ...] = ()
        self._sizes: dict[int, tuple[int, int] | None] = {}
        keep_freed_memory()  # loading allocates and frees thousands of large arrays

    def __len__(self) -> int:
        return len(self.paths)

    def draws(self, epoch: int) -> list[Draw]:
        """The samples of an epoch: each image once."""
        return [Draw(place, epoch) for place in range(len(self))]

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; of an augmented split, that of epoch `index // len(self)`."""
        epoch, place = divmod(index, len(self))
        return self.__getitems__([Draw(place, epoch)])[0]

    def __getitems__(self, draws: list[Draw]) -> list[Sample]:
        """The samples of a batch, all of one shape. (The data loader looks for this name.)"""
        samples = self._at_one_size(draws)
        for side in self.further_sizes:
            others = self._at_one_size([draw._replace(side=side) for draw in draws])
            for sample, other in zip(samples, others, strict=True):
                sample.update({"error": other["error"]} if "error" in other else {f"image_{side}": other["image"]})
        return samples

    def batch(self, draws: list[Draw]) -> Batch:
        """The samples' arrays, stacked, and `failed`, the (index, error) of each sample that could not be read. With no
        readable sample, `image` is missing."""
        return _collate(self.__getitems__(draws), np.stack)

    def _at_one_size(self, draws: list[Draw]) -> list[Sample]:
        loaded, samples = [], [Sample(index=draw.place) for draw in draws]
        for draw, sample in zip(draws, samples, strict=True):
            try:
                loaded.append((draw, sample, *self.load(draw), self.augmentation(draw)))
            except ImageError as error:
                sample["error"] = str(error)
        sizes = [augmentation.size(*letterbox.resized) for *_, letterbox, augmentation in loaded]
        shape = self._padded(sizes, draws[0].side)
        for draw, sample, pixels, letterbox, augmentation in loaded:
            sample["image"] = np.zeros((*shape, 3), np.uint8)
            augmentation.render(pixels, sample["image"])
            sample |= self.labels(draw, letterbox, augmentation, shape)
        return samples

    def load(self, draw: Draw) -> tuple[np.ndarray, Letterbox]:
        """The resized image, (height, width, 3) uint8 RGB, and how it was resized. Raises ImageError."""
        side = self.side(draw)
        pixels, size = self.read(draw.place, side)
        letterbox = Letterbox(*size, side)
        return letterbox.resize(pixels), letterbox

    def read(self, place: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        """What `read_image` gives; inference reads images in memory too."""
        return read_image(self.paths[place], side)

    def side(self, draw: Draw) -> int:
        """Longer side in pixels of the resized image; one that cannot be read counts as a square."""
        image_size = draw.side or self.config.image_size
        return inference_side(*(self.size(draw.place) or (image_size, image_size)), image_size, self.config.enlarge)

    def augmentation(self, draw: Draw) -> Augmentation:
        """The augmentation of a sample in addition to resizing and padding: here, none."""
        return Augmentation()

    def labels(self, draw: Draw, letterbox: Letterbox, augmentation: Augmentation, shape: tuple[int, int]) -> Sample:
        """What a sample of this padded (height, width) has beside the image."""
        return {"size": np.array((letterbox.width, letterbox.height))}

    def size(self, place: int) -> tuple[int, int] | None:
        """Width and height of the original image in pixels, from its header, which is read once; None without one."""
        if place not in self._sizes:
            self._sizes[place] = None
            with suppress(ImageError):
                self._sizes[place] = read_size(self.paths[place])
        return self._sizes[place]

    def shapes(self, draw: Draw) -> list[tuple[int, int]]:
        """`shape` at image_size and at each of the further sizes."""
        return [self.shape(draw._replace(side=side)) for side in (None, *self.further_sizes)]

    def shape(self, draw: Draw) -> tuple[int, int]:
        """(height, width) of a padded sample in pixels, from the header; without one, it counts as a square."""
        resized = Letterbox(*(self.size(draw.place) or (1, 1)), self.side(draw)).resized
        return self._padded([self.augmentation(draw).size(*resized)], draw.side)

    def _padded(self, sizes: list[tuple[int, int]], side: int | None) -> tuple[int, int]:
        """(height, width) that holds images of these (width, height), none longer than `side` (config.image_size): more
        than one pixel at the coarsest stride, because a batch norm in training cannot normalize a single one."""
        if self.pad == "square":
            square = max(side or self.config.image_size, 2 * STRIDE)
            return square, square
        width, height = (padded(max(lengths)) for lengths in zip((1, 1), *sizes, strict=True))
        return (2 * STRIDE, width) if height == width == STRIDE else (height, width)


def gather_words(annotation: Annotation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The polygons of an image in three arrays: points (total, 2), number of points of each, don't-care flags. Forked
    workers share them with their parent; polygons in a list would be copied when their references are counted."""
    points = np.concatenate([np.empty((0, 2)), *annotation.polygons])
    return points, np.array([*map(len, annotation.polygons)], int), np.array(annotation.dont_care, bool)


class TextDataset(ImageDataset):
    """A split of an annotated data set. Without `train` its samples are those of ImageDataset, else dicts of

    image: (height, width, 3) uint8 array, RGB, augmented; image_size x image_size with `config.pad` "square";
    prob_map: (height, width) uint8 array, 1 on text kernels;
    thresh_levels: (height, width) uint8 array, 0 to 255 for thresh_min to thresh_max;
    mask: (height, width) uint8 array, 0 on don't-care or degenerate text and on what a cut has left of words;
    side: the image size that the sample was made for;
    index, or `index` and `error`: as in ImageDataset.

    The augmentation depends on the seed, the image, the epoch and the side alone, not on workers or order. Decoded
    images are cached from the first epoch on. Raises UserError for a split or annotations that cannot be read."""

    def __init__(self, config: Config, split: str, train: bool) -> None:
        images, annotations, self._folder_sizes = read_split(config.data, split, config.format)
        super().__init__(list(images.values()), config)
        self.train, self.names, self.annotations = train, list(images), list(annotations.values())
        self._sizes = {place: annotation.size for place, annotation in enumerate(self.annotations)}
        if not train:
            sizes = map(self.size, range(len(self)))  # read until one word counts
            check_scorable(config.data, split, zip(self.annotations, sizes, strict=True))
        else:
            self.pad = config.pad
            self.words = [gather_words(annotation) for annotation in self.annotations]
            self._cache = PixelCache(len(images), config)
            weights, folders = config.data_weights, len(self._folder_sizes)
            if weights and len(weights) != folders:
                given = ",".join(f"{weight:g}" for weight in weights)
                raise UserError(f"--data-weights {given}: must be a number for each of the {folders} folders of --data")

    def draws(self, epoch: int) -> list[Draw]:
        """The samples of an epoch: each image as often as config.data_weights says. With a weight of 2.3, each image of
        the folder twice and 0.3 of them once more, which take turns from epoch to epoch in an order by the seed."""
        if not (self.train and self.config.data_weights):
            return super().draws(epoch)
        draws: list[Draw] = []
        for folder, (size, weight) in enumerate(zip(self._folder_sizes, self.config.data_weights, strict=True)):
            first, more = sum(self._folder_sizes[:folder]), round(weight % 1 * size)
            order = np.random.default_rng((self.config.seed, folder)).permutation(size)
            once_more = order.take(range(epoch * more, (epoch + 1) * more), mode="wrap").tolist()
            for repeat, places in enumerate([*[range(size)] * int(weight), once_more]):
                draws += [Draw(first + place, epoch, repeat=repeat) for place in places]
        return draws

    def count_words(self) -> str:
        """A line on how many words are learned, before any augmentation, and how many are not and why. Raises UserError
        where there is nothing to learn."""
        points, counts, dont_care = map(np.concatenate, zip(*self.words, strict=True))
        sizes = [self.size(place) or (np.inf, np.inf) for place in range(len(self))]  # unreadable: no word is outside
        limits = np.repeat(sizes, [len(points) for points, _, _ in self.words], axis=0)
        size_of_each = np.repeat(sizes, [len(counts) for _, counts, _ in self.words], axis=0)
        visible = areas(np.clip(points, 0, limits), counts)
        outside = (areas(points, counts) > 0) & (visible == 0) & ~dont_care
        is_too_much = (
            is_tangled(each) or (len(each) > MAX_EFFORT and effort_of(each, size) > MAX_EFFORT)
            for each, size in zip(split_polygons(points, counts), size_of_each, strict=True)
        )
        degenerate = (counts < 3) | (visible < 1) | np.fromiter(is_too_much, bool, len(counts))
        degenerate &= ~outside & ~dont_care
        learned = len(counts) - int((dont_care | degenerate | outside).sum())
        masked = f"{dont_care.sum()} don't care, {degenerate.sum()} without area, tangled or of too many points"
        line = f"{learned} words are learned; masked: {masked}; {outside.sum()} lie outside of their images"
        if not learned:
            hint = "compare the annotations with the images; --show-samples draws them"
            raise UserError(f"{self.config.data}: there is nothing to learn: {line}; {hint}")
        return line

    def augmentation(self, draw: Draw) -> Augmentation:
        if not self.train:
            return super().augmentation(draw)
        seeds = [self.config.seed, draw.epoch, draw.place] + [draw.repeat] * (draw.repeat > 0)
        return draw_augmentation(self.config, np.random.default_rng(seeds), draw.side)

    def side(self, draw: Draw) -> int:
        return self.config.image_size if self.train else super().side(draw)

    def load(self, draw: Draw) -> tuple[np.ndarray, Letterbox]:
        if not self.train:
            return super().load(draw)
        key = [*(stamp(file_of(self.paths[draw.place])) or (0, 0)), self.side(draw)]
        found = self._cache.load(draw.place, key)
        if not found:
            found = super().load(draw)
            self._cache.store(draw.place, key, *found)
        return found

    def labels(self, draw: Draw, letterbox: Letterbox, augmentation: Augmentation, shape: tuple[int, int]) -> Sample:
        if not self.train:
            return super().labels(draw, letterbox, augmentation, shape)
        text, masked = self.polygons(draw.place, letterbox, augmentation)
        prob_map, thresh_levels, lost = draw_targets(text, *shape, self.config.shrink_ratio)
        mask = polygon_mask(masked + [text[index] for index in lost], *shape)
        maps = {"prob_map": prob_map, "thresh_levels": thresh_levels, "mask": np.subtract(1, mask, out=mask)}
        return {**maps, "side": draw.side or self.config.image_size}

    def polygons(self, place: int, letterbox: Letterbox, augmentation: Augmentation) -> tuple[list, list]:
        """Text polygons of a training sample, and those to be masked, (n, 2) each. Masked are don't-care and degenerate
        polygons, and words that the augmentation has cut; those that it has moved out of the image are gone."""
        points, counts, dont_care = self.words[place]
        points = points.clip(0, (letterbox.width, letterbox.height))
        is_degenerate = (counts < 3) | (areas(points, counts) < 1)
        points = augmentation.move(letterbox.to_network(points), *letterbox.resized)
        inside = points.clip(0, augmentation.size(*letterbox.resized))
        visible = areas(inside, counts) / np.maximum(areas(points, counts), 1e-9)  # of upright rectangles, the share
        is_masked = dont_care | is_degenerate | (visible < MOSTLY_VISIBLE)
        is_there = is_degenerate | (visible > 0)
        polygons = split_polygons(points, counts)
        return list(compress(polygons, is_there & ~is_masked)), list(compress(polygons, is_there & is_masked))


@dataclass(eq=False)
class Batches:
    """Batches of Draws, each image once: in order, or with a seed, for training, in an order for each epoch.

    Of several processes, each has every world_size-th batch. `start` batches of all of them are left out: those that an
    interrupted epoch has had. Where the data set pads tightly, images of like shape share a batch in training. Without
    a seed only images of one padded shape do, so that what is found in an image does not depend on the others. With
    config.train_sizes, one of them is drawn for each `accumulate` batches, those of an optimizer step."""

    dataset: ImageDataset
    batch_size: int
    seed: int | None = None
    accumulate: int = 1
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        batches = -(-len(self.dataset.draws(self.epoch)) // self.batch_size)
        return len(range(self.start + rank(), batches, world_size()))

    def __iter__(self) -> Iterator[list[Draw]]:
        return islice(self._of_all_processes(), self.start + rank(), None, world_size())

    def _of_all_processes(self) -> Iterator[list[Draw]]:
        dataset, draws = self.dataset, self.dataset.draws(self.epoch)
        sizes = dataset.config.train_sizes
        rng = None if self.seed is None else np.random.default_rng((self.seed, self.epoch))
        if rng:
            rng.shuffle(draws)
        number, side = 0, None
        for together in _pieces(draws, self.batch_size * _LIKE_SHAPES_AMONG):
            if dataset.pad == "tight" and (rng or self.batch_size > 1):
                together.sort(key=lambda draw: int(np.diff(dataset.shape(draw))[0]))  # width - height
            groups = [together] if rng else [list(group) for _, group in groupby(together, dataset.shapes)]
            batches = [batch for group in groups for batch in _pieces(group, self.batch_size)]
            if rng:
                rng.shuffle(batches)
            for batch in batches:
                if rng and sizes and number % self.accumulate == 0:
                    side = min(int(rng.choice(sizes)), dataset.config.image_size)
                number += 1
                yield [draw._replace(side=side) for draw in batch]


def _pieces(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def make_loader(batches: Batches, workers: int, pin_memory: bool) -> DataLoader:
    """Batches as of `ImageDataset.batch`, but of tensors, loaded in processes that live as long as the loader."""
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


def _collate(samples: list[Sample], stack: Callable[[list[Any]], Any]) -> Batch:
    readable = [sample for sample in samples if "error" not in sample]
    batch = {name: stack([sample[name] for sample in readable]) for name in (readable[0] if readable else ())}
    batch["failed"] = [(sample["index"], sample["error"]) for sample in samples if "error" in sample]
    return batch


def _prepare_process(_: int = 0) -> None:
    """Set up a process that loads images, with one thread, or starts such processes. Tensors travel by the names of
    files in shared memory: by default each holds a descriptor in both processes, of which there are too few."""
    import torch.multiprocessing

    cv2.setNumThreads(1)
    keep_freed_memory()
    torch.multiprocessing.set_sharing_strategy("file_system")


def load_batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader. Raises UserError where its workers have died or memory is short, with what to do."""
    try:
        batches = iter(loader)
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            # When a worker dies, PyTorch's handler raises an error at any place in the main thread. Without the
            # handler, the death is noticed here, where the loader waits for the next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except (RuntimeError, OSError, MemoryError) as error:
        text = str(error)
        if "Shared memory manager connection has timed out" in text:
            reason = "a data worker waited too long for shared memory, on a machine with too much to do; go on later"
        elif re.search(r"Bus error|shared memory|torch_shm|/torch_|No space left|Read-only|^\[Errno 2\] [^:]*$", text):
            reason = "the data workers have no shared memory left; in Docker give the container more (--shm-size 8g)"
        elif is_out_of_memory(error):
            reason = "not enough memory to read images; close other programs, lower --workers"
        elif re.search(r"DataLoader worker \(pid|Too many open files", text):
            reason = f"{text.strip().splitlines()[-1]}; if memory is short, lower --workers"
        else:
            raise
        raise UserError(f"{reason}, or use --workers 0") from None


def count_workers(config: Config) -> int:
    """Loader processes of `--workers`, where -1 means one a core, at most 8."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun has started on these cores
    return config.workers if config.workers >= 0 else max(1, min(8, count_cores() // sharing))


def count_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map` by `workers` spawned processes, with one thread of OpenCV in each; below 2, by this one."""
    if workers < 2:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), cv2.setNumThreads, (1,)) as processes:
        yield from processes.map(function, items)
