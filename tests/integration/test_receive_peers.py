"""Other programs push into the node: dcmtk on loopback, Orthanc in a network of its own, over TLS and without."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.types import Modality
from tests.certificates import self_signed

from .conftest import ask, call, free_port, need, system_program, wait_for
from .peers import PATIENCE_S, Node, orthanc, peak_kib, rest, write_large

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """One patient's series of 24 images and its DICOM SEG."""
    folder = tmp_path_factory.mktemp("study")
    scan, labels = generate(5, Modality.MR, (24, 20, 24))
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=5, hospital="Northgate")
    return folder


@contextlib.contextmanager
def new_node(folder: Path, inside: tuple[str, ...] = (), **rules: object) -> Iterator[Node]:
    node = Node(folder / "node", free_port(), inside)
    ask("medlsdm-node", "init", "--site", "site-a", "--home", node.home)
    done = call("medlsdm-node", "receive", "--home", node.home)
    assert done.returncode == 4  # nobody is allowed yet
    allowed = {"calling": ["ORTHANC", "STORESCU"], "addresses": ["127.0.0.1"], "port": node.port}
    node.rules(**(allowed | {"min_free_bytes": 0, "quiet_seconds": 2.0} | rules))
    node.start()
    try:
        yield node
    finally:
        if node.process is not None and node.process.poll() is None:
            node.stop(signal.SIGKILL)


def scu(name: str, node: Node, *arguments: str, calling: str = "STORESCU", called: str = "MEDLSDM") -> int:
    titles, to = ["-aet", calling, "-aec", called], ["127.0.0.1", str(node.port)]
    command = [system_program(name), *titles, *arguments[:-1], *to, *filter(None, arguments[-1:])]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_dcmtk_echoes_and_pushes_and_who_is_not_named_is_refused(tmp_path, study):
    need("echoscu", "storescu", "dcmsend")
    with new_node(tmp_path) as node:
        assert scu("echoscu", node, "") == 0
        assert scu("echoscu", node, "", calling="OTHER") != 0
        assert scu("echoscu", node, "", called="OTHER") != 0
        assert scu("storescu", node, "-R", "+sd", "+r", str(study), calling="OTHER") != 0
        assert node.kept() == []
        assert scu("storescu", node, "-R", "+sd", "+r", str(study)) == 0
        assert len(node.kept()) == 25
        assert scu("dcmsend", node, "+sd", "+r", str(study)) == 0
        assert len(node.kept()) == 25
        wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
        said = node.stop()
        assert "Took in a study: 1 scans" in said
        for ds in (pydicom.dcmread(p, stop_before_pixels=True) for p in study.rglob("*") if p.is_file()):
            assert not any(str(ds.get(k)) in said for k in ("PatientName", "PatientID", "StudyInstanceUID"))
        counts = [r["fields"]["counts"] for r in ask("medlsdm-node", "audit", "--home", node.home)["records"]
                  if r["event"] == "received"]  # fmt: skip
        total = {what: sum(c.get("STORESCU", {}).get(what, 0) for c in counts) for what in ("stored", "equal")}
        assert total == {"stored": 25, "equal": 25}


def test_dcmtk_is_told_of_a_low_disk_and_a_wrong_address_hears_nothing(tmp_path, study):
    need("echoscu", "storescu")
    with new_node(tmp_path, min_free_bytes=1 << 60) as node:
        command = [system_program("storescu"), "-v", "-R", "-nh", "-aet", "STORESCU", "-aec", "MEDLSDM", "127.0.0.1"]
        done = subprocess.run(
            [*command, str(node.port), "+sd", "+r", str(study)], capture_output=True, text=True, check=False
        )
        assert (done.stdout + done.stderr).count("Refused: OutOfResources") == 25
        assert node.kept() == []
        assert "25 x refused: the disk is low" in node.stop()
        node.rules(min_free_bytes=0, addresses=["10.9.8.0/24"])
        node.start()
        assert scu("echoscu", node, "") != 0
        assert "connection refused" in node.stop()


@pytest.mark.parametrize("after_instances", [1, 5, 18])
def test_killed_in_the_middle_nothing_is_lost_and_nothing_is_there_twice(tmp_path, study, after_instances):
    need("storescu")
    files = sorted(str(p) for p in study.rglob("*") if p.is_file())
    with new_node(tmp_path, quiet_seconds=600.0) as node:
        command = [
            system_program("storescu"),
            "-v",
            "-R",
            "-aet",
            "STORESCU",
            "-aec",
            "MEDLSDM",
            "127.0.0.1",
            str(node.port),
            *files,
        ]
        sender = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: len(node.kept()) >= after_instances, PATIENCE_S, "instances", every=0.002)
        node.stop(signal.SIGKILL)
        said, _ = sender.communicate(timeout=PATIENCE_S)
        acknowledged = said.count("Received Store Response (Success)")
        assert sender.returncode != 0
        assert after_instances - 1 <= acknowledged < len(files)
        after = {p.name for p in node.kept()}
        assert acknowledged <= len(after) <= acknowledged + 1  # one may be on the disk whose answer was not sent yet
        node.rules(quiet_seconds=2.0)
        node.start()
        assert list((node.home / "spool" / "incoming").iterdir()) == []
        assert scu("storescu", node, "-R", "+sd", "+r", str(study)) == 0
        assert after < {p.name for p in node.kept()}
        assert len(node.kept()) == len(files)
        wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
        assert ask("medlsdm-node", "quarantine", "list", "--home", node.home) == []


def test_memory_stays_flat_while_a_large_instance_arrives(tmp_path, study):
    need("storescu")
    megabytes = 192
    write_large(study, tmp_path / "large.dcm", megabytes)
    with new_node(tmp_path, quiet_seconds=600.0) as node:
        assert node.process is not None
        assert scu("storescu", node, str(tmp_path / "large.dcm")) == 0
        (kept,) = node.kept()
        assert kept.stat().st_size > megabytes << 20
        assert 0 < peak_kib(node.process.pid) < 160_000 + 32_000  # what the program takes anyway, and some room


@pytest.mark.parametrize("secure", [False, True])
def test_orthanc_pushes_a_study(tmp_path, study, network, secure):
    rules: dict[str, object] = {}
    tls: dict[str, object] = {}
    if secure:
        public, private = map(str, self_signed(tmp_path))
        rules["tls"] = {"certificate": public, "key": private, "client_ca": public}
        tls = {
            "DicomTlsCertificate": public,
            "DicomTlsPrivateKey": private,
            "DicomTlsTrustedCertificates": public,
        }
    with new_node(tmp_path, network, **rules) as node, orthanc(tmp_path, network, node.port, tls):
        for path in (p for p in study.rglob("*") if p.is_file()):
            assert rest(network, "instances", "--data-binary", f"@{path}")
        (pushed,) = rest(network, "studies")  # type: ignore[misc]
        body = json.dumps({"Resources": [pushed], "Synchronous": True})
        assert rest(network, "modalities/node/echo", "-d", "{}") is not None
        assert rest(network, "modalities/wrong/store", "-d", body) is None
        assert node.kept() == []
        answer = rest(network, "modalities/node/store", "-d", body)
        assert isinstance(answer, dict)
        assert (answer["InstancesCount"], answer["FailedInstancesCount"]) == (25, 0)
        assert len(node.kept()) == 25
        if secure:  # one who does not speak TLS, and one without a certificate, are refused
            plain = [
                *network,
                system_program("echoscu"),
                "-aet",
                "STORESCU",
                "-aec",
                "MEDLSDM",
                "127.0.0.1",
                str(node.port),
            ]
            nameless = [*plain[:5], "+tla", "-ic", *plain[5:]]
            assert subprocess.run(plain, capture_output=True, check=False).returncode != 0
            assert subprocess.run(nameless, capture_output=True, check=False).returncode != 0
        wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
