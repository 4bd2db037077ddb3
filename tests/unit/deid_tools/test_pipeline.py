from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from deid_tools.keys import SiteKeys
from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.pixels import OCR_ABSENT
from deid_tools.report import DeidReport
from deid_tools.treatment import PixelPolicy
from deid_tools.uids import new_uid, pseudonym
from deid_tools.verify import verify_folder
from medlsdm.errors import DataError
from medlsdm.types import Geometry, LabelSchema
from medlsdm.volumes import write_nifti

pytestmark = pytest.mark.usefixtures("without_tesseract")


def leaks(out: Path, tokens: list[str]) -> list[str]:
    found = []
    for path in out.rglob("*"):
        content = str(path.relative_to(out)).encode() + (path.read_bytes() if path.is_file() else b"")
        found += [t for t in tokens if t.encode() in content or "\0".join(t).encode() in content]
    return found


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.dcm") if "SEG" not in p.name)


def change(path: Path, edit) -> None:
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(path)


def run(study, tmp_path: Path, keys: SiteKeys, **options) -> DeidReport:
    return deidentify(study.source, tmp_path / "out", keys, schema=study.schema, **options)


def test_no_planted_token_is_left_anywhere(study, tmp_path, keys, capfd):
    report = run(study, tmp_path, keys)
    assert [s.images for s in report.series] == [8]
    assert report.held == ()
    assert report.ocr == OCR_ABSENT
    assert len(study.tokens) > 40
    assert leaks(study.source, study.tokens)  # the search can find them
    assert leaks(tmp_path / "out", study.tokens) == []
    assert capfd.readouterr() == ("", "")
    assert verify_folder(tmp_path / "out") == []
    assert not any(t in json.dumps(report.to_json()) for t in study.tokens)


def test_the_pair_comes_back_with_every_voxel(study, tmp_path, keys):
    run(study, tmp_path, keys)
    (pair,) = read_pairs(tmp_path / "out", study.schema)
    assert pair.reason == ""
    assert pair.scan is not None
    assert pair.labels is not None
    np.testing.assert_array_equal(pair.scan.array, study.array)
    np.testing.assert_array_equal(pair.labels.array, study.labels.array)
    assert pair.scan.geometry.matches(study.labels.geometry)
    assert pair.token.startswith(pair.scan.subject)


def test_uids_and_pseudonyms_are_equal_on_every_run(study, tmp_path, keys):
    run(study, tmp_path, keys)
    deidentify(study.source, tmp_path / "again", keys, schema=study.schema)
    first = {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*.dcm")}
    second = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.dcm")}
    assert first == second
    assert len(first) == 9
    other = SiteKeys.derive(bytes(range(32)), "another project")
    assert pseudonym(other, "", "A1") != pseudonym(keys, "", "A1")
    assert new_uid(keys, "1.2.840.10008.1.2") == "1.2.840.10008.1.2"
    assert new_uid(keys, "1.2.3").startswith("2.25.")


def test_running_again_resumes_and_never_overwrites(study, tmp_path, keys):
    run(study, tmp_path, keys)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.dcm")}
    report = run(study, tmp_path, keys)
    assert [s.already for s in report.series] == [True]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.dcm")}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="not an earlier output"):
        deidentify(study.source, foreign, keys)
    with pytest.raises(DataError, match="in each other"):
        deidentify(study.source, study.source / "out", keys)


def test_an_empty_folder_is_an_error(tmp_path, keys):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(DataError):
        deidentify(tmp_path / "empty", tmp_path / "out", keys)


def test_files_that_are_not_dicom_are_held_with_a_reason(study, tmp_path, keys):
    (study.source / "note.dcm").write_text("Patient is well, call her.")
    (study.source / "empty.dcm").touch()
    (study.source / "link.dcm").symlink_to(images(study.source)[0])
    (study.source / "copy.dcm").write_bytes(images(study.source)[0].read_bytes())
    report = run(study, tmp_path, keys)
    assert set(report.reasons()) == {
        "the file is not DICOM",
        "the file is empty",
        "symbolic links and devices are not followed",
        "it is a copy of another file, which was taken",
    }
    assert len(report.series) == 1
    assert report.files_seen == 13
    assert "path" not in json.dumps(report.to_json())
    assert {h.path.name for h in report.held} >= {"note.dcm", "empty.dcm"}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda ds: setattr(ds, "BurnedInAnnotation", "YES"), "text is burned"),
        (lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (lambda ds: delattr(ds, "SOPClassUID"), "SOP Class UID is missing"),
        (lambda ds: setattr(ds, "SOPInstanceUID", "1.2.3.4"), "outer and inner"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-200]), "cut short"),
        (lambda ds: setattr(ds, "PatientID", "ANOTHER1"), "several patients"),
        (lambda ds: setattr(ds, "PatientID", ""), "PatientID is missing"),
        (lambda ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"), "inverted"),
        (lambda ds: setattr(ds, "BitsStored", 8), "bits above BitsStored"),
        (lambda ds: delattr(ds, "Rows"), "no pixel grid"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_bad_image_holds_its_whole_series(study, tmp_path, keys, edit, reason):
    bad = images(study.source)[3]
    ds = pydicom.dcmread(bad)
    edit(ds)
    ds.save_as(bad, enforce_file_format=False)
    report = run(study, tmp_path, keys)
    assert any(reason in h.reason for h in report.held if h.path == bad), report.reasons()
    if "SOP Class" not in reason:
        assert report.series == ()
        assert len(report.held) == 9
        assert list((tmp_path / "out").glob("P-*")) == []


@pytest.mark.parametrize("keep", [100, 700, 0.5, 0.99])
def test_a_file_cut_short_never_passes(study, tmp_path, keys, keep):
    bad = images(study.source)[2]
    content = bad.read_bytes()
    bad.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    report = run(study, tmp_path, keys)
    assert bad in {h.path for h in report.held}
    for pair in read_pairs(tmp_path / "out", study.schema):
        assert pair.scan is None
        assert "missing" in pair.reason


def test_what_hides_behind_the_pixels_is_cut_off(study, tmp_path, keys):
    def hide(ds):
        ds.PixelData = ds.PixelData + b"Dekeloza Notuvala"

    for path in images(study.source):
        change(path, hide)
    report = run(study, tmp_path, keys)
    assert len(report.series) == 1
    assert leaks(tmp_path / "out", ["Dekeloza"]) == []


def test_text_inside_the_pixels_is_caught_by_the_second_pass(study, tmp_path, keys):
    path = images(study.source)[0]
    surname = str(pydicom.dcmread(path).PatientName).split("^")[0]

    def hide(ds):
        ds.PixelData = surname.encode() + ds.PixelData[len(surname) :]

    change(path, hide)
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert any("string of the original" in reason for reason in report.reasons())


def test_what_the_header_cleaner_lets_through_is_caught_by_the_second_pass(study, tmp_path, keys, monkeypatch):
    from deid_tools.headers import HeaderCleaner

    honest = HeaderCleaner.clean

    def leaky(self, ds: Dataset) -> Dataset:
        clean = honest(self, ds)
        clean.StudyDescription = ds.StudyDescription
        return clean

    monkeypatch.setattr(HeaderCleaner, "clean", leaky)
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert all("check of what was written" in r or "segments" in r for r in report.reasons())


def test_a_banner_is_blanked_and_the_report_says_so_or_the_series_is_held(study, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("deid_tools.burned_in.MAX_BLANK_SHARE", 0.6)  # the study's images are 16 x 20
    monkeypatch.setattr("deid_tools.pixels.LEGIBLE_PIXELS", 16)

    def draw(ds):
        pixels = ds.pixel_array.copy()
        pixels[1:3, 2:18] = 3000
        ds.PixelData = pixels.tobytes()

    for path in images(study.source):
        change(path, draw)
    report = run(study, tmp_path, keys)
    (series,) = report.series
    assert series.pixels.text_boxes >= 1
    assert report.to_json()["series"][0]["face"] == "no face in view"
    for path in (tmp_path / "out").rglob("00*.dcm"):
        ds = pydicom.dcmread(path)
        assert (ds.pixel_array != 3000).all()
        assert ds.BurnedInAnnotation == "NO"
    assert verify_folder(tmp_path / "out") == []
    held = deidentify(study.source, tmp_path / "held", keys, policy=PixelPolicy("quarantine"))
    assert held.series == ()
    assert any("text seems to be burned" in reason for reason in held.reasons())


def test_a_head_that_cannot_be_told_is_held_unless_faces_may_stay(study, tmp_path, keys, monkeypatch):
    monkeypatch.setattr("deid_tools.head.FACE_EXTENT_MM", 1.0)
    for path in images(study.source):
        change(path, lambda ds: setattr(ds, "BodyPartExamined", "HEAD"))
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert any("no head could be told" in reason for reason in report.reasons())
    kept = deidentify(study.source, tmp_path / "kept", keys, policy=PixelPolicy(faces=False))
    assert len(kept.series) == 1
    assert kept.series[0].pixels.face == "left as it is"


@pytest.mark.real_data
@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "place"), [("2_ORIGINAL", (0, 0, 28, 230)), ("0_ORIGINAL_compressed", (0, 0, 84, 815))]
)
def test_names_that_are_really_burned_in_are_found_whole(data, name, place, monkeypatch):
    from deid_tools.pixels import TextSearch

    monkeypatch.undo()  # tesseract is wanted here
    if shutil.which("tesseract") is None:
        pytest.skip("tesseract is not installed")
    pixels = pydicom.dcmread(data / "dicom" / "burned-in" / f"{name}.dcm").pixel_array
    search = TextSearch()
    search.add(pixels[None])
    hidden = np.zeros(pixels.shape, bool)
    for top, left, bottom, right in search.found()[pixels.shape]:
        hidden[top:bottom, left:right] = True
    top, left, bottom, right = place
    window = pixels[top:bottom, left:right].astype(int)
    ink = np.abs(window - int(np.median(window))) > 0.5 * np.ptp(window)
    assert hidden[top:bottom, left:right][ink].mean() > 0.99


def test_a_nifti_label_map_is_matched_by_its_grid(study, tmp_path, keys, schema):
    (next(study.source.rglob("*SEG.dcm"))).unlink()
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = study.labels.geometry.shape[0] - 1
    turned = Geometry(study.labels.geometry.affine @ flipped, study.labels.geometry.shape)
    write_nifti(study.source / "seg_of_patient.nii.gz", study.labels.array[::-1], turned)
    report = run(study, tmp_path, keys)
    assert [s.labels for s in report.series] == [1]
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.labels is not None
    np.testing.assert_array_equal(pair.labels.array, study.labels.array)
    assert verify_folder(tmp_path / "out") == []


def test_a_nifti_label_map_on_another_grid_is_held(study, tmp_path, keys):
    moved = study.labels.geometry.affine.copy()
    moved[2, 3] += 1.0
    write_nifti(study.source / "moved.nii.gz", study.labels.array, Geometry(moved, study.labels.geometry.shape))
    write_nifti(study.source / "values.nii.gz", study.labels.array + np.uint8(9), study.labels.geometry)
    write_nifti(study.source / "scan.nii.gz", study.array + 0.5, study.labels.geometry)
    reasons = run(study, tmp_path, keys).reasons()
    assert any("grid of no series" in r for r in reasons)
    assert any("does not name" in r for r in reasons)
    assert any("not a label map" in r for r in reasons)


@pytest.mark.parametrize("spoil", ["spacing", "colours", "cut"])
def test_the_name_of_a_label_map_that_is_held_is_told_to_nobody(study, tmp_path, keys, spoil):
    bad = study.source / "DOE^JANE_1234567.nii.gz"
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]) if spoil == "colours" else np.dtype("u1")
    image = nib.Nifti1Image(np.zeros((4, 4, 4), kind), np.eye(4))
    image.set_sform(None, 0)
    if spoil == "spacing":
        image.header["pixdim"][1:4] = 0
    content = image.to_bytes()
    bad.write_bytes(gzip.compress(content[:400] if spoil == "cut" else content))
    report = deidentify(study.source, tmp_path / "out", keys)
    assert any(held.path.name == bad.name for held in report.held)
    told = json.dumps(report.to_json()) + (tmp_path / "out" / "report.json").read_text()
    assert "DOE" not in told
    assert "1234567" not in told


def test_two_label_maps_for_one_scan_are_refused(study, tmp_path, keys, schema):
    write_nifti(study.source / "second.nii.gz", study.labels.array, study.labels.geometry)
    run(study, tmp_path, keys)
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.scan is None
    assert "which one counts is not said" in pair.reason


def test_a_schema_that_does_not_know_the_segments_says_so_without_free_text(study, tmp_path, keys):
    from medlsdm.types import LabelClass

    run(study, tmp_path, keys)
    other = LabelSchema("other", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004")))
    (pair,) = read_pairs(tmp_path / "out", other)
    assert pair.labels is None
    assert "1 of 2 segments" in pair.reason
    assert "Geschw" not in pair.reason


def test_verify_says_nothing_of_the_values_that_it_finds(study, tmp_path, keys, caplog, capfd):
    run(study, tmp_path, keys)
    path = next((tmp_path / "out").rglob("0001.dcm"))
    ds = pydicom.dcmread(path)
    ds.HeartRate = "60"
    ds["HeartRate"]._value = "DOE JANE"
    ds.save_as(path)
    caplog.clear()
    assert verify_folder(tmp_path / "out")
    assert "DOE" not in caplog.text + "".join(capfd.readouterr())


def test_verify_finds_what_was_put_into_an_output_later(study, tmp_path, keys):
    run(study, tmp_path, keys)
    written = sorted((tmp_path / "out").rglob("0001.dcm"))[0]

    def spoil(ds):
        ds.PatientComments = "call +49 170 1234567"
        ds.StudyDate = "20230405"
        ds.add_new(0x00290010, "LO", "SOMEONE")

    change(written, spoil)
    shutil.copy(written, written.parent / "Mueller.dcm")
    findings = verify_folder(tmp_path / "out")
    reasons = {f.reason for f in findings}
    assert "an element that is not on the verifier's list" in reasons
    assert "a date or a time" in reasons
    assert "a file that this program does not write" in reasons
    assert not any("Mueller" in f.file for f in findings)


COUNTED = (
    "burned-in", "ct-ge-gantry-tilt", "ct-liver-seg", "ct-organs", "ct-philips-phantom", "ct-rtstruct", "mr-enhanced",
    "mr-hippocampus-crops", "mr-siemens-brain", "mr-siemens-prone",
)  # fmt: skip


@pytest.mark.real_data
def test_the_real_folder_is_sorted_into_what_passes_and_what_is_held(data, tmp_path, keys, schema):
    for name in COUNTED:  # the folder may grow
        shutil.copytree(data / "dicom" / name, tmp_path / "in" / name)
    report = deidentify(tmp_path / "in", tmp_path / "out", keys, policy=PixelPolicy(faces=False))
    assert sum(s.images for s in report.series) + sum(s.labels for s in report.series) + len(report.held) == (
        report.files_seen
    )
    assert report.reasons()["the SOP Class UID is missing, so nobody can tell what kind of object this is"] == 20
    assert sum(s.images for s in report.series) == 198
    assert verify_folder(tmp_path / "out") == []
    pairs = list(read_pairs(tmp_path / "out", schema))
    assert sum("a tilt of 18.5 degrees" in note for pair in pairs for note in pair.notes) == 2
    several = [pair for pair in pairs if pair.token.count("/") == 2]
    assert all(pair.scan for pair in several)
    volumes = Counter(pair.token.rpartition("/")[0] for pair in several)
    assert sorted(volumes.values()) == [2, 2, 4]  # thin and thick slices, magnitude and field map, four time points
    assert sum("segments are not in the label schema" in pair.reason for pair in pairs) == 1


@pytest.mark.real_data
def test_the_edge_of_a_face_that_was_cut_off_is_no_text_to_the_second_pass(data, tmp_path, keys):
    report = deidentify(data / "dicom" / "mr-siemens-brain", tmp_path / "out", keys)
    assert {s.pixels.face for s in report.series} == {"removed"}
    assert verify_folder(tmp_path / "out", whole_series=True) == []


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compressed_organs_and_their_labels_match_once_the_header_is_repaired(organ_ct, tmp_path, keys):
    from medlsdm.types import LabelClass
    from medlsdm.volumes import read_nifti

    values = np.unique(read_nifti(organ_ct / "labels.nii.gz")[0])
    organs = LabelSchema("organs", tuple(LabelClass(int(v), f"organ {v}") for v in sorted({0, *values.tolist()})))
    report = deidentify(organ_ct, tmp_path / "out", keys, schema=organs)
    assert report.held == ()
    (pair,) = read_pairs(tmp_path / "out", organs)
    assert pair.reason == ""
    assert pair.scan is not None
    assert pair.labels is not None
    assert pair.scan.array.shape == (512, 512, 20)
    assert len(np.unique(pair.labels.array)) == len(values)


def test_a_run_that_was_killed_resumes(study, tmp_path, keys, monkeypatch):
    from deid_tools import pipeline

    def killed(state):
        raise KeyboardInterrupt

    with monkeypatch.context() as while_it_lasts:
        while_it_lasts.setattr(pipeline, "segmentations", killed)
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path, keys)
    (tmp_path / "out" / ".working-left").mkdir()
    report = run(study, tmp_path, keys)
    assert [(s.already, s.labels) for s in report.series] == [(True, 1)]
    assert verify_folder(tmp_path / "out") == []


def test_what_arrives_later_is_never_dropped_silently(study, tmp_path, keys, schema):
    late = images(study.source)[-1]
    content = late.read_bytes()
    late.unlink()
    run(study, tmp_path, keys)
    late.write_bytes(content)
    report = run(study, tmp_path, keys)
    assert set(report.reasons()) == {
        "its series is already there with another number of images",
        "the series that it segments is not among those that passed",
    }


def test_a_second_label_map_on_the_next_run_is_seen(study, tmp_path, keys, schema):
    write_nifti(study.source / "a.nii.gz", study.labels.array, study.labels.geometry)
    next(study.source.rglob("*SEG.dcm")).unlink()
    run(study, tmp_path, keys)
    assert [s.labels for s in run(study, tmp_path, keys).series] == [1]
    other = study.labels.array.copy()
    other[0, 0, 0] = 1
    write_nifti(study.source / "b.nii.gz", other, study.labels.geometry)
    assert [s.labels for s in run(study, tmp_path, keys).series] == [2]
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert "which one counts is not said" in pair.reason


def test_a_scan_in_whole_numbers_beside_its_series_is_no_label_map(study, tmp_path, keys):
    picture = (study.array - study.array.min()).round().astype(np.uint16)
    write_nifti(study.source / "T1w.nii.gz", picture, study.labels.geometry)
    write_nifti(study.source / "mask.nii.gz", study.labels.array, study.labels.geometry)
    report = deidentify(study.source, tmp_path / "out", keys)
    held = [h.reason for h in report.held if h.path.name.endswith(".nii.gz")]
    assert held == ["The NIfTI file is not a label map: its values change from voxel to voxel, as in a picture."]
    assert len([*(tmp_path / "out").rglob("labels*.nii.gz")]) == 1
