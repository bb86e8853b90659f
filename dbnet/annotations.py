"""Annotations, which `dbnet.formats` reads: words of images, what is checked of them, and files of detections."""

import csv
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike

from dbnet.errors import UserError
from dbnet.files import check_name, make_folder, write_whole
from dbnet.geometry import fit_outline, order_outlines, reading_order
from dbnet.images import Size, name_stem, read_size


@dataclass
class Annotation:
    """The words of one image, in pixels of the upright original."""

    polygons: list[np.ndarray] = field(default_factory=list)  # (n, 2) points (x, y): float64 where they were read
    dont_care: list[bool] = field(default_factory=list)  # whether the losses and the metric leave the polygon out
    scores: list[float] | None = None  # confidence of each polygon, 0..1, for detections
    size: tuple[int, int] | None = None  # (width, height) of the image where known; as stated until `check_sizes`
    lines: list[int] | None = None  # of each polygon, from 1; only where the polygons are in reading order

    @classmethod
    def detected(cls, polygons: Sequence[ArrayLike], scores: list[float] | None, size: Size | None = None) -> Self:
        """What a network has found in an image of `size`; `polygons` are (n, 2) integers."""
        arrays = [np.asarray(polygon, np.int32) for polygon in polygons]
        return cls(arrays, [False] * len(arrays), scores, (size[0], size[1]) if size else None)

    def words(self) -> Iterator[tuple[np.ndarray, bool, dict[str, Any]]]:
        """Polygon, don't care flag, and score, order and line by name where they are known."""
        for index, (polygon, ignore) in enumerate(zip(self.polygons, self.dont_care, strict=True)):
            extras: dict[str, Any] = {} if self.scores is None else {"score": self.scores[index]}
            if self.lines is not None:
                extras |= {"order": index + 1, "line": self.lines[index]}
            yield polygon, ignore, extras


def check_sizes(source: Path, annotations: dict[str, Annotation], images: dict[str, Path]) -> list[str]:
    """Raise UserError where labels were made for another image: their file has another size than the image of this
    name, or all coordinates are shares of the image. A file may have the size as stored, before the turn that EXIF asks
    for, if its points fit the upright image alone. Gives the annotations the sizes of the images that can be read.
    Returns a sentence that counts outlines outside of their images."""
    outside = list[str]()
    for name, annotation in annotations.items():
        farthest = (points := np.concatenate([np.zeros((1, 2)), *annotation.polygons])).max(axis=0)
        if farthest.max() <= 1 and (points % 1).any():
            raise UserError(f"{source}: {name}: coordinates are shares of the image, from 0 to 1; write them in pixels")
        stated, annotation.size = annotation.size, None
        with suppress(UserError):  # a submission can be scored without the images, or what opens them
            annotation.size = read_size(images[name])
        if not (size := annotation.size):
            continue
        middles = [polygon.mean(axis=0) for polygon in annotation.polygons if len(polygon)]
        outside += [name for middle in middles if (middle < 0).any() or (middle > size).any()]
        if stated in (None, size):
            continue
        advice = "put the image that was labelled there, or scale the labels"
        if stated == size[::-1]:
            if (farthest <= np.add(size, 2)).all() and (farthest > np.add(stated, 2)).any():
                continue
            advice = "if its EXIF data turn it, turn it for good (mogrify -auto-orient); then label it as it is shown"
        labelled, upright = (f"{width} x {height} px" for width, height in (stated, size))
        raise UserError(f"{source}: {name}: was labelled at {labelled}, but the image has {upright}; {advice}")
    advice = "were they labelled at another size, or before EXIF turned the image?"
    return [f"{len(outside)} outlines lie outside of their images, first in {outside[0]}; {advice}"] if outside else []


def put_in_order(annotations: dict[str, Annotation]) -> list[str]:
    """Bring outlines into the order in which the metric reads them, top edge first, where that is certain. Returns
    sentences that count the outlines that were changed, left or are not scored."""
    counts = np.zeros(4, int)
    for annotation in annotations.values():
        annotation.polygons, changed, doubtful = order_outlines(annotation.polygons)
        few = sum(len(polygon) < 4 for polygon in annotation.polygons)
        counts += (changed, doubtful, few, len(annotation.polygons))
    kinds = (
        "now begin at the upper left and run along the top",
        "begin elsewhere than at the upper left and were left; the metric takes their first half for the top edge, so "
        "scores may be too low",
        "have fewer than four points; the metric does not count them",
    )
    return [f"{count} of {counts[3]} outlines {kind}" for count, kind in zip(counts, kinds, strict=False) if count]


HEADER = ["filename", "polygons"]
RESULT_MARK = "detections by dbnet"  # in a file of detections whose format has room for it
MAX_OVERLAP = 0.4  # share of the smaller of two outlines above which both can hardly be text
_FORMAT_OF_SUFFIX = {".csv": "csv", ".json": "competition", ".zip": "icdar"}


def result_mark(form: str) -> str:
    """The words by which `files.check_outputs` knows an earlier result in this format."""
    return ",".join(HEADER) + "\r\n" if form == "csv" else RESULT_MARK


def choose_format(path: Path, form: str, names: list[str]) -> str:
    """The format of detections to be written to `path`: `form`, or what the name says for auto. Raises UserError where
    neither says one, it cannot hold images of these names, or would overwrite a file that may have been corrected."""
    named = "ppocrlabel" if path.name == "Label.txt" else _FORMAT_OF_SUFFIX.get(path.suffix.lower(), "")
    if form == "auto":
        form = named
    elif named and (named, form) not in {(form, form), ("competition", "coco")}:
        raise UserError(f"{path}: is the name of a file of the format {named}, not {form}; name another --out")
    if not form:
        raise UserError(f"{path}: its suffix names no format; end it in .csv, .json or .zip, or say --out-format")
    if form == "ppocrlabel" and path.is_dir():
        raise UserError(f"{path}: is a folder; name the file, {path / 'Label.txt'}")
    seen: dict[str, str] = {}
    for name in names:
        label = path / f"{name_stem(name)}.json"
        other = seen.setdefault(name_stem(name), name)
        if form in ("icdar", "labelme") and other != name:
            raise UserError(f"{name}: would have the same label file as {other}; rename one of the images")
        if form == "ppocrlabel" and re.search(r"[\t\r\n]", name):
            raise UserError(f"{name!a}: a line of Label.txt cannot hold this file name; rename it")
        if form == "labelme" and check_name(label).exists():
            raise UserError(f"{label}: is there already, and may be corrected; move it away or name another folder")
    return form


def uncertainty(annotation: Annotation) -> float:
    """How much the detections of an image need a look: the share of scores under 0.6, 1 where nothing was found. Of
    four measures tried on 60 receipts this one goes with errors the most (rank correlation 0.48)."""
    return float(np.mean(np.array(annotation.scores) < 0.6)) if annotation.scores else 1.0


def as_labels(annotation: Annotation) -> Annotation:
    """Detections as labels: outlines of 4 or 8 whole points (`fit_outline`), in reading order with line numbers.
    Where one covers more than MAX_OVERLAP of another, both are don't care, until a person decides which is text."""
    rounded = [np.rint(fit_outline(polygon)) for polygon in annotation.polygons]  # the upper left may change
    outlines = [np.rint(fit_outline(each) if len(each) == 4 else each).astype(np.int64) for each in rounded]
    order, lines = reading_order(outlines)
    shapes = shapely.make_valid(np.array([shapely.Polygon(polygon) for polygon in annotation.polygons], object))
    some, others = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    shared, areas = shapely.area(shapely.intersection(shapes[some], shapes[others])), shapely.area(shapes)
    doubtful = some[(some != others) & (shared > MAX_OVERLAP * np.minimum(areas[some], areas[others]))]
    return Annotation(
        [outlines[index] for index in order],
        [annotation.dont_care[index] or index in doubtful for index in order],
        None if annotation.scores is None else [annotation.scores[index] for index in order],
        annotation.size,
        [lines[index] for index in order],
    )


def write_detections(path: Path, form: str, found: dict[str, Annotation], images: dict[str, Path] | None) -> None:
    """Write the words found in each image, in the formats of predict.py: as they are in a csv, else as labels. `images`
    are their files by name, to which LabelMe and PPOCRLabel refer. Prints how many overlap. Raises UserError."""
    if form != "csv":
        found = {name: as_labels(annotation) for name, annotation in found.items()}
    if form == "icdar":  # for an upload, where nothing is don't care
        for annotation in found.values():
            annotation.dont_care = [False] * len(annotation.polygons)
    if doubtful := sum(sum(annotation.dont_care) for annotation in found.values()):
        print(f"{path}: {doubtful} outlines overlap others by much and are marked as don't care; look at these first")
    write_labels(path, form, found, images)


def write_labels(path: Path, form: str, found: dict[str, Annotation], images: dict[str, Path] | None = None) -> None:
    """Write annotations as they are; arguments and errors as of `write_detections`."""
    files = {name: Path(name) for name in found} | (images or {})
    if form == "labelme":
        for name, annotation in found.items():
            label = path / f"{name_stem(name)}.json"
            make_folder(label.parent)
            with write_whole(label, "w") as file:
                json.dump(_labelme_content(label.parent, files[name], annotation), file, ensure_ascii=False)
        return
    with write_whole(path, "wb" if form == "icdar" else "w") as file:
        if form == "icdar":
            _write_icdar_zip(file, found)
        elif form == "ppocrlabel":
            file.writelines(_ppocrlabel_line(files[name], annotation) for name, annotation in found.items())
        elif form == "csv":
            rows = csv.writer(file)
            rows.writerow(HEADER)
            for name, annotation in found.items():
                rows.writerow([name, "|".join(" ".join(map(str, points.ravel())) for points in annotation.polygons)])
        else:
            json.dump(_coco_content(found) if form == "coco" else _competition_content(found), file, ensure_ascii=False)


def _sized(annotation: Annotation, width: str, height: str) -> dict[str, int]:
    """The size by these names; nothing where it is not known."""
    return dict(zip((width, height), annotation.size or (), strict=False))


def _competition_content(found: dict[str, Annotation]) -> dict[str, Any]:
    """The annotation format of jsons/SPLIT.json, with scores, order, lines and the images' sizes where known."""
    images = {}
    for name, annotation in found.items():
        words = {
            f"{number:04d}": {"points": polygon.tolist(), **({"illegibility": True} if ignore else {}), **extras}
            for number, (polygon, ignore, extras) in enumerate(annotation.words(), start=1)
        }
        images[name] = {**_sized(annotation, "img_w", "img_h"), "words": words}
    return {"made_by": RESULT_MARK, "images": images}


def _coco_content(found: dict[str, Annotation]) -> dict[str, Any]:
    """Images, annotations and the one category `text`: COCO's annotations and, under "annotations", its results."""
    images, words = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id, (name, annotation) in enumerate(found.items(), start=1):
        images.append({"id": image_id, "file_name": name, **_sized(annotation, "width", "height")})
        for polygon, ignore, extras in annotation.words():
            (left, top), (right, bottom) = polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()
            word: dict[str, Any] = {"id": len(words) + 1, "image_id": image_id, "category_id": 1}
            word |= {"iscrowd": int(ignore), "segmentation": [polygon.ravel().tolist()]}
            word["bbox"] = [left, top, right - left, bottom - top]
            words.append({**word, "area": cv2.contourArea(polygon.astype(np.float32)), **extras})
    kinds = {"info": {"description": RESULT_MARK}, "categories": [{"id": 1, "name": "text"}]}
    return {**kinds, "images": images, "annotations": words}


def _labelme_content(folder: Path, image: Path, annotation: Annotation) -> dict[str, Any]:
    """A file in `folder` that LabelMe opens: its image is found by a path relative to it."""
    try:
        image_path = Path(os.path.relpath(image, folder)).as_posix()
    except ValueError:  # on another drive
        image_path = image.absolute().as_posix()
    plain: dict[str, Any] = {"group_id": None, "description": "", "shape_type": "polygon", "flags": {}}
    shapes = [
        {"label": "###" if ignore else "text", "points": polygon.tolist(), **plain, **extras}
        for polygon, ignore, extras in annotation.words()
    ]
    size = {"imageHeight": None, "imageWidth": None, **_sized(annotation, "imageWidth", "imageHeight")}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image_path, "imageData": None, **size}


def _ppocrlabel_line(image: Path, annotation: Annotation) -> str:
    """A line of Label.txt, where an image is known by its folder and name."""
    words = [
        {"transcription": "###" if ignore else "", "points": polygon.tolist(), "difficult": ignore, **extras}
        for polygon, ignore, extras in annotation.words()
    ]
    return f"{image.absolute().parent.name}/{image.name}\t{json.dumps(words, ensure_ascii=False)}\n"


def _write_icdar_zip(file: IO[bytes], found: dict[str, Annotation]) -> None:
    """A zip of `res_NAME.txt` for each image, as ICDAR's forms want it: `x1,y1,...,xn,yn`, and `,###` if don't care."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = RESULT_MARK.encode()
        for name, annotation in found.items():
            lines = ""
            for polygon, ignore, _ in annotation.words():
                numbers = (np.format_float_positional(value, trim="-") for value in polygon.ravel().tolist())
                lines += ",".join(numbers) + (",###\r\n" if ignore else "\r\n")
            folder, slash, stem = name_stem(name).rpartition("/")
            archive.writestr(f"{folder}{slash}res_{stem}.txt", lines)
