"""Image files of every kind, upright and 8-bit, or one line that says what is wrong."""

import base64
import errno
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from support import CASE_SECONDS, ROOT, answered, damages, hostile

from dbnet.errors import ImageError, UserError
from dbnet.geometry import Letterbox
from dbnet.images import _jpeg_scans, read_image, read_size, readable_suffixes
from dbnet.splits import list_images

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
    pixels, size = read_image(path, image_size=240)
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


def test_a_png_too_large_to_decode_is_rejected(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(ImageError, match=r"a\.png: .*reduce it first"):
        read_image(path)


# ---- formats, by content and by suffix


@pytest.mark.parametrize(
    "name", ["a.JPG", "b.jpeg", "c.jfif", "d.Png", "e.webp", "f.BMP", "g.tif", "h.TIFF", "i.gif", "j.avif"]
)
def test_every_kind_of_image_is_listed_and_read(tmp_path, picture, name):
    if name.endswith(".avif") and ".avif" not in readable_suffixes():
        pytest.skip("this Pillow reads no AVIF")
    kind = {".jfif": "JPEG"}.get(Path(name).suffix)
    picture.save(tmp_path / name, kind)
    assert list(list_images(tmp_path)) == [name]
    pixels, size = read_image(tmp_path / name)
    assert size == read_size(tmp_path / name) == picture.size and pixels.shape == (*picture.size[::-1], 3)
    assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < 12


def test_heic_photos_are_read_upright_with_pillow_heif(tmp_path, picture):
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(picture).save(tmp_path / "a.HEIC", exif=exif.tobytes(), quality=90)
    assert list(list_images(tmp_path)) == ["a.HEIC"]
    pixels, size = read_image(tmp_path / "a.HEIC")
    assert pixels.shape[1::-1] == size == read_size(tmp_path / "a.HEIC")


def test_without_pillow_heif_photos_are_counted_and_the_package_is_named(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.setattr("dbnet.images.find_spec", lambda name: None)
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.OPEN["PNG"][0], lambda start: False))
    picture.save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "d.mp4"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert list(list_images(tmp_path)) == ["a.png"]
    out = capsys.readouterr().out
    assert f"{tmp_path}: passed over 2 .heic (pip install pillow-heif to read them), 1 .mp4" in out
    with pytest.raises(ImageError, match=r"b\.heic: reading HEIC files needs pillow-heif: pip install pillow-heif"):
        read_image(tmp_path / "b.heic")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_a_cut_avif_is_called_broken(tmp_path, picture):
    picture.save(tmp_path / "a.avif")
    (tmp_path / "a.avif").write_bytes((tmp_path / "a.avif").read_bytes()[:40])
    with pytest.raises(ImageError, match=r"a\.avif: broken or truncated image$"):
        read_image(tmp_path / "a.avif")


# ---- JPEGs of phones


def with_thumbnail_and_video(photo, thumbnail):
    """A JPEG with another one in its EXIF, and behind its end a video that holds the markers of JPEG."""
    segment = b"Exif\0\0" + thumbnail
    app1 = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return photo[:2] + app1 + photo[2:] + b"\0\0\0\x18ftypmp42" + b"\xff\xda\xff\xd8" * 50


@pytest.mark.parametrize("is_progressive", [False, True])
def test_only_the_scans_of_the_photo_itself_count(tmp_path, picture, monkeypatch, is_progressive):
    """A large photo is decoded at reduced size, which needs little memory only if it has one scan."""
    photo, thumbnail = io.BytesIO(), io.BytesIO()
    picture.resize((400, 300)).save(photo, "JPEG", progressive=is_progressive)
    picture.resize((40, 30)).save(thumbnail, "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(with_thumbnail_and_video(photo.getvalue(), thumbnail.getvalue()))
    scans, is_complete = _jpeg_scans(path, path.read_bytes())
    assert is_complete and (scans > 1) == is_progressive
    plain = tmp_path / "b.jpg"
    plain.write_bytes(photo.getvalue())
    assert np.array_equal(read_image(path)[0], read_image(plain)[0])
    monkeypatch.setattr("dbnet.images.MAX_PIXELS", 400 * 300 - 1)
    if is_progressive:
        with pytest.raises(ImageError, match="over the limit"):
            read_image(path, image_size=100)
    else:
        assert read_image(path, image_size=100)[0].shape == (75, 100, 3)
    path.write_bytes(path.read_bytes()[: len(photo.getvalue()) // 2])
    with pytest.raises(ImageError, match=r"(?i)truncated"):
        read_image(path, image_size=100)


# ---- too little memory is no fault of an image


NO_MEMORY = """
import resource, sys
from pathlib import Path
from dbnet.images import ImageError, read_image
path = Path(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
read_image(path, 64 if path.suffix == ".jpg" else None)
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), resource.RLIM_INFINITY))
try:
    read_image(path)
except MemoryError as error:
    assert path.name in str(error)
    print("no memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory and /proc")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True}),
        ("a.webp", {"lossless": True}),
        ("a.bmp", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.gif", {}),
    ],
)
def test_a_lack_of_memory_is_not_taken_for_a_broken_image(tmp_path, name, options):
    Image.new("RGB", (6000, 5000), "gray").save(tmp_path / name, **options)
    words = [sys.executable, "-c", NO_MEMORY, tmp_path / name]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "no memory\n", result.stderr


def test_too_few_descriptors_are_not_taken_for_a_broken_image(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "a.png")

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be opened \(Too many open files\); raise") as caught:
        read_image(tmp_path / "a.png")
    assert not isinstance(caught.value, ImageError)


# ---- hostile files


def noise_picture(width=90, height=70):
    """A smooth picture without a symmetry, (height, width, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_exif_at_the_end(png, exif):
    return png[:-12] + chunk(b"eXIf", exif) + png[-12:]


FRAMES = [noise_picture(), noise_picture().rotate(180), Image.new("RGB", (90, 70))]
IMAGES = {
    "png": encoded(noise_picture(), "PNG"),
    "png palette": encoded(noise_picture().quantize(16), "PNG", transparency=3),
    "png alpha": encoded(noise_picture().convert("RGBA"), "PNG"),
    "png 16 bits": cv2.imencode(".png", np.asarray(noise_picture()).astype(np.uint16) * 257)[1].tobytes(),
    "png animated": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "jpeg": encoded(noise_picture(), "JPEG"),
    "jpeg progressive": encoded(noise_picture(), "JPEG", progressive=True),
    "jpeg cmyk": encoded(noise_picture().convert("CMYK"), "JPEG"),
    "mpo": encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:2]),
    "gif animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "webp": encoded(noise_picture(), "WEBP"),
    "webp animated": encoded(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]),
    "bmp": encoded(noise_picture(), "BMP"),
    "tiff": encoded(noise_picture(), "TIFF", compression="tiff_lzw"),
}
# 16 x 8 grey pixels of the value 200, arithmetic coding, which Pillow can read but not write
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYUGBIUFRT/yQALCAAIABABAREA/8wABgAQEAX/2gAIAQEAAD8A0s1w/9k="
)
# 13,000 x 13,000 black pixels
WEBP_BOMB = bytes.fromhex("524946461a000000574542505650384c0e0000002fc7f2b10c071011fd0f4444ff03")


@pytest.fixture
def place(tmp_path):
    return tmp_path / 'a, "b"\n.png'


@hostile
@given(st.sampled_from(sorted(IMAGES)), damages(), st.sampled_from([None, 30]))
def test_a_damaged_image_is_read_rightly_or_rejected(place, kind, damage, side):
    whole, damaged = IMAGES[kind], damage(IMAGES[kind])
    place.write_bytes(whole)
    expected, _ = read_image(place, side)
    place.write_bytes(damaged)
    found = answered(place, read_image, side)
    if found is None:
        return
    pixels, size = found
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
    assert read_size(place) == size
    if side is None:
        assert pixels.shape[1::-1] == size
    if damage.kind == "cut" or kind.startswith("png"):  # what can be known: a cut of all, any damage by checksums
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late", "WEBP", "TIFF", "MPO"])
def test_every_orientation_of_every_format_is_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"save_all": True, "append_images": FRAMES[1:2]}
    image = noise_picture()
    if kind == "late":
        data = with_exif_at_the_end(encoded(image, "PNG"), exif.tobytes()[6:])
    else:
        data = encoded(image, kind, exif=exif, **(options if kind in ("WEBP", "MPO") else {}))
    (tmp_path / "a.png").write_bytes(data)
    turned = image.copy()
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    pixels, size = read_image(tmp_path / "a.png")
    assert size == read_size(tmp_path / "a.png") == expected.shape[1::-1]
    assert np.abs(pixels.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("kind", ["png animated", "gif animated", "webp animated", "mpo"])
def test_of_several_pictures_the_first_is_read(place, kind):
    place.write_bytes(IMAGES[kind])
    pixels, _ = read_image(place)
    assert np.abs(pixels.astype(int) - np.asarray(FRAMES[0])).mean() < 12  # a GIF has 256 colours


def test_the_jpegs_of_phones_are_decoded_at_reduced_size_and_arithmetic_ones_at_all(tmp_path):
    path = tmp_path / "a.jpg"
    noise_picture(1000, 700).save(path, "MPO", save_all=True, append_images=FRAMES[:1])
    pixels, size = read_image(path, image_size=240)
    assert pixels.shape == (175, 250, 3) and size == (1000, 700)
    path.write_bytes(ARITHMETIC_JPEG)
    assert (read_image(path)[0] == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_narrowest_images_fit_the_network(tmp_path, size, kind):
    path = tmp_path / "a.png"
    Image.new("RGB", size, (9, 9, 9)).save(path, kind)
    pixels, found = read_image(path, 640)
    letterbox = Letterbox(*found, 640)
    assert found == size and letterbox.resize(pixels).shape[1::-1] == letterbox.resized
    assert max(letterbox.resized) == 640 and min(letterbox.resized) >= 1


def test_what_would_start_another_program_is_no_image(place):
    place.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="not an image"):
        read_image(place)


def png_of_zeros(width, height):
    """A PNG of one bit a pixel."""
    pack = zlib.compressobj()
    rows = [pack.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)]
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"".join(rows) + pack.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_size(jpeg, width, height):
    """A progressive JPEG that claims other sides."""
    at = jpeg.index(b"\xff\xc2") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def with_scans(jpeg, count):
    """A progressive JPEG with its last scan many times over."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * count + jpeg[-2:]


MEASURE = """
import resource, sys
from pathlib import Path
from dbnet.images import ImageError, read_image
before = resource.getrusage(resource.RUSAGE_SELF)
for path in map(Path, sys.argv[1:]):
    try:
        read_image(path, 640)
        print("read", path)
    except ImageError as error:
        assert path.name in str(error)
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime - before.ru_utime)
"""


def test_bombs_are_rejected_before_they_take_memory_or_time(tmp_path):
    progressive = encoded(noise_picture(2000, 2000), "JPEG", progressive=True)
    bombs = {
        "a.png": png_of_zeros(13_000, 13_000),
        "b.png": png_of_zeros(60_000, 60_000)[:1000],
        "c.webp": WEBP_BOMB,
        "d.gif": b"GIF89a" + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0) + b"," + bytes(9),
        "e.jpg": with_size(progressive, 13_000, 13_000),
        "f.jpg": with_scans(progressive, 600),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "g.png").open("wb") as file:
        file.write(IMAGES["png"])
        file.truncate(20 << 30)  # a hole of 20 GB
    paths = [tmp_path / name for name in [*bombs, "g.png"]]
    words = [sys.executable, "-c", MEASURE, *paths]
    measured = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(measured) == 2, measured
    assert int(measured[0]) < 60 and float(measured[1]) < CASE_SECONDS
