"""Which numbers may stay: as many as the standard gives an attribute, and none that is a date, a text or an identifier.

A number is kept as it is, so anything that can be said in digits can hide in one. Ordinary numbers are
left alone: a count or an order below 100,000, a quantity below ten million. Longer ones are dropped unless the
attribute is a physical quantity that grows so large.
"""

from __future__ import annotations

import math
import re
import struct
from functools import cache
from typing import Any

ORDINAL_LIMIT, QUANTITY_LIMIT, LARGEST = 1e5, 1e7, 1e12
_LARGE = frozenset(
    [
        "ActualFrameDuration",
        "FrameReferenceTime",
        "TriggerTime",
        "AcquisitionDuration",
        "FrameAcquisitionDuration",
        "Exposure",
        "ExposureInuAs",
        "ExposureTime",
        "PrimaryPromptsCountsAccumulated",
        "DoseCalibrationFactor",
        "DecayFactor",
        "RescaleSlope",
        "RescaleIntercept",
        "LowRRValue",
        "HighRRValue",
        "NominalInterval",
    ]
)
_DECIMAL_LENGTH = 16
_DATE = re.compile(r"(?<![\d.])(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)")
_PACKED = {"US": "H", "SS": "h", "UL": "L", "SL": "l", "FL": "f", "FD": "d"}
_TEXT = re.compile(rb"[\x20-\x7e]{8}")
_ALL_TEXT = re.compile(rb"[\x20-\x7e]{8,}")
_GE_B_VALUE = 1_000_000_000  # added to a b-value in (0043,xx39)


def may_stay(element: Any) -> bool:
    """Tell whether the values of a standard numeric element may stand in a clean file."""
    most = _multiplicity(int(element.tag))
    ordinal = element.VR not in ("DS", "FL", "FD")
    limit = LARGEST if element.keyword in _LARGE else ORDINAL_LIMIT if ordinal else QUANTITY_LIMIT
    return most >= element.VM and _harmless(element, limit)


def within_length(vr: str, value: Any) -> Any:
    """Return decimals as they are, or rounded to the 16 characters that the standard allows where they are longer."""
    from pydicom.multival import MultiValue
    from pydicom.valuerep import DSfloat

    if vr != "DS":
        return value
    several = isinstance(value, (MultiValue, list, tuple))
    values = list(value) if several else [value]
    if all(v is None or len(str(v)) <= _DECIMAL_LENGTH for v in values):
        return value
    short = [DSfloat(float(v), auto_format=True) if v is not None else v for v in values]
    return short if several else short[0]


def private_may_stay(element: Any, creator: str) -> bool:
    """Tell whether a private element is of its maker's type and multiplicity, and its values may stand."""
    from pydicom.datadict import private_dictionary_VM, private_dictionary_VR

    if private_dictionary_VR(element.tag, creator) != element.VR:
        return False
    if _most(private_dictionary_VM(element.tag, creator)) < element.VM:
        return False
    if element.VR in ("DS", "FL", "FD"):
        return _harmless(element, LARGEST)
    return all(abs(v) % _GE_B_VALUE < ORDINAL_LIMIT for v in _values(element)) and _harmless(element, 2.0 * _GE_B_VALUE)


def _values(element: Any) -> list[Any]:
    if element.value is None:
        return []
    return list(element.value) if element.VM > 1 else [element.value]


def _harmless(element: Any, limit: float) -> bool:
    values = _values(element)
    if not all(abs(float(v)) < limit for v in values):
        return False
    if element.VR in ("DS", "IS"):
        return not any(_DATE.search(str(v)) for v in values)
    if element.VR in ("FL", "FD"):
        return _ALL_TEXT.fullmatch(_packed(element.VR, values)) is None
    return not any(_DATE.search(str(v)) for v in values) and _TEXT.search(_packed(element.VR, values)) is None


def _packed(vr: str, values: list[Any]) -> bytes:
    return struct.pack(f"<{len(values)}{_PACKED[vr]}", *values).rstrip(b"\0")


@cache
def _multiplicity(tag: int) -> float:
    from pydicom.datadict import dictionary_VM

    return _most(dictionary_VM(tag))


def _most(multiplicity: str) -> float:
    """Return how many values a multiplicity such as ``1``, ``1-2`` or ``3-3n`` allows at most."""
    last = multiplicity.rpartition("-")[2]
    return math.inf if last.endswith("n") else int(last)
