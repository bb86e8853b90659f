"""Readers of label files, one for each format, and tables of the formats that are only recognized.

Read are the competition's JSON, COCO (with the dialects of CVAT and Roboflow), LabelMe and X-AnyLabeling, PPOCRLabel's
Label.txt, and text files for each image: ICDAR, MLT, RCTW-17, CTW1500 and lines of any number of points. For others
the error names the format and the way out (`_FOREIGN_JSON`, `_FOREIGN_LINES`, `_FOREIGN_SUFFIXES`).
"""

import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.annotations import (
    Annotation,
    ImageNames,
    TextFile,
    check_name,
    check_polygon,
    is_dont_care_class,
    is_flagged,
    is_hidden_text,
    list_text_files,
    nfc,
    parse_json,
    read_file,
    read_submission,
    rectangle,
    scores_of,
    size_of,
    to_polygon,
)
from dbnet.errors import UserError
from dbnet.images import name_stem

# ---- text files, one for each image

_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,18}(\.[0-9]*)?\s*", re.ASCII)
_MANY_POINTS = 6  # points in a line that show that its format knows more than four
_CTW1500_NUMBERS = 32
_RCTW17 = re.compile(r'([^,]*,){8}\s*[01]\s*,\s*".*"\s*')
_PPOCRLABEL = re.compile(r"[^\t\n]+\t\s*\[.*\]\s*")


def recognize_text_files(files: list[TextFile]) -> str:
    """The format of text files, one for each image: icdar, polygons or ctw1500.

    Names in `res_` are results, which have points and no transcriptions: polygons. Else lines decide. One line in ten
    with the numbers of six points or more makes the set polygons, unless the first four points are a parallelogram:
    then the other numbers are a transcription. Lines of 32 numbers are ctw1500 if most are a box and offsets in it.
    """
    if files and all(file.stem.startswith("res_") for file in files):
        return "polygons"
    lines = many = offsets = 0
    for file in files:
        for _, line in _lines(file.read()):
            lines += 1
            fields = line.split(",")
            count = _count_numbers(fields)
            if count < 2 * _MANY_POINTS:
                continue
            points = np.array([float(text) for text in fields[:count]])
            if count >= _CTW1500_NUMBERS and _are_offsets(points[:_CTW1500_NUMBERS]):
                offsets += 1
            elif not _is_parallelogram(points[:8].reshape(4, 2)):
                many += 1
    if offsets > many:
        return "ctw1500"
    return "polygons" if 0 < lines <= 10 * many else "icdar"


def _are_offsets(numbers: np.ndarray) -> bool:
    """Whether 32 numbers are the upper left and lower right corner of a box and 14 offsets within it."""
    box, offsets = numbers[2:4] - numbers[:2], numbers[4:].reshape(-1, 2)
    return bool((box > 0).all() and (offsets >= -2).all() and (offsets <= box + 2).all())


def _is_parallelogram(quad: np.ndarray) -> bool:
    """Whether the diagonals of the (4, 2) points have the same middle, to an eighth of their length."""
    middles, diagonals = (quad[0] + quad[2] - quad[1] - quad[3]) / 2, (quad[2] - quad[0], quad[3] - quad[1])
    shortest = min(math.hypot(*diagonal) for diagonal in diagonals)
    return math.hypot(*middles) < shortest / 8


def parse_icdar(where: str, text: str) -> Annotation:
    """ICDAR 2015: lines of `x1,y1,x2,y2,x3,y3,x4,y4,transcription`; the transcription may hold commas, or be missing.

    Don't care is the transcription `###`, also in quotes or after the script's name as in the MLT challenges. RCTW-17
    is the same with a flag, 0 or 1 for don't care, before a transcription in quotes on every line.
    """
    annotation = Annotation()
    has_flags = all(_RCTW17.fullmatch(line) for _, line in _lines(text))
    for place, fields, points in _points_of_lines(where, text, 8, "x1,y1,x2,y2,x3,y3,x4,y4", "polygons"):
        ignore = is_hidden_text(fields[-1]) or (has_flags and fields[8].strip() == "1")
        annotation.add(check_polygon(place, points[:4]), ignore)
    return annotation


def parse_polygons(where: str, text: str) -> Annotation:
    """Lines of `x1,y1,...,xn,yn` with three or more points, with or without a transcription after them.

    All numbers at the start of a line are points, except the last of an odd count: so a transcription must not begin
    with two numbers. Don't care is `###`.
    """
    annotation = Annotation()
    for place, fields, points in _points_of_lines(where, text, 6, "x1,y1,x2,y2,x3,y3"):
        annotation.add(check_polygon(place, points), is_hidden_text(fields[-1]))
    return annotation


def parse_ctw1500(where: str, text: str) -> Annotation:
    """CTW1500: lines of a box `left,top,right,bottom` and 14 points as offsets from its upper left corner."""
    annotation = Annotation()
    expected = "a box and 14 offsets, 32 numbers"
    for place, fields, points in _points_of_lines(where, text, _CTW1500_NUMBERS, expected, "polygons"):
        annotation.add(check_polygon(place, points[0] + points[2:16]), is_hidden_text(fields[-1]))
    return annotation


def parse_labelme(where: str, text: str) -> Annotation:
    """LabelMe and X-AnyLabeling: polygons, rectangles and rotated rectangles. Don't care is the label or description
    `###`, or a label or flag that says so (`is_flagged`)."""
    content = parse_json(where, text)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise _foreign_json(where, content, 'lacks "shapes", a list; is it a file of LabelMe?')
    annotation = Annotation(size=size_of(content, "imageWidth", "imageHeight"))
    for number, shape in enumerate(shapes, start=1):
        if not isinstance(shape, dict):
            raise UserError(f"{where}: shape {number}: must be an object")
        polygon = to_polygon(f"{where}: shape {number}", shape.get("points"))
        kind = shape.get("shape_type") or "polygon"
        if kind == "rectangle" and len(polygon) == 2:
            polygon = rectangle(*polygon.ravel().tolist())
        elif kind not in ("polygon", "rectangle", "rotation", "quadrilateral") or len(polygon) < 3:
            raise UserError(
                f"{where}: shape {number}: is a {kind} of {len(polygon)} points; draw a polygon or rectangle instead"
            )
        ignore = is_dont_care_class(shape.get("label")) or is_hidden_text(shape.get("description"))
        annotation.add(polygon, ignore or is_flagged(f"{where}: shape {number}", shape))
    return annotation


TEXT_PARSERS: dict[str, Callable[[str, str], Annotation]] = {
    "icdar": parse_icdar,
    "polygons": parse_polygons,
    "ctw1500": parse_ctw1500,
    "labelme": parse_labelme,
}


def read_text_files(files: list[TextFile], form: str, images: list[str]) -> dict[str, Annotation]:
    """Annotations by the names of `images`, in the order of these, from a file for each image.

    The file of NAME.jpg is called NAME.txt (or .json), NAME.jpg.txt, or such with a prefix that all of them have:
    gt_, poly_gt_ or res_. Raises UserError for a file without an image, or two files for one.
    """
    candidates: dict[str, list[str]] = {}
    for name in images:
        candidates.setdefault(nfc(name_stem(name)), []).append(name)
    for name in images:
        candidates.setdefault(nfc(name), [name])
    stems = [nfc(file.stem) for file in files]
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


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is not blank."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.rstrip("\n")


def _points_of_lines(
    where: str, text: str, least: int, expected: str, other: str = ""
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Place, comma-separated fields and the (n, 2) points at the start of each line.

    Raises UserError for a line of fewer numbers than `least`, the `expected` ones; `other` is a format that may fit.
    """
    for number, line in _lines(text):
        fields = line.split(",")
        count = _count_numbers(fields) // 2 * 2
        if count < least:
            hint = next((hint for pattern, hint in _FOREIGN_LINES if re.match(pattern, line)), "")
            if other and not hint:
                hint = f"--format {other} reads other numbers of points"
            raise UserError(
                f"{where}: line {number}: must begin with {expected}, not {line[:60]!r}{hint and '; '}{hint}"
            )
        yield f"{where}: line {number}", fields, np.array([float(field) for field in fields[:count]]).reshape(-1, 2)


def _count_numbers(fields: list[str]) -> int:
    """How many of the fields, from the first on, are numbers."""
    return next((i for i, text in enumerate(fields) if not _NUMBER.fullmatch(text)), len(fields))


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


# ---- JSON files and Label.txt, one for all images

ONE_FILE_FORMATS = ("competition", "coco", "ppocrlabel")  # the others have a file for each image


def read_annotations(path: Path) -> dict[str, Annotation]:
    """Read `{"images": {FILENAME: {"words": {ID: {"points": [[x, y], ...]}}}}}`, in the order of the file.

    A word with `illegibility: true` or the transcription `###` is "don't care". Raises UserError.
    """
    return parse_competition(str(path), parse_json(str(path), read_file(path)))


def parse_competition(where: str, content: Any) -> dict[str, Annotation]:
    """What `read_annotations` reads, from the content of the file."""
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict):
        raise _foreign_json(where, content, 'lacks "images", an object of file names; see the README for the form')
    found = {}
    for name, entry in images.items():
        check_name(where, name)
        words = entry.get("words", {}) if isinstance(entry, dict) else None
        if not isinstance(words, dict):
            raise UserError(f'{where}: {name}: lacks "words", an object of words')
        annotation = found[name] = Annotation(size=size_of(entry, "img_w", "img_h"))
        for word_id, word in words.items():
            place = f"{where}: {name}: word {word_id}"
            polygon = to_polygon(place, word.get("points") if isinstance(word, dict) else None)
            annotation.add(polygon, is_hidden_text(word.get("transcription")) or is_flagged(place, word))
        annotation.scores = scores_of(word.get("score") for word in words.values())
    return found


def parse_coco(where: str, content: Any, names: list[str]) -> dict[str, Annotation]:
    """COCO: each part of a `segmentation` is a polygon, or the `bbox` where there is none, turned by CVAT's attribute
    `rotation`. Don't care is a flag or attribute (`is_flagged`), or a category that says so. An image has the name that
    ends its `file_name` (`ImageNames`)."""
    if not isinstance(content, dict):
        raise UserError(f'{where}: lacks "images"; results alone know images only by number: put the images in too')
    images, entries = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(entries, list):
        raise UserError(f'{where}: lacks "images" or "annotations", the lists of COCO')
    image_names, name_of, found = ImageNames(names), dict[str, str](), dict[str, Annotation]()
    scores: dict[str, list[object]] = {}
    for number, image in enumerate(images, start=1):
        key, name = (_key(image.get("id")), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if key is None or not isinstance(name, str):
            raise UserError(f'{where}: image {number}: must have an "id" and a "file_name"')
        name = image_names.find(f"{where}: image {number}", name)
        if key in name_of or name in found:
            raise UserError(f"{where}: image {number}: id {key} or name {name} is there twice")
        name_of[key], found[name], scores[name] = name, Annotation(size=size_of(image, "width", "height")), []
    categories = content.get("categories")
    ignored = {
        _key(category.get("id"))
        for category in (categories if isinstance(categories, list) else [])
        if isinstance(category, dict) and is_dont_care_class(category.get("name"))
    }
    for number, entry in enumerate(entries, start=1):
        place = f"{where}: annotation {number}"
        key = _key(entry.get("image_id")) if isinstance(entry, dict) else None
        if key not in name_of:
            raise UserError(f"{place}: its image_id is that of no image")
        category = _key(entry.get("category_id"))
        ignore = is_flagged(place, entry) or (category is not None and category in ignored)
        for polygon in _parse_segmentation(place, entry):
            found[name_of[key]].add(polygon, ignore)
            scores[name_of[key]].append(entry.get("score"))
    for name, annotation in found.items():
        annotation.scores = scores_of(scores[name])
    return found


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
    `points`, `transcription` and `difficult`. Don't care is the transcription `###` or a flag (`is_flagged`)."""
    image_names, found = ImageNames(names), dict[str, Annotation]()
    for number, line in _lines(text):
        place = f"{where}: line {number}"
        path, tab, content = line.partition("\t")
        words = parse_json(place, content) if tab else None
        if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
            raise UserError(f"{place}: must be the path of an image, a tab and a JSON list of words")
        name = image_names.find(place, path.strip())
        if name in found:
            raise UserError(f"{place}: {name} is there twice; keep one of the lines")
        annotation = found[name] = Annotation()
        for index, word in enumerate(words, start=1):
            polygon = to_polygon(f"{place}: word {index}", word.get("points"))
            ignore = is_hidden_text(word.get("transcription")) or is_flagged(f"{place}: word {index}", word)
            annotation.add(polygon, ignore)
    return found


_EXPORT = "export COCO there"
_CONVERT = 'convert it to COCO, or to {"images": {NAME: {"words": {ID: {"points": [[x, y], ...]}}}}}'
_FOREIGN_JSON = (
    ({"img_hash", "polygons"}, "a labels.json of docTR", _CONVERT),
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
    ({"items", "categories"}, "the form of Datumaro", _EXPORT),
    ({"objects", "size"}, "the form of Supervisely", _EXPORT),
    ({"data_row"}, "the form of Labelbox", _EXPORT),
    ({"features", "type"}, "GeoJSON", _CONVERT),
    ({"Blocks"}, "a result of Textract", _CONVERT),
    ({"textAnnotations"}, "a result of Google Vision", _CONVERT),
    ({"analyzeResult"}, "a result of Azure", _CONVERT),
    ({"shapes"}, "a file of LabelMe", "put it into labels/SPLIT/ under the name of its image"),
    ({"images", "annotations"}, "COCO", "call it SPLIT.json in jsons/"),
)
"""Keys that JSON files of other formats have in their upper levels, what these are, and what to do."""

_FOREIGN_SUFFIXES = {
    ".xml": f"XML of Pascal VOC (labelImg), CVAT or PAGE; {_EXPORT}, or save as LabelMe",
    ".gt": f"MSRA-TD500's .gt files; {_AS_LINES}",
    ".mat": f"MATLAB's form; {_AS_LINES}",
    ".csv": f"a table; {_AS_LINES}",
    ".tsv": f"a table; {_AS_LINES}",
    ".jsonl": f"JSON lines; {_CONVERT}",
    ".yaml": f"YOLO's data.yaml; {_EXPORT}",
    ".yml": f"YOLO's data.yaml; {_EXPORT}",
    ".parquet": f"a table; {_AS_LINES}",
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
    for needed, kind, advice in _FOREIGN_JSON:
        if needed <= keys:
            return UserError(f"{where}: is {kind}, which is not read; {advice}")
    return UserError(f"{where}: {otherwise}")


def find_foreign_labels(folders: list[Path]) -> str | None:
    """A sentence about files of other formats in these folders, or None where there are none."""
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.suffix.lower() in _FOREIGN_SUFFIXES and not path.name.startswith("."):
                return f"{path}: is {_FOREIGN_SUFFIXES[path.suffix.lower()]}"
    return None


# ---- the labels of a split, in any format


def read_labels_at(source: Path, images: list[str], form: str = "auto") -> tuple[str, dict[str, Annotation]]:
    """The format of a file or folder of annotations, and the annotations of these images. Raises UserError."""
    if not source.is_dir() and source.suffix.lower() != ".zip":
        return _parse_whole(str(source), read_file(source), images, form)
    texts = [] if form in ("labelme", "coco", "competition") else list_text_files(source, ".txt")
    jsons = list_text_files(source, ".json") if form in ("auto", "labelme", "coco", "competition") else []
    whole = _find_whole(texts, jsons, images)
    if whole and form in ("auto", *ONE_FILE_FORMATS):
        return _parse_whole(whole.where, whole.read(), images, form)
    if form in ONE_FILE_FORMATS:
        raise UserError(f"{source}: holds no file of the format {form} for all images; put it there, alone")
    if texts and jsons:
        raise UserError(f"{source}: holds .txt and .json files; say which are the annotations with --format")
    if not texts and not jsons:
        foreign = find_foreign_labels([source] if source.is_dir() else [])
        raise UserError(foreign or f"{source}: holds no annotations; put a .txt or .json file for each image there")
    if form == "auto":
        form = recognize_text_files(texts) if texts else "labelme"
    return form, read_text_files(texts or jsons, form, images)


def _find_whole(texts: list[TextFile], jsons: list[TextFile], images: list[str]) -> TextFile | None:
    """The file about all images in a folder: Label.txt, or the only file, if it is not named after an image.

    PPOCRLabel writes fileState.txt and rec_gt.txt beside Label.txt.
    """
    labels = [file for file in texts if file.stem.lower() == "label"]
    extras = {"fileState", "rec_gt"}
    if labels and all(file in labels or file.stem in extras for file in texts):
        return labels[0]
    known = {nfc(name) for image in images for name in (image, name_stem(image))}
    if len(jsons) == 1 and not texts and nfc(jsons[0].stem) not in known:
        return jsons[0] if "shapes" not in _keys(parse_json(jsons[0].where, jsons[0].read()), 1) else None
    if len(texts) == 1 and not jsons and nfc(texts[0].stem) not in known:
        return texts[0] if _PPOCRLABEL.match(texts[0].read()) else None
    return None


def _parse_whole(where: str, text: str, images: list[str], form: str) -> tuple[str, dict[str, Annotation]]:
    """Format and annotations of a file about all images."""
    if form == "ppocrlabel" or (form == "auto" and where.lower().endswith(".txt")):
        return "ppocrlabel", parse_ppocrlabel(where, text, images)
    content = parse_json(where, text)
    if form == "auto":  # COCO has its images as a list, or results alone
        images_of = content.get("images") if isinstance(content, dict) else None
        is_coco = isinstance(images_of, list) or (isinstance(content, list) and "image_id" in _keys(content))
        form = "coco" if is_coco else "competition"
    return form, parse_coco(where, content, images) if form == "coco" else parse_competition(where, content)


def read_detections(path: Path, images: list[str]) -> dict[str, Annotation]:
    """Read what `write_detections` wrote, in any of its formats, on images of these names, in the order of the file.

    Raises UserError for anything else.
    """
    if path.suffix.lower() == ".csv" or not (path.is_dir() or path.suffix.lower() in (".json", ".zip", ".txt")):
        return {name: Annotation(polygons, [False] * len(polygons)) for name, polygons in read_submission(path).items()}
    return read_labels_at(path, images)[1]
