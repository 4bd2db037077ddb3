from __future__ import annotations

import json
import re
import resource
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.answers import AnswerKey, plant_series
from deid_tools.evidence import EvidenceFolder, weaker
from deid_tools.evidence_page import INSIDE, render
from deid_tools.pipeline import deidentify
from deid_tools.png import write_private
from deid_tools.recipes import load_recipe
from deid_tools.treatment import PixelPolicy
from medlsdm.errors import DataError, ResourceError

from .conftest import plant

pytestmark = pytest.mark.usefixtures("without_tesseract")


def picture(path: Path) -> np.ndarray:
    """Decode a grey PNG without the code that wrote it."""
    raw = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", raw[16:26])
    assert (depth, colour) == (8, 0)
    start = raw.index(b"IDAT") + 4
    size = struct.unpack(">I", raw[start - 8 : start - 4])[0]
    lines = np.frombuffer(zlib.decompress(raw[start : start + size]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_shows_an_original_goes_through_no_link_and_is_whole_or_not_there(tmp_path):
    (tmp_path / "shared").write_bytes(b"seen by all")
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "face.png").symlink_to(tmp_path / "shared")
    (private / "open.png").write_bytes(b"older")
    (private / "open.png").chmod(0o644)
    for name in ("face.png", "open.png", "new.png"):
        write_private(private / name, b"a face")
        assert (private / name).read_bytes() == b"a face"
        assert stat.S_IMODE((private / name).lstat().st_mode) == 0o600
    assert (tmp_path / "shared").read_bytes() == b"seen by all"
    with room_for(1000), pytest.raises(ResourceError):
        write_private(private / "half.png", bytes(5000))
    assert {p.name for p in private.iterdir()} == {"face.png", "open.png", "new.png"}


def test_a_study_leaves_counts_a_page_and_pictures_and_nothing_of_the_original(study, tmp_path, keys):
    folder = EvidenceFolder(tmp_path / "evidence")
    report = deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder)
    (record,) = report.studies
    files = sorted(p for p in folder.path.rglob("*") if p.is_file())
    token = report.series[0].token.replace("/", "-")
    names = {f"{record.name}.json", f"{record.name}.html", f"{token}-before.png", f"{token}-after.png"}
    assert {p.name for p in files} == names
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder.path, folder.path / "pictures")} == {0o700}
    for path in files:
        content = path.read_bytes()
        assert not [t for t in study.tokens if t.encode() in content or t in path.name]
    document = json.loads((folder.path / f"{record.name}.json").read_text())
    assert document == record.document
    (row,) = document["series"]
    assert (row["images"], row["label_maps"], row["headers"], row["checked"]) == (8, 1, 9, 9)
    assert row["attributes"]["removed"]["ImageComments"] == 8
    assert row["others"]["private elements removed"] == 8 * 4 - 7  # the private UID is empty but in the first
    assert document["weaker"] == []
    assert document["held"] == {"files": 0, "reasons": {}}
    assert document["second_pass"]["files"] == 9
    assert document["recipe"]["sha256"] == report.recipe_sha256


def test_the_page_loads_nothing_and_runs_nothing(study, tmp_path, keys):
    folder = EvidenceFolder(tmp_path / "evidence")
    (record,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder).studies
    text = (folder.path / f"{record.name}.html").read_text()
    page = Page(text)
    assert not {"script", "iframe", "object", "link", "form", "base"} & set(page.tags)
    assert len(page.sources) == page.tags.count("img") == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert "url(" not in text
    assert INSIDE in text
    assert "Institution Name" in text
    plain = render(record.document, {})
    assert INSIDE not in plain
    assert "img" not in Page(plain).tags


def test_the_page_escapes_what_it_is_told(study, tmp_path, keys):
    (record,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema).studies
    hostile = json.loads(json.dumps(record.document))
    hostile["held"] = {"files": 1, "reasons": {"<script>alert(1)</script>": 1}}
    assert "script" not in Page(render(hostile, {})).tags


def test_the_pictures_show_the_middle_slice_before_and_after(study, tmp_path, keys):
    folder = EvidenceFolder(tmp_path / "evidence")
    for path in (p for p in study.source.rglob("*.dcm") if "SEG" not in p.name):
        ds = pydicom.dcmread(path)
        values = np.full((ds.Rows, ds.Columns), -1000, np.int16)
        values[2:5, 3:6] = 100 * int(ds.InstanceNumber) - 600
        ds.PixelData = values.tobytes()
        ds.save_as(path)
    deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder)
    before, after = (picture(next((folder.path / "pictures").glob(f"*-{what}.png"))) for what in ("before", "after"))
    np.testing.assert_array_equal(before, after)
    middle = {round((100 * number - 600 + 250) * 255 / 600 - 0.5) for number in (4, 5)}
    assert set(np.unique(before)) - {0} <= middle
    assert before[2, 3]
    assert not before[0, 0]


def test_what_is_held_is_in_the_evidence_of_its_study(study, tmp_path, keys):
    other = plant(tmp_path / "hospital" / "second", study.schema, seed=2)
    capture = next(p for p in other.source.rglob("*.dcm") if "SEG" not in p.name)
    ds = pydicom.dcmread(capture)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.save_as(capture)
    for path in study.source.glob("*/*.dcm"):
        if "SEG" not in path.name:
            path.write_bytes(path.read_bytes()[:-400])
    (study.source / "note.txt").write_text("hello")
    report = deidentify(study.source, tmp_path / "out", keys, schema=study.schema)
    held = [record.document["held"] for record in report.studies]
    assert sum(h["files"] for h in held) + report.studies[0].document["files_of_no_study"] == len(report.held)
    reasons = {reason for h in held for reason in h["reasons"]}
    assert "secondary captures often carry text in their pixels" in reasons
    assert len(report.studies) == 2
    assert [len(record.document["series"]) for record in report.studies].count(0) == 1  # nothing of the first passed
    assert not [t for t in study.tokens + other.tokens if t in json.dumps([r.document for r in report.studies])]


def test_running_again_keeps_what_was_counted(study, tmp_path, keys):
    folder = EvidenceFolder(tmp_path / "evidence")
    (first,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder).studies
    (again,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder).studies
    row, before = again.document["series"][0], first.document["series"][0]
    assert row["attributes"] == before["attributes"]
    assert (row["already_there"], row["done"]) == (True, first.document["made"])
    (third,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder).studies
    assert third.document["series"] == again.document["series"]
    (folder.path / f"{first.name}.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        deidentify(study.source, tmp_path / "out", keys, schema=study.schema, evidence=folder)


def test_a_series_that_was_there_without_its_counts_says_so(study, tmp_path, keys):
    deidentify(study.source, tmp_path / "out", keys, schema=study.schema)
    (record,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema).studies
    (row,) = record.document["series"]
    assert (row["already_there"], row["headers"], row["checked"]) == (True, 0, 0)
    assert "done by an earlier run, whose counts are not here" in render(record.document, {})


def test_a_label_object_that_is_held_is_not_counted(study, tmp_path, keys):
    path = next(study.source.rglob("*SEG.dcm"))
    ds = pydicom.dcmread(path)
    ds.SegmentSequence[0].SegmentLabel = "Somebody"
    ds.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue = "unknown"
    ds.save_as(path)
    (record,) = deidentify(study.source, tmp_path / "out", keys, schema=study.schema).studies
    (row,) = record.document["series"]
    assert (row["headers"], row["label_maps"], row["label_maps_held"]) == (8, 0, 1)
    assert record.document["held"]["files"] == 1
    assert "1 label map held" in render(record.document, {})


def test_several_processes_count_the_same(study, tmp_path, keys):
    more = plant(tmp_path / "hospital" / "b", study.schema, seed=3)
    assert more.tokens
    one = deidentify(study.source, tmp_path / "one", keys, schema=study.schema)
    two = deidentify(study.source, tmp_path / "two", keys, schema=study.schema, workers=2)
    assert [r.document["series"] for r in one.studies] == [r.document["series"] for r in two.studies]


@pytest.mark.parametrize("place", ["out", "out/evidence", "hospital/evidence", "."])
def test_the_folder_lies_apart_from_source_and_output(study, tmp_path, keys, place):
    with pytest.raises(DataError, match="in the source or the output"):
        deidentify(study.source, tmp_path / "out", keys, evidence=EvidenceFolder(tmp_path / place))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_others_may_read_is_refused(study, tmp_path, keys):
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence").chmod(0o755)
    with pytest.raises(DataError, match="Others may look"):
        deidentify(study.source, tmp_path / "out", keys, evidence=EvidenceFolder(tmp_path / "evidence"))


def test_what_is_weaker_than_the_default_is_said(tmp_path):
    assert weaker(load_recipe(), PixelPolicy(text="quarantine")) == ()
    said = weaker(load_recipe("basic", ["modified-dates"]), PixelPolicy(faces=False))
    assert len(said) == 3
    assert "dates stay, shifted by one number of days a patient" in said
    own = tmp_path / "allow-list.dicom"
    own.write_text(re.sub(r"(?m)^KEEP KVP$", "", load_recipe().text))
    assert weaker(load_recipe(own), PixelPolicy()) == ("the recipe is the site's own",)


def test_what_is_planted_in_every_corner_of_a_file_stays_out(study, tmp_path, keys):
    key, files = AnswerKey(), sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)
    for script in ("latin", "utf-8", "japanese"):
        plant_series(files, tmp_path / "in" / script, key, patient=script, study="1", series="1", script=script)
    folder = EvidenceFolder(tmp_path / "evidence")
    report = deidentify(tmp_path / "in", tmp_path / "out", keys, evidence=folder)
    assert len(report.series) == 3
    written = [p for p in folder.path.rglob("*") if p.is_file()]
    assert len(written) == 12
    content = b"\n".join(str(p.relative_to(folder.path)).encode() + p.read_bytes() for p in written)
    content += json.dumps(
        json.loads(next(p for p in written if p.suffix == ".json").read_text()), ensure_ascii=False
    ).encode()
    tokens = {p.token for p in key.plants if len(p.token) >= 5}
    assert len(tokens) > 500
    assert not [t for t in tokens for e in ("utf-8", "latin-1", "utf-16-le") if t.encode(e, "replace") in content]
