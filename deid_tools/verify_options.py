"""What the verifier lets pass besides its own lists, by what a file says was done to it (PS3.16 CID 7050).

These lists stand apart from the recipes on purpose: a mistake in a recipe must not teach the verifier.
"""

from __future__ import annotations

import re

from deid_tools.descriptors import allowed as allowed_word
from deid_tools.explicit import Element, WrittenFile


def tags_of(text: str) -> frozenset[int]:
    """Read a list of tags, each as eight hexadecimal digits."""
    return frozenset(int(tag, 16) for tag in text.split())


DATES, CHARACTERISTICS, DESCRIPTORS, PRIVATE = "113107", "113108", "113105", "113111"
METHODS = ("medlsdm allow-list; PS3.15 basic profile", "medlsdm basic; PS3.15 basic profile")
WRITTEN = (
    *METHODS,
    "Retain Longitudinal Temporal Information Modified Dates Option",
    "Retain Patient Characteristics Option",
    "Clean Descriptors Option",
    "Clean Pixel Data Option",
    "Clean Recognizable Visual Features Option",
    "Retain Safe Private Option",
    "MODIFIED",
    "19000101000000",
)
"""Phrases that the pipeline writes; no leak if they also stand in an original."""

_BASIC = tags_of(
    """00080014 00081115 00081140 00082112 00083010 00102210 00180015 00180025 00180083 00180084 00180089
    00180090 00180093 00180094 00180095 00181002 00181041 00181044 00181046 00181047 00181048 00181049 00181050
    00181060 00181062 00181063 00181080 00181081 00181082 00181083 00181084 00181086 00181088 00181090 00181094
    00181100 00181110 00181111 00181130 00181140 00181150 00181151 00181152 00181153 00181170 00181190 00181271
    00181310 00181312 00181315 00181316 00181318 00181320 00189305 00189306 00189307 00189309 00189310 00189311
    00189313 00189318 00189323 00189324 00189345 00189758 00189759 00189760 00189761 00200062 00200105 00200110
    00200200 00201002 00201041 00209161 00280006 00280034 00280106 00280107 00280108 00280109 00280121 00280300
    00281056 00282112 00282114 00286010 00540061 00540071 00540101 00541100 00541200 00541201 00541202 00541203
    00541210 00541220 00541310 00541320 00541321 00541322 00541323 00541324 300A012C 00200010"""
)
_BY_CODE = {
    DATES: tags_of(
        """00080020 00080021 00080022 00080023 00080024 00080025 0008002A 00080030 00080031 00080032 00080033 00080034
        00080035 00080201 00380020 00380021 00400002 00400003 00400244 00400245
        00400250 00400251"""
    ),
    CHARACTERISTICS: tags_of("00100040 00101010 00101020 00101030 001021A0 001021C0 00102203"),
    DESCRIPTORS: tags_of("00081030 0008103E 00180010 00181030 00189424 00321060 00400254"),
}
_SAFE_PRIVATE = {
    (0x2005, "Philips MR Imaging DD 001"): (0x0D, 0x0E),
    (0x2001, "Philips Imaging DD 001"): (0x03,),
    (0x0019, "SIEMENS MR HEADER"): (0x0C, 0x0E, 0x27),
    (0x0043, "GEMS_PARM_01"): (0x39,),
    (0x0019, "GEMS_ACQU_01"): (0xBB, 0xBC, 0xBD),
    (0x7053, "Philips PET Private Group"): (0x00, 0x09),
}
_NUMBERS = ("DS", "IS", "US", "SS", "UL", "SL", "FD", "FL")
_METHOD, _METHOD_CODES, _CODE, _SCHEME, _ZONE_OFFSET = 0x00120063, 0x00120064, 0x00080100, 0x00080102, 0x00080201
_AGE = re.compile(r"0[0-8]\d[DWMY]|090Y|[0-9]\d\d[DWM]")
_DATE = re.compile(r"(?:1[89]|20)\d\d(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])?)?")
_TIME = re.compile(r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-5]\d|60)?(?:\.\d{1,6})?)?")
_MOMENT = re.compile(rf"(?:{_DATE.pattern})(?:{_TIME.pattern})?(?:[+-](?:0\d|1[0-4])[0-5]\d)?")
_ZONE = re.compile(r"[+-](?:0\d|1[0-4])[0-5]\d")


def codes_of(written: WrittenFile) -> frozenset[str]:
    """Return the codes of CID 7050 that a file carries."""
    stamps = written.find(_METHOD_CODES)
    items: list[dict[int, Element]] = [{e.tag: e for e in item} for item in (stamps.items if stamps else ())]
    return frozenset(
        item[_CODE].text() for item in items if {_CODE, _SCHEME} <= set(item) and item[_SCHEME].text() == "DCM"
    )


def extra_tags(written: WrittenFile, codes: frozenset[str]) -> frozenset[int]:
    """Return the tags that may stand at the top of a file besides those of the allow-list."""
    method = written.find(_METHOD)
    if method is None or method.text() != METHODS[1]:
        return frozenset()
    found = _BASIC.union(*(_BY_CODE.get(code, frozenset()) for code in codes))
    return found | _private(written) if PRIVATE in codes else found


def _private(written: WrittenFile) -> frozenset[int]:
    """Return creators and elements of the safe list that hold numbers, each in its creator's block (PS3.5 7.8.1)."""
    found: set[int] = set()
    private = [element for element in written.body if element.tag.is_private]
    for creator in private:
        group, block = creator.tag >> 16, creator.tag & 0xFFFF
        safe = _SAFE_PRIVATE.get((group, creator.text())) if creator.VR == "LO" and 0x10 <= block <= 0xFF else None
        if safe is not None:
            found.add(creator.tag)
            allowed = {group << 16 | block << 8 | low for low in safe}
            found.update(e.tag for e in private if e.tag in allowed and e.VR in _NUMBERS)
    return frozenset(found)


def passes(element: Element, text: str, codes: frozenset[str]) -> bool:
    """Tell whether a date, an age, a description or a creator's name may stand, given what the file says was done."""
    vr, tag = element.VR, element.tag
    if tag.is_private:
        return PRIVATE in codes and vr == "LO" and any(text == creator for _, creator in _SAFE_PRIVATE)
    if vr in ("DA", "TM", "DT") or tag == _ZONE_OFFSET:
        pattern = {"DA": _DATE, "TM": _TIME, "DT": _MOMENT}.get(vr, _ZONE)
        moved = DATES in codes and tag in _BY_CODE[DATES]
        return moved and all(pattern.fullmatch(end) for end in _ends(text, vr))
    if vr == "AS":
        return CHARACTERISTICS in codes and _AGE.fullmatch(text) is not None
    if tag in _BY_CODE[DESCRIPTORS]:
        return DESCRIPTORS in codes and all(allowed_word(word) for word in text.split())
    return False


def _ends(text: str, vr: str) -> list[str]:
    return text.split("-") if vr != "DT" and len(text) > 8 else [text]
