"""What many pairs of polygons have in common, against shapely's own answers for one pair."""

import numpy as np
import pytest
import shapely
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support import convex_quads, in_time

from dbnet import geometry
from dbnet.geometry import (
    Polygons,
    common_areas,
    contains,
    is_tangled,
    near_pairs,
)


@st.composite
def simple_polygons(draw):
    """Outlines of integers that do not cross themselves, mostly not convex, either way around."""
    count = draw(st.integers(3, 14))
    angles = np.sort(draw(st.lists(st.floats(0, 6.28), min_size=count, max_size=count, unique=True)))
    radii = np.array(draw(st.lists(st.floats(2, 60), min_size=count, max_size=count)))
    centre = draw(st.tuples(st.integers(-20, 60), st.integers(-20, 60)))
    polygon = np.rint(np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + centre)
    assume(shapely.Polygon(polygon).is_valid and shapely.Polygon(polygon).area > 0)
    return polygon[::-1] if draw(st.booleans()) else polygon


@st.composite
def upright_rectangles(draw):
    """(4, 2) rectangles along the axes, from any corner, either way around."""
    left, top, width, height = (draw(st.integers(*span)) for span in ((-20, 60), (-20, 60), (1, 60), (1, 60)))
    corners = np.add([[0, 0], [width, 0], [width, height], [0, height]], (left, top))
    return np.roll(corners, draw(st.integers(0, 3)), axis=0)[:: draw(st.sampled_from([1, -1]))]


any_polygons = upright_rectangles() | convex_quads() | simple_polygons()


@settings(max_examples=300, deadline=None)
@given(st.lists(any_polygons, max_size=4), st.lists(any_polygons, max_size=4))
def test_areas_and_common_areas_are_those_of_the_intersections(some, others):
    first, second = np.indices((len(some), len(others))).reshape(2, -1)
    a, b = Polygons(some, 3), Polygons(others, 3)
    computed = common_areas(a, b, first, second)
    expected = [shapely.Polygon(p).intersection(shapely.Polygon(q)).area for p in some for q in others]
    assert computed == pytest.approx(np.array(expected), abs=1e-6)
    assert a.areas == pytest.approx(np.array([shapely.Polygon(polygon).area for polygon in some]))
    have_something = set(zip(first[computed > 1e-6].tolist(), second[computed > 1e-6].tolist(), strict=True))
    assert have_something <= set(zip(*(indices.tolist() for indices in near_pairs(a, b)), strict=True))


@settings(max_examples=300, deadline=None)
@given(any_polygons, st.integers(-80, 120), st.integers(-80, 120))
def test_contains_agrees_with_shapely_off_the_outline(polygon, x, y):
    point = shapely.Point(x, y)
    assume(not shapely.LinearRing(polygon).intersects(point))
    polygons = Polygons([polygon], 3)
    assert contains(polygons, np.array([0]), np.array([[x], [y]]))[0] == shapely.Polygon(polygon).contains(point)


def raster(polygon, side, pixels):
    """(rows, pixels) bool: which centres of a fine raster of side x side are inside by the even-odd rule. There are 51
    rows for 50 columns: with as many, an edge at 45 degrees could have all centres on it on one side."""
    columns, centres = ((np.arange(count) + 0.5) * side / count for count in (pixels, pixels * 51 // 50))
    inside = np.zeros((len(centres), pixels), bool)
    for (begin_x, begin_y), (end_x, end_y) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        rows = (begin_y > centres) != (end_y > centres)
        crossing = begin_x + (centres[rows] - begin_y) * (end_x - begin_x) / (end_y - begin_y or 1)
        inside[rows] ^= columns < crossing[:, None]
    return inside


small = st.integers(0, 12)
tangles = st.lists(st.tuples(small, small), min_size=3, max_size=9).map(np.array)  # often crossing, touching, repeated


@settings(max_examples=100, deadline=None)
@given(tangles, tangles)
@example(np.array([[0, 0], [10, 10], [8, 12]]), np.array([[0, 0], [0, 0], [0, 0]]))  # at 45 degrees
@example(np.array([[0, 0], [0, 8], [9, 10]]), np.array([[0, 9], [1, 0], [0, 10], [9, 10], [0, 8]]))  # nearly touch
def test_areas_of_outlines_that_cross_themselves_are_even_odd(one, other):
    a, b, pair = Polygons([one], 3), Polygons([other], 3), np.array([0])
    inside_one, inside_other = raster(one, 12, 600), raster(other, 12, 600)
    assert a.areas[0] == pytest.approx(inside_one.mean() * 144, abs=0.1)
    assert common_areas(a, b, pair, pair)[0] == pytest.approx((inside_one & inside_other).mean() * 144, abs=0.1)


@settings(max_examples=150, deadline=None)
@given(any_polygons, any_polygons)
def test_the_closed_form_gives_what_shapely_gives(one, other):
    a, b, pair = Polygons([one], 3), Polygons([other], 3), np.array([0])
    by_shapely = shapely.area(shapely.intersection(a.shapes(pair), b.shapes(pair)))
    assert common_areas(a, b, pair, pair) == pytest.approx(by_shapely, abs=1e-6)


BOW_TIE = [[0, 0], [10, 10], [10, 0], [0, 10]]
TWICE_AROUND = [[0, 0], [10, 0], [10, 10], [0, 10]] * 2
SPIKE = [[0, 0], [10, 0], [10, 10], [10, 20], [10, 10], [0, 10]]
TOUCHING = [[0, 0], [10, 0], [10, 10], [5, 0], [0, 10]]
EDGE_TWICE = [[0, 0], [10, 0], [10, 10], [20, 10], [20, 0], [10, 0], [10, 10], [0, 10]]


@pytest.mark.parametrize(
    ("outline", "area"),
    [(BOW_TIE, 50), (TWICE_AROUND, 0), (SPIKE, 100), (TOUCHING, 50), (EDGE_TWICE, 200), ([[3, 3]] * 5, 0)],
    ids=["bow tie", "twice around", "spike", "touching", "edge twice", "point"],
)
def test_an_outline_that_meets_itself_has_the_area_of_its_even_odd_inside(outline, area):
    polygons = Polygons([outline, outline[::-1]], 3)
    assert not polygons.is_simple.any()
    assert polygons.areas == pytest.approx(np.array([area, area]))
    assert shapely.area(polygons.shapes(np.arange(2))) == pytest.approx(polygons.areas)


def star(corners, step, radius=1000):
    angles = np.arange(corners) * step * 2 * np.pi / corners
    return np.rint(np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius)


def test_a_star_has_the_area_of_its_tips_and_not_of_its_middle():
    pentagram = Polygons([star(5, 2)], 3)
    inner = 1000 * np.cos(2 * np.pi / 5) / np.cos(np.pi / 5)  # radius of the pentagon in the middle
    whole, middle = 5 * 1000 * inner * np.sin(np.pi / 5), 2.5 * inner**2 * np.sin(2 * np.pi / 5)
    assert pentagram.areas[0] == pytest.approx(whole - middle, rel=0.01)
    assert not contains(pentagram, np.array([0]), np.zeros((2, 1)))[0]


@pytest.mark.parametrize(
    ("outline", "expected"),
    [
        (star(50, 7), False),
        (star(500, 249), True),
        (star(2000, 1), False),
        (np.repeat(star(100, 1), 20, axis=0), False),  # points that are there several times
        (np.tile(star(4, 1), (500, 1)), True),  # around the same square again and again
        (np.concatenate([np.linspace([0, 0], [900, 0], 901), np.linspace([900, 9], [0, 9], 901)]), False),
    ],
    ids=["star", "tangled star", "circle", "repeated points", "many times around", "points along straight lines"],
)
def test_a_tangle_is_an_outline_that_meets_itself_hundreds_of_times(outline, expected):
    assert is_tangled(outline) == expected


def test_hundreds_of_tangles_in_an_image_cost_seconds_and_have_their_areas_sampled():
    random = np.random.default_rng(0)
    few, many = ([random.integers(0, 300, (100, 2)) for _ in range(count)] for count in (3, 100))
    with in_time():
        polygons = Polygons(many, 3)
        first, second = near_pairs(polygons, polygons)
        common_areas(polygons, polygons, first[:3000], second[:3000])
        bow_ties = Polygons([np.multiply(BOW_TIE, 20)] * 100, 3)  # as many that are exact up to MAX_EFFORT
        common = common_areas(bow_ties, bow_ties, *near_pairs(bow_ties, bow_ties))
    assert common.min() == pytest.approx(common.max(), rel=0.03) and common.max() == 20_000
    some, insides = Polygons(few, 3), [raster(outline, 300, 900) for outline in few]
    expected = [(insides[i] & insides[j]).mean() * 300**2 for i in range(3) for j in range(3)]
    assert common_areas(some, some, *np.indices((3, 3)).reshape(2, -1)) == pytest.approx(np.array(expected), rel=0.06)


def test_an_outline_with_countless_crossings_has_its_area_sampled():
    scribble = np.random.default_rng(0).integers(0, 300, (400, 2))
    assert is_tangled(scribble.astype(float)) and not is_tangled(star(50, 7))
    area = raster(scribble, 300, 900).mean() * 300**2
    assert Polygons([scribble], 3).areas[0] == pytest.approx(area, rel=0.05)


def test_many_points_are_compared_block_by_block(monkeypatch):
    polygons, columns = Polygons([BOW_TIE, TOUCHING], 3), np.indices((2, 12, 12)).reshape(3, -1)
    at_once = contains(polygons, columns[0], columns[1:])
    monkeypatch.setattr(geometry, "BLOCK", 50)
    assert (contains(polygons, columns[0], columns[1:]) == at_once).all()


def test_coordinates_are_truncated_and_must_be_on_an_image():
    polygons = Polygons([np.array([[0.9, 0], [5.9, -0.9], [5, 5]])], 3)
    assert polygons.points.T.tolist() == [[0, 0], [5, 0], [5, 5]]
    with pytest.raises(ValueError, match="not finite"):
        Polygons([[[0, 0], [1, np.nan], [1, 1]]], 3)
    with pytest.raises(ValueError, match="array of points"):
        Polygons([[1, 2, 3]], 3)


def test_polygons_of_too_few_points_are_marked_and_have_nothing_in_common_with_others():
    quad = [[0, 0], [9, 0], [9, 9], [0, 9]]
    polygons = Polygons([quad, [[1, 1]], [], [[0, 0], [9, 0], [5, 5]], quad], 4)
    assert polygons.is_given.tolist() == [True, False, False, False, True]
    assert polygons.is_quad.tolist() == polygons.is_given.tolist()
    first, second = near_pairs(polygons, polygons)
    is_both = polygons.is_given[first] & polygons.is_given[second]
    assert (common_areas(polygons, polygons, first, second) == 81 * is_both).all()
    assert polygons.areas.tolist() == [81, 0, 0, 0, 81]
