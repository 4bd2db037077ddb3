"""Every row of PS3.15 table E.1-1: a value is planted and must be gone, changed or kept as the page states."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import pydicom
import pytest
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset

from deid_tools.admit import read_strict
from deid_tools.coverage import Row, agrees, page, rows, treatment
from deid_tools.headers import HeaderCleaner
from deid_tools.recipes import Option, load_recipe

DOCS = Path(__file__).resolve().parents[3] / "docs" / "deid-coverage.md"
RECIPES = {"allow-list": (), "basic": (), "basic, all": tuple(Option), "basic, dates": (Option.MODIFIED_DATES,)}
TEXT = ("LO", "SH", "LT", "ST", "UT", "UC", "UR", "PN", "AE", "CS")
ROWS = rows()
DESCRIPTORS = load_recipe("basic", [Option.CLEAN_DESCRIPTORS]).by("clean_text")


def first_image(study) -> Dataset:
    return read_strict(min(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name))


def recipe_of(name: str):
    return load_recipe(name.split(",")[0], RECIPES[name])


def test_the_table_is_whole():
    assert len(ROWS) == 656
    assert {r.action for r in ROWS} == {"X", "Z", "D", "U", "Z/D", "X/Z", "X/D", "X/Z/D", "X/Z/U*"}
    assert len({r.tag for r in ROWS}) == len(ROWS)


def test_the_page_states_what_the_recipes_do():
    assert DOCS.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_gets_what_the_profile_or_an_option_asks(name):
    recipe = recipe_of(name)
    assert [(r.tag, r.action, treatment(r, recipe)) for r in ROWS if not agrees(r, treatment(r, recipe))] == []


def planted_value(row: Row, vr: str, n: int) -> object:
    token = f"ZQX{n:05d}"
    known = {
        "PatientBirthDate": "18580203",
        "PatientSex": "F",
        "PatientSexNeutered": "ALTERED",
        "SmokingStatus": "YES",
        "PregnancyStatus": 2,
    }
    if row.keyword in known:
        return known[row.keyword]
    if vr == "SQ":
        item = Dataset()
        item.PatientComments = token
        item.PatientBirthDate = "19510203"
        return [item]
    dates = {"DA": "19510203", "DT": "19510203111213.456789", "TM": "111213.456789", "AS": "093Y"}
    if vr in dates:
        return dates[vr]
    if vr in ("OB", "OW", "UN", "OF", "OD"):
        return token.encode()
    if vr == "UI":
        return f"1.2.826.0.1.77777.{n}"
    if vr in TEXT:
        return f"CHEST {token}" if row.keyword in DESCRIPTORS else token
    return {"AT": 0x00100010}.get(vr, 77)


def plant(ds: Dataset) -> dict[str, object]:
    planted = {}
    for n, row in enumerate(ROWS):
        if row.keyword in ("SOPClassUID", "TimezoneOffsetFromUTC") or row.tag[:4] in ("0000", "0002", "0004", "odd"):
            continue
        tag = int(row.tag.replace("x", "0"), 16)
        vr = dictionary_VR(tag).split(" or ")[0] if dictionary_has_tag(tag) else "SQ" if "Seq" in row.name else "LO"
        ds.add_new(tag, vr, planted_value(row, vr, n))
        planted[row.tag] = ds[tag].value
    ds.TimezoneOffsetFromUTC = planted["00080201"] = "+0130"
    return planted


def kept_as_stated(done: str, value: object, before: object) -> bool:
    text = "" if value is None else str(value)
    checks = {
        "removed": lambda: value is None,
        "empty or removed": lambda: not value,
        "dummy or removed": lambda: text in ("", "19000101", "000000", "not stated", "['NONE']", "NONE"),
        "pseudonym": lambda: text.startswith("P-"),
        "new UID": lambda: value is None or "77777" not in text,
        "kept": lambda: text == str(before),
        "kept in bands of five years": lambda: text == "090Y",
        "kept, 90 and over as 090Y": lambda: text == "090Y",
        "cleaned": lambda: text == "CHEST",
        "moved": lambda: text == before if ":" in text or len(text) in (5, 13) else bool(text) and text != before,
    }
    return bool(checks[done]())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_planted_in_a_row_ends_as_the_page_states(study, keys, name):
    ds = first_image(study)
    recipe = recipe_of(name)
    before = plant(ds)
    clean = HeaderCleaner(keys, recipe=recipe).clean(ds)
    wrong = []
    for row in ROWS:
        if row.tag in before:
            value = clean.get(int(row.tag.replace("x", "0"), 16))
            done = treatment(row, recipe)
            if not kept_as_stated(done, None if value is None else value.value, before[row.tag]):
                wrong.append((row.tag, row.keyword, done))
    assert wrong == []
    assert len(before) > 640
    assert leaks(clean) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_planted_in_nested_items_is_gone_at_every_depth(study, keys, name):
    ds = first_image(study)
    item = ds
    for keyword in (
        "RequestAttributesSequence",
        "ReferencedImageSequence",
        "SourceImageSequence",
        "RequestedProcedureCodeSequence",
    ):
        below = Dataset()
        plant(below)
        below.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        below.add_new(0x00290010, "LO", "ZQXMAKER")
        below.add_new(0x50000010, "LO", "ZQXCURVE")
        below.add_new(0x60000022, "LO", "ZQXOVERLAY")
        setattr(item, keyword, [below])
        item = below
    assert leaks(HeaderCleaner(keys, recipe=recipe_of(name)).clean(ds)) == []


def leaks(clean: Dataset) -> list[bytes]:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(buffer, clean, implicit_vr=False, little_endian=True)
    return re.findall(rb"ZQX\w*|19510203|18580203|77777", buffer.getvalue())
