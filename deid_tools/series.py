"""Build scans from one series: part it into volumes, check that each fills space evenly, then stack them.

No reader is safe alone: several build a wrong volume from a missing or doubled slice, from gantry
tilt, from two echoes or from mixed orientations. Here each volume is right, or refused with a
sentence. A tilt is sheared right and said; nothing else is resampled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import IMAGE_CLASSES, read_strict
from deid_tools.slices import HINT, Frame, read_frames
from deid_tools.split import differences, split_volumes
from deid_tools.stacks import Equal, SeriesPlan, lps_to_ras, plan_stack
from deid_tools.tilt import shift_slice
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Modality, Scan
from medlsdm.volumes import from_ras

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["SeriesPlan", "build_scan", "build_scans", "lps_to_ras", "plan_series", "plan_volumes"]

_BLOCK = 16
_SUV_HINT = "Export the series as SUV by body weight."


@dataclass(frozen=True, slots=True)
class Planned:
    """Hold one volume of a series: its plan, or why there is none. ``number`` counts from 1."""

    number: int
    of: int
    plan: SeriesPlan | None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Built:
    """Hold one volume of a series: its scan, or why there is none, and what was done to it.

    ``alone`` tells that no other volume of the series has the same grid.
    """

    number: int
    of: int
    scan: Scan | None
    refusal: str = ""
    notes: tuple[str, ...] = ()
    alone: bool = True


def plan_volumes(frames: Sequence[Frame], equal: Equal | None = None) -> list[Planned]:
    """Part a series into volumes and plan each; one that cannot be right carries its refusal.

    Args:
        frames: All frames of one series.
        equal: Whether two frames hold equal values; without it, copies at one position are refused.
    """
    parts = split_volumes(frames)
    differ = ", ".join(differences(parts))
    found = []
    for n, part in enumerate(parts):
        which = f"volume {n + 1} of {len(parts)} in its series (they differ in {differ})" if len(parts) > 1 else ""
        try:
            plan = plan_stack(part, equal)
            found.append(Planned(n + 1, len(parts), replace(plan, notes=(which, *plan.notes) if which else plan.notes)))
        except GeometryError as error:
            found.append(Planned(n + 1, len(parts), None, f"{which}: {error}" if which else str(error)))
    return found


def plan_series(sources: Sequence[Dataset | Path]) -> SeriesPlan:
    """Plan a series that is one volume.

    Raises:
        GeometryError: It is not: slices are missing, unevenly spaced or differ at one position, or
            it holds several volumes.
    """
    frames = [frame for i, source in enumerate(sources) for frame in read_frames(_header(source), i)]
    return _only(plan_volumes(frames, equal_pixels(sources)))


def _only(planned: list[Planned]) -> SeriesPlan:
    if len(planned) > 1:
        said = [p.refusal or (p.plan.notes[0] if p.plan else "") for p in planned]
        said.sort(key=lambda text: "missing" not in text)
        raise GeometryError(f"The series is not one volume: {said[0]}", "Export one volume a series.")
    if not planned or not planned[0].plan:
        raise GeometryError(planned[0].refusal if planned else "The series holds no slices.")
    return planned[0].plan


def equal_pixels(sources: Sequence[Dataset | Path]) -> Equal:
    """Return a function that tells whether two frames hold equal stored values."""

    def equal(a: Frame, b: Frame) -> bool:
        first, second = (next(_pixels(sources[f.source], [f.index])) for f in (a, b))
        return bool(np.array_equal(first, second))

    return equal


def build_scan(sources: Sequence[Dataset | Path], subject: str) -> Scan:
    """Stack a series that is one volume into a scan; see ``build_scans``.

    Raises:
        GeometryError: See ``plan_series``.
        DataError: Pixels cannot be read, or PET values are not SUV.
    """
    modality, frames = _survey(sources)
    return _stack(sources, _only(plan_volumes(frames, equal_pixels(sources))), modality, subject)


def build_scans(sources: Sequence[Dataset | Path], subject: str) -> Iterator[Built]:
    """Stack every volume of a series: HU for CT, stored units for MR, SUV for PET; axes nearest to R, A, S.

    Memory holds one volume, its frames' places and a few slices, where ``sources`` are paths.

    Args:
        sources: Every instance of one series, as paths or with pixels.
        subject: The patient's pseudonym.

    Raises:
        GeometryError: A slice does not say where it lies.
        DataError: Pixels cannot be read, or PET values are not SUV.
    """
    modality, frames = _survey(sources)
    planned = plan_volumes(frames, equal_pixels(sources))
    grids = {p.number: p.plan.canonical for p in planned if p.plan}
    for p in planned:
        if p.plan is None:
            yield Built(p.number, p.of, None, p.refusal)
            continue
        alone = not any(grids[p.number].matches(grid) for number, grid in grids.items() if number != p.number)
        yield Built(p.number, p.of, _stack(sources, p.plan, modality, subject), "", p.plan.notes, alone)


def _header(source: Dataset | Path) -> Dataset:
    return read_strict(source, headers_only=True) if isinstance(source, Path) else source


def _survey(sources: Sequence[Dataset | Path]) -> tuple[Modality, list[Frame]]:
    """Read every header once and keep only what places its frames."""
    kinds, units, frames = set(), set(), []
    for n, source in enumerate(sources):
        ds = _header(source)
        kinds.add(IMAGE_CLASSES[str(ds.SOPClassUID)])
        units.add((str(ds.get("Units", "")), str(ds.get("SUVType", None) or "BW")))
        frames += read_frames(ds, n)
    if len(kinds) != 1:
        raise DataError("The series mixes kinds of image.", HINT)
    modality = Modality(kinds.pop())
    if modality is Modality.PT and units != {("GML", "BW")}:
        raise DataError("The PET values are not SUV by body weight (g/ml).", _SUV_HINT)
    return modality, frames


def _stack(sources: Sequence[Dataset | Path], plan: SeriesPlan, modality: Modality, subject: str) -> Scan:
    """Fill the scan's own array, a block of slices at a time: the volume is never held twice."""
    canonical, grid = plan.canonical, plan.geometry
    array = np.empty(canonical.shape, np.float32)
    stack = from_ras(array, grid)
    assert np.shares_memory(stack, array)
    block = np.empty((_BLOCK, *grid.shape[1:]), np.float32)
    for k, values in enumerate(_values(sources, plan)):
        if plan.shifts is not None:
            values = shift_slice(values, plan.shifts[k], grid.shape[1:], np.nan, _padding(plan.frames[k]))
        block[k % _BLOCK] = values
        if k % _BLOCK == _BLOCK - 1 or k == len(plan.frames) - 1:
            first = k - k % _BLOCK
            stack[first : k + 1] = block[: k + 1 - first]
    if plan.shifts is not None:
        _fill(stack)
    return Scan(array, canonical, modality, subject)


def _padding(frame: Frame) -> float | None:
    return None if frame.padding is None else frame.padding * frame.slope + frame.intercept


def _fill(stack: NDArray[np.float32]) -> None:
    """Give what no slice covers the lowest value of the volume."""
    lowest = min(float(np.nanmin(picture)) for picture in stack)
    for picture in stack:
        picture[np.isnan(picture)] = lowest


def _values(sources: Sequence[Dataset | Path], plan: SeriesPlan) -> Iterator[NDArray[np.float32]]:
    for source, frames in groupby(plan.frames, key=lambda f: f.source):
        run = list(frames)
        pixels = _pixels(sources[source], [f.index for f in run])
        for frame, picture in zip(run, pixels, strict=True):
            if picture.shape != frame.shape:
                raise DataError("The pixels of a slice do not have the size that its header states.", HINT)
            yield picture.astype(np.float32) * frame.slope + frame.intercept


def _pixels(source: Dataset | Path, indices: list[int]) -> Iterator[NDArray[np.generic]]:
    """Decode frames one at a time; a path is never read whole."""
    from pydicom.pixels.utils import iter_pixels

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from iter_pixels(source, indices=indices)
    except MemoryError:
        raise
    except Exception:
        raise DataError("The pixels of a slice cannot be read.", HINT) from None
