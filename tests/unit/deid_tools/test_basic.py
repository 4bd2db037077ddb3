"""The recipe basic through the whole pipeline: what it keeps, what it moves, and that nothing planted is left."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pydicom
import pytest

from deid_tools.dates import day_shift, read_day
from deid_tools.keys import SiteKeys
from deid_tools.nested import coded
from deid_tools.pipeline import deidentify
from deid_tools.recipes import Option, load_recipe
from deid_tools.verify import verify_folder
from medlsdm.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("without_tesseract")


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.dcm") if "SEG" not in p.name and not p.name.startswith("seg"))


def leaks(out: Path, tokens: list[str]) -> list[str]:
    content = b"".join(str(p).encode() + (p.read_bytes() if p.is_file() else b"") for p in out.rglob("*"))
    return [t for t in tokens if t.encode() in content]


def edit_all(study, change) -> None:
    for path in images(study.source):
        ds = pydicom.dcmread(path)
        change(ds)
        ds.save_as(path)


def run(study, out: Path, keys: SiteKeys, *options: str):
    return deidentify(study.source, out, keys, schema=study.schema, recipe=load_recipe("basic", options))


def test_without_options_nothing_planted_is_left_and_numbers_stay(study, tmp_path, keys):
    edit_all(study, lambda ds: (setattr(ds, "TableHeight", "120.5"), setattr(ds, "IrradiationEventUID", "1.2.3.9")))
    report = run(study, tmp_path / "out", keys)
    assert report.held == ()
    assert leaks(tmp_path / "out", study.tokens) == []
    assert verify_folder(tmp_path / "out") == []
    clean = pydicom.dcmread(images(tmp_path / "out")[0])
    assert clean.TableHeight == 120.5
    assert clean.IrradiationEventUID.startswith("2.25.")
    assert clean.LongitudinalTemporalInformationModified == "REMOVED"
    assert [i.CodeValue for i in clean.DeidentificationMethodCodeSequence] == ["113100"]


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_with_all_options_dates_move_by_one_shift_and_only_clean_words_stay(study, tmp_path, keys, caplog):
    def dress(ds):
        surname = str(ds.PatientName).split("^")[0]
        ds.AcquisitionDate = "20991231"
        ds.ContentDate, ds.SeriesDate = "2019", "20190610-20190710"
        ds.HeartRate = "60"
        ds["HeartRate"]._value = "none taken"
        ds.AcquisitionDateTime = "20991231101112.123456+0100"
        ds.TimezoneOffsetFromUTC = "+0100"
        ds.PerformedProcedureStepStartDate = "2019-garbage"
        ds.StudyDescription = f"CHEST contrast 1.5mm for {surname}"
        ds.PatientSize, ds.PatientWeight, ds.PatientAge = "1.71", "68.5", "041Y"
        ds.PatientBirthDate, ds.StudyDate = "19780503", "20190610"
        block = ds.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "IS", "1000")
        block.add_new(0x0D, "CS", "NONE")

    edit_all(study, dress)
    before = pydicom.dcmread(images(study.source)[0])
    caplog.clear()
    report = run(study, tmp_path / "out", keys, *Option)
    assert caplog.text == ""
    assert report.held == ()
    assert verify_folder(tmp_path / "out") == []
    clean = pydicom.dcmread(images(tmp_path / "out")[0])
    days = day_shift(keys, "", before.PatientID)
    assert (read_day(clean.StudyDate) - date(2019, 6, 10)).days == days  # type: ignore[operator]
    assert read_day(clean.AcquisitionDate) - read_day(clean.StudyDate) == date(2099, 12, 31) - date(2019, 6, 10)  # type: ignore[operator]
    assert clean.AcquisitionDateTime == f"{clean.AcquisitionDate}101112.123456+0100"
    assert clean.ContentDate in ("2014", "2015", "2016", "2017", "2018", "2019")
    first, last = map(read_day, clean.SeriesDate.split("-"))
    assert (last - first).days == 30  # type: ignore[operator]
    assert "HeartRate" not in clean
    assert report.removed["a number that cannot be read was removed"] == 8
    assert clean.StudyTime == before.StudyTime
    assert not clean.PatientBirthDate
    assert "PerformedProcedureStepStartDate" not in clean
    assert report.removed["a date or time that cannot be read was removed"] == 8
    assert clean.StudyDescription == "CHEST contrast 1.5mm"
    assert (clean.PatientSex, clean.PatientAge, clean.PatientSize, clean.PatientWeight) == ("F", "040Y", 1.71, 68.5)
    assert [e.value for e in clean if e.tag.is_private] == ["SIEMENS MR HEADER", 1000]
    codes = [i.CodeValue for i in clean.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113105", "113107", "113108", "113111"]
    assert clean.LongitudinalTemporalInformationModified == "MODIFIED"
    assert leaks(tmp_path / "out", [t for t in study.tokens if "." not in t or t.count(".") > 1]) == []
    assert "20190610" not in json.dumps(report.to_json())


def test_references_of_a_segmentation_resolve_to_the_images_that_were_written(study, tmp_path, keys):
    run(study, tmp_path / "out", keys)
    written = {pydicom.dcmread(p).SOPInstanceUID for p in images(tmp_path / "out")}
    (path,) = (tmp_path / "out").rglob("seg-*.dcm")
    segmentation = pydicom.dcmread(path)
    series = segmentation.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == pydicom.dcmread(images(tmp_path / "out")[0]).SeriesInstanceUID
    named = {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence}
    assert named
    assert named <= written
    assert segmentation.file_meta.MediaStorageSOPInstanceUID == segmentation.SOPInstanceUID


def test_another_recipe_or_key_never_mixes_into_an_earlier_output(study, tmp_path, keys):
    report = run(study, tmp_path / "out", keys)
    assert report.key_id == keys.id
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"] == "basic"
    with pytest.raises(DataError, match="other options"):
        run(study, tmp_path / "out", keys, "modified-dates")
    with pytest.raises(DataError, match="another key"):
        run(study, tmp_path / "out", SiteKeys.derive(bytes(range(1, 33)), "test"))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("nosuch", (), "no de-identification recipe"),
        ("../deid/basic", (), "no de-identification recipe"),
        ("basic", ("retain-names",), "no such option"),
        ("allow-list", ("modified-dates",), "belong to the recipe basic"),
        ("basic", ("age-bands",), "need ages"),
    ],
)
def test_a_recipe_or_option_that_is_not_there_is_refused(name, options, match):
    with pytest.raises(ConfigError, match=match):
        load_recipe(name, options)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_the_verifier_lets_pass_only_what_the_stamps_say(study, tmp_path, keys):
    run(study, tmp_path / "out", keys, "modified-dates")
    path = images(tmp_path / "out")[0]
    ds = pydicom.dcmread(path)
    ds.DeidentificationMethodCodeSequence = ds.DeidentificationMethodCodeSequence[:1]
    ds.PatientAge = "041Y"
    ds.save_as(path)
    reasons = {f.reason for f in verify_folder(tmp_path / "out")}
    assert {"a date or a time", "an element that is not on the verifier's list"} <= reasons
    ds.DeidentificationMethodCodeSequence.extend([coded(c, "DCM", "x") for c in ("113107", "113108", "113105")])
    ds.PatientAge, ds.StudyDescription, ds.StudyTime = "091Y", "CHEST Dekeloza", "half past"
    ds.save_as(path)
    reasons = {f.reason for f in verify_folder(tmp_path / "out")}
    assert {"a date or a time", "an age", "free text"} <= reasons
