"""The data on disk: DATA/images/{train,val,test}/ and DATA/jsons/{train,val,test}.json, checked as they are read."""

import json
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dbnet.errors import UserError
from dbnet.geometry import fault_of
from dbnet.images import SUFFIXES, check_name, list_images


@dataclass
class Annotation:
    """The words of one image, in pixels of the upright original."""

    polygons: list[np.ndarray] = field(default_factory=list)
    """(n, 2) float64 arrays of points (x, y), n as in the file"""

    dont_care: list[bool] = field(default_factory=list)
    """for each polygon, whether it counts neither for the losses nor for the metric"""


def read_annotations(path: Path) -> dict[str, Annotation]:
    """Read `{"images": {FILENAME: {"words": {ID: {"points": [[x, y], ...]}}}}}`, in the order of the file.

    A word with `illegibility: true` or the transcription `###` is "don't care".

    Raises UserError, naming the file, the image and the word, for anything else than this form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_read_object)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the annotations of a split belong there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON in UTF-8 ({' '.join(str(error).split())})") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict):
        raise UserError(f'{path}: lacks "images", an object of file names; see the README for the form')
    return {name: _read_image(path, name, entry) for name, entry in images.items()}


def read_split(data: Path, split: str) -> tuple[list[Path], list[Annotation]]:
    """Image files and annotations of a split, in the order of its json.

    Says on stdout how many image files have no entry in the json and are left out.

    Raises UserError where the folder, the json or images that it names are missing.
    """
    annotations = read_annotations(find_json(data, split))
    folder = find_images(data, split)
    present = {path.name for path in list_images(folder)}
    missing = [name for name in annotations if name not in present]
    if missing:
        spelled = {unicodedata.normalize("NFC", name): name for name in present}
        if unicodedata.normalize("NFC", missing[0]) in spelled:
            raise UserError(
                f"{folder / missing[0]}: {split}.json and the file spell this name in different Unicode forms (NFC and "
                f"NFD); rename the files (convmv -f utf-8 -t utf-8 --nfc)"
            )
        raise UserError(
            f"{folder / missing[0]}: no such image, but {split}.json names it (and {len(missing) - 1} more like it); "
            f"put it there or take it out of the json"
        )
    if not annotations:
        raise UserError(f"{data / 'jsons' / split}.json: names no images")
    left_out = len(present) - len(annotations)
    if left_out:
        print(f"{folder}: {left_out} images have no entry in {split}.json and are left out")
    return [folder / name for name in annotations], list(annotations.values())


def read_image_paths(data: Path, split: str) -> list[Path]:
    """Image files of a split that needs no annotations: in the order of its json where there is one, else by name."""
    if (data / "jsons" / f"{split}.json").exists():
        return read_split(data, split)[0]
    return list_images(find_images(data, split))


def find_images_at(places: list[Path]) -> list[Path]:
    """Image files at the given folders and files, in order; those of a folder by name.

    Raises UserError for a place that does not exist, a folder without images, or two files of the same name, which
    the rows of a submission could not tell apart.
    """
    paths = []
    for place in places:
        if os.path.isdir(place):  # unlike Path's, it takes no offence at a name too long
            found = list_images(place)
            if not found:
                raise UserError(f"{place}: holds no images ({', '.join(SUFFIXES)})")
            paths.extend(found)
        elif os.path.isfile(place):
            check_name(place)
            paths.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    names = Counter(path.name for path in paths)
    twice = next((path for path in paths if names[path.name] > 1), None)
    if twice:
        raise UserError(f"{twice}: another image has the same name; a row of the CSV is known by its file name alone")
    return paths


def find_json(data: Path, split: str) -> Path:
    """DATA/jsons/SPLIT.json. Raises UserError where DATA is no folder."""
    _check_folder(data)
    return data / "jsons" / f"{split}.json"


def find_images(data: Path, split: str) -> Path:
    """DATA/images/SPLIT. Raises UserError where it is not a folder with images."""
    _check_folder(data)
    folder = data / "images" / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the images of the split belong there")
    if not list_images(folder):
        raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    return folder


def _check_folder(data: Path) -> None:
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; name the data set with --data DIR")


def _read_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises ValueError where a name is there twice, since only one of the two would be read."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return content


def _read_image(path: Path, name: str, entry: object) -> Annotation:
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    if not is_plain or name.encode(errors="ignore").decode() != name:  # a lone surrogate is no character
        raise UserError(f"{path}: {name!r} is not a plain file name; images lie directly in their folder")
    words = entry.get("words", {}) if isinstance(entry, dict) else None
    if not isinstance(words, dict):
        raise UserError(f'{path}: {name}: lacks "words", an object of words')
    annotation = Annotation()
    for word_id, word in words.items():
        annotation.polygons.append(_read_points(path, name, word_id, word))
        annotation.dont_care.append(word.get("illegibility") is True or word.get("transcription") == "###")
    return annotation


def _read_points(path: Path, name: str, word_id: str, word: object) -> np.ndarray:
    points = word.get("points") if isinstance(word, dict) else None
    try:
        if not isinstance(points, list) or any(isinstance(value, bool | str) for point in points for value in point):
            raise ValueError
        polygon = np.array(points, dtype=np.float64).reshape(len(points), 2)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f'{path}: {name}: word {word_id}: "points" must be a list of [x, y] pairs of numbers') from None
    fault = fault_of(polygon)
    if fault:
        raise UserError(f"{path}: {name}: word {word_id}: {fault}")
    return polygon
