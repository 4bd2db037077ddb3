"""A coordinator and its sites as real processes, in a network of their own, to be hurt and measured."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from medlsdm.federation.app import free_port

SIZE = (20, 24, 10)
PATIENTS = {"site-a": 5, "site-b": 9, "site-c": 17}
SCRIPTS = Path(sysconfig.get_path("scripts"))
HERE, THERE = "10.77.0.1", "10.77.0.2"
BUSY = "x = 0\nwhile True:\n    x += 1\n"


def inside_own_network() -> None:
    """Run this script again in a network of its own, where only loopback is, so that no test reaches anything else."""
    if os.environ.get("MEDLSDM_BED") == "1":
        return
    prepare = 'ip link set lo up && mkdir -p /run/netns && mount -t tmpfs none /run/netns && exec "$@"'
    command = ["unshare", "-n", "-m", "sh", "-c", prepare, "sh", sys.executable, *sys.argv]
    os.execvpe("unshare", command, os.environ | {"MEDLSDM_BED": "1"})


def program(name: str) -> str:
    return str(SCRIPTS / name)


def wait(ready: Callable[[], Any], seconds: float, what: str, every: float = 0.1) -> Any:
    end = time.monotonic() + seconds
    while not (answer := ready()):
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds:.0f} s still waiting for {what}")
        time.sleep(every)
    return answer


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep so many processes at work beside the test."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


class Bed:
    """Hold one federation below ``root``."""

    def __init__(self, root: Path, sites: dict[str, int] | None = None) -> None:
        self.root, self.patients = root, sites or PATIENTS
        self.home = root / "coordinator"
        self.port, self.host = free_port(), "127.0.0.1"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.apart: set[str] = set()  # sites in a network of their own
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDLSDM_", "FLWR_"))} | {
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def node(self, site: str) -> Path:
        return self.root / site / "node"

    def call(self, name: str, *arguments: Any, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program(name), *map(str, arguments)], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def ask(self, name: str, *arguments: Any) -> Any:
        done = self.call(name, *arguments, "--json")
        if done.returncode:
            raise RuntimeError(f"{name} {arguments[0]}: {done.stderr[-400:]}")
        return json.loads(done.stdout)

    def start(self, label: str, name: str, *arguments: Any, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        with (self.root / f"{label}.log").open("ab") as log:
            process = subprocess.Popen(
                [*prefix, program(name), *map(str, arguments)], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.running[label] = process
        return process

    def said(self, label: str) -> list[str]:
        path = self.root / f"{label}.log"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def build(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        hosts = ("--host", "127.0.0.1", "--host", HERE)
        self.ask("medlsdm-server", "init", *hosts, "--port", self.port, "--home", self.home)
        for number, site in enumerate(self.patients):
            self.ask("medlsdm-node", "init", "--home", self.node(site), "--site", site, "--threads", "1")
            self._fill(site, number)

    def _fill(self, site: str, number: int) -> None:
        code = f"""
from dataclasses import replace
from pathlib import Path
from medlsdm.anatomy import generate
from medlsdm.types import Modality
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import Vault
vault = Vault(NodeHome(Path({str(self.node(site))!r})))
for k in range({self.patients[site]}):
    scan, labels = generate(1000 * {number} + k, Modality.MR, {SIZE})
    vault.put_pair(f"p{{k:03d}}.0", replace(scan, subject=f"p{{k:03d}}"), labels)
"""
        subprocess.run([sys.executable, "-c", code], env=self.environment, check=True)

    def start_server(self) -> float:
        began, before = time.monotonic(), len(self.said("server"))
        bind = "0.0.0.0" if self.apart else "127.0.0.1"  # a network of the test's own
        process = self.start("server", "medlsdm-server", "start", "--bind", bind, "--home", self.home)

        def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError("the coordinator ended: " + " ".join(self.said("server")[-3:]))
            return any("Coordinator ready" in line for line in self.said("server")[before:])

        wait(ready, 300, "the coordinator")
        return time.monotonic() - began

    def join(self, site: str) -> subprocess.Popen[bytes]:
        ticket = self.root / f"{site}.invitation"
        if not ticket.exists():
            self.ask("medlsdm-server", "invite", "--hospital", site, "--out", ticket, "--home", self.home)
        prefix = ("ip", "netns", "exec", site) if site in self.apart else ()
        where = f"{HERE if site in self.apart else self.host}:{self.port}"
        return self.start(
            site, "medlsdm-node", "join", "--server", where, "--invitation", ticket, "--home", self.node(site),
            prefix=prefix,
        )  # fmt: skip

    def set_apart(self, site: str) -> None:
        """Put a site behind a line of its own, which can be cut or slowed."""
        for command in (
            f"ip netns add {site}", "ip link add line type veth peer name far", f"ip link set far netns {site}",
            f"ip addr add {HERE}/24 dev line", "ip link set line up",
            f"ip netns exec {site} ip addr add {THERE}/24 dev far", f"ip netns exec {site} ip link set far up",
            f"ip netns exec {site} ip link set lo up",
        ):  # fmt: skip
            subprocess.run(command.split(), check=True)
        self.apart.add(site)

    def line(self, *, up: bool) -> None:
        subprocess.run(["ip", "link", "set", "line", "up" if up else "down"], check=True)

    def slow(self, site: str, shape: str) -> None:
        """Shape the line both ways, for example ``rate 1mbit loss 2%`` (netem)."""
        for prefix, device in ((["ip", "netns", "exec", site], "far"), ([], "line")):
            subprocess.run(
                [*prefix, "tc", "qdisc", "replace", "dev", device, "root", "netem", *shape.split()], check=True
            )

    def plan(
        self, *, rounds: int, steps: int = 5, sites: int = 3, stage2: int = 1, name: str = "plan", **more: Any
    ) -> Path:
        from medlsdm.config import load_preset

        tiny = load_preset("tiny").model_dump(mode="json")
        tiny |= {"name": "minute", "window": [20, 24, 16]}
        tiny["autoencoder"] |= {"channels": [8, 16], "label_width": 8}
        tiny["denoiser"] |= {"channels": [16, 24], "label_width": 8}
        tiny["stage1"] |= {"crop": [16, 20, 16]}
        for part, changes in more.pop("preset", {}).items():
            tiny[part] |= changes
        (self.root / f"{name}.preset.yaml").write_text(yaml.safe_dump(tiny))
        stages = {"stage1": {"rounds": rounds, "steps": steps}, "stage2": {"rounds": stage2, "steps": steps}}
        plan = {"preset": str(self.root / f"{name}.preset.yaml"), "modalities": ["MR"], "sites": sites} | stages | more
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    def launch(self, plan: Path) -> str:
        return self.ask("medlsdm-server", "launch", "--plan", plan, "--detach", "--home", self.home)["id"]

    def status(self) -> dict[str, Any]:
        return self.ask("medlsdm-server", "status", "--home", self.home)

    def events(self, launch: str, *kinds: str) -> list[dict[str, Any]]:
        path = self.home / "launches" / f"{launch}.diary.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [e for e in found if not kinds or e["event"] in kinds]

    def activity(self, site: str) -> dict[str, Any]:
        try:
            return json.loads((self.node(site) / "run/activity.json").read_text())
        except (OSError, ValueError):
            return {}

    def processes(self, home: Path, word: str) -> list[int]:
        """Return the live processes of one home whose command line holds a word."""
        found, marks = [], (f"={home}".encode(), str(home).encode())
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                    told = (entry / "environ").read_bytes()
                    ours = any(mark in told for mark in marks) or str(home) in command
                    if not dead and ours and word in command and "starter.py" not in command:
                        found.append(int(entry.name))
        return found

    def kill(self, home: Path, word: str) -> bool:
        pids = self.processes(home, word)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def kill_program(self, label: str) -> None:
        self.running[label].kill()
        self.running[label].wait()

    def up(self) -> None:
        """Build, start, and wait until every site is admitted and in contact."""
        self.build()
        self.start_server()
        for site in self.patients:
            self.join(site)
        wait(
            lambda: (
                all(s["seen"] for s in self.status()["sites"]) and len(self.status()["sites"]) == len(self.patients)
            ),
            300,
            "sites",
            1,
        )

    def down(self) -> float:
        """End everything; return how long that took."""
        began = time.monotonic()
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return time.monotonic() - began

    def left(self) -> list[str]:
        """Return what still runs below this root."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                    if not dead and command and f"={self.root}/".encode() in (entry / "environ").read_bytes():
                        found.append(command[:120])
        return found
