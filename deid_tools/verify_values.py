"""The verifier's own view of numbers, codes and the writer's name: what may hide in a value of the right type.

These bounds stand apart from those of the first pass (``numbers.py``) on purpose.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import cache

from deid_tools.explicit import Element

IMPLEMENTATION = ("1.2.826.0.1.3680043.8.498.1", re.compile(r"PYDICOM \d+\.\d+\.\d+"))
BINARY = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d", "AT": "L"}
_LONGEST = {"DS": 16, "IS": 12}
_SCHEMES = ("SCT", "SRT", "DCM", "NCIt", "99MEDLSDM")
_CODE_VALUE, _SCHEME, _MEANING = 0x00080100, 0x00080102, 0x00080104
_SEGMENT_TYPE = 0x0062000F
_LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"  # younger than the library's dictionary
_CODE = re.compile(r"[A-Z0-9][A-Z0-9.-]{0,15}")
_DAY = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
_PRINTABLE = re.compile(rb"[ -~]{8}")
_GROWS = frozenset(
    (
        *(0x00189073, 0x00181060, 0x00181062, 0x00181081, 0x00181082, 0x00181150, 0x00181152, 0x00181153),
        *(0x00181242, 0x00189220, 0x00281052, 0x00281053, 0x00541300, 0x00541310, 0x00541321, 0x00541322),
    )
)
"""Durations, exposures, counts and factors, which may have many digits."""


def number_problems(element: Element) -> Iterator[str]:
    """Yield what is wrong with the values of a number: too many, too long, a date, a text."""
    vr, tag = element.VR, element.tag
    if vr in BINARY:
        size = struct.calcsize("<" + BINARY[vr])
        if len(element.value) % size:
            yield "a number is cut short"
            return
        values = struct.unpack(f"<{len(element.value) // size}{BINARY[vr]}", element.value)
        whole = [str(abs(int(v))) if v == v and abs(v) < 1e15 else "9" * 16 for v in values] if vr != "AT" else []
        content = bytes(element.value)
        if _all_printable(content) if vr in ("FL", "FD") else vr != "AT" and _PRINTABLE.search(content):
            yield "a text in a number"
    else:
        texts = [part.strip(" +-") for part in element.text().split("\\")]
        values, whole = texts, [re.split(r"[.eE]", text)[0] for text in texts]
        if any(len(text) > _LONGEST[vr] for text in texts):
            yield "a number of too many digits"
    most = _most(tag)
    if len(values) > most:
        yield "more values than the attribute has"
    if any(_DAY.match(digits) for digits in whole if len(digits) in (8, 10, 12, 14)):
        yield "a date in a number"
    if tag.is_private and vr not in ("DS", "FL", "FD"):
        whole = [digits[-9:] for digits in whole]  # one maker adds a thousand million to a b-value
    longest = 12 if tag in _GROWS else 7 if vr in ("DS", "FL", "FD") else 5
    if any(len(digits.lstrip("0")) > longest for digits in whole):
        yield "a number as long as an identifier"


def code_problems(item: tuple[Element, ...], sequence: int) -> Iterator[str]:
    """Yield what is wrong with a coded concept: only the dictionary's own words may stand, but for a segment's type."""
    found = {int(e.tag): e.text() for e in item if e.tag in (_CODE_VALUE, _SCHEME, _MEANING)}
    if not found:
        return
    value, scheme = found.get(_CODE_VALUE, ""), found.get(_SCHEME, "")
    if not _CODE.fullmatch(value) or scheme not in _SCHEMES:
        yield "a code of an unknown form"
    elif sequence != _SEGMENT_TYPE and found.get(_MEANING, "") not in _meanings(value, scheme):
        yield "a code's meaning that is not the dictionary's"


def meta_problems(tag: int, text: str) -> Iterator[str]:
    """Yield what is wrong with the name of the library that wrote the file: there is one."""
    if tag == 0x00020012 and text != IMPLEMENTATION[0]:
        yield "another program's mark"
    if tag == 0x00020013 and not IMPLEMENTATION[1].fullmatch(text):
        yield "another program's mark"


def uid_problems(text: str) -> Iterator[str]:
    """Yield what is wrong with a UID: it is neither 128 keyed bits nor listed."""
    from pydicom._uid_dict import UID_dictionary

    if re.fullmatch(r"2\.25\.\d{28,39}", text) is None and text not in UID_dictionary and text != _LABEL_MAP:
        yield "a UID that is neither keyed nor the standard's"


def _all_printable(content: bytes) -> bool:
    text = content.rstrip(b"\0")
    return len(text) >= 8 and all(0x20 <= byte <= 0x7E for byte in text)


@cache
def _most(tag: int) -> float:
    from pydicom.datadict import dictionary_VM

    try:
        last = dictionary_VM(tag).rpartition("-")[2]
    except KeyError:
        return 64  # private, and on the list of safe ones
    return float("inf") if last.endswith("n") else int(last)


@cache
def _meanings(value: str, scheme: str) -> frozenset[str]:
    """Return what the dictionary calls a code, cut to the 64 characters of a meaning."""
    from pydicom.sr._concepts_dict import concepts
    from pydicom.sr._snomed_dict import mapping

    if scheme == "SRT":
        value, scheme = mapping["SRT"].get(value, ""), "SCT"
    rows = [row[value] for row in concepts.get(scheme, {}).values() if value in row]
    ours = {f"class {value[1:]}"} if scheme == "99MEDLSDM" and re.fullmatch(r"L\d{1,5}", value) else set()
    return frozenset({str(row[0])[:64] for row in rows} | ours)
