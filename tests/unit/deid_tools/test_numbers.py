"""Identifiers that travel as numbers: planted through the whole pipeline, searched in the raw bytes of the output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from deid_tools.admit import read_strict
from deid_tools.headers import HeaderCleaner
from deid_tools.pipeline import deidentify
from deid_tools.recipes import load_recipe
from deid_tools.treatment import PixelPolicy

pytestmark = pytest.mark.usefixtures("without_tesseract")
SECRET = b"DOE^JANE"
BASIC = load_recipe("basic", ["safe-private"])


def series(edit, folder: Path) -> Path:
    """Write three CT slices, each changed by ``edit``."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{k + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3.4", "1.2.3.5", "1.2.3.6"
        ds.Modality, ds.PatientID, ds.PatientName = "CT", "Q7001", "Zzyzx^Quentin"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.5 * k], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [1, 1], 2.5
        ds.Rows = ds.Columns = 16
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.RescaleSlope, ds.RescaleIntercept, ds.KVP = 1, -1024, 120
        ds.PixelData = rng.integers(0, 2000, (16, 16), np.uint16).tobytes()
        edit(ds)
        ds.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder


def raw(ds: Dataset, tag: int, vr: str, value: bytes) -> None:
    ds._dict[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)


def private(vr: str, value: bytes):
    def edit(ds):
        ds.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        raw(ds, 0x0019100C, vr, value)

    return edit


def setting(**values):
    def edit(ds):
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return edit


def output(edit, tmp_path, keys, recipe=BASIC) -> tuple[bytes, int]:
    source = series(edit, tmp_path / "in")
    report = deidentify(source, tmp_path / "out", keys, recipe=recipe, policy=PixelPolicy(faces=False))
    written = sorted((tmp_path / "out").rglob("*.dcm"))
    return b"".join(p.read_bytes() for p in written), len(report.series)


@pytest.mark.parametrize(
    ("edit", "token"),
    [
        pytest.param(lambda ds: raw(ds, 0x00280120, "US", SECRET + b"19630412"), SECRET, id="text in a padding value"),
        pytest.param(lambda ds: raw(ds, 0x00181310, "US", SECRET), SECRET, id="text in a matrix of the right length"),
        pytest.param(lambda ds: raw(ds, 0x00189087, "FD", b"DOEJANE8"), b"DOEJANE8", id="text as one double"),
        pytest.param(lambda ds: raw(ds, 0x00189087, "FD", b"DOEJANEA"), b"DOEJANEA", id="text as a likely double"),
        pytest.param(private("US", SECRET + b"19630412"), SECRET, id="text in a private number of another type"),
        pytest.param(private("IS", b"70012345"), b"70012345", id="record number in a private number"),
        pytest.param(setting(AcquisitionNumber=70012345), b"70012345", id="record number as acquisition"),
        pytest.param(setting(SeriesNumber=7001234), b"7001234", id="record number as series"),
        pytest.param(setting(TemporalPositionIdentifier=70012345), b"70012345", id="record number as time point"),
        pytest.param(setting(WindowCenter="70012345", WindowWidth="1"), b"70012345", id="record number as window"),
        pytest.param(setting(KVP="+20190304"), b"20190304", id="date with a sign"),
        pytest.param(setting(KVP="20190304.0"), b"20190304", id="date with a fraction"),
        pytest.param(setting(WindowCenter="2019030412e0"), b"2019030412", id="date with an exponent"),
        pytest.param(setting(KVP=["120", "54321"]), b"54321", id="more values than the attribute has"),
    ],
)
def test_drops_what_is_no_plain_number(edit, token, tmp_path, keys):
    content, passed = output(edit, tmp_path, keys)
    assert token in b"".join(p.read_bytes() for p in (tmp_path / "in").iterdir())
    assert passed == 1
    assert token not in content


@pytest.mark.parametrize("recipe", [load_recipe(), BASIC], ids=["allow-list", "basic"])
@pytest.mark.parametrize(
    ("own", "keyword"),
    [
        ("70012", "EchoNumbers"),
        ("70012", "WindowCenter"),
        ("Q-70012", "TemporalPositionIdentifier"),
        ("7001234", "FrameReferenceTime"),
    ],
)
def test_holds_a_number_that_is_the_patients_own(own, keyword, recipe, tmp_path, keys):
    number = int(own.removeprefix("Q-"))
    content, passed = output(setting(PatientID=own, **{keyword: number}), tmp_path, keys, recipe)
    assert str(number).encode() not in content
    assert passed == 0


def test_keeps_ordinary_numbers(tmp_path, keys):
    values = {
        "AcquisitionNumber": 99999,
        "SeriesNumber": 1201,
        "KVP": 120,
        "EchoTime": "2.4600000381",
        "WindowCenter": ["40", "-600"],
        "WindowWidth": ["400", "1500"],
        "FrameReferenceTime": "12345678.9",
        "AcquisitionMatrix": [0, 256, 256, 0],
        "ImagingFrequency": "123.258374",
        "DiffusionBValue": 1000.0,
    }
    content, passed = output(setting(**values), tmp_path, keys)
    assert passed == 1
    ds = pydicom.dcmread(min((tmp_path / "out").rglob("*.dcm")))
    for keyword, value in values.items():
        assert np.array_equal(np.array(ds[keyword].value, float), np.array(value, float)), keyword
    assert b"12345678.9" in content


def test_a_decimal_that_is_longer_than_the_standard_allows_is_rounded_not_held(study, keys):
    ds = read_strict(min(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name))
    with pydicom.config.disable_value_validation():
        ds.ImagePositionPatient = ["-73.080000000000012", "1.5", "-12.00000000000000001e1"]
        clean = HeaderCleaner(keys).clean(ds)
    assert [len(str(v)) <= 16 for v in clean.ImagePositionPatient] == [True] * 3
    assert [float(v) for v in clean.ImagePositionPatient] == pytest.approx([-73.08, 1.5, -120.0], abs=1e-9)
