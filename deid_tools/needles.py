"""Find thousands of strings in bytes in one pass: the time depends on the bytes, not on how many strings there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

SHORTEST = 3
_MASK = 0x7F
_PRINTED, _LITTLE, _BIG = b"\1", 0x0201, 0x0102
_KINDS = bytes(2 if byte == 0 else 0x20 <= byte <= 0x7E for byte in range(256))
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


def printable_runs(content: bytes, shortest: int = 6) -> bytes:
    """Return the stretches of printable ASCII in binary content, one-byte and two-byte, in lower case, one a line."""
    kinds = content.translate(_KINDS)
    pairs, kinds_of_pairs = (np.frombuffer(b, "<u2", count=len(content) // 2) for b in (content, kinds))
    found = []
    if _PRINTED * shortest in kinds:
        found.append(_runs(np.frombuffer(content, np.uint8), shortest))
    if np.count_nonzero(kinds_of_pairs == _LITTLE) >= shortest:
        found.append(_runs(pairs, shortest))
    if np.count_nonzero(kinds_of_pairs == _BIG) >= shortest:
        found.append(_runs(pairs.byteswap(), shortest))
    return b"\n".join(found).lower()


def _runs(values: NDArray[np.unsignedinteger], shortest: int) -> bytes:
    """Keep the values that stand in a stretch of printable ones; a line break ends each stretch."""
    printable = (values >= 0x20) & (values <= 0x7E)
    starts = printable[: len(printable) - shortest + 1].copy()
    for shift in range(1, shortest):
        starts &= printable[shift : len(printable) - shortest + 1 + shift]
    if not starts.any():
        return b""
    inside = np.zeros(len(values), np.bool_)
    for shift in range(shortest):
        inside[shift : len(starts) + shift] |= starts
    ends = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1
    characters = np.where(inside, values, 0x0A).astype(np.uint8)
    inside[ends] = True  # one line break after each stretch
    return characters[inside].tobytes()
