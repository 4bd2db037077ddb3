"""Evidence in the node: sealed, bound to the audit log, and shown only inside the hospital."""

from __future__ import annotations

import json
import resource
import stat
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.config import load_schema
from medlsdm.errors import DataError, IntegrityError, PolicyError, QuarantineError
from medlsdm.types import Geometry, Modality, SemanticMap
from medlsdm_node import evidence, quarantine
from medlsdm_node.home import NodeHome
from medlsdm_node.ingest import ingest
from medlsdm_node.vault import EVIDENCE, EVIDENCE_PICTURES, Vault

from .conftest import new_home

pytestmark = pytest.mark.usefixtures("without_tesseract")


@pytest.fixture
def planted(tmp_path) -> tuple[Path, list[str]]:
    grid = Geometry(np.diag([2.0, 2.0, 4.0, 1.0]), (24, 22, 5))
    array = np.full(grid.shape, -1000.0)
    array[4:20, 4:18] = 40
    values = np.zeros(grid.shape, np.uint8)
    values[5:9, 5:9, 2] = 1
    labels = SemanticMap(values, grid, load_schema("procedural"))
    tokens = write_planted_study(array, grid, Modality.CT, labels, tmp_path / "in", seed=4, hospital="Eastgate")
    return tmp_path / "in", tokens


def set_rule(home: NodeHome, before: str, after: str) -> None:
    path = home.root / "deid.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def last(home: NodeHome) -> dict:
    return home.audit.records()[-1]


def test_each_ingest_leaves_a_record_that_the_audit_log_knows(home, planted):
    folder, tokens = planted
    ingest(home, folder)
    ingest(home, folder)
    records = evidence.records(home)
    assert len({r.id for r in records}) == 2
    assert all(r.in_log for r in records)
    document = records[0].document
    assert document["node"]["pairs"] == 1
    assert document["node"]["settings"] == last(home)["fields"]["settings"]
    assert document["series"][0]["images"] == 5
    assert document["pictures"] == {}
    assert not [t for t in tokens if t in json.dumps(document)]
    assert Vault(home).names(EVIDENCE_PICTURES) == []
    raw = b"".join(p.read_bytes() for p in (home.vault / EVIDENCE).iterdir())
    assert document["patient"].encode() not in raw


def test_a_record_from_elsewhere_or_changed_is_noticed(home, planted):
    folder, _ = planted
    ingest(home, folder)
    (record,) = evidence.records(home)
    vault = Vault(home)
    vault.put(EVIDENCE, record.name, json.dumps(record.document | {"weaker": ["nothing"]}).encode())
    assert [r.in_log for r in evidence.records(home)] == [False]
    sealed = home.vault / EVIDENCE / f"{record.name}.sealed"
    sealed.write_bytes(sealed.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError):
        evidence.records(home)


def test_what_was_not_stored_says_why(home, planted):
    folder, _ = planted
    next(folder.rglob("*SEG.dcm")).unlink()
    with pytest.raises(QuarantineError):
        ingest(home, folder)
    (record,) = evidence.records(home)
    assert record.document["node"]["pairs"] == 0
    assert list(record.document["node"]["series_held"].values()) == ["the series has no label map"]
    (item,) = quarantine.items(home)
    set_rule(home, "segmenter: null ", "segmenter: hu-thresholds ")
    with pytest.raises(QuarantineError, match="structures"):  # they are not in this schema
        quarantine.release(home, item.id)
    assert len(evidence.records(home)) == 2
    assert last(home)["fields"]["segmenter"] == "hu-thresholds"


def test_a_study_of_which_nothing_passed_has_evidence_too(home, planted):
    folder, _ = planted
    for path in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(path)
        ds.BurnedInAnnotation = "YES"
        ds.save_as(path)
    with pytest.raises(QuarantineError):
        ingest(home, folder)
    (record,) = evidence.records(home)
    assert record.document["series"] == []
    assert record.document["held"]["files"] == 6


def test_settings_of_the_hospital_rule_and_show(home, planted, tmp_path):
    folder, _ = planted
    set_rule(home, "faces: remove ", "faces: keep ")
    set_rule(home, "recipe: allow-list ", "recipe: basic ")
    set_rule(home, "options: [] ", "options: [patient-characteristics] ")
    result = ingest(home, folder)
    assert sum("weaker than the default" in note for note in result.notes) == 3
    fields = last(home)["fields"]
    assert "faces in head scans stay" in fields["weaker"]
    assert fields["text_search"] == "drawn letters only"
    (record,) = evidence.records(home)
    assert record.document["recipe"]["sha256"] == fields["recipe"]
    assert record.document["weaker"] == fields["weaker"].split("; ")
    assert record.document["series"][0]["face"] == "left as it is"
    assert record.document["series"][0]["attributes"]["kept as it is"]["PatientSex"] == 6
    evidence.write_report(home, record.id, tmp_path / "page.html")
    assert "Weaker than the default: faces in head scans stay." in (tmp_path / "page.html").read_text()


def test_pictures_are_kept_on_request_and_leave_only_by_the_report(home, planted, tmp_path):
    folder, tokens = planted
    set_rule(home, "pictures: false ", "pictures: true ")
    ingest(home, folder)
    (record,) = evidence.records(home)
    assert sorted(key.split()[1] for key in record.document["pictures"]) == ["after", "before"]
    sealed = b"".join(p.read_bytes() for p in home.vault.rglob("*.sealed"))
    assert b"\x89PNG" not in sealed
    done = evidence.write_report(home, record.id, tmp_path / "page.html")
    assert (done["pictures"], done["in_audit_log"]) == (2, True)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 2
    assert "It stays inside the hospital" in page
    assert not [t for t in tokens if t in page]
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600
    event = last(home)
    assert (event["event"], event["fields"]["item"], event["fields"]["pictures"]) == ("evidence-report", record.id, 2)
    assert event["fields"]["who"]
    evidence.write_report(home, record.id, tmp_path / "plain.html", pictures=False)
    assert "data:image" not in (tmp_path / "plain.html").read_text()


def test_a_report_never_lies_in_an_export_and_replaces_nothing(home, planted, tmp_path):
    folder, _ = planted
    ingest(home, folder)
    (record,) = evidence.records(home)
    export = tmp_path / "export" / "images"
    export.mkdir(parents=True)
    (tmp_path / "export" / "receipt.json").write_text("{}")
    (tmp_path / "link").symlink_to(export)
    events = len(home.audit.records())
    for place in (export, tmp_path / "link", tmp_path / "export"):
        with pytest.raises(PolicyError, match="leaves the hospital"):
            evidence.write_report(home, record.id, place / "page.html")
    (tmp_path / "there.html").write_text("mine")
    for place in (tmp_path / "there.html", tmp_path / "absent" / "page.html"):
        with pytest.raises(DataError):
            evidence.write_report(home, record.id, place)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert len(home.audit.records()) == events
    with pytest.raises(DataError, match="no evidence 'E-0'"):
        evidence.find(home, "E-0")


def test_half_a_report_is_not_left_when_the_disk_is_full(home, planted, tmp_path):
    ingest(home, planted[0])
    (record,) = evidence.records(home)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # as a disk that fills up
    try:
        with pytest.raises(OSError, match="File too large"):
            evidence.write_report(home, record.id, tmp_path / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "page.html").exists()
    evidence.write_report(home, record.id, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 4000


def test_another_node_cannot_open_it(home, planted, tmp_path):
    ingest(home, planted[0])
    other = new_home(tmp_path / "other")
    (other.vault / EVIDENCE).mkdir()
    for path in (home.vault / EVIDENCE).iterdir():
        (other.vault / EVIDENCE / path.name).write_bytes(path.read_bytes())
    with pytest.raises(IntegrityError):
        evidence.records(other)
