from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deid_tools.polygons import EDGE_TOLERANCE, fill, inside, on_edges

SHAPE = (9, 11)


def square(top: float, left: float, bottom: float, right: float) -> np.ndarray:
    return np.array([[top, left], [top, right], [bottom, right], [bottom, left]])


def naive(polygons, shape) -> np.ndarray:
    """Ask every centre for itself: crossings to its left, and its distance to every edge."""
    found = np.zeros(shape, bool)
    for r in range(shape[0]):
        for c in range(shape[1]):
            crossings, near = 0, False
            for polygon in polygons:
                for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                    if (a[0] <= r) != (b[0] <= r):
                        crossings += bool(a[1] + (r - a[0]) / (b[0] - a[0]) * (b[1] - a[1]) <= c)
                    edge, point = b - a, np.array([r, c]) - a
                    share = np.clip(point @ edge / max(edge @ edge, 1e-12), 0, 1)
                    near |= bool(np.linalg.norm(point - share * edge) <= EDGE_TOLERANCE / 2)
            found[r, c] = crossings % 2 == 1 or near
    return found


def test_a_contour_through_pixel_centres_keeps_its_outermost_pixels():
    expected = np.zeros(SHAPE, bool)
    expected[2:7, 3:9] = True
    np.testing.assert_array_equal(fill([square(2, 3, 6, 8)], SHAPE), expected)
    np.testing.assert_array_equal(fill([square(2, 3, 6, 8)[::-1]], SHAPE), expected)


def test_a_contour_between_pixels_takes_what_is_within():
    expected = np.zeros(SHAPE, bool)
    expected[2:7, 3:9] = True
    np.testing.assert_array_equal(fill([square(1.5, 2.5, 6.5, 8.5)], SHAPE), expected)


def test_a_contour_within_another_is_a_hole_and_its_line_belongs_to_the_shape():
    found = fill([square(1, 1, 7, 9), square(3, 3, 5, 6)], SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[1:8, 1:10] = True
    expected[4, 4:6] = False
    np.testing.assert_array_equal(found, expected)


def test_what_lies_outside_the_grid_is_cut_off():
    assert fill([square(-5, -5, 20, 20)], SHAPE).all()
    assert not fill([square(20, 20, 25, 25)], SHAPE).any()
    assert fill([square(-5, -5, 3.5, 3.5)], SHAPE).sum() == 16
    assert not fill([square(-5, 2, -2, 4)], SHAPE).any()


def test_rounded_coordinates_still_count_as_on_the_line():
    shaken = square(2, 3, 6, 8) + np.array([[0.004, 0.006], [0.005, -0.004], [-0.006, -0.003], [-0.004, 0.005]])
    np.testing.assert_array_equal(fill([shaken], SHAPE), fill([square(2, 3, 6, 8)], SHAPE))


def test_a_line_without_area_is_only_its_pixels():
    found = fill([np.array([[4.0, 2.0], [4.0, 6.0], [4.0, 2.0]])], SHAPE)
    assert found.sum() == 5
    assert on_edges([np.array([[1.0, 1.0], [4.0, 4.0], [1.0, 1.0]])], SHAPE).sum() == 4


coordinate = st.one_of(st.integers(-2, 12).map(float), st.integers(-20, 120).map(lambda n: n / 10 + 0.03))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=7), min_size=1, max_size=3))
def test_agrees_with_asking_every_pixel(polygons):
    arrays = [np.array(p) for p in polygons]
    found, expected = fill(arrays, SHAPE), naive(arrays, SHAPE)
    close = on_edges(arrays, SHAPE)  # within the tolerance both answers are right
    np.testing.assert_array_equal(found[~close], expected[~close])
    assert found[expected & close].all()


def test_agrees_with_another_program_on_real_shapes():
    draw = pytest.importorskip("skimage.draw")
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    for phase in (0.1, 0.7, 2.3):
        radius = 30 + 9 * np.sin(3 * angles + phase)
        star = np.stack([50.3 + radius * np.sin(angles), 48.7 + radius * np.cos(angles)], axis=1)
        np.testing.assert_array_equal(inside([star], (100, 96)), draw.polygon2mask((100, 96), star))
