"""A planted study through the node's programs: its evidence is right and holds nothing of it; the log resists."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pydicom
import pytest

from deid_tools.plant import write_planted_study
from deid_tools.recipes import load_recipe
from medlsdm.anatomy import generate
from medlsdm.types import Modality

from .conftest import ask, call


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """Return a node that has taken in one planted study, the study, and what was planted."""
    root = tmp_path_factory.mktemp("evidence")
    scan, labels = generate(5, Modality.MR, (20, 24, 12))
    tokens = write_planted_study(
        scan.array, scan.geometry, Modality.MR, labels, root / "in", seed=5, hospital="Northgate"
    )
    home = root / "node"
    ask("medlsdm-node", "init", "--home", home, "--site", "st-anna")
    rules = home / "deid.yaml"
    rules.write_text(rules.read_text().replace("pictures: false", "pictures: true").replace("remove  ", "keep    ", 1))
    assert ask("medlsdm-node", "ingest", root / "in", "--home", home)["pairs"] == 1
    return home, root / "in", tokens


def the_record(home: Path) -> dict[str, Any]:
    (row,) = ask("medlsdm-node", "evidence", "list", "--home", home)
    assert row["in_audit_log"]
    return row


def test_nothing_planted_stands_in_the_evidence(node, tmp_path):
    home, _, tokens = node
    row = the_record(home)
    shown = call("medlsdm-node", "evidence", "show", row["id"], "--home", home, "--json")
    plain = call("medlsdm-node", "evidence", "show", row["id"], "--home", home)
    page = tmp_path / "page.html"
    said = call("medlsdm-node", "evidence", "report", row["id"], "--out", page, "--home", home)
    assert (shown.returncode, plain.returncode, said.returncode) == (0, 0, 0)
    assert "must stay inside the hospital" in said.stdout
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2
    texts = [shown.stdout, plain.stdout, said.stdout, html, (home / "audit.jsonl").read_text()]
    assert len(tokens) > 40
    assert not [t for t in tokens for text in texts if t in text]
    document = json.loads(shown.stdout)
    assert document["weaker"] == ["faces in head scans stay"]
    assert "faces in head scans stay" in html


def test_the_counts_are_those_of_an_independent_count(node):
    home, source, _ = node
    (row,) = ask("medlsdm-node", "evidence", "show", the_record(home)["id"], "--home", home)["series"]
    files = [pydicom.dcmread(p) for p in sorted(source.rglob("*.dcm"))]
    stays = load_recipe().kept | load_recipe().replaced.keys()
    expected, blocks, private, overlays = Counter[str](), 0, 0, 0
    for ds in (ds for ds in files if ds.Modality == "MR"):
        for element in ds:
            if element.tag.is_private:
                blocks += element.tag.is_private_creator
                private += not element.tag.is_private_creator and bool(element.value)
            elif element.keyword and element.value not in (None, "", []) and element.tag.group < 0x5000:
                expected[element.keyword] += element.keyword not in stays
        overlays += 0x60000010 in ds
    attributes = {name: Counter(listed) for name, listed in row["attributes"].items()}
    gone = attributes["removed"] + attributes["removed, put back empty"]
    for keyword, count in expected.items():
        if count and keyword not in ("SpecificCharacterSet", "InstanceNumber"):  # set anew by the program
            assert gone[keyword] >= count, keyword
            assert gone[keyword] <= count + 1, keyword  # the label object may have it too
    assert not set(gone) & {"Rows", "PixelSpacing", "PatientID"}
    assert row["headers"] == len(files)
    segmentation = next(ds for ds in files if ds.Modality == "SEG")
    assert not any(element.tag.is_private for element in segmentation)
    assert row["others"]["private blocks removed"] == blocks
    assert row["others"]["private elements removed"] == private
    assert row["others"]["overlay planes removed"] == overlays
    for keyword in ("PatientName", "PatientID"):
        assert attributes["replaced by the pseudonym"][keyword] == len(files)


def test_a_changed_line_and_a_removed_one_are_found(node, tmp_path):
    home, _, _ = node
    log, end = home / "audit.jsonl", home / "audit.end"
    whole, stated = log.read_bytes(), end.read_bytes()
    found = ask("medlsdm-node", "audit", "--home", home)
    lines = whole.splitlines(keepends=True)
    assert (found["signed_from"], len(found["records"])) == (0, len(lines))
    (tmp_path / "copy.jsonl").write_bytes(whole)  # what a third party has: the log and the public key
    copy = ask("medlsdm-node", "audit", "--log", tmp_path / "copy.jsonl", "--key", found["key"])
    assert (copy["records"], copy["signed_from"], copy["head"]) == (len(lines), 0, found["head"])
    wrong = call("medlsdm-node", "audit", "--log", tmp_path / "copy.jsonl", "--key", "00" * 32)
    assert wrong.returncode == 8
    assert "Line 1 of copy.jsonl is not signed" in wrong.stderr
    changed = [line.replace(b'"pairs": 1', b'"pairs": 2') for line in lines]
    assert changed != lines
    for content, words in (
        (b"".join(changed), "Line 2 of audit.jsonl was changed"),
        (b"".join(lines[:1] + lines[2:]), "Line 2 of audit.jsonl"),
        (b"".join(lines[:-1]), f"{len(lines) - 1} of {len(lines)} lines are there"),
    ):
        log.write_bytes(content)
        done = call("medlsdm-node", "audit", "--home", home)
        assert (done.returncode, words in done.stderr) == (8, True), done.stderr
    log.write_bytes(b"".join(lines[:-1]))
    end.unlink()
    assert call("medlsdm-node", "audit", "--home", home).returncode == (8 if len(lines) > 2 else 0)
    log.write_bytes(whole)
    end.write_bytes(stated)
    assert call("medlsdm-node", "audit", "--home", home).returncode == 0


def test_the_program_alone_writes_evidence_too(node, tmp_path):
    _, source, tokens = node
    folder = tmp_path / "evidence"
    (tmp_path / "key").write_text("5a" * 32)
    (tmp_path / "key").chmod(0o600)
    done = call("medlsdm-deid", "run", source, tmp_path / "out", "--key", tmp_path / "key", "--evidence", folder)
    assert done.returncode == 0, done.stderr
    assert "they show originals" in done.stdout
    written = sorted(p for p in folder.rglob("*") if p.is_file())
    assert {p.suffix for p in written} == {".json", ".html", ".png"}
    for path in written:
        content = str(path.relative_to(folder)).encode() + path.read_bytes()
        assert not [t for t in tokens if t.encode() in content]
    assert call("medlsdm-deid", "verify", tmp_path / "out").returncode == 0
    inside = call(
        "medlsdm-deid", "run", source, tmp_path / "b", "--key", tmp_path / "key", "--evidence", tmp_path / "b/e"
    )
    assert inside.returncode == 3
    assert not (tmp_path / "b").exists()
