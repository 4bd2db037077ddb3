"""An append-only file of JSON lines, each holding the hash of the line before: tampering shows.

Used for the node's audit log and the privacy ledger. With a key each line is signed too, and a small file beside
the log states, signed, how far it reaches.

Guarantee: whoever does not have the key cannot change, insert, reorder or remove a signed line, nor any line before
    one, without ``verify`` naming it. A tail that was cut off shows as long as the statement of the log's end is there
    and not older than the cut; half a line behind the stated end, as a loss of power leaves it, counts as not written.
    Putting back an older copy of both files, or stripping a log of every signature and of its end, shows only to
    whoever knows a later head, such as the one that an export's receipt carries.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medlsdm.checks import write_atomic
from medlsdm.errors import IntegrityError, ResourceError

GENESIS = "0" * 64
_LINE, _END = b"medlsdm-chain-1\0", b"medlsdm-chain-end-1\0"
_HINT = "Nothing more is written there; restore the file from a good copy."


def _line_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ChainState:
    """Say what a chain is: how many records, its head, the number of the first signed one (None: none is signed).

    ``stated`` is how many records the signed statement of its end covers; 0 where there is no statement.
    """

    entries: int
    head: str
    signed_from: int | None
    stated: int


class HashChain:
    """Append records and read them back verified. Safe for several processes.

    Args:
        path: The file; it is made at the first append.
        key: Signs each record and the statement of the end. Records that were written without it stay valid, up to
            the first signed one.
        public: Checks signatures where there is no ``key``.
        end: The file that states the log's end; by default it has the log's name with ``.end``.
    """

    def __init__(
        self,
        path: Path,
        key: Ed25519PrivateKey | None = None,
        public: Ed25519PublicKey | None = None,
        end: Path | None = None,
    ) -> None:
        self.path, self.end = path, end or path.with_suffix(".end")
        self._key = key
        self._public = key.public_key() if key else public

    def append(self, event: str, **fields: Any) -> str:
        """Add one record, fsync it, and return its hash, the new head of the chain.

        Raises:
            ResourceError: The disk refused it; the chain is as it was.
            IntegrityError: The chain was changed or cut short.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if new:
                os.fchmod(stream.fileno(), 0o600)
            before = list(self._verified(stream))
            self._check_end(before)
            _cut_torn(stream)
            head, count = (before[-1]["hash"] if before else GENESIS), len(before)
            record = {"n": count, "time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event}
            record |= {"previous": head, "fields": fields}
            record["hash"] = _line_hash(record)
            if self._key:
                record["signature"] = self._key.sign(_LINE + bytes.fromhex(record["hash"])).hex()
            line = json.dumps(record, sort_keys=True, ensure_ascii=True).encode() + b"\n"
            size = os.fstat(stream.fileno()).st_size
            _write_whole(stream.fileno(), line, self.path.name)
            try:
                self._state_end([*before, record])
            except ResourceError:  # the end is as it was, and so shall the log be: who appends tries again
                os.ftruncate(stream.fileno(), size)
                raise
        return record["hash"]

    def records(self) -> list[dict[str, Any]]:
        """Return every record, oldest first.

        Raises:
            IntegrityError: A line was changed, removed or cut short.
        """
        if not self.path.exists():
            self._check_end([])
            return []
        with self.path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            found = list(self._verified(stream))
            self._check_end(found)
        return found

    def verify(self, *, end_must_be_stated: bool = True) -> ChainState:
        """Check every hash, every signature and the statement of the end.

        Args:
            end_must_be_stated: Whether a signed log without the statement of its end is refused; a copy that was
                handed out alone has none.

        Raises:
            IntegrityError: Something is wrong; the message names the first record that is.
        """
        records = self.records() if end_must_be_stated or self.end.exists() else self._without_end()
        for record in records:
            if "signature" in record:
                self._check_signature(record)
        first = _first_signed(records)
        return ChainState(len(records), records[-1]["hash"] if records else GENESIS, first, self._stated()[0])

    def _without_end(self) -> list[dict[str, Any]]:
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
        previous, signed = GENESIS, False
        for number, line in enumerate(stream):
            if number and not line.endswith(b"\n") and number == self._stated()[0]:
                return  # power was lost while it was written: the end was not stated, so nobody was told of it
            try:
                record = json.loads(line)
                stated = record.pop("hash")
                signature = {"signature": record.pop("signature")} if self._public and "signature" in record else {}
                intact = line.endswith(b"\n") and record["n"] == number and record["previous"] == previous
            except (ValueError, KeyError, TypeError, AttributeError):
                intact, stated, record, signature = False, "", {}, {}
            if not intact or _line_hash(record) != stated:
                raise IntegrityError(f"Line {number + 1} of {self.path.name} was changed or cut short.", _HINT)
            if signed and not signature:
                raise IntegrityError(f"Line {number + 1} of {self.path.name} has lost its signature.", _HINT)
            signed = bool(signature)
            previous = stated
            yield record | {"hash": stated} | signature

    def _check_signature(self, record: dict[str, Any]) -> None:
        try:
            assert self._public is not None
            signature = bytes.fromhex(record["signature"])
            self._public.verify(signature, _LINE + bytes.fromhex(record["hash"]))
            if signature.hex() != record["signature"]:
                raise ValueError("another spelling")
        except (InvalidSignature, ValueError, TypeError):
            raise IntegrityError(
                f"Line {record['n'] + 1} of {self.path.name} is not signed with this site's key.", _HINT
            ) from None

    def _check_end(self, records: list[dict[str, Any]]) -> None:
        """Check the last signature, which covers all lines before it, and that the log reaches as far as was stated."""
        first = _first_signed(records)
        if self._public is None:
            return
        if first is not None:
            self._check_signature(records[-1])
        stated, head, signed_from = self._stated()
        if stated > len(records):
            raise IntegrityError(
                f"{self.path.name} was cut at its end: {len(records)} of {stated} lines are there.", _HINT
            )
        if stated and (records[stated - 1]["hash"] != head or signed_from != first):
            raise IntegrityError(f"{self.path.name} is not the log whose end was stated: it was rewritten.", _HINT)
        if not stated and first is not None and first + 1 < len(records):
            raise IntegrityError(f"{self.end.name} is missing: {self.path.name} may have been cut at its end.", _HINT)

    def _stated(self) -> tuple[int, str, int]:
        """Return how many records the end's statement covers, the head there, and the number of the first signed."""
        if self._public is None or not self.end.exists():
            return 0, GENESIS, 0
        try:
            said = json.loads(self.end.read_bytes())
            self._public.verify(bytes.fromhex(said.pop("signature")), _end_bytes(said))
            return int(said["entries"]), str(said["head"]), int(said["signed_from"])
        except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
            raise IntegrityError(
                f"{self.end.name} was changed, or is not signed with this site's key.", _HINT
            ) from None

    def _state_end(self, records: list[dict[str, Any]]) -> None:
        if self._key is None:
            return
        said = {"entries": len(records), "head": records[-1]["hash"], "signed_from": _first_signed(records)}
        signature = self._key.sign(_end_bytes(said)).hex()
        write_atomic(self.end, json.dumps(said | {"signature": signature}).encode() + b"\n", mode=0o600)


def _write_whole(handle: int, line: bytes, name: str) -> None:
    """Append a line to an open file and have the disk confirm it, or leave the file as it was: half a line ends it."""
    before = os.fstat(handle).st_size
    try:
        left = memoryview(line)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except OSError as error:
        os.ftruncate(handle, before)
        raise ResourceError(
            f"{name} could not be written ({error.strerror}).", "Check free space and permissions."
        ) from error


def _cut_torn(stream: Any) -> None:
    """Remove half a line from the end of a file that was found good up to there."""
    stream.seek(0)
    content = stream.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(stream.fileno(), whole)


def _first_signed(records: list[dict[str, Any]]) -> int | None:
    return next((record["n"] for record in records if "signature" in record), None)


def _end_bytes(said: dict[str, Any]) -> bytes:
    return _END + json.dumps(said, sort_keys=True, ensure_ascii=True).encode()
