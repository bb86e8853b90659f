"""Pages of PDF files as images, and the places that `--images` names."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbnet.dataset import Batches, ImageDataset, make_loader
from dbnet.errors import ImageError, UserError
from dbnet.images import DPI, list_pages, name_stem, read_image, read_size
from dbnet.splits import find_images_at

WIDTH, HEIGHT = 300, 200


@pytest.fixture
def pdf(tmp_path) -> Path:
    """Three pages: white with a red top-left quarter; the same standing on its side; and a large one, grey."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = (200, 0, 0)
    first = Image.fromarray(pixels)
    others = [first.transpose(Image.Transpose.ROTATE_270), Image.new("L", (3000, 2000), 128)]
    path = tmp_path / "scan, 영수증.pdf"
    first.save(path, save_all=True, append_images=others, resolution=DPI, quality=95)
    return path


def page(path, number):
    return path.with_name(f"{path.name}#page={number}")


def test_pages_are_read_like_images(pdf):
    pages = list_pages(pdf)
    assert pages == [page(pdf, number) for number in (1, 2, 3)]
    pixels, size = read_image(pages[0])
    assert size == read_size(pages[0]) == (WIDTH, HEIGHT)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[50, 50].astype(int) - (200, 0, 0)).max() < 20 and pixels[150, 250].min() > 240
    pixels, size = read_image(pages[1])
    assert size == (HEIGHT, WIDTH)
    assert pixels[50, 150, 1] < 20 and pixels[250, 50].min() > 240


def test_a_page_is_rendered_no_larger_than_needed(pdf):
    pixels, size = read_image(page(pdf, 3), side=150)
    assert size == (3000, 2000) and pixels.shape == (100, 150, 3)
    assert abs(int(pixels[50, 50, 0]) - 128) < 4
    pixels, _ = read_image(page(pdf, 1), side=1000)
    assert pixels.shape == (HEIGHT, WIDTH, 3)


def test_a_huge_page_has_fewer_dots_an_inch(pdf, monkeypatch):
    monkeypatch.setattr("dbnet.images.MAX_PIXELS", 60_000)
    width, height = read_size(page(pdf, 3))
    assert 60_000 <= width * height < 61_000 and width / height == pytest.approx(1.5, abs=0.02)
    assert read_image(page(pdf, 3))[0].shape == (height, width, 3)


def test_a_loader_reads_pages_beside_images_and_names_the_broken(pdf, small):
    (pdf.parent / "broken.pdf").write_bytes(pdf.read_bytes()[:500])
    Image.new("RGB", (WIDTH, HEIGHT)).save(pdf.parent / "a.png")
    images = find_images_at([pdf.parent])
    assert list(images) == ["a.png", "broken.pdf", *(page(pdf, n).name for n in (1, 2, 3))]
    for workers in (0, 2):
        dataset = ImageDataset(list(images.values()), small)
        batches = list(make_loader(Batches(dataset, 3), workers, False))
        read = dict(pair for b in batches for pair in zip(b["index"].tolist(), b["size"].tolist(), strict=True))
        assert read == {0: [300, 200], 2: [300, 200], 3: [200, 300], 4: [3000, 2000]}
        [(index, error)] = [failed for batch in batches for failed in batch["failed"]]
        assert index == 1 and "broken.pdf: cannot be read as a PDF" in error


def test_threads_may_read_pages_at_the_same_time(pdf):
    expected = [read_image(path)[0] for path in list_pages(pdf)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: read_image(page(pdf, number % 3 + 1))[0], range(24)))
    assert all(np.array_equal(pixels, expected[number % 3]) for number, pixels in enumerate(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}#page=0", "no such page; the file has 3"),
        ("{}#page=4", "no such page; the file has 3"),
        ("{}", "a PDF of 3 pages; name one, e.g."),
        ("absent.pdf#page=1", "cannot be read (No such file or directory)"),
    ],
)
def test_a_page_that_is_not_there_is_named(pdf, name, message):
    path = pdf.with_name(name.format(pdf.name))
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a PDF", b"%PDF-1.7\n%%EOF"])
def test_a_broken_pdf_is_named(tmp_path, content):
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.pdf: cannot be read as a PDF"):
        list_pages(tmp_path / "a.pdf")


def test_without_pypdfium2_the_message_says_how_to_get_it(pdf, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(UserError, match="pip install pypdfium2"):
        find_images_at([pdf])


def test_files_about_a_page_do_not_overwrite_each_other():
    assert [name_stem(name) for name in ("a.jpg", "a.b.png", "a.pdf#page=2")] == ["a", "a.b", "a.pdf#page=2"]


def test_a_page_is_a_place_and_its_file_is_all_of_them(pdf):
    assert list(find_images_at([page(pdf, 2)]).values()) == [page(pdf, 2)]
    assert list(find_images_at([pdf.parent / "*.pdf"]).values()) == list_pages(pdf)
