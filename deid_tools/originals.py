"""The strings that must be gone: collected from the originals, held in memory only, searched in what was written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.needles import Needles, forms, printable_runs
from deid_tools.recipes import NUMBERS
from deid_tools.terms import TERMS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXT = ("LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE", "AS", "DT", "TM")
_BINARY = ("UN", "OB", "OW", "OL", "OF", "OD", "OV")
_RUN = re.compile(rb"[\x20-\x7e\xa0-\xff]{6,}")
_WORD = re.compile(r"\w{6,}")
_STANDARD_ROOT = "1.2.840.10008."
_SOFTWARE = (0x00020012, 0x00020013)  # the writing library, which may be the one that we write with
_SHORTEST, _ANYWHERE = 3, 6
_OWN_DIGITS = 5
_IDENTITY = frozenset(("PatientID", "OtherPatientIDs", "AccessionNumber", "MedicalRecordLocator", "AdmissionID"))
_TERMS = frozenset(term.casefold() for terms in TERMS.values() for term in terms)
_BEFORE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789.+-")
_IN_NUMBERS = tuple(b"%c" % byte for byte in b"0123456789.")
_AFTER = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789")


class Originals:
    """Gather identifying strings of one series and look for them in bytes.

    Args:
        harmless: Phrases that the pipeline itself writes; they are blanked before the search.
    """

    def __init__(self, harmless: Iterable[str] = ()) -> None:
        self._strings: set[str] = set()
        self._runs: set[bytes] = set()
        self._seen: set[int] = set()
        self._kept: set[str] = set()
        self._own: set[str] = set()
        self._harmless = {h.casefold() for h in harmless if h}
        self._needles: tuple[Needles, frozenset[bytes], list[bytes]] | None = None

    def __repr__(self) -> str:
        return "Originals(private)"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what another process builds anew."""
        return {**self.__dict__, "_needles": None, "_seen": set()}

    def harmless(self, phrases: Iterable[str]) -> None:
        """Add phrases that the pipeline itself wrote, such as the names of classes."""
        self._harmless |= {str(p).casefold() for p in phrases if p}
        self._needles = None

    def merge(self, other: Originals) -> None:
        """Take over what another collection of the same series holds."""
        self._strings |= other._strings
        self._runs |= other._runs
        self._kept |= other._kept
        self._own |= other._own
        self._seen |= other._seen
        self._harmless |= other._harmless
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
        for tag, stored in list(ds.items()):  # which reads none of them
            if tag >> 16 == 0x7FE0 or int(tag) in _SOFTWARE or self._again(stored, top):
                continue
            try:
                element = ds[tag]
                value, vr = element.value, element.VR
            except Exception:
                raw = getattr(stored, "value", b"")
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
                    if vr == "DA" or element.keyword in _IDENTITY:
                        self._own.update(re.findall(rf"\d{{{_OWN_DIGITS},}}", str(one)))

    def _again(self, stored: Any, top: bool) -> bool:
        """Tell whether an element's very bytes were seen under its tag in an earlier file of the series."""
        if not hasattr(stored, "is_implicit_VR") or not isinstance(stored.value, bytes):
            return False
        seen = hash((top, stored.tag, stored.VR, stored.value))
        known = seen in self._seen
        self._seen.add(seen)
        return known

    def _value(self, value: Any, vr: str, *, private: bool, kept: bool) -> None:
        text = "" if value is None else str(value).strip(" \0")
        if not text:
            return
        if kept and (vr in NUMBERS or (vr == "CS" and text.casefold() in _TERMS)):
            self._kept.add(text.casefold())
        elif vr == "UI":
            if not text.startswith(_STANDARD_ROOT):
                self._strings.add(text)
        elif vr == "PN":
            self._strings.update(p for p in re.split(r"[\^=\s,.]+", text) if _long_enough(p))
        elif vr == "DA":
            self._strings.update(_dates(text))
        elif vr in _TEXT:
            self._text(text, shortest=4)
            if vr == "DT":
                self._strings.update(_dates(text[:8]))
        elif private and vr in ("CS", "DS", "IS"):
            self._runs.update([text.encode("utf-8", "replace")] if len(text) >= _ANYWHERE else [])

    def _text(self, text: str, *, shortest: int) -> None:
        if len(text) >= shortest or (not text.isascii() and _long_enough(text)):
            self._strings.add(text)
        self._strings.update(_WORD.findall(text))

    def _bytes(self, content: bytes) -> None:
        self._runs.update(run.strip() for run in _RUN.findall(content))

    def _compiled(self) -> tuple[Needles, frozenset[bytes], list[bytes]]:
        """Return all strings as they may stand in bytes, those of them that count inside a word, and what may stand."""
        if self._needles is None:
            needles, anywhere = set[bytes](), set[bytes]()
            kept = self._kept - self._own  # a patient's own number is sought even where a kept number is the same
            gone = {s.casefold().strip() for s in self._strings | self._own} - kept - self._harmless
            for text in (t for t in gone if _long_enough(t) and len(set(t)) > 1):
                found = forms(text)
                needles |= found
                if len(text) >= _ANYWHERE or not text.isascii():
                    anywhere |= found
            allowed = {text.encode("utf-8", "replace") for text in kept | self._harmless}
            needles |= {run.lower() for run in self._runs if len(set(run)) > 1} - allowed
            phrases = sorted(self._harmless, key=len, reverse=True)
            self._needles = Needles(needles), frozenset(anywhere), [p.encode("utf-8", "replace") for p in phrases]
        return self._needles

    def found_in(self, header: bytes, pixels: bytes | memoryview = b"") -> bool:
        """Tell whether one of the strings stands in what was written, in one-byte encodings, UTF-8 or UTF-16.

        Args:
            header: All bytes outside the pixels; searched for every string.
            pixels: Searched for strings of six characters or more.
        """
        needles, anywhere, allowed = self._compiled()
        own = {digits.encode() for digits in self._own}
        text = header.lower()
        for written in allowed:
            text = text.replace(written, b"\1" * len(written))
        for form in (text, text.replace(b"\0", b"")) if b"\0" in text else (text,):
            for place, needle in needles.find(form):
                if form is not text and len(needle) <= _SHORTEST:
                    continue  # without its zeros, binary content makes short words by chance
                if (needle in anywhere and not needle.isdigit()) or _is_word(form, place, len(needle)):
                    return True
                if needle in own and _is_whole(form, place, len(needle)):
                    return True
        runs = printable_runs(pixels)
        return any(needle in anywhere for _, needle in needles.find(runs))


def _long_enough(text: str) -> bool:
    return len(text) >= _SHORTEST or (len(text) == 2 and ord(min(text)) >= 0x2E80)  # two ideographs make a name


def _is_word(text: bytes, place: int, length: int) -> bool:
    before, after = text[place - 1 : place], text[place + length : place + length + 2]
    if before and before[0] in _BEFORE:
        return False
    return not (after and (after[0] in _AFTER or (after[0] == ord(".") and after[1:].isdigit())))


def _is_whole(text: bytes, place: int, length: int) -> bool:
    """Tell whether digits are the whole part of a number, such as 70012 in 70012.0."""
    before, after = text[place - 1 : place], text[place + length : place + length + 1]
    return before not in _IN_NUMBERS and not after.isdigit()


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
