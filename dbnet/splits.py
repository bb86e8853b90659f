"""Which images and labels a command works on: the splits of a data set, or the places that a user names.

An image is known by a name of its own, in rows, scores and reports: its path within its folder, with / on every system.
Names that two folders share get the folders' names in front. Hidden files, as macOS adds them, are no images."""

import glob
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from dbnet.annotations import Annotation, check_sizes, put_in_order
from dbnet.errors import ImageError, UserError, printable
from dbnet.formats import IMAGE_PARSERS, find_foreign_labels, list_text_files, read_labels_at
from dbnet.images import EXTRAS, Size, file_of, list_files, list_pages, readable_suffixes

_LABEL_SUFFIXES = (".json", ".txt", ".xml", ".csv", ".zip")  # that may lie beside the images of a data set

Value = TypeVar("Value")


class Split(NamedTuple):
    """The images of a split, by name, and what is in them."""

    images: dict[str, Path]  # the file, or the page of one, of each image
    annotations: dict[str, Annotation]  # the words of each image, in the same order
    folder_sizes: list[int]  # how many of the images each folder of --data has, in this order


def data_folders(data: str | Path) -> list[Path]:
    """The folders of `--data a,b,c`, whether they exist or not."""
    if os.path.isdir(data):  # also one with a comma in its name
        return [Path(data)]
    return [Path(part.strip()) for part in str(data).split(",") if part.strip()] or [Path(data)]


def find_loss(data: str | Path) -> str:
    """A line where a folder of `--data` is gone, else nothing."""
    return "" if all(folder.is_dir() for folder in data_folders(data)) else f"{data}: the folder is missing; restore it"


def read_split(data: str | Path, split: str, form: str = "auto", need_images: bool = True) -> Split:
    """Images and annotations of a split of one or several folders, in the order of each folder's json, or by name. Of
    several folders, some may lack the split. Prints how many images have no annotations and are left out, the format of
    the annotations, and which others are there and not read. Without `need_images`, missing images have the names and
    paths that the annotations give them. Raises UserError where a folder, annotations or needed images are missing."""
    folders = _folders(data, split, form)
    parts = {folder: _read_folder(folder, split, form, need_images) if has else {} for folder, has in folders.items()}
    found = _by_unique_name([(folder, name, each) for folder, part in parts.items() for name, each in part.items()])
    annotations = {name: annotation for name, (_, annotation) in found.items()}
    return Split({name: path for name, (path, _) in found.items()}, annotations, [*map(len, parts.values())])


def check_scorable(data: str | Path, split: str, annotated: Iterable[tuple[Annotation, Size | None]]) -> None:
    """Raise UserError where a split has no word that counts, as a test split without labels: all scores would be 0. It
    has four points and, where the size (width, height) beside the annotation is known, lies in the image."""
    words = ((polygon, size) for each, size in annotated for polygon, ignore, _ in each.words() if not ignore)
    if not any(len(each) > 3 and (each.clip(0, size).max(0) > each.clip(0, size).min(0)).all() for each, size in words):
        raise UserError(f"{data}: no image of {split} has a word that can be scored; label some, or use another split")


def read_images(data: str | Path, split: str, form: str = "auto") -> dict[str, Path]:
    """Images of a split that needs no annotations, by name: in the order of its json where there is one."""
    folders = [folder for folder, has in _folders(data, split, form).items() if has]
    places = [_label_places(folder, split, form) for folder in folders]
    if all(found and found[0].suffix == ".json" for found in places):
        return read_split(data, split, form).images
    return _by_unique_name([(folder, *image) for folder in folders for image in _images_of(folder, split).items()])


def find_labels(data: str | Path, split: str, form: str = "auto") -> list[Path]:
    """Files and folders with annotations of a split, those that are not read included."""
    return [place for folder in _folders(data, split, form) for place in _label_places(folder, split, form)]


def find_images_at(places: list[Path]) -> dict[str, Path]:
    """Images at the given places, by name, in the order of the places. A place is a folder (with its sub-folders), a
    file, a page as FILE.pdf#page=NUMBER, or a pattern with *, ?, [] and ** (which may name other suffixes). Each page
    of a PDF or TIFF is an image; one that cannot be opened fails when it is read. Raises UserError for a place without
    images, and for a PDF where pypdfium2 is missing."""
    found: dict[str, tuple[Path, str, Path]] = {}
    for place in places:
        if os.path.isdir(place):  # unlike Path's, it does not raise for a name that is too long
            images = [(place, *image) for image in list_images(place).items()]
        else:
            known = (*readable_suffixes(), place.suffix.lower())
            matches = map(Path, sorted(glob.glob(str(place), recursive=True)))
            files = [path for path in matches if path.suffix.lower() in known and not path.is_dir()]
            files = [place] if os.path.exists(file_of(place)) else files
            images = [(page.parent, page.name, page) for path in files for page in _pages_or_itself(path)]
        if not images:
            is_url = str(place).startswith(("http:", "https:"))
            fault = f"holds no images ({', '.join(known)})" if glob.has_magic(str(place)) else "no such file or folder"
            raise UserError(f"{place}: {'is a URL; download it' if is_url else fault}")
        for image in images:
            found.setdefault(os.path.abspath(image[2]), image)
    return _checked_names(_by_unique_name(found.values()))


def list_images(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, Path]:
    """The images of a folder and its sub-folders, and pages of PDF and TIFF files, in the order of their paths. Prints
    how many other files there are, by suffix, except for the suffixes `ignored`. Raises UserError."""
    paths, suffixes = list_files(folder), readable_suffixes()
    others = Counter(path.suffix.lower() for path in paths if path.suffix.lower() not in (*suffixes, *ignored))
    if others:
        advice = {suffix: f" (pip install {package} to read them)" for suffix, package in EXTRAS.items()}
        kinds = [f"{n} {suffix or 'without a suffix'}{advice.get(suffix, '')}" for suffix, n in sorted(others.items())]
        print(f"{folder}: passed over {printable(', '.join(kinds))}")
    pages = [page for path in paths if path.suffix.lower() in suffixes for page in _pages_or_itself(path)]
    if not pages:
        raise UserError(f"{folder}: holds no images ({', '.join(suffixes)})")
    return _checked_names({page.relative_to(folder).as_posix(): page for page in pages})


def _folders(data: str | Path, split: str, form: str) -> dict[Path, bool]:
    """The folders of `--data`, and which have images or annotations of a split; all, for their error, where none has.
    Raises UserError where one does not exist or is named twice."""
    folders = data_folders(data)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name the data set with --data DIR, several as --data DIR,DIR")
    if len(set(map(os.path.abspath, folders))) < len(folders):
        raise UserError(f"--data {data}: names a folder twice; --data-weights repeats a folder")
    has = {each: (each / "images" / split).is_dir() or bool(_label_places(each, split, form)) for each in folders}
    return has if any(has.values()) else dict.fromkeys(has, True)


def _checked_names(images: dict[str, Path]) -> dict[str, Path]:
    """The images. Raises UserError for a name that no CSV or JSON can hold, as after unpacking in another encoding."""
    for name, path in images.items():
        if name.encode(errors="ignore").decode() != name:
            raise UserError(f"{path}: the file name is not UTF-8; rename it (convmv does so for whole folders)")
    return images


def _pages_or_itself(path: Path) -> list[Path]:
    """The pages of a file that has several; else, or where it cannot be opened, as reading it will say, the file."""
    with suppress(ImageError):
        return list_pages(path)
    return [path]


def _images_of(folder: Path, split: str) -> dict[str, Path]:
    """The images of FOLDER/images/SPLIT. Raises UserError where it is not a folder with images."""
    images = folder / "images" / split
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; the images of the split belong there")
    return list_images(images, _LABEL_SUFFIXES)


def _read_folder(folder: Path, split: str, form: str, need_images: bool) -> dict[str, tuple[Path, Annotation]]:
    """Images and annotations of a split of one folder, by name, in the order of the annotations."""
    in_place = folder / "images" / split
    present = _images_of(folder, split) if need_images or in_place.is_dir() else {}
    places = _label_places(folder, split, form)
    if not places:
        kind = "annotations" if form == "auto" else f"annotations of --format {form}"
        absent = f"{folder}: has no {kind} of {split}; they belong into jsons/{split}.json, or as a file for each image"
        absent += f" into labels/{split}/"
        raise UserError(find_foreign_labels([folder / "labels" / split, in_place]) or absent)
    place, *others = places
    recognized, labels = read_labels_at(place, list(present), form)
    if form == "auto" and recognized != "competition":
        print(f"{place}: annotations of the format {recognized} (--format insists on another)")
    if others:
        print(f"{place}: read; {', '.join(map(str, others))}: annotations too, not read")
    missing = [name for name in labels if name not in present]
    if not labels:
        raise UserError(f"{place}: names no images")
    if missing and need_images:
        more = f"{place.relative_to(folder)} names it (and {len(missing) - 1} more like it)"
        raise UserError(f"{in_place / missing[0]}: no such image, but {more}; put it there or take it out there")
    images = {name: present.get(name, in_place / name) for name in labels}
    for sentence in put_in_order(labels) + check_sizes(place, labels, images):
        print(f"{place}: {sentence}", file=sys.stderr)
    if left_out := len(present.keys() - labels.keys()):
        print(f"{in_place}: {left_out} images have no entry in {place.relative_to(folder)} and are left out")
    return {name: (images[name], annotation) for name, annotation in labels.items()}


def _label_places(folder: Path, split: str, form: str) -> list[Path]:
    """Places with annotations that can be of the format `form`, in the order of preference: one file for all images, a
    zip or a folder of files for each image or for all, and such files beside the images."""
    jsons = [folder / "jsons" / f"{split}.json", folder / "labels" / f"{split}.json"]
    texts = [folder / "labels" / f"{split}.txt"]
    folders = [folder / "labels" / f"{split}.zip", folder / "labels" / split, folder / "images" / split]
    one_file = jsons if form in ("competition", "coco") else texts if form == "ppocrlabel" else jsons + texts
    places = folders if form in IMAGE_PARSERS else one_file + folders
    return [path for path in places if path.exists() and (not path.is_dir() or list_text_files(path, ".txt", ".json"))]


def _by_unique_name(found: Collection[tuple[Path, str, Value]]) -> dict[str, Value]:
    """Values by name, of (folder, name, value): names in several folders become paths from where the folders part."""
    sharing = defaultdict(set)
    for folder, name, _ in found:
        sharing[name].add(os.path.abspath(folder))
    values: dict[str, Value] = {}
    for folder, name, value in found:
        place = os.path.abspath(folder / name)
        if len(sharing[name]) > 1:
            name = Path(os.path.relpath(place, os.path.commonpath(sharing[name]))).as_posix()
        values[place.lstrip(os.sep) if name in values else name] = value
    return values
