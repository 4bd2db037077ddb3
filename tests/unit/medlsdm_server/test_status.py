"""What the coordinator says is so at the moment of asking: sites by contact, launches by their lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from medlsdm_server.cli import app
from medlsdm_server.contacts import Contact
from medlsdm_server.launch import leading, load_plan, new_launch, note
from medlsdm_server.registry import Registry
from medlsdm_server.status import heard, launch_status, running, server_status, site_rows


def admitted(home, *names):
    with Registry(home.registry)._change() as database:
        for name in names:
            database.execute(
                "INSERT INTO sites (name, status, node_key, identity, node_id, enrolled)"
                " VALUES (?, 'admitted', ?, ?, '', 0)",
                (name, f"key of {name}", "0" * 64),
            )


def contacts(home, **sites):
    rows = {name.replace("_", "-"): asdict(contact) for name, contact in sites.items()}
    (home.run / "contacts.json").write_text(json.dumps(rows))


def coordinator_runs(home, pid=None):
    (home.run / "address.json").write_text(json.dumps({"port": 1, "pid": pid or os.getpid()}))


@pytest.mark.parametrize(
    ("ago", "clock", "said"),
    [
        (3, 0.0, "heard 3 s ago"), (59, 0.0, "heard 59 s ago"), (250, 0.0, "silent for 4 min"),
        (3 * 3600, 0.0, "silent for 3 h"), (3 * 86_400, 0.0, "silent for 3 d"), (-5, 0.0, "heard 0 s ago"),
        (3, -90.0, "heard 3 s ago, its clock is -90 s off"), (3, 4.9, "heard 3 s ago"),
    ],
)  # fmt: skip
def test_a_site_was_heard_or_is_silent(monkeypatch, ago, clock, said):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    assert heard({"seen": now - ago, "clock_s": clock}) == said


def test_a_site_that_never_called_was_never_heard_of():
    assert heard({"seen": 0, "clock_s": 0.0}) == "never heard of"


def test_sites_carry_their_contact_and_no_key_of_a_node(home):
    admitted(home, "site-a", "site-b")
    contacts(home, site_a=Contact(at=1000.0, activity={"activity": "training"}, clock_s=2.0))
    first, second = site_rows(home)
    assert (first["seen"], first["activity"], first["clock_s"]) == (1000, {"activity": "training"}, 2.0)
    assert (second["seen"], second["activity"]) == (0, {})
    assert "key of" not in json.dumps([first, second])


@pytest.mark.parametrize("text", ["", "[", "[]", '{"site-a": 3}', '{"site-a": {"unknown": 3}}', "\x00"])
def test_contacts_that_do_not_read_are_none(home, text):
    admitted(home, "site-a")
    (home.run / "contacts.json").write_text(text)
    assert site_rows(home)[0]["seen"] == 0


def test_a_note_of_a_coordinator_that_was_killed_is_not_believed(home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    coordinator_runs(home, ended.pid)
    assert running(home) is None
    coordinator_runs(home)
    assert running(home) == {"port": 1, "pid": os.getpid()}


def test_a_killed_leader_shows_at_once(home):
    identity = new_launch(home, load_plan("default")).id
    note(home, identity, "launched")
    coordinator_runs(home)
    code = (
        "import sys, time; from pathlib import Path; from medlsdm_server.home import ServerHome;"
        "from medlsdm_server.launch import leading, note; home = ServerHome(Path(sys.argv[1]));\n"
        "with leading(home, sys.argv[2]):\n"
        "    note(home, sys.argv[2], 'asked', stage='stage1', round=1, rounds=3); print(flush=True); time.sleep(60)"
    )
    leader = subprocess.Popen([sys.executable, "-c", code, str(home.root), identity], stdout=subprocess.PIPE)
    assert leader.stdout
    leader.stdout.readline()
    assert launch_status(home, identity)["state"] == "running"
    leader.kill()
    leader.communicate()
    assert launch_status(home, identity)["state"] == "pending"  # the coordinator starts it again
    (home.run / "address.json").unlink()
    assert launch_status(home, identity)["state"] == "interrupted"


def test_the_launch_that_is_led_is_shown_before_newer_ones(home):
    first, second = (new_launch(home, load_plan("default")).id for _ in range(2))
    assert server_status(home)["launch"]["id"] == second
    with leading(home, first):
        assert server_status(home)["launch"]["id"] == first


def test_what_went_wrong_last_is_said_until_something_goes_right(home):
    identity = new_launch(home, load_plan("default")).id
    said = []
    for event, fields in (
        ("launched", {}), ("again", {"message": "round 1 fell short"}), ("lost", {"message": "it ended"}),
        ("round", {"stage": "stage1", "round": 1, "rounds": 2, "sites": []}), ("failed", {"message": "gave up"}),
        ("resumed", {}),
    ):  # fmt: skip
        note(home, identity, event, **fields)
        said.append(launch_status(home, identity)["message"])
    assert said == ["", "round 1 fell short", "it ended", "", "gave up", ""]


def test_refusals_of_a_round_that_fell_short_are_shown_by_name(home):
    admitted(home, "site-a")
    identity = new_launch(home, load_plan("default")).id
    note(home, identity, "launched")
    rows = [
        {"site": "site-a", "loss": None, "training_seconds": 0.0, "refused": "the site's policy refused the request"}
    ]
    note(home, identity, "short", stage="stage1", round=1, rounds=3, sites=rows)
    note(home, identity, "failed", message="Round 1 got 0 usable replies.")
    done = CliRunner().invoke(app, ["status", "--home", str(home.root)])
    assert done.exit_code == 0
    assert f"launch {identity}: failed, stage1 round 1/3" in done.output
    assert "site-a: the site's policy refused the request" in done.output
    assert "never heard of" in done.output
    assert [r["sites"] for r in launch_status(home, identity)["short_rounds"]] == [rows]


def test_who_is_missing_is_named(home):
    identity = new_launch(home, load_plan("default")).id
    coordinator_runs(home)
    note(home, identity, "launched")
    with leading(home, identity):
        note(home, identity, "gathering", stage="stage1", round=1, rounds=3, online=1, missing=["site-b"])
        done = CliRunner().invoke(app, ["status", "--home", str(home.root)])
        assert "waiting for sites, stage1 round 1/3; missing: site-b" in done.output
        note(home, identity, "asked", stage="stage1", round=1, rounds=3, sites=["site-a", "site-b"])
        assert launch_status(home, identity)["missing"] == []
