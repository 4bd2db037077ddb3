from __future__ import annotations

import json

from medlsdm_node.status import node_status, read_activity, read_losses, write_activity


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
