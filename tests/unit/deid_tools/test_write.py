from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.series import build_scan
from deid_tools.write import write_synthetic_series
from medlsdm.errors import DataError, GeometryError, NotSyntheticError
from medlsdm.types import SYNTHESIS_SEAL, Geometry, Modality, Provenance, Scan, SyntheticVolume
from medlsdm.volumes import read_nifti, to_ras

OBLIQUE = np.array([[0.9, 0.1, 0.0, -20.0], [-0.1, 0.9, 0.0, 3.0], [0.0, 0.0, 2.5, 7.0], [0.0, 0.0, 0.0, 1.0]])


def synthetic(modality: Modality = Modality.CT, affine: np.ndarray = OBLIQUE) -> SyntheticVolume:
    geometry = Geometry(affine, (14, 12, 6))
    array = np.random.default_rng(3).normal(40, 300, geometry.shape).astype(np.float32)
    provenance = Provenance("a" * 64, "b" * 64, "c" * 64, 3)
    return SyntheticVolume(array, geometry, modality, provenance, seal=SYNTHESIS_SEAL)


@pytest.mark.parametrize("modality", list(Modality))
def test_what_is_written_reads_back(tmp_path, modality):
    volume = synthetic(modality)
    paths = write_synthetic_series(volume, tmp_path / "out")
    assert len(paths) == 6
    scan = build_scan([pydicom.dcmread(p) for p in paths], "P")
    step = float(pydicom.dcmread(paths[0]).get("RescaleSlope", 1))
    assert np.abs(scan.array - volume.array).max() <= 0.51 * step
    assert scan.geometry.matches(volume.geometry, 1e-3)


def test_every_image_says_synthetic(tmp_path):
    first, second = (write_synthetic_series(synthetic(), tmp_path / name)[0] for name in "ab")
    ds, other = pydicom.dcmread(first), pydicom.dcmread(second)
    assert ds["SyntheticData"].value == "YES"
    assert str(ds.PatientName).startswith("SYNTHETIC^")
    assert ds.PatientID.startswith("SYN-")
    assert list(ds.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert ds.BurnedInAnnotation == ds.RecognizableVisualFeatures == "NO"
    assert ds.SeriesDescription == "SYNTHETIC"
    equipment = ds.ContributingEquipmentSequence[0]
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        assert ds[keyword].value != other[keyword].value


def test_a_scan_is_never_exported(tmp_path):
    volume = synthetic()
    scan = Scan(volume.array, volume.geometry, Modality.CT, "P-1")
    with pytest.raises(NotSyntheticError):
        write_synthetic_series(scan, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_refuses_a_sheared_grid_a_full_folder_and_a_long_description(tmp_path):
    sheared = OBLIQUE.copy()
    sheared[1, 2] = 0.7
    with pytest.raises(GeometryError, match="sheared"):
        write_synthetic_series(synthetic(affine=sheared), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DataError, match="already holds"):
        write_synthetic_series(synthetic(), tmp_path / "full")
    with pytest.raises(DataError, match="64"):
        write_synthetic_series(synthetic(), tmp_path / "out", description="x" * 65)


@pytest.mark.parametrize("modality", [Modality.CT, Modality.MR])
def test_dcm2niix_reads_the_same_volume(tmp_path, modality):
    volume = synthetic(modality)
    paths = write_synthetic_series(volume, tmp_path / "dicom")
    command = [
        str(Path(sysconfig.get_path("scripts")) / "dcm2niix"),
        "-b",
        "n",
        "-z",
        "n",
        "-f",
        "x",
        "-o",
        str(tmp_path),
        str(tmp_path / "dicom"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    array, geometry = to_ras(*read_nifti(tmp_path / "x.nii"))
    step = float(pydicom.dcmread(paths[0]).get("RescaleSlope", 1))
    assert geometry.matches(volume.geometry, 1e-2)
    assert np.abs(array - volume.array).max() <= 0.51 * step + 1e-3


def test_importing_the_package_leaves_torch_and_flwr_out():
    code = (
        "import sys, deid_tools.pipeline, deid_tools.write, deid_tools.cli, deid_tools.plant;"
        "print([m for m in ('torch', 'flwr', 'highdicom', 'deid') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
