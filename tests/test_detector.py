"""The Python API, and what an installed copy consists of."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dbnet import Detector
from dbnet.checkpoint import save_checkpoint
from dbnet.errors import UserError
from dbnet.images import read_image
from dbnet.model import DBNet

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
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(detector.detect, files[:4] * 2))
    assert all(map(same, found, expected * 2))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4)), "uint8 RGB"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((0, 4, 3), np.uint8), "pixels in it"),
        (7, "not int"),
        ("absent.jpg", r"absent\.jpg: cannot be read"),
    ],
)
def test_what_is_no_image_is_refused(checkpoint, image, words):
    with pytest.raises(UserError, match=words):
        Detector.load(checkpoint, device="cpu").detect(image)
