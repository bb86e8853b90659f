"""Image files of every kind, upright and 8-bit, or one line that says what is wrong."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from dbnet.errors import ImageError
from dbnet.images import read_image

WIDTH, HEIGHT = 60, 40


@pytest.fixture
def picture() -> Image.Image:
    """White with a red top-left quarter, so that every turn of it shows."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = (200, 0, 0)
    return Image.fromarray(pixels)


def read(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return read_image(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "RGB"])
def test_modes_of_png_become_rgb(tmp_path, picture, mode):
    pixels, size = read(tmp_path, picture.convert(mode), "a.png")
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8 and size == (WIDTH, HEIGHT)
    assert pixels[-5, -5].min() == 255
    assert pixels[5, 5].mean() < 120


def test_cmyk_jpeg_becomes_rgb(tmp_path, picture):
    pixels, _ = read(tmp_path, picture.convert("CMYK"), "a.jpg", quality=95)
    assert pixels[-5, -5].min() > 245
    assert pixels[5, 5, 0] > 150 and pixels[5, 5, 1] < 60


def test_transparency_is_put_on_white(tmp_path):
    pixels, _ = read(tmp_path, Image.new("RGBA", (10, 10), (0, 0, 0, 0)), "a.png")
    assert (pixels == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(tmp_path, channels):
    values = np.full((10, 12, channels), 0x8000, np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    pixels, _ = read_image(tmp_path / "a.png")
    assert pixels.shape == (10, 12, 3)
    assert abs(int(pixels[0, 0, 0]) - 128) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_orientation_is_applied_as_a_viewer_does(tmp_path, picture, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, size = read(tmp_path, picture, name, exif=exif)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    assert size == expected.shape[1::-1]
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def test_a_large_jpeg_is_decoded_smaller_but_keeps_its_size(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (1000, 700), "gray").save(path)
    pixels, size = read_image(path, side=240)
    assert size == (1000, 700)
    assert pixels.shape == (175, 250, 3)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path):
    path.write_bytes(b"")


def no_image(path):
    path.write_text("not an image")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "truncated"),
        (emptied, "empty"),
        (no_image, "not an image"),
        (Path.unlink, "cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, picture, damage, words):
    path = tmp_path / "a.jpg"
    picture.resize((300, 200)).save(path, quality=95)
    damage(path)
    with pytest.raises(ImageError, match=rf"a\.jpg: .*{words}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_png_too_large_to_decode_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(ImageError, match=r"a\.png: .*reduce it first"):
        read_image(path)
