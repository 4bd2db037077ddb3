"""RTSTRUCT and SEG through the whole pipeline: the right series, the right voxels, and no word of theirs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from deid_tools.names import list_names
from deid_tools.pairs import LABELS_HELD
from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.series import lps_to_ras, plan_series
from deid_tools.verify import verify_folder
from medlsdm.types import LabelSchema

pytestmark = pytest.mark.usefixtures("without_tesseract")
SECRETS = ["Annegret", "QZWOLLERAU", "KLINIKUMWEST", "20110203", "MRN4477881199"]


@pytest.fixture
def organs(schema: LabelSchema) -> LabelSchema:
    background, liver, ulcer = schema.classes
    return replace(schema, classes=(background, replace(liver, aliases=(f"Leber {SECRETS[0]}",)), ulcer))


@pytest.fixture
def drawn(study, structures):
    """Return a function that puts an RTSTRUCT of a box of the liver beside the planted CT."""
    next(study.source.rglob("*SEG.dcm")).unlink()
    paths = sorted(p for p in study.source.rglob("*.dcm"))
    images = [pydicom.dcmread(p) for p in paths]
    plan = plan_series(images)
    lps = lps_to_ras(plan.affine)
    uids = [str(images[frame.source].SOPInstanceUID) for frame in plan.frames]

    def box(k: int) -> np.ndarray:
        index = np.array([(k, 4, 5), (k, 4, 11), (k, 9, 11), (k, 9, 5)], float)
        return index @ lps[:3, :3].T + lps[:3, 3]

    def put(name: str = f"Leber {SECRETS[0]}", shift: int = 0, **header):
        contours = [(box(k), "CLOSED_PLANAR", uids[k + shift]) for k in (2, 3, 4)]
        first = images[0]
        header = {
            "StudyInstanceUID": first.StudyInstanceUID,
            "PatientID": first.PatientID,
            "PatientName": SECRETS[1],
            "StructureSetLabel": SECRETS[2],
            "StructureSetDate": SECRETS[3],
            "ROIDescription": SECRETS[4],
        } | header
        references = {
            "series": header.pop("series", first.SeriesInstanceUID),
            "frame": header.pop("frame", first.FrameOfReferenceUID),
            "images": header.pop("images", uids),
        }
        ds = structures([(name, "", contours)], **references, **header)
        ds.save_as(paths[0].with_name("structures.dcm"), enforce_file_format=True)

    return put


def run(study, tmp_path, keys, schema):
    return deidentify(study.source, tmp_path / "out", keys, schema=schema)


def test_contours_come_back_as_labels_on_the_scan(study, drawn, tmp_path, keys, organs):
    drawn()
    report = run(study, tmp_path, keys, organs)
    assert report.held == ()
    assert [(s.images, s.labels, s.labels_held) for s in report.series] == [(8, 1, 0)]
    (pair,) = read_pairs(tmp_path / "out", organs)
    assert pair.reason == ""
    assert pair.labels is not None
    assert pair.scan is not None
    assert (pair.labels.array == 1).sum() == 3 * 6 * 7
    assert pair.labels.geometry.matches(pair.scan.geometry)
    assert verify_folder(tmp_path / "out") == []


def test_no_word_of_a_structure_set_travels_on(study, drawn, tmp_path, keys, organs):
    drawn()
    report = run(study, tmp_path, keys, organs)
    said = json.dumps(report.to_json()).encode()
    for path in [p for p in (tmp_path / "out").rglob("*") if p.is_file()]:
        content = path.read_bytes()
        if path.name.endswith(".nii.gz"):
            import gzip

            content = gzip.decompress(content)
        assert not [s for s in SECRETS if s.encode() in content + said + path.name.encode()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"name": f"Milz {SECRETS[0]}"},
            "1 of 1 segments are not in the label schema 'organs' (number 1: a name of its own)",
        ),
        ({"PatientID": "somebody else"}, "several patients"),
        ({"series": "1.2.3.4.5"}, "not among those that passed"),
        ({"series": "", "images": (), "frame": "1.2.3"}, "not among those that passed"),
        ({"images": ("1.2.3.4.5.6",)}, "images that its series does not hold"),
        ({"shift": 1}, "another image than the one that it lies on"),
    ],
)
def test_a_structure_set_in_doubt_is_held_and_says_why(study, drawn, tmp_path, keys, organs, changes, words):
    drawn(**changes)
    report = run(study, tmp_path, keys, organs)
    assert any(words in item.reason for item in report.held), [item.reason for item in report.held]
    assert not any(s in item.reason for item in report.held for s in SECRETS)
    assert not list((tmp_path / "out").rglob("labels*.nii.gz"))


def test_images_or_frame_of_reference_are_enough_to_find_the_series(study, drawn, tmp_path, keys, organs):
    drawn(series="")
    assert run(study, tmp_path, keys, organs).held == ()


def test_contours_in_a_foreign_frame_count_where_each_names_its_image(study, drawn, tmp_path, keys, organs):
    drawn(frame="1.2.3.4.5.6.7")
    assert run(study, tmp_path, keys, organs).held == ()


def test_contours_need_a_schema(study, drawn, tmp_path, keys):
    drawn()
    (item,) = deidentify(study.source, tmp_path / "out", keys).held
    assert "only under a label schema" in item.reason


def test_a_series_whose_labels_are_held_says_so(study, drawn, tmp_path, keys, organs):
    drawn(name="Milz")
    report = run(study, tmp_path, keys, organs)
    held = {s.token for s in report.series if s.labels_held}
    assert len(held) == 1
    (pair,) = read_pairs(tmp_path / "out", organs, held=held)
    assert pair.reason == LABELS_HELD


def test_names_are_listed_for_the_person_who_writes_the_schema(study, drawn, organs):
    drawn()
    (row,) = list_names(study.source, organs)
    assert (row.name, row.count, row.becomes) == (f"Leber {SECRETS[0]}", 1, "liver")
    (row,) = list_names(study.source, None)
    assert row.becomes == ""


def test_segments_that_the_schema_lacks_hold_the_segmentation(study, tmp_path, keys, schema):
    other = LabelSchema("other", schema.classes[:2])
    report = run(study, tmp_path, keys, other)
    assert [s.labels_held for s in report.series] == [1]
    assert any("label schema" in item.reason for item in report.held)
