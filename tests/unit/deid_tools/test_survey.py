"""What the walk through de-identification keeps of a series' volumes: time points, SUV, tilt, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from deid_tools.instances import cut, images
from deid_tools.keys import SiteKeys
from deid_tools.modules import save_clean
from deid_tools.pairs import NO_LABELS, PairResult, read_pairs
from deid_tools.pipeline import deidentify
from deid_tools.report import SeriesRecord
from medlsdm.types import Geometry, LabelSchema, Modality

GRID = Geometry(np.diag([0.8, 0.8, 2.0, 1.0]), (12, 10, 6))
ARRAY = np.random.default_rng(0).integers(0, 900, GRID.shape).astype(np.float32)


def hospital(modality: Modality, array: np.ndarray = ARRAY) -> list[Dataset]:
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}
    found = list(images(cut(array, GRID, centred=False), modality, uids))
    for ds in found:
        ds.PatientID = "MRN-4711"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    return found


def walk(
    found: list[Dataset], tmp_path: Path, keys: SiteKeys, schema: LabelSchema
) -> tuple[SeriesRecord, list[PairResult]]:
    for n, ds in enumerate(found):
        save_clean(ds, tmp_path / "in" / f"{n:03d}.dcm")
    report = deidentify(tmp_path / "in", tmp_path / "out", keys)
    assert report.held == ()
    (record,) = report.series
    again = deidentify(tmp_path / "in", tmp_path / "out", keys).series[0]
    assert (again.already, again.notes) == (True, record.notes)
    return record, list(read_pairs(tmp_path / "out", schema))


def test_time_points_that_only_a_clock_tells_apart_survive_without_it(tmp_path, keys, schema):
    found = []
    for t in (1, 0):
        for k, ds in enumerate(hospital(Modality.MR, ARRAY * (t + 1))):
            ds.AcquisitionDate, ds.AcquisitionTime = "20200101", f"10{t:02d}{k:02d}"
            found.append(ds)
    record, pairs = walk(found, tmp_path, keys, schema)
    assert [p.token for p in pairs] == [f"{record.token}/1", f"{record.token}/2"]
    assert [p.reason for p in pairs] == [NO_LABELS, NO_LABELS]
    sums = sorted(float(p.scan.array.sum()) for p in pairs if p.scan)
    assert sums == [ARRAY.sum(), 2 * ARRAY.sum()]
    assert "differ in time point" in record.notes[0]


def test_volumes_that_nothing_tells_apart_are_refused(tmp_path, keys, schema):
    found = [*hospital(Modality.MR), *hospital(Modality.MR, ARRAY * 2)]
    record, (pair,) = walk(found, tmp_path, keys, schema)
    assert pair.scan is None
    assert "Several different images lie at one position" in pair.reason
    assert "Several different images lie at one position" in record.notes[0]


def test_activity_becomes_suv_before_dose_and_weight_are_gone(tmp_path, keys, schema):
    found = hospital(Modality.PT)
    for ds in found:
        dose = Dataset()
        dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 400e6, 6586.2
        dose.RadiopharmaceuticalStartTime = "090000"
        ds.RadiopharmaceuticalInformationSequence = [dose]
        ds.Units, ds.CorrectedImage, ds.DecayCorrection = "BQML", ["ATTN", "DECY"], "START"
        ds.PatientWeight = 80
        ds.SeriesDate = ds.AcquisitionDate = "20200102"
        ds.SeriesTime = ds.AcquisitionTime = "100000"
    record, (pair,) = walk(found, tmp_path, keys, schema)
    assert record.notes == ()
    assert pair.scan is not None
    expected = ARRAY * 80_000 / (400e6 * 0.5 ** (3600 / 6586.2))
    np.testing.assert_allclose(pair.scan.array, expected, rtol=1e-5, atol=1e-9)


def test_activity_without_a_dose_is_refused_and_says_what_is_missing(tmp_path, keys, schema):
    found = hospital(Modality.PT)
    for ds in found:
        ds.Units, ds.CorrectedImage, ds.DecayCorrection = "BQML", ["ATTN", "DECY"], "START"
    for n, ds in enumerate(found):
        save_clean(ds, tmp_path / "in" / f"{n:03d}.dcm")
    (record,) = deidentify(tmp_path / "in", tmp_path / "out", keys).series
    assert record.notes == ("The PET header does not state one radiopharmaceutical.",)
    (pair,) = read_pairs(tmp_path / "out", schema)
    assert pair.scan is None
    assert "not SUV" in pair.reason


def test_a_tilt_is_said_in_the_report_and_with_the_pair(tmp_path, keys, schema):
    found = hospital(Modality.CT)
    for k, ds in enumerate(found):
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + 0.6 * k, z]
    record, (pair,) = walk(found, tmp_path, keys, schema)
    assert record.notes == pair.notes
    assert "a tilt of 16.7 degrees was sheared right" in record.notes[0]
    assert pair.scan is not None
    assert pair.scan.array.shape == (12, 14, 6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_behind_a_lookup_table_are_held(tmp_path, keys):
    found = hospital(Modality.CT)
    found[3].ModalityLUTSequence = [Dataset()]
    for n, ds in enumerate(found):
        save_clean(ds, tmp_path / "in" / f"{n:03d}.dcm")
    report = deidentify(tmp_path / "in", tmp_path / "out", keys)
    assert report.series == ()
    assert "its values pass through a lookup table, which is not supported" in report.reasons()
