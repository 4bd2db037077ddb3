"""What every door of the node has in common: it keeps instances in the spool and counts what happened, no more."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter

from medlsdm_node.spool import Spool

UNKNOWN = "unknown"


class Door(ABC):
    """Count what happens at a door, by a sender's name in receive.yaml.

    Args:
        spool: Where instances go.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._tally: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    @abstractmethod
    def start(self) -> None:
        """Listen, in threads of its own."""

    @abstractmethod
    def stop(self) -> None:
        """Listen no more, and end what is under way."""

    @abstractmethod
    def busy_with(self, study: str) -> bool:
        """Tell whether somebody who sent to this study is still connected."""

    @property
    @abstractmethod
    def announcement(self) -> str:
        """Say where it listens."""

    def count(self, caller: str, what: str) -> None:
        """Count something that happened; ``caller`` is a name that receive.yaml gives, or "unknown"."""
        with self._lock:
            self._tally[caller, what] += 1

    def counts(self) -> dict[str, dict[str, int]]:
        """Return and reset what happened since the last call: {caller: {what: how often}}."""
        with self._lock:
            taken, self._tally = self._tally, Counter()
        found: dict[str, dict[str, int]] = {}
        for (caller, what), count in sorted(taken.items()):
            found.setdefault(caller, {})[what] = count
        return found
