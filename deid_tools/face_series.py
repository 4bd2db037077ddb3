"""Deface one series of staged files: find the head, set the cut, clear what lies beyond it, stamp the files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from deid_tools.head import Coarse, Dome, Mask, body, face_in_view, find_brain, find_dome, too_small
from deid_tools.modules import add_stamp
from deid_tools.slices import Frame, read_frames
from deid_tools.staged import read_frames_of, read_staged, write_content, write_staged
from medlsdm.errors import GeometryError

COARSE_MM = 3.0
CLOSEST_SHARE = 0.31
ADULT_MM, SMALLEST_SCALE = 82.0, 0.7
_AIR_HU = -1000.0
_ALIKE = 1e-2
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
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
    cuts: tuple[FaceCut, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Locate one frame: its file and number, its corner and pixel steps in mm (RAS), and its scaling."""

    path: Path
    frame: int
    corner: NDArray[np.float64]
    down: NDArray[np.float64]
    across: NDArray[np.float64]
    shape: tuple[int, int]
    slope: float
    intercept: float


def deface(
    files: list[Path],
    *,
    hu: bool,
    declared: bool,
    brain: LabelledBrain | None = None,
    picture: Path | None = None,
    frames: Sequence[Frame] | None = None,
) -> FaceOutcome:
    """Remove the face from a series, where one is in view.

    Args:
        files: The staged files, all of one series.
        hu: Whether values are Hounsfield units once rescaled.
        declared: Whether the original header says head or brain; then doubt is a refusal.
        brain: What is labelled as brain; the cut never touches it. A part of a brain is a guard too.
        picture: Where to write the picture of before and after.
        frames: Where the frames of the files lie; read from them where it is not given.

    Raises:
        Refusal: A head is declared or labelled, and its face cannot be found.
    """
    places = [_place(frame, files) for frame in (_read_places(files) if frames is None else frames)]
    outcomes = []
    for k, group in enumerate(_by_direction(places) or [[]]):
        drawn = picture.with_stem(f"{picture.stem}-{k + 1}") if picture and k else picture
        outcomes.append(_deface_stack(group, hu, declared, brain, drawn))
    said = max(outcomes, key=lambda outcome: ("no head", "no face in view", "removed").index(outcome.outcome))
    return replace(said, cuts=tuple(cut for outcome in outcomes for cut in outcome.cuts))


def _by_direction(places: list[_Place]) -> list[list[_Place]]:
    """Gather frames of one size whose rows and columns run alike: a stack each."""
    groups: list[list[_Place]] = []
    for place in places:
        for group in groups:
            turned = np.abs(place.down - group[0].down).max() + np.abs(place.across - group[0].across).max()
            if turned <= _ALIKE and place.shape == group[0].shape:
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def _deface_stack(
    places: list[_Place], hu: bool, declared: bool, brain: LabelledBrain | None, picture: Path | None
) -> FaceOutcome:
    stack = _stack(places)
    if stack is None:
        if declared or brain is not None:
            raise Refusal(_NO_STACK)
        return FaceOutcome("no head")
    slices, step = stack
    down, across = (float(np.linalg.norm(v)) for v in (places[0].down, places[0].across))
    rows, columns = places[0].shape
    if too_small(len(slices) * float(np.linalg.norm(step)), rows * down, columns * across):
        return FaceOutcome("no face in view")
    volume, fill = _coarse(slices, step, hu)
    skin = body(volume)
    if not face_in_view(volume, skin):
        return FaceOutcome("no face in view")
    dome = find_dome(volume, skin, small=declared)
    if dome is None and not (brain and brain.whole):
        if declared or brain is not None:
            raise Refusal(_UNSURE)
        return FaceOutcome("no head")
    cut, guard = _cut(volume, skin, dome, brain)
    beyond = cut.removes(volume.along(1), volume.along(2))
    _clear(places, cut, fill, hu)
    if picture is not None:
        write_picture(picture, volume, beyond)
    return FaceOutcome("removed", guard, float((beyond & skin).sum() / skin.sum()), (cut,))


def _cut(volume: Coarse, skin: Mask, dome: Dome | None, brain: LabelledBrain | None) -> tuple[FaceCut, str]:
    known = face_cut(brain.points, MARGIN_LABELS_MM) if brain is not None else None
    if known is not None and brain is not None and brain.whole:
        return known, "labels"
    assert dome is not None
    outer = tuple((float(angle), dome.reach(angle)) for angle in ANGLES_DEGREES)
    scale = float(np.clip(dome.half[1] / ADULT_MM, SMALLEST_SCALE, 1.0))  # a small head has a small face
    margin = scale * MARGIN_DOME_MM
    cut, guard = FaceCut(tuple((angle, limit + margin) for angle, limit in outer)), "dome of the skin"
    found = find_brain(volume, skin, dome)
    if found is not None:
        near = FaceCut(tuple((angle, limit - CLOSEST_SHARE * dome.half[1]) for angle, limit in outer))
        cut = face_cut(mask_points(found, volume.affine), scale * MARGIN_ESTIMATE_MM).joined(near)
        guard = "brain estimate"
    return (cut.joined(known), f"{guard} and labels") if known is not None else (cut, guard)


def _read_places(files: list[Path]) -> list[Frame]:
    found = []
    for k, path in enumerate(files):
        with suppress(GeometryError):  # an image that does not say where it lies joins no stack
            found += read_frames(read_strict(path, headers_only=True), k)
    return found


def _place(frame: Frame, files: list[Path]) -> _Place:
    directions = frame.orientation.reshape(2, 3) * _LPS_TO_RAS
    return _Place(
        files[frame.source],
        frame.index,
        frame.position * _LPS_TO_RAS,
        directions[1] * frame.spacing[0],
        directions[0] * frame.spacing[1],
        frame.shape,
        frame.slope,
        frame.intercept,
    )


def _stack(places: list[_Place]) -> tuple[list[list[_Place]], NDArray[np.float64]] | None:
    """Group frames by slice, in order along the normal, and return the step between slices in mm (RAS)."""
    if len(places) < 2:
        return None
    first = places[0]
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
    path, frames = None, np.empty(0)
    for start in range(0, len(slices), n):
        total: Any = 0.0
        group = [place for listed in slices[start : start + n] for place in listed]
        for place in group:
            if path != place.path:
                path, frames = place.path, read_frames_of(place.path)
            frame = frames[place.frame]
            border.append(np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]]))
            total = total + _block_means(frame, m, k) * place.slope + place.intercept
        planes.append((total / len(group)).astype(np.float32))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step * n, first.down * m, first.across * k
    affine[:3, 3] = first.corner + step * (n - 1) / 2 + first.down * (m - 1) / 2 + first.across * (k - 1) / 2
    values, counts = np.unique(np.concatenate(border), return_counts=True)
    return Coarse(np.stack(planes), affine, hu), float(values[counts.argmax()])


def _block_means(frame: NDArray[Any], down: int, across: int) -> NDArray[np.float64]:
    """Average integers over blocks of so many pixels; what makes no whole block is left out."""
    rows, columns = frame.shape[0] // down * down, frame.shape[1] // across * across
    lines = np.zeros((rows // down, columns), np.int64)
    for step in range(down):
        lines += frame[step:rows:down, :columns]
    total = sum((lines[:, step::across] for step in range(1, across)), start=lines[:, ::across])
    return total / (down * across)


def _clear(places: list[_Place], cut: FaceCut, fill: float, hu: bool) -> None:
    """Put air, or the background's value, beyond the cut on every frame, and stamp every file."""
    by_file: dict[Path, list[_Place]] = {}
    for place in places:
        by_file.setdefault(place.path, []).append(place)
    for path, inside in by_file.items():
        ds, frames = read_staged(path)
        for place in inside:
            frame = frames[place.frame]
            value = (_AIR_HU - place.intercept) / place.slope if hu else fill
            limits = np.iinfo(frame.dtype)
            frame[_beyond(place, cut)] = round(min(max(value, limits.min), limits.max))
        ds.RecognizableVisualFeatures = "NO"
        add_stamp(ds, CODE)
        write_staged(ds, frames, path)


def _beyond(place: _Place, cut: FaceCut) -> Mask:
    """Return the pixels [Y, X] of a frame that lie beyond a cut."""
    rows, columns = (np.arange(n) for n in place.shape)
    ahead, up = (
        place.corner[axis] + rows[:, None] * place.down[axis] + columns[None, :] * place.across[axis] for axis in (1, 2)
    )
    return cut.removes(ahead, up)


def clear_segmentation(path: Path, cuts: Sequence[FaceCut]) -> None:
    """Empty a staged DICOM SEG where the face of its series was cut away: an outline of skin shows a face too.

    Raises:
        Refusal: It does not say where its frames lie.
    """
    from pydicom.pixels.utils import pack_bits

    ds = read_strict(path)
    try:
        frames = read_frames(ds, 0)
        labels = np.asarray(ds.pixel_array).reshape(len(frames), *frames[0].shape).copy()
    except (GeometryError, ValueError, AttributeError, IndexError):
        raise Refusal("it does not say where its frames lie, and its series had a face that was removed") from None
    for frame in frames:
        for cut in cuts:
            labels[frame.index][_beyond(_place(frame, [path]), cut)] = 0
    if np.array_equal(labels.ravel(), np.asarray(ds.pixel_array).ravel()):
        return
    add_stamp(ds, CODE)
    raw = pack_bits(labels.ravel()) if int(ds.BitsAllocated) == 1 else labels.tobytes()
    write_content(ds, raw, path)


def without_face(labels: NDArray[Any], affine: NDArray[np.float64], cuts: Sequence[FaceCut]) -> NDArray[Any]:
    """Return a label map [X, Y, Z] that is empty where the face of its series was cut away."""
    if not cuts:
        return labels
    labels = labels.copy()
    i, j = np.arange(labels.shape[0])[:, None], np.arange(labels.shape[1])[None, :]
    for k in range(labels.shape[2]):
        ahead, up = (affine[a, 0] * i + affine[a, 1] * j + affine[a, 2] * k + affine[a, 3] for a in (1, 2))
        for cut in cuts:
            labels[:, :, k][cut.removes(ahead, up)] = 0
    return labels
