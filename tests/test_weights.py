"""benchmarks/weights.py: what the recipe of the shipped weights makes is a data set that can be learned."""

from itertools import pairwise

import cv2
import numpy as np
import pytest

from benchmarks.weights import Sample, Word, cut_into_words, darken, make, read, sparse, street, with_gaps
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
    "gaps": lambda rng, receipts: map(with_gaps, receipts),
    "cut": lambda rng, receipts: map(cut_into_words, receipts),
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


def test_a_line_is_cut_at_the_spaces_of_its_text():
    image = np.full((60, 400, 3), 255, np.uint8)
    cv2.putText(image, "TOTAL  12.50  EUR", (20, 40), cv2.FONT_HERSHEY_SIMPLEX, 1, (0, 0, 0), 2)
    line = np.array([[15, 12], [385, 12], [385, 48], [15, 48]], float)
    [total, amount, currency] = cut_into_words(Sample(image, [Word(line, False, "TOTAL 12.50 EUR")])).words
    ends = [(word.points[:, 0].min(), word.points[:, 0].max()) for word in (total, amount, currency)]
    assert not any(word.dont_care for word in (total, amount, currency))
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    inked = np.flatnonzero((image.min(axis=2) < 128).any(axis=0))
    assert all(any(low <= x <= high for low, high in ends) for x in inked)


def test_a_line_whose_ink_shows_no_gap_at_a_space_is_dont_care():
    image = np.zeros((60, 400, 3), np.uint8)
    line = np.array([[15, 12], [385, 12], [385, 48], [15, 48]], float)
    [word] = cut_into_words(Sample(image, [Word(line, False, "TOTAL 12.50")])).words
    assert word.dont_care and np.array_equal(word.points, line)
