"""Annotations: the words of images; what their files have in common; and the files that are written.

All that is read is checked: anything wrong raises UserError, one line with the file, the place in it and the fix.
Nothing in a file is ever run, and no path in it is followed. `dbnet.formats` reads the formats.
"""

import csv
import io
import json
import math
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

import numpy as np
from numpy.typing import ArrayLike

from dbnet.errors import ImageError, UserError, library_errors
from dbnet.files import check_regular, write_whole
from dbnet.geometry import areas, fault_of, fit_outline, order_outlines, reading_order
from dbnet.images import name_stem, read_size


@dataclass
class Annotation:
    """The words of one image, in pixels of the upright original."""

    polygons: list[np.ndarray] = field(default_factory=list)
    """(n, 2) arrays of points (x, y): float64 where they were read, n as in the file"""
    dont_care: list[bool] = field(default_factory=list)
    """for each polygon, whether the losses and the metric leave it out"""
    scores: list[float] | None = None
    """confidence of each polygon, 0..1, for detections"""
    size: tuple[int, int] | None = None
    """(width, height) of the image as the file says, or to be written there"""
    lines: list[int] | None = None
    """line number of each polygon, from 1; only where the polygons are in reading order"""

    @classmethod
    def detected(
        cls, polygons: Sequence[ArrayLike], scores: list[float] | None, size: Sequence[int] | None = None
    ) -> Self:
        """What a network has found in an image of `size`; `polygons` are (n, 2) integers."""
        arrays = [np.asarray(polygon, np.int32) for polygon in polygons]
        return cls(arrays, [False] * len(arrays), scores, (size[0], size[1]) if size else None)

    def add(self, polygon: np.ndarray, dont_care: bool) -> None:
        """Add a word."""
        self.polygons.append(polygon)
        self.dont_care.append(dont_care)

    def words(self) -> Iterator[tuple[np.ndarray, bool, dict[str, Any]]]:
        """Polygon, don't care flag, and score, order and line by name where they are known."""
        for index, (polygon, ignore) in enumerate(zip(self.polygons, self.dont_care, strict=True)):
            extras: dict[str, Any] = {} if self.scores is None else {"score": self.scores[index]}
            if self.lines is not None:
                extras |= {"order": index + 1, "line": self.lines[index]}
            yield polygon, ignore, extras


class TextFile(NamedTuple):
    """A text file in a folder or in a zip."""

    where: str
    """its path, for messages"""
    stem: str
    """its name without the suffix"""
    read: Callable[[], str]
    """returns its text; raises UserError"""


# ---- files


def parse_json(where: str, text: str) -> Any:
    """The content of a JSON text. Raises UserError."""
    try:
        return json.loads(text, object_pairs_hook=_read_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({' '.join(str(error).split())})") from None


def _read_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises ValueError for a name that occurs twice, since only one of the two would be read."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return content


def list_text_files(source: Path, suffix: str) -> list[TextFile]:
    """Files of a folder and its sub-folders, or of a zip, that end in `suffix`, by name, without hidden ones.

    The stem of a file in a sub-folder is FOLDER_NAME, as that of an image (`name_stem`). Raises UserError.
    """
    if source.is_dir():
        paths = [path for path in source.rglob("*") if path.suffix.lower() == suffix and not path.is_dir()]
        named = [(path, path.relative_to(source).with_suffix("").parts) for path in sorted(paths)]
        return [
            TextFile(str(path), "_".join(parts), partial(read_file, path))
            for path, parts in named
            if not any(part.startswith(".") for part in parts)
        ]
    archive = _open_zip(source)
    files = []
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
        name = entry.filename.rsplit("/", 1)[-1]
        if not name.startswith(".") and name.lower().endswith(suffix):
            where = f"{source}: {name}"
            files.append(TextFile(where, name[: -len(suffix)], partial(_read_zipped, where, archive, entry)))
    return files


def read_file(path: Path) -> str:
    """The text of a file, with newlines as they are there. Raises UserError."""
    check_regular(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _decode(str(path), data)


_MAX_ZIPPED = 1 << 28  # bytes that a file in a zip may unfold to


def _open_zip(path: Path) -> zipfile.ZipFile:
    check_regular(path)
    with library_errors(f"{path}: not a zip file that can be read"):
        return zipfile.ZipFile(path)


def _read_zipped(where: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    if entry.file_size > _MAX_ZIPPED:
        raise UserError(f"{where}: unfolds to {entry.file_size} bytes, over the limit of {_MAX_ZIPPED}")
    with library_errors(f"{where}: cannot be read from the zip"):
        data = archive.read(entry)
    return _decode(where, data)


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "text in UTF-16, not" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not text in"
        raise UserError(f"{where}: {kind} UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


# ---- names, points and flags


def check_name(where: Path | str, name: str) -> str:
    """The name, where it is that of a file in the folder of the images or in a sub-folder of it. Raises UserError."""
    leads_out = name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/"))
    if leads_out or "\0" in name or name.encode(errors="ignore").decode() != name:  # a lone surrogate is no character
        raise UserError(f"{where}: {name!r} is not a plain file name, nor a path within the folder of the images")
    return name


def nfc(name: str) -> str:
    """The name in the Unicode form of most systems; macOS takes letters apart."""
    return unicodedata.normalize("NFC", name)


class ImageNames:
    """Finds which image a name in a file means: the whole path, or its end, also as in a URL or in the other Unicode
    form."""

    def __init__(self, names: list[str]) -> None:
        self._known = {nfc(name): name for name in names} | {name: name for name in names}

    def find(self, where: str, written: str) -> str:
        """The name of the image; the last part of the path for one that is not there. Raises UserError."""
        parts = re.split(r"[/\\]", written)
        for spelled in (written.split("/"), parts, [unquote(part) for part in parts]):
            for start in range(len(spelled)):
                name = "/".join(spelled[start:])
                found = self._known.get(name) or self._known.get(nfc(name))
                if found:
                    return found
        return check_name(where, parts[-1])


def to_polygon(where: str, points: object) -> np.ndarray:
    """(n, 2) float64 of a JSON value that must be a list of [x, y] pairs of finite numbers. Raises UserError."""
    try:
        if not isinstance(points, list) or any(isinstance(value, bool | str) for point in points for value in point):
            raise ValueError
        polygon = np.array(points, dtype=np.float64).reshape(len(points), 2)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f'{where}: "points" must be a list of [x, y] pairs of numbers') from None
    return check_polygon(where, polygon)


def check_polygon(where: str, polygon: np.ndarray) -> np.ndarray:
    """The (n, 2) polygon. Raises UserError for one that can be neither learned nor scored."""
    fault = fault_of(polygon)
    if fault:
        raise UserError(f"{where}: {fault}")
    return polygon


def rectangle(x0: float, y0: float, x1: float, y1: float, degrees: float = 0) -> np.ndarray:
    """(4, 2) corners of a rectangle, clockwise from its upper left, turned clockwise about its centre."""
    left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
    if not degrees:
        return corners
    angle, centre = math.radians(degrees % 360), corners.mean(axis=0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)  # exact for quarter turns
    return (corners - centre) @ np.array([[cosine, sine], [-sine, cosine]]) + centre


def scores_of(values: Iterable[object]) -> list[float] | None:
    """The confidences 0..1 of an image's words, if each word has one."""
    values = list(values)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    is_known = len(numbers) == len(values) > 0 and all(0 <= number <= 1 for number in numbers)
    return list(map(float, numbers)) if is_known else None


def size_of(entry: dict[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """The image's size under these two names, or None where it is missing or empty."""
    values = [str(entry.get(name)).removesuffix(".0") for name in (width, height)]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", value, re.ASCII) for value in values):
        return None
    return int(values[0]), int(values[1])


_DONT_CARE = {"ignore", "ignored", "iscrowd", "crowd", "illegible", "illegibility", "unreadable", "difficult"}
_DONT_CARE |= {"dontcare", "donotcare", "legibilityillegible"}
_CARE = {"legible", "readable"}
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", "none", "null", ""}


@cache
def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def is_hidden_text(text: object) -> bool:
    """Whether a transcription is `###`, also in quotes."""
    return isinstance(text, str) and re.fullmatch(r"\s*(['\"]?)###\1\s*", text) is not None


def is_dont_care_class(name: object) -> bool:
    """Whether a class or label is `###`, or means don't care in words."""
    return isinstance(name, str) and (is_hidden_text(name) or _letters(name) in _DONT_CARE)


def is_flagged(where: str, entry: dict[str, Any]) -> bool:
    """Whether a word has a flag that says don't care: `difficult`, `ignore`, `illegibility` and others of their kind,
    in the entry or its flags, attributes or tags. Raises UserError for a flag that is neither true nor false."""
    flags = [*entry.items()]
    for name in ("flags", "attributes", "tags"):
        values = entry.get(name)
        if isinstance(values, dict):
            flags.extend(values.items())
        elif isinstance(values, list):
            flags.extend((tag, True) for tag in values if isinstance(tag, str))
            flags.extend((tag["name"], tag.get("value")) for tag in values if isinstance(tag, dict) and "name" in tag)
    for name, value in flags:
        meaning = _letters(str(name))
        if meaning == "legibility":
            meaning, value = "illegible", str(value).lower() == "illegible"
        if meaning in _DONT_CARE or (meaning in _CARE and value is not None):
            text = str(value).strip().lower()
            if text not in _TRUE | _FALSE:
                raise UserError(f'{where}: "{name}" must be true or false, not {text[:40]!r}')
            if (text in _TRUE) == (meaning in _DONT_CARE):
                return True
    return False


def check_sizes(source: Path, annotations: dict[str, Annotation], images: dict[str, Path]) -> None:
    """Raise UserError where labels were made for another image: their file has another size than the image of this
    name, or all coordinates are shares of the image.

    A file may have the size as stored, before the turn that EXIF asks for, if its points fit the upright image alone.
    """
    for name, annotation in annotations.items():
        highest = max((polygon.max(initial=0) for polygon in annotation.polygons), default=2)
        if highest <= 1:
            raise UserError(f"{source}: {name}: coordinates are shares of the image, from 0 to 1; write them in pixels")
        if not annotation.size:
            continue
        try:
            upright = read_size(images[name])
        except ImageError:  # a submission can be scored without the images
            continue
        stored = (upright[1], upright[0])
        if annotation.size == upright or (
            annotation.size == stored and _lie_in(annotation, upright) and not _lie_in(annotation, stored)
        ):
            continue
        shown = " x ".join(map(str, annotation.size))
        advice = "put the image that was labelled there, or scale the labels"
        if annotation.size == stored:
            advice = "the tool ignored that EXIF turns the image; turn its pixels (mogrify -auto-orient) and label that"
        raise UserError(
            f"{source}: {name}: was labelled at {shown} px, but the image has {upright[0]} x {upright[1]} px; {advice}"
        )


def _lie_in(annotation: Annotation, size: tuple[int, int]) -> bool:
    """Whether all points lie in an image of this size, or up to two pixels outside."""
    return all((polygon <= np.add(size, 2)).all() for polygon in annotation.polygons)


def put_in_order(annotations: dict[str, Annotation]) -> list[str]:
    """Bring outlines into the order in which the metric reads them, top edge first, where that is certain.

    Changes the annotations. Returns sentences that count the outlines that were changed, left or are not scored.
    """
    changed = doubtful = few = total = 0
    for annotation in annotations.values():
        annotation.polygons, changes, doubts = order_outlines(annotation.polygons)
        changed, doubtful, total = changed + changes, doubtful + doubts, total + len(annotation.polygons)
        few += sum(len(polygon) < 4 for polygon in annotation.polygons)
    counts = {
        "now begin at the upper left and run along the top": changed,
        "begin elsewhere than at the upper left and were left; the metric takes their first half for the top edge, so "
        "scores may be too low": doubtful,
        "have fewer than four points; the metric does not count them": few,
    }
    return [f"{count} of {total} outlines {what}" for what, count in counts.items() if count]


# ---- writing

HEADER = ["filename", "polygons"]
OUT_FORMATS = ("csv", "competition", "coco", "icdar", "labelme", "ppocrlabel")
_FORMAT_OF_SUFFIX = {".csv": "csv", ".json": "competition", ".zip": "icdar"}


RESULT_MARK = "detections by dbnet"
"""In a file of detections whose format has room for it"""


def result_mark(form: str) -> str:
    """The words by which `files.check_outputs` knows an earlier result in this format."""
    return ",".join(HEADER) if form == "csv" else RESULT_MARK


def choose_format(path: Path, form: str, names: list[str]) -> str:
    """The format of detections to be written to `path`: `form`, or what the name says for auto.

    Raises UserError where the name says nothing, the format cannot hold images of these names, or a label file of
    LabelMe that may have been corrected would be overwritten.
    """
    if form == "auto":
        form = "ppocrlabel" if path.name == "Label.txt" else _FORMAT_OF_SUFFIX.get(path.suffix.lower(), "")
    if not form:
        raise UserError(f"{path}: its suffix names no format; end it in .csv, .json or .zip, or say --out-format")
    if form in ("icdar", "labelme"):
        check_stems(names)
    if form == "ppocrlabel" and path.is_dir():
        raise UserError(f"{path}: is a folder; name the file, {path / 'Label.txt'}")
    for name in names if form != "csv" else []:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise UserError(f"{name!a}: the file name is not UTF-8, as {form} files are; rename it or write a CSV")
        if form == "ppocrlabel" and re.search(r"[\t\r\n]", name):
            raise UserError(f"{name!a}: a line of Label.txt cannot hold this file name; rename it")
    there = next((name for name in names if form == "labelme" and labelme_file(path, name).exists()), None)
    if there:
        raise UserError(
            f"{labelme_file(path, there)}: is there already, and may be corrected; move it away or name another folder"
        )
    return form


def check_stems(names: Iterable[str]) -> None:
    """Raise UserError where files that are named after images would get the same name for two of them."""
    seen: dict[str, str] = {}
    for name in names:
        if name_stem(name) in seen:
            other = seen[name_stem(name)]
            raise UserError(f"{name}: its label file would have the same name as {other}'s; rename one of the images")
        seen[name_stem(name)] = name


def write_detections(
    path: Path, form: str, found: dict[str, Annotation], images: dict[str, Path] | None = None
) -> None:
    """Write the words found in each image in one of `OUT_FORMATS`: as they are in a csv, else as labels (`as_labels`).

    `images` are their files by name, to which LabelMe and PPOCRLabel refer. Raises UserError.
    """
    if form == "csv":
        write_submission(path, {name: annotation.polygons for name, annotation in found.items()})
    else:
        write_labels(path, form, {name: as_labels(annotation) for name, annotation in found.items()}, images)


def as_labels(annotation: Annotation) -> Annotation:
    """Detections as labels: outlines of 4 or 8 whole points (`fit_outline`), in reading order with line numbers."""
    outlines = [np.rint(fit_outline(polygon)).astype(np.int64) for polygon in annotation.polygons]
    order, lines = reading_order(outlines)
    return Annotation(
        [outlines[index] for index in order],
        [annotation.dont_care[index] for index in order],
        None if annotation.scores is None else [annotation.scores[index] for index in order],
        annotation.size,
        [lines[index] for index in order],
    )


def uncertainty(annotation: Annotation) -> float:
    """How much the detections of an image need a look: the share of scores under 0.6, 1 where nothing was found.

    Of four measures tried on 60 receipts this one goes with errors the most (rank correlation 0.48).
    """
    return float(np.mean(np.array(annotation.scores) < 0.6)) if annotation.scores else 1.0


def write_labels(path: Path, form: str, found: dict[str, Annotation], images: dict[str, Path] | None = None) -> None:
    """Write annotations as they are, in one of `OUT_FORMATS` but csv; arguments and errors as of `write_detections`."""
    files = {name: Path(name) for name in found} | (images or {})
    if form == "labelme":
        for name, annotation in found.items():
            _write_json(labelme_file(path, name), _labelme_content(path, files[name], annotation))
    elif form == "ppocrlabel":
        with write_whole(path, "w") as file:
            file.writelines(_ppocrlabel_line(files[name], annotation) for name, annotation in found.items())
    elif form == "icdar":
        _write_icdar_zip(path, found)
    else:
        _write_json(path, _coco_content(found) if form == "coco" else _competition_content(found))


def _write_json(path: Path, content: Any) -> None:
    with write_whole(path, "w") as file:
        json.dump(content, file, ensure_ascii=False)


def _competition_content(found: dict[str, Annotation]) -> dict[str, Any]:
    """What `read_annotations` reads, with scores, order, lines and the images' sizes where they are known."""
    return {
        "made_by": RESULT_MARK,
        "images": {
            name: dict(zip(("img_w", "img_h"), annotation.size or (), strict=False))
            | {
                "words": {
                    f"{number:04d}": {
                        "points": polygon.tolist(),
                        **({"illegibility": True} if ignore else {}),
                        **extras,
                    }
                    for number, (polygon, ignore, extras) in enumerate(annotation.words(), start=1)
                }
            }
            for name, annotation in found.items()
        },
    }


def _coco_content(found: dict[str, Annotation]) -> dict[str, Any]:
    """Images, annotations and the one category `text`: COCO's annotations and, under "annotations", its results."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, annotation) in enumerate(found.items(), start=1):
        size = dict(zip(("width", "height"), annotation.size or (), strict=False))
        images.append({"id": image_id, "file_name": name, **size})
        for polygon, ignore, extras in annotation.words():
            (left, top), (right, bottom) = polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": [polygon.ravel().tolist()],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(areas(polygon.astype(np.float64), np.array([len(polygon)]))[0]),
                    "iscrowd": int(ignore),
                    **extras,
                }
            )
    return {
        "info": {"description": RESULT_MARK},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "text"}],
    }


def labelme_file(folder: Path, name: str) -> Path:
    return folder / f"{name_stem(name)}.json"


def _labelme_content(folder: Path, image: Path, annotation: Annotation) -> dict[str, Any]:
    """A file that LabelMe opens: its image is found by a path relative to the file."""
    width, height = annotation.size or (None, None)
    shapes = [
        {
            "label": "###" if ignore else "text",
            "points": polygon.tolist(),
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            **extras,
        }
        for polygon, ignore, extras in annotation.words()
    ]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": _relative(image, folder),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _relative(path: Path, folder: Path) -> str:
    """The path from the folder, with slashes; the whole path where they are on different drives."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def _ppocrlabel_line(image: Path, annotation: Annotation) -> str:
    """A line of Label.txt, where an image is known by its folder and name."""
    words = [
        {"transcription": "###" if ignore else "", "points": polygon.tolist(), "difficult": ignore, **extras}
        for polygon, ignore, extras in annotation.words()
    ]
    return f"{image.absolute().parent.name}/{image.name}\t{json.dumps(words, ensure_ascii=False)}\n"


def _write_icdar_zip(path: Path, found: dict[str, Annotation]) -> None:
    """A zip of `res_NAME.txt` for each image, as ICDAR's upload forms want it: lines of `x1,y1,...,xn,yn`, and `,###`
    for don't care. Raises UserError as `check_stems` does, or where it cannot be written."""
    check_stems(found)
    with write_whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = RESULT_MARK.encode()
        for name, annotation in found.items():
            lines = [
                ",".join(np.format_float_positional(value, trim="-") for value in polygon.ravel().tolist())
                + (",###\r\n" if ignore else "\r\n")
                for polygon, ignore, _ in annotation.words()
            ]
            archive.writestr(f"res_{name_stem(name)}.txt", "".join(lines))


# ---- submissions

_MAX_FIELD = 1 << 28  # a row of 500 polygons with many points is longer than the csv module's default


def write_submission(path: Path, rows: dict[str, list[np.ndarray]]) -> None:
    """Write a row for each file name and its (n, 2) int polygons, in order."""
    with write_whole(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, polygons in rows.items():
            writer.writerow([name, "|".join(" ".join(map(str, polygon.ravel())) for polygon in polygons)])


def read_submission(path: Path) -> dict[str, list[np.ndarray]]:
    """File names and their polygons, (n, 2) float64 arrays, in the order of the file. Raises UserError."""
    csv.field_size_limit(_MAX_FIELD)
    try:
        rows = list(csv.reader(io.StringIO(read_file(path), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error})") from None
    if not rows or any(column not in rows[0] for column in HEADER):
        raise UserError(f"{path}: the first row must name the columns filename and polygons")
    name_column, polygons_column = (rows[0].index(column) for column in HEADER)
    submission: dict[str, list[np.ndarray]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(rows[0]):
            raise UserError(f"{path}: row {number} has {len(row)} columns, not {len(rows[0])}")
        name = row[name_column]
        if name in submission:
            raise UserError(f"{path}: row {number}: {name} is there twice; keep one row an image")
        submission[name] = [
            _parse_polygon(path, number, text) for text in row[polygons_column].split("|") if text.strip()
        ]
    return submission


def _parse_polygon(path: Path, number: int, text: str) -> np.ndarray:
    try:
        if "_" in text:  # which Python would take for a digit's separator
            raise ValueError
        values = [float(word) for word in text.split()]
    except ValueError:
        raise UserError(f"{path}: row {number}: coordinates must be numbers, not {text[:40]!r}") from None
    if len(values) % 2:
        raise UserError(f"{path}: row {number}: a polygon has {len(values)} coordinates; x and y come in pairs")
    return check_polygon(f"{path}: row {number}", np.array(values).reshape(-1, 2))
