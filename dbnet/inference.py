"""From image files to polygons: the one path that validation, evaluate.py, predict.py and `Detector` share."""

from __future__ import annotations

import io
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import cv2
import numpy as np
from PIL import Image, ImageOps

from dbnet.config import NETWORK_FIELDS, Config
from dbnet.dataset import ArrayLoader, Batches, ImageDataset, count_cores, count_workers, make_loader
from dbnet.errors import ImageError, UserError, library_errors, one_line
from dbnet.files import write_whole
from dbnet.geometry import Letterbox, inference_side, windows
from dbnet.images import to_rgb
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.postprocess import extract_polygons

if TYPE_CHECKING:
    from dbnet.model import DBNet

OPSET = 17
CONFIG_KEY = "dbnet_config"


class OnnxNetwork:
    """An exported network on the CPU, as `inference.Pipeline` runs it (an `inference.Network`)."""

    device = "cpu"

    def __init__(self, path: Path, changes: dict[str, Any]) -> None:
        """Load `path`, with `changes` made to the configuration that it holds.

        Raises UserError where the file is missing, damaged, or not one that `export.py` wrote, where `changes` ask for
        what it cannot do, or ONNX Runtime is not installed.
        """
        onnxruntime = _import("onnxruntime")
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = count_cores()  # by itself it takes those of the machine
        with library_errors(f"{path}: not an ONNX file, or a damaged one"):
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            trained = Config.from_dict(json.loads(metadata[CONFIG_KEY]))
        except (KeyError, ValueError, TypeError, AttributeError, UserError):
            raise UserError(f"{path}: holds no configuration of this dbnet; export it with export.py") from None
        self.config = trained.changed(**changes)
        if self.config.tta:
            raise UserError(f"{path}: --tta needs the checkpoint; a .onnx file looks at an image once")
        if not self.config.device.startswith(("auto", "cpu")):
            raise UserError(f"--device {self.config.device}: {path} runs on the CPU; use auto or cpu")
        for name in NETWORK_FIELDS:
            if getattr(trained, name) != getattr(self.config, name):
                raise UserError(f"--{name.replace('_', '-')}: the network of {path} is what it is; leave it out")
        self.sides = (self.config.image_size,)

    def __str__(self) -> str:
        return f"{self.config.backbone}, {self.config.image_size} px, ONNX Runtime"

    def infer(
        self, images: Sequence[np.ndarray], sizes: list[tuple[int, int]], plan: BatchPlan
    ) -> Callable[[], np.ndarray]:
        """As `inference.Network` says; the work is done when this returns."""
        prob_maps = np.concatenate(
            [
                np.rint(255 * np.nan_to_num(self.look(images[0][start : start + plan.micro_batch])))
                for start in range(0, len(sizes), plan.micro_batch)
            ]
        ).astype(np.uint8)
        return lambda: prob_maps

    def look(self, images: np.ndarray) -> np.ndarray:
        """As `probabilities`; images longer than image_size are seen in windows, as `ensemble.look` does."""
        axis = 1 if images.shape[1] > images.shape[2] else 2
        images, maps = np.moveaxis(images, axis, 1), []
        for window in windows(images.shape[1], self.config.image_size):
            prob_maps = self.probabilities(np.moveaxis(images[:, window.start : window.stop], 1, axis))
            kept = slice(window.kept_from - window.start, window.kept_to - window.start)
            maps.append(np.moveaxis(prob_maps, axis, 1)[:, kept])
        return np.moveaxis(np.concatenate(maps, axis=1), 1, axis)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, height, width) float32 of (N, height, width, 3) uint8 images. Raises RuntimeError."""
        try:
            return self.session.run(None, {"images": np.ascontiguousarray(images)})[0]
        except Exception as error:  # of classes of ONNX Runtime's own, which dbnet.memory does not know
            raise RuntimeError(one_line(error)) from error


def write_onnx(path: Path, model: DBNet, config: Config) -> None:
    """Write a network in eval mode, on the CPU, with its configuration; whole or not at all.

    Raises UserError where the file cannot be written or the `onnx` package is not installed.
    """
    import torch

    onnx = _import("onnx")
    example = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    axes = {0: "batch", 1: "height", 2: "width"}
    file: Any = io.BytesIO()  # the exporter takes it, though its signature names paths alone
    with warnings.catch_warnings():
        # The exporter by tracing is called deprecated, but the network is a plain graph, and its successor takes six
        # times as long, one package more, and puts the weights into a file of their own.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["prob_maps"],
            dynamic_axes={"images": axes, "prob_maps": axes},
        )
    graph = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(graph, {CONFIG_KEY: json.dumps(config.to_dict())})
    onnx.checker.check_model(graph)
    with write_whole(path) as output:
        output.write(graph.SerializeToString())


def _import(name: str) -> Any:
    """A package of the `onnx` extra. Raises UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install {name}") from None


if TYPE_CHECKING:
    import torch

_WAITING_IMAGES = 64  # on a GPU, more maps than this do not wait for their polygons; then the network does


@dataclass(frozen=True)
class Detection:
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

    size: tuple[int, int] | None = None
    """(width, height) in pixels of the upright original; None where it could not be read"""


@dataclass(frozen=True)
class Pending:
    """A Detection whose polygons are being made."""

    index: int
    size: tuple[int, int]
    prob_map: np.ndarray
    future: Future[tuple[list[np.ndarray], list[float]]]

    def result(self) -> Detection:
        """Wait for it."""
        return Detection(self.index, *self.future.result(), self.prob_map, None, self.size)


class Network(Protocol):
    """What makes probability maps: an `ensemble.Ensemble` of checkpoints, or an `onnx.OnnxNetwork`."""

    @property
    def config(self) -> Config:
        """The configuration that it was trained with, as the user changed it."""

    @property
    def device(self) -> torch.device | str:
        """Where it runs; `str` of it begins with cpu or cuda."""

    @property
    def sides(self) -> tuple[int, ...]:
        """The image sizes that it looks at, config.image_size first."""

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
    return OnnxNetwork(paths[0], changes)


def shipped_weights() -> Path:
    """The trained `lite` that comes with the program. Raises UserError where it does not."""
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):  # installed, and in a checkout
        if (folder / "lite.pt").is_file():
            return folder / "lite.pt"
    raise UserError("weights/lite.pt: is missing from this copy of dbnet; name a checkpoint, or train one")


class InlineExecutor(Executor):
    """Runs a call when it is submitted, in the calling thread: where another process would gain nothing."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
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
        self.batch_size = config.batch_size if self.on_gpu else 1  # a CPU gains nothing by more
        self.loader: Iterable[dict[str, Any]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._extractors: Executor = ProcessPoolExecutor(self.workers) if self.workers else InlineExecutor()

    def detect(self, network: Network) -> Iterator[Detection]:
        """Every image of the data set exactly once, in the order in which they are done; of several processes that
        torchrun has started, each has its share.

        When memory runs out the batch is halved for the rest of the images. Raises ImageError for an image that cannot
        be read where config.strict is set; else its Detection has an `error`.
        """
        plan = BatchPlan(self.batch_size)
        waiting: deque[Pending] = deque()
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
            while waiting and (len(waiting) > _WAITING_IMAGES or waiting[0].future.done()):
                yield waiting.popleft().result()
            batch = following.result() if following else None
        for pending in waiting:
            yield pending.result()

    def _load(self, further_sizes: tuple[int, ...]) -> Iterable[dict[str, Any]]:
        """The batches, with the images at these sizes too."""
        if self.loader is None or self.dataset.further_sizes != further_sizes:
            self.dataset.further_sizes = further_sizes
            batches = Batches(self.dataset, self.batch_size)
            self.loader = make_loader(batches, self.workers, pin_memory=True) if self.on_gpu else ArrayLoader(batches)
        return self.loader

    def _extract(self, batch: dict[str, Any], prob_maps: Callable[[], np.ndarray]) -> Iterator[Pending]:
        """Start on the polygons of each image of a batch."""
        for index, size, prob_map in zip(batch["index"].tolist(), batch["size"].tolist(), prob_maps(), strict=True):
            width, height = resized_as(size, self.config).resized
            prob_map = prob_map[:height, :width]
            future = self._extractors.submit(polygons_of, prob_map, size, self.config)
            yield Pending(index, (size[0], size[1]), prob_map, future)


def polygons_of(prob_map: np.ndarray, size: tuple[int, int], config: Config) -> tuple[list[np.ndarray], list[float]]:
    """Polygons in pixels of the original image and their scores.

    Args:
        prob_map: (height, width) uint8, probability x 255, of the resized image without its padding.
        size: (width, height) of the original image.
    """
    width, height = size
    letterbox = resized_as(size, config)
    looks = len(windows(letterbox.side, config.image_size))  # of a long image as many candidates in each window
    config = config.changed(max_candidates=looks * config.max_candidates) if looks > 1 else config
    return extract_polygons(prob_map, config, tuple(1 / letterbox.scale), (width, height))


def resized_as(size: Sequence[int], config: Config) -> Letterbox:
    """How an image of (width, height) pixels is resized for the network."""
    width, height = size
    return Letterbox(width, height, inference_side(width, height, config.image_size, config.enlarge))


Picture = str | Path | np.ndarray | Image.Image


class Text(NamedTuple):
    """One detected piece of text."""

    polygon: np.ndarray
    """(n, 2) int array, x and y in pixels of the upright image"""

    score: float
    """mean probability inside the polygon's region, 0..1"""


class Detector:
    """A trained network with its configuration, ready for images.

    An image is a file, a Pillow image of any mode, or an array of (height, width, 3) uint8 pixels. Files and Pillow
    images are turned upright by their EXIF orientation. Arrays are taken to stand upright, and to be RGB: for those of
    OpenCV, which are BGR, say `bgr=True`.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.config = network.config

    @classmethod
    def load(
        cls, path: str | Path | Sequence[str | Path] | None = None, device: str | None = None, **changes: Any
    ) -> Self:
        """Load a checkpoint or an exported .onnx file; of several checkpoints, the probability maps are averaged.

        Without a path, the weights that come with the program. `device` is auto, cpu, cuda or cuda:N (auto); fields of
        the configuration are changed by keyword, e.g. `box_thresh=0.4, tta=True`.

        Raises UserError where a file is no checkpoint, the device does not exist, or a field does not take the value.
        """
        if path is None:
            path = shipped_weights()
        paths = [path] if isinstance(path, str | Path) else path
        return cls(load_network([Path(each) for each in paths], changes | {"device": device or "auto"}))

    def detect(self, image: Picture, bgr: bool = False) -> list[Text]:
        """Text in an image, best first.

        Raises UserError for a file that cannot be read or an array of another kind.
        """
        return self.detect_batch([image], bgr)[0]

    def detect_batch(self, images: Sequence[Picture], bgr: bool = False) -> list[list[Text]]:
        """The text in each of the images, in their order; images of like shape go through the network together.

        Raises as `detect` does.
        """
        found: list[list[Text]] = [[] for _ in images]
        for detection in self._run(images, bgr):
            found[detection.index] = [Text(*each) for each in zip(detection.polygons, detection.scores, strict=True)]
        return found

    def prob_map(self, image: Picture, bgr: bool = False) -> np.ndarray:
        """(height, width) uint8, the probability of text x 255, of the image resized to image_size at its longer side.

        Raises as `detect` does.
        """
        [detection] = self._run([image], bgr)
        assert detection.prob_map is not None  # as an image that cannot be read raises
        return detection.prob_map.copy()

    def _run(self, images: Sequence[Picture], bgr: bool) -> Iterator[Detection]:
        config = self.config.changed(workers=0, strict=True)  # processes would take longer to start than they save
        return Pipeline(_Pictures(images, config, bgr), config, self.network.device).detect(self.network)


class _Pictures(ImageDataset):
    """Images that are in memory, or in files."""

    def __init__(self, images: Sequence[Picture], config: Config, bgr: bool) -> None:
        in_files = [image if isinstance(image, str | Path) else "" for image in images]
        super().__init__(list(map(Path, in_files)), config)
        self.pixels = {
            place: _pixels(image, bgr) for place, image in enumerate(images) if not isinstance(image, str | Path)
        }
        self._sizes = {place: pixels.shape[1::-1] for place, pixels in self.pixels.items()}

    def load(self, place: int) -> tuple[np.ndarray, Letterbox]:
        if place not in self.pixels:
            return super().load(place)
        pixels = self.pixels[place]
        letterbox = resized_as(pixels.shape[1::-1], self.config)
        return letterbox.resize(pixels), letterbox


def _pixels(image: np.ndarray | Image.Image, bgr: bool) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright."""
    if isinstance(image, Image.Image):
        with library_errors(f"{image}: cannot be decoded"):  # Pillow decodes only now
            return to_rgb(ImageOps.exif_transpose(image))
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        kind = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"takes a file, a Pillow image or (height, width, 3) uint8 RGB pixels, not {kind}")
    if not image.size:
        raise UserError(f"takes an image with pixels in it, not {image.shape}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if bgr else image
