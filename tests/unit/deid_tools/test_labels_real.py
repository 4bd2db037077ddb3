"""Labels on real data: by Hounsfield units, and voxel by voxel against rt-utils, highdicom and nibabel."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from deid_tools.contours import read_structures
from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.polygons import fill
from deid_tools.segmentations import read_segmentation
from deid_tools.series import plan_series
from medlsdm.errors import DataError
from medlsdm.types import LabelClass, LabelSchema
from medlsdm.volumes import from_ras

pytestmark = [
    pytest.mark.usefixtures("without_tesseract"),
    pytest.mark.real_data,
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LIVER = LabelSchema("l", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004")))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def read_images(folder: Path) -> list[pydicom.FileDataset]:
    found = [pydicom.dcmread(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".gz"]
    return [ds for ds in found if "ImagePositionPatient" in ds]


def stacked(mask: np.ndarray, datasets: list, plan) -> np.ndarray:
    """Bring a mask of rt-utils [row, column, slice by position] to [slice, row, column] of our plan."""
    normal = np.cross(plan.frames[0].orientation[:3], plan.frames[0].orientation[3:])
    order = sorted(range(len(datasets)), key=lambda k: normal @ [float(v) for v in datasets[k].ImagePositionPatient])
    assert [frame.source for frame in plan.frames] == order
    return np.moveaxis(mask, 2, 0)


def test_a_segmentation_lands_on_the_liver(data, tmp_path, keys):
    source = tmp_path / "in"
    shutil.copytree(data / "dicom" / "ct-liver-seg", source)
    (source / "partial_overlaps.dcm").unlink()
    report = deidentify(source, tmp_path / "out", keys, schema=LIVER)
    assert report.held == ()
    (pair,) = read_pairs(tmp_path / "out", LIVER)
    assert pair.scan is not None
    assert pair.labels is not None
    inside = pair.scan.array[pair.labels.array == 1]
    assert inside.size == 107_098
    assert inside.mean() == pytest.approx(37, abs=1)
    assert np.median(inside) > 30


def test_overlapping_segments_go_by_the_declared_priority(data):
    folder = data / "dicom" / "ct-liver-seg"
    plan = plan_series(read_images(folder / "ct-3slice"))
    ds = pydicom.dcmread(folder / "partial_overlaps.dcm")
    names = ["tissue", "artery", "capillary", "edema", "vein"]
    codes = ["85756007", "51114001", "20982000", "79654002", "29092000"]
    classes = [
        LabelClass(0, "background"),
        *(LabelClass(k + 1, n, c) for k, (n, c) in enumerate(zip(names, codes, strict=True))),
    ]
    schema = LabelSchema("overlaps", tuple(classes))
    with pytest.raises(DataError, match="overlap"):
        read_segmentation(ds, plan.canonical, schema)
    pixels = ds.pixel_array.astype(bool)
    masks = np.zeros((6, *plan.geometry.shape), bool)
    for values, group in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
        z = float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        (k,) = [i for i, frame in enumerate(plan.frames) if abs(frame.position[2] - z) < 0.01]
        masks[int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber), k] |= values
    assert (masks.sum(axis=0) > 1).any()
    for priority in (names, names[::-1]):
        expected = np.zeros(plan.geometry.shape, int)
        for name in priority[::-1]:
            expected[masks[names.index(name) + 1]] = names.index(name) + 1
        found = read_segmentation(ds, plan.canonical, replace(schema, priority=tuple(priority))).array
        np.testing.assert_array_equal(from_ras(found, plan.geometry), expected)


def test_the_real_structure_set_agrees_with_rt_utils(data, tmp_path, keys):
    rt_utils = pytest.importorskip("rt_utils")
    folder = data / "dicom" / "ct-rtstruct"
    schema = LabelSchema("r", (LabelClass(0, "background"), LabelClass(1, "phantom", aliases=("ROI-1",))))
    report = deidentify(folder, tmp_path / "out", keys, schema=schema)
    assert report.held == ()
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.labels is not None
    datasets = read_images(folder)
    plan = plan_series(datasets)
    ours = from_ras(pair.labels.array, plan.geometry) == 1
    book = rt_utils.RTStructBuilder.create_from(dicom_series_path=str(folder), rt_struct_path=str(folder / "rt.dcm"))
    theirs = stacked(book.get_roi_mask_by_name("ROI-1"), datasets, plan)
    assert theirs.sum() == 1660
    # rt-utils rounds a contour's corners to whole pixels; with corners so rounded, ours is the same to the voxel.
    rounded = read_structures(_rounded(pydicom.dcmread(folder / "rt.dcm"), plan), plan.geometry, schema)
    np.testing.assert_array_equal(from_ras(rounded.array, plan.geometry) == 1, theirs)
    assert dice(ours, theirs) > 0.9
    spacing = float(np.prod(plan.frames[0].spacing))
    area = _area_with_hole(pydicom.dcmread(folder / "rt.dcm"))
    assert ours.sum() * spacing == pytest.approx(area, rel=0.03)
    assert abs(ours.sum() * spacing - area) < abs(theirs.sum() * spacing - area)


def _rounded(ds, plan):
    from deid_tools.series import lps_to_ras

    to_patient = lps_to_ras(plan.affine)
    for contour in ds.ROIContourSequence[0].ContourSequence:
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        index = np.linalg.inv(to_patient) @ np.c_[points, np.ones(len(points))].T
        contour.ContourData = [round(v, 6) for v in (to_patient @ np.round(index))[:3].T.ravel().tolist()]
    return ds


def _area_with_hole(ds) -> float:
    """Return the area in mm2 between the structure's two contours on its slice, by the shoelace formula."""
    areas = []
    for contour in ds.ROIContourSequence[0].ContourSequence:
        x, y, _ = np.array(contour.ContourData, float).reshape(-1, 3).T
        areas.append(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
    outer, hole = sorted(areas, reverse=True)
    return outer - hole


@pytest.mark.parametrize("name", ["ct-philips-phantom", "mr-hippocampus-crops/study2"])
def test_masks_that_rt_utils_draws_come_back_voxel_by_voxel(data, tmp_path, name):
    rt_utils = pytest.importorskip("rt_utils")
    folder = tmp_path / "series"
    shutil.copytree(data / "dicom" / name, folder)
    datasets = read_images(folder)
    plan = plan_series(datasets)
    stack = np.stack([datasets[f.source].pixel_array * f.slope + f.intercept for f in plan.frames])
    stack = ndimage.gaussian_filter(stack, (0, 1.5, 1.5))
    mask = stack > np.percentile(stack, 90)
    mask &= np.arange(len(stack))[:, None, None] < 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        book = rt_utils.RTStructBuilder.create_new(dicom_series_path=str(folder))
        book.add_roi(mask=np.moveaxis(mask, 0, 2), name="bright")
        book.save(str(tmp_path / "rt.dcm"))
        again = rt_utils.RTStructBuilder.create_from(str(folder), str(tmp_path / "rt.dcm"))
        theirs = stacked(again.get_roi_mask_by_name("bright"), datasets, plan)
    assert mask.sum() > 500
    ds = pydicom.dcmread(tmp_path / "rt.dcm")
    images = {str(datasets[frame.source].SOPInstanceUID): k for k, frame in enumerate(plan.frames)}
    schema = LabelSchema("b", (LabelClass(0, "background"), LabelClass(1, "bright")))
    ours = from_ras(read_structures(ds, plan.geometry, schema, slice_of=images).array, plan.geometry) == 1
    assert dice(ours, mask) > 0.999
    if stack.shape[1] == stack.shape[2]:  # rt-utils reads images that are not square with rows and columns swapped
        np.testing.assert_array_equal(ours, theirs)


def test_nifti_labels_of_organs_have_the_right_hounsfield_units(organ_ct, tmp_path, keys):
    """TotalSegmentator's sample: labels in another axis order than the CT; organs by their HU."""
    schema = LabelSchema("organs", tuple(LabelClass(k, f"organ {k}") for k in range(120)))
    deidentify(organ_ct, tmp_path / "out", keys, schema=schema)
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.scan is not None
    assert pair.labels is not None
    means = {int(v): float(pair.scan.array[pair.labels.array == v].mean()) for v in np.unique(pair.labels.array)}
    assert all(m > 100 for v, m in means.items() if 26 <= v <= 50 or 92 <= v <= 115), "vertebrae and ribs"
    assert all(-20 < means[v] < 200 for v in (1, 5) if v in means), "spleen and liver"


def test_fill_of_a_whole_structure_set_is_quick():
    """Thirty slices of 512 x 512 with an organ of 200 points each take less than three seconds."""
    import time

    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    outline = np.stack([256.3 + 90 * np.sin(angles), 251.2 + 120 * np.cos(angles)], axis=1)
    start = time.process_time()
    for _ in range(30):
        assert fill([outline], (512, 512)).sum() == pytest.approx(np.pi * 90 * 120, rel=0.01)
    assert time.process_time() - start < 3
