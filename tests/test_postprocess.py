"""Probability maps to polygons (DBNet, section 3.5): the baseline's answers, round trips, and maps without sense."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shapely import STRtree, make_valid
from shapely.geometry import Polygon
from support import hostile, in_time

from dbnet.config import PRESETS
from dbnet.postprocess import OFFSET_ERROR, extract_polygons, offset_polygons, region_score, unclip_distances
from dbnet.targets import make_targets

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
BOTH_MODES = pytest.mark.parametrize("use_polygon", [True, False], ids=["polygon", "quad"])


def settings_of(**changes):
    defaults = {
        "use_polygon": True,
        "thresh": 0.3,
        "box_thresh": 0.4,
        "max_candidates": 300,
        "min_size": 3,
        "box_unclip_ratio": 1.5,
        "polygon_unclip_ratio": 2.0,
    }
    return SimpleNamespace(**(defaults | changes))


def iou(one, other):
    one, other = make_valid(Polygon(one)), make_valid(Polygon(other))
    return one.intersection(other).area / max(one.union(other).area, 1e-9)


def best_ious(expected, found):
    """For each expected polygon, the IoU of the found one that fits best."""
    tree = STRtree([Polygon(polygon) for polygon in found])
    near = [tree.query(Polygon(polygon)) for polygon in expected]
    return [
        max((iou(polygon, found[k]) for k in candidates), default=0)
        for polygon, candidates in zip(expected, near, strict=True)
    ]


def map_with_blobs(*probabilities, side=20):
    """A row of squares, one of each probability, 40 pixels apart."""
    prob_map = np.zeros((60, 40 * len(probabilities) + 20), np.float32)
    for index, probability in enumerate(probabilities):
        prob_map[20 : 20 + side, 20 + 40 * index : 20 + 40 * index + side] = probability
    return prob_map


@given(length=st.integers(20, 4000), height=st.integers(3, 40), wave=st.integers(0, 1))
@settings(deadline=None, max_examples=60)
def test_a_line_of_text_is_found_however_long_and_thin_it_is(length, height, wave):
    prob_map = np.zeros((60, length + 20), np.float32)
    for x in range(10, 10 + length):
        top = 10 + wave * (x // 50 % 2)
        prob_map[top : top + height, x] = 1
    [polygon], _ = extract_polygons(prob_map, settings_of())
    assert np.ptp(polygon[:, 0]) >= length - 2 and np.ptp(polygon[:, 1]) >= height


@pytest.fixture(scope="module")
def baseline_cases():
    if not (CASES / "postprocess.json").exists():
        pytest.skip(f"{CASES} is not there")
    cases = json.loads((CASES / "postprocess.json").read_text())
    names = {case["name"] for case in cases}
    maps = {name: cv2.imread(str(CASES / f"{name}.png"), cv2.IMREAD_GRAYSCALE) / np.float32(255) for name in names}
    return [(case, maps[case["name"]]) for case in cases]


def test_polygons_and_scores_are_those_of_the_baseline(baseline_cases):
    expected_count, found_count, ious = 0, 0, []
    for case, prob_map in baseline_cases:
        polygons, scores = extract_polygons(prob_map, SimpleNamespace(**case), (case["scale"], case["scale"]))
        expected_count += len(case["polygons"])
        found_count += len(polygons)
        ious += best_ious(case["polygons"], polygons)
        if len(scores) == len(case["scores"]):  # OpenCV 4.9 fills the edge of a polygon a little differently from 5.0
            np.testing.assert_allclose(scores, sorted(case["scores"], reverse=True), atol=0.02)
    assert abs(found_count - expected_count) <= 0.02 * expected_count
    assert np.mean(np.array(ious) >= 0.95) >= 0.98


def shrinking(width, height):
    """D of a rectangle for a shrink ratio of 0.4, and the unclip ratio that undoes it, of the shrunk A and L."""
    distance = width * height * (1 - 0.4**2) / (2 * (width + height))
    inner_width, inner_height = width - 2 * distance, height - 2 * distance
    return distance, distance * 2 * (inner_width + inner_height) / (inner_width * inner_height)


@BOTH_MODES
@given(width=st.integers(240, 480), height=st.integers(100, 200), angle=st.integers(-45, 45))
@settings(max_examples=25, deadline=None)
def test_rectangles_survive_being_shrunk_and_extracted(use_polygon, width, height, angle):
    # Large ones: the half pixels that the target map loses by rounding count threefold once the offset has grown them.
    original = np.rint(cv2.boxPoints(((300, 300), (width, height), angle)))
    _, ratio = shrinking(width, height)
    prob_map = make_targets([original], 600, 600)[0].astype(np.float32)
    for how in ({"box_unclip_ratio": ratio, "polygon_unclip_ratio": ratio}, {"growth": 1.0, "shrink_ratio": 0.4}):
        polygons, scores = extract_polygons(prob_map, settings_of(use_polygon=use_polygon, **how))
        assert len(polygons) == 1 and scores[0] > 0.9
        assert polygons[0].dtype == np.int32 and polygons[0].shape[1] == 2
        assert iou(polygons[0], original) >= 0.88  # the corners are round


@given(width=st.integers(30, 300), height=st.integers(20, 80), angle=st.integers(-45, 45))
@settings(max_examples=50, deadline=None)
def test_unclip_undoes_shrinking(width, height, angle):
    distance, ratio = shrinking(width, height)
    shrunk = cv2.boxPoints(((300, 300), (width - 2 * distance, height - 2 * distance), angle))
    assume(min(width, height) - 2 * distance > 8)  # less is mostly rounding
    for how in ({"polygon_unclip_ratio": ratio}, {"growth": 1.0, "shrink_ratio": 0.4}):
        distances = unclip_distances([np.rint(shrunk)], settings_of(**how))
        [grown] = offset_polygons([np.rint(shrunk).astype(np.int32)], distances)
        assert iou(grown, cv2.boxPoints(((300, 300), (width, height), angle))) >= 0.8


@given(st.floats(1, 500), st.floats(1, 500), st.floats(0.05, 0.95))
def test_growth_by_1_takes_back_what_any_rectangle_was_shrunk_by(width, height, shrink_ratio):
    distance = width * height * (1 - shrink_ratio**2) / (2 * (width + height))
    left, top = distance, distance
    kernel = np.array([[left, top], [width - left, top], [width - left, height - top], [left, height - top]])
    [found] = unclip_distances([kernel], settings_of(growth=1.0, shrink_ratio=shrink_ratio))
    assert found == pytest.approx(distance, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=4, max_size=9), st.floats(1, 20))
@settings(max_examples=100, deadline=None)
def test_an_offset_polygon_is_at_least_as_broad_as_twice_the_distance(points, distance):
    """What lets extract_polygons do without a look at the rectangle of every polygon."""
    [grown] = offset_polygons([np.array(points)], [distance])
    if grown is not None:
        assert min(cv2.minAreaRect(grown)[1]) >= 2 * distance - OFFSET_ERROR


@BOTH_MODES
def test_scale_multiplies_x_and_y(use_polygon):
    config = settings_of(use_polygon=use_polygon)
    prob_map = map_with_blobs(0.9, 0.8, 0.7)
    plain, plain_scores = extract_polygons(prob_map, config)
    scaled, scores = extract_polygons(prob_map, config, scale=(2.0, 3.0))
    assert scores == plain_scores
    for polygon, bigger in zip(plain, scaled, strict=True):
        assert np.abs(polygon * (2, 3) - bigger).max() <= (0 if use_polygon else 2)


@BOTH_MODES
def test_max_candidates_keeps_the_best_wherever_they_are(use_polygon):
    probabilities = [0.5, 0.9, 0.6, 0.95, 0.7]
    config = settings_of(use_polygon=use_polygon, max_candidates=2)
    polygons, scores = extract_polygons(map_with_blobs(*probabilities), config)
    assert scores == pytest.approx([0.95, 0.9])
    assert [polygon[:, 0].mean() // 40 for polygon in polygons] == [3, 1]


def test_regions_that_are_dropped_take_no_place_among_the_candidates():
    prob_map = map_with_blobs(0.9, 0.6)
    prob_map[50:52, 5:7] = 1.0  # the best score, but too small
    config = settings_of(max_candidates=2, polygon_unclip_ratio=0.5)
    assert extract_polygons(prob_map, config)[1] == pytest.approx([0.9, 0.6])


@given(st.lists(st.floats(0.35, 1), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_scores_are_the_highest_in_descending_order(probabilities, max_candidates):
    config = settings_of(box_thresh=0.31, max_candidates=max_candidates)
    _, scores = extract_polygons(map_with_blobs(*probabilities), config)
    assert scores == pytest.approx(sorted(probabilities, reverse=True)[:max_candidates])


@BOTH_MODES
def test_regions_below_box_thresh_are_dropped(use_polygon):
    config = settings_of(use_polygon=use_polygon, box_thresh=0.6)
    assert extract_polygons(map_with_blobs(0.5, 0.7), config)[1] == pytest.approx([0.7])


@BOTH_MODES
def test_small_regions_are_dropped(use_polygon):
    config = settings_of(use_polygon=use_polygon)
    assert extract_polygons(map_with_blobs(0.9, side=2), config) == ([], [])


@BOTH_MODES
def test_an_empty_map_gives_nothing(use_polygon):
    config = settings_of(use_polygon=use_polygon)
    for shape in [(64, 64), (1, 1), (0, 10), (0, 0)]:
        assert extract_polygons(np.zeros(shape, np.float32), config) == ([], [])


@BOTH_MODES
def test_a_full_map_gives_one_polygon_that_max_size_clips_to_the_image(use_polygon):
    config = settings_of(use_polygon=use_polygon)
    polygons, scores = extract_polygons(np.ones((40, 60), np.float32), config)
    assert len(polygons) == 1 and scores == [1.0]
    assert polygons[0].min() < 0
    clipped, _ = extract_polygons(np.ones((40, 60), np.float32), config, scale=(2.0, 2.0), max_size=(119, 79))
    assert clipped[0].min(axis=0).tolist() == [0, 0] and clipped[0].max(axis=0).tolist() == [119, 79]


@BOTH_MODES
def test_nan_counts_as_zero(use_polygon):
    config = settings_of(use_polygon=use_polygon)
    with_zeros = map_with_blobs(0.9, 0.8)
    with_zeros[25:28, 25:28] = 0
    with_nan = np.where(with_zeros == 0, np.float32("nan"), with_zeros)
    expected, expected_scores = extract_polygons(with_zeros, config)
    found, scores = extract_polygons(with_nan, config)
    assert scores == pytest.approx(expected_scores)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert extract_polygons(np.full((20, 20), np.nan, np.float32), config) == ([], [])


@BOTH_MODES
@given(seed=st.integers(0, 10**6), coarseness=st.sampled_from([1, 2, 6]), min_size=st.sampled_from([0, 3]))
@settings(max_examples=25, deadline=None)
def test_noise_never_raises_and_keeps_the_promises(use_polygon, seed, coarseness, min_size):
    noise = np.random.default_rng(seed).random((48, 64)).astype(np.float32)
    prob_map = cv2.resize(noise, None, fx=coarseness, fy=coarseness, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    config = settings_of(use_polygon=use_polygon, thresh=0.6, box_thresh=0.3, min_size=min_size, max_candidates=50)
    height, width = prob_map.shape
    polygons, scores = extract_polygons(prob_map, config, max_size=(width, height))
    assert len(polygons) == len(scores) <= 50
    assert scores == sorted(scores, reverse=True) and all(0.3 <= score <= 1 for score in scores)
    for polygon in polygons:
        assert len(polygon) == 4 or use_polygon
        assert (polygon >= 0).all() and (polygon <= (width, height)).all()


def test_quads_start_at_the_top_left_and_go_clockwise():
    polygons, _ = extract_polygons(map_with_blobs(0.9), settings_of(use_polygon=False))
    (left, top), (right, upper), (rightmost, bottom), (leftmost, lower) = polygons[0].tolist()
    assert left == leftmost < right == rightmost and top == upper < bottom == lower


def test_a_hole_is_no_polygon_and_text_within_it_is_one():
    prob_map = np.zeros((80, 80), np.float32)
    prob_map[10:70, 10:70] = 0.9
    prob_map[25:55, 25:55] = 0.1
    polygons, _ = extract_polygons(prob_map, settings_of(box_thresh=0.0))
    assert len(polygons) == 1
    prob_map[37:43, 32:48] = 0.8
    assert len(extract_polygons(prob_map, settings_of(box_thresh=0.0))[0]) == 2


def test_score_is_the_mean_inside_the_polygon_only():
    prob_map = np.zeros((30, 30), np.float32)
    prob_map[10:20, 10:20] = 0.5
    prob_map[12, 12] = 1.0
    inside = np.array([[10, 10], [19, 10], [19, 19], [10, 19]], np.int32)
    assert region_score(prob_map, inside) == pytest.approx(0.505)
    assert region_score(prob_map, inside + 100) == 0


def test_a_region_whose_offset_closes_around_a_hole_is_dropped():
    prob_map = np.zeros((120, 120), np.float32)
    prob_map[20:100, 20:100] = 0.9
    prob_map[36:84, 36:84] = 0
    prob_map[58:62, 84:100] = 0  # a ring with a gap that the offset bridges
    assert extract_polygons(prob_map, settings_of(polygon_unclip_ratio=0.5)) == ([], [])


def test_a_map_of_the_wrong_shape_is_rejected():
    with pytest.raises(ValueError, match="height, width"):
        extract_polygons(np.zeros((1, 8, 8), np.float32), settings_of())


# --------------------------------------------------------------------------------------------------- hostile input


def probability_map(kind, seed, side):
    rng = np.random.default_rng(seed)
    if kind in ("zero", "one", "nan"):
        return np.full((side, side // 2), {"zero": 0, "one": 1, "nan": math.nan}[kind], np.float32)
    noise = rng.random((side, side // 2)).astype(np.float32)
    if kind == "coarse":
        noise = cv2.resize(noise[: side // 4, : side // 8], (side // 2, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    if kind == "holes":
        noise[rng.random(noise.shape) < 0.3] = np.nan
    if kind == "dots":
        noise = np.zeros_like(noise)
        noise[::2, ::2] = 1
    if kind == "stripes":
        noise = np.zeros_like(noise)
        noise[::2] = 1
    return noise


@hostile
@given(
    st.sampled_from(["zero", "one", "nan", "noise", "coarse", "holes", "dots", "stripes"]),
    st.integers(0, 2**32),
    st.sampled_from([8, 64, 160, 512]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(0.3, 0.25), (0, 0), (1, 1), (0.5, 0.9)]),
)
def test_any_map_gives_polygons_in_the_image_best_first(kind, seed, side, use_polygon, as_bytes, thresholds):
    prob_map = probability_map(kind, seed, side)
    if as_bytes:
        prob_map = (np.nan_to_num(prob_map) * 255).astype(np.uint8)
    thresh, box_thresh = thresholds
    config = PRESETS["v1"].changed(use_polygon=use_polygon, thresh=float(thresh), box_thresh=float(box_thresh))
    with in_time():
        polygons, scores = extract_polygons(prob_map, config, (3.0, 2.0), (3 * side // 2, 2 * side))
    assert len(polygons) == len(scores) <= config.max_candidates
    assert scores == sorted(scores, reverse=True) and all(box_thresh <= score <= 1 + 1e-6 for score in scores)
    assert all((polygon >= 0).all() and (polygon <= (3 * side // 2, 2 * side)).all() for polygon in polygons)
    if kind in ("zero", "nan"):
        assert not polygons
