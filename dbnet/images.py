"""Image files to pixels: any common format and mode, upright, as 8-bit RGB, and never larger than memory bears."""

import warnings
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from dbnet.errors import ImageError
from dbnet.pages import in_pdf, read_page, read_page_size

SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 100_000_000  # after reduced decoding: 300 MB of RGB

_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"
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


__all__ = ["MAX_PIXELS", "SUFFIXES", "ImageError", "list_images", "name_stem", "read_image", "read_size", "to_rgb"]


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def name_stem(name: str) -> str:
    """What a file about an image is called but for its suffix: the image's name without its own; a page's whole."""
    path = Path(name)
    return name if in_pdf(path) else path.stem


def read_image(path: Path, side: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image as a viewer shows it.

    Args:
        path: a file in any format that Pillow knows: grey, palette, alpha (put on white), CMYK, 16 bits a channel; or
            a page of a PDF, FILE.pdf#page=NUMBER.
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    header, orientation = _read_header(path, BytesIO(data))
    reduction = _reduction(header, side)
    if header.width * header.height > MAX_PIXELS * reduction**2:
        raise ImageError(
            f"{path}: {header.width} x {header.height} pixels is over the limit of {MAX_PIXELS // 10**6} megapixels; "
            f"reduce it first"
        )
    pixels = _decode(path, data, header, reduction)
    transpose, flip_x, flip_y = _UPRIGHT[orientation]
    if transpose:
        pixels = cv2.transpose(pixels)
    if flip_x or flip_y:
        pixels = cv2.flip(pixels, -1 if flip_x and flip_y else int(flip_x))
    return pixels, _upright_size(header, orientation)


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of an image as a viewer shows it, from its header alone. Raises ImageError."""
    if in_pdf(path):
        return read_page_size(path, MAX_PIXELS)
    try:
        with path.open("rb") as file:
            return _upright_size(*_read_header(path, file))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as (height, width, 3) uint8 RGB; transparency is put on white, 16 bits become 8."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        grey = np.asarray(image)
        grey = (grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _read_header(path: Path, file: IO[bytes]) -> tuple[Image.Image, int]:
    """The image, not decoded yet, and its EXIF orientation, 1 to 8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's decompression bomb warning: MAX_PIXELS decides here
            header = Image.open(file)
            orientation = header.getexif().get(_EXIF_ORIENTATION, 1)
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: too large to decode; reduce it first") from None
    except UnidentifiedImageError:
        empty = file.seek(0, SEEK_END) == 0
        raise ImageError(f"{path}: {'the file is empty' if empty else 'not an image'}") from None
    except Exception as error:  # Pillow's parsers raise many kinds on broken headers
        raise ImageError(f"{path}: broken image header ({_one_line(error)})") from None
    return header, orientation if orientation in _UPRIGHT else 1


def _upright_size(header: Image.Image, orientation: int) -> tuple[int, int]:
    transpose = _UPRIGHT[orientation][0]
    return (header.height, header.width) if transpose else (header.width, header.height)


def _reduction(header: Image.Image, side: int | None) -> int:
    """The power of two up to 8 by which a JPEG can be decoded smaller and still be at least `side` long."""
    if header.format != "JPEG" or side is None:
        return 1
    times = max(header.size) // side
    return next(step for step in (8, 4, 2, 1) if times >= step or step == 1)


def _decode(path: Path, data: bytes, header: Image.Image, reduction: int) -> np.ndarray:
    """Pixels as stored, (height, width, 3) uint8 RGB. OpenCV decodes common modes, three times as fast as Pillow."""
    plain = header.mode in ("RGB", "L") and "transparency" not in header.info
    complete = header.format == "PNG" or (header.format == "JPEG" and data.endswith(_JPEG_END))
    if plain and complete:
        mode = _REDUCED[reduction]
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            pixels = None
        if pixels is not None:
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    try:
        header.draft(None, (header.width // reduction, header.height // reduction))
        return to_rgb(header)
    except Exception as error:  # as above: whatever a decoder thinks of
        raise ImageError(f"{path}: broken or truncated image ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
