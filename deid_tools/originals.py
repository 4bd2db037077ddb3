"""The strings that must be gone: collected from the originals, held in memory only, searched in what was written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXT = ("LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE", "AS", "DT", "TM")
_BINARY = ("UN", "OB")
_RUN = re.compile(rb"[\x20-\x7e\xa0-\xff]{6,}")
_WORD = re.compile(r"\w{6,}")
_PRINTABLE = re.compile(rb"[\x20-\x7e]{6,}")
_STANDARD_ROOT = "1.2.840.10008."
_SOFTWARE = (0x00020012, 0x00020013)  # the writing library, which may be the one that we write with
_SHORTEST, _ANYWHERE = 3, 6


class Originals:
    """Gather identifying strings of one series and look for them in bytes.

    Args:
        harmless: Phrases that the pipeline itself writes; they are blanked before the search.
    """

    def __init__(self, harmless: Iterable[str] = ()) -> None:
        self._strings: set[str] = set()
        self._runs: set[str] = set()
        self._kept: set[str] = set()
        self._harmless = {h.casefold() for h in harmless if h}
        self._needles: list[tuple[bytes, bool]] | None = None

    def __repr__(self) -> str:
        return "Originals(private)"

    def harmless(self, phrases: Iterable[str]) -> None:
        """Add phrases that the pipeline itself wrote, such as the names of classes."""
        self._harmless |= {str(p).casefold() for p in phrases if p}
        self._needles = None

    def add_path(self, relative: Path) -> None:
        """Remember the words of a file's name and of its folders' names."""
        for part in relative.parts:
            self._text(part.split(".")[0], shortest=_ANYWHERE)
        self._needles = None

    def add(self, ds: Dataset, kept: frozenset[str]) -> None:
        """Remember what a dataset says, but for the attributes in ``kept``."""
        self._walk(ds, kept, top=True)
        meta = getattr(ds, "file_meta", None)
        if meta is not None:
            self._walk(meta, frozenset(), top=True)
        self._bytes(getattr(ds, "preamble", None) or b"")
        self._needles = None

    def _walk(self, ds: Dataset, kept: frozenset[str], *, top: bool = False) -> None:
        for tag in list(ds.keys()):
            if tag.group == 0x7FE0 or tag in _SOFTWARE:
                continue
            try:
                element = ds[tag]
                value, vr = element.value, element.VR
            except Exception:
                raw = getattr(ds.get_item(tag), "value", b"")
                self._bytes(raw if isinstance(raw, bytes) else b"")
                continue
            if vr == "SQ":
                for item in value:
                    self._walk(item, kept)
            elif vr in _BINARY:
                self._bytes(value if isinstance(value, bytes) else b"")
            else:
                values = value if element.VM > 1 else [value]
                for one in values:
                    self._value(one, vr, private=tag.is_private, kept=top and element.keyword in kept)

    def _value(self, value: Any, vr: str, *, private: bool, kept: bool) -> None:
        text = "" if value is None else str(value).strip(" \0")
        if not text:
            return
        if kept and vr not in ("UI", "PN", "LO", "SH"):
            self._kept.add(text.casefold())
        elif vr == "UI":
            if not text.startswith(_STANDARD_ROOT):
                self._strings.add(text)
        elif vr == "PN":
            self._strings.update(p for p in re.split(r"[\^=\s,.]+", text) if len(p) >= _SHORTEST)
        elif vr == "DA":
            self._strings.update(_dates(text))
        elif vr in _TEXT:
            self._text(text, shortest=4)
            if vr == "DT":
                self._strings.update(_dates(text[:8]))
        elif private and vr in ("CS", "DS", "IS"):
            self._runs.update([text] if len(text) >= _ANYWHERE else [])

    def _text(self, text: str, *, shortest: int) -> None:
        if len(text) >= shortest:
            self._strings.add(text)
        self._strings.update(_WORD.findall(text))

    def _bytes(self, content: bytes) -> None:
        self._runs.update(run.decode("latin-1").strip() for run in _RUN.findall(content))

    def _compiled(self) -> list[tuple[bytes, bool]]:
        """Return (bytes in lower case, anywhere) for each string; the rest must stand as a word."""
        if self._needles is None:
            self._needles = []
            strong = {s.casefold().strip() for s in self._strings}
            weak = {s.casefold().strip() for s in self._runs} - strong
            for text in (strong | weak) - self._kept - self._harmless:
                if len(text) < _SHORTEST or len(set(text)) == 1:
                    continue
                anywhere = text in strong and len(text) >= _ANYWHERE
                encodings = {text.encode("utf-8"), text.encode("latin-1", "replace"), "\0".join(text).encode("utf-8")}
                self._needles += [(needle, anywhere) for needle in encodings]
        return self._needles

    def found_in(self, header: bytes, pixels: bytes = b"") -> bool:
        """Tell whether one of the strings stands in what was written.

        Args:
            header: All bytes outside the pixels; searched for every string.
            pixels: Searched for strings of six characters or more, in one-byte encodings.
        """
        text = header.lower()
        for phrase in sorted(self._harmless, key=len, reverse=True):
            text = text.replace(phrase.encode("utf-8"), b"\1" * len(phrase.encode("utf-8")))
        runs = b"\n".join(_PRINTABLE.findall(pixels)).lower()
        for needle, anywhere in self._compiled():
            if needle in text and ((anywhere and not needle.isdigit()) or _as_word(needle, text)):
                return True
            if anywhere and runs and needle in runs:
                return True
        return False


def _as_word(needle: bytes, text: bytes) -> bool:
    return re.search(rb"(?<![a-z0-9.+-])" + re.escape(needle) + rb"(?![a-z0-9]|\.[0-9])", text) is not None


def _dates(text: str) -> set[str]:
    if len(text) != 8 or not text.isdigit():
        return {text} if len(text) >= 4 else set()
    year, month, day = text[:4], text[4:6], text[6:]
    return {
        text,
        f"{year}-{month}-{day}",
        f"{year}/{month}/{day}",
        f"{day}.{month}.{year}",
        f"{day}/{month}/{year}",
        f"{month}/{day}/{year}",
    }
