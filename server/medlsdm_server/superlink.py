"""Flower's SuperLink and its SuperExec: on loopback, supervised, registered at and asked through command lines.

Its Control API knows no login in the open-source edition, so it never listens beyond loopback; hospitals reach the
fleet calls alone, through ``gateway``. Its store is in memory: no run outlives it anyway, its SQLite gives up a call
after 5 s of waiting for a lock, and what is in memory is gone with the run. Sites are registered anew from our own
registry when they sign on.
"""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError, RoundError
from medlsdm.federation.app import flower_environment, free_port, program
from medlsdm.federation.helpers import Helper, shims, stop
from medlsdm_server.home import HOME_VARIABLE, ServerHome

log = logging.getLogger(__name__)

CONNECTION = "medlsdm"
START_SECONDS, COMMAND_SECONDS = 180, 300
HEALTH_SECONDS, PATIENCE_SECONDS = 5.0, 60.0


class SuperLink:
    """Keep ``flower-superlink`` and ``flower-superexec`` running for as long as the coordinator runs."""

    def __init__(self, home: ServerHome) -> None:
        self.home, self.port = home, free_port()
        self.link = self._helper(self._link_command, "superlink.log")
        self.executor = self._helper(self._executor_command, "superexec.log")
        self._asked, self._healthy = 0.0, 0.0

    def _helper(self, command: Any, log_name: str) -> Helper:
        home = self.home
        return Helper(
            command, log=home.logs / log_name, cwd=home.run,
            environment=lambda: flower_environment(
                home.flwr, shims(home.run / "programs"), **{HOME_VARIABLE: str(home.root)}
            ),
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Return the base address on loopback."""
        return f"https://127.0.0.1:{self.port}"

    def _link_command(self) -> list[str]:
        return [
            program("flower-superlink"),
            "--ssl-ca-certfile", str(self.home.ca_cert),
            "--ssl-certfile", str(self.home.server_cert),
            "--ssl-keyfile", str(self.home.server_key),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            "--isolation", "process",
            "--host", "127.0.0.1",
            "--port", str(self.port),
        ]  # fmt: skip

    def _executor_command(self) -> list[str]:
        return [
            program("flower-superexec"),
            "--runtime-api-address", f"127.0.0.1:{self.port}",
            "--root-certificates", str(self.home.ca_cert),
        ]  # fmt: skip

    def start(self) -> None:
        """Start both and wait until the SuperLink answers.

        Raises:
            RoundError: It ended or did not answer in time; its log says more.
        """
        self.link.start()
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.link.alive:
            if self._answers():
                self.executor.start()
                self._configure()
                return
            time.sleep(0.2)
        self.stop()
        raise RoundError("Flower's SuperLink did not start.", f"See {self.link.log}.")

    def _configure(self) -> None:
        config = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.home.ca_cert}"\n'
        )
        write_atomic(self.home.flwr / "config.toml", config.encode())
        self._healthy = time.monotonic()

    def _answers(self) -> bool:
        import httpx

        try:
            with httpx.Client(verify=trust(self.home), timeout=10, trust_env=False) as client:
                return client.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def tend(self) -> bool:
        """Start what ended, and a SuperLink that has not answered for a minute; to be called each second.

        Returns:
            Whether the SuperLink was started again, so that it knows no site and no run.
        """
        if (status := self.executor.tend()) is not None:
            log.warning("flower-superexec ended with status %s; it is started again", status)
        fresh = self.link.process is None
        if (status := self.link.tend()) is not None:
            log.warning("flower-superlink ended with status %s; it is started again", status)
        now = time.monotonic()
        if fresh and self.link.alive:
            self._healthy = now + START_SECONDS - PATIENCE_SECONDS
            return True
        if now - self._asked > HEALTH_SECONDS:
            if self._answers():
                self._healthy = max(self._healthy, time.monotonic())
            self._asked = time.monotonic()
            if self._asked - self._healthy > PATIENCE_SECONDS:
                log.warning("flower-superlink has not answered for %.0f s; it is started again", PATIENCE_SECONDS)
                self.link.again()
        return False

    def stop(self) -> None:
        """End both, and what they started."""
        stop([self.executor, self.link])


def trust(home: ServerHome) -> ssl.SSLContext:
    """Return a TLS context that trusts our own CA alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=str(home.ca_cert))
    return context


def flwr(home: ServerHome, *arguments: str) -> dict[str, Any]:
    """Run one ``flwr ... --format json`` against the running SuperLink and return its answer.

    Raises:
        BusyError: No coordinator runs in this folder.
        RoundError: The command failed.
    """
    if not (home.flwr / "config.toml").exists():
        raise BusyError("The coordinator is not running.", "Run 'medlsdm-server start' in another terminal.")
    try:
        done = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            cwd=home.run,
            env=flower_environment(home.flwr, **{HOME_VARIABLE: str(home.root)}),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RoundError(f"flwr {arguments[0]} did not end in {COMMAND_SECONDS} s.", "Is the machine busy?") from error
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


def unregister(home: ServerHome, node_id: str) -> None:
    """Take a node out, so that no message reaches it any more."""
    flwr(home, "supernode", "unregister", node_id, CONNECTION)
