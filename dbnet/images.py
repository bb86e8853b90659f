"""Image files to pixels: all common formats, pages of PDF and TIFF files; upright, 8-bit RGB, within a limit of memory.

A page is a path of the form FILE.pdf#page=NUMBER or FILE.tif#page=NUMBER, numbered from 1."""

import errno
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from io import SEEK_END, BytesIO
from pathlib import Path, PurePosixPath
from threading import Lock, Timer
from typing import IO, Any

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from dbnet.errors import ImageError, UserError, is_out_of_memory, library_errors, one_line
from dbnet.files import check_regular, stamp

Size = tuple[int, int]  # width, height in pixels

MAX_PIXELS = 100_000_000  # after reduced decoding: 300 MB of RGB
MAX_BYTES = 1 << 30  # of a file: 100 megapixels that are not compressed are fewer
DPI = 200  # of a page of a PDF: its points, of which an inch has 72, have no pixels

_TIFF_SUFFIXES = (".tif", ".tiff")
EXTRAS = {".pdf": "pypdfium2", ".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "'pillow>=11.3'"}  # packages
_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEGS = ("JPEG", "MPO")  # MPO: several JPEGs in a row, as phones write them
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_MAX_SCANS = 20  # of a JPEG of MAX_PIXELS; of a smaller one as many more as take the same time. Ten are usual
_MAX_SEGMENTS = 100_000  # of a JPEG
_STRIP_ROWS = 256
_HEADER_ROOM = 1 << 28  # bytes that opening an image or a PDF may take
_FLIPS = (None, None, 1, -1, 0, None, 1, -1, 0)  # by EXIF orientation: cv2.flip's code, from 5 on after a transpose
_PAGE = re.compile(r"(.+\.(?:pdf|tiff?))#page=([0-9]{1,9})", re.IGNORECASE | re.DOTALL)


def readable_suffixes() -> tuple[str, ...]:
    """The suffixes of the files that can be read with what is installed, in lower case."""
    pdf = [".pdf"] if find_spec("pypdfium2") else []
    heif = [".heic", ".heif"] if find_spec("pillow_heif") else []
    avif = [".avif"] if "avif" in features.get_supported_modules() else []
    return (*_SUFFIXES, *pdf, *heif, *avif)


def list_files(folder: Path) -> list[Path]:
    """The files of a folder and its sub-folders that are not hidden, by path; each folder once, despite links to it."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found, seen = list[Path](), {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [Path(place, name) for name in names if not name.startswith(".")]
        inner = {os.path.realpath(os.path.join(place, name)): name for name in folders if not name.startswith(".")}
        folders[:] = [name for real, name in inner.items() if real not in seen]
        seen |= inner.keys()
    return sorted(found)


def name_stem(name: str) -> str:
    """The name of a file about an image, with its folders: the image's without its suffix, or a page's whole."""
    path = PurePosixPath(name)
    return name if _PAGE.fullmatch(path.name) or path.suffix.lower() == ".pdf" else str(path.with_suffix(""))


def _page_of(path: Path) -> tuple[Path, int | None]:
    """The file that a page is in, and the page's number; any other path as it is, and None."""
    page = _PAGE.fullmatch(path.name)
    return (path.with_name(page[1]), int(page[2])) if page else (path, None)


def file_of(path: Path) -> Path:
    """The file that a page is in; any other path as it is."""
    return _page_of(path)[0]


def _is_pdf(path: Path) -> bool:
    return file_of(path).suffix.lower() == ".pdf"


def list_pages(path: Path) -> list[Path]:
    """A path for each page of a PDF or TIFF file, in order; of a page, or of any other image, its own. Prints how many
    pages of a PDF cannot be opened, that a TIFF is cut, or that another image holds several pictures (what phones add
    to a JPEG is none). Raises ImageError, or UserError without pypdfium2."""
    if file_of(path) != path:
        return [path]
    if _is_pdf(path):
        answer = _ask_renderer(path)
        numbers, claimed = answer["pages"], answer["claimed"]
        if not numbers:
            raise ImageError(f"{path}: has no page that can be opened")
        if len(numbers) < claimed:
            print(f"{path}: says that it has {claimed} pages; {len(numbers)} can be opened")
    else:
        with _opened(path) as (image, *_):
            if not isinstance(image, TiffImageFile) or path.suffix.lower() not in _TIFF_SUFFIXES:
                with suppress(ImageError), library_errors("", kind=ImageError):
                    if image.format not in _JPEGS and getattr(image, "is_animated", False):
                        print(f"{path}: holds several pictures; only the first is read")
                return [path]
            count, is_cut, _ = _walk_pages(path, stamp(path))
        if is_cut:
            print(f"{path}: broken behind page {count}; pages that come after it are lost")
        numbers = range(1, count + 1) if count > 1 else ()
    return [path.with_name(f"{path.name}#page={number}") for number in numbers] or [path]


def read_image(path: Path, image_size: int | None = None, data: bytes | None = None) -> tuple[np.ndarray, Size]:
    """Read an image file, recognized by its content, or a page; of an animation or a TIFF, the first picture. A cut
    file is rejected in all formats, a changed one where the format has checksums (PNG). `image_size` is the longer side
    in pixels to which the caller resizes the image: a JPEG of at least twice that is decoded at a half, a quarter or an
    eighth, a page of a PDF is rendered no larger. With `data`, the content, `path` only names it. Returns (height,
    width, 3) uint8 RGB pixels, upright by the EXIF orientation and possibly reduced, with transparency on white; and
    (width, height) of the full image, upright: the pixels of its annotations. Raises ImageError for a file that is
    missing, damaged, no image, or too large to decode, and MemoryError."""
    if data is None and _is_pdf(path):
        answer = _ask_renderer(path, image_size or sys.maxsize)
        return answer["pixels"], tuple(answer["size"])
    with _opened(path, data) as (image, orientation, size, file):
        pixels = _decode(path, image, file, image_size)
        orientation = 1 if image.format == "TIFF" else orientation  # its decoder has turned it
        pixels = cv2.transpose(pixels) if orientation >= 5 else pixels
        flip = _FLIPS[orientation]
        return pixels if flip is None else cv2.flip(pixels, flip), size


def read_size(path: Path, data: bytes | None = None) -> Size:
    """(width, height) in pixels of an image as a viewer shows it, from its header. Raises as `read_image` does."""
    if data is None and _is_pdf(path):
        return tuple(_ask_renderer(path, 0)["size"])
    with _opened(path, data) as (_, _, size, _):
        return size


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (height, width, 3) uint8 RGB; transparency is put on white, 16 bits become 8."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image)
        grey = (grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return np.array(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):  # as a whole it takes five times the memory of the result
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        pixels[top : top + _STRIP_ROWS] = np.asarray(Image.alpha_composite(white, strip).convert("RGB"))
    return pixels


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[tuple[Image.Image, int, Size, IO[bytes]]]:
    """An image file or a page of a TIFF file before it is decoded: the image, its EXIF orientation, its size (width,
    height) when upright, and the file."""
    source, number = _page_of(path) if data is None else (path, None)
    with _reading(path):
        if data is None:
            check_regular(source, ImageError)
        with source.open("rb") if data is None else BytesIO(data) as file:
            image: Any = _open_image(path, file)
            if number is not None:
                if image.format != "TIFF":
                    raise ImageError(f"{path}: a {image.format} without pages; name it without #page=")
                count, _, walked = _walk_pages(source, stamp(source))
                if not 1 <= number <= count:
                    raise ImageError(f"{path}: no such page; the file has {count}")
                with library_errors(f"{path}: broken page", kind=ImageError):
                    vars(image).update({name: list(places) for name, places in walked.items()})
                    image.seek(number - 1)
            yield image, *_turn(image, file), file


@lru_cache(maxsize=1)
def _walk_pages(path: Path, stamped: tuple[int, int] | None) -> tuple[int, bool, dict[str, list[int]]]:
    """The number of pages of a TIFF file, of which some may be broken; whether the last points to more, but to no page;
    and what Pillow then knows of their places: for each page that is opened, it would walk there from the first."""
    with path.open("rb") as file:
        image: Any = _open_image(path, file)
        count, places = 0, image._frame_pos
        while len(places) > count and image.tag_v2 and places[count] not in places[count - 1 : count]:
            count += 1
            with suppress(ImageError), library_errors("", kind=ImageError):
                image.seek(count)
        is_cut = len(places) > count or bool(image.tag_v2.next)
        return count, is_cut, {name: vars(image)[name] for name in _TIFF_PLACES if name in vars(image)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the path in errors of the system, and tell those of the file from a lack of memory or descriptors. Without
    Pillow's warnings: of faults that a viewer ignores or that end in an error, and of its own limit of size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, cv2.error, OSError) as error:
        if is_out_of_memory(error):
            raise MemoryError(str(path)) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "raise the limit (ulimit -n 4096), or lower --workers"
            raise UserError(f"{path}: cannot be opened ({error.strerror}); {hint}") from None
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from None


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Formats that are read here: Pillow knows more, and runs Ghostscript for some of them."""
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [known for known in (*_FORMATS, "HEIF", "AVIF") if known in Image.OPEN]


def _open_image(path: Path, file: IO[bytes]) -> Image.Image:
    """Read the header only: nothing is decoded yet."""
    with library_errors(f"{path}: broken image header", kind=ImageError):
        try:
            return Image.open(file, formats=_formats())
        except Image.DecompressionBombError:
            raise ImageError(f"{path}: too large to decode; reduce it first") from None
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(12)
            reason = f"not an image ({', '.join(_FORMATS)}, AVIF, HEIC)" if start else "the file is empty"
            if start[4:8] == b"ftyp":
                kind = ".avif" if start[8:11] == b"avi" else ".heic"
                missing = f"reading {kind[1:].upper()} files needs {EXTRAS[kind]}: pip install {EXTRAS[kind]}"
                reason = "broken or truncated image" if kind in readable_suffixes() else missing
            raise ImageError(f"{path}: {reason}") from None
        except Exception:
            np.empty(_HEADER_ROOM, np.uint8)  # MemoryError, where WebP files that are unpacked here seem broken
            raise


def _turn(image: Image.Image, file: IO[bytes]) -> tuple[int, Size]:
    """EXIF orientation, 1 to 8 (1 where there is none or an invalid one), and (width, height) after that turn. In a PNG
    it may come after the pixels; Pillow finds it there only by decoding them, which takes time and memory."""
    exif = Image.Image.getexif(image)
    if image.format == "PNG" and "exif" not in image.info:
        start, kind = 8, b"    "  # behind the signature
        while len(kind) >= 4 and kind not in (b"eXIf", b"IEND"):
            file.seek(start)
            length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            start += length + 12
        if kind == b"eXIf":
            exif.load(file.read(length))
    width, height = image.size
    if isinstance(image, TiffImageFile):  # it turns itself as it is decoded; whether `size` is, depends on the version
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    orientation = int(orientation) if orientation in range(1, 9) else 1
    return orientation, (height, width) if orientation >= 5 else (width, height)


def _decode(path: Path, image: Image.Image, file: IO[bytes], image_size: int | None) -> np.ndarray:
    """Pixels as stored, (height, width, 3) uint8 RGB. OpenCV decodes common modes, three times as fast as Pillow. Each
    scan of a JPEG is a pass over all of it, and one of several scans is in memory as a whole even if it is reduced."""
    data, is_jpeg = b"", image.format in _JPEGS
    if is_jpeg or image.format == "PNG":  # of the others, Pillow reads what it decodes
        length = file.seek(0, SEEK_END)
        if length > MAX_BYTES:
            raise ImageError(f"{path}: a file of {length / 1e9:.1f} GB; compress it, or reduce it first")
        file.seek(0)
        data = file.read()
    times = max(image.size) // image_size if is_jpeg and image_size else 1
    reduction = next((step for step in (8, 4, 2) if times >= step), 1)
    scans, is_complete = _jpeg_scans(path, data) if is_jpeg else (1, False)
    width, height = image.size
    if width * height > MAX_PIXELS * (reduction**2 if scans <= 1 else 1):
        limit = f"the limit of {MAX_PIXELS // 10**6} megapixels"
        raise ImageError(f"{path}: {width} x {height} pixels is over {limit}; reduce it first")
    if width * height * scans > MAX_PIXELS * _MAX_SCANS:
        raise ImageError(f"{path}: a JPEG of {scans} scans takes too long to decode; save it again")
    with library_errors(f"{path}: broken or truncated image", kind=ImageError):
        try:
            if image.format == "PNG":
                Image.open(BytesIO(data)).verify()  # decoders ignore some damage
                is_complete = True
            is_plain = image.mode in ("RGB", "L") and "transparency" not in image.info
            if is_complete and is_plain and image.format != "MPO" and not getattr(image, "is_animated", False):
                mode = cv2.IMREAD_COLOR if reduction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}")
                try:
                    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
                    if pixels is not None:
                        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
                except cv2.error as error:  # what OpenCV cannot decode, Pillow may
                    if is_out_of_memory(error):
                        raise
            image.draft(None, (image.width // reduction, image.height // reduction))
            return to_rgb(image)
        except Exception:
            np.empty(2 * 4 * image.width * image.height // reduction**2, np.uint8)  # MemoryError, not a broken image
            raise


def _jpeg_scans(path: Path, data: bytes) -> tuple[int, bool]:
    """How many scans the first image of a JPEG file has, and whether its end is there. Thumbnails lie within its
    segments; other images, and the videos of phones, lie behind its end."""
    position = scans = 0
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position + 2)
        if not marker or marker[0][1] == _JPEG_END:
            return scans, marker is not None
        scans += marker[0][1] == _JPEG_SCAN
        position = marker.end() - 2 + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise ImageError(f"{path}: a JPEG of more than {_MAX_SEGMENTS} segments; save it again")


# ---- pages of PDF files: rendered in a process of its own, since PDFium aborts its process for some files

_LOCKS: dict[int, Lock] = {}  # by process, since one may fork while a thread holds its lock
_PAGE_SECONDS = 60  # until a page counts as one that does not end
_RENDERER_BYTES = 3 << 30  # that the rendering process may take in addition to what it has after starting
_MAX_PAGES_TRIED = 100_000
_TIFF_PLACES = ("_frame_pos", "_tag_data_limits")  # attributes of Pillow's images; the second is new in version 13


@lru_cache(maxsize=1)
def _renderer(process: int) -> tuple[Any, bool]:
    """A process that runs `_serve_pages` for this one, and whether the user's limits leave it its memory; a forked
    process has one of its own. It is in a session of its own, which Ctrl-C does not reach."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from dbnet.images import _serve_pages; _serve_pages()"
    words, pipe = [sys.executable, "-c", code], subprocess.PIPE
    renderer: Any = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
    return renderer, renderer.stdout.readline() == b"room\n"  # without a line, it could not even start


def _ask_renderer(path: Path, longest: int | None = None) -> dict[str, Any]:
    """The answer of `_serve_pages` on a PDF. Raises ImageError, or UserError without pypdfium2."""
    if find_spec("pypdfium2") is None:
        raise UserError(f"{path}: reading PDF files needs pypdfium2: pip install pypdfium2")
    file, number = _page_of(path)
    if longest is not None and number is None:
        raise ImageError(f"{path}: a PDF of {len(list_pages(path))} pages; name one, e.g. {path.name}#page=1")
    check_regular(file, ImageError)
    question = {"file": os.path.abspath(file), "number": number, "longest": longest, "max_pixels": MAX_PIXELS}
    with _LOCKS.setdefault(os.getpid(), Lock()):
        with _reading(path):
            file.open("rb").close()  # for the system's own reason where it cannot be opened
            renderer, has_room = _renderer(os.getpid())
        timer = Timer(_PAGE_SECONDS, renderer.kill)
        timer.daemon = True
        timer.start()
        try:
            renderer.stdin.write(json.dumps(question).encode() + b"\n")
            renderer.stdin.flush()
            answer = json.loads(renderer.stdout.readline())
            answer["pixels"] = np.empty(answer["shape"], np.uint8)
            if renderer.stdout.readinto(answer["pixels"]) < answer["pixels"].size:
                raise ValueError("the process has ended")
        except BaseException as error:  # also of Ctrl-C: the next answer would be that to this question
            renderer.kill()
            renderer.wait()
            _renderer.cache_clear()
            if not isinstance(error, OSError | ValueError):
                raise
            if not has_room:
                raise MemoryError(str(path)) from None
            limits = f"{_PAGE_SECONDS} s or {_RENDERER_BYTES >> 30} GB"
            raise ImageError(f"{path}: takes more than {limits} to render, or breaks PDFium") from None
        finally:
            timer.cancel()
    if "error" in answer:
        raise ImageError(f"{path}: {answer['error']}")
    return answer


def _serve_pages() -> None:
    """Answer questions on PDF files from stdin until it closes: a JSON line asks, a JSON line answers, with the "shape"
    of the "pixels" that follow. The last file stays open."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that no library writes into an answer
    room = b"room\n"
    with suppress(ImportError, OSError):  # without such limits, or without /proc
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + _RENDERER_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        except ValueError:  # the user's own limit is lower
            room = b"\n"
    output.write(room)
    output.flush()
    for line in sys.stdin.buffer:
        try:
            answer = _answer(**json.loads(line))
        except Exception as error:  # of pypdfium2, of many kinds; a lack of memory ends this process alone
            if is_out_of_memory(error):
                raise
            np.empty(_HEADER_ROOM, np.uint8)  # MemoryError, which PDFium reports as a broken file
            answer = {"error": f"cannot be read as a PDF ({one_line(error).rstrip('.')})"}
        pixels = answer.pop("pixels", np.empty(0, np.uint8))
        output.write(json.dumps(answer | {"shape": pixels.shape}).encode() + b"\n" + pixels.tobytes())
        output.flush()


@lru_cache(maxsize=1)
def _open_pdf(file: str, stamped: tuple[int, int] | None) -> Any:
    """The document, with its forms."""
    import pypdfium2

    document = pypdfium2.PdfDocument(file)
    document.init_forms()
    return document


def _answer(file: str, number: int | None, longest: int | None, max_pixels: int) -> dict[str, Any]:
    """Without a `number`, those of the "pages" that can be opened, and how many are "claimed"; else the "size" of that
    page at DPI or, above `max_pixels`, less. With `longest`, also its "pixels", with annotations and forms on white, at
    that size or with this longer side, if it is smaller."""
    from pypdfium2 import PdfiumError

    def opens(number: int) -> bool:
        with suppress(PdfiumError):
            document[number - 1].close()
            return True
        return False

    document = _open_pdf(file, stamp(Path(file)))
    numbers = range(1, min(len(document), os.path.getsize(file)) + 1)  # pages can be named in it again and again
    if number is None:  # a file may claim a million pages that are not there: then the last cannot be opened
        pages = numbers if numbers and opens(len(numbers)) else filter(opens, numbers[:_MAX_PAGES_TRIED])
        return {"claimed": len(document), "pages": list(pages)}
    if number not in numbers:
        return {"error": f"no such page; the file has {len(numbers)}"}
    width, height = document.get_page_size(number - 1)
    scale = min(DPI / 72, math.sqrt(max_pixels / (width * height)))
    size = math.ceil(width * scale), math.ceil(height * scale)
    if not longest:
        return {"size": size}
    with closing(document[number - 1]) as page:
        pixels = page.render(scale=scale * min(1, longest / max(size)), rev_byteorder=True).to_numpy()
    return {"size": size, "pixels": pixels}
