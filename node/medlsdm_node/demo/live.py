"""Show a demo as it runs: steps, what each site is doing, round, loss, time left."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from medlsdm_node.demo.programs import Running


class Board:
    """Collect what happens and render it: a live table on a terminal, else one line a change."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.timings: list[tuple[str, float]] = []
        self.step = ""
        self.detail = ""
        self.sites: dict[str, dict[str, Any]] = {}
        self.rounds: dict[str, Any] = {"done": 0, "of": 0, "since": 0.0}
        self._started = self._step_started = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the board for as long as the block runs."""
        if self.console.is_terminal:
            with Live(get_renderable=self._table, console=self.console, refresh_per_second=4, transient=True):
                yield
        else:
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one step of the walk."""
        self.step, self.detail, self._step_started = name, "", time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"[{time.monotonic() - self._started:5.0f} s] {name}")
        yield
        seconds = time.monotonic() - self._step_started
        self.timings.append((name, seconds))
        if self.console.is_terminal:
            self.console.print(f"[green]done[/green] {name} [dim]{seconds:.1f} s[/dim]")

    def progress(self, done: int, of: int) -> None:
        """Say how far the current step is."""
        self.detail = f"{done}/{of}"

    def follow(self, site: str, watched: Running) -> None:
        """Read a node's ``status --watch`` in a thread."""

        def read() -> None:
            assert watched.process.stdout is not None
            for line in watched.process.stdout:
                self._heard(site, json.loads(line))

        threading.Thread(target=read, daemon=True).start()

    def _heard(self, site: str, activity: dict[str, Any]) -> None:
        before = self.sites.get(site, {})
        self.sites[site] = activity
        key = [(a.get("activity"), a.get("stage"), a.get("round")) for a in (before, activity)]
        if not self.console.is_terminal and key[0] != key[1]:
            where = f" {activity['stage']} {activity['round']}/{activity['rounds']}" if "stage" in activity else ""
            self.console.print(f"[{time.monotonic() - self._started:5.0f} s]   {site}: {activity['activity']}{where}")

    def left(self) -> str:
        """Return the estimated time left in the rounds, from those that are done."""
        done, of = self.rounds["done"], self.rounds["of"]
        if not done or not self.rounds["since"]:
            return ""
        each = (time.monotonic() - self.rounds["since"]) / done
        return f"about {max(0.0, each * (of - done)):.0f} s left in the rounds"

    def _table(self) -> Group:
        now = time.monotonic()
        head = Text(f"{self.step} {self.detail}  {now - self._step_started:.0f} s  {self.left()}", style="bold")
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("site", "doing", "round", "step", "loss", "left"):
            table.add_column(name, style="dim" if name == "left" else "")
        for site, a in sorted(self.sites.items()):
            in_round = f"{a['stage']} {a.get('round')}/{a.get('rounds')}" if "stage" in a else ""
            training = a.get("activity") == "training"
            table.add_row(
                site,
                str(a.get("activity", "")),
                in_round,
                f"{a['done']}/{a['steps']}" if training else "",
                f"{a['loss']:.4f}" if training else "",
                f"{a['seconds_left']:.0f} s" if training else "",
            )
        return Group(head, table)

    def say(self, text: str) -> None:
        """Print one line above the board."""
        self.console.print(text)
        sys.stderr.flush()
