from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydicom import Dataset

from medlsdm_node.home import NodeHome
from medlsdm_node.quarantine import items
from medlsdm_node.spool import Spool, StudyRecord, instance
from medlsdm_node.status import node_status, read_activity, read_losses, write_activity

from .conftest import changed, content


def test_a_new_node_is_idle_and_empty(home):
    found = node_status(home)
    assert found["activity"]["activity"] == "idle"
    assert (found["patients"], found["pairs"], found["waiting_synthetic"], found["models"]) == (0, 0, 0, [])
    assert (found["site"], found["server"], found["audit_records"]) == ("site-a", None, 1)
    json.dumps(found)


def test_status_counts_what_the_vault_holds(home, vault, pair, synthetic):
    for name in ("P-1.S-1", "P-1.S-2", "P-2.S-1"):
        vault.put_pair(name, *pair)
    vault.put_synthetic("a", synthetic, pair[1])
    (home.models / "m.stage2-0001").mkdir()
    (home.models / ".m.stage2-0002.partial").mkdir()
    home.server_file.write_text('{"host": "example.org", "port": 1}')
    found = node_status(home)
    assert (found["patients"], found["pairs"], found["waiting_synthetic"]) == (2, 3, 1)
    assert (found["models"], found["server"]) == (["m.stage2-0001"], "example.org:1")


def test_activity_comes_back(home):
    write_activity(home, "training", stage="stage1", round=2)
    now = read_activity(home)
    assert (now["activity"], now["stage"], now["round"]) == ("training", "stage1", 2)


def test_a_loss_that_is_being_written_is_left_out(home):
    home.losses.write_text('{"loss": 1.5}\n{"loss": 2')
    assert read_losses(home) == [{"loss": 1.5}]


def spooled(home: NodeHome, ds: Dataset) -> str:
    spool = Spool(home)
    arrival = spool.begin()
    arrival.write(content(ds))
    return spool.accept(arrival, ds.SOPInstanceUID, ds.file_meta.TransferSyntaxUID)[0]


def test_status_counts_what_waits_in_the_spool_and_what_is_held(home, study):
    assert (node_status(home)["waiting_studies"], node_status(home)["quarantine"]) == (0, 0)
    one = spooled(home, study[0])
    other = changed(study[1])
    other.StudyInstanceUID = "2.25.99"
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "2.25.98"
    assert spooled(home, other) != one
    assert (node_status(home)["waiting_studies"], node_status(home)["quarantine"]) == (2, 0)
    spooled(home, changed(study[0]))  # other bytes under the same UID: held
    assert (node_status(home)["waiting_studies"], node_status(home)["quarantine"]) == (2, 1)
    spool = Spool(home)
    spool.put_record(one, StudyRecord(instances=dict([instance(spool.files(one)[0].name)]), pairs=1))
    found = node_status(home)
    assert (found["waiting_studies"], found["quarantine"], found["quarantine"]) == (1, len(items(home)), 1)
    said = status_text(home)
    assert "receiving: 1 studies wait to be taken in" in said
    assert "quarantine: 1 items" in said


@pytest.mark.parametrize("rule", ["faces: blur", "recipe: nope", "device_rules: none.yaml", "segmenter: nope"])
def test_status_says_that_deid_yaml_is_broken(home, rule):
    assert "BROKEN" not in status_text(home)
    file, name = home.root / "deid.yaml", rule.split(":")[0]
    lines = [rule if line.startswith(f"{name}:") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    (line,) = [line for line in status_text(home).splitlines() if "BROKEN" in line]
    assert "deid.yaml" in line
    assert "nothing is taken in" in line
    assert "error" in node_status(home)["deidentification"]


def status_text(home: NodeHome) -> str:
    ask = [sys.executable, "-c", "from medlsdm_node.cli import main; main()", "status", "--home", str(home.root)]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout


def test_a_release_that_adds_nothing_says_so_and_not_what_the_vault_holds(home, study, vault, pair):
    vault.put_pair("P-1.S-1", *pair)
    spooled(home, study[0])
    spooled(home, changed(study[0]))
    (held,) = items(home)
    ask = ["quarantine", "release", held.id, "--home", str(home.root)]
    program = [sys.executable, "-c", "from medlsdm_node.cli import main; main()"]
    said = subprocess.run([*program, *ask], capture_output=True, text=True, check=True).stdout
    assert said.startswith("0 scans were added to the vault.\n")
