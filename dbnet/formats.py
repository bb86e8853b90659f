"""Readers of label files and of detections, in all formats, and tables of the formats that are only recognized.

Read are the competition's JSON, COCO (with the dialects of CVAT and Roboflow), LabelMe and X-AnyLabeling, PPOCRLabel's
Label.txt, text files for each image (ICDAR, MLT, RCTW-17, CTW1500, lines of any number of points), and submissions. For
others the error names the format and the way out (`_FOREIGN_JSON`, `_FOREIGN_LINES`, `_FOREIGN_SUFFIXES`).

All that is read is checked: anything wrong raises UserError, one line with the file, the place in it and the fix.
Nothing in a file is ever run, and no path in it is followed."""

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
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from dbnet.annotations import HEADER, Annotation
from dbnet.errors import UserError, library_errors, one_line
from dbnet.files import check_regular
from dbnet.geometry import MAX_COORDINATE
from dbnet.images import list_files, name_stem


class TextFile(NamedTuple):
    """A text file in a folder or in a zip."""

    where: str  # its path, for messages
    path: PurePosixPath  # within the folder or zip
    load: Callable[[], bytes]

    def read(self) -> str:
        """Its text, with newlines as they are there. Raises UserError."""
        with library_errors(f"{self.where}: cannot be read"):
            data = self.load()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            kind = "text in UTF-16, not" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not text in"
            reason = f"{error.reason} at byte {error.start}"
            raise UserError(f"{self.where}: {kind} UTF-8 ({reason}); save it as UTF-8") from None


_MAX_ZIPPED = 1 << 28  # bytes that a file in a zip may unfold to


def text_file(path: Path, folder: Path | None = None) -> TextFile:
    """A file on disk, in the folder. Raises UserError for a pipe or a device."""
    check_regular(path)
    return TextFile(str(path), PurePosixPath(path.relative_to(folder or path.parent).as_posix()), path.read_bytes)


def list_text_files(source: Path, *suffixes: str) -> list[TextFile]:
    """Files of a folder and its sub-folders, or of a zip, with one of these suffixes, by path, without hidden ones."""
    if source.is_dir():
        return [text_file(path, source) for path in list_files(source) if path.suffix.lower() in suffixes]
    check_regular(source)
    with library_errors(f"{source}: not a zip file that can be read"):
        archive = zipfile.ZipFile(source)
    files = []
    for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
        where, path = f"{source}: {entry.filename}", PurePosixPath(entry.filename)
        is_hidden = any(part.startswith(".") and part != ".." for part in path.parts)
        if path.suffix.lower() in suffixes and not is_hidden:
            if entry.file_size > _MAX_ZIPPED:
                raise UserError(f"{where}: unfolds to {entry.file_size} bytes, over the limit of {_MAX_ZIPPED}")
            files.append(TextFile(where, path, partial(archive.read, entry)))
    return files


def parse_json(where: str, text: str) -> Any:
    """The content of a JSON text. Raises UserError, also for a name that is in an object twice: one would be lost."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{where}: {twice!r} is there twice in one object")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({one_line(error)})") from None


_nfc = partial(unicodedata.normalize, "NFC")  # the Unicode form of most systems; macOS takes letters apart


def check_name(where: str, name: str) -> str:
    """The name, where it is that of a file in the folder of the images or in a sub-folder of it. Raises UserError."""
    leads_out = not {"", ".", ".."}.isdisjoint(name.split("/"))
    if leads_out or "\0" in name or name.encode(errors="ignore").decode() != name:  # a lone surrogate is no character
        raise UserError(f"{where}: {name!r} is not a plain file name, nor a path within the folder of the images")
    return name


class ImageNames:
    """Finds the image that a name in a label file means, in any Unicode form. SUB/NAME.jpg may be called so, or
    SUB/NAME, SUB_NAME, NAME.jpg or NAME; the first page of a file, like the file. The fullest name decides."""

    def __init__(self, names: Iterable[str]) -> None:
        self._named: dict[str, list[str]] = {}
        for key in (  # where images fit a name by several keys, the last of these keys decides
            lambda name: name_stem(name).rpartition("/")[2],
            lambda name: name.rpartition("/")[2],
            lambda name: name_stem(name).replace("/", "_"),
            lambda name: name.removesuffix("#page=1"),
            name_stem,
            str,
        ):
            group = defaultdict(list)
            for name in names:
                group[_nfc(key(name))].append(name)
            self._named |= group

    def find(self, written: str) -> list[str]:
        """The images that can be meant: none, one, or several that are equally likely."""
        found = self._named.get(_nfc(written), [])
        return [written] if written in found else found

    def find_end(self, path: str) -> list[str]:
        """The same for a path in folders of another computer: its longest end that names an image decides."""
        parts = path.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next(filter(None, map(self.find, ends)), [])

    def name(self, where: str, written: str) -> str:
        """The name of the image that is meant, else the name as it is written. Raises UserError."""
        found = self.find(check_name(where, written))
        return found[0] if len(found) == 1 else written

    def name_at(self, where: str, path: str) -> str:
        """The name of the image that a path of any system or a URL means, else the last part. Raises UserError."""
        slashed = path.replace("\\", "/")
        for found in map(self.find_end, (path, slashed, unquote(slashed))):
            if len(found) == 1:
                return found[0]
        return check_name(where, slashed.rpartition("/")[2])


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
    if not np.isfinite(polygon).all():
        raise UserError(f"{where}: a coordinate is not a finite number")
    if np.abs(polygon).max(initial=0) > MAX_COORDINATE:
        raise UserError(f"{where}: a coordinate is beyond {MAX_COORDINATE} pixels")
    return polygon


def rectangle(x0: float, y0: float, x1: float, y1: float, degrees: float = 0) -> np.ndarray:
    """(4, 2) corners of a rectangle, clockwise from its upper left, turned clockwise about its centre."""
    (left, right), (top, bottom) = sorted((x0, x1)), sorted((y0, y1))
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
    if not degrees:
        return corners
    angle, centre = math.radians(degrees % 360), corners.mean(axis=0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)  # exact for quarter turns
    return (corners - centre) @ np.array([[cosine, sine], [-sine, cosine]]) + centre


_DONT_CARE = {"ignore", "ignored", "crowd", "illegible", "illegibility", "unreadable", "difficult", "notlegible"}
_DONT_CARE |= {"dontcare", "donotcare", "legibilityillegible", "notreadable"}
_CARE = {"legible", "readable", "legibility", "care"}
_CLASS = {"label", "class", "category", "categoryname", "supercategory", "tag", "tags", "wordtags"}
_CLASS |= {"attributes", "flags"}  # where they are lists of names
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no", "none", "null", ""}
_QUOTES = {"''", '""', "“”", "„“", "„”", "‘’", "«»", "「」", "『』", "＂＂", "＇＇"}


@cache
def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower()).removeprefix("is")


def is_hidden_text(text: object) -> bool:
    """Whether a transcription is `###` or more hash marks, also full-width ones, or in quotes of any kind. A
    lone `*` is a word: receipts print it beside prices, and no data set defines it as don't care."""
    if not isinstance(text, str):
        return False
    text = text.strip()
    while len(text) > 4 and text[0] + text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return re.fullmatch("[#＃﹟]{3,}", text) is not None


def is_dont_care_class(name: object) -> bool:
    """Whether a class or label is `###`, or means don't care in words, as "Don't care" or "ignored_text"."""
    words = [_letters(name), *re.findall("[a-z]+", name.lower())] if isinstance(name, str) else []
    return is_hidden_text(name) or not _DONT_CARE.isdisjoint(words)


def is_dont_care(where: str, word: dict[str, Any]) -> bool:
    """Whether anything in a word, its flags, attributes or tags says don't care: a text `###`, a class that means it,
    or a flag such as `difficult`, `ignore`, `illegibility`. Raises UserError for a flag neither true nor false."""
    for name, value in _facts(word):
        meaning = _letters(str(name))
        if is_hidden_text(value) or (meaning in _CLASS and is_dont_care_class(value)):
            return True
        if meaning in _DONT_CARE or (meaning in _CARE and value not in (None, "")):
            text = str(value).strip().lower()
            if meaning == "legibility" and text not in _TRUE | _FALSE:  # a word, as in COCO-Text
                text = str(not is_dont_care_class(value)).lower()
            if text not in _TRUE | _FALSE:
                raise UserError(f'{where}: "{name}" must be true or false, not {text[:40]!r}')
            if (text in _TRUE) == (meaning in _DONT_CARE):
                return True
    return False


def _facts(word: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Names and values in a word, and in the objects and lists in it: flags, attributes, tags, under any name."""
    for name, value in word.items():
        yield name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from [*inner.items(), (inner.get("name"), inner.get("value"))]
            elif isinstance(inner, str):
                yield name, inner


Word = tuple[np.ndarray, bool, Any]  # (n, 2) polygon, whether it is don't care, what the file has for its score


def _word(where: str, entry: object) -> Word:
    """A word of the competition's JSON, of LabelMe or of Label.txt."""
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be an object with "points"')
    return to_polygon(where, entry.get("points")), is_dont_care(where, entry), entry.get("score")


def _annotation(words: list[Word], size: tuple[int, int] | None = None) -> Annotation:
    """The words of an image; their scores, if each word has one in 0..1."""
    scores = [float(score) for *_, score in words if type(score) in (int, float) and 0 <= score <= 1]
    polygons, dont_care = [polygon for polygon, _, _ in words], [ignore for _, ignore, _ in words]
    return Annotation(polygons, dont_care, scores if len(scores) == len(words) > 0 else None, size)


def size_of(entry: dict[str, Any], width: str, height: str) -> tuple[int, int] | None:
    """The image's size under these two names, or None where it is missing or empty."""
    values = [str(entry.get(name)).removesuffix(".0") for name in (width, height)]
    is_known = all(re.fullmatch("[1-9][0-9]{0,8}", value, re.ASCII) for value in values)
    return (int(values[0]), int(values[1])) if is_known else None


# ---- files for one image

_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*", re.ASCII)
_MANY_NUMBERS = 12  # in a line: its format knows more than four points
_CTW1500_NUMBERS = 32
_FLAGGED = re.compile(r"(?:[^,]*,){8}\s*(?:[01]|true|false)\s*,\s*(.*?)\s*", re.IGNORECASE)
_OUTLINES = ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral")  # of LabelMe's types of shapes

LINE_FORMATS: dict[str, tuple[int, str, Callable[[np.ndarray], np.ndarray]]] = {
    "icdar": (8, "x1,y1,x2,y2,x3,y3,x4,y4", lambda points: points[:4]),
    "polygons": (6, "x1,y1,x2,y2,x3,y3", lambda points: points),
    "ctw1500": (_CTW1500_NUMBERS, "a box and 14 offsets, 32 numbers", lambda points: points[0] + points[2:16]),
}
"""How many numbers a line begins with at least, what they are called, and the outline that all of them make.

    icdar     ICDAR 2015 and MLT: four points and a transcription, which may hold commas or be missing; RCTW-17 has a
              flag on every line before it, 0 or 1 for don't care (`_have_flags`)
    polygons  three or more points; a transcription after them must not begin with two numbers
    ctw1500   a box `left,top,right,bottom`, and 14 points as offsets from its upper left corner

Don't care is the transcription `###` (`is_hidden_text`), or that behind the name of a script as in MLT."""


def parse_lines(where: str, text: str, form: str, has_flags: bool = False) -> Annotation:
    """The words of a text file in one of LINE_FORMATS, with or without flags (`_have_flags`)."""
    least, expected, outline = LINE_FORMATS[form]
    words = list[Word]()
    for number, line in _lines(text):
        place, numbers = f"{where}: line {number}", _numbers(line)
        if len(numbers) < least:
            hints = (hint for pattern, hint in _FOREIGN_LINES if re.match(pattern, line))
            hint = next(hints, "write plain numbers, or name another --format")
            raise UserError(f"{place}: must begin with {expected}, not {line[:60]!r}; {hint}")
        polygon = outline(numbers[: len(numbers) // 2 * 2].reshape(-1, 2))
        last = line.rstrip(", \t").rpartition(",")[2]
        is_flagged = has_flags and line.split(",")[8].strip().lower() in _TRUE
        words.append((check_polygon(place, polygon), is_flagged or is_hidden_text(last), None))
    return _annotation(words)


def _have_flags(files: list[TextFile]) -> bool:
    """Whether every line of a set of files has a flag, 0 or 1, before its text, as in RCTW-17. Prices such as `1,500`
    and `1,50 EUR` look alike, so all texts must be in quotes, or one must begin with a letter."""
    matches = [_FLAGGED.fullmatch(line) for file in files for _, line in _lines(file.read())]
    texts = [match[1] for match in matches if match]
    is_text = any(text[:1].isalpha() for text in texts) or all(text[:1] + text[-1:] in _QUOTES for text in texts)
    return is_text and len(texts) == len(matches)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is not blank."""
    numbered = enumerate(io.StringIO(text, newline=None), start=1)
    return ((number, line.rstrip("\n")) for number, line in numbered if line.strip())


def _numbers(line: str) -> np.ndarray:
    """The numbers, separated by commas, with which a line begins."""
    return np.array([*takewhile(_NUMBER.fullmatch, line.split(","))], np.float64)


def recognize_lines(files: list[TextFile]) -> str:
    """The format of text files, one for each image, of LINE_FORMATS. Names in `res_` are results, which have no
    transcriptions: polygons. Else one line in ten with six points or more makes the set polygons, unless the first four
    are a parallelogram: then the others are numbers in a transcription."""
    if files and all(file.path.name.startswith("res_") for file in files):
        return "polygons"
    counts = Counter(_shape(_numbers(line)) for file in files for _, line in _lines(file.read()))
    if counts["ctw1500"] > counts["polygons"]:
        return "ctw1500"
    return "polygons" if 0 < counts.total() <= 10 * counts["polygons"] else "icdar"


def _shape(numbers: np.ndarray) -> str:
    """The format of LINE_FORMATS that a line of these numbers looks like."""
    if len(numbers) >= _CTW1500_NUMBERS:  # two corners of a box, and offsets within it
        box, offsets = numbers[2:4] - numbers[:2], numbers[4:_CTW1500_NUMBERS].reshape(-1, 2)
        if (box > 0).all() and (offsets >= -2).all() and (offsets <= box + 2).all():
            return "ctw1500"
    if len(numbers) < _MANY_NUMBERS:
        return "icdar"
    a, b, c, d = numbers[:8].reshape(4, 2)
    shift = math.dist(a + c, b + d) / 2  # between the middles of the diagonals: none in a parallelogram
    return "icdar" if shift < min(math.dist(a, c), math.dist(b, d)) / 8 else "polygons"


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
        elif kind not in _OUTLINES or len(polygon) < 3:
            raise UserError(f"{place}: is a {kind} of {len(polygon)} points; draw a polygon or rectangle instead")
        words.append((polygon, ignore, score))
    return _annotation(words, size_of(content, "imageWidth", "imageHeight"))


IMAGE_PARSERS: dict[str, Callable[[str, str], Annotation]] = {"labelme": parse_labelme}
"""Readers of the files that are there for each image, by format."""
IMAGE_PARSERS |= {form: partial(parse_lines, form=form) for form in LINE_FORMATS}

Entry = tuple[str, str, Annotation]  # a place in a file, the name of an image, and its words


def _read_each(files: list[TextFile], form: str, names: ImageNames) -> Iterator[Entry]:
    """The words of files for one image each: NAME.txt, NAME.jpg.txt, SUB/NAME.json and so on (`ImageNames`), or the
    same after a prefix that all have: gt_, poly_gt_ or res_. Raises UserError for a file on no image, or on two."""
    prefix = next((p for p in ("poly_gt_", "gt_", "res_") if all(file.path.name.startswith(p) for file in files)), "")
    found = [names.find_end(str(file.path.with_suffix(""))) for file in files]
    without = [names.find_end(str(file.path.parent / file.path.stem.removeprefix(prefix))) for file in files]
    parse = partial(parse_lines, form=form, has_flags=_have_flags(files)) if form == "icdar" else IMAGE_PARSERS[form]
    for file, images in zip(files, without if any(without) or not all(found) else found, strict=True):
        if len(images) > 1:
            raise UserError(f"{file.where}: may be on {images[0]} or {images[1]}; rename one of these")
        if not images:
            there = file.path.stem.removeprefix(prefix)
            raise UserError(f"{file.where}: there is no image {there!r}; put it there or take this file away")
        yield file.where, images[0], parse(file.where, file.read())


def parse_competition(where: str, text: str, names: ImageNames) -> Iterator[Entry]:
    """`{"images": {FILENAME: {"words": {ID: {"points": [[x, y], ...]}}}}}`."""
    content = parse_json(where, text)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict):
        raise _foreign_json(where, content, f'lacks "images", an object of file names; {_CONVERT}')
    for name, entry in images.items():
        words = entry.get("words", {}) if isinstance(entry, dict) else None
        if not isinstance(words, dict):
            raise UserError(f'{where}: {name}: lacks "words", an object of words')
        read = [_word(f"{where}: {name}: word {key}", word) for key, word in words.items()]
        yield where, names.name(where, name), _annotation(read, size_of(entry, "img_w", "img_h"))


def parse_coco(where: str, text: str, names: ImageNames) -> Iterator[Entry]:
    """COCO: each part of a `segmentation` is a polygon, or the `bbox` where there is none, turned by CVAT's attribute
    `rotation`. Don't care is a flag or text (`is_dont_care`), or a category that says so."""
    content = parse_json(where, text)
    if not isinstance(content, dict):
        raise UserError(f'{where}: lacks "images"; results alone know images only by number: put the images in too')
    images, entries, categories = (content.get(key) for key in ("images", "annotations", "categories"))
    if not isinstance(images, list) or not isinstance(entries, list):
        raise UserError(f'{where}: lacks "images" or "annotations", the lists of COCO')
    words = dict[str, list[Word]]()
    for number, image in enumerate(images, start=1):
        key = _key(image.get("id")) if isinstance(image, dict) else None
        if key is None or not isinstance(image.get("file_name"), str):
            raise UserError(f'{where}: image {number}: must have an "id" and a "file_name"')
        if key in words:
            raise UserError(f"{where}: image {number}: the id {key} is there twice")
        words[key] = []
    kinds = [kind for kind in (categories if isinstance(categories, list) else []) if isinstance(kind, dict)]
    named = ((_key(kind.get("id")), kind.get(key)) for kind in kinds for key in ("name", "supercategory"))
    ignored = {key for key, name in named if key is not None and is_dont_care_class(name)}
    for number, entry in enumerate(entries, start=1):
        place = f"{where}: annotation {number}"
        key = _key(entry.get("image_id")) if isinstance(entry, dict) else None
        if key is None or key not in words:
            raise UserError(f"{place}: its image_id is that of no image")
        ignore = is_dont_care(place, entry) or _key(entry.get("category_id")) in ignored
        words[key] += [(polygon, ignore, entry.get("score")) for polygon in _parse_segmentation(place, entry)]
    for number, (image, found) in enumerate(zip(images, words.values(), strict=True), start=1):
        place = f"{where}: image {number}"
        yield place, names.name_at(place, image["file_name"]), _annotation(found, size_of(image, "width", "height"))


def _key(value: object) -> str | None:
    """An id, the same for 1, 1.0 and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) else None


def _parse_segmentation(where: str, entry: dict[str, Any]) -> list[np.ndarray]:
    parts, box, attributes = entry.get("segmentation"), entry.get("bbox"), entry.get("attributes")
    if isinstance(parts, dict) and not entry.get("iscrowd"):
        raise UserError(f"{where}: its segmentation is a mask (RLE); export polygons")
    if parts not in (None, "", [], [[]]) and not isinstance(parts, dict):
        if not isinstance(parts, list) or any(not isinstance(part, list) or len(part) < 6 for part in parts):
            raise UserError(f"{where}: its segmentation must be lists of x1, y1, x2, y2, x3, y3 and more")
        return [to_polygon(where, [part[i : i + 2] for i in range(0, len(part), 2)]) for part in parts]
    if not isinstance(box, list) or len(box) != 4:
        raise UserError(f"{where}: has neither a segmentation nor a bbox of x, y, width and height")
    (x, y), (width, height) = to_polygon(where, [box[:2], box[2:]]).tolist()
    try:
        degrees = float(attributes.get("rotation") or 0) if isinstance(attributes, dict) else 0.0
        return [check_polygon(where, rectangle(x, y, x + width, y + height, degrees))]  # ValueError for inf
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{where}: "rotation" must be a number of degrees') from None


def parse_ppocrlabel(where: str, text: str, names: ImageNames) -> Iterator[Entry]:
    """Label.txt of PPOCRLabel and PaddleOCR: lines of `FOLDER/NAME.jpg`, a tab, and a JSON list of words."""
    for number, line in _lines(text):
        place = f"{where}: line {number}"
        path, tab, content = line.partition("\t")
        words = parse_json(place, content) if tab else None
        if not isinstance(words, list):
            raise UserError(f"{place}: must be the path of an image, a tab and a JSON list of words")
        read = [_word(f"{place}: word {index}", word) for index, word in enumerate(words, start=1)]
        yield place, names.name_at(place, path.strip()), _annotation(read)


WHOLE_PARSERS = {"competition": parse_competition, "coco": parse_coco, "ppocrlabel": parse_ppocrlabel}
"""Readers of the files that are about all images, by format."""


_AS_LINES = "write each outline as a line x1,y1,x2,y2,x3,y3,x4,y4,text into NAME.txt"
_FOREIGN_LINES = (
    (r"x:\s*\[\[", f"this is Total-Text's form; {_AS_LINES}"),
    (r"[^\t]+\t\s*\[", "this is PPOCRLabel's or PaddleOCR's form; call it Label.txt, without files for one image"),
    (r"\s*[\[{]", "this is JSON; end its name in .json"),
    (r"imagesource:|gsd:|(-?[\d.]+\s+){8}\S+\s+\d\s*$", f"this is DOTA's form; {_AS_LINES}"),
    (r"\d+(\s+(0?\.\d+|0|1|1\.0+)){4,}\s*$", f"this is YOLO's form, in shares of the image; {_AS_LINES}, in pixels"),
    (r"\s*\d+([,\s]+\d+){3}\s*($|[,\s](?!\s*-?[\d.]+\s*([,\s]|$)))", f"this is a box, as in ICDAR 2013; {_AS_LINES}"),
    (r"(\d+\s+){2}-?\d+(\s+-?[\d.]+){4}\s*$", f"this is MSRA-TD500's form; {_AS_LINES}"),
    (r"\s*-?[\d.]+(\s*[;|\t\uff0c\u3001]|\s+-?\d)", "numbers must be separated by commas; replace the separators"),
    (r"(\s*-?[\d.]+\s*,){7}\s*-?[\d.]+\s*[^\s\d.,]", "a comma must be between the numbers and the text"),
    (r"(?i)\s*[#/;]|\s*(?!nan|inf)[a-z_]+\d*\s*,", "this is a heading or a comment; delete the line"),
    (r"\s*[\"'(]", "the numbers must be without quotes and brackets"),
    ("\ufeff|.\0", "this is UTF-16, or begins with a byte order mark; save the file as UTF-8 without it"),
)  # what lines of other formats look like, and what to do

_EXPORT = "export COCO there"
_CONVERT = 'convert it to COCO, or to {"images": {NAME: {"words": {ID: {"points": [[x, y], ...]}}}}}'
_FOREIGN_JSON = (
    ({"img_dimensions", "polygons"}, "a labels.json of docTR", _CONVERT),
    ({"data_list"}, "the form of MMOCR 1.x", _CONVERT),
    ({"imgs", "anns"}, "the form of TextOCR and COCO-Text", _CONVERT),
    ({"_via_img_metadata"}, "a project of VIA", f"{_EXPORT} (Annotation, Export Annotations)"),
    ({"regions", "filename"}, "the JSON of VIA", f"{_EXPORT} (Annotation, Export Annotations)"),
    ({"annotations", "data"}, "the JSON of Label Studio", f"{_EXPORT} (Export, COCO)"),
    ({"original_width"}, "the JSON of Label Studio", f"{_EXPORT} (Export, COCO)"),
    ({"form"}, "the form of FUNSD", _CONVERT),
    ({"paragraphs"}, "the form of HierText", _CONVERT),
    ({"transcription", "points"}, "the form of ArT and LSVT", _CONVERT),
    ({"image_id", "bbox"}, "a list of COCO results without its images", "put both into one file"),
    ({"shapes"}, "a file of LabelMe", "put it into labels/SPLIT/ under the name of its image"),
    ({"images", "annotations"}, "COCO", "call it SPLIT.json in jsons/"),
)  # keys that JSON files of other formats have in their upper levels, what these are, and what to do

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


_SUFFIXES = {"auto": (".txt", ".json"), **dict.fromkeys(("labelme", "coco", "competition"), (".json",))}
_PPOCRLABEL = re.compile(r"[^\t\n]+\t\s*\[.*\]\s*")
_BESIDE_LABELS = {"fileState", "rec_gt"}  # what PPOCRLabel writes beside a Label.txt


def read_labels_at(source: Path, images: list[str], form: str = "auto") -> tuple[str, dict[str, Annotation]]:
    """The format of a file, folder or zip of annotations, and the annotations by image, in the order of the file, or of
    `images` where each has a file of its own. Raises UserError."""
    is_file = not source.is_dir() and source.suffix.lower() != ".zip"
    suffixes = _SUFFIXES.get(form, (".txt",))
    files = [text_file(source)] if is_file else list_text_files(source, *suffixes)
    labels = [file for file in files if file.path.name.lower() == "label.txt"]
    if labels and {file.path.stem for file in files if file not in labels} <= _BESIDE_LABELS:
        files = labels
    if not files:
        foreign = find_foreign_labels([source])
        kinds = f"{' or '.join(suffixes)} files"
        raise UserError(foreign or f"{source}: holds no annotations ({kinds}); put them there, or name their --format")
    if len({file.path.suffix.lower() for file in files}) > 1:
        raise UserError(f"{source}: holds .txt and .json files; say which are the annotations with --format")
    if form == "auto":
        form = _recognize(files, is_file)
    names = ImageNames(images)
    if form in WHOLE_PARSERS:
        return form, _collect(entry for file in files for entry in WHOLE_PARSERS[form](file.where, file.read(), names))
    found = _collect(_read_each(files, form, names))
    return form, {name: found[name] for name in images if name in found}


def _recognize(files: list[TextFile], is_whole: bool) -> str:
    """The format of .txt files or of .json files. `is_whole` says that the only one is about all images."""
    first, text = files[0], files[0].read()
    if first.path.suffix.lower() == ".txt":
        is_whole |= {file.path.stem.lower() for file in files} == {"label"} or bool(_PPOCRLABEL.match(text))
        return "ppocrlabel" if is_whole else recognize_lines(files)
    content = parse_json(first.where, text)
    if not isinstance(content, dict):  # results of COCO, or another format; the error says what it is
        return "coco" if "image_id" in _keys(content) else "competition"
    if "shapes" in content and not is_whole:
        return "labelme"
    return "coco" if isinstance(content.get("images"), list) else "competition"


def _collect(entries: Iterable[Entry]) -> dict[str, Annotation]:
    """Annotations by image. Raises UserError where those of an image are there twice."""
    found: dict[str, Annotation] = {}
    for where, name, annotation in entries:
        if name in found:
            raise UserError(f"{where}: annotations of {name} are there twice; keep one of them")
        found[name] = annotation
    return found


_MAX_FIELD = 1 << 28  # characters: a row of 500 polygons with many points is longer than the csv module's default


def read_detections(path: Path, images: list[str]) -> dict[str, Annotation]:
    """Read what `write_detections` wrote, in any of its formats, on images of these names, in the order of the file."""
    if path.is_dir() or path.suffix.lower() in (".json", ".zip", ".txt"):
        return read_labels_at(path, images)[1]
    names, where = ImageNames(images), str(path)
    rows = read_submission(path).items()
    return _collect((where, names.name(where, name), Annotation(found, [False] * len(found))) for name, found in rows)


def read_submission(path: Path) -> dict[str, list[np.ndarray]]:
    """File names and their polygons, (n, 2) float64 arrays, in the order of the file. Raises UserError."""
    csv.field_size_limit(_MAX_FIELD)
    rows = csv.DictReader(io.StringIO(text_file(path).read(), newline=""), strict=True)
    submission: dict[str, list[np.ndarray]] = {}
    try:
        if not {*HEADER} <= {*(rows.fieldnames or [])}:
            raise UserError(f"{path}: the first row must name the columns filename and polygons")
        for number, row in enumerate(rows, start=2):
            place, name = f"{path}: row {number}", row["filename"]
            if None in row or None in row.values():
                raise UserError(f"{place} has more or fewer columns than the first")
            if name in submission:
                raise UserError(f"{place}: {name} is there twice; keep one row an image")
            submission[name] = [_parse_polygon(place, text) for text in row["polygons"].split("|") if text.strip()]
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
