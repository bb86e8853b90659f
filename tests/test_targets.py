"""Target maps (DBNet, section 3.4): the baseline's maps, what the definition implies, polygons nobody draws."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyclipper
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import hostile, in_time, wild_polygons

from dbnet.annotations import Annotation
from dbnet.augment import Augmentation
from dbnet.dataset import TextDataset, gather_words
from dbnet.geometry import MAX_COORDINATE, Letterbox, offset_distances
from dbnet.targets import draw_targets, make_targets, polygon_mask, thresh_mask

STEP = 0.4 / 255  # of a threshold map of 0.3 to 0.7
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"

coordinates = st.integers(-40, 120) | st.floats(-40, 120)
any_polygon = st.lists(st.tuples(coordinates, coordinates), min_size=0, max_size=9).map(
    lambda points: np.array(points, np.float64).reshape(-1, 2)
)


def rectangle(left, top, right, bottom):
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def shrink_distance(polygon):
    """D of a polygon for a shrink ratio of 0.4."""
    return offset_distances(np.array(polygon, float), np.array([len(polygon)]), 1 - 0.4**2)[0]


@pytest.fixture(scope="module")
def baseline_cases():
    if not (CASES / "targets.json").exists():
        pytest.skip(f"{CASES} is not there")
    maps = np.load(CASES / "targets.npz")
    cases = json.loads((CASES / "targets.json").read_text())
    return [(case, maps[case["name"] + "_prob"], maps[case["name"] + "_thresh"].astype(np.float32)) for case in cases]


def test_maps_are_those_of_the_baseline(baseline_cases):
    for case, expected_prob, expected_thresh in baseline_cases:
        polygons = [np.array(polygon) for polygon in case["polygons"]]
        prob_map, thresh_map = make_targets(polygons, case["size"], case["size"])
        assert np.mean(prob_map != expected_prob) <= 0.001, case["name"]
        assert np.abs(thresh_map - expected_thresh).max() < 0.002, case["name"]


def test_threshold_mask_is_the_dilated_polygons(baseline_cases):
    for case, _, _ in baseline_cases:
        polygons = [np.array(polygon) for polygon in case["polygons"]]
        filled = np.zeros((case["size"], case["size"]), np.uint8)
        for polygon, distance in zip(polygons, map(shrink_distance, polygons), strict=True):
            if distance > 0:
                offset = pyclipper.PyclipperOffset()
                offset.AddPath(polygon.tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
                cv2.fillPoly(filled, [np.array(offset.Execute(distance)[0], np.int32)], 1)
        mask = thresh_mask(*draw_targets(polygons, case["size"], case["size"])[:2])
        inner = cv2.erode(filled, np.ones((3, 3), np.uint8))  # at the border a pixel is as far as D: not in the mask
        assert np.sum(mask & (filled == 0)) < 0.01 * filled.sum(), case["name"]
        assert np.sum((inner == 1) & ~mask) < 0.01 * filled.sum(), case["name"]


def test_a_rectangle_has_the_area_and_the_distances_of_the_formula():
    left, top, width, height = 30, 40, 120, 40
    distance = width * height * (1 - 0.4**2) / (2 * (width + height))  # 12.6
    prob_map, thresh_map = make_targets([rectangle(left, top, left + width, top + height)], 128, 192)
    shrunk = (width - 2 * round(distance) + 1) * (height - 2 * round(distance) + 1)
    assert prob_map.sum() == shrunk
    for steps, x in [(0, left), (3, left - 3), (3, left + 3), (12, left - 12), (13, left - 13), (20, left + 20)]:
        expected = 0.3 + 0.4 * max(0, 1 - steps / distance)
        assert thresh_map[top + height // 2, x] == pytest.approx(expected, abs=STEP)


@given(st.integers(6, 90), st.integers(6, 90), st.sampled_from([0.2, 0.4, 0.6]))
@settings(max_examples=60, deadline=None)
def test_shrunk_area_of_any_rectangle_equals_the_formula(width, height, shrink_ratio):
    distance = width * height * (1 - shrink_ratio**2) / (2 * (width + height))
    sides = [side - 2 * distance + 1 for side in (width, height)]  # both border pixels are drawn
    assume(min(sides) > 3)  # a line or less is no polygon
    prob_map, _ = make_targets([rectangle(20, 20, 20 + width, 20 + height)], 128, 128, shrink_ratio)
    expected = sides[0] * sides[1]
    assert abs(int(prob_map.sum()) - expected) <= sides[0] + sides[1] + 1  # half a pixel of rounding all around


@given(st.lists(any_polygon, max_size=5))
@settings(max_examples=150, deadline=None)
def test_no_polygon_raises_and_the_maps_stay_in_range(polygons):
    prob_map, thresh_map = make_targets(polygons, 60, 80)
    assert prob_map.shape == thresh_map.shape == (60, 80)
    assert prob_map.dtype == np.uint8 and set(np.unique(prob_map)) <= {0, 1}
    assert thresh_map.dtype == np.float32
    assert thresh_map.min() >= np.float32(0.3) and thresh_map.max() <= np.float32(0.7) + 1e-6
    assert set(np.unique(polygon_mask(polygons, 60, 80))) <= {0, 1}


@given(st.lists(any_polygon, max_size=5), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_polygons_does_not_matter(polygons, random):
    maps = make_targets(polygons, 60, 80)
    random.shuffle(polygons)
    for expected, found in zip(maps, make_targets(polygons, 60, 80), strict=True):
        np.testing.assert_array_equal(found, expected)


TILTED = np.array([[20, 22], [70, 12], [75, 30], [24, 43]])


@given(st.sampled_from([TILTED, rectangle(20, 12, 70, 43)]), st.integers(-30, 30), st.integers(-30, 30))
@settings(max_examples=60, deadline=None)
def test_what_is_outside_the_image_is_cut_off_and_the_rest_stays(polygon, right, down):
    whole = make_targets([np.add(polygon, (50, 50))], 200, 200)
    part = make_targets([np.add(polygon, (right, down))], 60, 80)
    around = np.ones((3, 3), np.uint8)  # where OpenCV cuts an edge, it may come out a pixel elsewhere
    window = slice(50 - down, 110 - down), slice(50 - right, 130 - right)
    assert (part[0] >= cv2.erode(whole[0], around)[window]).all()
    assert (part[0] <= cv2.dilate(whole[0], around)[window]).all()
    np.testing.assert_allclose(part[1], whole[1][window], atol=STEP)


@pytest.mark.parametrize(
    "polygon",
    [
        [[10, 10], [30, 10], [50, 10], [20, 10]],
        [[10, 10]] * 4,
        [[10, 10], [30, 30]],
        [[10, 10], [float("nan"), 10], [30, 30]],
        [[10, 10], [float("inf"), 10], [30, 30]],
        [[10, 10], [1e12, 10], [30, 30]],
        [],
    ],
    ids=["flat", "one point", "two points", "nan", "inf", "far away", "empty"],
)
def test_a_polygon_that_is_none_leaves_no_trace(polygon):
    prob_map, thresh_map = make_targets([polygon], 50, 50)
    assert not prob_map.any()
    assert (thresh_map == np.float32(0.3)).all()


def test_polygons_that_no_kernel_stands_for_are_named_and_can_be_masked():
    word, flat, vanishes = rectangle(10, 10, 60, 30), [[10, 10], [30, 10], [50, 10]], rectangle(10, 40, 40, 42)
    dot, pair, nowhere = [[5, 5]], [[5, 5], [9, 9]], [[10, 10], [float("nan"), 10], [30, 30]]
    polygons = [np.array(each, float) for each in (word, flat, vanishes, dot, pair, nowhere, np.empty((0, 2)))]
    prob_map, _, lost = draw_targets(polygons, 64, 80)
    assert lost == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(prob_map, draw_targets([word], 64, 80)[0])
    masked = [polygon_mask([polygon], 64, 80).any() for polygon in polygons]
    assert masked == [True, True, True, True, True, False, False]


def test_an_image_without_text_has_no_threshold_to_learn():
    maps = draw_targets([], 8, 8)[:2]
    assert not thresh_mask(*maps).any()
    assert not thresh_mask(*map(torch.from_numpy, maps)).any()


def test_the_threshold_mask_of_tensors_is_that_of_arrays():
    maps = draw_targets([rectangle(10, 10, 60, 30)], 48, 72)[:2]
    of_tensors = thresh_mask(*map(torch.from_numpy, maps))
    np.testing.assert_array_equal(of_tensors.numpy(), thresh_mask(*maps))


def test_neighbours_keep_the_higher_threshold():
    alone, beside = rectangle(10, 10, 60, 30), rectangle(60, 10, 110, 30)
    both = make_targets([alone, beside], 48, 128)[1]
    each = [make_targets([polygon], 48, 128)[1] for polygon in (alone, beside)]
    np.testing.assert_array_equal(both, np.maximum(*each))


def test_a_polygon_larger_than_a_block_of_rows_has_no_seams():
    polygon = rectangle(40, 30, 1000, 700)
    thresh_map = make_targets([polygon], 720, 1041)[1]
    np.testing.assert_allclose(thresh_map[:, ::-1], thresh_map, atol=STEP)
    distance = shrink_distance(polygon)
    inside = np.arange(0, 160)
    np.testing.assert_allclose(thresh_map[365, 40:200], 0.7 - 0.4 * inside / distance, atol=STEP)


def test_other_bounds_and_ratio_are_used():
    prob_map, thresh_map = make_targets([rectangle(10, 10, 60, 30)], 48, 72, 0.8, thresh_min=0.1, thresh_max=0.9)
    assert thresh_map.max() == pytest.approx(0.9) and thresh_map.min() == pytest.approx(0.1)
    assert prob_map.sum() > make_targets([rectangle(10, 10, 60, 30)], 48, 72)[0].sum()


def test_polygon_mask_covers_the_polygons_and_nothing_else():
    mask = polygon_mask([rectangle(-5, 2, 4, 6), rectangle(8, 1, 9, 3)], 10, 12)
    expected = np.zeros((10, 12), np.uint8)
    expected[2:7, :5] = 1
    expected[1:4, 8:10] = 1
    np.testing.assert_array_equal(mask, expected)


# ------------------------------------------------------------------------------------------------------ hostile input


@hostile
@given(st.lists(wild_polygons(), max_size=4))
def test_any_polygons_make_targets_in_range_and_in_time(polygons):
    with in_time():
        prob_map, thresh_map = make_targets(polygons, 60, 80)  # unchecked, as no file is read
        polygon_mask(polygons, 60, 80)
    assert prob_map.max() <= 1 and 0.299 < thresh_map.min() <= thresh_map.max() < 0.701


@hostile
@given(st.lists(wild_polygons(), max_size=4))
def test_any_polygons_of_files_are_clipped_to_the_image(polygons):
    polygons = [polygon for polygon in polygons if (np.abs(polygon) <= MAX_COORDINATE).all()]
    dataset = TextDataset.__new__(TextDataset)
    dataset.words = [gather_words(Annotation(polygons, [False] * len(polygons)))]
    text, masked = dataset.polygons(0, Letterbox(80, 60, 40), Augmentation())
    assert all((polygon >= 0).all() and (polygon <= (40, 30)).all() for polygon in [*text, *masked])
    assert len(text) + len(masked) == len(polygons)


def test_polygons_as_large_as_the_page_are_masked_where_they_are_too_many_and_the_words_stay():
    rng, word = np.random.default_rng(0), np.array([[200, 200], [300, 200], [300, 240], [200, 240]])
    pages = [np.array([[0, 0], [640, 0], [640, 640], [0, 640]]) + rng.integers(-9, 9, (4, 2)) for _ in range(5000)]
    with in_time():
        prob_map, _, lost = draw_targets([*pages, word], 640, 640)
    assert 4900 < len(lost) < 5000 and len(pages) not in lost and prob_map.any()
    assert draw_targets([*pages[:50], word], 640, 640)[2] == []


def test_a_tangle_of_countless_crossings_is_named_to_be_masked_in_time():
    tangle = np.random.default_rng(0).integers(0, 600, (20_000, 2))
    with in_time():
        prob_map, _, lost = draw_targets([tangle], 640, 640)
        mask = polygon_mask([tangle], 640, 640)
    assert lost == [0] and not prob_map.any() and mask[:599, :599].mean() > 0.999


def test_a_dont_care_outline_that_runs_round_twice_covers_all_that_it_surrounds():
    square, octagon = rectangle(10, 10, 50, 40), np.array([[20, 5], [40, 5], [50, 20], [40, 50], [20, 50], [10, 20]])
    for once in (square, octagon, square[::-1]):
        mask = polygon_mask([once], 64, 64)
        for times in (2, 3):
            assert np.array_equal(polygon_mask([np.tile(once, (times, 1))], 64, 64), mask)
            assert np.array_equal(polygon_mask([np.concatenate([once, once[:1]] * times)], 64, 64), mask)
    bow_tie = np.array([[10, 10], [30, 30], [50, 10], [50, 50], [30, 30], [10, 50]])
    assert polygon_mask([bow_tie], 64, 64)[30, [12, 48]].all() and not polygon_mask([bow_tie], 64, 64)[12, 30]
