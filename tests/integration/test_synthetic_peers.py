"""Synthetic DICOM in the hands of others: dciodvfy and dcentvfy find it valid, Orthanc and dcm2niix read it."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.funcs import as_closest_canonical

from deid_tools.write import write_synthetic_series
from medlsdm.types import SYNTHESIS_SEAL, Geometry, Modality, Provenance, SyntheticVolume

from .conftest import need
from .peers import orthanc, rest

pytestmark = pytest.mark.peers
NEWER_THAN_THE_CHECKER = "(0x0008,0x001c)"
TURNED = np.array([[0.8, 0.1, 0.0, -9.0], [-0.1, 0.8, 0.0, 4.0], [0.0, 0.0, 2.5, -30.0], [0.0, 0.0, 0.0, 1.0]])


def series(folder: Path, modality: Modality) -> tuple[SyntheticVolume, list[Path]]:
    """Write a smooth volume of a modality on a grid that is turned in its plane."""
    rng = np.random.default_rng(2)
    low = 0.0 if modality is Modality.PT else -800.0
    array = (low + 900 * rng.random((24, 18, 9))).round(1).astype(np.float32)
    provenance = Provenance("a", "b", "c", 1)
    volume = SyntheticVolume(array, Geometry(TURNED, array.shape), modality, provenance, seal=SYNTHESIS_SEAL)
    return volume, write_synthetic_series(volume, folder)


@pytest.mark.parametrize("modality", list(Modality))
def test_the_checkers_of_form_and_of_series_find_no_error(tmp_path, modality):
    need("dciodvfy", "dcentvfy")
    _, paths = series(tmp_path / "out", modality)
    for path in paths:
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).splitlines()
        assert [line for line in said if line.startswith("Error") and NEWER_THAN_THE_CHECKER not in line] == []
    done = subprocess.run(["dcentvfy", *map(str, paths)], capture_output=True, text=True, check=False)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line] == []


@pytest.mark.parametrize("modality", list(Modality))
def test_dcm2niix_reads_the_same_volume(tmp_path, modality):
    program = Path(sysconfig.get_path("scripts")) / "dcm2niix"
    volume, paths = series(tmp_path / "in", modality)
    (tmp_path / "out").mkdir()
    command = [str(program), "-b", "n", "-z", "n", "-f", "x", "-o", str(tmp_path / "out"), str(tmp_path / "in")]
    subprocess.run(command, capture_output=True, check=True)
    (written,) = (tmp_path / "out").glob("*.nii")
    found = as_closest_canonical(nib.Nifti1Image.from_filename(written))
    np.testing.assert_allclose(found.affine, volume.geometry.affine, atol=1e-4)
    step = max(float(pydicom.dcmread(path).get("RescaleSlope", 1)) for path in paths)
    np.testing.assert_allclose(np.asarray(found.dataobj), volume.array, rtol=1e-5, atol=0.501 * step)


def test_orthanc_takes_it_in_and_shows_it(tmp_path, network):
    with orthanc(tmp_path, network, 1, {}):
        for modality in Modality:
            _, paths = series(tmp_path / modality.value, modality)
            for path in paths:
                answer = rest(network, "instances", "--data-binary", f"@{path}")
                assert isinstance(answer, dict)
                assert answer["Status"] == "Success"
        kept = rest(network, "series?expand")
        assert isinstance(kept, list)
        assert sorted(s["MainDicomTags"]["Modality"] for s in kept) == ["CT", "MR", "PT"]
        assert [len(s["Instances"]) for s in kept] == [9, 9, 9]
        for one in kept:
            picture = subprocess.run(
                [*network, "curl", "-sf", f"http://127.0.0.1:18042/instances/{one['Instances'][4]}/preview"],
                capture_output=True,
                check=True,
            )
            assert picture.stdout.startswith(b"\x89PNG")
