"""IoU by the ICDAR 2015 protocol: by hand, against a plain reading of the protocol, and by property."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from dbnet.evaluation import IoUScore, score_iou, total_iou


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


WORD = box(0, 0, 40, 10)


def counts(score):
    return score.matched, score.words, score.detections


def test_perfect_detection_scores_one():
    assert score_iou([WORD, WORD + 100], [WORD + 100, WORD]) == IoUScore(1, 1, 1, matched=2, words=2, detections=2)


def test_iou_must_be_more_than_a_half():
    assert score_iou([WORD], [box(0, 0, 20, 10)]).matched == 0  # 200 / 400
    assert score_iou([WORD], [box(0, 0, 21, 10)]).matched == 1
    assert score_iou([WORD], [box(0, 0, 80, 10)]).matched == 0
    assert score_iou([WORD], [box(10, 0, 40, 10)]).matched == 1  # 300 / 500
    assert score_iou([WORD], [box(14, 0, 40, 10)]).matched == 0  # 260 / 540


def test_counts_give_precision_recall_and_their_harmonic_mean():
    score = score_iou([WORD, WORD + 100, WORD + 200, WORD + 300], [WORD, WORD + 500, WORD + 100])
    assert counts(score) == (2, 4, 3)
    assert (score.precision, score.recall) == (2 / 3, 2 / 4)
    assert score.hmean == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_a_word_is_matched_once_and_so_is_a_detection():
    assert counts(score_iou([WORD], [WORD, WORD])) == (1, 1, 2)
    assert counts(score_iou([WORD, WORD], [WORD])) == (1, 2, 1)


def test_a_word_takes_the_first_free_detection_and_not_the_best():
    one, other = box(4, 0, 40, 10), box(12, 0, 40, 10)  # both match WORD; the second word matches only the first
    assert score_iou([WORD, box(-9, 0, 40, 10)], [one, WORD]).matched == 2
    assert score_iou([WORD, box(20, 0, 40, 10)], [other, WORD]).matched == 1


def test_a_merged_word_is_missed():
    assert counts(score_iou([WORD, box(50, 0, 40, 10)], [box(0, 0, 90, 10)])) == (0, 2, 1)


def test_a_dont_care_word_is_neither_found_nor_missed():
    assert counts(score_iou([WORD, WORD + 100], [WORD], [False, True])) == (1, 1, 1)
    assert counts(score_iou([WORD], [], [True])) == (0, 0, 0)


def test_a_detection_with_more_than_half_of_its_area_on_a_dont_care_word_does_not_count():
    assert score_iou([WORD], [box(0, 0, 79, 10)], [True]).detections == 0
    assert score_iou([WORD], [box(0, 0, 80, 10)], [True]).detections == 1  # exactly half
    assert score_iou([WORD, box(40, 0, 40, 10)], [box(20, 0, 40, 10)], [True, True]).detections == 1  # half on each
    large = box(-50, -50, 200, 200)
    assert counts(score_iou([large, WORD], [WORD], [True, False])) == (0, 1, 0)  # not even where it fits a word


def test_polygons_that_cross_themselves_count_with_what_they_enclose():
    bow_tie = np.array([[0, 0], [10, 10], [10, 0], [0, 10]])
    assert score_iou([bow_tie], [bow_tie]).matched == 1
    assert score_iou([box(0, 0, 10, 10)], [bow_tie]).matched == 0  # exactly half of it


def test_polygons_without_area_are_counted_and_match_nothing():
    flat = [np.zeros((0, 2)), [[1, 1]], [[0, 0], [5, 5]], [[0, 0], [5, 0], [9, 0]]]
    assert counts(score_iou(flat, flat)) == (0, 4, 4)
    assert score_iou([], []) == IoUScore(0, 0, 0, 0, 0, 0)


def test_the_total_is_over_words_and_not_over_images():
    good = score_iou([WORD], [WORD])
    bad = score_iou([WORD, WORD + 100, WORD + 200], [WORD + 400])
    total = total_iou([good, bad])
    assert counts(total) == (1, 4, 2)
    assert (total.precision, total.recall) == (1 / 2, 1 / 4)
    assert total_iou([]) == IoUScore(0, 0, 0, 0, 0, 0)


def by_the_book(gts, dets, dont_care):
    """The protocol as its official script spells it out: all pairs, one after the other."""
    gts, dets = [Polygon(gt) for gt in gts], [Polygon(det) for det in dets]
    ignored = [
        any(flag and gt.intersection(det).area / det.area > 0.5 for gt, flag in zip(gts, dont_care, strict=True))
        for det in dets
    ]
    matched_gts, matched_dets = set(), set()
    for i, gt in enumerate(gts):
        for j, det in enumerate(dets):
            if i in matched_gts or j in matched_dets or dont_care[i] or ignored[j]:
                continue
            if gt.intersection(det).area / gt.union(det).area > 0.5:
                matched_gts.add(i)
                matched_dets.add(j)
    return len(matched_gts), dont_care.count(False), ignored.count(False)


boxes = st.builds(box, st.integers(0, 12), st.integers(0, 12), st.integers(5, 20), st.integers(5, 20))


@given(st.lists(st.tuples(boxes, st.booleans()), max_size=6), st.lists(boxes, max_size=6))
@settings(deadline=None)
def test_agrees_with_the_protocol_by_the_book(words, dets):
    gts, dont_care = [gt for gt, _ in words], [flag for _, flag in words]
    assert counts(score_iou(gts, dets, dont_care)) == by_the_book(gts, dets, dont_care)


@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6))
@settings(deadline=None, max_examples=50)
def test_scores_are_shares(gts, dets):
    score = score_iou(gts, dets)
    assert score.matched <= min(len(gts), len(dets))
    assert 0 <= score.precision <= 1 and 0 <= score.recall <= 1
    if score.matched:
        assert score.hmean == pytest.approx(2 / (1 / score.precision + 1 / score.recall))
    assert score_iou(gts, gts).hmean == (1 if gts else 0)
