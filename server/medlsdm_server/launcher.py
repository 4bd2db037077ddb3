"""See to it that every launch is led to its end, whatever ends in between: one at a time, oldest first.

The coordinator runs this beside its gateway. A launch is led by Flower's ServerApp, which holds its lock; when that
lets go before the launch is done, the run is started again from the last aggregated round.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from medlsdm.errors import MedlsdmError
from medlsdm.federation.app import APP_FOLDER
from medlsdm_server.home import ServerHome
from medlsdm_server.launch import is_led, launches, note, read_events
from medlsdm_server.superlink import CONNECTION, flwr

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
START_SECONDS = 600.0  # for a ServerApp to take its launch over, on a machine that is busy
CHECK_SECONDS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 5.0, 60.0
MOST_STARTS = 5  # in a row without a new round
OPENS, CLOSES = ("launched", "resumed"), ("finished", "failed", "stopped", "interrupted")


class Launcher:
    """Lead launches until told to stop. ``resume`` goes on with what an earlier coordinator left unfinished."""

    def __init__(self, home: ServerHome, *, resume: bool = True) -> None:
        self.home, self.resume = home, resume
        self.run_id, self.led, self.began, self.checked = "", "", 0.0, 0.0
        self.seen_leading, self.starts, self.rounds, self.pause_until = False, 0, -1, 0.0

    def run(self, stop: threading.Event) -> None:
        """Look every two seconds until ``stop`` is set."""
        self._leave_or_resume()
        while not stop.wait(LOOK_SECONDS):
            try:
                self.look()
            except (MedlsdmError, OSError) as error:
                log.warning("a launch could not be led on just now: %s", error)
            except Exception:  # this thread is all that leads launches on
                log.exception("a launch could not be led on just now")

    def _leave_or_resume(self) -> None:
        for identity in launches(self.home):
            if state(self.home, identity) in OPENS and not self.resume:
                note(self.home, identity, "interrupted", message="The coordinator was started with --no-resume.")

    def look(self) -> None:
        """Start, watch or start again the launch whose turn it is."""
        waiting = [i for i in launches(self.home) if state(self.home, i) in OPENS]
        if not waiting:
            self._end_run()
            return
        identity = self.led if self.led in waiting else waiting[0]
        if identity != self.led:
            self._end_run()
            self.led, self.starts, self.rounds, self.pause_until = identity, 0, -1, 0.0
        if is_led(self.home, identity):
            self.seen_leading = True
        elif not self.run_id:
            if time.monotonic() >= self.pause_until:
                self._start(identity)
        elif self.seen_leading or self._is_over() or time.monotonic() - self.began > START_SECONDS:
            self._again(identity)

    def _start(self, identity: str) -> None:
        done = sum(e["event"] == "round" for e in read_events(self.home, identity))
        self.starts = 1 if done != self.rounds else self.starts + 1
        self.rounds = done
        if self.starts > MOST_STARTS:
            message = f"It was started {MOST_STARTS} times without a new round. See logs/superexec.log."
            note(self.home, identity, "failed", message=message)
            return
        stop_runs(self.home)
        answer = flwr(self.home, "run", str(_app_folder(self.home)), CONNECTION, "--run-config", f'launch="{identity}"')
        self.run_id, self.began, self.seen_leading = str(answer.get("run-id", "")), time.monotonic(), False
        self.checked = time.monotonic()

    def _is_over(self) -> bool:
        """Ask Flower, now and then, whether the run has ended before anybody led it."""
        if time.monotonic() - self.checked < CHECK_SECONDS:
            return False
        self.checked = time.monotonic()
        return _status(self.home, self.run_id).startswith("finished")

    def _again(self, identity: str) -> None:
        """Note that nobody leads the launch any more; the next look starts it, after a pause."""
        if state(self.home, identity) in OPENS:
            note(self.home, identity, "lost", message="The program that led it ended; it is started again.")
        self._end_run()
        pause = min(FIRST_PAUSE_S * 2 ** max(self.starts - 1, 0), LONGEST_PAUSE_S)
        self.pause_until = time.monotonic() + pause

    def _end_run(self) -> None:
        if self.run_id:
            self.run_id, self.seen_leading = "", False
            stop_runs(self.home)


def state(home: ServerHome, identity: str) -> str:
    """Return the last event that opened or closed a launch; 'launched' for one without a diary."""
    events = (e["event"] for e in reversed(read_events(home, identity)))
    return next((e for e in events if e in OPENS + CLOSES), "launched")


def stop_runs(home: ServerHome) -> None:
    """Stop every run that Flower has not ended: one launch is led at a time, by one run."""
    for run in flwr(home, "list", CONNECTION).get("runs", []):
        if not str(run.get("status", "")).startswith("finished"):
            try:
                flwr(home, "stop", str(run["run-id"]), CONNECTION)
            except MedlsdmError as error:
                log.warning("a run of Flower could not be stopped: %s", error)


def _status(home: ServerHome, run: str) -> str:
    rows: list[dict[str, Any]] = flwr(home, "list", CONNECTION, "--run-id", run).get("runs", [])
    return str(rows[0].get("status", "")) if rows else "finished"


def _app_folder(home: ServerHome) -> Path:
    folder = home.run / "federation"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(APP_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
