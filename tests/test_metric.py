"""CLEval: against the competition's own scorer where its cases are there, and by hand and by property everywhere."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import convex_quads, hostile, in_time, wild_polygons

from dbnet import metric
from dbnet.formats import read_labels_at, read_submission
from dbnet.geometry import MAX_COORDINATE, Polygons, common_areas
from dbnet.metric import MAX_DETECTIONS, CLEval, match_image, score_image, score_selections

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"


def box(x, y, width, height):
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


# A box of 40 x 10 begins with a horizontal edge: a = 1 / 4, so 4 characters, centred at x = 5, 15, 25 and 35.
WORD = box(0, 0, 40, 10)
FAR = box(500, 500, 40, 10)


coordinates = st.integers(-30, 120)
any_polygons = st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=9), max_size=6)


@st.composite
def word_pages(draw):
    """Boxes on a grid, so that none touches another."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.tuples(st.integers(2, 90), st.integers(2, 40)), min_size=count, max_size=count))
    return [box(100 * (i % 4), 50 * (i // 4), width, height) for i, (width, height) in enumerate(sizes)]


# ---------------------------------------------------------------------------------------------- the competition's


@pytest.mark.parametrize("cases", ["cleval.json", "outlines/cleval.json"])
def test_agrees_with_the_competitions_scorer(cases):
    if not (CASES / cases).exists():
        pytest.skip(f"the cases with known answers are not at {CASES / cases}")
    disagreements = []
    for case in json.loads((CASES / cases).read_text()):
        gt, det = ([np.reshape(flat, (-1, 2)) for flat in case[key]] for key in ("gt", "det"))
        score = score_image(gt, det, case.get("dont_care"))
        for name, expected in case["expected"].items():
            if getattr(score, name) != pytest.approx(expected, abs=1e-6, rel=0):
                disagreements.append((case["name"], name, expected, getattr(score, name)))
    assert not disagreements


# -------------------------------------------------------------------------------------------------------- by hand


def test_perfect_detection_scores_one():
    score = score_image([WORD, FAR], [WORD, FAR])
    assert (score.precision, score.recall, score.hmean) == (1, 1, 1)
    assert (score.chars_gt, score.chars_det, score.chars_tp) == (8, 8, 8)
    assert (score.words, score.detections) == (2, 2)


def test_split_word_costs_recall_one_character_for_each_extra_piece():
    score = score_image([WORD], [box(0, 0, 20, 10), box(20, 0, 20, 10)])
    assert (score.chars_gt, score.chars_det, score.chars_tp) == (4, 4, 4)
    assert (score.splits, score.merges, score.gran_recall, score.gran_precision) == (1, 0, 1, 0)
    assert (score.precision, score.recall) == (1, 3 / 4)


def test_merged_words_cost_precision_one_character_for_each_extra_word():
    score = score_image([WORD, box(50, 0, 40, 10)], [box(0, 0, 90, 10)])
    assert (score.chars_gt, score.chars_det, score.chars_tp) == (8, 8, 8)
    assert (score.splits, score.merges, score.gran_recall, score.gran_precision) == (0, 1, 0, 1)
    assert (score.precision, score.recall) == (7 / 8, 1)


def test_outcomes_of_words_and_detections():
    halves = [box(0, 100, 20, 10), box(20, 100, 20, 10)]
    match = match_image(
        [WORD, box(0, 50, 40, 10), box(50, 50, 40, 10), box(0, 100, 40, 10), FAR, box(0, 300, 40, 10), WORD[:3]],
        [WORD, box(0, 50, 90, 10), *halves, box(700, 0, 40, 10), box(0, 300, 40, 10), WORD[:3]],
        [False, False, False, False, False, True, False],
    )
    assert match.gt_outcomes() == ["correct", "merged", "merged", "split", "missed", "dont_care", "unscored"]
    assert match.det_outcomes() == ["correct", "merged", "split", "split", "false", "dont_care", "unscored"]
    assert match.gt_chars.tolist() == [[4, 4], [4, 4], [4, 4], [4, 4], [0, 4], [0, 0], [0, 0]]


def test_a_word_found_in_part_says_how_many_characters():
    match = match_image([WORD], [box(0, 0, 22, 10)])
    assert match.gt_outcomes() == match.det_outcomes() == ["correct"]
    assert match.gt_chars.tolist() == [[2, 4]]


def test_detections_after_the_last_that_counts_are_unscored():
    short = box(0, 0, 9, 9)[:2]
    outcomes = match_image([WORD], [short, *[FAR] * MAX_DETECTIONS, WORD]).det_outcomes()
    assert outcomes == ["unscored", *["false"] * MAX_DETECTIONS, "unscored"]


def test_outcomes_of_nothing():
    match = match_image([], [])
    assert (match.gt_outcomes(), match.det_outcomes(), match.gt_chars.shape) == ([], [], (0, 2))
    assert match_image([WORD], []).gt_outcomes() == ["missed"]
    assert match_image([], [WORD]).det_outcomes() == ["false"]


@given(any_polygons, any_polygons, st.data())
@settings(max_examples=100, deadline=None)
def test_outcomes_add_up_to_the_score(gt, det, data):
    dont_care = data.draw(st.lists(st.booleans(), min_size=len(gt), max_size=len(gt)))
    match = match_image(gt, det, dont_care)
    words, detections, score = match.gt_outcomes(), match.det_outcomes(), match.score
    assert score == score_image(gt, det, dont_care)
    assert (len(words), len(detections)) == (len(gt), len(det))
    assert words.count("split") == score.splits and detections.count("merged") == score.merges
    assert len(words) - words.count("unscored") == score.words
    assert len(detections) - detections.count("unscored") == score.detections
    assert match.gt_chars.sum(axis=0).tolist() == [score.chars_tp, score.chars_gt]


def test_false_positive_costs_precision_as_many_characters_as_it_is_long():
    score = score_image([WORD], [WORD, FAR])
    assert (score.chars_det, score.chars_tp, score.fp_chars) == (8, 4, 4)
    assert (score.precision, score.recall) == (1 / 2, 1)
    assert score.hmean == pytest.approx(2 / 3)


def test_upright_false_positive_counts_as_one_character_beginning_on_its_left_side():
    # Of the four edges with the same rectangle Qhull's first decides between 4 characters and 1 / 4, which rounds to 1.
    assert score_image([], [WORD]).fp_chars == 4
    assert score_image([], [np.roll(WORD, 1, axis=0)]).fp_chars == 1


def test_duplicate_detection_is_a_split_whose_characters_overlap():
    score = score_image([WORD], [WORD, WORD])
    assert (score.chars_gt, score.chars_det, score.chars_tp, score.overlaps) == (4, 8, 4, 4)
    assert (score.precision, score.recall) == (1 / 2, 3 / 4)


def test_missed_characters_cost_recall_only():
    score = score_image([WORD], [box(0, 0, 30, 10)])
    assert (score.chars_gt, score.chars_det, score.chars_tp) == (4, 3, 3)
    assert (score.precision, score.recall) == (1, 3 / 4)


@pytest.mark.parametrize(("height", "is_match"), [(33, True), (34, False)])
def test_detection_must_lie_on_the_word_with_three_tenths_of_its_area(height, is_match):
    score = score_image([WORD], [box(0, 0, 40, height)])
    assert score.chars_tp == (4 if is_match else 0)
    assert (score.fp_chars == 0) == is_match


def test_exactly_three_tenths_are_enough():
    assert score_image([box(0, 0, 40, 3)], [box(0, 0, 40, 10)]).chars_tp > 0


def test_character_centres_on_the_left_or_top_outline_are_inside_and_on_the_right_or_bottom_are_not():
    # Centres at (5, 5), (15, 5), (25, 5), (35, 5).
    assert score_image([WORD], [box(5, 0, 20, 10)]).chars_tp == 2
    assert score_image([WORD], [box(0, 5, 40, 5)]).chars_tp == 4
    assert score_image([WORD], [box(0, 0, 40, 5)]).chars_tp == 0


def test_coordinates_are_truncated_not_rounded():
    assert score_image([WORD + 0.9], [WORD + 0.2]) == score_image([WORD], [WORD])
    assert score_image([WORD - 0.9], [WORD - 0.2]).words == 1


def test_curved_word_has_its_characters_along_both_edges():
    # An arch of 2 sections an edge: characters lie on the arch and not on the chord below it.
    arch = np.array([[0, 40], [50, 0], [100, 40], [100, 60], [50, 20], [0, 60]])
    score = score_image([arch], [arch])
    assert (score.precision, score.recall) == (1, 1)
    assert score_image([arch], [box(0, 45, 100, 15)]).chars_tp == 0


def test_word_of_an_odd_number_of_points_is_scored():
    pentagon = np.array([[0, 0], [40, 0], [40, 10], [20, 12], [0, 10]])
    assert score_image([pentagon], [pentagon]).chars_tp > 0


# ----------------------------------------------------------------------------------------------------- don't care


def test_dont_care_word_need_not_be_found():
    score = score_image([WORD, FAR], [WORD], [False, True])
    assert (score.precision, score.recall, score.chars_gt) == (1, 1, 4)


def test_detection_on_a_dont_care_word_is_no_false_positive():
    score = score_image([WORD, FAR], [WORD, FAR], [False, True])
    assert (score.precision, score.recall) == (1, 1)
    assert (score.chars_det, score.fp_chars) == (4, 0)


def test_detection_over_several_dont_care_words_is_dont_care_by_the_sum_of_their_shares():
    several = [box(20 * k, 0, 10, 10) for k in range(4)]
    across = box(0, 0, 70, 15)  # a share of 100 / 1050 on each: below 0.3 alone and for 3, above for 4
    assert score_image(several, [across], [True] * 4).fp_chars == 0
    assert score_image(several[:3], [across], [True] * 3).fp_chars > 0


def test_words_are_cut_out_of_the_dont_care_region_around_them():
    region = box(-20, -20, 80, 50)
    score = score_image([region, WORD], [WORD], [True, False])
    assert (score.chars_tp, score.chars_gt, score.chars_det) == (4, 4, 4)


def test_flags_stay_with_their_words_when_a_polygon_before_them_is_skipped():
    line = [[0, 0], [10, 0], [10, 10]]
    assert score_image([line, WORD, FAR], [WORD], [False, False, True]).recall == 1


# ------------------------------------------------------------------------------- outlines that cross themselves

ZIGZAG = np.array([[10, 10], [110, 10], [10, 30], [110, 30]])  # the corners of a box in the wrong order: a bow tie


def test_a_word_whose_outline_crosses_itself_counts_with_both_lobes():
    score = score_image([ZIGZAG], [box(10, 10, 100, 20)])
    assert (score.precision, score.recall, score.hmean) == (1, 1, 1)


@pytest.mark.parametrize(("height", "is_match"), [(8, True), (9, False)])
def test_common_area_with_a_word_of_two_lobes_must_be_three_tenths(height, is_match):
    """Both lobes cover 24 of the detection's 80 or 90 pixels; one of them alone is not enough."""
    lobes = np.array([[0, 0], [6, 8], [6, 0], [0, 8]])
    score = score_image([lobes], [box(0, 0, 10, height)])
    assert (score.chars_tp > 0) == is_match


def test_the_area_of_a_detection_is_that_of_the_shoelace_formula_in_which_opposite_lobes_cancel():
    """As the competition's scorer divides: a detection whose lobes are alike has no area and matches nothing."""
    assert score_image([box(10, 10, 100, 20)], [ZIGZAG]).chars_tp == 0
    uneven = np.array([[10, 10], [110, 10], [110, 30], [20, 9]])  # a small lobe on the left
    assert score_image([box(10, 10, 100, 20)], [uneven]).chars_tp == 2


def test_a_detection_on_a_dont_care_word_that_crosses_itself_is_no_false_positive():
    """The detection lies in one of the two lobes, the one that mending by a buffer of 0 loses."""
    lobes = np.array([[0, 0], [100, 100], [100, 0], [0, 100]])
    for detection in (box(5, 40, 20, 20), box(75, 40, 20, 20)):
        assert score_image([lobes], [detection], [True]).fp_chars == 0
    assert score_image([lobes], [box(40, 5, 20, 20)], [True]).fp_chars > 0


def test_an_outline_that_crosses_itself_costs_nothing_for_the_others():
    words = [box(100 * k, 0, 80, 20) for k in range(5)]
    polygons = Polygons([*words, ZIGZAG + 1000], 4)
    common_areas(polygons, polygons, np.arange(5), np.arange(5))
    assert "effort" not in polygons.__dict__  # nothing is built from its outline


# ---------------------------------------------------------------------------------------------------------- edges


def test_polygons_of_fewer_than_four_points_are_skipped():
    triangle = [[0, 0], [30, 0], [0, 30]]
    assert score_image([WORD, triangle], [triangle, WORD]) == score_image([WORD], [WORD])


def test_only_the_first_500_detections_are_scored():
    score = score_image([WORD], [FAR] * 500 + [WORD])
    assert (score.detections, score.chars_tp, score.fp_chars) == (500, 0, 2000)


def test_image_without_predictions_or_without_words_scores_zero():
    for gt, det in ([WORD], []), ([], [WORD]), ([], []):
        score = score_image(gt, det)
        assert (score.precision, score.recall, score.hmean) == (0, 0, 0)


def test_word_without_area_counts_as_a_hundred_characters():
    assert score_image([[[0, 0], [10, 0], [20, 0], [30, 0]]], []).chars_gt == 100


def test_mistaken_input_is_rejected():
    with pytest.raises(ValueError, match="dont_care has 2 flags for 1 ground truths"):
        score_image([WORD], [WORD], [True, False])
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        score_image([WORD.ravel()], [WORD])
    with pytest.raises(ValueError, match="not finite"):
        score_image([WORD], [WORD * np.nan])


def test_dataset_score_is_the_mean_over_images_and_not_over_characters():
    clevel = CLEval()
    clevel.update([WORD], [WORD])
    clevel.update([WORD, FAR, FAR + 100], [])
    half = clevel.update([WORD], [WORD, FAR])
    score = clevel.compute()
    assert score.precision == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert score.recall == pytest.approx((1 + 0 + 1) / 3)
    assert score.hmean == pytest.approx((1 + 0 + half.hmean) / 3)
    assert (score.images, score.words, score.detections, score.chars_gt) == (3, 5, 3, 20)


def test_dataset_without_images_scores_zero():
    assert CLEval().compute().hmean == 0


# ----------------------------------------------------------------------------------------------------- properties


@given(word_pages())
def test_a_page_detected_perfectly_scores_one(words):
    score = score_image(words, words)
    assert (score.precision, score.recall, score.hmean) == (1, 1, 1)


@settings(max_examples=200, deadline=None)
@given(any_polygons, any_polygons, st.integers(0, 63))
def test_any_polygons_score_between_zero_and_one_without_a_warning(gt, det, flags):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = score_image(gt, gt + det, [bool(flags >> i & 1) for i in range(len(gt))])
    assert all(0 <= value <= 1 for value in (score.precision, score.recall, score.hmean))
    assert score.chars_tp <= min(score.chars_gt, score.chars_det)


@settings(deadline=None)
@given(word_pages(), st.randoms(use_true_random=False), st.integers(0, 30))
def test_order_of_ground_truths_does_not_matter(words, random, shift):
    detections = [word + shift for word in words]
    shuffled = random.sample(words, len(words))
    assert score_image(shuffled, detections) == score_image(words, detections)


@settings(deadline=None)
@given(word_pages(), st.integers(0, 30), st.integers(0, 1000), st.integers(0, 1000))
def test_moving_a_page_of_upright_boxes_changes_nothing(words, shift, x, y):
    detections = [word + shift for word in words]
    moved_words, moved_detections = ([np.add(polygon, [x, y]) for polygon in page] for page in (words, detections))
    assert score_image(moved_words, moved_detections) == score_image(words, detections)


upright_boxes = st.builds(box, *[st.integers(0, 400)] * 2, *[st.integers(1, 400)] * 2)


@settings(max_examples=300, deadline=None)
@given(upright_boxes | convex_quads(), st.integers(0, 3), st.booleans())
def test_quadrilaterals_have_the_length_that_their_edges_in_the_order_of_qhull_give(quad, first, is_reversed):
    quad = np.roll(quad, first, axis=0)[:: -1 if is_reversed else 1]
    polygons = Polygons([quad], metric.CLEVAL_MIN_POINTS)
    by_hull = metric._aspect_ratio(polygons.outline(0))
    for are_words in (True, False):
        assert metric._lengths(polygons, np.array([0]), are_words) == metric._characters(by_hull, are_words)


# ------------------------------------------------------------------------------------------------ several selections


@given(any_polygons, any_polygons, st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 2**18 - 1))
@settings(deadline=None)
def test_selections_score_as_if_there_were_no_other_detections(gt, det, flags, bits):
    selections = [np.array([bits >> (6 * turn + place) & 1 for place in range(len(det))], bool) for turn in range(3)]
    scores = score_selections(gt, det, flags[: len(gt)], selections)
    for chosen, score in zip(selections, scores, strict=True):
        others_gone = [polygon for polygon, is_chosen in zip(det, chosen, strict=True) if is_chosen]
        assert score == score_image(gt, others_gone, flags[: len(gt)])


def test_of_a_selection_the_first_500_are_scored():
    chosen = np.ones(503, bool)
    chosen[:3] = False
    [all_of_them, later] = score_selections([WORD], [FAR] * 500 + [WORD] * 3, None, [np.ones(503, bool), chosen])
    assert (all_of_them.detections, all_of_them.chars_tp) == (500, 0)
    assert (later.detections, later.chars_tp) == (500, 4)


def test_a_word_that_dont_care_words_cut_to_an_area_and_a_line_is_scored():
    crossed, below = [(1, 1), (-4, 107), (12, 56), (-30, 12)], [(0, 0), (0, 20), (-9, 34), (11, 1)]
    score = score_image([crossed, below], [[(0, 0), (0, 0), (0, 1), (1, 0)]], [False, True])
    assert (score.words, score.detections, score.chars_tp) == (2, 1, 0)


# ------------------------------------------------------------------------------------------------------ hostile input


@hostile
@given(st.lists(wild_polygons(), max_size=4), st.lists(wild_polygons(), max_size=4), st.integers(0, 15))
def test_any_polygons_of_files_score_in_range_and_in_time(gt, det, flags):
    gt, det = ([polygon for polygon in page if (np.abs(polygon) <= MAX_COORDINATE).all()] for page in (gt, det))
    with in_time():
        score = score_image(gt, det + gt, [bool(flags >> i & 1) for i in range(len(gt))])
    assert all(0 <= value <= 1 for value in (score.precision, score.recall, score.hmean))
    assert score.chars_tp <= min(score.chars_gt, score.chars_det)


@pytest.mark.parametrize("count", [1_000, 20_000])
def test_an_outline_that_crosses_itself_without_end_is_read_and_scored_in_time(tmp_path, count):
    scribble = np.random.default_rng(0).integers(0, 1000, (count, 2)).tolist()
    json_path, csv_path = tmp_path / "val.json", tmp_path / "a.csv"
    json_path.write_text(json.dumps({"images": {"a.png": {"words": {"7": {"points": scribble}}}}}))
    csv_path.write_text(f"filename,polygons\na.png,{' '.join(f'{x} {y}' for x, y in scribble)}\n")
    with in_time():
        [word], [detection] = read_labels_at(json_path, [])[1]["a.png"].polygons, read_submission(csv_path)["a.png"]
        assert np.array_equal(word, scribble) and np.array_equal(detection, scribble)
        score_image([word, WORD], [detection, WORD, word], [False, False])
        score_image([word, WORD], [detection, WORD, word], [True, False])
