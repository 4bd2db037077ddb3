"""Search raw bytes for planted identifiers: everything that was sent, logged or exported."""

from __future__ import annotations

import gzip
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from medlsdm.errors import DataError

CHUNK = 8 * 1024 * 1024
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be")
PREFIX = 6


@dataclass(frozen=True, slots=True)
class LeakSearch:
    """Say how much was searched and in which files something was found."""

    tokens: int
    files: int
    bytes_searched: int
    found: tuple[str, ...]


class Needles:
    """Find any of many byte strings, each at least six bytes long, in one pass.

    Two tables over three bytes each leave few candidates, which are then compared in full.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.by_prefix: dict[bytes, list[bytes]] = defaultdict(list)
        for token in tokens:
            for needle in {token.encode(e, "ignore") for e in ENCODINGS}:
                if len(needle) < PREFIX:
                    raise ValueError("A token is too short to be searched for.")
                self.by_prefix[needle[:PREFIX]].append(needle)
        self.longest = max((len(n) for rows in self.by_prefix.values() for n in rows), default=PREFIX)
        self._first, self._second = (np.zeros(1 << 24, dtype=bool) for _ in range(2))
        for prefix in self.by_prefix:
            self._first[int.from_bytes(prefix[:3], "little")] = True
            self._second[int.from_bytes(prefix[3:], "little")] = True

    def found_in(self, content: bytes) -> bool:
        """Tell whether any needle occurs."""
        if len(content) < PREFIX:
            return False
        data = np.frombuffer(content, dtype=np.uint8)
        starts = np.flatnonzero(self._first[_triples(data, np.arange(len(data) - PREFIX + 1))])
        starts = starts[self._second[_triples(data, starts + 3)]]
        return any(
            content.startswith(needle, start)
            for start in starts.tolist()
            for needle in self.by_prefix.get(content[start : start + PREFIX], ())
        )


def _triples(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    wide = data.astype(np.uint32) if len(at) * 4 > len(data) else None
    parts = [(wide[at + k] if wide is not None else data[at + k].astype(np.uint32)) << (8 * k) for k in range(3)]
    return parts[0] | parts[1] | parts[2]


def search(roots: Iterable[Path], tokens: Iterable[str]) -> LeakSearch:
    """Look for each token in the bytes and names of every file; gzip files are searched unpacked too.

    Raises:
        DataError: One of ``roots`` is not there: nothing found would mean nothing.
    """
    wanted = sorted(set(tokens))
    needles = Needles(wanted)
    files, size, found = 0, 0, []
    for root in roots:
        if not root.exists():
            raise DataError(f"{str(root)!r} is not there to be searched.", "Check the path.")
        for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
            files += 1
            name = path.relative_to(root) if path != root else path.name
            hit = needles.found_in(os.fsencode(name).ljust(PREFIX))
            for piece, fresh in _pieces(path, needles.longest):
                size += fresh
                hit = hit or needles.found_in(piece)
            if hit:
                found.append(str(path))
    return LeakSearch(len(wanted), files, size, tuple(found))


def _pieces(path: Path, overlap: int) -> Iterator[tuple[bytes, int]]:
    """Yield the file in pieces that overlap, each with how much of it is new; gzip also unpacked, as far as it goes."""
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        yield from _read(stream, overlap)
    if packed:
        with suppress(gzip.BadGzipFile, EOFError, zlib.error), gzip.open(path, "rb") as stream:
            yield from _read(stream, overlap)


def _read(stream: IO[bytes] | gzip.GzipFile, overlap: int) -> Iterator[tuple[bytes, int]]:
    tail = b""
    while piece := stream.read(CHUNK):
        yield tail + piece, len(piece)
        tail = (tail + piece)[-overlap:]
