"""What many pairs of polygons have in common, against shapely's own answers for one pair."""

import numpy as np
import pytest
import shapely
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import convex_quads

from dbnet.geometry import Polygons, common_areas, contains, near_pairs


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
    a, b = Polygons.read(some, 3), Polygons.read(others, 3)
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
    polygons = Polygons.read([polygon], 3)
    assert contains(polygons, np.array([0]), np.array([[x], [y]]))[0] == shapely.Polygon(polygon).contains(point)


def test_what_crosses_itself_or_has_no_area_is_mended():
    bow_tie, flat = [[0, 0], [10, 10], [10, 0], [0, 10]], [[0, 0], [5, 0], [9, 0]]
    polygons = Polygons.read([bow_tie, [[1, 1], [2, 2]], flat], 3)
    assert polygons.is_given.tolist() == [True, False, True]
    assert polygons.is_simple.tolist() == [False, False]
    assert polygons.areas.tolist() == shapely.area(polygons.shapes).tolist()
    assert polygons.areas[1] == 0
    assert 0 < polygons.areas[0] <= 50


def test_coordinates_are_truncated_and_must_be_on_an_image():
    polygons = Polygons.read([np.array([[0.9, 0], [5.9, -0.9], [5, 5]])], 3)
    assert polygons.points.T.tolist() == [[0, 0], [5, 0], [5, 5]]
    with pytest.raises(ValueError, match="not finite"):
        Polygons.read([[[0, 0], [1, np.nan], [1, 1]]], 3)
    with pytest.raises(ValueError, match="array of points"):
        Polygons.read([[1, 2, 3]], 3)


def test_what_has_been_read_is_read_on_from_there():
    triangle, quad = [[0, 0], [9, 0], [5, 5]], [[0, 0], [9, 0], [9, 9], [0, 9]]
    polygons = Polygons.read([quad, [[1, 1]], triangle, quad], 3)
    assert Polygons.read(polygons, 3) is polygons
    quads = Polygons.read(polygons, 4)
    assert quads.is_given.tolist() == [True, False, False, True]
    assert quads.areas.tolist() == [81, 81]
    assert quads.is_quad.all()


def test_upright_rectangles_are_told_from_other_quadrilaterals():
    upright, turned, triangle = (
        [[0, 0], [9, 0], [9, 5], [0, 5]],
        [[5, 0], [9, 4], [4, 9], [0, 5]],
        [[0, 0], [9, 0], [9, 5]],
    )
    assert Polygons.read([upright, turned, upright[::-1], triangle], 3).is_upright.tolist() == [
        True,
        False,
        True,
        False,
    ]
