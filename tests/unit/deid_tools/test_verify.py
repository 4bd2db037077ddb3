from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.admit import Refusal
from deid_tools.explicit import read_written
from deid_tools.pipeline import deidentify
from deid_tools.plant import write_planted_study
from deid_tools.verify import Finding, check_file, problems_of, verify_folder
from deid_tools.verify_nifti import check_nifti
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, SemanticMap
from medlsdm.volumes import write_nifti

GRID = Geometry(np.diag([0.8, 0.8, 2.0, 1.0]), (10, 8, 3))
SCHEMA = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004")))


@pytest.fixture(scope="module")
def written(tmp_path_factory, keys) -> Path:
    folder = tmp_path_factory.mktemp("written")
    labels = np.zeros(GRID.shape, np.uint8)
    labels[3:6, 3:6, 1] = 1
    array = np.random.default_rng(0).normal(0, 100, GRID.shape)
    write_planted_study(
        array, GRID, Modality.CT, SemanticMap(labels, GRID, SCHEMA), folder / "in", seed=3, hospital="Westend"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deid_tools.pixels.shutil.which", lambda name: None)
        assert deidentify(folder / "in", folder / "out", keys, schema=SCHEMA).held == ()
    return folder


@pytest.fixture
def out(written, tmp_path) -> Path:
    return Path(shutil.copytree(written / "out", tmp_path / "out"))


def first(out: Path) -> Path:
    return sorted(out.rglob("0001.dcm"))[0]


def change(path: Path, edit) -> None:
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(path)


def test_the_reader_sees_what_pydicom_sees(out):
    for path in out.rglob("*.dcm"):
        written = read_written(path.read_bytes())
        ds = pydicom.dcmread(path)
        assert [int(e.tag) for e in written.body] == [int(tag) for tag in ds.keys()]  # noqa: SIM118  # a data set yields elements
        assert [e.VR for e in written.body] == [e.VR for e in ds]
        assert bytes(written.body[-1].value) == ds.PixelData
        uid = written.find(0x00080018)
        assert uid is not None
        assert uid.text() == ds.SOPInstanceUID
        sequence = written.find(0x00120064)
        assert sequence is not None
        assert sequence.items[0][0].text() == ds.DeidentificationMethodCodeSequence[0].CodeValue


def test_a_flipped_byte_is_a_refusal_or_read_as_it_stands(written):
    content = first(written / "out").read_bytes()
    refused = 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 0xFF
        try:
            read = read_written(bytes(changed))
        except Refusal:
            refused += 1
            continue
        values = [e.value for e in read.meta + read.body]
        assert read.preamble + b"".join(values) != content[:128] + b"".join(e.value for e in read_written(content).body)
    assert refused > 200


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda ds: setattr(ds, "PatientComments", "x"), "not on the verifier's list"),
        (lambda ds: ds.add_new(0x00091001, "LO", "x"), "not on the verifier's list"),
        (lambda ds: setattr(ds, "StudyDate", "20200131"), "a date or a time"),
        (lambda ds: setattr(ds, "StudyInstanceUID", "1.2.3"), "neither keyed"),
        (lambda ds: setattr(ds, "PatientName", "Doe^Jane"), "not a pseudonym"),
        (lambda ds: setattr(ds, "AccessionNumber", "A1"), "free text"),
        (lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "DOE JANE"]), "code string"),
        (lambda ds: ds.add_new(0x00180050, "LO", "Doe"), "not of the type"),
        (lambda ds: ds.add_new(0x00180050, "DS", "1_0"), "a number that is none"),
        (lambda ds: delattr(ds, "PatientIdentityRemoved"), "stamps"),
        (lambda ds: delattr(ds, "DeidentificationMethodCodeSequence"), "stamps"),
        (lambda ds: setattr(ds, "SOPInstanceUID", "2.25.7"), "outer and inner"),
        (lambda ds: setattr(ds, "preamble", b"Jane".ljust(128, b"\0")), "preamble"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData + b"Jane"), "longer or shorter"),
        (lambda ds: ds.add_new(0xFFFCFFFC, "OB", b"Jane"), "not on the verifier's list"),
        (lambda ds: setattr(ds.file_meta, "SourceApplicationEntityTitle", "NODE"), "not on the verifier's list"),
        (lambda ds: setattr(ds.DeidentificationMethodCodeSequence[0], "CodeMeaning", "born 1961-03-04"), "a date"),
        (lambda ds: setattr(ds.DeidentificationMethodCodeSequence[0], "CodeMeaning", "a@b.org"), "an e-mail"),
        (lambda ds: setattr(ds.DeidentificationMethodCodeSequence[0], "CodeMeaning", "MRN 00123"), "record number"),
        (
            lambda ds: setattr(ds.DeidentificationMethodCodeSequence[0], "CodeMeaning", "4 March 1961 4 Mar 61"),
            "a date",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_thing_that_should_not_be_there_is_found(out, edit, reason):
    path = first(out)
    assert check_file(path) == []
    change(path, edit)
    found = check_file(path)
    assert any(reason in problem for problem in found), found


def test_other_forms_of_dicom_are_refused(out):
    path = first(out)
    content = path.read_bytes()
    for changed, reason in (
        (content + b"\0", "well formed"),
        (content + b"Jane\0\0\0\0", "well formed"),
        (content[:-2], "well formed"),
        (content[132:], "not DICOM"),
        (content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0", 1), "explicit little endian"),
        (content[:200], ""),
        (b"", "not DICOM"),
    ):
        path.write_bytes(changed)
        problems = check_file(path)
        assert problems
        assert any(reason in problem for problem in problems)


def test_a_finding_says_where_and_never_what(out):
    path = first(out)
    change(path, lambda ds: setattr(ds, "PatientComments", "Jane 0170 1234567"))
    assert ("an element that is not on the verifier's list", "(0010,4000)") in problems_of(path)
    (finding,) = verify_folder(out)
    assert finding.line().endswith("list (0010,4000)")
    assert "Jane" not in finding.line()
    assert Finding("a", "b").line() == "a: b"


def test_a_report_that_was_changed_is_found(out):
    assert verify_folder(out) == []
    text = (out / "report.json").read_text()
    (out / "report.json").write_text(text.replace('"reasons": {}', '"reasons": {"call a@b.org": 1}'))
    assert [f.reason for f in verify_folder(out)] == ["an e-mail address in the report"]
    (out / "report.json").write_text("[]")
    assert [f.reason for f in verify_folder(out)] == ["the report is not one that this program writes"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_byte_of_a_nifti_header_is_looked_at(tmp_path, suffix):
    path = tmp_path / f"labels{suffix}"
    write_nifti(path, np.zeros((3, 4, 5), np.uint8), Geometry(np.eye(4), (3, 4, 5)))
    assert check_nifti(path, None) == []
    content = path.read_bytes() if suffix == ".nii" else gzip.decompress(path.read_bytes())
    spoiled = []
    for start, text in ((148, b"Jane"), (228, b"Jane"), (328, b"Jane"), (14, b"Jane"), (348, b"\1"), (140, b"\1")):
        changed = bytearray(content)
        changed[start : start + len(text)] = text
        spoiled.append(bytes(changed))
    spoiled += [content + b"Jane", content[:-1], content[:300], b""]
    for changed in spoiled:
        path.write_bytes(changed if suffix == ".nii" else gzip.compress(changed, mtime=0))
        assert check_nifti(path, None), changed[:4]


def test_a_gzip_with_a_name_a_second_member_or_a_bomb_is_found(tmp_path):
    path = tmp_path / "labels.nii.gz"
    write_nifti(path, np.zeros((3, 4, 5), np.uint8), Geometry(np.eye(4), (3, 4, 5)))
    good = path.read_bytes()
    content = gzip.decompress(good)
    with path.open("wb") as raw, gzip.GzipFile("jane.nii", "wb", fileobj=raw, mtime=0) as stream:
        stream.write(content)
    assert check_nifti(path, None) == ["the gzip header holds a name or a time"]
    path.write_bytes(good + gzip.compress(b"Jane", mtime=0))
    assert "bytes follow the voxels" in check_nifti(path, None)
    huge = bytearray(content)
    struct.pack_into("<8h", huge, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(huge) + bytes(10**7), mtime=0))
    assert check_nifti(path, None) == ["the NIfTI header is not one that this program writes"]


def test_any_folder_can_be_verified(tmp_path, written):
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "notes.txt").write_text("Jane")
    (folder / "scan.nii").write_bytes(b"x" * 400)
    original = next((written / "in").rglob("*.dcm"))
    (folder / "image.dcm").write_bytes(original.read_bytes())
    reasons = {f.reason for f in verify_folder(folder)}
    assert "a file that this program does not write" in reasons
    assert "the NIfTI header is not one that this program writes" in reasons
    assert "a name or an ID that is not a pseudonym" in reasons
    assert not any("notes" in f.file or "scan" in f.file or "image" in f.file for f in verify_folder(folder))
