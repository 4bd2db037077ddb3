"""Descriptions, cleaned: only the words of a list stay, and short measures; never a word of the patient's names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from deid_tools.config_files import deid_folder

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_WORD = re.compile(r"\d\.\d+[a-z]*|[^\W_]+", re.IGNORECASE)
_MEASURE = re.compile(r"[1-7]d|t[12]w?|(?:\d{1,2}|\d\.\d{1,2})(?:mm|cm|t)|b(?:0|[1-9]\d{0,2}0)")
_PARTS = re.compile(r"[\W\d_]+")


@cache
def known_words() -> frozenset[str]:
    """Return the words that a description may hold, in lower case."""
    lines = (deid_folder() / "words.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def allowed(word: str) -> bool:
    """Tell whether a word may stay: on the list, or a measure such as 3D, T2, 1.5mm, b1000."""
    word = word.casefold()
    return word in known_words() or _MEASURE.fullmatch(word) is not None


def clean_text(text: str, own: frozenset[str]) -> str:
    """Return the words of a description that may stay, parted by blanks; at most 64 characters.

    Args:
        text: The description, with its first value only.
        own: The words of the names that the file holds, in lower case; they never stay.
    """
    words = _WORD.findall(text[:1024].split("\\")[0])
    kept = " ".join(w for w in words if allowed(w) and w.casefold() not in own)
    return kept if len(kept) <= 64 else kept[:65].rpartition(" ")[0]


def own_words(ds: Dataset) -> frozenset[str]:
    """Return the parts of every person's, place's and institution's name at the top of a header, in lower case."""
    return frozenset(part for value in _names(ds) for part in _PARTS.split(value.casefold()) if part)


def _names(ds: Dataset) -> Iterable[str]:
    for tag in list(ds.keys()):
        if tag.group >= 0x7FE0 or tag.is_private:
            continue
        try:
            element = ds[tag]
        except Exception:
            yield str(ds.get_item(tag).value)
            continue
        if element.VR == "PN" or element.keyword in _NAMING:
            yield str(element.value)


_NAMING = (
    "PatientID",
    "OtherPatientIDs",
    "PatientAddress",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "PatientComments",
)
