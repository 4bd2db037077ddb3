from __future__ import annotations

from pydicom.dataset import Dataset

from deid_tools.moments import Moment, moment, number_volumes


def test_time_points_are_ranked_at_each_place():
    found = {(z, t): Moment(str(z), "a", "k", f"2020010110{t * 3 + z:02d}00") for z in range(3) for t in range(2)}
    assert number_volumes(found) == {(z, t): t + 1 for z in range(3) for t in range(2)}


def test_a_plain_series_is_not_numbered():
    assert number_volumes({z: Moment(str(z), "a", "k", "") for z in range(3)}) == {}


def test_kinds_are_numbered_apart_even_where_their_times_cross():
    times = {("x", 0): "1", ("y", 0): "2", ("x", 1): "4", ("y", 1): "3"}
    found = {(kind, z): Moment(str(z), "a", kind, t) for (kind, z), t in times.items()}
    numbers = number_volumes(found)
    assert {numbers["x", 0], numbers["x", 1]} == {1}
    assert {numbers["y", 0], numbers["y", 1]} == {2}


def test_in_doubt_nothing_is_numbered():
    even = {(z, t): Moment(str(z), "a", "k", f"{t}") for z in range(3) for t in range(2)}
    assert number_volumes({**even, (2, 1): Moment("2", "a", "k", "0")}) == {}
    assert number_volumes({key: m for key, m in even.items() if key != (2, 1)}) == {}
    assert number_volumes({**even, (2, 1): None}) == {}
    assert number_volumes({key: Moment(m.place, "a", "k", "") for key, m in even.items()}) == {}


def test_a_moment_shows_no_text_and_a_damaged_header_has_none():
    ds = Dataset()
    assert moment(ds) is None
    ds.Rows, ds.Columns, ds.PixelSpacing = 4, 4, [1, 1]
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    ds.SequenceName, ds.AcquisitionDate, ds.AcquisitionTime = "doe_jane", "20200101", "101500"
    found = moment(ds)
    assert found is not None
    assert found.time == "20200101101500#000000000000"
    assert "doe" not in "".join((found.place, found.apart, found.kind))
    assert "2020" not in repr(found)
