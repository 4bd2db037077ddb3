"""Deface one series of staged files: find the head, set the cut, clear what lies beyond it, stamp the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal, read_strict
from deid_tools.face_picture import write_picture
from deid_tools.faces import (
    ANGLES_DEGREES,
    CODE,
    MARGIN_DOME_MM,
    MARGIN_ESTIMATE_MM,
    MARGIN_LABELS_MM,
    FaceCut,
    LabelledBrain,
    face_cut,
    mask_points,
)
from deid_tools.head import Coarse, Dome, Mask, body, face_in_view, find_brain, find_dome
from deid_tools.modules import add_stamp
from deid_tools.staged import read_staged, write_staged

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

COARSE_MM = 3.0
CLOSEST_SHARE = 0.31
_AIR_HU = -1000.0
_UNSURE = (
    "it is said to show a head, but no head could be told well enough to remove its face;"
    " give a label map of the brain, or say that faces may stay"
)
_NO_STACK = "it is said to show a head, but its slices form no stack in which a face could be found and removed"


@dataclass(frozen=True, slots=True)
class FaceOutcome:
    """Say what became of the face: ``removed``, ``no head`` or ``no face in view``; the guard; the share cut."""

    outcome: str
    guard: str = ""
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Locate one frame: its file and number, its corner and pixel steps in mm (RAS), and its scaling."""

    path: Path
    frame: int
    corner: NDArray[np.float64]
    down: NDArray[np.float64]
    across: NDArray[np.float64]
    slope: float
    intercept: float


def deface(
    files: list[Path],
    *,
    hu: bool,
    declared: bool,
    brain: LabelledBrain | None = None,
    picture: Path | None = None,
) -> FaceOutcome:
    """Remove the face from a series, where one is in view.

    Args:
        files: The staged files, all of one series.
        hu: Whether values are Hounsfield units once rescaled.
        declared: Whether the original header says head or brain; then doubt is a refusal.
        brain: What is labelled as brain; the cut never touches it. A part of a brain is a guard too.
        picture: Where to write the picture of before and after.

    Raises:
        Refusal: A head is declared or labelled, and its face cannot be found.
    """
    places = [place for path in files for place in _places(path)]
    stack = _stack(places)
    if stack is None:
        if declared or brain is not None:
            raise Refusal(_NO_STACK)
        return FaceOutcome("no head")
    volume, fill = _coarse(*stack, hu)
    skin = body(volume)
    if not face_in_view(volume, skin):
        return FaceOutcome("no face in view")
    dome = find_dome(volume, skin)
    if dome is None and not (brain and brain.whole):
        if declared or brain is not None:
            raise Refusal(_UNSURE)
        return FaceOutcome("no head")
    cut, guard = _cut(volume, skin, dome, brain)
    beyond = cut.removes(volume.along(1), volume.along(2))
    _clear(files, places, cut, fill, hu)
    if picture is not None:
        write_picture(picture, volume, beyond)
    return FaceOutcome("removed", guard, float((beyond & skin).sum() / skin.sum()))


def _cut(volume: Coarse, skin: Mask, dome: Dome | None, brain: LabelledBrain | None) -> tuple[FaceCut, str]:
    known = face_cut(brain.points, MARGIN_LABELS_MM) if brain is not None else None
    if known is not None and brain is not None and brain.whole:
        return known, "labels"
    assert dome is not None
    outer = tuple((float(angle), dome.reach(angle)) for angle in ANGLES_DEGREES)
    cut, guard = FaceCut(tuple((angle, limit + MARGIN_DOME_MM) for angle, limit in outer)), "dome of the skin"
    found = find_brain(volume, skin, dome)
    if found is not None:
        near = FaceCut(tuple((angle, limit - CLOSEST_SHARE * dome.half[1]) for angle, limit in outer))
        cut, guard = face_cut(mask_points(found, volume.affine), MARGIN_ESTIMATE_MM).joined(near), "brain estimate"
    return (cut.joined(known), f"{guard} and labels") if known is not None else (cut, guard)


def _places(path: Path) -> list[_Place]:
    ds = read_strict(path, headers_only=True)
    try:
        if "PerFrameFunctionalGroupsSequence" not in ds:
            return [_place(path, 0, ds, ds, ds, ds)]
        shared = ds.SharedFunctionalGroupsSequence[0]
        found = []
        for n, own in enumerate(ds.PerFrameFunctionalGroupsSequence):
            groups = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
            position, orientation, measures = (_group(shared, own, name) for name in groups)
            found.append(
                _place(
                    path, n, position, orientation, measures, _group(shared, own, "PixelValueTransformationSequence")
                )
            )
        return found
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return []


def _group(shared: Dataset, own: Dataset, name: str) -> Dataset:
    from pydicom.dataset import Dataset

    items = own.get(name, None) or shared.get(name, None)
    return items[0] if items else Dataset()


def _place(path: Path, frame: int, position: Any, orientation: Any, measures: Any, scaling: Any) -> _Place:
    flip = np.array([-1.0, -1.0, 1.0])
    directions = np.array([float(v) for v in orientation.ImageOrientationPatient]).reshape(2, 3) * flip
    down_mm, across_mm = (float(v) for v in measures.PixelSpacing)
    slope, intercept = scaling.get("RescaleSlope", None), scaling.get("RescaleIntercept", None)
    return _Place(
        path,
        frame,
        np.array([float(v) for v in position.ImagePositionPatient]) * flip,
        directions[1] * down_mm,
        directions[0] * across_mm,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _stack(places: list[_Place]) -> tuple[list[list[_Place]], NDArray[np.float64]] | None:
    """Group frames by slice, in order along the normal, and return the step between slices in mm (RAS)."""
    if len(places) < 2:
        return None
    first = places[0]
    if any(np.abs(p.down - first.down).max() + np.abs(p.across - first.across).max() > 1e-2 for p in places):
        return None
    normal = np.cross(first.across, first.down)
    normal /= np.linalg.norm(normal)
    slices: dict[int, list[_Place]] = {}
    for place in places:
        slices.setdefault(round(float(place.corner @ normal) * 10), []).append(place)
    ordered = [slices[key] for key in sorted(slices)]
    if len(ordered) < 2:
        return None
    return ordered, (ordered[-1][0].corner - ordered[0][0].corner) / (len(ordered) - 1)


def _coarse(slices: list[list[_Place]], step: NDArray[np.float64], hu: bool) -> tuple[Coarse, float]:
    """Average a stack down to about 3 mm, one frame in memory at a time; also return the background's value."""
    first = slices[0][0]
    sizes = [np.linalg.norm(v) for v in (step, first.down, first.across)]
    n, m, k = (max(1, round(COARSE_MM / float(size))) for size in sizes)
    planes: list[NDArray[np.float32]] = []
    border: list[NDArray[Any]] = []
    path, frames = first.path, read_staged(first.path)[1]
    for start in range(0, len(slices), n):
        total: Any = 0.0
        group = [place for listed in slices[start : start + n] for place in listed]
        for place in group:
            if path != place.path:
                path, frames = place.path, read_staged(place.path)[1]
            frame = frames[place.frame]
            border.append(np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]]))
            rows, columns = frame.shape[0] // m * m, frame.shape[1] // k * k
            small = frame[:rows, :columns].reshape(rows // m, m, columns // k, k).mean((1, 3))
            total = total + small * place.slope + place.intercept
        planes.append((total / len(group)).astype(np.float32))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step * n, first.down * m, first.across * k
    affine[:3, 3] = first.corner + step * (n - 1) / 2 + first.down * (m - 1) / 2 + first.across * (k - 1) / 2
    values, counts = np.unique(np.concatenate(border), return_counts=True)
    return Coarse(np.stack(planes), affine, hu), float(values[counts.argmax()])


def _clear(files: list[Path], places: list[_Place], cut: FaceCut, fill: float, hu: bool) -> None:
    """Put air, or the background's value, beyond the cut on every frame, and stamp every file."""
    for path in files:
        ds, frames = read_staged(path)
        for place in (p for p in places if p.path == path):
            frame = frames[place.frame]
            rows, columns = (np.arange(n) for n in frame.shape)
            ahead, up = (
                place.corner[axis] + rows[:, None] * place.down[axis] + columns[None, :] * place.across[axis]
                for axis in (1, 2)
            )
            value = (_AIR_HU - place.intercept) / place.slope if hu else fill
            limits = np.iinfo(frame.dtype)
            frame[cut.removes(ahead, up)] = round(min(max(value, limits.min), limits.max))
        ds.RecognizableVisualFeatures = "NO"
        add_stamp(ds, CODE)
        write_staged(ds, frames, path)
