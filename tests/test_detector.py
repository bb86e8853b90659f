"""The Python API, and what an installed copy consists of."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from support import CPU

import dbnet
from dbnet import Detector
from dbnet.checkpoint import save_checkpoint
from dbnet.config import Config
from dbnet.dataset import Batches, Draw, ImageDataset, make_loader
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError
from dbnet.geometry import windows
from dbnet.images import read_image
from dbnet.inference import Pipeline, polygons_of
from dbnet.metric import score_image
from dbnet.model import DBNet
from dbnet.splits import read_split
from dbnet.synth.scene import render_receipt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkpoint(small, tmp_path):
    """Untrained, with thresholds at which it finds something everywhere; a batch is one image."""
    torch.manual_seed(0)
    config = small.changed(thresh=0.5, box_thresh=0.0, batch_size=1)
    save_checkpoint(tmp_path / "best.pt", config, DBNet(config))
    return tmp_path / "best.pt"


@pytest.fixture
def files(rendered):
    return sorted((rendered / "images").glob("*/*"))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(mine.polygon, other.polygon) and mine.score == other.score
        for mine, other in zip(ours, theirs, strict=True)
    )


def test_an_image_is_a_file_pixels_or_a_pillow_image(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu")
    expected = detector.detect(files[0])
    pixels = read_image(files[0])[0]
    assert expected
    for image in (str(files[0]), pixels, Image.fromarray(pixels)):
        assert same(detector.detect(image), expected)
    assert same(detector.detect(np.ascontiguousarray(pixels[..., ::-1]), bgr=True), expected)
    assert not same(detector.detect(np.ascontiguousarray(pixels[..., ::-1])), expected)


def test_a_pillow_image_is_turned_upright(checkpoint, files, tmp_path):
    pixels = read_image(files[0])[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    detector = Detector.load(checkpoint, device="cpu")
    with Image.open(tmp_path / "turned.png") as image:
        assert same(detector.detect(image), detector.detect(pixels))


def test_a_batch_comes_back_in_its_order(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu")
    pixels = read_image(files[1])[0]
    images = [files[0], pixels[:, : pixels.shape[1] // 2], pixels.transpose(1, 0, 2), files[0], files[2]]
    for found, image in zip(detector.detect_batch(images), images, strict=True):
        assert same(found, detector.detect(image))
    assert detector.detect_batch([]) == []


def test_the_probability_map_has_the_resized_images_shape(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu")
    prob_map = detector.prob_map(np.zeros((50, 100, 3), np.uint8))
    assert prob_map.shape == (64, 128) and prob_map.dtype == np.uint8


def test_threads_share_a_detector(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu", tta=True)
    expected = [detector.detect(path) for path in files[:4]]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(detector.detect, files[:4] * 2))
    assert all(map(same, found, expected * 2))


def test_an_image_comes_as_bytes_an_open_file_grey_or_with_alpha(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu")
    expected, data = detector.detect(files[0]), files[0].read_bytes()
    assert same(detector.detect(data), expected) and same(detector.detect(bytearray(data)), expected)
    assert same(detector.detect(io.BytesIO(data)), expected)
    with files[0].open("rb") as file:
        assert same(detector.detect(file), expected)
    pixels = read_image(files[0])[0]
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    assert same(detector.detect(opaque), expected)
    assert same(detector.detect(opaque[..., [2, 1, 0, 3]], bgr=True), expected)
    grey = pixels[..., 1]
    assert same(detector.detect(grey), detector.detect(np.dstack([grey] * 3)))
    assert same(detector.detect(grey[..., None]), detector.detect(grey))


def test_results_unpack_and_become_plain_numbers(checkpoint, files):
    text, *_ = Detector.load(checkpoint, device="cpu").detect(files[0])
    polygon, score = text
    assert polygon is text.polygon and score == text.score
    assert json.loads(json.dumps(text.to_dict())) == text.to_dict()
    assert text.quad.shape == (4, 2) and text.to_dict()["quad"] == text.quad.tolist()
    assert cv2.contourArea(text.quad.astype(np.float32)) >= cv2.contourArea(text.polygon.astype(np.float32)) * 0.95


def test_a_call_has_thresholds_of_its_own(checkpoint, files):
    detector = Detector.load(checkpoint, device="cpu")
    found = detector.detect(files[0])
    assert found and detector.detect(files[0], box_thresh=1.0) == []
    assert all(len(text.polygon) == 4 for text in detector.detect(files[0], use_polygon=False))
    assert same(detector.detect(files[0]), found)
    with pytest.raises(UserError, match="image_size: cannot change"):
        detector.detect(files[0], image_size=64)
    with pytest.raises(UserError, match="box-thresh"):
        detector.detect(files[0], box_thresh=2.0)


def test_many_images_and_pages_come_one_by_one(checkpoint, files, tmp_path):
    detector = Detector.load(checkpoint, device="cpu")
    first, second = (Image.open(path).convert("RGB") for path in files[:2])
    first.save(tmp_path / "two.tif", save_all=True, append_images=[second])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    asked, errors = [], []

    def images():
        for image in (files[0], tmp_path / "broken.jpg", tmp_path / "two.tif", files[1].read_bytes()):
            asked.append(image)
            yield image

    results = detector.detect_each(images(), on_error=errors.append)
    next(results)
    assert len(asked) == 1  # nothing is read ahead
    names = [getattr(image, "name", "bytes") for image, _ in results]
    assert names == ["two.tif#page=1", "two.tif#page=2", "bytes"]
    assert len(errors) == 1 and "broken.jpg" in str(errors[0])
    with pytest.raises(dbnet.UserError, match=r"broken\.jpg"):
        list(detector.detect_each([tmp_path / "broken.jpg"]))
    assert [image.name for image, _ in detector.detect_each(tmp_path / "two.tif")] == [
        "two.tif#page=1",
        "two.tif#page=2",
    ]
    with pytest.raises(dbnet.UserError, match="a list of images"):
        detector.detect_batch(str(files[0]))
    with files[0].open(encoding="latin-1") as text, pytest.raises(dbnet.UserError, match="binary mode"):
        detector.detect(text)
    with pytest.raises(dbnet.UserError, match="image 1: cannot be read"):
        detector.detect(text)  # closed now


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4)), "uint8"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 2), np.uint8), "grey"),
        (np.zeros((0, 4, 3), np.uint8), "pixels in it"),
        (Image.new("RGB", (0, 5)), "pixels in it"),
        (7, "not int"),
        (b"", "the file is empty"),
        (b"abc", "not an image"),
        ("absent.jpg", r"absent\.jpg: cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(checkpoint, image, words):
    with pytest.raises(UserError, match=words):
        Detector.load(checkpoint, device="cpu").detect(image)


def test_an_image_has_the_same_result_whatever_the_batch(receipts, tmp_path):
    config = Config.from_preset("lite", weights="none", thresh=0.5, box_thresh=0.0, image_size=96)  # squeeze and excite
    torch.manual_seed(0)
    network = Ensemble.of(DBNet(config).eval(), config, CPU)
    paths = sorted((receipts / "images/val").iterdir())[:12]
    found = {}
    for batch_size in (1, 4, 12):
        pipeline = Pipeline(ImageDataset(paths, config), config, "cpu")
        pipeline.batch_size = batch_size  # as on a GPU
        found[batch_size] = {each.index: each for each in pipeline.detect(network)}
    shapes = [ImageDataset(paths, config).shapes(Draw(place)) for place in range(12)]
    assert 1 < len({tuple(each) for each in shapes}) < 12  # some batches hold several images, but not all
    for batch_size in (4, 12):
        for index, detection in found[1].items():
            assert np.abs(found[batch_size][index].prob_map.astype(int) - detection.prob_map).max() <= 1
    for batch_size in (1, 4):  # and what runs on a CPU is the same to the bit
        pipeline = Pipeline(ImageDataset(paths, config), config.changed(batch_size=batch_size), "cpu")
        for each in pipeline.detect(network):
            assert np.array_equal(each.prob_map, found[1][each.index].prob_map)
            assert all(map(np.array_equal, each.polygons, found[1][each.index].polygons))


@pytest.mark.parametrize(("count", "axis"), [(2, 0), (4, 0), (7, 1)])
def test_a_strip_of_pages_is_seen_in_windows(receipts, count, axis):
    """Of the labelled characters, 0.97 of those that are found in the pages alone."""
    detector = Detector.load("lite", device="cpu")
    images, annotations, _ = read_split(receipts, "val")
    pages, words = [], []
    for path, annotation in [*zip(images.values(), annotations.values(), strict=True)][:count]:
        page = read_image(path)[0]
        scale = 1000 / page.shape[1 - axis]
        pages.append(cv2.resize(page, None, fx=scale, fy=scale))
        words.append([polygon * scale for polygon in annotation.polygons])
    alone = found = 0
    strip = np.concatenate(pages, axis)
    texts = [text.polygon for text in detector.detect(strip)]
    assert 0.95 * strip.shape[axis] < max(polygon[:, 1 - axis].max() for polygon in texts) <= strip.shape[axis]
    shift = np.zeros(2)
    for page, lines in zip(pages, words, strict=True):
        alone += score_image(lines, [text.polygon for text in detector.detect(page)]).chars_tp
        end = shift[1 - axis] + page.shape[axis]
        here = [polygon - shift for polygon in texts if shift[1 - axis] <= polygon[:, 1 - axis].mean() < end]
        found += score_image(lines, here).chars_tp
        shift[1 - axis] = end
    assert found >= 0.97 * alone > 0


def test_a_strip_whose_padding_reaches_a_second_window_has_candidates_for_both():
    config = Config(image_size=800, max_candidates=3)
    prob_map = np.zeros((1190, 380), np.uint8)  # 1216 px with its padding, more than 1.5 times 800
    for place in range(5):
        prob_map[100 + 200 * place :][:40, 50:300] = 230
    assert len(polygons_of(prob_map, (380, 1190), config)[0]) == 5


def test_a_small_image_is_not_blown_up():
    image = np.full((100, 150, 3), 255, np.uint8)
    assert Detector.load("lite", device="cpu").prob_map(image).shape == (200, 300)


@pytest.mark.parametrize("tta", [False, True])
def test_a_page_on_its_side_is_found_as_well_as_an_upright_one(tmp_path, tta):
    page, words = render_receipt(np.random.default_rng(1), 640, lines=True)
    lines = [line[0] for line in words]
    height, width = page.shape[:2]
    detector = Detector.load("lite", device="cpu", tta=tta)
    upright = score_image(lines, [text.polygon for text in detector.detect(page)]).hmean
    for quarters, turn, corner in ((1, [[0, -1], [1, 0]], (0, width)), (3, [[0, 1], [-1, 0]], (height, 0))):
        turned = np.ascontiguousarray(np.rot90(page, quarters))
        polygons = [word @ np.array(turn) + corner for word in lines]
        found = detector.detect(turned)
        assert score_image(polygons, [text.polygon for text in found]).hmean > upright - 0.02
        assert detector.prob_map(turned).shape[::-1] == detector.prob_map(page).shape
        cv2.imwrite(str(tmp_path / "turned.png"), turned[..., ::-1])
        config = detector.config.changed(batch_size=1, workers=0)
        dataset = ImageDataset([tmp_path / "turned.png"], config)
        pipeline = Pipeline(dataset, config, "cpu")
        pipeline.on_gpu = True  # what runs beside one, here beside a CPU
        dataset.further_sizes = detector.network.sides[1:]
        pipeline.loader = make_loader(Batches(dataset, 1), workers=0, pin_memory=False)
        [detection] = pipeline.detect(detector.network)
        assert all(map(np.array_equal, detection.polygons, [text.polygon for text in found]))


@pytest.mark.parametrize(("seed", "image_size"), [(0, 256), (38, 320), (80, 448)])
def test_a_page_on_its_side_of_which_the_first_look_finds_specks_is_found(seed, image_size):
    """With seeds 38 and 80 the specks are wide ones, as of a page that stands upright."""
    page, _ = render_receipt(np.random.default_rng(seed), 640, lines=True)
    turned = np.ascontiguousarray(np.rot90(page))
    upright, first, both = (
        len(Detector.load("lite", device="cpu", image_size=image_size, small_text=0, sideways=sideways).detect(image))
        for image, sideways in ((page, True), (turned, False), (turned, True))
    )
    assert first < upright / 2 and both > 0.7 * upright


def test_an_image_of_small_text_is_looked_at_again_larger():
    page, words = render_receipt(np.random.default_rng(1), 640, lines=True)
    lines = [line[0] for line in words]

    def found(image_size, small_text, **changes):
        changes |= {"image_size": image_size, "small_text": small_text}
        return Detector.load("lite", device="cpu", **changes).detect(page)

    once, again = (found(256, small_text) for small_text in (0, 15))
    scores = [score_image(lines, [text.polygon for text in texts]).hmean for texts in (once, again)]
    assert scores[1] > scores[0] + 0.02
    assert same(found(640, 0), found(640, 15))  # its text is large enough
    assert same(found(256, 0, tta=True), found(256, 15, tta=True))  # several sizes anyway


@pytest.mark.parametrize("quarters", [0, 1])
def test_a_closer_look_sees_no_more_than_the_part_that_has_text(monkeypatch, quarters):
    receipt, words = render_receipt(np.random.default_rng(6), 640, lines=True)
    height, width = receipt.shape[:2]
    page = np.full((2 * height, 3 * width, 3), 255, np.uint8)
    page[200 : 200 + height, 300 : 300 + width] = receipt
    lines = [line + np.array([300, 200]) for line, *_ in words]
    if quarters:
        page = np.ascontiguousarray(np.rot90(page))
        lines = [line @ np.array([[0, -1], [1, 0]]) + (0, 3 * width) for line in lines]
    looks, infer = [], Ensemble.infer
    record = lambda self, images, *rest: looks.append(np.size(images[0])) or infer(self, images, *rest)  # noqa: E731
    monkeypatch.setattr(Ensemble, "infer", record)
    scores = []
    for small_text in (0, 14):
        looks.clear()
        detector = Detector.load("lite", device="cpu", image_size=640, small_text=small_text, amp="off")
        scores.append(score_image(lines, [text.polygon for text in detector.detect(page)]).hmean)
    assert scores[1] > scores[0] and scores[1] > 0.9
    assert detector.prob_map(page).shape[1] > 640
    assert looks[-1] < looks[0] / 2


def test_no_checkpoint_at_all_is_an_error_in_one_line():
    with pytest.raises(UserError, match=r"^no checkpoint is named$"):
        Detector.load([])


def test_where_nothing_is_found_a_closer_look_sees_the_whole_image(monkeypatch):
    page, words = render_receipt(np.random.default_rng(1), 640, lines=True)
    infer = Ensemble.infer

    def far(self, *arguments):  # too far to see anything at the image size
        maps = infer(self, *arguments)()
        return lambda: maps * (max(maps.shape[1:]) > 480)

    monkeypatch.setattr(Ensemble, "infer", far)
    once, again = (
        Detector.load("lite", device="cpu", image_size=480, small_text=small_text).detect(page)
        for small_text in (0, 12.5)
    )
    assert not once
    assert score_image([line[0] for line in words], [text.polygon for text in again]).hmean > 0.9


@pytest.mark.parametrize("image_size", [224, 5472])
def test_small_text_is_enlarged_no_more_than_an_image_size_may_be(image_size):
    """Not by a window more, either: 1.5 times 224 px is no multiple of 32."""
    config = Config(image_size=image_size, small_text=1000.0)
    word = np.array([[0, 0], [100, 0], [100, 20], [0, 20]])
    size = (3 * image_size, 4 * image_size)
    side = Pipeline(ImageDataset([], config), config, "cpu")._enlarged_side(np.zeros((image_size, 8)), size, [word])
    assert image_size < side <= min(1.5 * image_size, 8192) and len(windows(side, image_size)) == 1


@pytest.mark.parametrize("size", [(200, 900), (1200, 300)])
def test_an_image_that_changes_before_the_closer_look_is_an_error(tmp_path, monkeypatch, size):
    page, _ = render_receipt(np.random.default_rng(1), 640, lines=True)
    path = tmp_path / "page.png"
    Image.fromarray(page).save(path)
    detector = Detector.load("lite", device="cpu", image_size=256, small_text=15)
    closer = Pipeline._look_closer
    monkeypatch.setattr(
        Pipeline, "_look_closer", lambda *args: Image.new("RGB", size, "white").save(path) or closer(*args)
    )
    [detection] = Pipeline(ImageDataset([path], detector.config), detector.config, "cpu").detect(detector.network)
    assert detection.error == f"{path}: has changed while it was read" and not detection.polygons


def test_a_word_on_its_side_that_the_first_look_finds_is_kept():
    image = np.full((236, 400, 3), 255, np.uint8)
    cv2.putText(image, "TOTAL 12", (25, 40), cv2.FONT_HERSHEY_SIMPLEX, 1, (0, 0, 0), 2)
    turned = np.ascontiguousarray(np.rot90(image))
    detectors = [Detector.load("lite", device="cpu", sideways=sideways) for sideways in (True, False)]
    assert same(*(detector.detect(turned) for detector in detectors))


@pytest.mark.parametrize("length", [32, 800, 1200, 1216, 1600, 7168])
def test_windows_cover_an_image_once_and_reach_beyond_what_is_kept(length):
    cut, image = windows(length, 800), np.arange(length)
    assert np.array_equal(np.concatenate([image[window][kept] for window, kept in cut]), image)
    assert all(window.start % 32 == 0 and len(image[window]) == (800 if length > 1200 else length) for window, _ in cut)
    for (left, left_kept), (_, right_kept) in pairwise(cut):
        assert left.stop - left.start - left_kept.stop >= 48 and right_kept.start >= 48
