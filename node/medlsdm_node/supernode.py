"""Flower's SuperNode: installed with one approved app, kept from any other, started and watched.

Flower would run whatever code the coordinator sends. It does not install an app that is there already
and fails if it cannot create the folder of another, so the approved app is installed beforehand and
``apps/`` is then read-only. Root passes over file modes, so as root the child first loses that power.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from medlsdm.errors import NetworkError, RoundError
from medlsdm.federation.app import (
    build_archive,
    die_with_parent,
    flower_environment,
    free_port,
    obey_file_modes,
    program,
)
from medlsdm.federation.helpers import Helper, shims, stop
from medlsdm.federation.starter import PID_FILE_VARIABLE
from medlsdm_node.coordinator import Coordinator
from medlsdm_node.forwarder import Forwarder
from medlsdm_node.home import HOME_VARIABLE, NodeHome
from medlsdm_node.status import read_activity

log = logging.getLogger(__name__)

SILENT_SECONDS = 90.0  # without a good call a SuperNode is started anew
AWAY_SECONDS, ASK_SECONDS, LOST_SECONDS = 30.0, 10.0, 5.0


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
    """Keep Flower's SuperNode and its SuperExec running, judged by what they achieve and not by being there."""

    def __init__(self, home: NodeHome, coordinator: Coordinator, say: Callable[[str], None]) -> None:
        self.home, self.coordinator, self.say = home, coordinator, say
        self.forwarder = Forwarder(home, coordinator)
        self.port = free_port()
        self.node = self._helper(self._node_command, "supernode.log")
        self.executor = self._helper(self._executor_command, "superexec.log")
        self.app = AppWatch(home)
        self.stopping = False
        self._away = False
        self._asked = time.monotonic()

    def _helper(self, command: Callable[[], list[str]], log_name: str) -> Helper:
        home, threads = self.home, str(self.home.settings.threads)
        limits = {} if threads == "0" else {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        extra = {HOME_VARIABLE: str(home.root), PID_FILE_VARIABLE: str(home.run / "app.pid")} | limits
        return Helper(
            command, log=home.logs / log_name, cwd=home.run, confine=_confine,
            environment=lambda: flower_environment(home.flwr, shims(home.run / "programs"), **extra),
        )  # fmt: skip

    def _node_command(self) -> list[str]:
        return [
            program("flower-supernode"),
            "--superlink", f"127.0.0.1:{self.forwarder.port}",
            "--root-certificates", str(self.forwarder.certificate),
            "--auth-supernode-private-key", str(self.home.node_key),
            "--isolation", "process",
            "--host", "127.0.0.1",
            "--port", str(self.port),
        ]  # fmt: skip

    def _executor_command(self) -> list[str]:
        address = f"127.0.0.1:{self.port}"
        return [program("flower-superexec"), "--insecure", "--runtime-api-address", address]

    def watch(self, on_tick: Callable[[], None], tick_s: float = 1.0) -> None:
        """Run until ``stop``; start again whatever ends or achieves nothing.

        Raises:
            EnrolmentError: The coordinator does not take this site any more.
        """
        self.forwarder.start()
        while not self.stopping:
            for helper, name in ((self.node, "flower-supernode"), (self.executor, "flower-superexec")):
                if (status := helper.tend()) is not None:
                    log.warning("%s ended with status %s; again in %.0f s", name, status, helper.pause)
            self._judge()
            on_tick()
            time.sleep(tick_s)

    @property
    def waits(self) -> bool:
        """Tell whether the SuperNode has no work: it asked for some just now and got none."""
        return not self.forwarder.busy and time.monotonic() - self.forwarder.pull < 2 * ASK_SECONDS

    def _judge(self) -> None:
        """Start the SuperNode anew when it achieves nothing though the coordinator can be reached."""
        now, way = time.monotonic(), self.forwarder
        if way.refusal:
            self._ask()
        if self.app.lost(busy=way.busy, since=way.handed):
            self.say("The training program ended before its time; the round is asked for again.")
            self._again()
        elif self.node.alive and now - max(way.asked, self.node.started) > SILENT_SECONDS:
            self.say("Flower's SuperNode has gone silent; it is started again.")
            self._again()
        last = way.contact if way.busy else way.pull
        silent = now - max(last, self.node.started)
        if silent > SILENT_SECONDS and self._ask():
            self.say("Flower's SuperNode gets no work though the coordinator answers; it is started again.")
            self._again()
        if (away := now - way.contact > AWAY_SECONDS) != self._away:
            self._away = away
            self.say("No contact with the coordinator; trying again." if away else "In contact with the coordinator.")

    def _ask(self) -> bool:
        """Ask the coordinator how this site stands, at most every ten seconds; return whether it answered well.

        Raises:
            EnrolmentError: It refuses this site.
        """
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        try:
            return self.coordinator.status() == "admitted"
        except NetworkError:
            return False

    def _again(self) -> None:
        self.node.again()
        self.executor.again()
        self.app.forget()
        self.forwarder.begin_again()

    def stop(self) -> None:
        """End it gently, so that the coordinator lets it come back at once."""
        self.stopping = True
        stop([self.executor, self.node])
        self.forwarder.stop()


class AppWatch:
    """Notice that the program of a round was killed before it had an answer. Flower alone takes a minute."""

    def __init__(self, home: NodeHome) -> None:
        self.home, self.file = home, home.run / "app.pid"
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.file.unlink(missing_ok=True)
        self.ended = 0.0

    def lost(self, *, busy: bool, since: float) -> bool:
        """Tell whether a message that was handed over at ``since`` waits for an answer that nobody will give."""
        try:
            pid, started = int(self.file.read_text()), self.file.stat().st_mtime
        except (OSError, ValueError):
            return False
        if started < since or not busy or _runs(pid) or read_activity(self.home)["activity"] in ("sending", "refused"):
            self.ended = 0.0
            return False
        self.ended = self.ended or time.monotonic()
        return time.monotonic() - self.ended > LOST_SECONDS


def _runs(pid: int) -> bool:
    """Tell whether a process is there and not dead; SuperExec leaves its dead unburied until it starts the next."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
