"""Count, attribute by attribute, what de-identification did to the headers of one series; never a value.

An attribute is named by the standard's keyword. What the standard does not name is only counted: private
elements and their blocks, unknown elements, overlay planes, curves. Attributes without a value hold nothing
and are not counted. The count is taken from the original and the result side by side, and not from what
the engine says that it did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deid_tools.recipes import Recipe

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_EMPTY, _SAME, _OTHER = 0, 1, 2
_PIXELS = 0x7FE00010
_SHORT = 64
_NUMBERED = frozenset(("InstanceNumber", "TemporalPositionIdentifier"))
_META_KEPT = frozenset((0x00020000, 0x00020001, 0x00020002, 0x00020003, 0x00020010, 0x00020012, 0x00020013))
Pattern = tuple[tuple[int, ...], tuple[int, ...], bytes]
"""Tags that hold a value in the original; tags of the result; and what each of the latter is."""


class Fate(StrEnum):
    """Name what became of an attribute."""

    REMOVED = "removed"
    EMPTIED = "removed, put back empty"
    OVERWRITTEN = "replaced by a fixed value"
    UID = "UID replaced under the site's key"
    PSEUDONYM = "replaced by the pseudonym"
    DATE = "date shifted"
    AGE = "age top-coded or banded"
    WORDS = "words cleaned"
    KEPT = "kept as it is"
    CHANGED = "kept with changes"
    REBUILT = "sequence built anew"
    ADDED_EMPTY = "added, empty"
    ADDED = "added, fixed value"


_BY_RULE = {
    "var:pseudonym": Fate.PSEUDONYM,
    "func:keyed_uid": Fate.UID,
    "func:shift": Fate.DATE,
    "func:age": Fate.AGE,
    "func:age_band": Fate.AGE,
    "func:clean_text": Fate.WORDS,
}


class Other(StrEnum):
    """Name what is counted without a name of its own."""

    PRIVATE = "private elements removed"
    BLOCKS = "private blocks removed"
    PRIVATE_KEPT = "private elements kept, named by the recipe"
    UNKNOWN = "unknown elements removed"
    OVERLAYS = "overlay planes removed"
    CURVES = "curve elements removed"
    PREAMBLES = "preambles cleared"
    SEQUENCES = "sequences removed, at any depth"
    INSIDE = "values inside removed sequences"


@dataclass(slots=True)
class Tally:
    """Hold the counts of one series; two tallies of the same series can be merged.

    ``attributes`` counts files by fate and keyword, ``others`` by what ``Other`` names, ``syntaxes`` by the
    original's transfer syntax.
    """

    files: int = 0
    attributes: dict[str, Counter[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    syntaxes: Counter[str] = field(default_factory=Counter)
    _patterns: Counter[Pattern] = field(default_factory=Counter, repr=False)
    _states: dict[tuple[Any, ...], int] = field(default_factory=dict, repr=False)

    def add(self, original: Dataset, result: Dataset) -> None:
        """Take one file; cheap, as files of a series look alike and are told apart only by a pattern of tags."""
        written = [(int(tag), item) for tag, item in result.items() if tag != _PIXELS]
        here, before, had = {tag for tag, _ in written}, {}, []
        for tag, item in original.items():  # which reads no element
            value, number = item.value, int(tag)
            if number >> 16 == _PIXELS >> 16 or not _filled(value):
                continue
            had.append(number)
            if number in here:
                before[number] = item
            elif item.VR == "SQ":
                self._inside(value)
        had += [int(tag) for tag in original.file_meta.keys()]  # noqa: SIM118
        states = bytes(self._state(original, before.get(tag), item) for tag, item in written)
        self._patterns[tuple(had), tuple(tag for tag, _ in written), states] += 1
        self.files += 1
        self.syntaxes[str(original.file_meta.TransferSyntaxUID)] += 1
        if any(getattr(original, "preamble", None) or b""):
            self.others[Other.PREAMBLES] += 1

    def _state(self, original: Dataset, before: Any, item: Any) -> int:
        """Tell what a value of the result is; what stands in the original as bytes is read once for all files."""
        if not hasattr(before, "is_implicit_VR"):
            return _state(before.value if before is not None else None, item)
        key = before.tag, before.VR, before.value, item.VR, str(item.value)
        if key not in self._states:
            self._states[key] = _state(original[before.tag].value, item)
        return self._states[key]

    def _inside(self, items: Any) -> None:
        self.others[Other.SEQUENCES] += 1
        for ds in items:
            for item in ds.values():
                if item.VR == "SQ" and not isinstance(item.value, bytes):
                    self._inside(item.value)
                elif _filled(item.value):
                    self.others[Other.INSIDE] += 1

    def settle(self, recipe: Recipe) -> None:
        """Name what was counted so far, under the recipe by which it was done."""
        rules = frozenset(recipe.replaced.items())
        for pattern, files in self._patterns.items():
            fates, others = _named(pattern, recipe.kept, rules)
            for fate, keyword in fates:
                self.attributes.setdefault(fate, Counter())[keyword] += files
            for other, count in others:
                self.others[other] += count * files
        self._patterns.clear()
        self._states.clear()

    def merge(self, later: Tally) -> None:
        """Add the counts of other files of the same series, which were settled."""
        self.files += later.files
        for fate, counts in later.attributes.items():
            self.attributes.setdefault(fate, Counter()).update(counts)
        self.others.update(later.others)
        self.syntaxes.update(later.syntaxes)


def _filled(value: Any) -> bool:
    """Tell whether a value, read or raw, holds anything."""
    if isinstance(value, str):
        return len(value) > _SHORT or bool(value.strip(" \0"))
    if isinstance(value, bytes):
        return len(value) > _SHORT or bool(value.strip(b" \0"))
    return value is not None and (isinstance(value, (int, float)) or not isinstance(value, Sized) or len(value) > 0)


def _state(before: Any, item: Any) -> int:
    """Tell whether a value of the result is empty, or what the original's is; a sequence is always built anew."""
    value = item.value
    if not _filled(value):
        return _EMPTY
    if item.VR == "SQ":
        return _OTHER
    return _SAME if type(before) is type(value) and before == value else _OTHER


@lru_cache(maxsize=64)  # a series has a pattern or two, over all its stretches
def _named(
    pattern: Pattern, kept: frozenset[str], rules: frozenset[tuple[str, str]]
) -> tuple[tuple[tuple[Fate, str], ...], tuple[tuple[str, int], ...]]:
    return tuple(_fates(pattern, kept, dict(rules))), tuple(_unnamed(pattern).items())


def _fates(pattern: Pattern, kept: frozenset[str], replaced: Mapping[str, str]) -> Iterator[tuple[Fate, str]]:
    """Yield what became of each attribute that the standard names."""
    from pydicom.datadict import keyword_for_tag

    had, written, states = pattern
    now = dict(zip(written, states, strict=True))
    before = frozenset(had)
    for tag in had:
        keyword = keyword_for_tag(tag)
        if not keyword or _is_unnamed(tag) or tag in _META_KEPT:
            continue
        if tag not in now:
            yield Fate.REMOVED, keyword
        else:
            yield _fate(tag, keyword, now[tag], kept, replaced), keyword
    for tag, state in now.items():
        keyword = keyword_for_tag(tag)
        if tag not in before and keyword and not _is_unnamed(tag):
            yield (Fate.ADDED_EMPTY if state == _EMPTY else Fate.ADDED), keyword


def _fate(tag: int, keyword: str, state: int, kept: frozenset[str], replaced: Mapping[str, str]) -> Fate:
    from pydicom.datadict import dictionary_VR

    if state == _EMPTY:
        return Fate.EMPTIED
    if state == _SAME:
        return Fate.KEPT
    if keyword in _NUMBERED:
        return Fate.CHANGED
    if keyword in replaced:
        return _BY_RULE[replaced[keyword]]
    if keyword in kept:
        return Fate.CHANGED
    return Fate.REBUILT if dictionary_VR(tag) == "SQ" else Fate.OVERWRITTEN


def _unnamed(pattern: Pattern) -> Counter[str]:
    """Count what is private, unknown, an overlay or a curve in one file."""
    from pydicom.datadict import keyword_for_tag

    had, written, _ = pattern
    stays, found, planes = frozenset(written), Counter[str](), set[int]()
    for tag in had:
        group, element = tag >> 16, tag & 0xFFFF
        if group % 2:
            creator = 0x10 <= element <= 0xFF
            kept = Other.PRIVATE_KEPT if not creator else None
            gone = Other.BLOCKS if creator else Other.PRIVATE
            found.update(filter(None, [kept if tag in stays else gone]))
        elif 0x6000 <= group <= 0x60FF:
            planes.add(group)
        elif 0x5000 <= group <= 0x50FF:
            found[Other.CURVES] += 1
        elif group != 2 and not keyword_for_tag(tag):
            found[Other.UNKNOWN] += 1
    if planes:
        found[Other.OVERLAYS] = len(planes)
    return found


def _is_unnamed(tag: int) -> bool:
    group = tag >> 16
    return bool(group % 2) or 0x5000 <= group <= 0x50FF or 0x6000 <= group <= 0x60FF
