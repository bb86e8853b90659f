"""Readers of label files and of detections, in all formats, and tables of the formats that are only recognized.

Read are the competition's JSON, COCO (with the dialects of CVAT and Roboflow), LabelMe and X-AnyLabeling, PPOCRLabel's
Label.txt, text files for each image (ICDAR, MLT, RCTW-17, CTW1500, lines of any number of points), and submissions. For
others the error names the format and the way out (`_FOREIGN_JSON`, `_FOREIGN_LINES`, `_FOREIGN_SUFFIXES`).

All that is read is checked: anything wrong raises UserError, one line with the file, the place in it and the fix.
Nothing in a file is ever run, and no path in it is followed.
"""

import csv
import io
import json
import math
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from dbnet.annotations import HEADER, Annotation
from dbnet.errors import UserError, library_errors
from dbnet.files import check_regular
from dbnet.geometry import fault_of
from dbnet.images import list_files, name_stem

# ---- files


class TextFile(NamedTuple):
    """A text file in a folder or in a zip."""

    where: str
    """its path, for messages"""
    path: str
    """its path within the folder or zip, with /, without the suffix"""
    read: Callable[[], str]
    """returns its text; raises UserError"""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


_MAX_ZIPPED = 1 << 28  # bytes that a file in a zip may unfold to


def list_text_files(source: Path, suffix: str) -> list[TextFile]:
    """Files of a folder and its sub-folders, or of a zip, that end in `suffix`, by path, without hidden ones."""
    if source.is_dir():
        paths = list_files(source)
        files = [(path.relative_to(source).as_posix(), str(path), partial(read_file, path)) for path in paths]
    else:
        check_regular(source)
        with library_errors(f"{source}: not a zip file that can be read"):
            archive = zipfile.ZipFile(source)
        files = [
            (entry.filename, f"{source}: {entry.filename}", partial(_read_zipped, source, archive, entry))
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename)
            if not entry.filename.rpartition("/")[2].startswith(".")
        ]
    return [TextFile(where, path[: -len(suffix)], read) for path, where, read in files if path.lower().endswith(suffix)]


def read_file(path: Path) -> str:
    """The text of a file, with newlines as they are there. Raises UserError."""
    check_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}") from None
    return _decode(str(path), data)


def _read_zipped(source: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    where = f"{source}: {entry.filename}"
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


def parse_json(where: str, text: str) -> Any:
    """The content of a JSON text. Raises UserError, also for a name that is in an object twice: one would be lost."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{twice!r} is there twice in one object")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({' '.join(str(error).split())})") from None


# ---- names of images


def check_name(where: Path | str, name: str) -> str:
    """The name, where it is that of a file in the folder of the images or in a sub-folder of it. Raises UserError."""
    leads_out = name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/"))
    if leads_out or "\0" in name or name.encode(errors="ignore").decode() != name:  # a lone surrogate is no character
        raise UserError(f"{where}: {name!r} is not a plain file name, nor a path within the folder of the images")
    return name


def nfc(name: str) -> str:
    """The name in the Unicode form of most systems; macOS takes letters apart."""
    return unicodedata.normalize("NFC", name)


def _ends(parts: list[str]) -> Iterator[str]:
    """The whole path of these parts, then what is left without its first folders."""
    return ("/".join(parts[start:]) for start in range(len(parts)))


class ImageNames:
    """Finds which image a path in a file means: one whose name it ends in, also as in a URL or in another Unicode
    form."""

    def __init__(self, names: list[str]) -> None:
        self._known = {nfc(name): name for name in names} | {name: name for name in names}

    def find(self, where: str, written: str) -> str:
        """The name of the image; the last part of the path for one that is not there. Raises UserError."""
        parts = re.split(r"[/\\]", written)
        for spelled in (written.split("/"), parts, [unquote(part) for part in parts]):
            for name in _ends(spelled):
                found = self._known.get(name) or self._known.get(nfc(name))
                if found:
                    return found
        return check_name(where, parts[-1])


# ---- points and flags


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


_DONT_CARE = {"ignore", "ignored", "crowd", "illegible", "illegibility", "unreadable", "difficult"}
_DONT_CARE |= {"dontcare", "donotcare", "legibilityillegible"}
_CARE = {"legible", "readable"}
_CLASS = {"label", "class", "category", "categoryname"}
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", "none", "null", ""}


@cache
def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower()).removeprefix("is")


def is_hidden_text(text: object) -> bool:
    """Whether a transcription is `###`, also in quotes."""
    return isinstance(text, str) and re.fullmatch(r"\s*(['\"]?)###\1\s*", text) is not None


def is_dont_care_class(name: object) -> bool:
    """Whether a class or label is `###`, or means don't care in words, as "Don't care" or "ignored_text"."""
    if not isinstance(name, str):
        return False
    return is_hidden_text(name) or not _DONT_CARE.isdisjoint([_letters(name), *re.findall("[a-z]+", name.lower())])


def is_dont_care(where: str, word: dict[str, Any]) -> bool:
    """Whether anything in a word, its flags, attributes or tags says don't care: a text `###`, a class that means it,
    or a flag such as `difficult`, `ignore`, `illegibility`. Raises UserError for a flag neither true nor false."""
    facts: list[tuple[Any, Any]] = [*word.items()]
    for name in ("flags", "attributes", "tags"):
        values = word.get(name)
        if isinstance(values, dict):
            facts.extend(values.items())
        elif isinstance(values, list):
            facts.extend((tag, True) for tag in values if isinstance(tag, str))
            facts.extend((tag.get("name"), tag.get("value")) for tag in values if isinstance(tag, dict))
    for name, value in facts:
        meaning = _letters(str(name))
        if is_hidden_text(value) or (meaning in _CLASS and is_dont_care_class(value)):
            return True
        if meaning == "legibility":
            meaning, value = "illegible", str(value).lower() == "illegible"
        if meaning in _DONT_CARE or (meaning in _CARE and value is not None):
            text = str(value).strip().lower()
            if text not in _TRUE | _FALSE:
                raise UserError(f'{where}: "{name}" must be true or false, not {text[:40]!r}')
            if (text in _TRUE) == (meaning in _DONT_CARE):
                return True
    return False


Word = tuple[np.ndarray, bool, object]
"""(n, 2) polygon, whether it is don't care, and what stands in the file for its score"""


def _word(where: str, entry: object) -> Word:
    """A word of the competition's JSON or of Label.txt."""
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be an object with "points"')
    return to_polygon(where, entry.get("points")), is_dont_care(where, entry), entry.get("score")


def _annotation(words: Iterable[Word], size: tuple[int, int] | None = None) -> Annotation:
    """The words of an image; their scores, if each word has one in 0..1."""
    words = list(words)
    scores = [score for *_, score in words if isinstance(score, int | float) and not isinstance(score, bool)]
    is_scored = len(scores) == len(words) > 0 and all(0 <= score <= 1 for score in scores)
    polygons, dont_care = [polygon for polygon, _, _ in words], [ignore for _, ignore, _ in words]
    return Annotation(polygons, dont_care, [float(score) for score in scores] if is_scored else None, size)


def size_of(entry: dict[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """The image's size under these two names, or None where it is missing or empty."""
    values = [str(entry.get(name)).removesuffix(".0") for name in (width, height)]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", value, re.ASCII) for value in values):
        return None
    return int(values[0]), int(values[1])


# ---- text files, one for each image

_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*", re.ASCII)
_MANY_NUMBERS = 12  # in a line: its format knows more than four points
_CTW1500_NUMBERS = 32
_RCTW17 = re.compile(r'([^,]*,){8}\s*[01]\s*,\s*".*"\s*')

LINE_FORMATS: dict[str, tuple[int, str, Callable[[np.ndarray], np.ndarray]]] = {
    "icdar": (8, "x1,y1,x2,y2,x3,y3,x4,y4", lambda points: points[:4]),
    "polygons": (6, "x1,y1,x2,y2,x3,y3", lambda points: points),
    "ctw1500": (_CTW1500_NUMBERS, "a box and 14 offsets, 32 numbers", lambda points: points[0] + points[2:16]),
}
"""How many numbers a line begins with at least, what they are called, and the outline that all of them make.

    icdar     ICDAR 2015 and MLT: four points and a transcription, which may hold commas or be missing; RCTW-17 has a
              flag, 0 or 1 for don't care, before a transcription in quotes on every line
    polygons  three or more points; a transcription after them must not begin with two numbers
    ctw1500   a box `left,top,right,bottom`, and 14 points as offsets from its upper left corner

Don't care is the transcription `###`, also in quotes, or behind the name of a script as in MLT.
"""


def parse_lines(where: str, text: str, form: str) -> Annotation:
    """The words of a text file in one of LINE_FORMATS."""
    least, expected, outline = LINE_FORMATS[form]
    lines, words = list(_lines(text)), list[Word]()
    has_flags = form == "icdar" and all(_RCTW17.fullmatch(line) for _, line in lines)
    for number, line in lines:
        place, numbers = f"{where}: line {number}", _numbers(line)
        if len(numbers) < least:
            hints = (hint for pattern, hint in _FOREIGN_LINES if re.match(pattern, line))
            hint = next(hints, "--format says which form is read")
            raise UserError(f"{place}: must begin with {expected}, not {line[:60]!r}; {hint}")
        polygon = outline(numbers[: len(numbers) // 2 * 2].reshape(-1, 2))
        last = line.rstrip(", \t").rpartition(",")[2]
        is_flagged = has_flags and line.split(",")[8].strip() == "1"
        words.append((check_polygon(place, polygon), is_flagged or is_hidden_text(last), None))
    return _annotation(words)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is not blank."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def _numbers(line: str) -> np.ndarray:
    """The numbers, separated by commas, with which a line begins."""
    fields = line.split(",")
    count = next((i for i, field in enumerate(fields) if not _NUMBER.fullmatch(field)), len(fields))
    return np.array(fields[:count], np.float64)


def recognize_text_files(files: list[TextFile]) -> str:
    """The format of text files, one for each image, of LINE_FORMATS.

    Names in `res_` are results, which have no transcriptions: polygons. Else one line in ten with six points or more
    makes the set polygons, unless the first four are a parallelogram: then the others are numbers in a transcription.
    """
    if files and all(file.name.startswith("res_") for file in files):
        return "polygons"
    lines = many = offsets = 0
    for file in files:
        for _, line in _lines(file.read()):
            lines += 1
            numbers = _numbers(line)
            if len(numbers) >= _CTW1500_NUMBERS and _are_offsets(numbers[:_CTW1500_NUMBERS]):
                offsets += 1
            elif len(numbers) >= _MANY_NUMBERS and not _is_parallelogram(numbers[:8].reshape(4, 2)):
                many += 1
    if offsets > many:
        return "ctw1500"
    return "polygons" if 0 < lines <= 10 * many else "icdar"


def _are_offsets(numbers: np.ndarray) -> bool:
    """Whether numbers are those of CTW1500: two corners of a box, and offsets within it."""
    box, offsets = numbers[2:4] - numbers[:2], numbers[4:].reshape(-1, 2)
    return bool((box > 0).all() and (offsets >= -2).all() and (offsets <= box + 2).all())


def _is_parallelogram(quad: np.ndarray) -> bool:
    """Whether the diagonals of the (4, 2) points have the same middle, to an eighth of their length."""
    middles, diagonals = (quad[0] + quad[2] - quad[1] - quad[3]) / 2, (quad[2] - quad[0], quad[3] - quad[1])
    return math.hypot(*middles) < min(math.hypot(*diagonal) for diagonal in diagonals) / 8


def parse_labelme(where: str, text: str) -> Annotation:
    """LabelMe and X-AnyLabeling: polygons, rectangles and rotated rectangles."""
    content = parse_json(where, text)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise _foreign_json(where, content, 'lacks "shapes", a list; is it a file of LabelMe?')
    words = []
    for number, shape in enumerate(shapes, start=1):
        place = f"{where}: shape {number}"
        polygon, ignore, score = _word(place, shape)
        kind = shape.get("shape_type") or "polygon"
        if kind == "rectangle" and len(polygon) == 2:
            polygon = rectangle(*polygon.ravel().tolist())
        elif kind not in ("polygon", "rectangle", "rotation", "quadrilateral") or len(polygon) < 3:
            raise UserError(f"{place}: is a {kind} of {len(polygon)} points; draw a polygon or rectangle instead")
        words.append((polygon, ignore, score))
    return _annotation(words, size_of(content, "imageWidth", "imageHeight"))


TEXT_PARSERS: dict[str, Callable[[str, str], Annotation]] = {
    **{form: partial(parse_lines, form=form) for form in LINE_FORMATS},
    "labelme": parse_labelme,
}
"""Readers of the files that are there for each image, by format."""


def read_text_files(files: list[TextFile], form: str, images: list[str]) -> dict[str, Annotation]:
    """Annotations by the names of `images`, in the order of these, from a file for each image.

    The file of SUB/NAME.jpg is called SUB/NAME.txt (or .json), SUB_NAME.txt, NAME.txt, or such with .jpg.txt, or with a
    prefix that all of them have: gt_, poly_gt_ or res_. Raises UserError for a file without an image, or two for one.
    """
    named: dict[str, list[str]] = {}
    keys = (lambda name: name_stem(name).rpartition("/")[2], str, lambda name: name_stem(name).replace("/", "_"))
    for key in (*keys, name_stem):  # the last one that fits decides
        group = defaultdict(list)
        for name in images:
            group[nfc(key(name))].append(name)
        named |= group

    def candidates(path: str) -> list[str]:
        return next((named[end] for end in _ends(path.split("/")) if end in named), [])

    paths = [nfc(file.path) for file in files]
    prefix = next((p for p in ("poly_gt_", "gt_", "res_") if all(file.name.startswith(p) for file in files)), "")
    without = [re.sub(f"(^|/){prefix}([^/]*)$", r"\1\2", path) for path in paths]
    if any(map(candidates, without)) or not all(map(candidates, paths)):
        paths = without
    found: dict[str, Annotation] = {}
    for file, path in zip(files, paths, strict=True):
        match candidates(path):
            case [name] if name not in found:
                found[name] = TEXT_PARSERS[form](file.where, file.read())
            case [name]:
                raise UserError(f"{file.where}: another file is on {name} as well; keep one of them")
            case [first, second, *_]:
                raise UserError(f"{file.where}: may be on {first} or {second}; rename one of these")
            case _:
                there = path.rpartition("/")[2]
                raise UserError(f"{file.where}: there is no image {there!r}; put it there or take this file away")
    return {name: found[name] for name in images if name in found}


# ---- JSON files and Label.txt, one for all images


def parse_competition(where: str, text: str, names: list[str]) -> dict[str, Annotation]:
    """`{"images": {FILENAME: {"words": {ID: {"points": [[x, y], ...]}}}}}`, in the order of the file."""
    content = parse_json(where, text)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict):
        raise _foreign_json(where, content, f'lacks "images", an object of file names; {_CONVERT}')
    found = {}
    for name, entry in images.items():
        words = entry.get("words", {}) if isinstance(entry, dict) else None
        if not isinstance(words, dict):
            raise UserError(f'{where}: {name}: lacks "words", an object of words')
        read = (_word(f"{where}: {name}: word {key}", word) for key, word in words.items())
        found[check_name(where, name)] = _annotation(read, size_of(entry, "img_w", "img_h"))
    return found


def parse_coco(where: str, text: str, names: list[str]) -> dict[str, Annotation]:
    """COCO: each part of a `segmentation` is a polygon, or the `bbox` where there is none, turned by CVAT's attribute
    `rotation`. Don't care is a flag or text (`is_dont_care`), or a category that says so."""
    content = parse_json(where, text)
    if not isinstance(content, dict):
        raise UserError(f'{where}: lacks "images"; results alone know images only by number: put the images in too')
    images, entries, categories = (content.get(key) for key in ("images", "annotations", "categories"))
    if not isinstance(images, list) or not isinstance(entries, list):
        raise UserError(f'{where}: lacks "images" or "annotations", the lists of COCO')
    image_names, sizes = ImageNames(names), dict[str, tuple[int, int] | None]()
    name_of, words = dict[str, str](), dict[str, list[Word]]()
    for number, image in enumerate(images, start=1):
        place = f"{where}: image {number}"
        key, name = (_key(image.get("id")), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if key is None or not isinstance(name, str):
            raise UserError(f'{place}: must have an "id" and a "file_name"')
        name = image_names.find(place, name)
        if key in name_of or name in words:
            raise UserError(f"{place}: id {key} or name {name} is there twice")
        name_of[key], words[name], sizes[name] = name, [], size_of(image, "width", "height")
    ignored = {
        _key(category.get("id"))
        for category in (categories if isinstance(categories, list) else [])
        if isinstance(category, dict) and is_dont_care_class(category.get("name"))
    } - {None}
    for number, entry in enumerate(entries, start=1):
        place = f"{where}: annotation {number}"
        name = name_of.get(_key(entry.get("image_id")) or "") if isinstance(entry, dict) else None
        if name is None:
            raise UserError(f"{place}: its image_id is that of no image")
        ignore = is_dont_care(place, entry) or _key(entry.get("category_id")) in ignored
        words[name] += [(polygon, ignore, entry.get("score")) for polygon in _parse_segmentation(place, entry)]
    return {name: _annotation(words[name], size) for name, size in sizes.items()}


def _key(value: object) -> str | None:
    """An id, the same for 1, 1.0 and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) else None


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
    attributes = entry.get("attributes")
    try:
        degrees = float(attributes.get("rotation") or 0) if isinstance(attributes, dict) else 0.0
    except (TypeError, ValueError, OverflowError):
        degrees = math.nan
    if not math.isfinite(degrees):
        raise UserError(f'{where}: "rotation" must be a number of degrees')
    return [check_polygon(where, rectangle(x, y, x + width, y + height, degrees))]


def parse_ppocrlabel(where: str, text: str, names: list[str]) -> dict[str, Annotation]:
    """PPOCRLabel's Label.txt, PaddleOCR's too: lines of `FOLDER/NAME.jpg`, a tab, and a JSON list of words with
    `points`, `transcription` and `difficult`."""
    image_names, found = ImageNames(names), dict[str, Annotation]()
    for number, line in _lines(text):
        place = f"{where}: line {number}"
        path, tab, content = line.partition("\t")
        words = parse_json(place, content) if tab else None
        if not isinstance(words, list):
            raise UserError(f"{place}: must be the path of an image, a tab and a JSON list of words")
        name = image_names.find(place, path.strip())
        if name in found:
            raise UserError(f"{place}: {name} is there twice; keep one of the lines")
        found[name] = _annotation(_word(f"{place}: word {index}", word) for index, word in enumerate(words, start=1))
    return found


ONE_FILE_PARSERS = {"competition": parse_competition, "coco": parse_coco, "ppocrlabel": parse_ppocrlabel}
"""Readers of the files that are about all images, by format; they get the names of the images."""


# ---- formats that are only recognized

_AS_LINES = "write each outline as a line x1,y1,x2,y2,x3,y3,x4,y4,text into NAME.txt"
_FOREIGN_LINES = (
    (r"x:\s*\[\[", f"this is Total-Text's form; {_AS_LINES}"),
    (
        r"[^\t]+\t\s*\[",
        "this is a Label.txt of PPOCRLabel or PaddleOCR; call it Label.txt, without files for one image",
    ),
    (r"\s*[\[{]", "this is JSON; end its name in .json"),
    (r"imagesource:|gsd:|(-?[\d.]+\s+){8}\S+\s+\d\s*$", f"this is DOTA's form; {_AS_LINES}"),
    (r"\d+(\s+(0?\.\d+|0|1|1\.0+)){4,}\s*$", f"this is YOLO's form, in shares of the image; {_AS_LINES}, in pixels"),
    (r"\s*\d+(\s*,\s*|\s+)\d+\1\d+\1\d+\1\"", f"this is ICDAR 2013's form, two corners of a box; {_AS_LINES}"),
    (r"(\d+\s+){2}-?\d+(\s+-?[\d.]+){4}\s*$", f"this is MSRA-TD500's form; {_AS_LINES}"),
    (r"\s*-?[\d.]+(\s*[;\t\uff0c]|\s+-?\d)", "numbers must be separated by commas; replace the separators"),
    (r"\s*#|\s*(?!nan|inf)[a-z_]+\d*\s*,", "this is a heading or a comment; delete the line"),
    ("\ufeff", "the line begins with a byte order mark; save the file as UTF-8 without it"),
)
"""What lines of other formats look like, and what to do."""

_EXPORT = "export COCO there"
_CONVERT = 'convert it to COCO, or to {"images": {NAME: {"words": {ID: {"points": [[x, y], ...]}}}}}'
_FOREIGN_JSON = (
    ({"img_dimensions", "polygons"}, "a labels.json of docTR", _CONVERT),
    ({"data_list"}, "the form of MMOCR 1.x", _CONVERT),
    ({"imgs", "anns"}, "the form of TextOCR and COCO-Text", _CONVERT),
    ({"_via_img_metadata"}, "a project of VIA", f"{_EXPORT} (Annotation, Export Annotations)"),
    ({"regions", "filename"}, "the JSON of VIA", f"{_EXPORT} (Annotation, Export Annotations)"),
    ({"asset", "regions"}, "the JSON of VoTT", _EXPORT),
    ({"annotations", "data"}, "the JSON of Label Studio", f"{_EXPORT} (Export, COCO)"),
    ({"original_width"}, "the JSON of Label Studio", f"{_EXPORT} (Export, COCO)"),
    ({"form"}, "the form of FUNSD", _CONVERT),
    ({"documents"}, "the form of XFUND", _CONVERT),
    ({"valid_line"}, "the form of CORD", _CONVERT),
    ({"paragraphs"}, "the form of HierText", _CONVERT),
    ({"transcription", "points"}, "the form of ArT and LSVT", _CONVERT),
    ({"image_id", "bbox"}, "a list of COCO results without its images", "put both into one file"),
    ({"image", "annotations"}, "the form of CreateML", _CONVERT),
    ({"shapes"}, "a file of LabelMe", "put it into labels/SPLIT/ under the name of its image"),
    ({"images", "annotations"}, "COCO", "call it SPLIT.json in jsons/"),
)
"""Keys that JSON files of other formats have in their upper levels, what these are, and what to do."""

_FOREIGN_SUFFIXES = {
    ".xml": f"XML of Pascal VOC (labelImg), CVAT or PAGE; {_EXPORT}, or save as LabelMe",
    ".gt": f"MSRA-TD500's .gt files; {_AS_LINES}",
    ".mat": f"MATLAB's form; {_AS_LINES}",
    **dict.fromkeys((".csv", ".tsv", ".parquet"), f"a table; {_AS_LINES}"),
    ".jsonl": f"JSON lines; {_CONVERT}",
    **dict.fromkeys((".yaml", ".yml"), f"YOLO's data.yaml; {_EXPORT}"),
    ".mdb": f"an LMDB; {_AS_LINES}",
}


def _keys(content: object, levels: int = 4) -> set[str]:
    """Names in the upper levels of a JSON value, of a few entries each."""
    if not levels or not isinstance(content, dict | list):
        return set()
    values = list(content.values())[:5] if isinstance(content, dict) else content[:2]
    return set(content if isinstance(content, dict) else ()).union(*(_keys(value, levels - 1) for value in values))


def _foreign_json(where: str, content: object, otherwise: str) -> UserError:
    """The error for JSON of another format, which says what it is and what to do, if it is known."""
    keys = _keys(content)
    known = (f"is {kind}, which is not read; {advice}" for needed, kind, advice in _FOREIGN_JSON if needed <= keys)
    return UserError(f"{where}: {next(known, otherwise)}")


def find_foreign_labels(folders: list[Path]) -> str | None:
    """A sentence about files of other formats in these folders, or None where there are none."""
    files = (path for folder in folders if folder.is_dir() for path in list_files(folder))
    found = next((path for path in files if path.suffix.lower() in _FOREIGN_SUFFIXES), None)
    return f"{found}: is {_FOREIGN_SUFFIXES[found.suffix.lower()]}" if found else None


# ---- the labels of a split, in any format

_JSON_FORMATS = ("labelme", "coco", "competition")
_PPOCRLABEL = re.compile(r"[^\t\n]+\t\s*\[.*\]\s*")


def read_labels_at(source: Path, images: list[str], form: str = "auto") -> tuple[str, dict[str, Annotation]]:
    """The format of a file or folder of annotations, and the annotations of these images. Raises UserError."""
    if not source.is_dir() and source.suffix.lower() != ".zip":
        return _read_whole([TextFile(str(source), source.stem, partial(read_file, source))], images, form)
    texts = [] if form in _JSON_FORMATS else list_text_files(source, ".txt")
    jsons = list_text_files(source, ".json") if form in ("auto", *_JSON_FORMATS) else []
    whole = _find_whole(texts, jsons, images)
    if whole and form in ("auto", *ONE_FILE_PARSERS):
        return _read_whole(whole, images, form)
    if form in ONE_FILE_PARSERS:
        raise UserError(f"{source}: holds no file of the format {form} for all images; put it there, alone")
    if texts and jsons:
        raise UserError(f"{source}: holds .txt and .json files; say which are the annotations with --format")
    if not texts and not jsons:
        foreign = find_foreign_labels([source])
        raise UserError(foreign or f"{source}: holds no annotations; put a .txt or .json file for each image there")
    if form == "auto":
        form = recognize_text_files(texts) if texts else "labelme"
    return form, read_text_files(texts or jsons, form, images)


def _find_whole(texts: list[TextFile], jsons: list[TextFile], images: list[str]) -> list[TextFile]:
    """The files about all images in a folder: each Label.txt (PPOCRLabel writes others beside it), or the only file, if
    it is not named after an image."""
    labels = [file for file in texts if file.name.lower() == "label"]
    if labels and {file.name for file in texts if file not in labels} <= {"fileState", "rec_gt"}:
        return labels
    files = [*texts, *jsons]
    stems = {nfc(name) for image in images for name in (image, name_stem(image))}
    if len(files) != 1 or nfc(files[0].path) in stems:
        return []
    text = files[0].read()
    is_whole = _PPOCRLABEL.match(text) if texts else "shapes" not in _keys(parse_json(files[0].where, text), 1)
    return files if is_whole else []


def _read_whole(files: list[TextFile], images: list[str], form: str) -> tuple[str, dict[str, Annotation]]:
    """Format and annotations of files that are about all images."""
    found: dict[str, Annotation] = {}
    for file in files:
        text = file.read()
        if form == "auto" and file.where.lower().endswith(".txt"):
            form = "ppocrlabel"
        elif form == "auto":  # COCO has its images as a list, or results alone
            content = parse_json(file.where, text)
            images_of = content.get("images") if isinstance(content, dict) else None
            is_coco = isinstance(images_of, list) or (isinstance(content, list) and "image_id" in _keys(content))
            form = "coco" if is_coco else "competition"
        read = ONE_FILE_PARSERS[form](file.where, text, images)
        twice = next((name for name in read if name in found), None)
        if twice:
            raise UserError(f"{file.where}: another file is on {twice} as well; keep one of them")
        found |= read
    return form, found


# ---- detections

_MAX_FIELD = 1 << 28  # characters: a row of 500 polygons with many points is longer than the csv module's default


def read_detections(path: Path, images: list[str]) -> dict[str, Annotation]:
    """Read what `write_detections` wrote, in any of its formats, on images of these names, in the order of the file."""
    if path.is_dir() or path.suffix.lower() in (".json", ".zip", ".txt"):
        return read_labels_at(path, images)[1]
    return {name: Annotation(polygons, [False] * len(polygons)) for name, polygons in read_submission(path).items()}


def read_submission(path: Path) -> dict[str, list[np.ndarray]]:
    """File names and their polygons, (n, 2) float64 arrays, in the order of the file. Raises UserError."""
    csv.field_size_limit(_MAX_FIELD)
    rows = csv.DictReader(io.StringIO(read_file(path), newline=""), strict=True)
    submission: dict[str, list[np.ndarray]] = {}
    try:
        if not {*HEADER} <= {*(rows.fieldnames or [])}:
            raise UserError(f"{path}: the first row must name the columns filename and polygons")
        for number, row in enumerate(rows, start=2):
            place = f"{path}: row {number}"
            if None in row or None in row.values():
                raise UserError(f"{place} has more or fewer columns than the first")
            if row["filename"] in submission:
                raise UserError(f"{place}: {row['filename']} is there twice; keep one row an image")
            texts = [text for text in row["polygons"].split("|") if text.strip()]
            submission[row["filename"]] = [_parse_polygon(place, text) for text in texts]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error})") from None
    return submission


def _parse_polygon(where: str, text: str) -> np.ndarray:
    try:
        if "_" in text:  # which Python would take for a digit's separator
            raise ValueError
        polygon = np.array([float(word) for word in text.split()]).reshape(-1, 2)
    except ValueError:
        raise UserError(f"{where}: coordinates must be numbers, x and y in pairs, not {text[:40]!r}") from None
    return check_polygon(where, polygon)
