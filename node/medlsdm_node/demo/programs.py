"""Start, ask and stop the programs that users type, each with its own home and log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from medlsdm.errors import RoundError
from medlsdm.federation.app import program

STOP_SECONDS = 40


def environment() -> dict[str, str]:
    """Return an environment in which no program shares this user's own node or server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEDLSDM_") or k == "MEDLSDM_DEBUG"}
    return kept | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def ask(name: str, *arguments: str | Path) -> Any:
    """Run a command with ``--json`` to its end and return its answer.

    Raises:
        RoundError: It failed; the message is its own line.
    """
    done = subprocess.run(
        [program(name), *map(str, arguments), "--json"],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise RoundError(f"'{name} {arguments[0]}' failed: {said[-1] if said else done.returncode}")
    return json.loads(done.stdout)


class Running:
    """Hold a program that goes on in the background. ``lines`` reads what it prints, if asked to."""

    def __init__(self, log: Path, name: str, *arguments: str | Path, read: bool = False) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [program(name), *map(str, arguments)],
                env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if read else stream, stderr=stream,
                text=True,
            )  # fmt: skip

    def check(self) -> None:
        """Raise RoundError if it has ended by itself."""
        if self.process.poll() not in (None, 0):
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RoundError(f"{self.name} ended: {lines[-1] if lines else self.process.returncode}")

    def stop(self) -> None:
        """End it gently, then not gently."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{self.name} had to be killed", file=sys.stderr)
            self.process.kill()
            self.process.wait()
