"""Scores of a split: IoU by the ICDAR 2015 protocol, recall by size of text, intervals, and earlier scores."""

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from dbnet.annotations import Annotation
from dbnet.errors import UserError
from dbnet.evaluation import (
    SIZE_EDGES,
    Comparison,
    Evaluation,
    IoUScore,
    ScoredImage,
    read_scores,
    score_iou,
    size_bins,
)
from dbnet.metric import ImageScore, match_image, score_image


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def scored(hmean):
    return ScoredImage(ImageScore(hmean, hmean, hmean, *[0] * 11), score_iou([], []), "")


# ------------------------------------------------------------------------------------------------------------- IoU

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
    total = evaluation_of(good=([WORD], [WORD]), bad=([WORD, WORD + 100, WORD + 200], [WORD + 400])).iou()
    assert counts(total) == (1, 4, 2)
    assert (total.precision, total.recall) == (1 / 2, 1 / 4)
    assert Evaluation().iou() == IoUScore(0, 0, 0, 0, 0, 0)


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


# ---------------------------------------------------------------------------------------------------- size of text


@pytest.mark.parametrize("angle", [0, 30, 90, 135])
def test_height_is_the_shorter_side_however_a_word_is_turned(angle):
    word = cv2.boxPoints(((200, 200), (90, 14), angle))
    curved = np.concatenate([word[:1], (word[:1] + word[1:2]) / 2, word[1:]])  # more points change nothing
    for long_side, expected in ((1399, 2), (1401, 1)):  # 14 is a hundredth of 1400
        assert size_bins([word, curved, word[::-1]], (700, long_side)).tolist() == [expected] * 3


def test_height_of_what_has_no_area_is_zero():
    assert size_bins([box(5, 5, 30, 0), [[1, 2]]], (10, 10)).tolist() == [0, 0]
    assert size_bins([], (10, 10)).shape == (0,)


def test_a_word_on_an_edge_is_in_the_bin_above_and_nothing_is_beyond_the_last():
    size = (600, 1000)
    words = [box(0, 0, 5000, height) for height in (0, 4.9, 5, 10, 15, 20, 24.9, 25, 99, 100, 499, 500, 1000, 3000)]
    assert size_bins(words, size).tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7]
    assert size_bins(words, size[::-1]).tolist() == size_bins(words, size).tolist()


def test_characters_are_counted_where_their_word_belongs():
    # On 1000 pixels: 4 characters of height 10 (found), 4 of 10 (missed), 2 of 30 (don't care), 3 of 40 (found).
    words = [box(0, 0, 40, 10), box(0, 100, 40, 10), box(0, 200, 60, 30), box(0, 300, 120, 40)]
    evaluation = Evaluation()
    evaluation.update("a", Annotation(words, [False, False, True, False]), [words[0], words[3]], (1000, 700))
    rows = evaluation.by_size()
    by_edge = {row["from"]: (row["chars_gt"], row["chars_tp"], row["recall"]) for row in rows}
    chars = score_image([words[3]], [words[3]]).chars_gt
    assert by_edge[0.01] == (8, 4, 0.5) and (rows[2]["words"], rows[2]["missed"]) == (2, 1)
    assert by_edge[0.025] == (chars, chars, 1.0)
    assert sum(row["chars_gt"] for row in rows) == 8 + chars
    assert by_edge[0.1] == (0, 0, 0.0)
    assert [row["from"] for row in rows] == list(SIZE_EDGES[:-1]) and rows[-1]["to"] == 1


coordinates = st.integers(-30, 120)
any_polygons = st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=9), max_size=6)


@given(any_polygons, any_polygons, st.lists(st.booleans(), min_size=6, max_size=6), st.integers(1, 2000))
@settings(deadline=None)
def test_bins_sum_to_the_whole_image(gt, det, flags, side):
    evaluation, annotation = Evaluation(), Annotation([np.array(word) for word in gt], flags[: len(gt)])
    evaluation.update("a", annotation, [np.array(found) for found in det], (side, 1))
    rows, match = evaluation.by_size(), match_image(gt, det, flags[: len(gt)])
    counts = {key: sum(row[key] for row in rows) for key in ("chars_tp", "chars_gt", "words", "missed")}
    assert [counts["chars_tp"], counts["chars_gt"]] == [match.score.chars_tp, match.score.chars_gt]
    assert (counts["words"], counts["missed"]) == (match.gt_valid.sum(), match.gt_outcomes().count("missed"))
    assert len(rows) == 8 and all(row["chars_tp"] <= row["chars_gt"] for row in rows)


def test_an_evaluation_sums_over_images_of_known_size():
    evaluation = Evaluation()
    small, large = box(0, 0, 40, 10), box(0, 100, 160, 40)
    annotation = Annotation([small, large], [False, False])
    evaluation.update("a.jpg", annotation, [small], size=(1000, 500))
    evaluation.update("b.jpg", annotation, [large], size=(4000, 500))
    evaluation.update("c.jpg", annotation, [])
    rows = {row["from"]: row for row in evaluation.by_size()}
    assert (rows[0.0]["chars_gt"], rows[0.01]["chars_gt"], rows[0.025]["chars_gt"]) == (4, 8, 4)
    assert (rows[0.0]["recall"], rows[0.01]["recall"], rows[0.025]["recall"]) == (0, 1, 0)
    assert "1 images whose files are missing" in evaluation.table()
    content = evaluation.to_dict()
    assert content["by_size"] == evaluation.by_size()
    assert content["iou"]["matched"] == 2 and content["per_image"]["a.jpg"]["iou"]["recall"] == 0.5


# ------------------------------------------------------------------------------------------------------ comparison


EARLIER = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.8, "gone": 0}


def test_comparison_is_of_the_images_in_both(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(Evaluation({name: scored(hmean) for name, hmean in EARLIER.items()}).to_dict()))
    here = Evaluation({"new": scored(0.1), "a": scored(1.0), "b": scored(0.8), "c": scored(0.70001), "d": scored(1)})
    comparison = Comparison(file, read_scores(file, here.images), here)
    assert comparison.names == ["a", "b", "c", "d"]
    assert (comparison.better.tolist(), comparison.worse.tolist()) == ([0, 3], [1])  # from most to least
    assert comparison.before[:, 2].tolist() == [0.5, 0.9, 0.7, 0.8]
    assert comparison.after[:, 2].tolist() == [1, 0.8, 0.70001, 1]
    assert "2 images better, 1 worse, 1 as before" in comparison.table()
    assert "H-Mean     0.7250  0.8750  +0.1500" in comparison.table()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"per_image": []}', '{"per_image": {"a": {"precision": 1}}}', "\xff"]
)
def test_a_file_without_scores_is_rejected(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"other\.json.*--json"):
        read_scores(file, ["a"])


def test_scores_out_of_range_or_of_other_images_are_rejected(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(tmp_path / "missing.json", ["a"])
    file = tmp_path / "other.json"
    for hmean in (float("nan"), 1.5, "1", None, [1], 10**400, {}):
        file.write_text(json.dumps({"per_image": {"a": {"precision": 1, "recall": 1, "hmean": hmean}}}))
        with pytest.raises(UserError, match="no scores by image"):
            read_scores(file, ["a"])
    file.write_text(json.dumps({"per_image": {"a": {"precision": 1, "recall": 1, "hmean": 1}}}))
    with pytest.raises(UserError, match="no image of this split"):
        read_scores(file, ["b"])


def evaluation_of(**images):
    """An evaluation of images given as name -> (words, detections)."""
    evaluation = Evaluation()
    for name, (words, detections) in images.items():
        evaluation.update(name, Annotation(words, [False] * len(words)), detections)
    return evaluation


def test_scores_that_were_made_on_other_labels_are_said_to_be(tmp_path):
    file = tmp_path / "scores.json"
    words = [WORD, WORD + 100, WORD + 200]
    file.write_text(json.dumps(evaluation_of(a=(words, []), b=(words, []), c=(words, [])).to_dict()))
    changes = {
        "the same": (words[::-1], []),
        "fractions of pixels": ([words[0] + 0.4, *words[1:]], []),
        "a word less": (words[1:], []),
        "a word moved": ([words[0] + 1, *words[1:]], []),
        "other points first": ([np.roll(words[0], 1, axis=0), *words[1:]], []),
    }
    for change, image in changes.items():
        here = evaluation_of(a=(words, []), b=image, c=(words, words))
        comparison = Comparison(file, read_scores(file, here.images), here)
        assert (comparison.other_labels == ["b"]) == (change not in ("the same", "fractions of pixels")), change
    assert "made on other labels for 1 of 3 images, b first" in comparison.table()

    ignored = Evaluation()
    ignored.update("a", Annotation(words, [True, False, False]), [])
    assert Comparison(file, read_scores(file, ["a"]), ignored).other_labels == ["a"]


def test_scores_that_do_not_say_their_labels_are_said_to_be(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"per_image": {"a": asdict(scored(0.5).score)}}))
    comparison = Comparison(file, read_scores(file, ["a"]), evaluation_of(a=([WORD], [])))
    assert "does not say which labels it was made on" in comparison.table()


def test_names_of_files_do_not_break_the_lines_of_the_tables():
    name = "a\nworst images  \x1b[2J.jpg"
    evaluation = evaluation_of(**{name: ([WORD], [WORD])})
    comparison = Comparison(Path("scores.json"), {name: {"precision": 0, "recall": 0, "hmean": 0}}, evaluation)
    for table in (evaluation.table(), comparison.table()):
        assert "a\\nworst images  \\x1b[2J.jpg" in table and "\x1b" not in table


def test_an_image_without_text_in_which_nothing_is_found_is_not_among_the_worst():
    table = evaluation_of(blank=([], []), page=([WORD], []), false=([], [WORD])).table()
    assert "blank" not in table and "page" in table and "false" in table
    assert "worst images" in evaluation_of(blank=([], [])).table()


# ------------------------------------------------------------------------------------------- evaluations of images


def test_the_interval_holds_the_mean_of_other_images_of_the_kind():
    """Of many draws of 60 images from one population, about 95% have its mean in their interval."""
    random = np.random.default_rng(0)
    population = 1 - random.exponential(0.02, 10_000).clip(0, 1)
    held = 0
    for _ in range(60):
        hmeans = random.choice(population, 60)
        low, high = Evaluation({str(i): scored(hmean) for i, hmean in enumerate(hmeans)}).interval()
        assert low < hmeans.mean() < high
        held += low <= population.mean() <= high
    assert 51 <= held <= 60


def test_the_interval_is_the_same_each_time_and_a_point_for_a_single_image():
    evaluation = Evaluation({str(i): scored(i / 10) for i in range(10)})
    assert evaluation.interval() == evaluation.interval()
    assert Evaluation({"a": scored(0.7)}).interval() == (0.7, 0.7)
    assert Evaluation().interval() == (0, 0)
    assert evaluation_of(a=([WORD], [WORD])).to_dict()["hmean_interval"] == (1, 1)


def test_detections_that_are_not_scored_are_counted_in_one_line():
    many = [box(0, 20 * i, 40, 10) for i in range(501)]
    table = evaluation_of(**{"a.jpg": ([WORD], many), "b.jpg": ([WORD], many[:500])}).table()
    assert "1 images have more detections than the 500 that CLEval scores, a.jpg first" in table
