from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.answers import AnswerKey, plant_label_map, plant_series
from deid_tools.corners import Kind, Planter
from deid_tools.pipeline import deidentify
from deid_tools.score import Action, leaks_in, score

pytestmark = pytest.mark.usefixtures("without_tesseract")
REMOVALS = (Action.TEXT_REMOVED, Action.DATE_SHIFTED, Action.UID_CHANGED)


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.dcm") if "SEG" not in p.name)


def planted(study, folder: Path, script: str = "utf-8") -> AnswerKey:
    key = AnswerKey()
    files = images(study.source)[:4]
    plant_series(files, folder / "a", key, patient="one", study="1", series="1", script=script)
    plant_series(files, folder / "b", key, patient="one", study="2", series="1", script=script)
    return key


@pytest.mark.parametrize("script", ["latin", "utf-8", "japanese"])
def test_every_planted_token_is_found_in_the_source_and_none_in_the_result(study, tmp_path, keys, script):
    key = planted(study, tmp_path / "in", script)
    assert len(key.plants) > 900
    before = score(key, tmp_path / "in")
    assert all(before.passed[a] == 0 for a in REMOVALS)
    report = deidentify(tmp_path / "in", tmp_path / "out", keys)
    assert report.held == ()
    after = score(key, tmp_path / "out")
    assert after.failures == []
    assert after.leaks == 0
    assert all(after.total[a] > 0 for a in Action if a is not Action.PIXELS_HIDDEN)
    assert after.intervals == "no dates were kept"


@pytest.mark.filterwarnings("ignore:The pixel data is:UserWarning")
def test_the_planter_reaches_the_places_that_others_miss(study, tmp_path):
    key = planted(study, tmp_path / "in")
    places = "\n".join(plant.place for plant in key.plants)
    for place in (
        *("preamble", "file meta: private information", "trailing padding", "overlay 601E data", "curve data"),
        *("thumbnail pixels", "depth 5: ", "private 0029 SQ, depth 2: UN", "private 0029 UI", "unknown even group"),
        *("encapsulated document", "digital signature date", "folder name", "file name", "behind the pixels"),
        *("InterpretationText", "private without a creator", "OtherPatientNames, given name"),
    ):
        assert place in places, place
    assert {plant.kind for plant in key.plants} == set(Kind)
    first = next((tmp_path / "in").rglob("*.dcm"))
    ds = pydicom.dcmread(first)
    kept, real = ds.pixel_array, pydicom.dcmread(images(study.source)[0]).pixel_array
    np.testing.assert_array_equal(kept[1:], real[1:])
    assert np.abs(kept[0] - real[0]).max() < 16


def test_each_kind_of_failure_is_named(study, tmp_path, keys):
    key = planted(study, tmp_path / "in")
    deidentify(tmp_path / "in", tmp_path / "out", keys)
    written = sorted((tmp_path / "out").rglob("*.dcm"))
    ds = pydicom.dcmread(written[0])
    source = key.sources[0]
    ds.SOPInstanceUID = source.sop
    ds.PatientID = "P-OTHER"
    ds.PatientName = ""
    ds.SliceThickness = "9"
    ds.StudyComments = next(p.token for p in key.plants if p.place == "PatientName").upper()
    ds.add_new(0x00080020, "DA", source.study_date)
    ds.save_as(written[0])
    spoiled = pydicom.dcmread(written[1])
    spoiled.PixelData = b"\0" * len(spoiled.PixelData)
    spoiled.save_as(written[1])
    failed = {action for action, _ in score(key, tmp_path / "out").failures}
    assert failed == set(Action) - {Action.PIXELS_HIDDEN}


@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be", "iso2022_jp"])
def test_ideographs_are_found_in_any_encoding(codec):
    token = Planter("x", "japanese").foreign("a", "b")
    assert len(token) == 4
    content = b"\0\1" + f"x{token}y".encode(codec)
    assert leaks_in(content, [token]) == {token}
    assert leaks_in(content, [token[::-1]]) == set()


def test_equal_seeds_give_equal_tokens_and_no_token_twice():
    one, two = Planter("s"), Planter("s")
    assert one.value("a", "PatientName", "PN") == two.value("a", "PatientName", "PN")
    assert one.value("b", "PatientName", "PN") != two.value("a", "PatientName", "PN")
    assert Planter("t").word("a", "b") != one.word("a", "b")


def test_a_label_map_is_planted_in_header_extension_and_name(study, tmp_path, keys):
    key = AnswerKey()
    files = images(study.source)
    plant_series(files, tmp_path / "in", key, patient="one", study="1", series="1")
    path = plant_label_map(files, tmp_path / "in", key, patient="one", study="1")
    content = path.name.encode() + path.read_bytes() + gzip.decompress(path.read_bytes())
    tokens = [p.token for p in key.plants if "NIfTI" in p.place or "gzip" in p.place]
    assert len(tokens) == 8
    assert leaks_in(content, tokens) == set(tokens)
    report = deidentify(tmp_path / "in", tmp_path / "out", keys)
    assert [s.labels for s in report.series] == [1]
    assert score(key, tmp_path / "out").failures == []


def test_burned_in_text_that_is_written_counts_as_not_hidden(study, tmp_path, keys):
    key = AnswerKey()
    plant_series(images(study.source), tmp_path / "in", key, patient="one", study="1", series="1", burned_in=True)
    result = score(key, tmp_path / "in")
    assert (result.passed[Action.PIXELS_HIDDEN], result.total[Action.PIXELS_HIDDEN]) == (0, 1)
    (tmp_path / "none").mkdir()
    assert score(key, tmp_path / "none").passed[Action.PIXELS_HIDDEN] == 1
