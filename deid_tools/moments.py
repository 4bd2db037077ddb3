"""Number the volumes of a series that only times and texts tell apart, before both are removed.

Acquisition times, sequence names and kernels may not leave a header; which volume a slice belongs
to may. So the number is written into the de-identified header, as TemporalPositionIdentifier.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from deid_tools.slices import read_frames

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXTS = (
    "ImageType",
    "SequenceName",
    "ProtocolName",
    "ConvolutionKernel",
    "ScanOptions",
    "FlipAngle",
    "RepetitionTime",
    "KVP",
    "FilterType",
    "ContrastBolusAgent",
)
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True, repr=False)
class Moment:
    """Hold digests of where an image lies and what it is, and when it was taken. In memory only."""

    place: str
    apart: str
    kind: str
    time: str


def moment(ds: Dataset) -> Moment | None:
    """Read a header's moment; None where the place is not stated or the header is damaged."""
    try:
        frames = read_frames(ds, 0)
        places = [tuple(np.round((*f.position, *f.orientation), 2) + 0.0) for f in frames]
        texts = "\0".join(str(ds.get(keyword, "")) for keyword in _TEXTS)
        date, time = str(ds.get("AcquisitionDate", "") or ""), str(ds.get("AcquisitionTime", "") or "")
        taken = str(ds.get("AcquisitionDateTime", "") or "") or (date + time if time else "")
        number = str(ds.get("AcquisitionNumber", "") or "")
        order = f"{taken}#{number:0>12}" if taken or number else ""
        return Moment(_digest(places), _digest([f.apart for f in frames]), _digest(texts), order)
    except Exception:  # whatever a damaged header raises: without a moment nothing is numbered
        return None


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:24]


def number_volumes(moments: Mapping[T, Moment | None]) -> dict[T, int]:
    """Return a volume number for each slice where several lie at one place, or nothing where that is in doubt.

    Slices of one kind are ranked by time at each place; every place must have as many as the next,
    each at its own time. In doubt nothing is numbered, and the geometry planner refuses later.
    """
    known = {key: m for key, m in moments.items() if m is not None}
    if len(known) < len(moments):
        return {}
    alike: dict[tuple[str, str], dict[str, list[T]]] = defaultdict(lambda: defaultdict(list))
    for key, m in known.items():
        alike[(m.apart, m.kind)][m.place].append(key)
    if len({(m.place, m.apart) for m in known.values()}) == len(known):
        return {}
    numbers: dict[T, int] = {}
    first = 1
    for kind in sorted(alike, key=lambda k: min(known[key].time for at in alike[k].values() for key in at)):
        counts = {len(at) for at in alike[kind].values()}
        if len(counts) != 1:
            return {}
        count = counts.pop()
        for at in alike[kind].values():
            times = [known[key].time for key in at]
            if count > 1 and (len(set(times)) < count or "" in times):
                return {}
            for rank, key in enumerate(sorted(at, key=lambda k: known[k].time)):
                numbers[key] = first + rank
        first += count
    return numbers
