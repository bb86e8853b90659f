"""Synthetic receipts: repeatable, exactly labelled, and written as a data set that nothing overwrites."""

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFont

from dbnet.errors import UserError
from dbnet.formats import rectangle
from dbnet.synth.receipt import LATIN, Typeface, has_glyph, print_sheet
from dbnet.synth.scene import SPLITS, lay, render_receipt, transform, write_dataset

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def only_pillows_font(monkeypatch):
    """No test depends on the fonts of the machine, which other programs may change meanwhile."""
    monkeypatch.setattr("dbnet.synth.scene.system_fonts", lambda: ())


def receipts(count: int, size: int = 384, **options):
    return [render_receipt(np.random.default_rng([7, index]), size, **options) for index in range(count)]


def turns(polygon: np.ndarray) -> bool:
    """Whether the corners run clockwise around a convex outline."""
    edges = np.roll(polygon, -1, axis=0) - polygon
    following = np.roll(edges, -1, axis=0)
    return bool((edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0] > 0).all())


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_synth(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dbnet.synth", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_same_seed_gives_identical_pixels_and_words():
    for (image, words), (again, words_again) in zip(receipts(4), receipts(4), strict=True):
        assert np.array_equal(image, again)
        assert [word[1:] for word in words] == [word[1:] for word in words_again]
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(words, words_again, strict=True))


def test_another_seed_gives_another_receipt():
    texts = {tuple(text for _, text, _ in words) for _, words in receipts(6)}
    assert len(texts) == 6


def test_images_are_rgb_bytes_with_the_long_side_near_the_size_asked_for():
    for image, words in receipts(12):
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert 0.8 * 384 <= max(image.shape[:2]) <= 384
        assert len(words) >= 10


def test_polygons_lie_inside_the_image_and_are_convex_and_clockwise_from_the_top_left():
    for image, words in receipts(12):
        height, width = image.shape[:2]
        for polygon, text, _ in words:
            assert polygon.shape == (4, 2) and text
            assert (polygon >= 0).all() and (polygon <= (width, height)).all()
            assert turns(polygon)
            right, down = polygon[1] - polygon[0]
            assert right > abs(down)  # the first edge is the word's top, read left to right


def test_boxes_on_the_page_hold_all_the_ink_of_the_words_and_hug_it():
    face = Typeface("", fixed_pitch=False, stretch=1.0)
    sheet = print_sheet(np.random.default_rng(3), 400, 800, face, LATIN, varied=False)
    words = sheet.labels(lines=False)
    assert len(words) > 20
    for _, (left, top, right, bottom) in words:
        rows, columns = slice(round(top), round(bottom)), slice(round(left), round(right))
        x, y, width, height = cv2.boundingRect(sheet.ink[rows, columns])
        slack = 3 + 0.1 * (bottom - top)
        assert x <= slack and y <= slack
        assert right - left - (x + width) <= slack and bottom - top - (y + height) <= slack


def test_the_homography_that_bends_the_page_carries_the_boxes_with_the_ink():
    rng = np.random.default_rng(5)
    sheet = print_sheet(rng, 400, 700, Typeface("", fixed_pitch=True, stretch=0.9), LATIN, varied=False)
    homography = lay(rng, sheet, (420, 720), flat=False)
    only_words = np.zeros_like(sheet.ink)
    cover = np.zeros((720, 420), np.uint8)
    for _, (left, top, right, bottom) in sheet.labels(lines=False):
        rows, columns = slice(int(top) + 1, int(bottom)), slice(int(left) + 1, int(right))
        only_words[rows, columns] = sheet.ink[rows, columns]
        polygon = transform(homography, rectangle(left, top, right, bottom) - 0.5) + 0.5
        cv2.fillConvexPoly(cover, np.round(polygon * 16).astype(np.int32), 255, shift=4)
    ink = cv2.warpPerspective(only_words, homography, (420, 720)).astype(float)
    assert ink[cover == 0].sum() < 0.01 * ink.sum()


def test_words_stand_out_from_the_paper_under_their_polygons():
    """Grey levels vary much more inside a legible word's polygon than on the paper just above it."""
    clearer = []
    for image, words in receipts(10, size=640):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        taken = np.zeros(grey.shape, np.uint8)
        for polygon, _, _ in words:
            cv2.fillConvexPoly(taken, polygon.round().astype(np.int32), 255)
        for polygon, _, illegible in words:
            inside, around = np.zeros_like(taken), np.zeros_like(taken)
            cv2.fillConvexPoly(inside, polygon.round().astype(np.int32), 255)
            lifted = polygon - (polygon[3] - polygon[0]) * 0.4
            cv2.fillConvexPoly(around, lifted.round().astype(np.int32), 255)
            around[taken > 0] = 0
            if not illegible and (around > 0).sum() > 30:
                clearer.append(grey[inside > 0].std() > 1.3 * grey[around > 0].std())
    assert len(clearer) > 100
    assert np.mean(clearer) > 0.85


def test_some_print_is_too_faint_to_read_and_most_is_not():
    illegible = [faint for _, words in receipts(60, size=256) for _, _, faint in words]
    assert 0 < np.mean(illegible) < 0.2


def test_the_data_set_on_disk_has_the_layout_that_training_reads(tmp_path):
    count = write_dataset(tmp_path / "data", train=3, val=2, test=1, size=256, workers=1)
    total = 0
    for split, images in zip(SPLITS, (3, 2, 1), strict=True):
        entries = json.loads((tmp_path / "data/jsons" / f"{split}.json").read_text(encoding="utf-8"))["images"]
        assert sorted(entries) == sorted(path.name for path in (tmp_path / "data/images" / split).iterdir())
        assert len(entries) == images
        for name, entry in entries.items():
            with Image.open(tmp_path / "data/images" / split / name) as image:
                assert image.size == (entry["img_w"], entry["img_h"])
            for word in entry["words"].values():
                assert np.array(word["points"]).shape == (4, 2)
                assert isinstance(word["transcription"], str) and isinstance(word["illegibility"], bool)
            total += len(entry["words"])
    assert count == total > 0


def test_varied_receipts_are_labelled_as_exactly_and_some_are_dark_turned_or_mostly_empty():
    dark, turned, empty = 0, set(), 0
    for image, words in receipts(40, size=256, varied=True):
        height, width = image.shape[:2]
        covered = np.zeros((height, width), np.uint8)
        for polygon, _, _ in words:
            assert turns(polygon) and (polygon >= 0).all() and (polygon <= (width, height)).all()
            cv2.fillConvexPoly(covered, polygon.round().astype(np.int32), 1)
        dark += np.median(image[covered > 0]) < 90
        empty += covered.mean() < 0.1
        long = max(words, key=lambda word: np.ptp(word[0], axis=0).max())[0]
        right, down = long[1] - long[0]
        turned.add(("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up"))
    assert dark >= 4 and empty >= 3 and turned == {"right", "left", "up", "down"}


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    fonts = (str(font_with_hangul(tmp_path)),)  # found by this process: those of the workers are not asked
    monkeypatch.setattr("dbnet.synth.scene.system_fonts", lambda: fonts)
    write_dataset(tmp_path / "one", train=5, val=1, test=0, size=256, seed=4, workers=1)
    write_dataset(tmp_path / "two", train=5, val=1, test=0, size=256, seed=4, workers=2)
    assert files_under(tmp_path / "one") == files_under(tmp_path / "two")


def test_a_longer_data_set_begins_with_the_shorter_one(tmp_path):
    write_dataset(tmp_path / "short", train=1, val=1, test=0, size=256, workers=1)
    write_dataset(tmp_path / "long", train=2, val=1, test=0, size=256, workers=1)
    name = "images/train/synth_train_00000.jpg"
    assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "long" / name).read_bytes()


def test_an_interrupted_run_leaves_no_jsons(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dbnet.synth.scene.render_receipt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", train=2, val=0, test=0, size=256, workers=1)
    assert not list((tmp_path / "data").rglob("*.json"))


def test_the_command_writes_a_data_set_and_says_so_in_one_line(tmp_path):
    done = run_synth(
        "--out", str(tmp_path / "data"), "--train", "1", "--val", "0", "--test", "0", "--size", "256", "--varied"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "1 train" in done.stdout
    assert (tmp_path / "data/jsons/train.json").is_file()


def test_a_bad_font_file_ends_the_command_with_status_2_and_one_line_that_names_it(tmp_path):
    bad = tmp_path / "broken.ttf"
    bad.write_bytes(b"not a font")
    for font in (bad, tmp_path / "absent.ttf"):
        done = run_synth("--out", str(tmp_path / "data"), "--font", str(font))
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and str(font) in done.stderr
    assert not (tmp_path / "data").exists()


def test_an_existing_data_set_is_not_overwritten(tmp_path):
    write_dataset(tmp_path, train=1, val=0, test=0, size=256, workers=1)
    before = files_under(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        write_dataset(tmp_path, train=1, val=0, test=0, size=256, seed=1, workers=1)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"train": -1}, "--train"),
        ({"seed": -3}, "--seed"),
        ({"size": 12}, "--size"),
        ({"size": 10**5}, "to 8192"),
        ({"train": 0}, "at least one"),
    ],
)
def test_impossible_requests_name_the_flag(tmp_path, request_, named):
    with pytest.raises(UserError, match=named):
        write_dataset(tmp_path / "data", **({"train": 1, "val": 0, "test": 0} | request_))
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_made_is_the_users_to_fix(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_dataset(tmp_path / "file" / "data", train=1, val=0, test=0, size=256, workers=1)


def font_with_hangul(folder: Path) -> Path:
    """Pillow's own font with all Hangul syllables mapped to glyph 36, by a new cmap (format 13, many to one)."""
    source = ImageFont.load_default(16).path
    source.seek(0)
    data = source.read() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
    latin = struct.pack(">III", 0x21, 0x7E, 35) + struct.pack(">III", 0xAC00, 0xD7A3, 36)
    subtable = struct.pack(">HHIII", 13, 0, 16 + len(latin), 0, 2) + latin
    cmap = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + subtable
    patched = bytearray(data + b"\0" * (-len(data) % 4))
    for record in range(12, 12 + 16 * struct.unpack(">H", data[4:6])[0], 16):
        if data[record : record + 4] == b"cmap":
            patched[record + 8 : record + 16] = struct.pack(">II", len(patched), len(cmap))
    path = folder / "hangul.ttf"
    path.write_bytes(patched + cmap)
    return path


def test_a_font_with_hangul_gives_korean_receipts(tmp_path):
    font = str(font_with_hangul(tmp_path))
    assert has_glyph(font, "가") and not has_glyph("", "가")
    texts = [t for i in range(8) for _, t, _ in render_receipt(np.random.default_rng(i), 256, [font])[1]]
    assert any("가" <= letter <= "힣" for text in texts for letter in text)
    assert any(text.isascii() for text in texts)


def test_lines_are_the_words_of_a_column_joined_on_the_same_pixels():
    image, words = render_receipt(np.random.default_rng(5), 256)
    same, lines = render_receipt(np.random.default_rng(5), 256, lines=True)
    assert np.array_equal(image, same)
    assert len(lines) < len(words)
    assert " ".join(text for _, text, _ in lines) == " ".join(text for _, text, _ in words)
    for polygon, text, _ in lines:
        low, high = polygon.min(axis=0) - 1, polygon.max(axis=0) + 1
        inside = [word for outline, word, _ in words if (outline > low).all() and (outline < high).all()]
        assert text in " ".join(inside)
