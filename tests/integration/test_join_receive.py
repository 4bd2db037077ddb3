"""One node that serves rounds and listens for a PACS at the same time: a real coordinator, dcmtk as the sender."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.types import Modality
from medlsdm_node.home import NodeHome
from medlsdm_node.status import read_activity

from .conftest import Programs, ask, call, free_port, system_program, wait_for, wait_until_gone
from .federation import SIZE, Federation

pytestmark = [pytest.mark.slow, pytest.mark.peers]
PATIENTS, STEPS, PATIENCE_S = 5, 60, 300
TOKEN = "0123456789abcdef0123456789abcdef"
ALLOWED = {"calling": ["STORESCU"], "addresses": ["127.0.0.1"], "min_free_bytes": 0, "quiet_seconds": 1.0}


def write_patient(seed: int, folder: Path) -> Path:
    scan, labels = generate(seed, Modality.MR, SIZE)
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=seed, hospital="Northgate")
    return folder


def scu(port: int, name: str, *arguments: str) -> int:
    titles = ["-aet", "STORESCU", "-aec", "MEDLSDM", "-to", "5"]
    command = [system_program(name), *titles, *arguments[:-1], "127.0.0.1", str(port), *arguments[-1:]]
    return subprocess.run(command, capture_output=True, check=False).returncode


def store(port: int, folder: Path) -> int:
    """Send a study by STOW-RS and return the status."""
    files = [p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]
    body = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + f + b"\r\n" for f in files) + b"--b--\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": kind}
    return httpx.post(
        f"http://127.0.0.1:{port}/studies", content=body, headers=headers, timeout=60, trust_env=False
    ).status_code


def receivers(home: Path) -> list[int]:
    """Return the processes that are this node's receiver."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended
            if b"receive" in words and str(home).encode() in words:
                found.append(int(entry.name))
    return found


def activity(home: Path) -> str:
    return read_activity(NodeHome(home))["activity"]


def pairs(home: Path) -> int:
    return ask("medlsdm-node", "status", "--home", home)["pairs"]


def one_site(root: Path, programs: Programs) -> tuple[Federation, Path]:
    """Start a coordinator and make a node with patients; return the node's plan too."""
    federation = Federation(root, programs, port=free_port())
    where = ["--host", "127.0.0.1", "--port", str(federation.port)]
    ask("medlsdm-server", "init", *where, "--home", federation.coordinator)
    home = federation.home("site-a")
    programs.homes += [federation.coordinator / "flower", home / "flower"]
    programs.start("server.log", "medlsdm-server", "start", "--bind", "127.0.0.1", "--home", federation.coordinator)
    for number in range(PATIENTS):
        write_patient(number, root / "incoming" / str(number))
    ask("medlsdm-node", "init", "--home", home, "--site", "site-a", "--threads", "1")
    assert ask("medlsdm-node", "ingest", root / "incoming", "--home", home)["patients"] == PATIENTS
    policy = yaml.safe_load((home / "policy.yaml").read_text())
    (home / "policy.yaml").write_text(yaml.safe_dump(policy | {"min_sites": 1}))  # one site makes the test light
    plan = federation.plan("plan")
    stages = {stage: {"rounds": 1, "steps": STEPS} for stage in ("stage1", "stage2")}
    plan.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | {"sites": 1} | stages))
    wait_for(lambda: ask("medlsdm-server", "status", "--home", federation.coordinator)["running"], 60, "coordinator")
    return federation, plan


def test_a_node_receives_while_a_round_trains_and_both_stop_together(tmp_path, programs):
    federation, plan = one_site(tmp_path, programs)
    home, port = federation.home("site-a"), free_port()
    assert call("medlsdm-node", "receive", "--home", home).returncode == 4  # nobody is allowed yet
    rules = yaml.safe_load((home / "receive.yaml").read_text())
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    web = {"addresses": ["127.0.0.1"], "port": free_port(), "token_file": str(token)}
    (home / "receive.yaml").write_text(yaml.safe_dump(rules | ALLOWED | {"port": port, "web": web}))
    server = f"127.0.0.1:{federation.port}"
    ticket = tmp_path / "invitation"
    ask("medlsdm-server", "invite", "--hospital", "site-a", "--out", ticket, "--home", federation.coordinator)
    where = ["--server", server, "--invitation", ticket, "--home", home]
    joined = programs.start("node.log", "medlsdm-node", "join", *where, "--receive")
    wait_for(lambda: scu(port, "echoscu", "-q") == 0, 60, "the receiver", every=0.5)

    with ThreadPoolExecutor(1) as pool:
        where = ["--plan", plan, "--home", federation.coordinator]
        launch = pool.submit(ask, "medlsdm-server", "launch", *where, timeout=PATIENCE_S)
        wait_for(lambda: activity(home) == "training", 120, "training", every=0.2)
        study = write_patient(99, tmp_path / "pushed")
        assert scu(port, "storescu", "-R", "+sd", "+r", str(study)) == 0
        assert store(web["port"], write_patient(98, tmp_path / "stored")) == 200
        assert activity(home) == "training"
        (receiver,) = receivers(home)
        os.kill(receiver, signal.SIGKILL)  # it comes back by itself, and the round does not notice
        wait_for(lambda: scu(port, "echoscu", "-q") == 0, 60, "the receiver again", every=0.5)
        assert receivers(home) != [receiver]
        launched = launch.result()
    assert launched["state"] == "finished"
    assert [s["refused"] for row in launched["finished_rounds"] for s in row["sites"]] == ["", ""]
    wait_for(
        lambda: ask("medlsdm-node", "status", "--home", home)["pairs"] == PATIENTS + 2,
        PATIENCE_S,
        "the pushed studies in the vault",
        every=1,
    )

    joined.terminate()
    assert joined.wait(60) == 0
    assert receivers(home) == []
    assert scu(port, "echoscu", "-q") != 0
    with pytest.raises(httpx.ConnectError):
        store(web["port"], study)
    wait_until_gone(home / "flower", 30)
    said = (programs.folder / "node.log").read_text()
    assert "MEDLSDM listens on" in said
    assert "DICOMweb listens on" in said
    assert "The receiver ended with status -9; again in 2 s." in said
    assert "Took in a study: 1 scans" in said
