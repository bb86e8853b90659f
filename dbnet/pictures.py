"""Pictures to look at: polygons over images, crops of words, training samples, and the curves of a run."""

import csv
import gc
import math
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from dbnet.annotations import Annotation, as_labels
from dbnet.dataset import TextDataset
from dbnet.errors import UserError, one_line, printable
from dbnet.files import Row, make_folder, read_log, write_whole
from dbnet.geometry import MOST_TALL, Letterbox, tall_share
from dbnet.images import list_files, name_stem, read_image, readable_suffixes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, BLACK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#1e1e1e"  # Okabe and Ito
TEXT_COLOR, DONT_CARE_COLOR = (0, 158, 115), (213, 94, 0)  # GREEN and VERMILION stay apart for the colour-blind
MAX_OVERLAY = 4096  # pixels of the longer side; a larger JPEG is decoded at a half of its size or less
PICTURE_MARK = "picture by dbnet"  # in every picture, which may be overwritten therefore
INDEX_HEADER = ["crop", "image", "order", "line", "score", "polygon"]


def draw_polygons(image: np.ndarray, polygons: Iterable[np.ndarray], color: tuple[int, ...] = TEXT_COLOR) -> np.ndarray:
    """A copy of (height, width, 3) uint8 RGB pixels with the outlines of (n, 2) polygons on it, in an RGB color."""
    thickness = max(1, round(max(image.shape[:2]) / 800))
    outlines = [np.round(polygon).astype(np.int32) for polygon in polygons]
    return cv2.polylines(image.copy(), outlines, isClosed=True, color=color, thickness=thickness, lineType=cv2.LINE_AA)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 RGB pixels as .png or .jpg, whole or not at all. Raises UserError."""
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower())
    if not kind:
        raise UserError(f"{path}: pictures are written as .png or .jpg; name such a file")
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", PICTURE_MARK)
    with write_whole(path) as file:
        Image.fromarray(image).save(file, kind, pnginfo=note, quality=95, comment=PICTURE_MARK)


def plan_overlays(folder: Path, images: dict[str, Path]) -> dict[Path, Path]:
    """Where the picture of each image goes, by the image's path; `images` holds the paths by name. That is a.jpg of
    a.png and x/a.jpg of x/a.png or, if two pictures were called alike, NAME.jpg for all of them. Creates the folders.
    Raises UserError where files cannot be written in them."""
    stems = [name_stem(name) for name in images]
    names = stems if len(set(stems)) == len(images) else list(images)
    pictures = {path: folder / f"{name}.jpg" for name, path in zip(names, images.values(), strict=True)}
    for each in sorted({folder, *(picture.parent for picture in pictures.values())}):
        make_folder(each)
    return pictures


class ImagePictures:
    """The pictures that predict.py writes for each image: an overlay in one folder, a crop of each word in another."""

    def __init__(self, overlays: Path | None, crops: Path | None, images: dict[str, Path]) -> None:
        """`images` are the files by name. Raises UserError for a folder that cannot be written."""
        self.overlays = plan_overlays(overlays, images) if overlays else {}
        self.crops = plan_overlays(crops, images) if crops else {}
        self._index = crops / "index.csv" if crops else None

    def outputs(self) -> list[tuple[Path | None, str]]:
        """What `files.check_outputs` looks at: of the folder of crops, all pictures, as nobody knows how many come, and
        the first of each image, whose name can be too long."""
        there = list_files(self._index.parent) if self._index else []
        crops = {*map(self._crop, self.crops), *(path for path in there if path.suffix.lower() in readable_suffixes())}
        pictures = [*self.overlays.values(), *sorted(crops)]
        return [(self._index, ",".join(INDEX_HEADER) + "\r\n"), *((path, PICTURE_MARK) for path in pictures)]

    def are_there(self, path: Path, annotation: Annotation) -> bool:
        """Whether an earlier job has written those of an image."""
        last = self._crop(path, len(annotation.polygons)) if self.crops and annotation.polygons else None
        return all(picture.exists() for picture in (self.overlays.get(path), last) if picture)

    def write(self, path: Path, annotation: Annotation) -> None:
        """Write those of an image. Raises ImageError where it can no longer be read."""
        if path in self.overlays:
            pixels, (width, height) = read_image(path, MAX_OVERLAY)
            letterbox = Letterbox(width, height, min(MAX_OVERLAY, max(width, height)))
            outlines = map(letterbox.to_network, annotation.polygons)
            write_image(self.overlays[path], draw_polygons(letterbox.resize(pixels), outlines))
        if path in self.crops and annotation.polygons:
            for order, crop in enumerate(crop_words(read_image(path)[0], as_labels(annotation).polygons), start=1):
                write_image(self._crop(path, order), crop)

    def write_index(self, images: dict[str, Path], rows: dict[str, Annotation]) -> None:
        """Write index.csv among the crops: a row for each crop, in reading order."""
        if not self._index:
            return
        written = set()
        with write_whole(self._index, "w") as file:
            writer = csv.writer(file)
            writer.writerow(INDEX_HEADER)
            for name, row in rows.items():
                for polygon, _, word in as_labels(row).words():
                    crop = self._crop(images[name], word["order"]).relative_to(self._index.parent).as_posix()
                    outline = " ".join(map(str, polygon.ravel()))
                    writer.writerow([crop, name, word["order"], word["line"], word.get("score", ""), outline])
                    written.add(self._index.parent / crop)
        there = {path for path in list_files(self._index.parent) if re.search(r"_\d{4,}\.png$", path.name)}
        if earlier := sorted(there - written):
            print(f"{self._index.parent}: {len(earlier)} crops of earlier runs, {earlier[0].name} first; delete them")

    def _crop(self, path: Path, order: int = 1) -> Path:
        return self.crops[path].with_name(f"{self.crops[path].stem}_{order:04d}.png")


def crop_words(pixels: np.ndarray, outlines: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Each word of an image, upright: (height, width, 3) uint8, as high and long as the word is there. `outlines` are
    (4, 2) or (8, 2) from `fit_outline`; one of 8 points is made straight in three parts. On a page that lies on its
    side words are taken to run down, and are turned by a quarter anticlockwise."""
    turned = tall_share(outlines) > MOST_TALL
    for outline in outlines:
        points = outline.astype(np.float32)
        if turned and len(points) == 4:
            points = np.roll(points, -1, axis=0)
        top, bottom = points[: len(points) // 2], points[len(points) // 2 :][::-1]
        height = max(1, round(float(np.hypot(*(bottom - top).T).mean())))
        parts = []
        for index in range(len(top) - 1):
            corners = np.array([top[index], top[index + 1], bottom[index + 1], bottom[index]])
            width = max(1, round((math.dist(corners[0], corners[1]) + math.dist(corners[2], corners[3])) / 2))
            upright = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
            matrix = cv2.getPerspectiveTransform(corners, upright)
            parts.append(cv2.warpPerspective(pixels, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE))
        yield np.concatenate(parts, axis=1)


def sample_sheet(dataset: TextDataset, count: int = 4, side: int = 480) -> np.ndarray:
    """Augmented training samples, a row each: image with polygons, probability map, threshold map over the image, as
    (count x side, 3 x side, 3) uint8 RGB. Raises ImageError for one that cannot be read."""
    rows = []
    for draw in dataset.draws(0)[:count]:
        _, letterbox = dataset.load(draw)
        text, illegible = dataset.polygons(draw.place, letterbox, dataset.augmentation(draw))
        [sample] = dataset.__getitems__([draw])
        image = sample["image"]
        panels = [
            draw_polygons(draw_polygons(image, text), illegible, DONT_CARE_COLOR),
            cv2.cvtColor(sample["prob_map"] * 255, cv2.COLOR_GRAY2RGB),
            cv2.applyColorMap(sample["thresh_levels"], cv2.COLORMAP_VIRIDIS)[..., ::-1],
        ]
        size = Letterbox(image.shape[1], image.shape[0], side).resized
        small = [cv2.resize(panel, size, interpolation=cv2.INTER_AREA) for panel in panels]
        rows.append(np.hstack([np.pad(panel, ((0, side - size[1]), (0, side - size[0]), (0, 0))) for panel in small]))
    return np.vstack(rows)


PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("validation score (CLEval)", "score", {"precision": BLUE, "recall": ORANGE, "hmean": BLACK}),
    ("training loss, weighted sum", "log", {"total_loss": BLACK}),
    ("training loss, unweighted parts", "log", {"prob_loss": BLUE, "binary_loss": ORANGE, "thresh_loss": GREEN}),
    ("learning rate at the end of the epoch", "linear", {"lr": BLACK}),
    ("speed of the training, images/s", "linear", {"images_per_second": BLACK}),
    ("peak memory, GB", "linear", {"peak_memory_gb": BLACK}),
)  # title, scale, and the colour of each curve by its key in the log

SCORES_SHOWN = 0.1  # below the best score; what is lower is off the chart


def show_progress(run: Path) -> None:
    """Update `curves.png` and TensorBoard's events from the `log.jsonl` of a run; an error is one line on stderr."""
    rows = read_log(run / "log.jsonl")
    if not rows:
        return
    for write in (write_curves, write_events):
        try:
            write(run, rows)
        except Exception as error:  # of a full disk, a font, a TensorBoard that does not fit its protobuf
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            print(f"no curves of this epoch, training goes on: {printable(reason)}", file=sys.stderr)
    gc.collect()  # the parts of a figure refer to each other: until Python's rare full collection, none is freed


def write_curves(run: Path, rows: list[Row]) -> None:
    """Write curves.png, whole or not at all. Raises UserError where it cannot be written."""
    with write_whole(run / "curves.png") as file:
        draw_curves(rows).savefig(file, format="png", metadata={"Software": PICTURE_MARK})


def draw_curves(rows: list[Row]) -> "Figure":
    """The rows of a log, at least one, as curves over the epochs. The best epoch is marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure((15, 8.2), layout="constrained")
    epochs, scores = [row["epoch"] for row in rows], _numbers(rows, "hmean")
    title, best = f"epoch {epochs[-1]}: H-Mean {scores[-1]:.4f}", None
    if (scores > 0).any():
        best = int(np.nanargmax(scores))
        title += f"      best: {scores[best]:.4f} in epoch {epochs[best]}"
    figure.suptitle(title, x=0.01, ha="left")
    for axes, (name, scale, curves) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for key, color in curves.items():
            values, label = _numbers(rows, key), key.removesuffix("_loss")
            values[(values <= 0) & (scale == "log")] = np.nan
            axes.plot(epochs, values, ".-", color=color, label=f"{label} {values[-1]:.4g}")
        if scale == "log":
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.grid(color="0.9")
        axes.legend(fontsize="small")
        if best is not None:
            axes.axvline(epochs[best], color=VERMILION, linestyle=":")
            if scale == "score":
                axes.plot(epochs[best], scores[best], "o", color=VERMILION, fillstyle="none")
                axes.set_ylim(max(0, scores[best] - SCORES_SHOWN), min(1, scores[best] + SCORES_SHOWN / 5))
    return figure


def _numbers(rows: list[Row], key: str) -> np.ndarray:
    """(rows,) float64, NaN where a number is missing or not finite."""
    values = np.array([row.get(key) for row in rows], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def write_events(run: Path, rows: list[Row]) -> None:
    """Write the rows of a log as TensorBoard events; nothing without TensorBoard. torch's SummaryWriter would write in
    a thread, whose errors on a full disk nobody can catch."""
    if not find_spec("tensorboard"):
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with write_whole(run / "events.out.tfevents.dbnet") as file:
        records = RecordWriter(file)
        records.write(Event(file_version="brain.Event:2").SerializeToString())
        for row in rows:
            numbers = {name: value for name, value in row.items() if name != "epoch" and isinstance(value, int | float)}
            summary = Summary()
            for name, value in numbers.items():
                group = "loss" if name.endswith("_loss") else "score" if name in PANELS[0][2] else "run"
                summary.value.add(tag=f"{group}/{name.removesuffix('_loss')}", simple_value=value)
            records.write(Event(step=row["epoch"], summary=summary).SerializeToString())
