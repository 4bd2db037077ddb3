"""What people get wrong at a node's command line: one line that says what to do, and a documented status."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.federation.app import program
from medlsdm.federation.identity import Invitation
from medlsdm.types import Geometry, Modality
from medlsdm.volumes import write_nifti
from medlsdm_node.vault import Vault

from .conftest import new_home

WITHOUT_JSON = ("join",)


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEDLSDM_")}
    command = [program("medlsdm-node"), *map(str, arguments)]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )


def refused(status: int, word: str, *arguments: str | Path, **environment: str) -> str:
    """Check the form of a refusal and return its line."""
    machine = arguments[0] not in WITHOUT_JSON
    done = call(*arguments, *(["--json"] if machine else []), **environment)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("medlsdm-node: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert word in done.stderr
    if machine:
        error = json.loads(done.stdout)["error"]
        assert set(error) == {"code", "message", "hint"}
        assert error["message"] in done.stderr
    else:
        assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("ingest", "."),
        ("synthesise", "."),
        ("export", "--out", "out"),
        ("audit",),
        ("evidence",),
        ("evidence", "show", "E-0"),
        ("evidence", "report", "E-0", "--out", "page.html"),
        ("quarantine",),
        ("quarantine", "list"),
        ("quarantine", "show", "F-0"),
        ("quarantine", "release", "F-0"),
        ("quarantine", "purge", "F-0", "--yes"),
    ],
)
def test_there_is_no_node(tmp_path, command):
    refused(4, "init", *command, "--home", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_option_that_is_unknown(tmp_path):
    refused(2, "--colour", "status", "--colour", "--home", tmp_path)
    refused(2, "nothing", "nothing")


def test_a_name_that_is_none(tmp_path):
    refused(2, "small letters", "init", "--site", "St. Anna", "--home", tmp_path / "node")
    refused(2, "small letters", "init", "--site", "anna\n", "--home", tmp_path / "node")
    refused(4, "nothing", "init", "--site", "anna", "--schema", "nothing", "--home", tmp_path / "node")
    assert not (tmp_path / "node").exists()


def test_init_twice(home):
    key = home.master_key
    refused(4, "already", "init", "--site", "site-b", "--home", home.root)
    assert home.master_key == key


def test_invitations_that_are_not_right(home, tmp_path):
    path = tmp_path / "invitation"
    asked = ("join", "--server", "127.0.0.1:1", "--invitation", path, "--home", home.root)
    refused(2, "no invitation file", *asked)
    for text in ("garbled", Invitation.new("site-a", "0" * 64, 1).encode()[:-7]):
        path.write_text(text)
        refused(6, "invitation", *asked)
    path.write_text(Invitation.new("site-b", "0" * 64, 1).encode())
    refused(6, "site-b", *asked)
    refused(6, "invitation", "join", "--server", "x", "--home", home.root, MEDLSDM_INVITATION="garbled")
    assert not home.ca_cert.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
def test_nobody_answers(home, tmp_path, host):
    path = tmp_path / "invitation"
    path.write_text(Invitation.new("site-a", "0" * 64, 1).encode())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        where = f"{host}:{closed.getsockname()[1]}"
        refused(7, where, "join", "--server", where, "--invitation", path, "--home", home.root)


def test_an_address_that_is_none(home):
    refused(2, "HOST:PORT", "join", "--server", "https://host/", "--home", home.root)


def test_a_damaged_policy(home, tmp_path):
    home.policy_file.write_text("min_sites: [")
    path = tmp_path / "invitation"
    path.write_text(Invitation.new("site-a", "0" * 64, 1).encode())
    refused(4, "policy.yaml", "join", "--server", "127.0.0.1:1", "--invitation", path, "--home", home.root)
    refused(4, "policy.yaml", "export", "--out", tmp_path / "out", "--home", home.root)


def test_a_key_that_is_missing(home, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("x")
    for name, command in {"master.key": "ingest", "identity.key": "audit"}.items():
        (home.keys / name).rename(tmp_path / name)
        refused(8, name, command, tmp_path / "in", "--home", home.root)


def test_a_changed_audit_log_or_ledger(home):
    log = home.root / "audit.jsonl"
    log.write_text(log.read_text().replace("site-a", "site-b"))
    refused(8, "audit.jsonl", "audit", "--home", home.root)


def test_a_demo_is_running(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(9, "running", "demo", "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_nobody_is_allowed_to_send(home):
    done = call("receive", "--home", home.root)
    assert done.returncode == 4
    assert "receive.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_node_that_is_busy(home, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("x")
    with home.locked("ingest"):
        refused(9, "ingest", "ingest", tmp_path / "in", "--home", home.root)


def test_nothing_to_export_or_to_synthesise_from(home, tmp_path):
    refused(3, "synthesise", "export", "--out", tmp_path / "out", "--home", home.root)
    (tmp_path / "maps").mkdir()
    refused(3, "empty", "synthesise", tmp_path / "maps", "--home", home.root)
    (tmp_path / "maps/x.nii").write_text("no image")
    refused(3, "x.nii", "synthesise", tmp_path / "maps", "--home", home.root)
    refused(2, "modality", "synthesise", tmp_path / "maps", "--modality", "US", "--home", home.root)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Write one patient's study, and its label map beside it."""
    root = tmp_path_factory.mktemp("planted")
    scan, labels = generate(5, Modality.MR, (16, 20, 8))
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, root / "study", seed=5, hospital="Northgate")
    return root / "study", labels


@pytest.fixture(scope="module")
def keeper(tmp_path_factory):
    """Make a node that holds something already."""
    home = new_home(tmp_path_factory.mktemp("keeper") / "node")
    Vault(home).put_pair("P-9.S-9", *generate(6, Modality.MR, (8, 8, 8)))
    return home


def images(folder: Path) -> list[Path]:
    found = ((p, pydicom.dcmread(p, stop_before_pixels=True)) for p in folder.rglob("*") if p.is_file())
    return [p for p, ds in sorted(found, key=lambda row: int(row[1].get("InstanceNumber") or 0)) if ds.Modality == "MR"]


def segmentation(folder: Path) -> Path:
    (found,) = {p for p in folder.rglob("*") if p.is_file()} - set(images(folder))
    return found


def truncate(folder: Path, labels) -> None:
    path = images(folder)[2]
    path.write_bytes(path.read_bytes()[:-200])


def lose_a_slice(folder: Path, labels) -> None:
    images(folder)[3].unlink()


def move_the_labels(folder: Path, labels) -> None:
    segmentation(folder).unlink()
    affine = labels.geometry.affine + np.eye(4) * [[40.0], [0.0], [0.0], [0.0]]
    write_nifti(folder / "labels.nii.gz", labels.array, Geometry(affine, labels.geometry.shape))


def label_twice(folder: Path, labels) -> None:
    write_nifti(folder / "labels.nii.gz", labels.array, labels.geometry)


def only_text(folder: Path, labels) -> None:
    for path in [*images(folder), segmentation(folder)]:
        path.unlink()
    (folder / "scan.dcm").write_text("Patient: Doe, Jane\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (only_text, "DICOM"),
        (truncate, "its series"),
        (lose_a_slice, "Slices are missing"),
        (move_the_labels, "grid"),
        (label_twice, "which one counts"),
    ],
)
def test_dicom_that_is_not_right_is_held_and_the_vault_stays(keeper, planted, tmp_path, spoil: Callable, words: str):
    shutil.copytree(planted[0], tmp_path / "in")
    before = {p: p.read_bytes() for p in (keeper.vault / "pair").iterdir()}
    spoil(tmp_path / "in", planted[1])
    line = refused(10, words, "ingest", tmp_path / "in", "--home", keeper.root)
    assert " x " in line
    assert "Doe" not in line
    assert {p: p.read_bytes() for p in (keeper.vault / "pair").iterdir()} == before
    assert list(keeper.run.glob("ingest-*")) == []


def test_what_was_held_is_listed_shown_released_and_purged(keeper, planted, tmp_path):
    shutil.copytree(planted[0], tmp_path / "in")
    images_before = images(tmp_path / "in")
    truncate(tmp_path / "in", planted[1])
    refused(10, "its series", "ingest", tmp_path / "in", "--home", keeper.root)

    def ask(*arguments: str):
        return json.loads(call("quarantine", *arguments, "--home", keeper.root, "--json").stdout)

    rows = ask("list")
    assert rows == ask()
    assert all(set(row) == {"id", "origin", "reason", "files", "series", "since"} for row in rows)
    assert all(len(row["reason"]) > 10 for row in rows)
    (row,) = [r for r in rows if ask("show", r["id"])["paths"] == [str(images_before[2])]]
    shutil.rmtree(tmp_path / "in")
    refused(3, "is not there", "quarantine", "release", row["id"], "--home", keeper.root)
    shutil.copytree(planted[0], tmp_path / "in")
    assert ask("release", row["id"])["pairs"] == 1
    assert row["id"] not in {r["id"] for r in ask("list")}
    refused(2, "--yes", "quarantine", "purge", rows[0]["id"], "--home", keeper.root)
    left = next(r for r in ask("list"))
    assert ask("purge", left["id"], "--yes") == {"item": left["id"], "deleted": 0}
    refused(3, "Nothing is held", "quarantine", "show", left["id"], "--home", keeper.root)


def test_a_folder_that_is_empty_or_none(home, tmp_path):
    (tmp_path / "in").mkdir()
    refused(3, "empty", "ingest", tmp_path / "in", "--home", home.root)
    refused(3, "not a folder", "ingest", tmp_path / "none", "--home", home.root)


def test_pulling_says_what_is_missing_before_anything_is_asked(home):
    somewhere = ("--from", "https://127.0.0.1:1/dicom-web", "--home", home.root)
    refused(2, "Nothing says what to pull", "pull", *somewhere)
    refused(2, "digits and dots", "pull", *somewhere, "--study", "x")
    refused(2, "Use https", "pull", "--from", "http://10.1.2.3/x", "--home", home.root, "--modality", "CT")
    refused(2, "no place for credentials", "pull", "--from", "https://u:p@h/", "--home", home.root, "--modality", "CT")
    refused(4, "--credentials", "pull", *somewhere, "--modality", "CT", "--ca", home.root / "none")
    refused(7, "cannot be reached", "pull", "--from", "http://127.0.0.1:1/x", "--home", home.root, "--modality", "CT")
