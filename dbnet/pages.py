"""Pages of PDF files as images: `scan.pdf#page=3` is the third page of scan.pdf wherever the path of an image is asked
for. A page is rendered when it is read, so that a file of many pages takes no more memory than one of few."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from dbnet.errors import ImageError, UserError

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

DPI = 200  # of a page whose polygons are given in pixels; a PDF itself has none

_PAGE = re.compile(r"(.+\.pdf)#page=([0-9]{1,9})", re.IGNORECASE | re.DOTALL)
_POINT = 1 / 72  # inch, the unit of a PDF
_one_at_a_time = Lock()  # PDFium is not safe to call from several threads, whatever the documents


def in_pdf(path: Path) -> bool:
    """Whether the path is that of a PDF file or of a page in one, by its name."""
    return path.suffix.lower() == ".pdf" or _PAGE.fullmatch(path.name) is not None


def pdf_of(path: Path) -> Path:
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
    file = pdf_of(path)
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
