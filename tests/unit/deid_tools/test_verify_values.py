"""Files made by hand to look clean: the verifier has no original at hand, and must still object."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from deid_tools.pipeline import deidentify
from deid_tools.recipes import load_recipe
from deid_tools.verify import problems_of, verify_folder
from medlsdm.types import Geometry
from medlsdm.volumes import write_nifti

pytestmark = pytest.mark.usefixtures("without_tesseract")
TEXT = b"DOE^JANE"


@pytest.fixture
def clean(study, tmp_path, keys) -> Path:
    recipe = load_recipe("basic", ["safe-private", "clean-descriptors", "modified-dates", "patient-characteristics"])
    deidentify(study.source, tmp_path / "out", keys, schema=study.schema, recipe=recipe)
    assert verify_folder(tmp_path / "out") == []
    return tmp_path / "out"


def code(value: str, scheme: str, meaning: str):
    def edit(ds):
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
        ds.DeidentificationMethodCodeSequence.append(item)

    return edit


def private(vr, value):
    def edit(ds):
        ds.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        ds.add_new(0x0019100C, vr, value)

    return edit


def upper_bits(ds):
    values = np.frombuffer(ds.PixelData, "<i2") & 0x0FFF
    ds.BitsStored, ds.HighBit = 12, 11
    ds.PixelData = (values | 0x4000).astype("<i2").tobytes()


def setting(**values):
    def edit(ds):
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return edit


def meta(**values):
    return lambda ds: setting(**values)(ds.file_meta)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (meta(ImplementationVersionName="DOE JANE"), "another program's mark"),
        (meta(ImplementationClassUID="1.9.70012345"), "another program's mark"),
        (setting(SeriesNumber=7001234), "a number as long as an identifier"),
        (setting(SeriesNumber=19630412), "a date in a number"),
        (setting(KVP="19630412.5"), "a date in a number"),
        (setting(KVP=["120", "4711"]), "more values than the attribute has"),
        (lambda ds: ds.add_new(0x00281052, "DS", "0"), ""),
        (lambda ds: ds.add_new(0x00181310, "US", [*struct.unpack("<4H", TEXT)]), "a text in a number"),
        (lambda ds: ds.add_new(0x00189087, "FD", struct.unpack("<d", b"DOEJANEA")[0]), "a text in a number"),
        (private("US", [*struct.unpack("<4H", TEXT)]), "a text in a number"),
        (private("IS", "70012345"), "a number as long as an identifier"),
        (private("IS", "1000000800"), ""),
        (code("113100", "DCM", "Doe Jane"), "a code's meaning that is not the dictionary's"),
        (code("70012345", "SCT", "Brain"), "a code's meaning that is not the dictionary's"),
        (code("113100", "DOEJANE", "x"), "a code of an unknown form"),
        (setting(StudyDescription="brain b1963"), "free text"),
        (setting(FrameOfReferenceUID="2.25.70012345"), "a UID that is neither keyed nor the standard's"),
        (setting(FrameOfReferenceUID="1.2.840.10008.70012345"), "a UID that is neither keyed nor the standard's"),
        (upper_bits, "bits above the stored ones are in use"),
        (setting(HighBit=3), "the pixels are stored in an impossible way"),
    ],
)
def test_finds_what_hides_in_a_value_of_the_right_type(edit, reason, clean, tmp_path):
    ds = pydicom.dcmread(min(clean.rglob("0*.dcm")))
    edit(ds)
    ds.save_as(tmp_path / "0001.dcm", enforce_file_format=True)
    found = {why for why, _ in problems_of(tmp_path / "0001.dcm")}
    assert reason in found if reason else not found


@pytest.mark.parametrize(
    ("at", "text"), [(92, TEXT), (48, TEXT), (280, b"DOEJANE MRN70012"), (74, b"DJ"), (112, b"DOEJANE1"), (122, b"D")]
)
def test_finds_text_in_the_numbers_of_a_nifti_header(at, text, tmp_path):
    path = tmp_path / "labels.nii.gz"
    write_nifti(path, np.zeros((4, 4, 4), np.uint16), Geometry(np.eye(4), (4, 4, 4)))
    assert problems_of(path) == []
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[at : at + len(text)] = text
    (tmp_path / "labels.nii").write_bytes(bytes(raw))
    assert problems_of(tmp_path / "labels.nii")


@pytest.mark.parametrize(
    "change",
    [
        {"patient": "DOE^JANE"},
        {"tools": {"DOE": "JANE"}},
        {"key_id": "DOE"},
        {"burned_in_text": "seen 1963-04-12"},
        {"unreadable_values": {"a": "DOE"}},
        {"series": [{"token": "DOE"}]},
        {"series": ["DOE"]},
        {"quarantined": [{"token": "item-0001", "reason": "x", "path": "DOE"}]},
        {"finished": "DOE"},
    ],
)
def test_finds_what_a_report_does_not_have(change, clean):
    report = json.loads((clean / "report.json").read_text())
    (clean / "report.json").write_text(json.dumps({**report, **change}))
    assert {finding.file for finding in verify_folder(clean)} == {"report.json"}


def test_finds_an_empty_folder_with_a_name_of_its_own(clean):
    (clean / "DOE^JANE").mkdir()
    (finding,) = verify_folder(clean)
    assert "DOE" not in finding.line()
