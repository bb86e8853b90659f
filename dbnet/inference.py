"""From image files to polygons: the one path that validation, evaluate.py, predict.py and `Detector` share."""

from __future__ import annotations

import io
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import cv2
import numpy as np
from PIL import Image, ImageOps

from dbnet.config import MAX_IMAGE_SIZE, NETWORK_FIELDS, STRIDE, Config
from dbnet.dataset import Batches, Draw, ImageDataset, count_cores, count_workers, load_batches, make_loader
from dbnet.errors import ABANDONED, ImageError, UserError, is_out_of_memory, library_errors, printable
from dbnet.files import check_regular, write_whole
from dbnet.geometry import ZOOM, Letterbox, in_windows, inference_side, median_length, padded, tall_share, windows
from dbnet.images import Size, list_pages, read_image, read_size, to_rgb
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.postprocess import corners, extract_polygons

if TYPE_CHECKING:
    import torch

    from dbnet.model import DBNet

OPSET = 17
CONFIG_KEY = "dbnet_config"
_EXPORT_ANEW = "export it with export.py"
_SLOWEST = 60  # seconds in which the largest network loads, or sees a megapixel on a slow core
SOME_TALL = 0.1  # share of tall words above which a page may lie on its side. Upright pages have 0.03
SHORT = 1.75  # median length of words, in their heights, below which it may, too: bits of its lines are found
MARGIN = 48  # pixels around the text, at least, that a closer look at small text sees
FEW_WORDS = 3  # fewer in the turned page are no sign: on a photograph without text they may be tiles or a fence
_WAITING_IMAGES = 64  # on a GPU, more maps than this do not wait for their polygons; then the network does


class Network(Protocol):
    """What makes probability maps: an `ensemble.Ensemble` of checkpoints, or an `OnnxNetwork`."""

    config: Config  # that it was trained with, as the user changed it
    device: Any  # `str` of it begins with cuda where the network works beside the CPU
    sides: tuple[int, ...]  # the image sizes that it looks at, config.image_size first
    threads: int  # that may call it at once on a CPU, each with its share of the cores after `begin_thread`

    def begin_thread(self) -> None:
        """Prepare a thread that calls `infer` beside others."""

    def infer(self, images: Sequence[Any], sizes: list[tuple[int, int]], plan: BatchPlan) -> Callable[[], np.ndarray]:
        """Start on the (N, height, width, 3) uint8 images of a batch, one batch for each of `sides`. `sizes` holds
        (width, height) of the originals. Returns a function that waits for the (N, height, width) uint8 maps,
        probability x 255, in the geometry of the first size."""


class OnnxNetwork:
    """An exported network on ONNX Runtime, a `Network`."""

    threads = 1  # it has threads of its own

    def __init__(self, path: Path, changes: dict[str, Any]) -> None:
        """Load `path`, with `changes` made to the configuration that it holds. Raises UserError where the file is not
        one that `export.py` wrote, where `changes` ask for what it cannot do, or ONNX Runtime is not installed."""
        onnxruntime = _import("onnxruntime")
        self.path = path
        content = read_graph(path)
        provider = _provider(onnxruntime, path, changes.get("device", "auto"))
        self.device = "cpu" if provider[0].startswith("CPU") else provider[0]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal; errors are raised
        options.intra_op_num_threads = count_cores()  # by itself it takes those of the machine
        with library_errors(f"{path}: not an ONNX file, or a damaged one"):
            start = partial(onnxruntime.InferenceSession, content, options, providers=[provider])
            self.session = _in_time(path, start)
            metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            trained = Config.from_dict(json.loads(metadata[CONFIG_KEY]))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, UserError):
            raise UserError(f"{path}: holds no configuration of this dbnet; {_EXPORT_ANEW}") from None
        arrays = [*self.session.get_inputs(), *self.session.get_outputs()]
        kinds = [(array.name, array.type, len(array.shape)) for array in arrays]
        if kinds != [("images", "tensor(uint8)", 4), ("prob_maps", "tensor(float)", 3)]:
            raise UserError(f"{path}: takes or gives other arrays than a network of dbnet; {_EXPORT_ANEW}")
        self.config = trained.changed(**changes)
        self.sides: tuple[int, ...] = (self.config.image_size,)
        if self.config.tta:
            raise UserError(f"{path}: --tta needs the checkpoint; a .onnx file has one view of an image")
        for name in NETWORK_FIELDS:
            if getattr(trained, name) != getattr(self.config, name):
                raise UserError(f"--{name.replace('_', '-')}: cannot change the network of {path}; leave it out")

    def __str__(self) -> str:
        return f"{self.config.backbone}, {self.config.image_size} px, ONNX Runtime"

    def begin_thread(self) -> None:
        """As `Network` says."""

    def infer(self, images: Sequence[np.ndarray], sizes: list[Size], plan: BatchPlan) -> Callable[[], np.ndarray]:
        """As `Network` says; the work is done when this returns."""
        step = plan.micro_batch
        parts = [images[0][start : start + step] for start in range(0, len(sizes), step)]
        maps = [in_windows(self.probabilities, part, self.config.image_size, np.concatenate) for part in parts]
        prob_maps = np.rint(255 * np.concatenate(maps)).astype(np.uint8)
        return lambda: prob_maps

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, height, width) float32 of (N, height, width, 3) uint8 images of any size. UserError where it fails."""
        with library_errors(f"{self.path}: fails on an image", _EXPORT_ANEW):
            work = partial(self.session.run, None, {"images": np.ascontiguousarray(images)})
            [prob_maps] = _in_time(self.path, work, images.size / 3e6)
        if prob_maps.shape != images.shape[:3]:
            raise UserError(f"{self.path}: gives a map of another size than the image; {_EXPORT_ANEW}")
        if not (prob_maps.min() >= 0 and prob_maps.max() <= 1):  # nor where one is NaN
            raise UserError(f"{self.path}: gives values that are no probabilities; {_EXPORT_ANEW}")
        return prob_maps


def _in_time(path: Path, work: Callable[[], Any], megapixels: float = 1) -> Any:
    """What `work` on a file gives. Raises UserError if it takes too long; its thread goes on, as nothing stops it."""
    seconds = _SLOWEST * max(1, megapixels)
    future = Future[Any]()

    def finish() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=finish, daemon=True, name=ABANDONED).start()
    started = time.process_time()  # of all threads; a process that is stopped for a while spends none
    while time.process_time() - started < seconds * count_cores():
        with suppress(TimeoutError):
            return future.result(1)
    raise UserError(f"{path}: takes more than {seconds:.0f} s; {_EXPORT_ANEW}")


def _provider(onnxruntime: Any, path: Path, device: str) -> tuple[str, dict[str, str]]:
    """The provider of ONNX Runtime that --device names (cpu, cuda, cuda:N, openvino, ...), and its options."""
    names = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    name, _, number = device.replace("auto", "cpu").partition(":")
    if name not in names or (number and not number.isdecimal()):
        raise UserError(f"--device {device}: {path} runs on {', '.join(names)} with the ONNX Runtime that is installed")
    return names[name], {"device_id": number} if number else {}


def read_graph(path: Path) -> bytes:
    """An ONNX model. Raises UserError for a file that is none, and for one with loops, branches, functions and data in
    other files, which may never end."""
    from google.protobuf.empty_pb2 import Empty  # ONNX Runtime needs protobuf too
    from google.protobuf.unknown_fields import UnknownFieldSet

    def fields(message: bytes, number: int) -> list[bytes]:
        """What the fields of this number hold: a message without fields of its own keeps all as unknown."""
        return [each.data for each in UnknownFieldSet(Empty.FromString(message)) if each.field_number == number]

    check_regular(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    with library_errors(f"{path}: not an ONNX file, or a damaged one"):
        model = path.read_bytes()
        [graph] = fields(model, 7)
        operations = {name.decode() for node in fields(graph, 1) for name in fields(node, 4)}
        is_elsewhere = any(fields(tensor, 13) for tensor in fields(graph, 5))
    found = sorted(operations & {"Loop", "If", "Scan", "SequenceMap"})
    if found or is_elsewhere or fields(model, 25):
        what = f"the operation {found[0]}" if found else "functions or data in other files"
        raise UserError(f"{path}: has {what}, which no network of dbnet has; {_EXPORT_ANEW}")
    return model


def write_onnx(path: Path, model: DBNet, config: Config, half: bool = False) -> None:
    """Write a network in eval mode, on the CPU, with its configuration; whole or not at all. It takes images of any
    size. With `half`, kernels are stored as 16-bit floats, to which the model's are rounded too; they are widened when
    the file is loaded. Raises UserError where it cannot be written or `onnx` is not installed."""
    import torch

    from dbnet.model import AnySize

    onnx = _import("onnx")
    if half:
        for weight in model.parameters():
            weight.data = weight.data.half().float() if weight.ndim > 1 else weight.data
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise UserError(f"{path.name}: not written: a weight is too large for 16 bits; use --onnx")
    example = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    axes = {name: {0: "batch", 1: "height", 2: "width"} for name in ("images", "prob_maps")}
    names: Any = {"input_names": ["images"], "output_names": ["prob_maps"], "dynamic_axes": axes}
    file: Any = io.BytesIO()  # the exporter takes it, though its signature names paths alone
    with warnings.catch_warnings():
        # The exporter by tracing is called deprecated, but the network is a plain graph, and its successor takes six
        # times as long, one package more, and puts the weights into a file of their own.
        warnings.simplefilter("ignore")
        torch.onnx.export(AnySize(model).eval(), (example,), file, dynamo=False, opset_version=OPSET, **names)
    exported = onnx.load_model_from_string(file.getvalue())
    for tensor in list(exported.graph.initializer) if half else []:
        array = onnx.numpy_helper.to_array(tensor)
        halved = array.astype(np.float16)
        if array.dtype == np.float32 and array.ndim > 1 and (halved == array).all():
            widened, tensor_name = tensor.name, f"{tensor.name}.half"
            tensor.CopyFrom(onnx.numpy_helper.from_array(halved, tensor_name))
            cast = onnx.helper.make_node("Cast", [tensor_name], [widened], to=onnx.TensorProto.FLOAT)
            exported.graph.node.insert(0, cast)
    onnx.helper.set_model_props(exported, {CONFIG_KEY: json.dumps(config.to_dict())})
    onnx.checker.check_model(exported)
    with write_whole(path) as output:
        output.write(exported.SerializeToString())


def _import(name: str) -> Any:
    """A package of the `onnx` extra. Raises UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install {name}") from None


@dataclass(frozen=True)
class Detection:
    """What was found in the image at a place of the data set: nothing but `error`, a line, where it is unreadable."""

    index: int
    polygons: list[np.ndarray]  # (n, 2) int, x and y in pixels of the upright original
    scores: list[float]  # mean probability inside each polygon's region, 0..1
    prob_map: np.ndarray | None  # (height, width) uint8, probability x 255, of the resized image without its padding
    error: str | None
    size: tuple[int, int] | None = None  # (width, height) in pixels of the upright original


def load_network(paths: Sequence[Path], changes: dict[str, Any]) -> Network:
    """The network of one checkpoint, the average of several, or a network that was exported to ONNX. `changes` are made
    to the configuration that came with it. PyTorch is imported for checkpoints alone. Raises UserError where a file
    cannot be used."""
    if not paths:
        raise UserError("no checkpoint is named")
    if any(path.suffix.lower() == ".onnx" for path in paths):
        if len(paths) > 1:
            names = f"{paths[0]} {paths[1]}"
            raise UserError(f"{names}: a .onnx file runs alone; name its checkpoint to average it with others")
        return OnnxNetwork(paths[0], changes)
    if not find_spec("torch") or not find_spec("torchvision"):
        way = "pip install torch torchvision; or export it where PyTorch is, and use the .onnx file"
        raise UserError(f"{paths[0]}: needs PyTorch: {way}")
    from dbnet.ensemble import Ensemble

    return Ensemble.load(paths, changes)


SHIPPED = ("lite", "lite-words")


def find_weights(path: Path) -> Path:
    """The file of a checkpoint. `lite` and `lite-words` name the weights that come with the program. Raises UserError
    where these are missing from this copy of it."""
    if str(path) not in SHIPPED or path.exists():
        return path
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):  # installed, and in a checkout
        if (folder / f"{path}.pt").is_file():
            return folder / f"{path}.pt"
    raise UserError(f"weights/{path}.pt: is missing from this copy of dbnet; name a checkpoint, or train one")


class _Mapped(NamedTuple):
    """An image of a batch."""

    batch: dict[str, Any]
    place: int
    size: tuple[int, int]  # (width, height) in pixels of the upright original
    prob_map: np.ndarray  # (height, width) uint8, without its padding


class Pipeline:
    """Detect text in the images of a data set, as often as asked: reading, network and post-processing overlap. While a
    GPU computes, loader workers read the next batches and other processes make polygons of the last ones. On a CPU a
    few threads have their share of the cores each, and an image each, from its file to its polygons: cores that share
    one image wait for each other."""

    def __init__(self, dataset: ImageDataset, config: Config, device: torch.device | str) -> None:
        self.dataset, self.config = dataset, config
        self.on_gpu = str(device).startswith("cuda")
        self.batch_size = config.batch_size if self.on_gpu else 1  # a CPU gains nothing by more
        self.workers = count_workers(config) if self.on_gpu else 0
        self.loader: Iterable[dict[str, Any]] | None = None
        self.extractors: Executor | None = None
        if self.on_gpu and self.workers:  # spawned: a fork would inherit the GPU, and locks of threads
            self.extractors = ProcessPoolExecutor(self.workers, get_context("spawn"), cv2.setNumThreads, (1,))

    def detect(self, network: Network) -> Iterator[Detection]:
        """Every image of the data set exactly once, in the order in which they are done; of several processes that
        torchrun has started, each has its share. When memory runs out the batch is halved for the rest of the images.
        Raises ImageError for an image that cannot be read where config.strict is set (else its Detection has an
        `error`), and UserError as `load_batches` does."""
        if self.dataset.further_sizes != network.sides[1:]:
            self.dataset.further_sizes, self.loader = network.sides[1:], None
        batches, plan = Batches(self.dataset, self.batch_size), BatchPlan(self.batch_size)
        if self.on_gpu:
            self.loader = self.loader or make_loader(batches, self.workers, pin_memory=True)
            yield from self._beside_device(network, self.loader, plan)
            return
        look = partial(self._look, network)
        threads = min(network.threads, len(batches))
        if threads <= 1:
            for draws in batches:
                yield from run_until_it_fits(partial(look, draws, plan), plan)
            return
        waiting: deque[tuple[Any, Future[list[Detection]]]] = deque()
        with ThreadPoolExecutor(threads, initializer=network.begin_thread) as pool:
            ahead = iter(batches)
            waiting.extend((draws, pool.submit(look, draws, plan)) for draws in islice(ahead, 2 * threads))
            while waiting:
                draws, future = waiting.popleft()
                try:
                    found = future.result()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    wait([others for _, others in waiting])  # alone, it may fit
                    found = run_until_it_fits(partial(look, draws, plan), plan)
                waiting.extend((draws, pool.submit(look, draws, plan)) for draws in islice(ahead, 1))
                yield from found

    def _look(self, network: Network, draws: list[Any], plan: BatchPlan) -> list[Detection]:
        """What is found in a batch, all of it by this thread."""
        [batch] = load_batches(map(self.dataset.batch, [draws]))
        found = self._unreadable(batch)
        if "image" in batch:
            for image in self._mapped(batch, self._launch(network, batch, plan)()):
                polygons = polygons_of(image.prob_map, image.size, self.config)
                found.append(self._detection(network, plan, image, polygons))
        return found

    def _beside_device(self, network: Network, loader: Iterable[Any], plan: BatchPlan) -> Iterator[Detection]:
        """What is found in the batches of a loader, while the device works on the next one."""
        waiting: deque[tuple[_Mapped, Future[Any]]] = deque()
        launched: tuple[dict[str, Any], Callable[[], np.ndarray]] | None = None
        extractors = self.extractors or ThreadPoolExecutor(1)
        for batch in chain(load_batches(loader), [None]):
            last, launched = launched, None
            if batch:
                if "image" in batch:
                    launched = batch, run_until_it_fits(partial(self._launch, network, batch, plan), plan)
                yield from self._unreadable(batch)
            if last:  # its maps have arrived while the device was busy with those of this batch
                for image in self._mapped(last[0], last[1]()):
                    waiting.append((image, extractors.submit(polygons_of, image.prob_map, image.size, self.config)))
            while waiting and (not batch or len(waiting) > _WAITING_IMAGES or waiting[0][1].done()):
                image, polygons = waiting.popleft()
                look = partial(self._detection, network, plan, image, polygons.result())
                yield run_until_it_fits(look, plan)

    def _launch(self, network: Network, batch: dict[str, Any], plan: BatchPlan) -> Callable[[], np.ndarray]:
        """Start on the maps of a batch; the function that waits for them."""
        return network.infer(images_of(batch, network), batch["size"].tolist(), plan)

    def _detection(
        self, network: Network, plan: BatchPlan, image: _Mapped, found: tuple[list[np.ndarray], list[float]]
    ) -> Detection:
        """What is found in an image: the polygons and scores of its map or, where words are longer and surer in that,
        of a look at the image turned by a quarter; where the text is small or none is found, of a closer look."""
        batch, place, size, prob_map = image
        length, turns = median_length(found[0]), 0
        if self.config.sideways and (length < SHORT or tall_share(found[0]) > SOME_TALL):
            views = []
            for side, images in zip(network.sides, images_of(batch, network), strict=True):
                width, height = resized_as(size, self.config.changed(image_size=side)).resized
                view = np.zeros((1, padded(width), padded(height), 3), np.uint8)
                view[0, :width, :height] = np.rot90(np.asarray(images[place])[:height, :width])
                views.append(view)
            height, width = prob_map.shape
            turned = network.infer(views, [size[::-1]], plan)()[0, :width, :height]
            turned = np.ascontiguousarray(np.rot90(turned, -1))
            polygons, scores = polygons_of(turned, size, self.config)
            is_longer = median_length(polygons, turned=True) > length
            if is_longer and len(polygons) >= FEW_WORDS and np.mean(scores) > np.mean(found[1] or [0]):
                prob_map, found, turns = turned, (polygons, scores), 1
        index, side = int(batch["index"][place]), self._enlarged_side(prob_map, size, found[0])
        if side > self.config.image_size and len(network.sides) == 1:
            return self._look_closer(network, index, side, found[0], turns, size)
        return Detection(index, *found, prob_map, None, size)

    def _look_closer(
        self, network: Network, index: int, side: int, polygons: list[np.ndarray], turns: int, size: tuple[int, int]
    ) -> Detection:
        """What is found in an image, resized as if `side` were the image size and turned by quarters, by a look at the
        part around these polygons, in pixels of the original, or at all of it. Elsewhere the map is 0."""
        config = self.config.changed(image_size=side)
        [batch] = load_batches(map(self.dataset.batch, [[Draw(index, side=side)]]))
        if "image" in batch and batch["size"].tolist() != [list(size)]:
            batch = {"failed": [(index, f"{self.dataset.paths[index]}: has changed while it was read")]}
        if "image" not in batch:
            return self._unreadable(batch)[0]
        [image], letterbox = np.asarray(batch["image"]), resized_as(size, config)
        points = letterbox.to_network(np.concatenate(polygons or [np.array([(0, 0), size])]))
        x0, y0 = np.maximum(points.min(axis=0) - MARGIN, 0).astype(int) // STRIDE * STRIDE
        x1, y1 = np.ceil((points.max(axis=0) + MARGIN) / STRIDE).astype(int) * STRIDE
        part = np.ascontiguousarray(np.rot90(image[y0:y1, x0:x1], turns))
        prob_map = np.zeros(image.shape[:2], np.uint8)
        prob_map[y0:y1, x0:x1] = np.rot90(network.infer([part[None]], [size], BatchPlan(1))()[0], -turns)
        width, height = letterbox.resized
        prob_map = prob_map[:height, :width]
        return Detection(index, *polygons_of(prob_map, size, config), prob_map, None, size)

    def _enlarged_side(self, prob_map: np.ndarray, size: tuple[int, int], polygons: list[np.ndarray]) -> int:
        """The image size at which the text of an image, if any, is large enough; config.image_size where it is."""
        image_size, small_text = self.config.image_size, self.config.small_text
        if not small_text or max(prob_map.shape) > image_size:
            return image_size  # a long image in windows is at its best size
        breadths = [min(cv2.minAreaRect(polygon.astype(np.float32))[1]) for polygon in polygons]
        text = float(np.median(breadths or 0)) * max(prob_map.shape) / max(size)
        largest = min(ZOOM * image_size, MAX_IMAGE_SIZE, self.config.enlarge * max(size))
        return max(image_size, int(min(small_text / max(text, 1) * image_size, largest)) // STRIDE * STRIDE)

    def _unreadable(self, batch: dict[str, Any]) -> list[Detection]:
        """A Detection for each image of a batch that could not be read."""
        for _, error in batch["failed"] if self.config.strict else []:
            raise ImageError(error)
        return [Detection(index, [], [], None, error) for index, error in batch["failed"]]

    def _mapped(self, batch: dict[str, Any], prob_maps: np.ndarray) -> Iterator[_Mapped]:
        """The images of a batch with their maps."""
        for place, (size, prob_map) in enumerate(zip(batch["size"].tolist(), prob_maps, strict=True)):
            width, height = resized_as(size, self.config).resized
            yield _Mapped(batch, place, tuple(size), prob_map[:height, :width])


def images_of(batch: dict[str, Any], network: Network) -> list[Any]:
    """The images of a batch at each of the network's sizes."""
    return [batch["image"], *(batch[f"image_{side}"] for side in network.sides[1:])]


def polygons_of(prob_map: np.ndarray, size: tuple[int, int], config: Config) -> tuple[list[np.ndarray], list[float]]:
    """Polygons in pixels of the original of this (width, height), and their scores. `prob_map` as in Detection."""
    config = config.changed(max_candidates=most_polygons(size, config))
    return extract_polygons(prob_map, config, tuple(1 / resized_as(size, config).scale), size)


def most_polygons(size: Sequence[int], config: Config) -> int:
    """How many polygons an image of (width, height) pixels may have: of a long one, as many in each window."""
    return config.max_candidates * len(windows(padded(resized_as(size, config).side), config.image_size))


def print_full(counts: Iterable[tuple[str, int, Sequence[int] | None]], config: Config) -> None:
    """Print how many images have as many polygons as they may. `counts` are names, polygons and sizes, if known."""
    if full := [name for name, count, size in counts if size and count >= most_polygons(size, config)]:
        first = f"{printable(full[0])} first"
        print(f"{len(full)} images have as many polygons as --max-candidates allows, {first}: raise it for all text")


def resized_as(size: Sequence[int], config: Config) -> Letterbox:
    """How an image of (width, height) pixels is resized for the network."""
    width, height = size
    return Letterbox(width, height, inference_side(width, height, config.image_size, config.enlarge))


Picture = str | Path | bytes | bytearray | IO[bytes] | np.ndarray | Image.Image
"""An image: a file, the content of one, pixels, or a Pillow image"""

THRESHOLDS = (
    *("thresh", "box_thresh", "max_candidates", "min_size"),
    *("use_polygon", "growth", "box_unclip_ratio", "polygon_unclip_ratio"),
)  # fields of the configuration that a single call may change


class Text(NamedTuple):
    """One detected piece of text."""

    polygon: np.ndarray  # (n, 2) int, x and y in pixels of the upright image
    score: float  # mean probability inside the polygon's region, 0..1

    @property
    def quad(self) -> np.ndarray:
        """(4, 2) int array: the polygon if it has four points, else the smallest rectangle around it."""
        if len(self.polygon) == 4:
            return self.polygon
        return np.rint(corners(cv2.minAreaRect(self.polygon.astype(np.float32)))).astype(int)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"polygon": self.polygon.tolist(), "quad": self.quad.tolist(), "score": float(self.score)}


class Detector:
    """A trained network with its configuration, ready for images. Threads may share it.

    An image is a file, its content as bytes or as an open file, a Pillow image of any mode, or an array of uint8
    pixels: (height, width) grey, (height, width, 3) RGB or (height, width, 4) RGBA. Files and Pillow images are turned
    upright by their EXIF orientation, arrays are taken to stand upright. For arrays of OpenCV say `bgr=True`. Of a TIFF
    with several pages the first is read; `detect_each` takes all pages of a file."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.config = network.config

    @classmethod
    def load(cls, path: str | Path | Sequence[str | Path] = "lite", device: str | None = None, **changes: Any) -> Self:
        """Load a checkpoint or an exported .onnx file; of several checkpoints, the probability maps are averaged.

        `lite` (finds lines) and `lite-words` name the weights that come with the program. `device` is auto, cpu, cuda
        or cuda:N (auto); fields of the configuration are changed by keyword, e.g. `box_thresh=0.4, tta=True`.

        Raises UserError where a file is no checkpoint, the device does not exist, or a field does not take the value.
        """
        paths = [path] if isinstance(path, str | Path) else path
        return cls(load_network([find_weights(Path(each)) for each in paths], changes | {"device": device or "auto"}))

    def detect(self, image: Picture, bgr: bool = False, **thresholds: Any) -> list[Text]:
        """Text in an image, best first. Of THRESHOLDS, the call may change any: `detect(image, box_thresh=0.5)`. Raises
        UserError for what cannot be read as an image, and for a threshold out of range."""
        return self.detect_batch([image], bgr, **thresholds)[0]

    def detect_batch(self, images: Sequence[Picture], bgr: bool = False, **thresholds: Any) -> list[list[Text]]:
        """The text in each of the images, in their order. Raises as `detect` does."""
        found: list[list[Text]] = [[] for _ in images]
        for detection in self._run(images, bgr, thresholds):
            found[detection.index] = [Text(*each) for each in zip(detection.polygons, detection.scores, strict=True)]
        return found

    def detect_each(
        self,
        images: Iterable[Picture],
        bgr: bool = False,
        on_error: Callable[[UserError], None] | None = None,
        **thresholds: Any,
    ) -> Iterator[tuple[Picture, list[Text]]]:
        """Each image with its text, one after the other, so that memory holds one image at a time. `images` may be one
        file. A PDF or TIFF file gives each of its pages, with a path such as `scan.pdf#page=2`. What cannot be read
        goes to `on_error` and is left out; without it, UserError ends the iteration."""
        if isinstance(images, str | Path | bytes):
            images = [images]
        for image in images:
            try:
                pages = list_pages(Path(image)) if isinstance(image, str | Path) else [image]
                for page in pages:
                    yield page, self.detect(page, bgr, **thresholds)
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(error)

    def prob_map(self, image: Picture, bgr: bool = False) -> np.ndarray:
        """(height, width) uint8, the probability of text x 255, of the resized image, after a closer look larger."""
        [detection] = self._run([image], bgr, {})
        assert detection.prob_map is not None  # as an image that cannot be read raises
        return detection.prob_map.copy()

    def _run(self, images: Sequence[Picture], bgr: bool, thresholds: dict[str, Any]) -> Iterator[Detection]:
        if isinstance(images, str | Path | bytes):
            raise UserError("takes a list of images, not a single one; `detect` takes that")
        for name in thresholds.keys() - set(THRESHOLDS):
            raise UserError(f"{name}: cannot change from call to call; these can: {', '.join(THRESHOLDS)}")
        config = self.config.changed(workers=0, strict=True, **thresholds)
        return Pipeline(_Pictures(images, config, bgr), config, self.network.device).detect(self.network)


class _Pictures(ImageDataset):
    """Images that are in memory, or in files."""

    def __init__(self, images: Sequence[Picture], config: Config, bgr: bool) -> None:
        paths = [Path(each) if isinstance(each, str | Path) else Path(f"image {i}") for i, each in enumerate(images, 1)]
        super().__init__(paths, config)
        self.data: dict[int, bytes] = {}
        self.pixels: dict[int, np.ndarray] = {}
        for place, image in enumerate(images):
            if isinstance(image, str | Path):
                continue
            if isinstance(image, bytes | bytearray) or hasattr(image, "read"):
                with library_errors(f"{self.paths[place]}: cannot be read", "open it in binary mode", ImageError):
                    self.data[place] = bytes(image if isinstance(image, bytes | bytearray) else image.read())
                self._sizes[place] = read_size(self.paths[place], self.data[place])
            else:
                self.pixels[place] = _pixels(image, bgr)
                self._sizes[place] = (self.pixels[place].shape[1], self.pixels[place].shape[0])

    def read(self, place: int, side: int) -> tuple[np.ndarray, tuple[int, int]]:
        if place not in self.pixels:
            return read_image(self.paths[place], side, self.data.get(place))
        pixels = self.pixels[place]
        return pixels, (pixels.shape[1], pixels.shape[0])


def _pixels(image: Any, bgr: bool) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright."""
    if 0 in (shape := image.size if isinstance(image, Image.Image) else getattr(image, "shape", ())):
        raise UserError(f"takes an image with pixels in it, not {shape}")
    if isinstance(image, Image.Image):
        with library_errors(f"{image}: cannot be decoded"):  # Pillow decodes only now
            return to_rgb(ImageOps.exif_transpose(image))
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3)
    channels = (image.shape[2] if image.ndim == 3 else 1) if is_image else 0
    if channels not in (1, 3, 4):
        kind = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        pixels = "(height, width) grey, (height, width, 3) RGB or (height, width, 4) RGBA"
        raise UserError(f"takes a file, its bytes, a Pillow image, or uint8 pixels that are {pixels}, not {kind}")
    if channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if channels == 4:
        return to_rgb(Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA) if bgr else image))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if bgr else image
