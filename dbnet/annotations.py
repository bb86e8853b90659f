"""Annotations in the formats of other projects: ICDAR and Total-Text text files, COCO, LabelMe; read and written.

What is read is checked: whatever is not of its format raises UserError, in one line that names the file, the place in
it and the mend. Nothing in a file is ever run, and no path in it is followed.
"""

import csv
import json
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from dbnet.errors import UserError
from dbnet.files import check_regular, write_whole
from dbnet.geometry import fault_of
from dbnet.images import name_stem


@dataclass
class Annotation:
    """The words of one image, in pixels of the upright original."""

    polygons: list[np.ndarray] = field(default_factory=list)
    """(n, 2) float64 arrays of points (x, y), n as in the file"""

    dont_care: list[bool] = field(default_factory=list)
    """for each polygon, whether it counts neither for the losses nor for the metric"""

    scores: list[float] | None = None
    """confidence of each polygon, 0..1, where they were detected and the format has room for it"""

    size: tuple[int, int] | None = None
    """(width, height) of the image, for formats that want it written"""

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


class TextFile(NamedTuple):
    """A file on one image, from a folder or from a zip."""

    where: str
    """what messages call it"""

    stem: str
    """its name without the suffix"""

    read: Callable[[], str]
    """its text, with newlines as \\n; raises UserError"""


# ---- files


def load_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError."""
    return parse_json(str(path), _read_file(path))


def parse_json(where: str, text: str) -> Any:
    """The content of a JSON text. Raises UserError."""
    try:
        return json.loads(text, object_pairs_hook=_read_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({' '.join(str(error).split())})") from None


def _read_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises ValueError where a name is there twice, since only one of the two would be read."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return content


def list_text_files(place: Path, suffix: str) -> list[TextFile]:
    """The files of a folder or a zip that end in `suffix`, by name; hidden ones are none.

    Those of a zip may lie in folders of it. Raises UserError where it cannot be read.
    """
    if place.is_dir():
        paths = sorted(path for path in place.iterdir() if path.suffix.lower() == suffix)
        return [TextFile(str(path), path.stem, partial(_read_file, path)) for path in paths if path.name[:1] != "."]
    archive = _open_zip(place)
    files = []
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
        name = entry.filename.rsplit("/", 1)[-1]
        if not name.startswith(".") and name.lower().endswith(suffix):
            where = f"{place}: {name}"
            read = partial(_read_zipped, where, archive, entry)
            files.append(TextFile(where, name[: -len(suffix)], read))
    return files


def _read_file(path: Path) -> str:
    check_regular(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the annotations of a split belong there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _decode(str(path), data)


_MAX_ZIPPED = 1 << 28  # bytes that a file in a zip may unfold to


def _open_zip(path: Path) -> zipfile.ZipFile:
    check_regular(path)
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a zip file ({error})") from None


def _read_zipped(where: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    if entry.file_size > _MAX_ZIPPED:
        raise UserError(f"{where}: unfolds to {entry.file_size} bytes, over the limit of {_MAX_ZIPPED}")
    try:
        return _decode(where, archive.read(entry))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be read from the zip ({error})") from None


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


# ---- points


def check_name(where: Path | str, name: str) -> str:
    """The name, where it is that of a file in the folder of the images or in a sub-folder of it. Raises UserError."""
    leads_out = name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/"))
    if leads_out or "\0" in name or name.encode(errors="ignore").decode() != name:  # a lone surrogate is no character
        raise UserError(f"{where}: {name!r} is not a plain file name, nor a path within the folder of the images")
    return name


def to_polygon(where: str, points: object) -> np.ndarray:
    """(n, 2) float64 of a JSON value that must be a list of [x, y] pairs of finite numbers. Raises UserError."""
    try:
        if not isinstance(points, list) or any(isinstance(value, bool | str) for point in points for value in point):
            raise ValueError
        polygon = np.array(points, dtype=np.float64).reshape(len(points), 2)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f'{where}: "points" must be a list of [x, y] pairs of numbers') from None
    return _checked(where, polygon)


def _checked(where: str, polygon: np.ndarray) -> np.ndarray:
    """The (n, 2) polygon. Raises UserError for one that can be neither learned nor scored."""
    fault = fault_of(polygon)
    if fault:
        raise UserError(f"{where}: {fault}")
    return polygon


def to_score(value: object) -> float | None:
    """A confidence of a JSON file, where it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1 else None


def scores_of(values: Iterable[object]) -> list[float] | None:
    """The confidences of an image's words, where each word has one."""
    scores = [to_score(value) for value in values]
    known = [score for score in scores if score is not None]
    return known if known and len(known) == len(scores) else None


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    """The corners of an upright rectangle, clockwise from the top left as CLEval expects them."""
    left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


# ---- text files, one an image

_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*", re.ASCII)
_MANY_POINTS = 6  # that a line must have to show that its format knows more than four


def recognize_text_files(files: list[TextFile]) -> str:
    """The format of a set of text files: icdar, polygons or totaltext.

    totaltext begins with `x:`. Names in `res_` are results, which have points and no transcriptions: polygons, that
    is. Else the set is polygons where one line in ten or more begins with the numbers of six points: in icdar, where
    four points are followed by any text, that would be a transcription of four numbers.
    """
    if files and all(file.stem.startswith("res_") for file in files):
        return "polygons"
    lines = many = 0
    for file in files:
        text = file.read()
        if text.lstrip().startswith("x:"):
            return "totaltext"
        for line in filter(str.strip, text.split("\n")):
            lines += 1
            many += _count_numbers(line.split(",")) >= 2 * _MANY_POINTS
    return "polygons" if 0 < lines <= 10 * many else "icdar"


def parse_icdar(where: str, text: str) -> Annotation:
    """ICDAR 2015: lines of `x1,y1,x2,y2,x3,y3,x4,y4,transcription`; the transcription may hold commas, or be missing.

    Don't care is the transcription `###`, also after the script's name as in the MLT challenges.
    """
    annotation = Annotation()
    for number, fields in _lines(text):
        count = _count_numbers(fields)
        if count < 8:
            raise UserError(
                f"{where}: line {number}: must begin with x1,y1,x2,y2,x3,y3,x4,y4, not {_shown(fields)}; "
                f"--format polygons reads other numbers of points"
            )
        annotation.add(_points(f"{where}: line {number}", fields[:8]), fields[-1].strip() == "###")
    return annotation


def parse_polygons(where: str, text: str) -> Annotation:
    """Lines of `x1,y1,...,xn,yn` with three or more points, and a transcription after them or none.

    All numbers that a line begins with are points, but for the last where their count is odd: so a transcription must
    not begin with two numbers. Don't care is `###`.
    """
    annotation = Annotation()
    for number, fields in _lines(text):
        count = _count_numbers(fields) // 2 * 2
        if count < 6:
            raise UserError(f"{where}: line {number}: must begin with x1,y1,x2,y2,x3,y3, not {_shown(fields)}")
        annotation.add(_points(f"{where}: line {number}", fields[:count]), fields[-1].strip() == "###")
    return annotation


_TOTALTEXT = re.compile(
    r"x:\s*\[\[([^\[\]]*)\]\]\s*,\s*y:\s*\[\[([^\[\]]*)\]\]"
    r"(?:\s*,\s*ornt:\s*\[[^\]]*\])?(?:\s*,\s*transcriptions:\s*\[(.*)\])?,?",
    re.DOTALL,
)
_TOTALTEXT_DONT_CARE = re.compile(r"u?(['\"])#(##)?\1")


def parse_totaltext(where: str, text: str) -> Annotation:
    """Total-Text: `x: [[x1 x2 ...]], y: [[y1 y2 ...]], ornt: [u'c'], transcriptions: [u'...']`, as NumPy printed it,
    long lists over several lines. Don't care is the transcription `#`."""
    annotation = Annotation()
    starts = [match.start() for match in re.finditer(r"^[ \t]*x:", text, re.MULTILINE)]
    if text[: starts[0] if starts else None].strip():
        raise UserError(f"{where}: line 1: must begin with x: [[...]], y: [[...]]")
    for start, end in pairwise([*starts, len(text)]):
        number = text.count("\n", 0, start) + 1
        match = _TOTALTEXT.fullmatch(text[start:end].strip())
        x, y = (match[group].replace(",", " ").split() for group in (1, 2)) if match else ([], [])
        if not match or len(x) != len(y) or len(x) < 3 or not all(map(_NUMBER.fullmatch, x + y)):
            raise UserError(
                f"{where}: line {number}: must be x: [[...]], y: [[...]] with as many numbers in both, three or more, "
                f"then ornt: [...], transcriptions: [...]"
            )
        polygon = _checked(f"{where}: line {number}", np.array([x, y], dtype=np.float64).T)
        annotation.add(polygon, _TOTALTEXT_DONT_CARE.fullmatch((match[3] or "").strip()) is not None)
    return annotation


def parse_labelme(where: str, text: str) -> Annotation:
    """LabelMe: shapes of an image, polygons and rectangles. Don't care is the label or description `###`, or a flag
    `ignore` that is set."""
    content = parse_json(where, text)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise UserError(f'{where}: lacks "shapes", a list; is it a file of LabelMe?')
    annotation = Annotation()
    for number, shape in enumerate(shapes, start=1):
        place = f"{where}: shape {number}"
        if not isinstance(shape, dict):
            raise UserError(f"{place}: must be an object")
        polygon = to_polygon(place, shape.get("points"))
        kind = shape.get("shape_type", "polygon")
        if kind == "rectangle" and len(polygon) == 2:
            polygon = np.array(rectangle(*polygon.ravel().tolist()))
        elif kind not in ("polygon", "rectangle") or len(polygon) < 3:
            raise UserError(f"{place}: is a {kind} of {len(polygon)} points; draw a polygon or a rectangle instead")
        flags = shape.get("flags")
        ignored = isinstance(flags, dict) and flags.get("ignore") is True
        annotation.add(polygon, ignored or "###" in (shape.get("label"), shape.get("description")))
    return annotation


TEXT_PARSERS: dict[str, Callable[[str, str], Annotation]] = {
    "icdar": parse_icdar,
    "polygons": parse_polygons,
    "totaltext": parse_totaltext,
    "labelme": parse_labelme,
}


def read_text_files(files: list[TextFile], form: str, images: list[str]) -> dict[str, Annotation]:
    """Annotations by the names of `images`, in the order of these, from the files on them.

    The file on NAME.jpg is called NAME.txt (or .json), NAME.jpg.txt, or such with a prefix that all of them have:
    gt_, poly_gt_ or res_. Raises UserError for a file on none of the images, or two files on one.
    """
    candidates: dict[str, list[str]] = {}
    for name in images:
        candidates.setdefault(name_stem(name), []).append(name)
    for name in images:
        candidates.setdefault(name, [name])
    stems = [file.stem for file in files]
    prefix = next((p for p in ("poly_gt_", "gt_", "res_") if all(stem.startswith(p) for stem in stems)), "")
    without = [stem.removeprefix(prefix) for stem in stems]
    if any(stem in candidates for stem in without) or not all(stem in candidates for stem in stems):
        stems = without
    found: dict[str, Annotation] = {}
    for file, stem in zip(files, stems, strict=True):
        match candidates.get(stem, []):
            case [name] if name not in found:
                found[name] = TEXT_PARSERS[form](file.where, file.read())
            case [name]:
                raise UserError(f"{file.where}: another file is on {name} as well; keep one of them")
            case [first, second, *_]:
                raise UserError(f"{file.where}: may be on {first} or {second}; rename one of these")
            case _:
                raise UserError(f"{file.where}: there is no image {stem!r}; put it there or take this file away")
    return {name: found[name] for name in images if name in found}


def write_icdar_zip(path: Path, found: dict[str, Annotation]) -> None:
    """A zip of `res_NAME.txt` for each image, as ICDAR's upload forms want it: lines of `x1,y1,...,xn,yn`, and `,###`
    where a word is don't care. Raises UserError as `check_stems` does, or where it cannot be written."""
    check_stems(found)
    with write_whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = RESULT_MARK.encode()
        for name, annotation in found.items():
            lines = [
                ",".join(map(_digits, polygon.ravel().tolist())) + ",###" * ignore
                for polygon, ignore in zip(annotation.polygons, annotation.dont_care, strict=True)
            ]
            archive.writestr(f"res_{name_stem(name)}.txt", "".join(f"{line}\r\n" for line in lines))


def check_stems(names: Iterable[str]) -> None:
    """Raise UserError where files that are named after images would get the same name for two of them."""
    seen: dict[str, str] = {}
    for name in names:
        if name_stem(name) in seen:
            other = seen[name_stem(name)]
            raise UserError(f"{name}: would be known by the same name as {other} in text files; rename one of them")
        seen[name_stem(name)] = name


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and comma-separated fields of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.split(",")


def _count_numbers(fields: list[str]) -> int:
    """How many of the fields, from the first on, are numbers."""
    return next((i for i, text in enumerate(fields) if not _NUMBER.fullmatch(text)), len(fields))


def _points(where: str, fields: list[str]) -> np.ndarray:
    return _checked(where, np.array([float(text) for text in fields]).reshape(-1, 2))


def _shown(fields: list[str]) -> str:
    return repr(",".join(fields)[:60])


def _digits(value: float) -> str:
    """The shortest decimal number that reads as exactly this value, without an exponent."""
    return np.format_float_positional(value, trim="-")


# ---- COCO


def is_coco(content: object) -> bool:
    """Whether the content of a JSON file looks like COCO's: images as a list, or results alone."""
    return isinstance(content, list) or (isinstance(content, dict) and isinstance(content.get("images"), list))


def parse_coco(where: Path, content: Any, names: list[str]) -> dict[str, Annotation]:
    """COCO: each part of a `segmentation` is a polygon, or the `bbox` where there is none; `iscrowd` or `ignore` says
    don't care. An image has the last part of its `file_name`, unless the whole is among `names`."""
    if not isinstance(content, dict):
        raise UserError(f'{where}: lacks "images"; results alone know images only by number: put the images in too')
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f'{where}: lacks "images" or "annotations", the lists of COCO')
    known = set(names)
    name_of: dict[int | str, str] = {}
    found: dict[str, Annotation] = {}
    scores: dict[str, list[object]] = {}
    for number, image in enumerate(images, start=1):
        key, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if not isinstance(key, int | str) or not isinstance(name, str):
            raise UserError(f'{where}: image {number}: must have an "id" and a "file_name"')
        if name not in known:
            name = check_name(f"{where}: image {number}", re.split(r"[/\\]", name)[-1])
        if key in name_of or name in found:
            raise UserError(f"{where}: image {number}: id {key} or name {name} is there twice")
        name_of[key], found[name], scores[name] = name, Annotation(), []
    for number, entry in enumerate(annotations, start=1):
        place = f"{where}: annotation {number}"
        key = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(key, int | str) or key not in name_of:
            raise UserError(f"{place}: its image_id is that of no image")
        for polygon in _parse_segmentation(place, entry):
            found[name_of[key]].add(polygon, bool(entry.get("iscrowd")) or bool(entry.get("ignore")))
            scores[name_of[key]].append(entry.get("score"))
    for name, annotation in found.items():
        annotation.scores = scores_of(scores[name])
    return found


def _parse_segmentation(where: str, entry: dict[str, Any]) -> list[np.ndarray]:
    parts = entry.get("segmentation")
    if isinstance(parts, dict) and not entry.get("iscrowd"):
        raise UserError(f"{where}: its segmentation is a mask (RLE); export polygons")
    if parts and not isinstance(parts, dict):
        if not isinstance(parts, list) or any(not isinstance(part, list) or len(part) < 6 for part in parts):
            raise UserError(f"{where}: its segmentation must be lists of x1, y1, x2, y2, x3, y3 and more")
        return [to_polygon(where, [part[i : i + 2] for i in range(0, len(part), 2)]) for part in parts]
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{where}: has neither a segmentation nor a bbox of x, y, width and height")
    (x, y), (width, height) = to_polygon(where, [box[:2], box[2:]]).tolist()
    return [to_polygon(where, rectangle(x, y, x + width, y + height))]


def write_coco(path: Path, found: dict[str, Annotation]) -> None:
    """Images, annotations and the one category `text`, each word an annotation with its score where it has one: both
    COCO's annotations, and, as the list under "annotations", its results. Raises UserError where it cannot be written.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, annotation) in enumerate(found.items(), start=1):
        width, height = annotation.size or (None, None)
        images.append({"id": image_id, "file_name": name, **({"width": width, "height": height} if width else {})})
        words = zip(annotation.polygons, annotation.dont_care, scores_or_none(annotation), strict=True)
        for polygon, ignore, score in words:
            (left, top), (right, bottom) = polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": [polygon.ravel().tolist()],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": _area(polygon),
                    "iscrowd": int(ignore),
                    **({} if score is None else {"score": score}),
                }
            )
    content: dict[str, Any] = {"info": {"description": RESULT_MARK}, "images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "text"}]
    with write_whole(path, "w") as file:
        json.dump(content, file, ensure_ascii=False)


def scores_or_none(annotation: Annotation) -> list[float | None]:
    """The score of each word of an image, or None for each."""
    return list(annotation.scores) if annotation.scores is not None else [None] * len(annotation.polygons)


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.astype(np.float64).T
    return math.fabs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


ONE_FILE_FORMATS = ("competition", "coco")  # the others have a file for each image


def read_annotations(path: Path) -> dict[str, Annotation]:
    """Read `{"images": {FILENAME: {"words": {ID: {"points": [[x, y], ...]}}}}}`, in the order of the file.

    A word with `illegibility: true` or the transcription `###` is "don't care".

    Raises UserError, naming the file, the image and the word, for anything else than this form.
    """
    return parse_annotations(path, load_json(path))


def parse_annotations(path: Path, content: Any) -> dict[str, Annotation]:
    """What `read_annotations` reads, from the content of the file."""
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict):
        raise UserError(f'{path}: lacks "images", an object of file names; see the README for the form')
    return {name: _read_image(path, name, entry) for name, entry in images.items()}


def _read_image(path: Path, name: str, entry: object) -> Annotation:
    check_name(path, name)
    words = entry.get("words", {}) if isinstance(entry, dict) else None
    if not isinstance(words, dict):
        raise UserError(f'{path}: {name}: lacks "words", an object of words')
    annotation = Annotation()
    for word_id, word in words.items():
        points = word.get("points") if isinstance(word, dict) else None
        polygon = to_polygon(f"{path}: {name}: word {word_id}", points)
        annotation.add(polygon, word.get("illegibility") is True or word.get("transcription") == "###")
    annotation.scores = scores_of(word.get("score") for word in words.values())
    return annotation


def read_labels_at(place: Path, images: list[str], form: str = "auto") -> tuple[str, dict[str, Annotation]]:
    """The format of a file or folder of annotations, and the annotations of these images. Raises UserError."""
    if place.is_dir() or place.suffix.lower() == ".zip":
        texts = [] if form == "labelme" else list_text_files(place, ".txt")
        jsons = list_text_files(place, ".json") if form in ("auto", "labelme") else []
        if texts and jsons:
            raise UserError(f"{place}: holds .txt and .json files; say which are the annotations with --format")
        if not texts and not jsons:
            raise UserError(f"{place}: holds no annotations; put a .txt or .json file for each image there")
        if form == "auto":
            form = recognize_text_files(texts) if texts else "labelme"
        return form, read_text_files(texts or jsons, form, images)
    content = load_json(place)
    if form == "auto":
        form = "coco" if is_coco(content) else "competition"
    return form, parse_coco(place, content, images) if form == "coco" else parse_annotations(place, content)


def write_annotations(path: Path, found: dict[str, Annotation]) -> None:
    """Write what `read_annotations` reads, with the words' scores and the images' sizes where they are known.

    The file appears whole or not at all. Raises UserError where it cannot be written.
    """
    images = {}
    for name, annotation in found.items():
        words = zip(annotation.polygons, annotation.dont_care, scores_or_none(annotation), strict=True)
        images[name] = dict(zip(("img_w", "img_h"), annotation.size or (), strict=False)) | {
            "words": {
                f"{number:04d}": {"points": polygon.tolist()}
                | ({"illegibility": True} if ignore else {})
                | ({} if score is None else {"score": score})
                for number, (polygon, ignore, score) in enumerate(words, start=1)
            }
        }
    with write_whole(path, "w") as file:
        json.dump({"made_by": RESULT_MARK, "images": images}, file, ensure_ascii=False)


HEADER = ["filename", "polygons"]
RESULT_MARK = "detections by dbnet"
"""In every file of detections but a CSV"""
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


def result_mark(form: str) -> str:
    """The words by which `files.check_outputs` knows an earlier result in this format."""
    return ",".join(HEADER) if form == "csv" else RESULT_MARK


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
    check_regular(path)
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
