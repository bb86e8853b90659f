"""The data on disk: DATA/images/{train,val,test}/ and DATA/jsons/{train,val,test}.json, checked as they are read.

Annotations may also be in the formats that `dbnet.formats` reads, and those lie in more places: see `find_labels`.
"""

import glob
import os
import unicodedata
from collections import Counter
from pathlib import Path

from dbnet.annotations import (
    ONE_FILE_FORMATS,
    TEXT_PARSERS,
    Annotation,
    list_text_files,
    read_labels_at,
)
from dbnet.errors import ImageError, UserError
from dbnet.images import SUFFIXES, check_encoding, list_images, list_pages, pdf_of


def find_labels(data: Path, split: str, form: str = "auto") -> Path | None:
    """Where the annotations of a split are: the first of

        DATA/jsons/SPLIT.json     the competition's or COCO's
        DATA/labels/SPLIT.json    the same
        DATA/labels/SPLIT.zip     a text file, or a json of LabelMe, for each image
        DATA/labels/SPLIT/        the same in a folder
        DATA/images/SPLIT/        the same beside the images

    that is there and can be of the format `form`, or None. Raises UserError where DATA is no folder.
    """
    _check_folder(data)
    one_file = [data / "jsons" / f"{split}.json", data / "labels" / f"{split}.json"]
    file_an_image = [data / "labels" / f"{split}.zip", data / "labels" / split, data / "images" / split]
    places = ([] if form in TEXT_PARSERS else one_file) + ([] if form in ONE_FILE_FORMATS else file_an_image)
    return next((path for path in places if path.is_file() or _holds_labels(path)), None)


def read_labels(data: Path, split: str, form: str = "auto") -> tuple[Path, dict[str, Annotation]]:
    """Where the annotations of a split are, and these by the file names of their images.

    Says on stdout which format they were taken for, where that is not the competition's. Raises UserError where there
    are none, or they are broken.
    """
    place = find_labels(data, split, form)
    if place is None:
        kind = "annotations" if form == "auto" else f"annotations of --format {form}"
        raise UserError(
            f"{data / 'jsons' / split}.json: no such file; the {kind} of a split belong there, or into "
            f"{data / 'labels' / split}/ as a file for each image"
        )
    folder = data / "images" / split
    images = [path.name for path in list_images(folder)] if folder.is_dir() else []
    recognized, annotations = read_labels_at(place, images, form)
    if form == "auto" and recognized != "competition":
        print(f"{place}: annotations of the format {recognized} (--format insists on another)")
    return place, annotations


def read_split(data: Path, split: str, form: str = "auto") -> tuple[list[Path], list[Annotation]]:
    """Image files and annotations of a split, in the order of its json; by name where there is a file for each image.

    Says on stdout how many image files have no annotations and are left out, and what `read_labels` says.

    Raises UserError where the folder, the annotations or images that these name are missing.
    """
    place, annotations = read_labels(data, split, form)
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
            f"{folder / missing[0]}: no such image, but {place.name} names it (and {len(missing) - 1} more like it); "
            f"put it there or take it out of the annotations"
        )
    if not annotations:
        raise UserError(f"{place}: names no images")
    left_out = len(present) - len(annotations)
    if left_out:
        print(f"{folder}: {left_out} images have no entry in {place.name} and are left out")
    return [folder / name for name in annotations], list(annotations.values())


def read_image_paths(data: Path, split: str, form: str = "auto") -> list[Path]:
    """Image files of a split that needs no annotations: in the order of its json where there is one, else by name."""
    place = find_labels(data, split, form)
    if place and place.suffix == ".json":
        return read_split(data, split, form)[0]
    return list_images(find_images(data, split))


def find_images_at(places: list[Path]) -> list[Path]:
    """Image files and pages of PDF files at the given places, in order.

    A place is a folder (its images and PDFs, by name), a file, a page as FILE.pdf#page=NUMBER, or a pattern with *, ?,
    [] and ** (the images and PDFs that match, by name, and other files where the pattern ends in their suffix). A PDF
    that cannot be opened stays as it is in the list, to fail like any other image when it is read.

    Raises UserError for a place that does not exist or holds nothing to read, or two files of the same name, which the
    rows of a submission could not tell apart; and for a PDF where pypdfium2 is not installed.
    """
    files = []
    for place in places:
        if os.path.isdir(place):  # unlike Path's, it takes no offence at a name too long
            found = [path for path in place.iterdir() if _is_readable(path)]
        elif os.path.exists(pdf_of(place)):
            found = [place]
        elif glob.has_magic(str(place)):
            matches = map(Path, glob.glob(str(place), recursive=True))
            found = [path for path in matches if _is_readable(path) or (path.suffix == place.suffix and path.is_file())]
        else:
            raise UserError(f"{place}: no such file or folder")
        if not found:
            raise UserError(f"{place}: holds no images ({', '.join(SUFFIXES)}, .pdf)")
        for path in found:
            check_encoding(path)
        files.extend(sorted(found))
    paths = [path for file in files for path in _pages_or_itself(file)]
    names = Counter(path.name for path in paths)
    twice = next((path for path in paths if names[path.name] > 1), None)
    if twice:
        raise UserError(f"{twice}: another image has the same name; a row of the CSV is known by its file name alone")
    return paths


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


def _holds_labels(folder: Path) -> bool:
    return folder.is_dir() and any(list_text_files(folder, suffix) for suffix in (".txt", ".json"))


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, ".pdf") and path.is_file()


def _pages_or_itself(path: Path) -> list[Path]:
    if path.suffix.lower() != ".pdf":
        return [path]
    try:
        return list_pages(path)
    except ImageError:
        return [path]
