"""What people get wrong at the coordinator's command line."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from medlsdm.federation.app import program
from medlsdm.federation.identity import Invitation

WITHOUT_JSON = ("start", "admit")


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEDLSDM_")}
    return subprocess.run(
        [program("medlsdm-server"), *map(str, arguments)],
        env=kept,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def refused(status: int, word: str, *arguments: str | Path) -> None:
    machine = arguments[0] not in WITHOUT_JSON
    done = call(*arguments, *(["--json"] if machine else []))
    assert done.returncode == status, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert word in done.stderr
    if machine:
        assert json.loads(done.stdout)["error"]["message"] in done.stderr
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    "command", [("status",), ("models",), ("launch",), ("start",), ("invite", "--hospital", "a"), ("admit", "a")]
)
def test_there_is_no_coordinator(tmp_path, command):
    refused(4, "init", *command, "--home", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_init_twice(home):
    ca = home.ca_cert.read_bytes()
    refused(4, "already", "init", "--host", "localhost", "--home", home.root)
    assert home.ca_cert.read_bytes() == ca


def test_a_damaged_settings_file(home):
    home.settings_file.write_text('{"hosts": 3}')
    refused(8, "server.json", "status", "--home", home.root)


def test_options_that_make_no_sense(home):
    refused(2, "--colour", "status", "--colour", "--home", home.root)
    refused(2, "small letters", "invite", "--hospital", "St. Anna", "--home", home.root)
    refused(2, "nobody", "admit", "nobody", "--home", home.root)


def test_a_port_that_is_taken(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused(9, port, "start", "--bind", "127.0.0.1", "--port", port, "--home", home.root)


def test_started_twice(home):
    with (home.run / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(9, "running already", "start", "--bind", "127.0.0.1", "--home", home.root)


def test_launches_that_cannot_begin(home, tmp_path):
    refused(9, "not running", "launch", "--home", home.root)
    refused(4, "nothing", "launch", "--plan", "nothing", "--home", home.root)
    refused(4, "nothing", "launch", "--resume", "nothing", "--home", home.root)
    (tmp_path / "plan.yaml").write_text("stage1: [")
    refused(4, "plan.yaml", "launch", "--plan", tmp_path / "plan.yaml", "--home", home.root)


def test_an_invitation_is_written_for_its_owner_only(home, tmp_path):
    path = tmp_path / "invitation"
    done = call("invite", "--hospital", "site-a", "--out", path, "--home", home.root, "--json")
    invitation = Invitation.decode(path.read_text())
    assert invitation.site == "site-a"
    assert invitation.token not in done.stdout + done.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
