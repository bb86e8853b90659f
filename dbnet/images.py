"""Image files to pixels: any common format and mode, upright, as 8-bit RGB, and never larger than memory bears."""

import math
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import SEEK_END, BytesIO
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dbnet.errors import ImageError, UserError, lacks_memory, library_errors, one_line
from dbnet.files import check_regular

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PAGED_SUFFIXES = (".pdf",)
EXTRA_SUFFIXES = {".pdf": "pip install pypdfium2"}
MAX_PIXELS = 100_000_000  # after reduced decoding: 300 MB of RGB
MAX_BYTES = 1 << 30  # of a file: 100 megapixels that are not compressed are fewer

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows more, and runs Ghostscript for some of them
_JPEGS = ("JPEG", "MPO")  # MPO: several JPEGs in a row, as phones write them
_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_JPEG_SCAN = b"\xff\xda"
_JPEG_END = b"\xff\xd9"
_MAX_SCANS = 20  # of a JPEG of MAX_PIXELS; of a smaller one as many more as take the same time. Ten are usual
_PNG_SIGNATURE = 8  # bytes
_STRIP_ROWS = 256
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# EXIF value -> (transpose, flip left-right, flip top-bottom), applied in this order to the stored pixels
_UPRIGHT = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class _Header(NamedTuple):
    """What is known of an image before it is decoded."""

    image: Image.Image
    """not loaded yet"""

    orientation: int
    """by EXIF, 1 to 8, as far as the decoder leaves it to us"""

    size: tuple[int, int]
    """(width, height) upright, in pixels"""


def readable_suffixes() -> tuple[str, ...]:
    """The suffixes of image files that can be read with what is installed, in lower case."""
    return SUFFIXES if find_spec("pypdfium2") is None else (*SUFFIXES, ".pdf")


def name_stem(name: str) -> str:
    """What a file about an image is called but for its suffix: the image's name without its own, with _ for the folders
    in it; a page's whole name."""
    name = name.replace("/", "_")
    return name if in_pdf(Path(name)) else Path(name).stem


def read_image(path: Path, side: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image as a viewer shows it.

    What a file is called does not matter, what it holds does: JPEG, PNG, WebP, GIF, BMP or TIFF. Of an animation or of
    several pages it is the first picture. A cut file is refused in all formats, a changed one where the format has
    checksums (PNG); damage within a JPEG shows in its pixels alone.

    Args:
        path: a file of any mode: grey, palette, alpha (put on white), CMYK, 16 bits a channel; or a page of a PDF,
            FILE.pdf#page=NUMBER.
        side: the longer side in pixels that the caller is going to reduce the image to; a JPEG of at least twice that
            is decoded at a half, a quarter or an eighth, which takes a fraction of the time and memory.

    Returns:
        pixels: (height, width, 3) uint8 RGB, upright by the EXIF orientation, possibly reduced as said above.
        size: (width, height) of the full image, upright: the pixels that annotations are given in.

    Raises:
        ImageError: the file is missing, empty, truncated, no image, or too large to decode.
    """
    if in_pdf(path):
        return read_page(path, side, MAX_PIXELS)
    check_regular(path, ImageError)
    try:
        with path.open("rb") as file:
            header = _read_header(path, file)
            length = file.seek(0, SEEK_END)
            if length > MAX_BYTES:
                raise ImageError(f"{path}: a file of {length / 1e9:.1f} GB; compress it, or reduce it first")
            file.seek(0)
            data = file.read()
            reduction = _reduction(header.image, side)
            _check_size(path, data, header, reduction)
            pixels = _decode(path, data, header.image, reduction)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    transpose, flip_x, flip_y = _UPRIGHT[header.orientation]
    if transpose:
        pixels = cv2.transpose(pixels)
    if flip_x or flip_y:
        pixels = cv2.flip(pixels, -1 if flip_x and flip_y else int(flip_x))
    return pixels, header.size


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of an image as a viewer shows it, from its header alone. Raises ImageError."""
    if in_pdf(path):
        return read_page_size(path, MAX_PIXELS)
    check_regular(path, ImageError)
    try:
        with path.open("rb") as file:
            return _read_header(path, file).size
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (height, width, 3) uint8 RGB; transparency is put on white, 16 bits become 8."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image)
        grey = (grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_white(image)
    return np.array(image.convert("RGB"))


def _on_white(image: Image.Image) -> np.ndarray:
    """Transparency put on white, strip by strip: as a whole it would take five times the memory of the outcome."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        strip = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        pixels[top:bottom] = np.asarray(Image.alpha_composite(white, strip).convert("RGB"))
    return pixels


def _read_header(path: Path, file: IO[bytes]) -> _Header:
    """Open an image; nothing is decoded yet, so a bomb has not gone off."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's decompression bomb warning: MAX_PIXELS decides here
            image = Image.open(file, formats=_FORMATS)
            orientation = _orientation(image, file)
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: too large to decode; reduce it first") from None
    except UnidentifiedImageError:
        empty = file.seek(0, SEEK_END) == 0
        known = ", ".join(_FORMATS)
        raise ImageError(f"{path}: {'the file is empty' if empty else f'not an image ({known})'}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise many kinds on broken headers
        raise ImageError(f"{path}: broken image header ({one_line(error)})") from None
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns it as it decodes; whether `size` is turned before depends on its version
        from PIL.TiffImagePlugin import TiffImageFile  # loaded by now, as it is for a TIFF only

        assert isinstance(image, TiffImageFile)
        width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
    size = (height, width) if _UPRIGHT[orientation][0] else (width, height)
    return _Header(image, 1 if image.format == "TIFF" else orientation, size)


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or no such one.

    In a PNG it may come after the pixels. Pillow's own way to it decodes them, which is slow and defuses no bomb.
    """
    exif = Image.Image.getexif(image)
    if image.format == "PNG" and "exif" not in image.info:
        for kind, start, length in _png_chunks(file):
            if kind == b"eXIf":
                file.seek(start)
                exif.load(file.read(length))
    orientation = exif.get(_EXIF_ORIENTATION, 1)
    return int(orientation) if orientation in _UPRIGHT else 1


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the data and length of the data of each chunk of a PNG, up to its end."""
    start, kind = _PNG_SIGNATURE, b""
    while kind != b"IEND":
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        yield kind, start + 8, length
        start += length + 12


def _check_png(data: bytes) -> None:
    """Raise ValueError unless the chunks of a PNG are complete and unharmed: decoders let different faults pass."""
    view, kind = memoryview(data), b""
    for kind, start, length in _png_chunks(BytesIO(data)):
        end = start + length
        if zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} does not fit")
    if kind != b"IEND":
        raise ValueError("it ends too early")


def _reduction(image: Image.Image, side: int | None) -> int:
    """The power of two up to 8 by which a JPEG can be decoded smaller and still be at least `side` long."""
    if image.format not in _JPEGS or side is None:
        return 1
    times = max(image.size) // side
    return next(step for step in (8, 4, 2, 1) if times >= step or step == 1)


def _check_size(path: Path, data: bytes, header: _Header, reduction: int) -> None:
    """Raise ImageError for an image that would take too much memory or time to decode.

    A JPEG of several scans, a progressive one say, is held whole in memory however it is reduced, and each scan is a
    pass over all of it: a small file can ask for thousands.
    """
    width, height = header.size
    scans = data.count(_JPEG_SCAN) if header.image.format in _JPEGS else 1
    if width * height > MAX_PIXELS * (reduction**2 if scans == 1 else 1):
        raise ImageError(
            f"{path}: {width} x {height} pixels is over the limit of {MAX_PIXELS // 10**6} megapixels; reduce it first"
        )
    if width * height * scans > MAX_PIXELS * _MAX_SCANS:
        raise ImageError(f"{path}: a JPEG of {scans} scans takes too long to decode; save it anew")


def _decode(path: Path, data: bytes, image: Image.Image, reduction: int) -> np.ndarray:
    """Pixels as stored, (height, width, 3) uint8 RGB. OpenCV decodes common modes, three times as fast as Pillow."""
    with library_errors(f"{path}: broken or truncated image", kind=ImageError):
        if image.format == "PNG":
            _check_png(data)
        complete = image.format == "PNG" or (image.format == "JPEG" and data.endswith(_JPEG_END))
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        if complete and plain and not getattr(image, "is_animated", False):
            pixels = _decode_plain(data, reduction)
            if pixels is not None:
                return pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about faults that end in an error, or that a viewer would not mind
            image.draft(None, (image.width // reduction, image.height // reduction))
            return to_rgb(image)


def _decode_plain(data: bytes, reduction: int) -> np.ndarray | None:
    """Pixels as OpenCV decodes them, or None where it cannot."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        if lacks_memory(error):
            raise
        return None
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

DPI = 200  # of a page whose polygons are given in pixels; a PDF itself has none

_PAGE = re.compile(r"(.+\.pdf)#page=([0-9]{1,9})", re.IGNORECASE | re.DOTALL)
_POINT = 1 / 72  # inch, the unit of a PDF
_one_at_a_time = Lock()  # PDFium is not safe to call from several threads, whatever the documents


def in_pdf(path: Path) -> bool:
    """Whether the path is that of a PDF file or of a page in one, by its name."""
    return path.suffix.lower() == ".pdf" or _PAGE.fullmatch(path.name) is not None


def file_of(path: Path) -> Path:
    """The PDF file that a page is in; any other path as it is."""
    page = _PAGE.fullmatch(path.name)
    return path.with_name(page[1]) if page else path


def list_pages(path: Path) -> list[Path]:
    """A path for each page of a PDF file, in order: `path` with `#page=1` and so on.

    Raises ImageError for a file that cannot be opened, and UserError where pypdfium2 is not installed.
    """
    with _open(path) as document:
        return [path.with_name(f"{path.name}#page={number}") for number in range(1, len(document) + 1)]


def read_page(path: Path, side: int | None, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Render a page, with its annotations and filled-in forms, on white.

    Args:
        path: `FILE.pdf#page=NUMBER`, numbered from 1.
        side: longer side in pixels to render at where that is less than the page's full size; None for the full size.
        max_pixels: that the full size does not exceed; a larger page has fewer dots per inch.

    Returns:
        pixels: (height, width, 3) uint8 RGB.
        size: (width, height) of the page in pixels at full size, i.e. at 200 dpi.

    Raises:
        ImageError: the file is no PDF that can be opened, or has no such page.
    """
    with _open_page(path) as (document, index):
        scale, size = _full_size(document, index, max_pixels)
        if side is not None:
            scale *= min(1, side / max(size))
        return document[index].render(scale=scale, rev_byteorder=True).to_numpy().copy(), size


def read_page_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a page as `read_page` gives it, without rendering. Raises as it does."""
    with _open_page(path) as (document, index):
        return _full_size(document, index, max_pixels)[1]


def _full_size(document: "PdfDocument", index: int, max_pixels: int) -> tuple[float, tuple[int, int]]:
    """Pixels for a point, and the page's (width, height) in pixels."""
    width, height = document.get_page_size(index)
    scale = min(DPI * _POINT, math.sqrt(max_pixels / (width * height)))
    return scale, (math.ceil(width * scale), math.ceil(height * scale))


@contextmanager
def _open_page(path: Path) -> "Iterator[tuple[PdfDocument, int]]":
    """The document that a page is in, and the page's place there, from 0."""
    page = _PAGE.fullmatch(path.name)
    with _open(path) as document:
        if not page:
            raise ImageError(f"{path}: a PDF of {len(document)} pages; name one, e.g. {path.name}#page=1")
        if not 1 <= int(page[2]) <= len(document):
            raise ImageError(f"{path}: no such page; the file has {len(document)}")
        yield document, int(page[2]) - 1


@contextmanager
def _open(path: Path) -> "Iterator[PdfDocument]":
    """The document that `path`, a file or a page in it, names; messages name the path."""
    try:
        import pypdfium2
    except ImportError:
        raise UserError(f"{path}: reading PDF files needs pypdfium2: pip install pypdfium2") from None
    file = file_of(path)
    check_regular(file, ImageError)
    with _one_at_a_time:
        try:
            with file.open("rb"):  # for the system's own reason where it cannot
                document = pypdfium2.PdfDocument(file)
            try:
                document.init_forms()
                yield document
            finally:
                document.close()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
        except (pypdfium2.PdfiumError, ArithmeticError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ImageError(f"{path}: cannot be read as a PDF ({reason})") from None
