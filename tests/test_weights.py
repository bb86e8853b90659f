"""benchmarks/weights.py: what the recipe of the shipped weights makes is a data set that can be learned."""

import cv2
import numpy as np
import pytest
from matplotlib import font_manager

from benchmarks import weights
from benchmarks.weights import Sample, Word, darken, dull, ink_of, make, read, scene, shaken, sparse, street
from dbnet.geometry import areas
from dbnet.splits import read_split
from dbnet.synth.scene import render_receipt


@pytest.fixture(scope="module")
def receipts():
    samples = []
    for seed in (1, 2):
        image, words = render_receipt(np.random.default_rng(seed), 640, lines=True)
        labels = [Word(polygon, faint, text) for polygon, text, faint in words]
        samples.append(Sample(np.ascontiguousarray(image[..., ::-1]), labels))
    return samples


KINDS = {
    "dull": lambda rng, receipts: (dull(each, rng) for each in receipts),
    "dark": lambda rng, receipts: (darken(each, rng) for each in receipts),
    "street": lambda rng, receipts: (street(rng, receipts, receipts) for _ in range(2)),
    "sparse": lambda rng, receipts: (sparse(rng, receipts) for _ in range(2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_data_set_with_words_to_learn(kind, receipts, tmp_path):
    folder = make(tmp_path / kind, lambda rng: KINDS[kind](rng, receipts), 1)
    images, annotations, _ = read_split(folder, "train")
    assert len(images) == 2
    for sample, annotation in zip(read(folder), annotations.values(), strict=True):
        height, width = sample.image.shape[:2]
        words = np.stack(annotation.polygons)
        learned = words[~np.array(annotation.dont_care)]
        assert len(learned) >= 3
        assert (areas(learned.reshape(-1, 2), np.full(len(learned), 4)) > 0).all()
        assert words.min() >= -2 and (words <= np.array([width + 2, height + 2])).all()


@pytest.fixture
def one_font(monkeypatch):
    monkeypatch.setattr(weights, "_fonts", lambda: [font_manager.findfont("DejaVu Sans")])


def test_the_box_of_each_printed_word_has_its_ink_and_no_other(one_font):
    ink, boxes = ink_of(np.random.default_rng(0), "Total gst: 1,50", 40)
    assert len(boxes) == 3
    left = ink > 0
    for (x0, y0), _, (x1, y1), _ in boxes.round().astype(int):
        inside = left[y0:y1, x0:x1]
        rows, columns = inside.any(axis=1), inside.any(axis=0)
        assert all(side[:8].any() and side[-8:].any() for side in (rows, columns)), "the box is tight"
        inside[:] = False
    assert not left.any()


def test_each_text_that_is_printed_on_a_photograph_has_its_labels(one_font):
    photo = Sample(np.full((480, 640, 3), 128, np.uint8), [])
    printed = scene(np.random.default_rng(3), photo, ["ONE two THREE"])
    marked = np.zeros((480, 640), np.uint8)
    cv2.fillPoly(marked, [word.points.round().astype(np.int32) for word in printed.words], 1)
    assert len(printed.words) >= 6 and len(printed.words) % 3 == 0
    changed = np.abs(printed.image.astype(int) - 128).max(axis=2)
    assert changed[marked > 0].mean() > 3 * changed[marked == 0].mean()


def test_a_page_in_bad_light_has_less_contrast_and_grain_and_keeps_its_labels(receipts):
    page = receipts[0]
    dim = dull(page, np.random.default_rng(4))
    assert dim.words is page.words and dim.image.shape == page.image.shape
    assert np.ptp(np.percentile(dim.image, (5, 95))) < np.ptp(np.percentile(page.image, (5, 95)))
    noise = [np.median(np.abs(cv2.Laplacian(each, cv2.CV_32F))) for each in (page.image, dim.image)]
    assert noise[1] > noise[0]


def test_a_camera_that_moved_smears_a_dot_along_its_way_and_keeps_its_light():
    image = np.zeros((64, 64, 3), np.float32)
    image[32, 32] = 255
    smeared = shaken(image, np.random.default_rng(0), 20)
    places = np.argwhere(smeared[..., 0] > 1)
    assert smeared.sum() == pytest.approx(image.sum(), rel=1e-4)
    assert 1 < np.ptp(places, axis=0).max() <= 22 and np.linalg.matrix_rank(places - places.mean(0), tol=6) == 1
