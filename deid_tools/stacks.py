"""Turn slices of one kind into one regular grid: order, gaps, copies and tilt. Nothing is guessed.

What does not fill space evenly is a GeometryError that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deid_tools.slices import HINT, Frame
from medlsdm.errors import GeometryError
from medlsdm.types import Geometry
from medlsdm.volumes import to_ras

SPACING_TOLERANCE = 0.01
SPACING_TOLERANCE_MM = 0.1
TILT_TOLERANCE_DEGREES = 0.1
MAX_TILT_DEGREES = 45.0

Equal = Callable[[Frame, Frame], bool]


def lps_to_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn an affine from DICOM's patient axes (LPS) to RAS, or back: the same flip."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@dataclass(frozen=True, slots=True)
class SeriesPlan:
    """Say in which order frames stack and where the stack [slice, row, column] lies (affine in RAS).

    ``shifts`` [slice, 2] is how many rows and columns, 0 or more, each slice moves in its plane to
    undo a tilt; None where the slices stand straight. ``notes`` say what was done, in words.
    """

    frames: tuple[Frame, ...]
    affine: NDArray[np.float64]
    shifts: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """Return the grid of the stack, axes in DICOM order."""
        rows, columns = self.frames[0].shape
        if self.shifts is not None:
            more = np.ceil(self.shifts.max(axis=0) - 1e-6).astype(int)
            rows, columns = rows + int(more[0]), columns + int(more[1])
        return Geometry(self.affine, (len(self.frames), rows, columns))

    @property
    def canonical(self) -> Geometry:
        """Return the grid of the scan that the series becomes, axes nearest to R, A, S."""
        empty = np.broadcast_to(np.uint8(0), self.geometry.shape)
        return to_ras(empty, self.geometry)[1]


def slice_normal(frame: Frame) -> NDArray[np.float64]:
    """Return the unit normal of a slice's plane, LPS.

    Raises:
        GeometryError: The row and column directions do not stand at a right angle.
    """
    row, column = frame.orientation[:3], frame.orientation[3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise GeometryError("The slice orientation is not a right angle.", HINT)
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def slots(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Sort slices along their normal and gather those that lie at one position.

    Raises:
        GeometryError: See ``slice_normal``.
    """
    normal = slice_normal(frames[0])
    ordered = sorted(frames, key=lambda f: float(f.position @ normal))
    gaps = np.diff([float(f.position @ normal) for f in ordered])
    real = gaps[gaps > 1e-3]
    close = max(1e-3, 0.01 * float(np.median(real))) if len(real) else 1e-3
    found = [[ordered[0]]]
    for frame, gap in zip(ordered[1:], gaps, strict=True):
        if gap <= close:
            found[-1].append(frame)
        else:
            found.append([frame])
    return found


def plan_stack(frames: Sequence[Frame], equal: Equal | None = None) -> SeriesPlan:
    """Order slices of one kind and size, and check that they form one regular grid, sheared or not.

    Args:
        frames: Slices with one orientation, spacing and shape.
        equal: Whether two frames hold equal values; without it, copies are refused.

    Raises:
        GeometryError: Slices are missing, unevenly spaced, or differ at one position.
    """
    if len(frames) < 2:
        raise GeometryError("The series has a single slice; a volume needs two or more.", HINT)
    places = slots(frames)
    copies = sum(len(place) - 1 for place in places)
    if copies and (
        equal is None or any(not _alike(place[0], f) or not equal(place[0], f) for place in places for f in place[1:])
    ):
        raise GeometryError(
            "Several different images lie at one position, and nothing in the header tells their volumes apart.",
            "Export one volume a series.",
        )
    ordered = [min(place, key=lambda f: (f.source, f.index)) for place in places]
    if len(ordered) < 2:
        raise GeometryError("The series has a single slice; a volume needs two or more.", HINT)
    step, normal = _step(ordered), slice_normal(ordered[0])
    plan = _lay(ordered, step, normal)
    if copies:
        said = f"equal copies of images at the same position were left out: {copies}"
        plan = replace(plan, notes=(*plan.notes, said))
    return plan


def _alike(a: Frame, b: Frame) -> bool:
    return (a.slope, a.intercept) == (b.slope, b.intercept)


def _step(frames: list[Frame]) -> NDArray[np.float64]:
    """Return the mean step from slice to slice, in mm LPS, once every step is like it."""
    normal = slice_normal(frames[0])
    positions = np.array([f.position for f in frames])
    gaps = np.diff(positions @ normal)
    typical = float(np.median(gaps))
    tolerance = max(SPACING_TOLERANCE * typical, SPACING_TOLERANCE_MM)
    if (gaps > 1.5 * typical).any():
        missing = int(np.round(gaps / typical - 1).clip(0).sum())
        raise GeometryError(f"Slices are missing: {missing} in the space between the first and the last.", HINT)
    if (np.abs(gaps - typical) > tolerance).any():
        raise GeometryError(
            f"The slices are unevenly spaced: {gaps.min():.2f} to {gaps.max():.2f} mm.",
            "Export the series with even spacing.",
        )
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    straight = positions[0] + np.arange(len(frames))[:, None] * step
    if np.linalg.norm(positions - straight, axis=1).max() > max(tolerance, 0.5 * min(frames[0].spacing)):
        raise GeometryError("The slices do not lie on a straight line.", HINT)
    return step


def _lay(frames: list[Frame], step: NDArray[np.float64], normal: NDArray[np.float64]) -> SeriesPlan:
    """Place the stack in space; a tilt becomes a shift of each slice in its plane, and an upright grid."""
    first = frames[0]
    row, column = first.orientation[:3], first.orientation[3:]
    along = float(step @ normal)
    angle = float(np.degrees(np.arctan2(np.linalg.norm(step - along * normal), along)))
    affine = np.eye(4)
    affine[:3, 1] = column * first.spacing[0]
    affine[:3, 2] = row * first.spacing[1]
    if angle <= TILT_TOLERANCE_DEGREES:
        affine[:3, 0], affine[:3, 3] = step, first.position
        return SeriesPlan(tuple(frames), lps_to_ras(affine))
    if angle > MAX_TILT_DEGREES:
        raise GeometryError(f"The slices are sheared by {angle:.1f} degrees, which no gantry is.", HINT)
    drift = np.array([step @ column / first.spacing[0], step @ row / first.spacing[1]])
    drift[np.abs(drift) * (len(frames) - 1) < 1e-3] = 0
    offsets = np.arange(len(frames))[:, None] * drift
    lowest = np.floor(offsets.min(axis=0) + 1e-6)  # whole, so that the first slice moves by whole pixels
    affine[:3, 0] = along * normal
    affine[:3, 3] = first.position + affine[:3, 1:3] @ lowest
    note = f"a tilt of {angle:.1f} degrees was sheared right by linear interpolation in the slices' plane"
    return SeriesPlan(tuple(frames), lps_to_ras(affine), offsets - lowest, (note,))
