"""Orthanc's DICOMweb plugin pushes into the node and is pulled from, in a network of its own, over TLS and without."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.federation.app import program
from medlsdm.types import Modality
from tests.certificates import self_signed

from .conftest import ask, environment, free_port, wait_for
from .peers import PATIENCE_S, Node, orthanc, peak_kib, write_large

pytestmark = pytest.mark.peers
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
TOKEN, USER, PASSWORD = "0123456789abcdef0123456789abcdef", "reader", "a long password"
IMAGES = 24


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> list[Path]:
    """Two patients' series of 24 images with a DICOM SEG each."""
    if not PLUGIN.exists():
        pytest.skip("orthanc-dicomweb is not installed")
    folders = []
    for seed in (5, 6):
        scan, labels = generate(seed, Modality.MR, (24, 20, IMAGES))
        folder = tmp_path_factory.mktemp("study")
        write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=seed, hospital="Northgate")
        folders.append(folder)
    return folders


@dataclass
class Site:
    """A node without DIMSE and its archive, behind the same network."""

    node: Node
    inside: tuple[str, ...]
    folder: Path
    secure: bool

    @property
    def url(self) -> str:
        return "https://127.0.0.1:18043" if self.secure else "http://127.0.0.1:18042"

    def settings(self, web_port: int) -> dict[str, object]:
        scheme = "https" if self.secure else "http"
        server = {"Url": f"{scheme}://127.0.0.1:{web_port}/", "HttpHeaders": {"Authorization": f"Bearer {TOKEN}"}}
        wrong = server | {"HttpHeaders": {"Authorization": "Bearer wrong"}}
        more: dict[str, object] = {
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Servers": {"node": server, "wrong": wrong}},
        }
        if self.secure:
            more |= {"HttpsCACertificates": str(self.folder / "node.crt"), "HttpsVerifyPeers": True,
                     "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}}  # fmt: skip
        return more

    def rest(self, path: str, *arguments: str) -> Any:
        extra = ["-u", f"{USER}:{PASSWORD}"] if self.secure else []
        done = subprocess.run(
            [*self.inside, "curl", "-sf", *extra, *arguments, f"http://127.0.0.1:18042/{path}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None

    def upload(self, folder: Path) -> None:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert self.rest("instances", "--data-binary", f"@{path}")

    def pull(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        secret = self.folder / "credentials"
        secret.touch(mode=0o600)
        secret.write_text(yaml.safe_dump({"user": USER, "password": PASSWORD} if self.secure else {}))
        safe = ["--ca", str(self.folder / "node.crt"), "--credentials", str(secret)] if self.secure else []
        where = ["--from", f"{self.url}/dicom-web/", "--home", str(self.node.home), "--json"]
        command = [*self.inside, program("medlsdm-node"), "pull", *where, *safe, *arguments]
        return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=PATIENCE_S)


def new_site(folder: Path, inside: tuple[str, ...], secure: bool) -> Site:
    """Make a node that listens for DICOMweb only."""
    node = Node(folder / "node", free_port(), inside)
    ask("medlsdm-node", "init", "--site", "site-a", "--home", node.home)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    web: dict[str, object] = {"addresses": ["127.0.0.1"], "port": node.port, "token_file": str(token)}
    if secure:
        public, private = map(str, self_signed(folder))
        web["tls"] = {"certificate": public, "key": private}
    rules = {"web": web, "min_free_bytes": 0, "quiet_seconds": 2.0}
    (node.home / "receive.yaml").write_text(yaml.safe_dump(rules))
    return Site(node, inside, folder, secure)


@contextlib.contextmanager
def relay(site: Site) -> Iterator[None]:
    """Speak TLS in front of the archive, if it is to be."""
    if not site.secure:
        yield
        return
    files = [str(site.folder / "node.crt"), str(site.folder / "node.key")]
    command = [*site.inside, sys.executable, str(Path(__file__).with_name("tls_relay.py")), "18043", "18042", *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield
        finally:
            process.kill()


def identifiers(folder: Path) -> set[str]:
    found = set()
    for ds in (pydicom.dcmread(p, stop_before_pixels=True) for p in folder.rglob("*") if p.is_file()):
        found |= {str(ds.get(k)) for k in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")}
    return found


@pytest.mark.parametrize("secure", [False, True])
def test_orthanc_pushes_a_study_over_the_web(tmp_path, studies, network, secure):
    site = new_site(tmp_path, network, secure)
    node = site.node
    node.start()
    try:
        with orthanc(tmp_path, network, node.port, site.settings(node.port), site.rest):
            site.upload(studies[0])
            body = json.dumps({"Resources": site.rest("studies"), "Synchronous": True})
            assert site.rest("dicom-web/servers/wrong/stow", "-d", body) is None
            assert node.kept() == []
            for _ in range(2):
                assert site.rest("dicom-web/servers/node/stow", "-d", body) is not None
                assert len(node.kept()) == IMAGES + 1
            wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
        said = node.stop()
    finally:
        if node.process is not None and node.process.poll() is None:
            node.stop(signal.SIGKILL)
    assert "Took in a study: 1 scans" in said
    assert "401" in said
    assert not any(word in said for word in identifiers(studies[0]))


@pytest.mark.parametrize("secure", [False, True])
def test_studies_are_pulled_from_orthanc_and_only_once(tmp_path, studies, network, secure):
    site = new_site(tmp_path, network, secure)
    node = site.node
    with orthanc(tmp_path, network, node.port, site.settings(node.port), site.rest), relay(site):
        for folder in studies:
            site.upload(folder)
        datasets = [next(pydicom.dcmread(p) for p in f.rglob("*") if p.is_file()) for f in studies]
        first = str(datasets[0].StudyInstanceUID)
        done = site.pull("--study", first)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["studies"], found["instances"], found["known"]) == (1, IMAGES + 1, 0)
        assert (found["fetched"], found["failed"], found["pairs"]) == ({"stored": IMAGES + 1}, 0, 1)
        again = json.loads(site.pull("--study", first).stdout)
        assert (again["known"], again["fetched"], again["bytes"]) == (IMAGES + 1, {}, 0)
        both = json.loads(site.pull("--modality", "MR").stdout)
        assert (both["studies"], both["known"], both["fetched"]) == (2, IMAGES + 1, {"stored": IMAGES + 1})
        assert node.pairs() == 2
        day = str(datasets[0].StudyDate)
        assert json.loads(site.pull("--date", f"{day}-{day}").stdout)["known"] >= IMAGES + 1
        assert json.loads(site.pull("--modality", "XA").stdout)["studies"] == 0
        if secure:
            refused = site.pull("--modality", "MR", "--credentials", str(empty(tmp_path)))
            assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (7, "network")
            assert "does not accept us" in refused.stderr
            distrust = site.pull("--modality", "MR", "--ca", str(other_ca(tmp_path)))
            assert distrust.returncode == 7
            assert "not trusted" in distrust.stderr
    gone = site.pull("--study", first)
    assert (gone.returncode, json.loads(gone.stdout)["error"]["code"]) == (7, "network")
    words = {word for folder in studies for word in identifiers(folder)}
    assert not any(word in gone.stderr + done.stderr for word in words)
    for path in (p for p in node.home.rglob("*") if p.is_file()):
        assert not any(word.encode() in path.read_bytes() for word in words), path


def empty(folder: Path) -> Path:
    file = folder / "none.yaml"
    file.touch(mode=0o600)
    return file


def other_ca(folder: Path) -> Path:
    return self_signed(folder / "elsewhere")[0]


def test_a_pull_that_is_killed_goes_on_where_it_was(tmp_path, studies, network):
    site = new_site(tmp_path, network, False)
    node = site.node
    with orthanc(tmp_path, network, node.port, site.settings(node.port), site.rest):
        site.upload(studies[0])
        where = ["--from", f"{site.url}/dicom-web", "--home", str(node.home), "--modality", "MR"]
        command = [program("medlsdm-node"), "pull", *where]
        first = subprocess.Popen([*network, *command], env=environment(), stderr=subprocess.DEVNULL)
        wait_for(lambda: len(node.kept()) >= 5, PATIENCE_S, "five instances", every=0.002)
        first.kill()
        first.wait()
        here = len(node.kept())
        assert 5 <= here <= IMAGES
        found = json.loads(site.pull("--modality", "MR").stdout)
        assert (found["known"], found["fetched"]) == (here, {"stored": IMAGES + 1 - here})
        assert (found["pairs"], found["held"]) == (1, 0)
        assert list((node.home / "spool" / "pulling").iterdir()) == []


def test_killed_in_the_middle_of_an_upload_nothing_is_lost_and_nothing_is_there_twice(tmp_path, studies, network):
    site = new_site(tmp_path, network, False)
    node = site.node
    node.start()
    try:
        files = sorted(p for p in studies[0].rglob("*") if p.is_file())
        head, tail = b"--b\r\nContent-Type: application/dicom\r\n\r\n", b"\r\n"
        (tmp_path / "body").write_bytes(b"".join(head + p.read_bytes() + tail for p in files) + b"--b--\r\n")
        sender = subprocess.Popen(
            curl(site, tmp_path / "body", "--limit-rate", "60k"), stdout=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(node.kept()) >= 5, PATIENCE_S, "five instances", every=0.002)
        node.stop(signal.SIGKILL)
        said, _ = sender.communicate(timeout=PATIENCE_S)
        assert said == ""  # nothing was acknowledged
        before = {p.name for p in node.kept()}
        assert 5 <= len(before) < len(files)
        node.start()
        assert list((node.home / "spool" / "incoming").iterdir()) == []
        done = subprocess.run(curl(site, tmp_path / "body"), capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        assert len(answer["00081199"]["Value"]) == len(files)
        assert "00081198" not in answer
        assert before < {p.name for p in node.kept()}
        assert len(node.kept()) == len(files)
        wait_for(lambda: node.pairs() == 1, PATIENCE_S, "the study in the vault", every=2)
        assert ask("medlsdm-node", "quarantine", "list", "--home", node.home) == []
    finally:
        if node.process is not None and node.process.poll() is None:
            node.stop(signal.SIGKILL)


def curl(site: Site, body: Path, *more: str) -> list[str]:
    """Return the command that uploads a multipart body to the node."""
    kind = 'Content-Type: multipart/related; type="application/dicom"; boundary=b'
    headers = ["-H", kind, "-H", f"Authorization: Bearer {TOKEN}"]
    where = f"http://127.0.0.1:{site.node.port}/studies"
    return [*site.inside, "curl", "-s", "-X", "POST", "-T", str(body), *headers, *more, where]


def test_memory_stays_flat_over_the_web(tmp_path, studies, network):
    """Both ways, an instance of 192 MB: curl pushes it, and it is pulled from Orthanc."""
    megabytes = 192
    large = write_large(studies[0], tmp_path / "large.dcm", megabytes)
    site = new_site(tmp_path, network, False)
    node = site.node
    node.start()
    try:
        assert node.process is not None
        head, tail = b"--b\r\nContent-Type: application/dicom\r\n\r\n", b"\r\n--b--\r\n"
        (tmp_path / "body").write_bytes(head + large.read_bytes() + tail)
        said = subprocess.run(curl(site, tmp_path / "body"), capture_output=True, text=True, check=True)
        assert "00081199" in said.stdout
        assert peak_kib(node.process.pid) < 160_000 + 32_000
        (kept,) = node.kept()
        assert kept.stat().st_size > megabytes << 20
        node.stop()
        kept.unlink()
        with orthanc(tmp_path, network, node.port, site.settings(node.port), site.rest):
            assert site.rest("instances", "--data-binary", f"@{large}")
            where = ["--from", f"{site.url}/dicom-web", "--home", str(node.home), "--modality", "MR"]
            puller = subprocess.Popen(
                [*network, program("medlsdm-node"), "pull", *where], env=environment(), stderr=subprocess.DEVNULL
            )
            peak = 0
            while not node.kept() and puller.poll() is None:
                peak = max(peak, peak_kib(puller.pid))
            puller.kill()
            puller.wait()
            assert len(node.kept()) == 1
            assert 0 < peak < 160_000 + 32_000
    finally:
        if node.process is not None and node.process.poll() is None:
            node.stop(signal.SIGKILL)
