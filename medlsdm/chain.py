"""An append-only file of JSON lines, each holding the hash of the line before: tampering shows.

Used for the node's audit log and the privacy ledger.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medlsdm.errors import IntegrityError

GENESIS = "0" * 64


def _line_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class HashChain:
    """Append records and read them back verified. Safe for several processes.

    Args:
        path: The file; it is made at the first append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> str:
        """Add one record, fsync it, and return its hash, the new head of the chain."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if new:
                os.fchmod(stream.fileno(), 0o600)
            head, count = GENESIS, 0
            for record in self._verified(stream):
                head, count = record["hash"], count + 1
            record = {"n": count, "time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
            record |= {"previous": head, "fields": fields}
            record["hash"] = _line_hash(record)
            stream.write(json.dumps(record, sort_keys=True, ensure_ascii=True).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        return record["hash"]

    def records(self) -> list[dict[str, Any]]:
        """Return every record, oldest first.

        Raises:
            IntegrityError: A line was changed, removed or cut short.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            return list(self._verified(stream))

    @property
    def head(self) -> str:
        """Return the hash of the last record, or 64 zeros."""
        records = self.records()
        return records[-1]["hash"] if records else GENESIS

    def _verified(self, stream: Any) -> Iterator[dict[str, Any]]:
        stream.seek(0)
        previous = GENESIS
        for number, line in enumerate(stream):
            try:
                record = json.loads(line)
                stated = record.pop("hash")
                intact = line.endswith(b"\n") and record["n"] == number and record["previous"] == previous
            except (ValueError, KeyError, TypeError, AttributeError):
                intact, stated, record = False, "", {}
            if not intact or _line_hash(record) != stated:
                raise IntegrityError(
                    f"Line {number + 1} of {self.path.name} was changed or cut short.",
                    "Nothing more is written there; restore the file from a good copy.",
                )
            previous = stated
            yield record | {"hash": stated}
