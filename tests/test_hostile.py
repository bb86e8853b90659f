"""Broken and hostile input of every kind: a right answer or one line that names the file, in time, and no code runs.

`make test-long` runs the same tests with 1,500 examples each, 12,000 in all.
"""

import ast
import base64
import builtins
import importlib
import io
import json
import math
import os
import pickle
import string
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support import CASE_SECONDS, answered, damages, hostile

from dbnet.annotations import read_submission, write_submission
from dbnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from dbnet.config import PRESETS, Config
from dbnet.errors import ImageError, UserError
from dbnet.formats import read_annotations
from dbnet.geometry import Letterbox
from dbnet.images import read_image, read_size
from dbnet.model import DBNet

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"
# ------------------------------------------------------------------------------------------------------- images


def picture(width=90, height=70):
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


FRAMES = [picture(), picture().rotate(180), Image.new("RGB", (90, 70))]
IMAGES = {
    "png": encoded(picture(), "PNG"),
    "png palette": encoded(picture().quantize(16), "PNG", transparency=3),
    "png alpha": encoded(picture().convert("RGBA"), "PNG"),
    "png 16 bits": cv2.imencode(".png", np.asarray(picture()).astype(np.uint16) * 257)[1].tobytes(),
    "png animated": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "jpeg": encoded(picture(), "JPEG"),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "mpo": encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:2]),
    "gif animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "webp": encoded(picture(), "WEBP"),
    "webp animated": encoded(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF", compression="tiff_lzw"),
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
def test_a_damaged_image_is_read_rightly_or_refused(place, kind, damage, side):
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
    image = picture()
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
    picture(1000, 700).save(path, "MPO", save_all=True, append_images=FRAMES[:1])
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


def test_bombs_are_refused_before_they_take_memory_or_time(tmp_path):
    progressive = encoded(picture(2000, 2000), "JPEG", progressive=True)
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


# ------------------------------------------------------------------------------------------- annotations and CSVs

NAMES = [
    "a b.png",
    "a,b.png",
    "a\"b'c.png",
    "new\nline.png",
    "return\r\n.png",
    "영수증.png",
    unicodedata.normalize("NFD", "영수증.png"),
    "-rf.png",
    "--images.png",
    "=1+1.png",
    " .png",
    "가" * 83 + "xy.png",  # 255 bytes
]
names = st.sampled_from(NAMES) | st.text(min_size=1, max_size=9)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 50, 1e9, -1e300, 10**400])
wild_points = st.lists(st.lists(numbers, min_size=1, max_size=3) | numbers, max_size=5)
tame_points = st.lists(st.tuples(st.integers(-9, 99), st.floats(-9, 99)), min_size=1, max_size=5)


@hostile
@given(st.dictionaries(names, st.lists(wild_points | tame_points, max_size=3), max_size=3), damages() | st.none())
def test_any_annotations_are_read_as_they_are_or_refused(tmp_path, images, damage):
    path = tmp_path / "train.json"
    content = {
        name: {"words": {str(i): {"points": points} for i, points in enumerate(words)}}
        for name, words in images.items()
    }
    data = json.dumps({"images": content}).encode()
    path.write_bytes(damage(data) if damage else data)
    found = answered(path, read_annotations)
    if found is None:
        return
    for name, annotation in found.items():
        assert (tmp_path / name).parent == tmp_path and (tmp_path / name).resolve().parent == tmp_path.resolve()
        name.encode()
        assert all(np.isfinite(polygon).all() and polygon.shape[1:] == (2,) for polygon in annotation.polygons)
        if not damage:
            assert [polygon.tolist() for polygon in annotation.polygons] == [
                [[float(value) for value in point] for point in points] for points in images[name]
            ]


@pytest.mark.parametrize(
    "name", ["..", ".", "../a.png", "/etc/passwd", "a//b.png", "a/../b.png", "", "a\0.png", "\ud800"]
)
def test_a_name_in_a_json_cannot_leave_the_folder(tmp_path, name):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": {name: {"words": {}}}}))
    with pytest.raises(UserError, match="not a plain file name") as caught:
        read_annotations(path)
    assert str(caught.value).isprintable()


def test_a_name_that_is_there_twice_in_a_json_is_refused(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"images": {"a.png": {"words": {}}, "a.png": {"words": {}}}}')
    with pytest.raises(UserError, match=r"'a\.png' is there twice"):
        read_annotations(path)


@hostile
@given(st.dictionaries(names, st.lists(tame_points, max_size=3), max_size=4), damages())
def test_any_csv_is_read_or_refused(tmp_path, rows, damage):
    path = tmp_path / "a.csv"
    rows = {name: found for name, found in rows.items() if name.isprintable() or name in NAMES}
    write_submission(path, {name: [np.array(points).astype(int) for points in found] for name, found in rows.items()})
    back = answered(path, read_submission)
    assert list(back) == list(rows)
    path.write_bytes(damage(path.read_bytes()))
    for polygons in (answered(path, read_submission) or {}).values():
        assert all(np.isfinite(polygon).all() and polygon.shape[1:] == (2,) for polygon in polygons)


@hostile
@given(st.text(st.sampled_from('0123456789_.eE-+ |,"\n\r\tnaif') | st.characters(codec="utf-8"), max_size=60))
def test_any_text_in_a_row_is_read_or_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(f"filename,polygons\na.png,{text}", encoding="utf-8", newline="")
    found = answered(path, read_submission)
    if found and all(letter in string.digits + " " for letter in text):
        expected = [list(map(float, text.split()))] if text.strip() else []
        assert [polygon.ravel().tolist() for polygon in found["a.png"]] == expected


def test_a_csv_that_ends_within_quotes_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('filename,polygons\n"a.png,1 2 3 4 5 6 7 8\nb.png,\n')
    assert answered(path, read_submission) is None
    path.write_text("filename,polygons\na.png,1_0 2 3 4 5 6 7 8\n")
    assert answered(path, read_submission) is None


def test_every_file_name_comes_through_the_commands(tmp_path, monkeypatch, capsys):
    """From the folder into the CSV, and from there against the json."""
    config = Config.from_preset("lite", weights="none", image_size=64, pyramid_channels=32)
    save_checkpoint(tmp_path / "best.pt", config, DBNet(config))
    images, jsons = tmp_path / "data" / "images" / "test", tmp_path / "data" / "jsons"
    images.mkdir(parents=True)
    jsons.mkdir()
    for name in NAMES:
        (images / name).write_bytes(IMAGES["png"])
    quad = [[0, 0], [50, 0], [50, 20], [0, 20]]
    content = {name: {"words": {"1": {"points": quad}}} for name in NAMES}
    (jsons / "test.json").write_text(json.dumps({"images": content}))
    out = tmp_path / ("나" * 83 + ".csv")

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script).main()

    monkeypatch.chdir(tmp_path)
    run("predict", "best.pt", "--data", "data", "--out", out.name)
    assert list(read_submission(out)) == NAMES
    capsys.readouterr()
    run("evaluate", "--submission", out.name, "--data", "data", "--split", "test", "--json", "scores.json")
    assert list(json.loads((tmp_path / "scores.json").read_text())["per_image"]) == NAMES
    printed = capsys.readouterr().out
    assert "new\\nline.png" in printed and "new\nline" not in printed
    run("predict", "best.pt", "--images", *(images / name for name in NAMES), "--out", "again.csv")
    assert list(read_submission(tmp_path / "again.csv")) == NAMES


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a few weights, and its bytes."""
    path = tmp_path_factory.mktemp("saved") / "best.pt"
    save_checkpoint(path, PRESETS["v1"], torch.nn.Linear(7, 5), hmean=0.5)
    return path, path.read_bytes()


@hostile
@given(damages())
def test_a_damaged_checkpoint_is_refused_or_whole(saved, damage):
    path, data = saved
    path.write_bytes(data)
    expected = load_checkpoint(path)
    path.write_bytes(damage(data))
    found = answered(path, load_checkpoint)
    if found is not None:
        assert found["config"] == expected["config"] and found["hmean"] == 0.5
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())


fields = st.sampled_from(["thresh", "epochs", "backbone", "x"])
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(torch.zeros, st.integers(0, 3))
)


@hostile
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "format": plain | st.just(1),
            "config": plain | st.dictionaries(fields | plain, plain, max_size=3),
            "model": plain | st.dictionaries(plain, plain, max_size=3),
        },
    )
)
def test_a_checkpoint_of_other_content_is_refused(saved, content):
    path, _ = saved
    torch.save(content, path)
    found = answered(path, load_model, {"weights": "none", "backbone": "resnet18"}) if content else None
    assert found is None


def test_weights_that_are_not_finite_are_refused(tmp_path):
    config = Config.from_preset("lite", weights="none", pyramid_channels=32)
    model = DBNet(config)
    next(model.parameters()).data[0] = math.nan
    save_checkpoint(tmp_path / "best.pt", config, model)
    assert answered(tmp_path / "best.pt", load_model, {}) is None


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["config", "model", "optimizer"])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch went-off"),
        (builtins.eval, "open('went-off', 'w')"),
        (builtins.exec, "open('went-off', 'w')"),
        (builtins.open, "went-off", "w"),
        (subprocess.Popen, ["touch", "went-off"]),
        (os.mkdir, "went-off"),
        (pickle.loads, pickle.dumps(Call(os.mkdir, "went-off"))),
        (torch.hub.load, "somewhere/else", "model"),
        (np.memmap, "went-off", "uint8", "w+", 0, (5,)),
    ],
    ids=lambda call: getattr(call[0], "__name__", "call"),
)
def test_no_pickle_runs_code(tmp_path, monkeypatch, place, call):
    monkeypatch.chdir(tmp_path)
    content = {"format": 1, "config": PRESETS["v1"].to_dict(), "model": {}}
    path = Path("best.pt")
    torch.save(content | {place: Call(*call)}, path)
    assert answered(path, load_checkpoint) is None
    path.write_bytes(pickle.dumps(content | {place: Call(*call)}))
    assert answered(path, load_checkpoint) is None
    assert [found.name for found in Path().iterdir()] == ["best.pt"]


def test_an_archive_that_would_unfold_is_refused(saved, tmp_path):
    _, data = saved
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(UserError, match=r"best\.pt: .*compressed"):
        load_checkpoint(path)


def test_a_checkpoint_of_format_1_stays_readable_and_computes_the_same():
    """Its weights are one run of numbers, seen with overlapping strides, so that it takes a few kilobytes."""
    model, config, content = load_model(DATA / "format-1.pt", {})
    expected = PRESETS["v1"].changed(backbone="resnet18", pyramid_channels=32, weights="none").to_dict()
    stored = torch.load(DATA / "format-1.pt", weights_only=True)["config"]
    assert config.to_dict() == expected and expected.items() >= stored.items()
    assert content["epoch"] == 3 and content["hmean"] == 0.5
    images = (torch.arange(64 * 64 * 3) % 251).to(torch.uint8).reshape(1, 64, 64, 3)
    with torch.inference_mode():
        prob_map = model(images)
    assert prob_map.mean().item() == pytest.approx(0.05109, abs=2e-3)
    assert prob_map.std().item() == pytest.approx(0.2086, rel=0.02)


def test_fields_that_a_checkpoint_lacks_get_their_defaults_and_unknown_ones_are_refused(saved, tmp_path):
    path = tmp_path / "best.pt"
    content = {"format": 1, "config": {"backbone": "resnet34"}, "model": {}}
    torch.save(content, path)
    assert load_checkpoint(path)["config"] == Config(backbone="resnet34")
    torch.save(content | {"config": {"backbone": "resnet34", "of_tomorrow": 1}}, path)
    with pytest.raises(UserError, match=r"of_tomorrow.*update dbnet"):
        load_checkpoint(path)


# ----------------------------------------------------------------------------------------------------- the package

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def code_that_can_run_input(source):
    """What in a module could run code from a file: lines and why."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found += [(node.lineno, module) for module in modules if module.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe_load = name != "torch.load" or given.get("weights_only") == "True"
            plain = given.get("shell", "False") == "False" and given.get("allow_pickle", "False") == "False"
            if name in FORBIDDEN_CALLS or not safe_load or not plain:
                found.append((node.lineno, name))
    return found


def test_nothing_in_the_package_can_run_code_from_a_file():
    files = [*ROOT.glob("*.py"), *(ROOT / "dbnet").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(files) > 20
    assert {path.name: found for path in files if (found := code_that_can_run_input(path.read_text()))} == {}
    for source in ("import pickle", "eval('1')", "torch.load(a)", "run(a, shell=True)", "from dill import load"):
        assert code_that_can_run_input(source)
    assert not code_that_can_run_input("model.eval()\ntorch.load(a, weights_only=True)\nmodel.compile()")
