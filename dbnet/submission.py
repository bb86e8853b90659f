"""Submission files: a CSV `filename,polygons`, a row an image, polygons as `x1 y1 x2 y2 ...` separated by `|`; and
the choice between it and the other formats that detections are written in."""

import csv
from pathlib import Path

import numpy as np

from dbnet.annotations import read_labels_at, write_annotations
from dbnet.errors import UserError
from dbnet.files import write_whole
from dbnet.formats import Annotation, check_stems, write_coco, write_icdar_zip
from dbnet.geometry import fault_of

HEADER = ["filename", "polygons"]
_MAX_FIELD = 1 << 28  # a row of 500 polygons with many points is longer than the csv module's default
_FORMAT_OF_SUFFIX = {".csv": "csv", ".json": "competition", ".zip": "icdar"}


def choose_format(path: Path, form: str, names: list[str]) -> str:
    """The format of detections to be written to `path`: `form`, or what its suffix says where that is auto.

    Raises UserError where it says nothing, or where the format cannot hold images of these names.
    """
    if form == "auto":
        form = _FORMAT_OF_SUFFIX.get(path.suffix.lower(), "")
    if not form:
        raise UserError(f"{path}: its suffix names no format; end it in .csv, .json or .zip, or say --out-format")
    if form == "icdar":
        check_stems(names)
    for name in names if form != "csv" else []:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise UserError(f"{name!a}: the file name is not UTF-8, as {form} files are; rename it or write a CSV")
    return form


def write_detections(path: Path, form: str, found: dict[str, Annotation]) -> None:
    """Write the words found in each image as csv, competition, icdar or coco; scores where the format has room.

    The file appears whole or not at all. Raises UserError where it cannot be written.
    """
    if form == "csv":
        write_submission(path, {name: annotation.polygons for name, annotation in found.items()})
    else:
        {"competition": write_annotations, "icdar": write_icdar_zip, "coco": write_coco}[form](path, found)


def read_detections(path: Path, images: list[str]) -> dict[str, Annotation]:
    """Read what `write_detections` wrote, in any of its formats, on images that are called so.

    Raises UserError for anything else.
    """
    if path.suffix.lower() in (".json", ".zip"):
        return read_labels_at(path, images)[1]
    return {name: Annotation(polygons, [False] * len(polygons)) for name, polygons in read_submission(path).items()}


def write_submission(path: Path, rows: dict[str, list[np.ndarray]]) -> None:
    """Write a row for each file name and its (n, 2) int polygons, in order; the file appears whole or not at all."""
    with write_whole(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, polygons in rows.items():
            writer.writerow([name, "|".join(" ".join(map(str, polygon.ravel())) for polygon in polygons)])


def read_submission(path: Path) -> dict[str, list[np.ndarray]]:
    """File names and their polygons, (n, 2) float64 arrays, in the order of the file.

    Raises UserError, naming the file and the row, for anything else than a submission.
    """
    csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV in UTF-8 ({error})") from None
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
    polygon = np.array(values).reshape(-1, 2)
    fault = fault_of(polygon)
    if fault:
        raise UserError(f"{path}: row {number}: {fault}")
    return polygon
