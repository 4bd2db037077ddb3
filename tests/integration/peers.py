"""A node that receives, Orthanc beside it, and what tests do with both."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
import yaml

from medlsdm.federation.app import program

from .conftest import ask, environment, wait_for

PATIENCE_S = 300


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


def write_large(study: Path, path: Path, megabytes: int) -> Path:
    ds = pydicom.dcmread(next(p for p in sorted(study.rglob("*")) if p.is_file()))
    ds.NumberOfFrames, ds.Rows, ds.Columns = megabytes * 2, 512, 512
    ds.PixelData = bytes(megabytes << 20)
    ds.save_as(path)
    return path


def rest(inside: tuple[str, ...], path: str, *arguments: str) -> object:
    """Ask Orthanc; an error status is an empty answer."""
    url = f"http://127.0.0.1:18042/{path}"
    done = subprocess.run([*inside, "curl", "-sf", *arguments, url], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout else None


@contextlib.contextmanager
def orthanc(
    folder: Path,
    inside: tuple[str, ...],
    node_port: int,
    more: dict[str, object],
    asked: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Run Orthanc with further settings; with a DICOM TLS certificate among them, it speaks TLS to the node."""
    asked = asked or (lambda path: rest(inside, path))
    tls = "DicomTlsCertificate" in more
    modality = {"AET": "MEDLSDM", "Host": "127.0.0.1", "Port": node_port, "UseDicomTls": tls}
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


def peak_kib(pid: int) -> int:
    """Return the most memory that a process held so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0").split()[1])
