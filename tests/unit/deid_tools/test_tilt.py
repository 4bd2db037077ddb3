from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from scipy import ndimage

from deid_tools.instances import cut, images
from deid_tools.series import build_scan, plan_series
from deid_tools.tilt import shift_slice
from medlsdm.types import Geometry, Modality

UIDS = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}


def tilted(drift: tuple[float, float]) -> tuple[list[Dataset], np.ndarray, Geometry]:
    """Return a series whose slices drift by (x, y) mm each, its values, and its sheared grid."""
    geometry = Geometry(np.diag([0.8, 0.9, 2.0, 1.0]), (18, 16, 7))
    array = np.random.default_rng(0).integers(-500, 500, geometry.shape).astype(np.float32)
    found = list(images(cut(array, geometry), Modality.CT, UIDS))
    for k, ds in enumerate(found):
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x - drift[0] * k, y - drift[1] * k, z]  # LPS
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    affine = geometry.affine.copy()
    affine[:2, 2] += drift
    return found, array, Geometry(affine, geometry.shape)


@pytest.mark.parametrize("drift", [(0.0, 0.7), (0.0, -0.63), (0.5, 0.0), (-0.4, 0.6)])
def test_every_voxel_is_where_an_affine_resampler_finds_it(drift):
    found, array, sheared = tilted(drift)
    scan = build_scan(found, "P")
    grid = np.stack([*np.indices(scan.geometry.shape).astype(float), np.ones(scan.geometry.shape)]).reshape(4, -1)
    index = (np.linalg.inv(sheared.affine) @ scan.geometry.affine @ grid)[:3].T
    last = np.array(array.shape) - 1
    inside = ((index > -1e-3) & (index < last + 1e-3)).all(axis=1)
    expected = ndimage.map_coordinates(array, np.clip(index[inside], 0, last).T, order=1)
    np.testing.assert_allclose(scan.array.ravel()[inside], expected, atol=1e-2)
    assert (scan.array.ravel()[~inside] == scan.array.min()).all()
    assert 0.6 < inside.mean() < 1
    directions = scan.geometry.affine[:3, :3] / scan.geometry.spacing
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)


def test_the_whole_of_every_slice_stays_inside():
    found, array, sheared = tilted((0.0, -0.63))
    scan = build_scan(found, "P")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in array.shape], [1])).reshape(4, -1)
    index = np.linalg.inv(scan.geometry.affine) @ sheared.affine @ corners
    assert (index[:3].min(axis=1) > -1e-3).all()
    assert (index[:3].max(axis=1) < np.array(scan.geometry.shape) - 1 + 1e-3).all()


def test_a_tilt_is_said_with_its_angle():
    found, _, _ = tilted((0.0, 0.7))
    (note,) = plan_series(found).notes
    assert note.startswith(f"a tilt of {np.degrees(np.arctan2(0.7, 2.0)):.1f} degrees was sheared right")


def test_a_whole_shift_moves_values_without_changing_them():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    moved = shift_slice(values, np.array([2.0, 0.0]), (5, 4), -1)
    np.testing.assert_array_equal(moved[2:], values)
    assert (moved[:2] == -1).all()


def test_padding_is_never_mixed_with_values():
    values = np.array([[-2000.0], [-2000.0], [0.0], [100.0]], np.float32)
    moved = shift_slice(values, np.array([0.25, 0.0]), (5, 1), np.nan, -2000)
    np.testing.assert_array_equal(moved[:, 0], [np.nan, -2000, 0, 75, np.nan])
    mixed = shift_slice(values, np.array([0.25, 0.0]), (5, 1), np.nan)
    np.testing.assert_array_equal(mixed[:, 0], [np.nan, -2000, -500, 75, np.nan])
