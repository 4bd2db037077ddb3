from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deid_tools.contours import read_structures
from deid_tools.series import lps_to_ras
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import Geometry, LabelClass, LabelSchema
from medlsdm.volumes import from_ras

STRAIGHT = np.eye(3)
TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
TILTED = TURN @ np.array([[1.0, 0.0, 0.0], [0.0, 0.8, -0.6], [0.0, 0.6, 0.8]])
SCHEMA = LabelSchema(
    "organs",
    (
        LabelClass(0, "background", aliases=("couch", "BODY_1")),
        LabelClass(1, "liver", "10200004", aliases=("Leber",)),
        LabelClass(2, "lesion"),
    ),
)
CLOSED = "CLOSED_PLANAR"


def stack(turn: np.ndarray = STRAIGHT) -> Geometry:
    """Return a grid [slice, row, column] whose axes are LPS z, y, x turned in space."""
    lps = np.eye(4)
    lps[:3, :3] = turn @ np.array([[0, 0, 0.8], [0, 0.9, 0], [2.5, 0, 0]])
    lps[:3, 3] = (-20.0, 12.0, 55.0)
    return Geometry(lps_to_ras(lps), (6, 18, 22))


def at(grid: Geometry, points) -> np.ndarray:
    """Return patient coordinates (LPS) of indices (slice, row, column)."""
    points = np.asarray(points, float)
    return points @ lps_to_ras(grid.affine)[:3, :3].T + lps_to_ras(grid.affine)[:3, 3]


def square(grid: Geometry, k: float, top: float, left: float, bottom: float, right: float) -> np.ndarray:
    return at(grid, [(k, top, left), (k, top, right), (k, bottom, right), (k, bottom, left)])


def contour(points, uid: str = "", kind: str = CLOSED):
    return (points, kind, uid)


def expected(grid: Geometry, *boxes) -> np.ndarray:
    labels = np.zeros(grid.shape, np.uint16)
    for value, *box in boxes:
        labels[tuple(slice(low, high) for low, high in box)] = value
    return labels


@pytest.mark.parametrize("turn", [STRAIGHT, TURN, TILTED])
def test_contours_land_on_their_voxels_in_straight_and_oblique_volumes(structures, turn):
    grid = stack(turn)
    ds = structures([("LIVER", "", [contour(square(grid, k, 3, 4, 9, 12)) for k in (1, 2, 3)])])
    found = read_structures(ds, grid, SCHEMA)
    truth = expected(grid, (1, (1, 4), (3, 10), (4, 13)))
    np.testing.assert_array_equal(from_ras(found.array, grid), truth)
    inverse = np.linalg.inv(found.geometry.affine)
    middle = inverse[:3, :3] @ (np.diag([-1, -1, 1]) @ at(grid, (2, 6, 8))) + inverse[:3, 3]
    assert found.array[tuple(np.rint(middle).astype(int))] == 1


def test_a_contour_inside_another_is_a_hole(structures):
    grid = stack()
    ds = structures([("liver", "", [contour(square(grid, 2, 2, 2, 12, 15)), contour(square(grid, 2, 5, 6, 8, 9))])])
    found = from_ras(read_structures(ds, grid, SCHEMA).array, grid)
    truth = expected(grid, (1, (2, 3), (2, 13), (2, 16)), (0, (2, 3), (6, 8), (7, 9)))
    np.testing.assert_array_equal(found, truth)


def test_a_code_goes_before_a_name_and_an_alias_is_as_good_as_a_name(structures):
    grid = stack()
    for name, code, value in (
        ("whatever", "10200004", 1),
        ("leber ", "", 1),
        ("lesion", "10200004", 1),
        ("LESION", "", 2),
    ):
        ds = structures([(name, code, [contour(square(grid, 2, 2, 2, 5, 5))])])
        assert set(np.unique(read_structures(ds, grid, SCHEMA).array)) == {0, value}


def test_unknown_structures_are_named_by_number_only(structures):
    grid = stack()
    drawn = [contour(square(grid, 2, 2, 2, 5, 5))]
    ds = structures([("liver", "", drawn), ("tumour of Anna", "", drawn), ("x", "78961009", drawn), ("empty", "", [])])
    with pytest.raises(SchemaError) as caught:
        read_structures(ds, grid, SCHEMA)
    assert "2 of 3" in str(caught.value)
    assert "number 2: a name of its own, number 3: Spleen" in str(caught.value)
    assert "Anna" not in str(caught.value)


def test_what_the_background_names_is_left_out_whatever_it_is_drawn_as(structures):
    grid = stack()
    point = contour(at(grid, [(2, 3, 3)]), kind="POINT")
    ds = structures(
        [("liver", "", [contour(square(grid, 2, 2, 2, 5, 5))]), ("Couch", "", [point]), ("body 1", "", [point])]
    )
    assert (read_structures(ds, grid, SCHEMA).array == 1).sum() == 16
    rest = replace(SCHEMA.classes[0], aliases=("*",))
    others = structures([("liver", "", [contour(square(grid, 2, 2, 2, 5, 5))]), ("PTV 3", "", [point])])
    assert (read_structures(others, grid, replace(SCHEMA, classes=(rest, *SCHEMA.classes[1:]))).array == 1).sum() == 16
    with pytest.raises(SchemaError):
        read_structures(others, grid, SCHEMA)


def test_overlap_needs_a_declared_priority(structures):
    grid = stack()
    ds = structures(
        [
            ("lesion", "", [contour(square(grid, 2, 4, 4, 6, 6))]),
            ("liver", "", [contour(square(grid, 2, 2, 2, 9, 9))]),
        ]
    )
    with pytest.raises(DataError, match="overlap: lesion and liver"):
        read_structures(ds, grid, SCHEMA)
    lesion = read_structures(ds, grid, replace(SCHEMA, priority=("lesion", "liver"))).array
    liver = read_structures(ds, grid, replace(SCHEMA, priority=("liver", "lesion"))).array
    assert [(lesion == 1).sum(), (lesion == 2).sum()] == [64 - 9, 9]
    assert [(liver == 1).sum(), (liver == 2).sum()] == [64, 0]


def test_contours_off_the_slices_are_refused(structures):
    grid = stack()
    sagittal = at(grid, [(1, 3, 5), (4, 3, 5), (4, 9, 5), (1, 9, 5)])
    for points, words in (
        (sagittal, "crosses several"),
        (square(grid, 2.5, 2, 2, 5, 5), "between"),
        (square(grid, 6, 2, 2, 5, 5), "above or below"),
        (square(grid, -1, 2, 2, 5, 5), "above or below"),
    ):
        with pytest.raises(GeometryError, match=words):
            read_structures(structures([("liver", "", [contour(points)])]), grid, SCHEMA)
    near = structures([("liver", "", [contour(square(grid, 2.05, 2, 2, 5, 5))])])
    assert (read_structures(near, grid, SCHEMA).array == 1).sum() == 16


def test_a_contour_must_lie_on_the_image_that_it_names(structures):
    grid = stack()
    images = {f"1.2.3.4.{k}": k for k in range(6)}
    right = structures([("liver", "", [contour(square(grid, 2, 2, 2, 5, 5), "1.2.3.4.2")])])
    wrong = structures([("liver", "", [contour(square(grid, 2, 2, 2, 5, 5), "1.2.3.4.3")])])
    silent = structures([("liver", "", [contour(square(grid, 2, 2, 2, 5, 5))])])
    assert read_structures(right, grid, SCHEMA, slice_of=images, same_frame=False).array.any()
    assert read_structures(silent, grid, SCHEMA, slice_of=images).array.any()
    with pytest.raises(GeometryError, match="another image"):
        read_structures(wrong, grid, SCHEMA, slice_of=images)
    with pytest.raises(GeometryError, match="frame of reference"):
        read_structures(silent, grid, SCHEMA, slice_of=images, same_frame=False)
    with pytest.raises(GeometryError, match="frame of reference"):
        read_structures(right, grid, SCHEMA, same_frame=False)


def test_what_nobody_can_read_for_certain_is_refused(structures):
    grid = stack()
    first, second = square(grid, 2, 2, 2, 8, 8), square(grid, 2, 5, 5, 11, 11)
    for contours, words in (
        ([contour(first), contour(second)], "cross or repeat"),
        ([contour(first), contour(first)], "cross or repeat"),
        ([contour(first, kind="OPEN_PLANAR")], "open lines"),
        ([contour(square(grid, k, 2, 2, 8, 8)) for k in (0, 2, 4)], "every second slice"),
        ([contour(first[:0])], "damaged"),
        ([contour(np.tile(first, (5001, 1)))], "more than 20000 points"),
        ([contour(first)] * 501, "more than 500 contours"),
        ([contour(first * np.nan)], "damaged"),
    ):
        with pytest.raises(DataError, match=words):
            read_structures(structures([("liver", "", contours)]), grid, SCHEMA)
    dash = [contour(at(grid, [(2, 3, 4), (2, 3, 6)])), contour(at(grid, [(2, 9, 9)]))]  # as written for single voxels
    assert (read_structures(structures([("liver", "", dash)]), grid, SCHEMA).array == 1).sum() == 4
    apart = structures([("liver", "", [contour(square(grid, k, 2, 2, 8, 8)) for k in (0, 1, 4)])])
    assert read_structures(apart, grid, SCHEMA).array.any()
    crossing = [contour(p, kind="CLOSEDPLANAR_XOR") for p in (first, second)]
    assert read_structures(structures([("liver", "", crossing)]), grid, SCHEMA).array.any()


def test_damage_is_a_data_error(structures):
    grid = stack()

    def lost(ds):
        del ds.StructureSetROISequence

    def doubled(ds):
        ds.StructureSetROISequence.append(ds.StructureSetROISequence[0])

    def stranger(ds):
        ds.ROIContourSequence[0].ReferencedROINumber = 7

    def count(ds):
        ds.ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints = 9

    def nothing(ds):
        del ds.ROIContourSequence[0].ContourSequence[0].ContourData

    for spoil in (lost, doubled, stranger, count, nothing):
        ds = structures([("liver", "", [contour(square(grid, 2, 2, 2, 5, 5))])])
        spoil(ds)
        with pytest.raises(DataError, match="damaged"):
            read_structures(ds, grid, SCHEMA)
