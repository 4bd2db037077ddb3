"""What a NIfTI file of ours may hold: array and affine. Checked on its bytes, not by the library that wrote it."""

from __future__ import annotations

import ast
import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlsdm.types import Geometry
from medlsdm.volumes import from_ras, read_nifti, to_ras, write_nifti

REPO = Path(__file__).parents[2]
SECRETS = [b"Annegret", b"MRN4477881", b"KLINIKUMWEST", b"Scanner7", b"2011-02-03", b"ZOLLERAU"]
# Offset and length of every field that geometry and data type need (nifti1.h); all other bytes must be zero.
NEEDED = {
    "sizeof_hdr": (0, 4),
    "dim": (40, 16),
    "datatype, bitpix": (70, 4),
    "pixdim": (76, 32),
    "vox_offset": (108, 4),
    "scl_slope, scl_inter": (112, 8),
    "xyzt_units": (123, 1),
    "qform_code to srow_z": (252, 76),
    "magic": (344, 4),
}


def planted(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file with something of the patient in every place that can hold it."""
    image = nib.Nifti1Image(array, affine)
    header = image.header
    header["descrip"], header["aux_file"], header["intent_name"] = SECRETS[0], SECRETS[1], SECRETS[2]
    header["db_name"], header["data_type"] = SECRETS[3], SECRETS[5][:8]
    header["cal_max"], header["cal_min"], header["toffset"], header["slice_duration"] = 77, 66, 55, 44
    header["intent_code"], header["intent_p1"], header["dim_info"] = 1007, 33, 57
    header["session_error"], header["extents"], header["glmax"] = 11, 22, 44
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRETS[4]))
    content = image.to_bytes() + b"trailing " + SECRETS[1]
    with path.open("wb") as stream, gzip.GzipFile("Annegret.nii", "wb", fileobj=stream, mtime=1_300_000_000) as packed:
        packed.write(content)


def check(path: Path, shape: tuple[int, ...], item_bytes: int) -> None:
    raw = path.read_bytes()
    assert raw[:2] == b"\x1f\x8b"
    assert raw[3] == 0, "gzip: a name, a comment or an extra field"
    assert raw[4:8] == b"\0" * 4, "gzip: a time"
    content = gzip.decompress(raw)
    assert len(content) == 352 + int(np.prod(shape)) * item_bytes
    rest = bytearray(content[:352])
    for start, length in NEEDED.values():
        rest[start : start + length] = b"\0" * length
    assert not any(rest), [k for k, byte in enumerate(rest) if byte]
    assert struct.unpack("<f", content[108:112]) == (352.0,)
    assert struct.unpack("<8h", content[40:56])[:4] == (3, *shape)
    assert not [s for s in SECRETS if s in content or s in raw]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_nothing_but_array_and_affine_is_written(tmp_path, dtype):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    affine = np.array([[-1.1, 0.1, 0, 20], [0.1, 1.0, 0.2, -7], [0, -0.2, 3.0, 5], [0, 0, 0, 1]])
    planted(tmp_path / "in.nii.gz", array, affine)
    assert any(s in gzip.decompress((tmp_path / "in.nii.gz").read_bytes()) for s in SECRETS)
    found, geometry = read_nifti(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(found, array)
    write_nifti(tmp_path / "out.nii.gz", found, geometry)
    check(tmp_path / "out.nii.gz", array.shape, found.dtype.itemsize)
    again, same = read_nifti(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(again, array)
    assert same.matches(geometry)
    np.testing.assert_array_equal(from_ras(to_ras(again, same)[0], same), array)


def test_equal_volumes_give_equal_bytes(tmp_path):
    geometry = Geometry(np.diag([1.0, 2.0, 3.0, 1.0]), (3, 4, 5))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, np.ones((3, 4, 5), np.uint8), geometry)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.usefixtures("without_tesseract")
def test_a_label_map_of_a_hospital_comes_out_bare(tmp_path):
    from deid_tools.keys import SiteKeys
    from deid_tools.pipeline import deidentify
    from deid_tools.plant import write_planted_study
    from deid_tools.verify import verify_folder
    from medlsdm.types import LabelClass, LabelSchema, Modality, SemanticMap

    schema = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004")))
    geometry = Geometry(np.diag([1.0, 1.0, 2.0, 1.0]), (12, 10, 5))
    values = np.zeros(geometry.shape, np.uint8)
    values[3:6, 3:6, 1:4] = 1
    source = tmp_path / "in"
    labels = SemanticMap(values, geometry, schema)
    write_planted_study(values * 100.0, geometry, Modality.CT, labels, source, seed=1, hospital="West")
    next(source.rglob("*SEG.dcm")).unlink()
    planted(
        source / "Annegret.nii.gz", values[::-1], np.array([[-1.0, 0, 0, 11], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    )
    report = deidentify(source, tmp_path / "out", SiteKeys.derive(bytes(32), "x"), schema=schema)
    assert [s.labels for s in report.series] == [1], report.reasons()
    (written,) = (tmp_path / "out").rglob("labels.nii.gz")
    check(written, geometry.shape, 2)
    assert verify_folder(tmp_path / "out") == []
    longer = gzip.compress(gzip.decompress(written.read_bytes()) + b"Annegret", mtime=0)
    written.write_bytes(longer)
    assert [f.reason for f in verify_folder(tmp_path / "out")] == [
        "bytes follow the voxels",
        "the voxels are longer or shorter than declared",
    ]


def test_nifti_is_written_in_one_place():
    writers = {"Nifti1Image", "Nifti2Image", "save", "to_filename", "to_bytes", "Nifti1Pair"}
    found = set()
    for package in ("medlsdm", "deid_tools", "node/medlsdm_node", "server/medlsdm_server"):
        for path in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                    owner = ast.unparse(node.func.value)
                    if owner in ("nib", "nibabel", "nib.nifti1", "image") and node.func.attr != "from_filename":
                        found.add(path.relative_to(REPO).as_posix())
    assert found - {"deid_tools/answers.py"} == {"medlsdm/volumes.py"}  # the planter hides identifiers on purpose
