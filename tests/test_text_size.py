"""CLEval's recall by size of text: heights, bins, and that nothing is lost between them."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.annotations import Annotation
from dbnet.evaluation import SIZE_EDGES, Evaluation, bin_of_size, chars_by_size, size_rows, text_heights
from dbnet.metric import match_image, score_image


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], float)


@pytest.mark.parametrize("angle", [0, 30, 90, 135])
def test_height_is_the_shorter_side_however_a_word_is_turned(angle):
    word = cv2.boxPoints(((200, 200), (90, 14), angle))
    curved = np.concatenate([word[:1], (word[:1] + word[1:2]) / 2, word[1:]])  # more points change nothing
    np.testing.assert_allclose(text_heights([word, curved, word[::-1]]), 14, atol=1e-3)


def test_height_of_what_has_no_area_is_zero():
    assert text_heights([box(5, 5, 30, 0), [[1, 2]]]).tolist() == [0, 0]
    assert text_heights([]).shape == (0,)


def test_a_word_on_an_edge_is_in_the_bin_above_and_nothing_is_beyond_the_last():
    size = (600, 1000)
    heights = np.array([0, 4.9, 5, 10, 15, 20, 24.9, 25, 99, 100, 499, 500, 1000, 3000])
    assert bin_of_size(heights, size).tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7]
    assert bin_of_size(heights, size[::-1]).tolist() == bin_of_size(heights, size).tolist()


def test_characters_are_counted_where_their_word_belongs():
    # On 1000 pixels: 4 characters of height 10 (found), 4 of 10 (missed), 2 of 30 (don't care), 3 of 40 (found).
    words = [box(0, 0, 40, 10), box(0, 100, 40, 10), box(0, 200, 60, 30), box(0, 300, 120, 40)]
    match = match_image(words, [words[0], words[3]], [False, False, True, False])
    rows = size_rows([chars_by_size(words, (1000, 700), match.gt_chars())])
    by_edge = {row["from"]: (row["chars_gt"], row["chars_tp"], row["recall"]) for row in rows}
    chars = score_image([words[3]], [words[3]]).chars_gt
    assert by_edge[0.01] == (8, 4, 0.5)
    assert by_edge[0.025] == (chars, chars, 1.0)
    assert sum(row["chars_gt"] for row in rows) == 8 + chars
    assert by_edge[0.1] == (0, 0, 0.0)
    assert [row["from"] for row in rows] == list(SIZE_EDGES[:-1]) and rows[-1]["to"] == 1


coordinates = st.integers(-30, 120)
any_polygons = st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=9), max_size=6)


@given(any_polygons, any_polygons, st.lists(st.booleans(), min_size=6, max_size=6), st.integers(1, 2000))
@settings(deadline=None)
def test_bins_sum_to_the_whole_image(gt, det, flags, side):
    match = match_image(gt, det, flags[: len(gt)])
    counts = chars_by_size(gt, (side, 1), match.gt_chars())
    assert counts.shape == (8, 2)
    assert counts.sum(axis=0).tolist() == [match.score.chars_tp, match.score.chars_gt]
    assert (counts[:, 0] <= counts[:, 1]).all()


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
    assert len(evaluation.chars_per_image) == 2
    content = evaluation.to_dict()
    assert content["by_size"] == evaluation.by_size()
    assert content["iou"]["matched"] == 2 and content["per_image"]["a.jpg"]["iou"]["recall"] == 0.5
