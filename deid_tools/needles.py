"""Find thousands of strings in bytes in one pass: the time depends on the bytes, not on how many strings there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

SHORTEST = 3
_MASK = 0x7F
_CODECS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "iso2022_jp", "shift_jis", "euc_jp", "gb18030", "euc_kr")


def forms(text: str) -> set[bytes]:
    """Return the bytes a string may stand as, ASCII in lower case; UTF-16 of ASCII is found by leaving out zeros."""
    if text.isascii():
        return {text.lower().encode()}
    found = set()
    for case in {text, text.casefold(), text.lower(), text.upper(), text.title()}:
        for codec in _CODECS:
            try:
                found.add(case.encode(codec).lower())
            except UnicodeEncodeError:
                continue
    return found


class Needles:
    """Hold byte strings of three bytes or more, and find where they stand.

    Each position's first three bytes are looked up in a table of what strings begin with; where one
    may begin, every length that begins so is looked up in the set of all strings.
    """

    def __init__(self, needles: Iterable[bytes]) -> None:
        self._all = {n for n in needles if len(n) >= SHORTEST}
        lengths: dict[bytes, set[int]] = defaultdict(set)
        for needle in self._all:
            lengths[needle[:SHORTEST]].add(len(needle))
        self._lengths = {start: tuple(sorted(found, reverse=True)) for start, found in lengths.items()}
        self._table = np.zeros(1 << 21, np.bool_)
        for start in self._lengths:
            self._table[_key(np.frombuffer(start, np.uint8))] = True

    def __len__(self) -> int:
        return len(self._all)

    def find(self, text: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (position, string) for each string that stands in a text; ASCII of the text in lower case."""
        if len(text) < SHORTEST or not self._all:
            return
        for position in np.flatnonzero(self._table[_key(np.frombuffer(text, np.uint8))]).tolist():
            for length in self._lengths.get(text[position : position + SHORTEST], ()):
                needle = text[position : position + length]
                if needle in self._all:
                    yield position, needle


def _key(content: NDArray[np.uint8]) -> NDArray[np.int32]:
    seven = (content & _MASK).astype(np.int32)
    return seven[:-2] | (seven[1:-1] << 7) | (seven[2:] << 14)


def printable_runs(content: bytes | memoryview, shortest: int = 6) -> bytes:
    """Return the stretches of printable ASCII in binary content, one-byte and two-byte, in lower case, one a line."""
    pairs = np.frombuffer(content, "<u2", count=len(content) // 2)
    views: list[NDArray[np.unsignedinteger]] = [pairs]
    if len(pairs) and int(pairs.view("<i2").max()) >= 0x2000:  # else no second byte is printable
        views += [pairs.byteswap(), np.frombuffer(content, np.uint8)]
    return b"\n".join(filter(None, (_runs(values, shortest) for values in views))).lower()


def _runs(values: NDArray[np.unsignedinteger], shortest: int) -> bytes:
    """Keep the values that stand in a stretch of printable ones; a line break parts the stretches."""
    printable = values - values.dtype.type(0x20) <= 0x7E - 0x20
    if b"\1" * shortest not in printable.tobytes():
        return b""
    bounded = np.zeros(len(values) + 2, bool)
    bounded[1:-1] = printable
    edges = np.flatnonzero(bounded[1:] != bounded[:-1]).astype(np.int32)
    long = edges[1::2] - edges[::2] >= shortest
    starts, lengths = edges[::2][long], (edges[1::2] - edges[::2])[long] + 1  # with what stands behind a stretch
    ends = np.cumsum(lengths, dtype=np.int32)
    inside = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - ends + lengths, lengths)
    characters = values.take(inside, mode="clip").astype(np.uint8)
    characters[ends - 1] = 0x0A
    return characters.tobytes()
