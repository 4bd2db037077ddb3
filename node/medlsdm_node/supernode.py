"""Flower's SuperNode: installed with one approved app, kept from any other, started and watched.

Flower would run whatever code the coordinator sends. It does not install an app that is there already
and fails if it cannot create the folder of another, so the approved app is installed beforehand and
``apps/`` is then read-only. Root passes over file modes, so as root the child first loses that power.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from medlsdm.errors import EnrolmentError, RoundError
from medlsdm.federation.app import (
    build_archive,
    die_with_parent,
    end_group,
    flower_environment,
    free_port,
    obey_file_modes,
    program,
)
from medlsdm_node.coordinator import Coordinator
from medlsdm_node.home import HOME_VARIABLE, NodeHome

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S, PATIENCE_S = 2.0, 30.0, 180.0
STOP_SECONDS = 20


def install_app(home: NodeHome) -> str:
    """Install the approved app, lock ``apps/``, and return the archive's name (it ends in its digest)."""
    apps = home.flwr / "apps"
    archive = build_archive(home.run, home.flwr)
    if not (apps / archive.name.removesuffix(".fab").replace("1-0-0", "1.0.0")).is_dir():
        _set_mode(apps, 0o700)
        done = subprocess.run(
            [program("flwr"), "install", str(archive)],
            cwd=home.run,
            env=flower_environment(home.flwr),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.split())[-200:]
            raise RoundError("The Flower app could not be installed.", f"flwr said: {said}")
    _set_mode(apps, 0o500)
    return archive.name


def _set_mode(apps: Path, mode: int) -> None:
    apps.mkdir(parents=True, exist_ok=True)
    apps.chmod(mode)
    for path in apps.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _confine() -> None:
    die_with_parent()
    if os.geteuid() == 0:
        obey_file_modes()


class SuperNode:
    """Keep ``flower-supernode`` running; pause longer after each failure."""

    def __init__(self, home: NodeHome, coordinator: Coordinator) -> None:
        self.home, self.coordinator = home, coordinator
        self.process: subprocess.Popen[bytes] | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def start(self) -> None:
        """Start the process; its output goes to ``logs/supernode.log``."""
        log_file = (self.home.logs / "supernode.log").open("ab")
        threads = self.home.settings.threads
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(
            [
                program("flower-supernode"),
                "--superlink", str(self.coordinator.address),
                "--root-certificates", str(self.home.ca_cert),
                "--auth-supernode-private-key", str(self.home.node_key),
                "--host", "127.0.0.1",
                "--port", str(free_port()),
            ],
            cwd=self.home.run,
            env=flower_environment(self.home.flwr, **{HOME_VARIABLE: str(self.home.root)}, **limits),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_confine,
        )  # fmt: skip
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "medlsdm_node.guard", str(os.getpid()), str(self.process.pid)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def watch(self, on_tick: Callable[[], None], tick_s: float = 1.0) -> None:
        """Run until ``stop``; restart after crashes, give up when refused for too long.

        Raises:
            EnrolmentError: The coordinator does not know this site any more.
            RoundError: It keeps failing.
        """
        pause, failing_since = FIRST_PAUSE_S, None
        while not self.stopping:
            if self.process is None:
                self.start()
            assert self.process is not None
            status = self.process.poll()
            if status is None:
                on_tick()
                time.sleep(tick_s)
                continue
            end_group(self.process, STOP_SECONDS)
            self.process = None
            now = time.monotonic()
            failing_since = failing_since or now
            log.warning("flower-supernode ended with status %s; again in %.0f s", status, pause)
            if now - failing_since > PATIENCE_S:
                if self.coordinator.status() != "admitted":
                    raise EnrolmentError("The coordinator has not admitted this site.", "Ask the coordinator.")
                raise RoundError("flower-supernode keeps failing.", f"See {self.home.logs / 'supernode.log'}.")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def stop(self) -> None:
        """End it gently, so that the coordinator lets it come back at once."""
        self.stopping = True
        if self.process is not None:
            end_group(self.process, STOP_SECONDS)
