"""Part a series' slices into volumes: by size, orientation, echo, time point, b-value, phase, and never by guess."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deid_tools.slices import Frame
from deid_tools.stacks import SPACING_TOLERANCE, SPACING_TOLERANCE_MM, slice_normal, slots
from medlsdm.errors import GeometryError

ORIENTATION_TOLERANCE = 1e-4
_RANKED = ("phase", "time point", "acquisition")

Part = Sequence[Frame]


def split_volumes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Part frames into volumes, in the order of their first frame in the series.

    First by what never shares a volume: size, pixel spacing, orientation, and ``Frame.apart``. Then,
    where frames still lie at one position, by the first of ``Frame.perhaps`` that parts every
    position alike. Then, where spacing is uneven, by slice thickness.
    """
    parts = [p for alike in _grids(frames) for p in _by(alike, lambda f: f.apart)]
    parts = [p for part in parts for p in _stacked(part)]
    parts = [p for part in parts for p in _by_thickness(part)]
    return sorted(parts, key=lambda part: min((f.source, f.index) for f in part))


def differences(parts: Sequence[Part]) -> list[str]:
    """Say in words in what the volumes of a series differ, without values."""
    firsts = [part[0] for part in parts]
    found = {
        "rows or columns": {f.shape for f in firsts},
        "pixel spacing": {tuple(np.round(f.spacing, 5)) for f in firsts},
        "orientation": {tuple(np.round(f.orientation, 4) + 0.0) for f in firsts},
        "slice thickness": {round(f.thickness, 2) for f in firsts},
    }
    for names in (tuple(f.apart for f in firsts), tuple(f.perhaps for f in firsts)):
        for named in names:
            for k, (word, value) in enumerate(named):
                found.setdefault(f"{word}\0{k}", set()).add(value)
    return list(dict.fromkeys(word.split("\0")[0] for word, values in found.items() if len(values) > 1))


def _by(frames: Part, key: Callable[[Frame], Any]) -> list[list[Frame]]:
    found: dict[Any, list[Frame]] = defaultdict(list)
    for frame in frames:
        found[key(frame)].append(frame)
    return list(found.values())


def _grids(frames: Part) -> Iterable[list[Frame]]:
    """Gather frames of one size, spacing and orientation, each within tolerance of the first."""
    found: list[list[Frame]] = []
    for frame in frames:
        for part in found:
            if _same_grid(part[0], frame):
                part.append(frame)
                break
        else:
            found.append([frame])
    return found


def _same_grid(a: Frame, b: Frame) -> bool:
    return (
        a.shape == b.shape
        and all(abs(p - q) <= 1e-4 * p for p, q in zip(a.spacing, b.spacing, strict=True))
        and bool((np.abs(a.orientation - b.orientation) <= ORIENTATION_TOLERANCE).all())
    )


def _stacked(frames: list[Frame]) -> list[list[Frame]]:
    """Part frames that lie at one position, by an attribute or by rank; else leave them together."""
    try:
        places = slots(frames)
    except GeometryError:
        return [frames]
    if len(places) == len(frames):
        return [frames]
    for k in range(len(frames[0].perhaps)):
        for parted in (_by_value(places, k), _by_rank(places, k)):
            if parted:
                return [p for part in parted for p in _stacked(part)]
    return [frames]


def _value(frame: Frame, k: int) -> Any:
    return frame.perhaps[k][1] if k < len(frame.perhaps) else ()


def _by_value(places: list[list[Frame]], k: int) -> list[list[Frame]]:
    """Part by an attribute's value if every value stands as often at every position."""
    parts: dict[Any, list[list[Frame]]] = defaultdict(list)
    for place in places:
        for part in _by(place, lambda f: _value(f, k)):
            parts[_value(part[0], k)].append(part)
    whole = all(len(at) == len(places) and len({len(p) for p in at}) == 1 for at in parts.values())
    return [[f for p in at for f in p] for at in parts.values()] if whole and len(parts) > 1 else []


def _by_rank(places: list[list[Frame]], k: int) -> list[list[Frame]]:
    """Part by an attribute's rank at each position (trigger times differ from heartbeat to heartbeat)."""
    count = len(places[0])
    if places[0][0].perhaps[k][0] not in _RANKED:
        return []  # what is no order in time may jitter from slice to slice, and ranks would mix volumes
    if count < 2 or any(len(place) != count for place in places):
        return []
    ranked = []
    for place in places:
        values = [_value(f, k) for f in place]
        if len(set(values)) < count or any(len(v) != 1 or not isinstance(v[0], float) for v in values):
            return []
        ranked.append(sorted(place, key=lambda f: _value(f, k)))
    return [[place[rank] for place in ranked] for rank in range(count)]


def _by_thickness(frames: list[Frame]) -> list[list[Frame]]:
    """Part slices of several thicknesses that are unevenly spaced: two scans, one after the other."""
    if len({round(f.thickness, 2) for f in frames}) < 2:
        return [frames]
    try:
        normal = slice_normal(frames[0])
    except GeometryError:
        return [frames]
    gaps = np.diff(sorted(float(f.position @ normal) for f in frames))
    typical = float(np.median(gaps))
    if (np.abs(gaps - typical) <= max(SPACING_TOLERANCE * typical, SPACING_TOLERANCE_MM)).all():
        return [frames]
    return _by(frames, lambda f: round(f.thickness, 2))
