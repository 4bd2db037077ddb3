"""Counts are checked against an independent one: pydicom's own iteration over the planted files, in and out."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from deid_tools.admit import read_strict
from deid_tools.headers import HeaderCleaner
from deid_tools.recipes import load_recipe
from deid_tools.tally import Fate, Other, Tally


def tally_of(files: list[Path], cleaner: HeaderCleaner) -> tuple[Tally, list[tuple[Dataset, Dataset]]]:
    tally, pairs = Tally(), []
    for path in files:
        ds = read_strict(path)
        clean = cleaner.clean(ds)
        tally.add(ds, clean)
        pairs.append((pydicom.dcmread(path), clean))
    tally.settle(cleaner.recipe)
    return tally, pairs


def named(ds: Dataset) -> set[str]:
    """Name what holds a value and has a name of the standard, from the JSON model: not how the tally does it."""
    found = set()
    for tag, element in ds.to_json_dict().items():
        group = int(tag[:4], 16)
        keyword = pydicom.datadict.keyword_for_tag(tag)
        holds = any(part not in (None, "", {}) for part in element.get("Value", [])) or element.get("InlineBinary")
        if keyword and holds and group % 2 == 0 and group not in (0x7FE0, 0x6000, 0x5000):
            found.add(keyword)
    return found


@pytest.fixture
def images(study) -> list[Path]:
    return sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)


def test_every_attribute_is_counted_once_and_right(images, keys):
    tally, pairs = tally_of(images, HeaderCleaner(keys))
    removed, stays = Counter[str](), Counter[str]()
    for original, clean in pairs:
        removed.update(named(original) - named(clean) | {"SourceApplicationEntityTitle"})
        stays.update(named(original) & named(clean))
    counted = tally.attributes[Fate.REMOVED] + tally.attributes.get(Fate.EMPTIED, Counter())
    assert counted == removed
    assert removed["PatientComments"] == removed["DataSetTrailingPadding"] == len(images) == tally.files
    fates = (Fate.KEPT, Fate.CHANGED, Fate.UID, Fate.PSEUDONYM, Fate.OVERWRITTEN, Fate.REBUILT)
    listed = [tally.attributes.get(fate, Counter()) for fate in fates]
    assert sum((Counter(c) for c in listed), Counter()) == stays
    assert tally.attributes[Fate.UID].keys() >= {"SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"}
    assert tally.attributes[Fate.PSEUDONYM] == {"PatientID": len(images), "PatientName": len(images)}


def test_what_the_standard_does_not_name_is_counted_and_not_named(images, keys):
    tally, pairs = tally_of(images, HeaderCleaner(keys))
    elements = [e for original, _ in pairs for e in original if e.tag.is_private]
    creators = sum(e.tag.is_private_creator for e in elements)
    filled = sum(bool(e.value) for e in elements) - creators
    assert (tally.others[Other.BLOCKS], tally.others[Other.PRIVATE]) == (creators, filled)
    assert tally.others[Other.OVERLAYS] == tally.others[Other.PREAMBLES] == len(images)
    requests = [original.RequestAttributesSequence for original, _ in pairs]
    private = [e for e in elements if e.VR == "SQ"]
    assert tally.others[Other.SEQUENCES] == 2 * len(requests) + len(private)
    assert "EXAMPLE" not in str(tally)
    assert all(re.fullmatch(r"[A-Za-z0-9]+", k) for c in tally.attributes.values() for k in c)


def test_an_unknown_element_is_counted(images, keys):
    ds = read_strict(images[0])
    ds.add_new(0x00081234, "LO", "Somebody")
    tally, cleaner = Tally(), HeaderCleaner(keys)
    tally.add(ds, cleaner.clean(ds))
    tally.settle(cleaner.recipe)
    assert tally.others[Other.UNKNOWN] == 1


def test_empty_attributes_hold_nothing_and_are_not_counted(images, keys):
    ds = read_strict(images[0])
    for keyword, value in (("PatientComments", ""), ("ImageComments", "  "), ("AdmittingDiagnosesDescription", None)):
        setattr(ds, keyword, value)
    ds.RequestAttributesSequence = []
    tally, cleaner = Tally(), HeaderCleaner(keys)
    tally.add(ds, cleaner.clean(ds))
    tally.settle(cleaner.recipe)
    removed = tally.attributes[Fate.REMOVED]
    assert not {"PatientComments", "ImageComments", "AdmittingDiagnosesDescription"} & removed.keys()
    assert "RequestAttributesSequence" not in removed
    assert "InstitutionName" in removed


def test_the_options_of_the_basic_profile_show(images, keys):
    for path in images:  # the made-up birth date contradicts the age, which then goes
        ds = pydicom.dcmread(path)
        del ds.PatientBirthDate
        ds.save_as(path)
    recipe = load_recipe("basic", ["modified-dates", "patient-characteristics", "clean-descriptors"])
    tally, pairs = tally_of(images, HeaderCleaner(keys, recipe=recipe))
    assert tally.attributes[Fate.DATE]["StudyDate"] == len(images)
    assert tally.attributes[Fate.AGE] == {"PatientAge": len(images)}  # 93 years become 90
    assert tally.attributes[Fate.KEPT]["StudyTime"] == len(images)
    assert tally.attributes[Fate.WORDS]["SeriesDescription"] == len(images)
    assert all(clean.StudyDate != original.StudyDate for original, clean in pairs)


def test_parts_merge_to_the_whole_and_travel_between_processes(images, keys):
    cleaner = HeaderCleaner(keys)
    whole, _ = tally_of(images, cleaner)
    merged = Tally()
    for part in (images[:3], images[3:4], images[4:]):
        merged.merge(pickle.loads(pickle.dumps(tally_of(part, cleaner)[0])))
    assert merged == whole
