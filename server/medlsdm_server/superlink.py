"""Flower's SuperLink: started on loopback, registered at, asked and stopped through its command lines.

Its Control API knows no login in the open-source edition, so it never listens beyond loopback; hospitals
reach the fleet calls alone, through ``gateway``.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError, RoundError
from medlsdm.federation.app import die_with_parent, end_group, flower_environment, free_port, program
from medlsdm_server.home import HOME_VARIABLE, ServerHome

CONNECTION = "medlsdm"
START_SECONDS, STOP_SECONDS = 90, 15


class SuperLink:
    """Run ``flower-superlink`` for as long as the coordinator runs."""

    def __init__(self, home: ServerHome) -> None:
        self.home = home
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the base address on loopback."""
        return f"https://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            RoundError: It ended or did not answer in time; its log says more.
        """
        home = self.home
        log = (home.logs / "superlink.log").open("ab")
        self.process = subprocess.Popen(
            [
                program("flower-superlink"),
                "--ssl-ca-certfile", str(home.ca_cert),
                "--ssl-certfile", str(home.server_cert),
                "--ssl-keyfile", str(home.server_key),
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
                "--database", str(home.root / "superlink.db"),
                "--host", "127.0.0.1",
                "--port", str(self.port),
            ],
            cwd=home.run,
            env=flower_environment(home.flwr, **{HOME_VARIABLE: str(home.root)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        self._wait()
        config = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{home.ca_cert}"\n'
        )
        write_atomic(home.flwr / "config.toml", config.encode())

    def _wait(self) -> None:
        import httpx

        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        with httpx.Client(verify=_context(self.home), timeout=2) as client:
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    break
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    time.sleep(0.2)
        self.stop()
        raise RoundError("Flower's SuperLink did not start.", f"See {self.home.logs / 'superlink.log'}.")

    def stop(self) -> None:
        """End it, and what it started."""
        if self.process is not None:
            end_group(self.process, STOP_SECONDS)


def _context(home: ServerHome) -> Any:
    import ssl

    return ssl.create_default_context(cafile=str(home.ca_cert))


def flwr(home: ServerHome, *arguments: str) -> dict[str, Any]:
    """Run one ``flwr ... --format json`` against the running SuperLink and return its answer.

    Raises:
        BusyError: No coordinator runs in this folder.
        RoundError: The command failed.
    """
    if not (home.flwr / "config.toml").exists():
        raise BusyError("The coordinator is not running.", "Run 'medlsdm-server start' in another terminal.")
    done = subprocess.run(
        [program("flwr"), *arguments, "--format", "json"],
        cwd=home.run,
        env=flower_environment(home.flwr, **{HOME_VARIABLE: str(home.root)}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    answer = _last_json(done.stdout)
    if done.returncode != 0 or answer is None or answer.get("success") is False:
        said = (answer or {}).get("error-message") or done.stderr.strip()[-300:] or done.stdout.strip()[-300:]
        raise RoundError(f"flwr {arguments[0]} failed.", f"It said: {' '.join(str(said).split())}")
    return answer


def _last_json(text: str) -> dict[str, Any] | None:
    start = text.find("{")
    if start < 0:
        return None
    try:
        return json.loads(text[start:])
    except ValueError:
        return None


def register(home: ServerHome, name: str, node_key: str) -> str:
    """Register a site's SuperNode key and return the node id that Flower gave it."""
    key_file = Path(home.run) / f"{name}.pub"
    write_atomic(key_file, node_key.encode())
    return str(flwr(home, "supernode", "register", str(key_file), CONNECTION, "--name", name)["node-id"])
