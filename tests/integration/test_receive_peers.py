"""Other programs push into the node: dcmtk on loopback, Orthanc in a network of its own, over TLS and without."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.federation.app import program
from medlsdm.types import Modality

from .conftest import ask, call, environment, free_port, wait_for

pytestmark = pytest.mark.peers
PATIENCE_S = 300
LOOPBACK = ipaddress.ip_address("127.0.0.1")


def need(*programs: str) -> None:
    for name in programs:
        found(name)


def found(name: str) -> str:
    """Return the system's program: pynetdicom installs senders of the same names beside Python."""
    path = shutil.which(name, path="/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin")
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """One patient's series of 24 images and its DICOM SEG."""
    folder = tmp_path_factory.mktemp("study")
    scan, labels = generate(5, Modality.MR, (24, 20, 24))
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=5, hospital="Northgate")
    return folder


@dataclass
class Node:
    """A node that receives, perhaps in another network namespace."""

    home: Path
    port: int
    inside: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [*self.inside, program("medlsdm-node"), "receive", "--home", str(self.home)]
        self.process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "listens on" in line:
                return
        pytest.fail("the receiver did not start")

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it and return what it said after its first line."""
        assert self.process is not None
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return said

    def rules(self, **changed: object) -> None:
        file = self.home / "receive.yaml"
        rules = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(rules | changed))

    def kept(self) -> list[Path]:
        return sorted((self.home / "spool" / "studies").glob("*/in/*.sealed"))

    def pairs(self) -> int:
        return ask("medlsdm-node", "status", "--home", self.home)["pairs"]


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
    command = [found(name), *titles, *arguments[:-1], *to, *filter(None, arguments[-1:])]
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
        command = [found("storescu"), "-v", "-R", "-nh", "-aet", "STORESCU", "-aec", "MEDLSDM", "127.0.0.1"]
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
            found("storescu"),
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


def write_large(study: Path, path: Path, megabytes: int) -> Path:
    ds = pydicom.dcmread(next(p for p in sorted(study.rglob("*")) if p.is_file()))
    ds.NumberOfFrames, ds.Rows, ds.Columns = megabytes * 2, 512, 512
    ds.PixelData = bytes(megabytes << 20)
    ds.save_as(path)
    return path


def test_memory_stays_flat_while_a_large_instance_arrives(tmp_path, study):
    need("storescu")
    megabytes = 192
    write_large(study, tmp_path / "large.dcm", megabytes)
    with new_node(tmp_path, quiet_seconds=600.0) as node:
        assert node.process is not None
        assert scu("storescu", node, str(tmp_path / "large.dcm")) == 0
        (kept,) = node.kept()
        assert kept.stat().st_size > megabytes << 20
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        assert peak < 160_000 + 32_000  # KiB: what the program takes without any, and some room


@pytest.fixture
def network() -> Iterator[tuple[str, ...]]:
    """Make a network in which only loopback exists, since Orthanc listens on every address; return how to enter."""
    need("unshare", "nsenter", "ip", "Orthanc", "curl")
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep 3600"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != b"up\n":
        holder.wait()
        pytest.skip("a network namespace cannot be made here")
    try:
        yield ("nsenter", "-t", str(holder.pid), "-n")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate for loopback and its key; Orthanc and the node both use it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=localhost")
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(LOOPBACK)]), False)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "node.crt", folder / "node.key"
    public.write_bytes(built.public_bytes(Encoding.PEM))
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return public, private


def rest(inside: tuple[str, ...], path: str, *arguments: str) -> object:
    """Ask Orthanc; an error status is an empty answer."""
    url = f"http://127.0.0.1:18042/{path}"
    done = subprocess.run([*inside, "curl", "-sf", *arguments, url], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None


@contextlib.contextmanager
def orthanc(
    folder: Path,
    inside: tuple[str, ...],
    node: Node,
    more: dict[str, object],
    asked: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Run Orthanc with further settings; with a DICOM TLS certificate among them, it speaks TLS to the node."""
    asked = asked or (lambda path: rest(inside, path))
    tls = "DicomTlsCertificate" in more
    modality = {"AET": "MEDLSDM", "Host": "127.0.0.1", "Port": node.port, "UseDicomTls": tls}
    settings = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "Plugins": [],
        "DicomAet": "ORTHANC",
        "DicomPort": 14242,
        "HttpPort": 18042,
        "RemoteAccessAllowed": False,
        "DicomModalities": {"node": modality, "wrong": modality | {"AET": "OTHER"}},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings | more))
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen(
            [*inside, "Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: asked("system"), 60, "Orthanc", every=1)
            yield
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("secure", [False, True])
def test_orthanc_pushes_a_study(tmp_path, study, network, secure):
    rules: dict[str, object] = {}
    tls: dict[str, object] = {}
    if secure:
        public, private = map(str, certificate(tmp_path))
        rules["tls"] = {"certificate": public, "key": private, "client_ca": public}
        tls = {
            "DicomTlsCertificate": public,
            "DicomTlsPrivateKey": private,
            "DicomTlsTrustedCertificates": public,
        }
    with new_node(tmp_path, network, **rules) as node, orthanc(tmp_path, network, node, tls):
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
            plain = [*network, found("echoscu"), "-aet", "STORESCU", "-aec", "MEDLSDM", "127.0.0.1", str(node.port)]
            nameless = [*plain[:5], "+tla", "-ic", *plain[5:]]
            assert subprocess.run(plain, capture_output=True, check=False).returncode != 0
            assert subprocess.run(nameless, capture_output=True, check=False).returncode != 0
        wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
