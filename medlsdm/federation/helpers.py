"""Programs of Flower that we start, watch, and end with us, however we end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medlsdm.federation import guard, starter
from medlsdm.federation.app import die_with_parent, program

STEADY_SECONDS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 1.0, 30.0
STOP_SECONDS = 6.0


class Helper:
    """Keep one program running in a process group of its own; pause longer after each early end.

    ``command`` is asked anew for each start. What the program prints goes to ``log``.
    """

    def __init__(
        self, command: Callable[[], list[str]], *, log: Path, cwd: Path, environment: Callable[[], Mapping[str, str]],
        confine: Callable[[], None] = die_with_parent,
    ) -> None:  # fmt: skip
        self.command, self.log, self.cwd, self.environment, self.confine = command, log, cwd, environment, confine
        self.process: subprocess.Popen[bytes] | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.started, self.ended, self.pause = 0.0, 0.0, FIRST_PAUSE_S

    def start(self) -> None:
        """Start the program, and beside it what ends its group when we are gone."""
        rotate(self.log)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.cwd,
                env=dict(self.environment()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self.confine,
            )
        self.started = time.monotonic()
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(self.process.pid)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Tell whether the program runs."""
        return self.process is not None and self.process.poll() is None

    def tend(self) -> int | None:
        """Start the program if it ended and its pause is over; return the status of an end seen now."""
        if self.process is not None and (status := self.process.poll()) is not None:
            self.ended = time.monotonic()
            steady = self.ended - self.started > STEADY_SECONDS
            self.pause = FIRST_PAUSE_S if steady else min(2 * self.pause, LONGEST_PAUSE_S)
            stop([self], 1.0)
            self.process = None
            return status
        if self.process is None and time.monotonic() - self.ended >= self.pause:
            self.start()
        return None

    def again(self, patience_s: float = STOP_SECONDS) -> None:
        """End the program; the next ``tend`` starts it anew without a pause."""
        stop([self], patience_s)
        self.process, self.ended, self.pause = None, 0.0, FIRST_PAUSE_S


def stop(helpers: Iterable[Helper], patience_s: float = STOP_SECONDS) -> None:
    """End programs and whatever they started: all at once, gently for so long, then by SIGKILL."""
    helpers = list(helpers)
    groups = [h.process for h in helpers if h.process is not None]
    for process in groups:
        _signal(process.pid, signal.SIGTERM)
    end = time.monotonic() + patience_s
    while groups and time.monotonic() < end:
        groups = [p for p in groups if p.poll() is None or _signal(p.pid, 0)]
        time.sleep(0.05)
    for process in groups:
        _signal(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    for helper in helpers:
        if helper.guard is not None:
            helper.guard.kill()
            helper.guard.wait()
            helper.guard = None


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group; return whether a process of it, dead ones that nobody waits for aside, is left."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return guard.lives(group)


def shims(folder: Path) -> Path:
    """Write, in place of Flower's app programs, scripts that start them with signs of life; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("flwr-serverapp", "flwr-clientapp"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -I -S "{starter.__file__}" "{program(name)}" "$@"\n', encoding="utf-8"
        )
        script.chmod(0o700)
    return folder


def rotate(log: Path, most_bytes: int = 8 << 20) -> None:
    """Keep one older log beside the current one, each of limited size."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > most_bytes:
            os.replace(log, log.with_suffix(f"{log.suffix}.old"))
