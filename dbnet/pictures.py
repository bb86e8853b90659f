"""Pictures to look at: polygons over images, and a sheet of training samples with their target maps."""

import errno
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dbnet.dataset import Draw, TextDataset
from dbnet.errors import UserError
from dbnet.files import write_whole
from dbnet.geometry import Letterbox
from dbnet.images import name_stem, read_image

TEXT_COLOR = (0, 158, 115)  # bluish green and vermilion stay apart for the colour-blind (Okabe and Ito)
MAX_OVERLAY = 8192  # pixels of the longer side
DONT_CARE_COLOR = (213, 94, 0)


def draw_polygons(
    image: np.ndarray, polygons: Iterable[np.ndarray], color: tuple[int, int, int] = TEXT_COLOR
) -> np.ndarray:
    """A copy of (height, width, 3) uint8 RGB pixels with the outlines of (n, 2) polygons on it, in an RGB color."""
    canvas = image.copy()
    thickness = max(1, round(max(image.shape[:2]) / 800))
    outlines = [np.round(polygon).astype(np.int32) for polygon in polygons]
    cv2.polylines(canvas, outlines, isClosed=True, color=color, thickness=thickness, lineType=cv2.LINE_AA)
    return canvas


def write_overlay(path: Path, image: Path, polygons: Iterable[np.ndarray]) -> None:
    """Write the image of a file with (n, 2) polygons on it to `path`, at most MAX_OVERLAY pixels long.

    Raises ImageError where the image can no longer be read, and UserError where `path` cannot be written.
    """
    pixels, (width, height) = read_image(image, MAX_OVERLAY)
    letterbox = Letterbox(width, height, min(MAX_OVERLAY, max(width, height)))
    write_image(path, draw_polygons(letterbox.resize(pixels), map(letterbox.to_network, polygons)))


def overlay_names(names: list[str]) -> dict[str, str]:
    """What the picture of each image is called: a.jpg of a.png; a.png.jpg where there is another image a."""
    stems = Counter(map(name_stem, names))
    return {name: f"{name_stem(name) if stems[name_stem(name)] == 1 else name}.jpg" for name in names}


def sample_sheet(dataset: TextDataset, count: int = 4, side: int = 480) -> np.ndarray:
    """Augmented training samples, a row each: image with polygons, probability map, threshold map over the image.

    Returns (count x side, 3 x side, 3) uint8 RGB. Raises ImageError for one that cannot be read.
    """
    rows = []
    for index in range(min(count, len(dataset))):
        _, letterbox = dataset.load(index)
        text, illegible, _ = dataset.polygons(index, letterbox, dataset.augmentation(Draw(index)))
        sample = dataset[index]
        image = sample["image"]
        panels = [
            draw_polygons(draw_polygons(image, text), illegible, DONT_CARE_COLOR),
            cv2.cvtColor(sample["prob_map"] * 255, cv2.COLOR_GRAY2RGB),
            cv2.applyColorMap(sample["thresh_levels"], cv2.COLORMAP_VIRIDIS)[..., ::-1],
        ]
        size = Letterbox(image.shape[1], image.shape[0], side).resized
        row = np.zeros((side, 3 * side, 3), np.uint8)
        for left, panel in zip(range(0, 3 * side, side), panels, strict=True):
            row[: size[1], left : left + size[0]] = cv2.resize(panel, size, interpolation=cv2.INTER_AREA)
        rows.append(row)
    return np.vstack(rows)


PICTURE_MARK = "picture by dbnet"  # in every picture, which may be overwritten therefore


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 RGB pixels as .png or .jpg, whole or not at all. Raises UserError."""
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: pictures are written as .png or .jpg; name such a file")
    note = PngInfo()
    note.add_text("Software", PICTURE_MARK)
    with write_whole(path) as file:
        if suffix == ".png":
            Image.fromarray(image).save(file, "PNG", pnginfo=note)
        else:
            Image.fromarray(image).save(file, "JPEG", quality=95, comment=PICTURE_MARK)


_CELL = (96, 44)  # width and height in pixels
_LEFT, _TOP, _BOTTOM, _RIGHT = 150, 84, 132, 30  # room in pixels for labels, title and legend
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def draw_heat_map(
    values: np.ndarray,
    rows: Sequence[float],
    columns: Sequence[float],
    axes: tuple[str, str],
    title: str,
    marks: dict[str, tuple[int, int]],
) -> np.ndarray:
    """Draw (rows, columns) values, the highest brightest; the first row is at the bottom, as on a graph's axis.

    The lowest quarter is all of one colour: beside bad values the good ones could not be told apart.

    Args:
        values: (rows, columns) numbers between 0 and 1.
        rows, columns: the number that each row and column stands for.
        axes: what these numbers are, of rows and of columns.
        title: a line above.
        marks: cells, (row, column), to frame, by their legends; any after the first get a thinner frame.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    width = max(_LEFT + len(columns) * _CELL[0] + _RIGHT, 60 + 11 * max(map(len, [title, *marks])))
    canvas = np.full((_TOP + len(rows) * _CELL[1] + _BOTTOM, width, 3), _PAPER, np.uint8)
    low, high = np.quantile(values, 0.25), values.max()
    levels = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    colors = cv2.applyColorMap(np.rint(levels).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]

    def corner(row: int, column: int) -> tuple[int, int]:
        return _LEFT + column * _CELL[0], _TOP + (len(rows) - 1 - row) * _CELL[1]

    for row, column in np.ndindex(values.shape):
        x, y = corner(row, column)
        color = tuple(colors[row, column].tolist())
        cv2.rectangle(canvas, (x, y), (x + _CELL[0] - 2, y + _CELL[1] - 2), color, cv2.FILLED)
        _write(canvas, f"{values[row, column]:.4f}", (x + _CELL[0] // 2, y + _CELL[1] // 2), _readable_on(color))
    for row, value in enumerate(rows):
        _write(canvas, f"{value:g}", (_LEFT - 30, corner(row, 0)[1] + _CELL[1] // 2))
    for column, value in enumerate(columns):
        _write(canvas, f"{value:g}", (corner(0, column)[0] + _CELL[0] // 2, corner(0, 0)[1] + _CELL[1] + 16))
    _write(canvas, axes[0], (_LEFT // 2 - 10, _TOP - 20))
    _write(canvas, axes[1], (_LEFT + len(columns) * _CELL[0] // 2, corner(0, 0)[1] + _CELL[1] + 42))
    cv2.putText(canvas, title, (24, 36), _FONT, 0.6, _INK, 1, cv2.LINE_AA)

    for number, (legend, (row, column)) in enumerate(marks.items()):
        x, y = corner(row, column)
        inset, thickness = (0, 4) if number == 0 else (6, 2)
        color = (213, 94, 0)  # vermilion stays apart from viridis for the colour-blind
        cv2.rectangle(
            canvas, (x + inset, y + inset), (x + _CELL[0] - 2 - inset, y + _CELL[1] - 2 - inset), color, thickness
        )
        key = canvas.shape[0] - 50 + 26 * number
        cv2.rectangle(canvas, (26, key - 7), (46, key + 7), color, thickness)
        cv2.putText(canvas, legend, (60, key + 6), _FONT, 0.5, _INK, 1, cv2.LINE_AA)
    return canvas


def _write(canvas: np.ndarray, text: str, middle: tuple[int, int], color: tuple[int, int, int] = _INK) -> None:
    """Put text with its middle at a point."""
    (width, height), _ = cv2.getTextSize(text, _FONT, 0.5, 1)
    cv2.putText(canvas, text, (middle[0] - width // 2, middle[1] + height // 2), _FONT, 0.5, color, 1, cv2.LINE_AA)


def _readable_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Dark ink on a light color, white on a dark one."""
    return _INK if np.dot(color, (0.299, 0.587, 0.114)) > 120 else _PAPER


Row = dict[str, Any]
Color = tuple[int, int, int]
Point = tuple[float, float]
Scale = Literal["linear", "log", "score"]

BLUE, ORANGE, GREEN, BLACK = (0, 114, 178), (230, 159, 0), (0, 158, 115), (30, 30, 30)  # Okabe and Ito
BEST_COLOR = (204, 51, 119)
_TEXT, _FAINT, _GRID = (60, 60, 60), (130, 130, 130), (228, 228, 228)


class Curve(NamedTuple):
    """A number of the log and how it is shown."""

    key: str
    label: str
    color: Color


class Panel(NamedTuple):
    """A diagram over the epochs."""

    title: str
    scale: Scale
    curves: tuple[Curve, ...]


PANELS = (
    Panel(
        "validation score (CLEval)",
        "score",
        (
            Curve("precision", "precision", BLUE),
            Curve("recall", "recall", ORANGE),
            Curve("hmean", "H-Mean", BLACK),
        ),
    ),
    Panel("training loss, weighted sum", "log", (Curve("total_loss", "total", BLACK),)),
    Panel(
        "training loss, unweighted parts",
        "log",
        (
            Curve("prob_loss", "probability", BLUE),
            Curve("binary_loss", "binary", ORANGE),
            Curve("thresh_loss", "threshold", GREEN),
        ),
    ),
    Panel("learning rate", "linear", (Curve("lr", "at the end of the epoch", BLACK),)),
    Panel("speed", "linear", (Curve("images_per_second", "training images/s", BLACK),)),
    Panel("memory", "linear", (Curve("peak_memory_gb", "peak, GB", BLACK),)),
)
MEMORY_PANEL = len(PANELS) - 1
COLUMNS = 3
PANEL_SIZE = (500, 380)
HEADER_HEIGHT = 64
SIZE = (COLUMNS * PANEL_SIZE[0], HEADER_HEIGHT + len(PANELS) // COLUMNS * PANEL_SIZE[1])
_SCALE_NAMES = {"linear": "", "log": "log axis", "score": "log axis of 1 - score"}
_DOTS_UNTIL = 40  # epochs: with more, dots on the lines would run into each other


def show_progress(run: Path) -> None:
    """Bring `curves.png` and TensorBoard's events in the folder of a run up to date with its `log.jsonl`.

    Never raises for what goes wrong: a run of many hours is worth more than its picture. It says so on stderr instead.
    """
    for work in (write_curves, write_events):
        try:
            work(run)
        except Exception as error:  # of a full disk, a font, a TensorBoard that does not fit its protobuf
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(f"no curves of this epoch, training goes on: {' '.join(reason.split())}", file=sys.stderr)


def read_log(path: Path) -> list[Row]:
    """The rows of a log in the order of epochs. Of an epoch that was logged twice, because the run was cut off between
    log and checkpoint, the later row counts; a line that was cut off itself is left out."""
    rows: dict[int, Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[int(row["epoch"])] = row
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return [rows[epoch] for epoch in sorted(rows)]


def best_epoch(rows: list[Row]) -> int | None:
    """The first epoch of the highest H-Mean; None where no row has one."""
    scored = [row for row in rows if math.isfinite(number(row, "hmean"))]
    return max(scored, key=lambda row: number(row, "hmean"))["epoch"] if scored else None


def number(row: Row, key: str) -> float:
    """A number of a row; NaN where it is missing or none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def write_curves(run: Path) -> None:
    """Draw `log.jsonl` as `curves.png`, whole or not at all. Raises UserError where it cannot be written."""
    rows = read_log(run / "log.jsonl")
    if rows:
        picture = draw_curves(rows)
        with write_whole(run / "curves.png") as file:
            picture.save(file, "png", optimize=True)


def write_events(run: Path) -> None:
    """Append the last row of `log.jsonl` to the run's one file of TensorBoard events; nothing without TensorBoard.

    Losses are under `loss/`, scores under `score/`, all other numbers under `run/`; the step is the epoch. What an
    earlier process has written of this epoch and of later ones is void then. Raises OSError, with the file as it was,
    where there is no room.

    The records are written here and now: torch's SummaryWriter leaves that to a thread, whose errors nobody can catch,
    and needs a file for each process.
    """
    rows = read_log(run / "log.jsonl")
    if not rows or not importlib.util.find_spec("tensorboard"):
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    epoch, now = rows[-1]["epoch"], time.time()
    scalars = [
        Summary.Value(tag=_tag(name), simple_value=value)
        for name, value in rows[-1].items()
        if name != "epoch" and isinstance(value, int | float)
    ]
    with (run / "events.out.tfevents.dbnet").open("ab", buffering=0) as file:
        end = file.tell()
        events = [
            *([] if end else [Event(wall_time=now, file_version="brain.Event:2")]),
            Event(wall_time=now, step=epoch, session_log=SessionLog(status=SessionLog.START)),
            Event(wall_time=now, step=epoch, summary=Summary(value=scalars)),
        ]
        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        if file.write(records.getbuffer()) != len(records.getbuffer()):
            file.truncate(end)  # half a record would hide all that come after it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _tag(name: str) -> str:
    if name.endswith("_loss"):
        return f"loss/{name.removesuffix('_loss')}"
    return f"score/{name}" if name in ("precision", "recall", "hmean") else f"run/{name}"


def draw_curves(rows: list[Row]) -> Image.Image:
    """The rows, at least one, as small diagrams over the epochs: an RGB image of SIZE. The best epoch is marked."""
    sheet = _Sheet(*SIZE)
    best = best_epoch(rows)
    title = f"epoch {rows[-1]['epoch']}: H-Mean {number(rows[-1], 'hmean'):.4f}"
    sheet.text((24, 18), title, "la", _TEXT, 21)
    sheet.text((24, 44), "Beside a name stands its last value.", "la", _FAINT, 13)
    if best is not None:
        score = max(number(row, "hmean") for row in rows if row["epoch"] == best)
        left = 24 + sheet.font(21).getlength(title) + 30
        sheet.text((left, 18), f"best: {score:.4f} in epoch {best}", "la", BEST_COLOR, 21)
    for place in range(len(PANELS)):
        _draw_panel(sheet, place, rows, best)
    return sheet.finish()


def plot_area(place: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the inner rectangle of PANELS[place], in pixels."""
    left, top = PANEL_SIZE[0] * (place % COLUMNS), HEADER_HEIGHT + PANEL_SIZE[1] * (place // COLUMNS)
    return left + 70, top + 62, left + PANEL_SIZE[0] - 22, top + PANEL_SIZE[1] - 46


def epoch_position(place: int, rows: list[Row]) -> Callable[[float], float]:
    """Where on the x axis of PANELS[place] an epoch lies, in pixels."""
    left, _, right, _ = plot_area(place)
    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    margin = max(0.5 if last == first else 0, 0.025 * (last - first))
    return lambda epoch: left + (right - left) * (epoch - first + margin) / (last - first + 2 * margin)


def _draw_panel(sheet: "_Sheet", place: int, rows: list[Row], best: int | None) -> None:
    panel, (left, top, right, bottom), x_of = PANELS[place], plot_area(place), epoch_position(place, rows)
    axis = make_axis(panel.scale, [number(row, curve.key) for row in rows for curve in panel.curves])

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * axis.position(value)

    for tick in axis.ticks:
        sheet.bar((left, y_of(tick)), (right, y_of(tick)), _GRID)
        sheet.text((left - 8, y_of(tick)), _label(tick), "rm", _TEXT, 13)
    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    for tick in round_ticks(first if first == last else 0, last, 8):
        if first <= tick <= last and tick == int(tick):
            sheet.bar((x_of(tick), bottom), (x_of(tick), bottom + 5), _FAINT)
            sheet.text((x_of(tick), bottom + 9), f"{int(tick)}", "ma", _TEXT, 13)
    sheet.text(((left + right) / 2, bottom + 27), "epoch", "ma", _FAINT, 13)
    sheet.bar((left, top), (left, bottom), _FAINT)
    sheet.bar((left, bottom), (right, bottom), _FAINT)
    if best is not None:
        sheet.dashes(x_of(best), top, bottom, BEST_COLOR)
    if place == MEMORY_PANEL:
        for epoch, batch in batch_changes(rows):
            sheet.dashes(x_of(epoch - 0.5), top, bottom, _FAINT)
            offset, anchor = (5, "lm") if x_of(epoch) < (left + right) / 2 else (-5, "rm")
            sheet.text((x_of(epoch - 0.5) + offset, bottom - 16), batch, anchor, _TEXT, 12)

    sheet.text((left, top - 50), panel.title, "la", _TEXT, 16)
    sheet.text((right, top - 48), _SCALE_NAMES[panel.scale], "ra", _FAINT, 13)
    x, digits = float(left), 4 if panel.scale == "score" else 3
    for curve in panel.curves:
        values = [(row["epoch"], number(row, curve.key)) for row in rows]
        _draw_curve(sheet, [(x_of(e), y_of(v) if axis.has(v) else math.nan) for e, v in values], curve.color)
        sheet.bar((x, top - 19), (x + 17, top - 17), curve.color)
        text = f"{curve.label} {_label(values[-1][1], digits)}"
        sheet.text((x + 24, top - 18), text, "lm", _TEXT, 13)
        x += 24 + sheet.font(13).getlength(text) + 16
    if best is not None and panel.scale == "score":
        score = next(number(row, "hmean") for row in rows if row["epoch"] == best)
        sheet.ring((x_of(best), y_of(score)), 6, BEST_COLOR)
    if not any(axis.has(number(row, curve.key)) for row in rows for curve in panel.curves):
        sheet.text(((left + right) / 2, (top + bottom) / 2), "no finite numbers yet", "mm", _FAINT, 14)


def _draw_curve(sheet: "_Sheet", points: list[Point], color: Color) -> None:
    """A line through the points, with gaps where y is NaN, and dots where they can be told apart or stand alone."""
    for finite, group in groupby(points, key=lambda point: math.isfinite(point[1])):
        run = list(group)
        if finite and len(run) > 1:
            sheet.line(run, color, 2)
        if finite and (len(points) <= _DOTS_UNTIL or len(run) == 1):
            for point in run:
                sheet.dot(point, 3, color)


def batch_changes(rows: list[Row]) -> list[tuple[int, str]]:
    """Epochs that began with another batch or image size than the one before, and that batch."""
    in_force = [(row["epoch"], f"{row.get('batch')} at {row.get('image_size')} px") for row in rows]
    return [(epoch, batch) for (_, before), (epoch, batch) in pairwise(in_force) if batch != before]


class Axis(NamedTuple):
    """A y axis: its ends, and round numbers between them."""

    scale: Scale
    low: float
    high: float
    ticks: list[float]

    def has(self, value: float) -> bool:
        """Whether the value is a number that the axis can show."""
        return math.isfinite(value) and (self.scale != "log" or value > 0)

    def position(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        low, high, here = (_warp(self.scale, end) for end in (self.low, self.high, value))
        return (here - low) / (high - low)


def _warp(scale: Scale, value: float) -> float:
    """What is linear on the paper. Scores near 1 are pulled apart, by the logarithm of what they lack: from 0.98 to
    0.99 is as far as from 0 to 0.5."""
    if scale == "log":
        return math.log10(value)
    return -math.log10(1.0005 - min(max(value, 0.0), 1.0)) if scale == "score" else value


_SCORES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)


def make_axis(scale: Scale, values: list[float]) -> Axis:
    """The axis that shows the finite ones of these values: linear from 0 up; log, of those above 0; or score."""
    finite = [value for value in values if math.isfinite(value) and (scale != "log" or value > 0)]
    low, high = (min(finite), max(finite)) if finite else (0.1, 1.0)
    if scale == "score":
        below = max(i for i, score in enumerate(_SCORES[:-1]) if score <= max(low, 0.0))
        above = next(i for i, score in enumerate(_SCORES) if i > below and score >= min(high, 1.0))
        ticks = list(_SCORES[below : above + 1])
        if len(ticks) < 4:
            ticks = round_ticks(ticks[0], ticks[-1], 5)
    elif scale == "linear":
        ticks = round_ticks(min(low, 0.0), max(high, 0.0), 6)
    elif high < 5 * low:
        ticks = [tick for tick in round_ticks(low, high, 5) if tick > 0]
    else:
        ticks = _log_ticks(low, high)
    return Axis(scale, ticks[0], ticks[-1], ticks)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten, or with many powers only these, from below `low` to above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [step * 10.0**power for power in powers[:: max(1, len(powers) // 7)] for step in steps]
    ticks += [10.0 ** (powers[-1] + 1)] if ticks[-1] < high else []
    below = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    above = next(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[below : above + 1]


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose `low` to `high` in about `count` steps."""
    if high <= low:
        low, high = (low - abs(low) / 10, low + abs(low) / 10) if low else (0.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= count * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


def _label(value: float, digits: int = 6) -> str:
    """Few characters for a number: 0.95, 250, 2e-5."""
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


class _Sheet:
    """A white picture. Shapes are drawn enlarged and reduced in the end, which makes them smooth; text at its size."""

    _ENLARGED = 3

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.image = Image.new("RGB", (width * self._ENLARGED, height * self._ENLARGED), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.texts: list[tuple[Point, str, str, Color, int]] = []

    def line(self, points: list[Point], color: Color, width: int) -> None:
        scaled = [(x * self._ENLARGED, y * self._ENLARGED) for x, y in points]
        self.pen.line(scaled, fill=color, width=width * self._ENLARGED, joint="curve")

    def bar(self, first: Point, last: Point, color: Color) -> None:
        """Whole pixels from the first to the last, both included: for upright and level lines, sharp ones."""
        (left, top), (right, bottom) = ([round(value) * self._ENLARGED for value in point] for point in (first, last))
        self.pen.rectangle((left, top, right + self._ENLARGED - 1, bottom + self._ENLARGED - 1), fill=color)

    def dashes(self, x: float, top: int, bottom: int, color: Color) -> None:
        """An upright dashed line."""
        for y in range(top, bottom, 9):
            self.bar((x, y), (x, min(y + 4, bottom)), color)

    def dot(self, center: Point, radius: float, color: Color) -> None:
        self.pen.ellipse(self._around(center, radius), fill=color)

    def ring(self, center: Point, radius: float, color: Color) -> None:
        self.pen.ellipse(self._around(center, radius), outline=color, width=2 * self._ENLARGED)

    def _around(self, center: Point, radius: float) -> tuple[float, float, float, float]:
        x, y = center
        left, top, right, bottom = (side * self._ENLARGED for side in (x - radius, y - radius, x + radius, y + radius))
        return left, top, right, bottom

    def text(self, place: Point, text: str, anchor: str, color: Color, size: int) -> None:
        """Text whose `anchor` (Pillow's two letters) is at a point."""
        self.texts.append((place, text, anchor, color, size))

    @staticmethod
    def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """The font that comes with Pillow."""
        return ImageFont.load_default(size)

    def finish(self) -> Image.Image:
        """The picture at its size."""
        image = self.image.resize(self.size, Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        for place, text, anchor, color, size in self.texts:
            pen.text(place, text, fill=color, font=self.font(size), anchor=anchor)
        return image
