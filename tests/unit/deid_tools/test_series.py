from __future__ import annotations

import copy
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from deid_tools.admit import IMAGE_CLASSES
from deid_tools.instances import cut, images
from deid_tools.modules import save_clean
from deid_tools.pixels import TextSearch
from deid_tools.segmentations import read_segmentation
from deid_tools.series import build_scan, build_scans, plan_series
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality

CLEAN = [
    "ct-philips-phantom",
    "mr-siemens-prone",
    "mr-siemens-brain",
    "mr-hippocampus-crops/study2",
    "ct-liver-seg/ct-3slice",
]


def series(modality: Modality = Modality.CT) -> list[Dataset]:
    geometry = Geometry(np.diag([0.8, 0.8, 2.0, 1.0]), (12, 10, 6))
    array = np.arange(720, dtype=np.float32).reshape(geometry.shape)
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}
    found = list(images(cut(array, geometry), modality, uids))
    for ds in found:
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    return found


def move(ds: Dataset, x: float, y: float, z: float) -> None:
    ds.ImagePositionPatient = [float(v) + d for v, d in zip(ds.ImagePositionPatient, (x, y, z), strict=True)]


def test_order_in_the_folder_does_not_matter():
    straight = build_scan(series(), "P")
    mixed = build_scan([series()[i] for i in (3, 0, 5, 1, 4, 2)], "P")
    np.testing.assert_array_equal(straight.array, mixed.array)
    np.testing.assert_array_equal(straight.array, np.arange(720).reshape(12, 10, 6))
    assert straight.geometry.orientation == "RAS"


def test_refuses_a_gap_between_slices():
    found = series()
    del found[2]
    with pytest.raises(GeometryError, match="missing: 1"):
        plan_series(found)


def test_drops_an_equal_copy_and_refuses_a_differing_one():
    found = series()
    copied = build_scan([*found, copy.deepcopy(found[2])], "P")
    np.testing.assert_array_equal(copied.array, build_scan(series(), "P").array)
    assert "left out: 1" in plan_series([*found, copy.deepcopy(found[2])]).notes[0]
    other = copy.deepcopy(found[2])
    other.PixelData = other.PixelData[2:] + b"\1\0"
    with pytest.raises(GeometryError, match="one position"):
        plan_series([*found, other])
    rescaled = copy.deepcopy(found[2])
    rescaled.RescaleSlope = 2
    with pytest.raises(GeometryError, match="one position"):
        plan_series([*found, rescaled])


def test_refuses_a_shear_that_no_gantry_makes():
    found = series()
    for k, ds in enumerate(found):
        move(ds, 0, 2.5 * k, 0)
    with pytest.raises(GeometryError, match="which no gantry is"):
        plan_series(found)


def test_several_volumes_are_built_one_by_one_and_never_stacked():
    echoes = []
    for n, ds in enumerate([*series(), *series()]):
        ds.EchoTime = 10 if n < 6 else "20.0"
        ds.RescaleSlope = 1 if n < 6 else 3
        echoes.append(ds)
    with pytest.raises(GeometryError, match=r"not one volume.*differ in echo"):
        plan_series(echoes)
    first, second = build_scans(echoes[::-1], "P")
    assert first.scan is not None
    assert second.scan is not None
    np.testing.assert_array_equal(first.scan.array, 3 * second.scan.array)
    assert (first.number, first.of, first.alone, first.refusal) == (1, 2, False, "")


def test_a_good_volume_survives_a_bad_one_beside_it():
    echoes = []
    for n, ds in enumerate([*series(), *series()]):
        ds.EchoTime = 10 if n < 6 else 20
        echoes.append(ds)
    del echoes[8]
    good, bad = build_scans(echoes, "P")
    assert good.scan is not None
    assert bad.scan is None
    assert "missing: 1" in bad.refusal


def test_memory_holds_the_volume_and_a_few_slices(tmp_path):
    geometry = Geometry(np.diag([0.8, 0.8, 2.0, 1.0]), (200, 180, 90))
    array = np.random.default_rng(0).integers(-1000, 1000, geometry.shape).astype(np.int16)
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}
    paths = [tmp_path / f"{k}.dcm" for k in range(90)]
    for path, ds in zip(paths, images(cut(array, geometry), Modality.CT, uids), strict=True):
        save_clean(ds, path)
    build_scan(paths[:2], "P")  # what is imported once is not the volume's
    tracemalloc.start()
    scan = build_scan(paths, "P")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = 200 * 180 * 4
    assert peak < 90 * one + 24 * one + 2_000_000
    np.testing.assert_array_equal(scan.array, array)


def test_refuses_uneven_spacing():
    found = series()
    for ds in found[3:]:
        move(ds, 0, 0, 0.3)
    with pytest.raises(GeometryError, match="unevenly"):
        plan_series(found)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("ImageOrientationPatient", [0, 1, 0, 1, 0, 0], "orientation"),
        ("PixelSpacing", [0.8, 0.9], "pixel spacing"),
        ("Rows", 9, "rows or columns"),
        ("EchoTime", 30.0, "echo"),
        ("TemporalPositionIdentifier", 2, "time point"),
        ("DiffusionBValue", 800.0, "b-value"),
    ],
)
def test_refuses_slices_that_differ(keyword, value, reason):
    found = series()
    setattr(found[2], keyword, value)
    with pytest.raises(GeometryError, match=reason):
        plan_series(found)


def test_refuses_a_single_slice_and_a_slice_without_position():
    with pytest.raises(GeometryError, match="single slice"):
        plan_series(series()[:1])
    found = series()
    del found[1].ImagePositionPatient
    with pytest.raises(GeometryError, match="missing"):
        plan_series(found)


def test_each_slice_has_its_own_rescale():
    found = series()
    found[2].RescaleSlope, found[2].RescaleIntercept = 2, -5
    expected = np.arange(720).reshape(12, 10, 6).astype(np.float32)
    expected[..., 2] = expected[..., 2] * 2 - 5
    np.testing.assert_array_equal(build_scan(found, "P").array, expected)


def test_pet_that_is_not_suv_is_refused():
    found = series(Modality.PT)
    assert build_scan(found, "P").modality is Modality.PT
    found[0].Units = "BQML"
    with pytest.raises(DataError, match="SUV"):
        build_scan(found, "P")
    found[0].Units, found[0].SUVType = "GML", "LBM"
    with pytest.raises(DataError, match="body weight"):
        build_scan(found, "P")


def real(folder: Path) -> list[Dataset]:
    found = [pydicom.dcmread(p) for p in sorted(folder.iterdir()) if p.is_file()]
    return [ds for ds in found if ds.get("SOPClassUID") in IMAGE_CLASSES]


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reads_an_enhanced_series_of_one_file(data):
    first = min((data / "dicom" / "mr-enhanced" / "Siemens" / "XA10").iterdir())
    scan = build_scan([pydicom.dcmread(first)], "P")
    assert scan.array.shape == (64, 64, 6)
    assert scan.geometry.spacing[2] == pytest.approx(2.4, abs=1e-3)


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_liver_lands_on_its_voxels(data):
    folder = data / "dicom" / "ct-liver-seg"
    schema = LabelSchema("l", (LabelClass(0, "background"), LabelClass(1, "hepar", "10200004")))
    scan = build_scan(real(folder / "ct-3slice"), "P")
    labels = read_segmentation(pydicom.dcmread(folder / "liver.dcm"), scan.geometry, schema)
    assert int((labels.array == 1).sum()) == 107_098
    assert scan.array[labels.array == 1].mean() == pytest.approx(37, abs=1)
    affine = scan.geometry.affine.copy()
    affine[0, 3] += 0.4
    moved = Geometry(affine, scan.geometry.shape)
    with pytest.raises(GeometryError, match="voxels"):
        read_segmentation(pydicom.dcmread(folder / "liver.dcm"), moved, schema)


@pytest.mark.real_data
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_burned_in_text_is_found_and_clean_series_raise_no_alarm(data):
    if not shutil.which("tesseract"):
        pytest.skip("tesseract is not installed")
    for name in CLEAN:
        search = TextSearch()
        for ds in real(data / "dicom" / name):
            search.add(ds.pixel_array[None])
        assert not search.found(), name
    for ds in real(data / "dicom" / "burned-in"):
        search = TextSearch()
        search.add(ds.pixel_array[None])
        assert search.found()
