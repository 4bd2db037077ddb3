"""Real programs on loopback: start, watch and end them, and record what travels between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import pytest

from medlsdm.federation.app import free_port, program

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def environment(**extra: str) -> dict[str, str]:
    """Return an environment in which nothing of this user's own node or server is found."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEDLSDM_", "FLWR_"))}
    kept["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), kept.get("PATH", "")])  # Flower starts its own
    return kept | QUIET | extra


def call(name: str, *arguments: str | Path, timeout: float = 180, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run an installed program to its end."""
    return subprocess.run(
        [program(name), *map(str, arguments)],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def ask(name: str, *arguments: str | Path, timeout: float = 180) -> Any:
    """Run a program with ``--json`` and return its answer; fail with its own words."""
    done = call(name, *arguments, "--json", timeout=timeout)
    assert done.returncode == 0, f"{name} {arguments[0]}: {done.stderr}"
    return json.loads(done.stdout)


def need(*programs: str) -> None:
    for name in programs:
        system_program(name)


def system_program(name: str) -> str:
    """Return the system's program: pynetdicom installs senders of the same names beside Python."""
    path = shutil.which(name, path="/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin")
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


def wait_for(ready: Callable[[], Any], seconds: float, what: str, every: float = 0.2) -> Any:
    """Return the first true answer of ``ready``."""
    end = time.monotonic() + seconds
    while True:
        answer = ready()
        if answer:
            return answer
        assert time.monotonic() < end, f"after {seconds} s still waiting for {what}"
        time.sleep(every)


def of_home(flwr_home: Path) -> dict[int, str]:
    """Return the processes, by id, that run with this Flower home, whoever their parent is by now."""
    wanted, found = f"FLWR_HOME={flwr_home}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if state != "Z" and command:
                    found[int(entry.name)] = command
    return found


def wait_until_gone(flwr_home: Path, seconds: float) -> None:
    """Fail, and name them, if programs of this home still run after so long."""
    end = time.monotonic() + seconds
    while left := of_home(flwr_home):
        assert time.monotonic() < end, f"after {seconds} s these still run: {left}"
        time.sleep(0.2)


class Programs:
    """Hold every program that a test started, and end each of them, whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []
        self.homes: list[Path] = []

    def start(self, log: str, name: str, *arguments: str | Path, **extra: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as stream:
            process = subprocess.Popen(
                [program(name), *map(str, arguments)],
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        self.running.append(process)
        return process

    def end(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for home in self.homes:
            for pid in of_home(home):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Request:
    """Hold one request that a node sent, as it was before TLS."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class RecordingProxy:
    """Stand between nodes and gateway with the server's own key; keep what nodes sent, one file a connection.

    Each site proves itself by its certificate, so the proxy needs the site's key too: ``identities`` names its file.
    """

    def __init__(
        self, folder: Path, cert: Path, key: Path, ca: Path, upstream: int, identities: dict[str, Path]
    ) -> None:
        self.folder, self.upstream, self.port, self.identities = folder, upstream, free_port(), identities
        self._door = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._door.load_cert_chain(cert, key)
        self._door.load_verify_locations(cafile=str(ca))
        self._door.verify_mode = ssl.CERT_OPTIONAL
        self._ca = ca
        self._connections = 0
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def start(self) -> None:
        self.folder.mkdir()
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, "127.0.0.1", self.port, ssl=self._door)
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        record = self.folder / f"{self._connections:05d}.sent"
        there = None
        trust = ssl.create_default_context(cafile=str(self._ca))
        shown = writer.get_extra_info("peercert")
        if shown:
            subject = dict(part for row in shown["subject"] for part in row)
            trust.load_cert_chain(self.identities[subject["commonName"]])
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self.upstream, ssl=trust)
            with record.open("wb", buffering=0) as stream:
                ways = [_pump(reader, there, stream.write), _pump(back, writer, lambda _: None)]
                tasks = [asyncio.ensure_future(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            pass  # the other side is gone; the node will see its connection end
        finally:
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    def requests(self) -> list[Request]:
        """Return every whole request that was sent, in the order of connections."""
        return [r for path in sorted(self.folder.glob("*.sent")) for r in parse_requests(path.read_bytes())]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[bytes], Any]) -> None:
    while piece := await reader.read(1 << 16):
        note(piece)
        writer.write(piece)
        await writer.drain()


def parse_requests(stream: bytes) -> list[Request]:
    """Cut the client's half of an HTTP/1.1 connection into requests."""
    connection, found = h11.Connection(h11.SERVER), []
    connection.receive_data(stream)
    head, body = None, bytearray()
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            head, body = event, bytearray()
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {k.decode().lower(): v.decode() for k, v in head.headers}
            found.append(Request(head.method.decode(), head.target.decode(), headers, bytes(body)))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return found
            connection.start_next_cycle()
        else:
            return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    held = Programs(tmp_path_factory.mktemp("programs"))
    yield held
    held.end()


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
