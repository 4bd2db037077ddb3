from __future__ import annotations

import pydicom
import pytest

from deid_tools.admit import Refusal, read_strict
from deid_tools.config_files import deid_folder
from deid_tools.headers import HeaderCleaner
from deid_tools.recipes import load_recipe
from medlsdm.errors import ConfigError


@pytest.mark.parametrize(
    "line",
    [
        "REPLACE PatientID var:missing",
        "REPLACE PatientID func:missing",
        "REPLACE PatientID deid_func:dicom_uuid",
        "REPLACE PatientID someone",
        "KEEP PatientNamee",
        "BLANK PatientID",
        "KEEP PatientID",
        "KEEP StudyDescription",
        "KEEP BurnedInAnnotation",
        'KEEP (0029,"EXAMPLE IMAGING 1.0",10)',
        'KEEP (0019,"SIEMENS MR HEADER",0D)',
        "REPLACE StudyDate func:keyed_uid",
        "REPLACE StudyInstanceUID func:shift",
        "ADD PatientComments hello",
        "REMOVE PatientComments",
        "%filter graylist",
    ],
)
def test_a_recipe_that_would_fail_open_is_refused_when_it_is_loaded(tmp_path, keys, line):
    recipe = tmp_path / "bad.dicom"
    recipe.write_text((deid_folder() / "allow-list.dicom").read_text() + line + "\n")
    with pytest.raises(ConfigError, match="not safe"):
        load_recipe(recipe)


def test_a_recipe_without_remove_all_is_refused(tmp_path, keys):
    recipe = tmp_path / "bad.dicom"
    recipe.write_text((deid_folder() / "allow-list.dicom").read_text().replace("REMOVE ALL\n", ""))
    with pytest.raises(ConfigError, match="REMOVE ALL"):
        load_recipe(recipe)


def first_image(study) -> pydicom.FileDataset:
    return read_strict(min(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name))


def test_the_result_holds_keyed_identity_stamps_and_empty_type_two(study, keys):
    ds = first_image(study)
    clean = HeaderCleaner(keys).clean(ds)
    assert str(clean.PatientID).startswith("P-")
    assert clean.PatientName == clean.PatientID
    assert clean.SOPInstanceUID != ds.SOPInstanceUID
    assert str(clean.SOPInstanceUID).startswith("2.25.")
    assert clean.PatientIdentityRemoved == "YES"
    assert clean.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert clean.LongitudinalTemporalInformationModified == "REMOVED"
    for keyword in ("StudyDate", "AccessionNumber", "PatientBirthDate", "PatientSex", "StudyID"):
        assert keyword in clean
        assert not clean[keyword].value
    assert clean.ImagePositionPatient == ds.ImagePositionPatient
    assert not any(e.tag.is_private or e.tag.group in (0x6000, 0xFFFC) for e in clean)


def test_an_unknown_code_string_does_not_pass(study, keys):
    ds = first_image(study)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "MUELLER ANNA"]
    ds.PatientPosition = "MUELLER"
    clean = HeaderCleaner(keys).clean(ds)
    assert list(clean.ImageType) == ["ORIGINAL", "PRIMARY", "NONE"]
    assert not clean.PatientPosition


def test_an_engine_that_leaves_the_id_in_place_is_a_refusal(study, keys, monkeypatch):
    cleaner = HeaderCleaner(keys)
    monkeypatch.setattr(cleaner, "_run", lambda flat, transforms: flat)
    with pytest.raises(Refusal, match="engine left"):
        cleaner.clean(first_image(study))


def test_an_engine_that_warns_is_a_refusal(study, keys, monkeypatch):
    from deid_tools import engine

    cleaner = HeaderCleaner(keys)
    parse = engine.Parser.parse

    def noisy(self, *args, **kwargs):
        print("WARNING something odd")
        parse(self, *args, **kwargs)

    monkeypatch.setattr(engine.Parser, "parse", noisy)
    with pytest.raises(Refusal, match="engine warned"):
        cleaner.clean(first_image(study))


def test_the_engine_is_asked_again_only_for_what_it_has_not_seen(study, keys, monkeypatch):
    from deid_tools import engine

    cleaner, fresh, seen = HeaderCleaner(keys), HeaderCleaner(keys), []
    parse = engine.Parser.parse
    monkeypatch.setattr(engine.Parser, "parse", lambda self: (seen.append(len(self.dicom)), parse(self)))
    paths = sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)
    results = [cleaner.clean(read_strict(path)) for path in paths]
    assert max(seen[1:]) < seen[0] / 2
    seen.clear()
    assert results[-1] == fresh.clean(read_strict(paths[-1]))
    other = read_strict(paths[-1])
    other.PatientID = "somebody else"
    assert cleaner.clean(other).PatientID != results[-1].PatientID
