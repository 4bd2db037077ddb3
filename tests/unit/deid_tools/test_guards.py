"""Guards that nothing else stands behind: each of them alone holds what it is there for."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from deid_tools import run_labels
from deid_tools.admit import Refusal, read_strict
from deid_tools.pipeline import deidentify
from medlsdm.volumes import write_nifti

from .conftest import plant

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
OUTSIDE = ("1.2.840.10008.5.1.4.1.1.20", "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3.4.5")


@pytest.fixture(autouse=True)
def _without_tesseract(monkeypatch):
    monkeypatch.setattr("deid_tools.pixels.shutil.which", lambda name: None)


def images(study) -> list[Path]:
    return sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)


def segmentation(study) -> Path:
    return next(study.source.rglob("*SEG.dcm"))


def change(path: Path, **values: object) -> None:
    ds = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(ds, keyword, value)
        if keyword == "SOPClassUID":
            ds.file_meta.MediaStorageSOPClassUID = value
        if keyword == "SOPInstanceUID":
            ds.file_meta.MediaStorageSOPInstanceUID = value
    ds.save_as(path)


def run(study, tmp_path, keys, schema=None):
    return deidentify(study.source, tmp_path / "out", keys, schema=schema)


@pytest.mark.parametrize("uid", OUTSIDE)
def test_a_kind_of_object_that_is_not_on_the_list_is_held(study, tmp_path, keys, uid):
    path = images(study)[3]
    change(path, SOPClassUID=uid)
    report = run(study, tmp_path, keys)
    assert [h.reason for h in report.held if h.path == path] == [
        "this kind of DICOM object is not on the list of admitted ones (CT, MR, PET, SEG, RTSTRUCT)"
    ]
    assert sum(s.images for s in report.series) == 7


def test_a_series_of_two_studies_is_held(study, tmp_path, keys):
    change(images(study)[3], StudyInstanceUID="1.2.3.4.5.6")
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert report.reasons()["its series mixes studies or kinds of object"] == 8


def test_a_modality_that_contradicts_the_kind_of_object_is_held(study, tmp_path, keys):
    change(images(study)[3], Modality="MR")
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert report.reasons()["its modality does not go with its SOP class"] == 1


def test_two_images_of_one_identifier_hold_their_series(study, tmp_path, keys):
    copy = study.source / "copy.dcm"
    shutil.copy(images(study)[3], copy)
    content = pydicom.dcmread(copy).PixelData
    change(copy, PixelData=bytes([content[0] ^ 1]) + content[1:])
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert report.reasons()["two different images of its series have one identifier"] == 9


def test_a_label_map_of_another_patient_is_held(study, tmp_path, keys):
    change(segmentation(study), PatientID="ANOTHER1", StudyInstanceUID="1.2.3.4.5.6")
    report = run(study, tmp_path, keys, study.schema)
    assert report.reasons() == {"it names another patient than the series that it segments": 1}
    assert [s.labels_held for s in report.series] == [1]


def test_an_earlier_output_that_holds_another_image_does_not_pass_again(study, tmp_path, keys):
    run(study, tmp_path, keys)
    change(next((tmp_path / "out").rglob("0003.dcm")), SOPInstanceUID="2.25.7")
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert report.reasons()["its series is already there with other images"] == 8


def test_nothing_is_read_into_depths_or_inflated(study, tmp_path):
    ds = deep = pydicom.dcmread(images(study)[0])
    for _ in range(9):
        inner = Dataset()
        deep.ContentSequence = Sequence([inner])
        deep = inner
    ds.save_as(tmp_path / "deep.dcm")
    with pytest.raises(Refusal, match="nested deeper"):
        read_strict(tmp_path / "deep.dcm", headers_only=True)
    flat = pydicom.dcmread(images(study)[0])
    flat.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    flat.save_as(tmp_path / "deflated.dcm")
    with pytest.raises(Refusal, match="transfer syntax is not supported"):
        read_strict(tmp_path / "deflated.dcm")


def test_a_segmentation_that_still_says_a_name_is_held_by_the_second_pass(study, tmp_path, keys, monkeypatch):
    honest = run_labels.take_over
    surname = str(pydicom.dcmread(images(study)[0]).PatientName).split("^")[0]

    def leaky(run, done, originals):
        taken = honest(run, done, originals)
        for path in (run.working / "labels").glob("*.dcm"):
            change(path, ContentDescription=surname)
        return taken

    monkeypatch.setattr(run_labels, "take_over", leaky)
    report = run(study, tmp_path, keys, study.schema)
    assert [(s.images, s.labels, s.labels_held) for s in report.series] == [(8, 0, 1)]
    assert any("check of what was written" in reason for reason in report.reasons())
    assert list((tmp_path / "out").rglob("seg-*")) == []


def test_a_nifti_label_map_that_still_says_something_is_held_by_the_second_pass(study, tmp_path, keys, monkeypatch):
    segmentation(study).unlink()
    write_nifti(study.source / "labels.nii.gz", study.labels.array, study.labels.geometry)
    assert [s.labels for s in run(study, tmp_path, keys, study.schema).series] == [1]
    shutil.rmtree(tmp_path / "out")

    def leaky(path, array, geometry):
        write_nifti(path, array, geometry)
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[148:158] = b"Annegret D"  # descrip
        path.write_bytes(gzip.compress(bytes(raw), mtime=0))

    monkeypatch.setattr(run_labels, "write_nifti", leaky)
    report = run(study, tmp_path, keys, study.schema)
    assert [(s.images, s.labels, s.labels_held) for s in report.series] == [(8, 0, 1)]
    assert any("check of what was written" in reason for reason in report.reasons())
    assert list((tmp_path / "out").rglob("*.nii.gz")) == []


COLUMNS = "level page_num block_num par_num line_num word_num left top width height conf text"
TABLE = "printf '" + COLUMNS.replace(" ", "\\t") + "\\n'"
BROKEN = {
    "fails": "exit 1",
    "dies": "kill -9 $$",
    "says nothing": "cat > /dev/null",
    "says something else": "cat > /dev/null; echo Tesseract 99; echo no table at all",
    "says nonsense": "read -r magic width height most; cat > /dev/null; "
    f"{TABLE}; "
    "printf '1\\t1\\t0\\t0\\t0\\t0\\t0\\t0\\t%s\\t%s\\t-1\\t\\n' $width $height; "
    "printf '5\\t1\\t1\\t1\\t1\\t1\\ta\\tb\\tc\\td\\te\\tWORD\\n'",
    "speaks of another picture": "cat > /dev/null; "
    f"{TABLE}; "
    "printf '1\\t1\\t0\\t0\\t0\\t0\\t0\\t0\\t10\\t10\\t-1\\t\\n'",
}


@pytest.mark.parametrize("how", BROKEN)
def test_where_the_search_for_text_breaks_nothing_passes(tmp_path, keys, schema, monkeypatch, how):
    study = plant(tmp_path / "hospital", schema, seed=3)
    program = tmp_path / "tesseract"
    program.write_text(f"#!/bin/sh\n{BROKEN[how]}\n")
    program.chmod(0o755)
    monkeypatch.setattr("deid_tools.pixels.shutil.which", lambda name: str(program))
    report = run(study, tmp_path, keys)
    assert report.series == (), report.reasons()
    assert any("burned-in text" in reason or "searched for text" in reason for reason in report.reasons())
