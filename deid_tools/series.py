"""Build one scan from one series: order the slices, check that they fill space evenly, then stack them.

No reader is safe alone: several build a wrong volume from a missing or doubled slice, from gantry
tilt or from mixed orientations. Here each of these is a GeometryError; nothing is resampled.
LPS (DICOM) becomes RAS in ``lps_to_ras`` and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import IMAGE_CLASSES
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Geometry, Modality, Scan
from medlsdm.volumes import to_ras

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ORIENTATION_TOLERANCE = 1e-4
SPACING_TOLERANCE = 0.01
SPACING_TOLERANCE_MM = 0.1
TILT_TOLERANCE_DEGREES = 0.1
_HINT = "Export the series again, complete and uncut, or leave it out."
_DUPLICATE = (
    "Several images lie at one position: duplicates, time points or echoes.",
    "Export one volume a series.",
)


def lps_to_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn an affine from DICOM's patient axes (LPS) to RAS, or back: the same flip."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@dataclass(frozen=True, slots=True)
class Frame:
    """Hold one slice's place and scaling: which file, which frame in it, mm in LPS.

    ``contrast`` tells echoes, time points and b-values apart.
    """

    source: int
    index: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    slope: float
    intercept: float
    contrast: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SeriesPlan:
    """Say in which order frames stack and where the stack [slice, row, column] lies (affine in RAS)."""

    frames: tuple[Frame, ...]
    affine: NDArray[np.float64]

    @property
    def geometry(self) -> Geometry:
        """Return the grid of the stack, axes in DICOM order."""
        return Geometry(self.affine, (len(self.frames), *self.frames[0].shape))

    @property
    def canonical(self) -> Geometry:
        """Return the grid of the scan that the series becomes, axes nearest to R, A, S."""
        empty = np.broadcast_to(np.uint8(0), self.geometry.shape)
        return to_ras(empty, self.geometry)[1]


def plan_series(datasets: Sequence[Dataset]) -> SeriesPlan:
    """Order a series' slices and check that they form one regular, untilted grid. Headers suffice.

    Raises:
        GeometryError: Slices are missing, doubled, tilted, unevenly spaced, of differing size or
            orientation, or belong to several echoes, time points or b-values.
    """
    frames = [frame for i, ds in enumerate(datasets) for frame in _frames(ds, i)]
    if len(frames) < 2:
        raise GeometryError("The series has a single slice; a volume needs two or more.", _HINT)
    first = frames[0]
    if len({f.shape for f in frames}) > 1:
        raise GeometryError("The slices differ in rows or columns.", _HINT)
    if any(not np.allclose(f.spacing, first.spacing, rtol=1e-4, atol=0) for f in frames):
        raise GeometryError("The slices differ in pixel spacing.", _HINT)
    if any(np.abs(f.orientation - first.orientation).max() > ORIENTATION_TOLERANCE for f in frames):
        raise GeometryError("The slices differ in orientation.", _HINT)
    if len({f.contrast for f in frames}) > 1:
        raise GeometryError("The series holds several echoes, time points or b-values.", "Export one volume a series.")
    row, column = first.orientation[:3], first.orientation[3:]
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise GeometryError("The slice orientation is not a right angle.", _HINT)
    normal = np.cross(row, column)
    frames.sort(key=lambda f: float(f.position @ normal))
    step = _check_steps(frames, normal)
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * first.spacing[0]
    affine[:3, 2] = row * first.spacing[1]
    affine[:3, 3] = frames[0].position
    return SeriesPlan(tuple(frames), lps_to_ras(affine))


def _check_steps(frames: list[Frame], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean step from slice to slice, in mm LPS, once every step is like it."""
    positions = np.array([f.position for f in frames])
    gaps = np.diff(positions @ normal)
    typical = float(np.median(gaps))
    if gaps.min() < max(1e-3, 0.01 * typical):
        raise GeometryError(*_DUPLICATE)
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    along = float(step @ normal)
    sideways = float(np.linalg.norm(step - along * normal))
    angle = float(np.degrees(np.arctan2(sideways, along)))
    if angle > TILT_TOLERANCE_DEGREES:
        raise GeometryError(
            f"The slices are sheared by {angle:.1f} degrees (gantry tilt).",
            "Tilt is not corrected yet; export the series untilted.",
        )
    tolerance = max(SPACING_TOLERANCE * typical, SPACING_TOLERANCE_MM)
    if (gaps > 1.5 * typical).any():
        missing = int(np.round(gaps / typical - 1).sum())
        raise GeometryError(f"Slices are missing: {missing} in the space between the first and the last.", _HINT)
    if (np.abs(gaps - typical) > tolerance).any():
        raise GeometryError(
            f"The slices are unevenly spaced: {gaps.min():.2f} to {gaps.max():.2f} mm.",
            "Export the series with even spacing.",
        )
    straight = positions[0] + np.arange(len(frames))[:, None] * step
    if np.linalg.norm(positions - straight, axis=1).max() > max(tolerance, 0.5 * min(frames[0].spacing)):
        raise GeometryError("The slices do not lie on a straight line.", _HINT)
    return step


def _frames(ds: Dataset, source: int) -> list[Frame]:
    try:
        shape = (int(ds.Rows), int(ds.Columns))
        if "PerFrameFunctionalGroupsSequence" not in ds:
            contrast = tuple(
                str(ds.get(k, ""))
                for k in ("EchoTime", "EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue", "InversionTime")
            )
            return [_frame(source, 0, shape, ds, ds, ds, ds, contrast)]
        shared = ds.SharedFunctionalGroupsSequence[0]
        frames = []
        for index, own in enumerate(ds.PerFrameFunctionalGroupsSequence):
            position = _group(shared, own, "PlanePositionSequence")
            orientation = _group(shared, own, "PlaneOrientationSequence")
            measures = _group(shared, own, "PixelMeasuresSequence")
            scaling = _group(shared, own, "PixelValueTransformationSequence")
            contrast = (
                str(_group(shared, own, "MREchoSequence").get("EffectiveEchoTime", "")),
                str(_group(shared, own, "MRDiffusionSequence").get("DiffusionBValue", "")),
                str(_group(shared, own, "FrameContentSequence").get("TemporalPositionIndex", "")),
            )
            frames.append(_frame(source, index, shape, position, orientation, measures, scaling, contrast))
        return frames
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise GeometryError("Position, orientation or spacing of a slice is missing.", _HINT) from None


def _group(shared: Dataset, own: Dataset, name: str) -> Dataset:
    from pydicom.dataset import Dataset

    items = own.get(name, None) or shared.get(name, None)
    return items[0] if items else Dataset()


def _frame(
    source: int,
    index: int,
    shape: tuple[int, int],
    position: Dataset,
    orientation: Dataset,
    measures: Dataset,
    scaling: Dataset,
    contrast: tuple[Any, ...],
) -> Frame:
    slope, intercept = scaling.get("RescaleSlope", None), scaling.get("RescaleIntercept", None)
    spacing = (float(measures.PixelSpacing[0]), float(measures.PixelSpacing[1]))
    frame = Frame(
        source,
        index,
        np.array([float(v) for v in position.ImagePositionPatient]),
        np.array([float(v) for v in orientation.ImageOrientationPatient]),
        spacing,
        shape,
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        contrast,
    )
    numbers = [*frame.position, *frame.orientation, *spacing, frame.slope, frame.intercept]
    if len(frame.position) != 3 or len(frame.orientation) != 6 or not np.isfinite(numbers).all() or min(spacing) <= 0:
        raise GeometryError("Position, orientation or spacing of a slice is not usable.", _HINT)
    return frame


def build_scan(datasets: Sequence[Dataset], subject: str) -> Scan:
    """Stack a series into a scan: HU for CT, stored units for MR, SUV for PET; axes nearest to R, A, S.

    Args:
        datasets: Every instance of one series, with pixels.
        subject: The patient's pseudonym.

    Raises:
        GeometryError: See ``plan_series``.
        DataError: Pixels cannot be read, or PET values are not SUV.
    """
    modality = Modality(IMAGE_CLASSES[str(datasets[0].SOPClassUID)])
    if modality is Modality.PT and {str(ds.get("Units", "")) for ds in datasets} != {"GML"}:
        raise DataError(
            "The PET values are not SUV (g/ml), and dose and weight are not kept to convert them.",
            "Export the series as SUV.",
        )
    plan = plan_series(datasets)
    stack = np.empty(plan.geometry.shape, np.float32)
    for k, frame in enumerate(plan.frames):
        stack[k] = _pixels(datasets[frame.source], frame.index) * frame.slope + frame.intercept
    array, geometry = to_ras(stack, plan.geometry)
    return Scan(np.ascontiguousarray(array), geometry, modality, subject)


def _pixels(ds: Dataset, index: int) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = ds.pixel_array
    except Exception:
        raise DataError("The pixels of a slice cannot be read.", _HINT) from None
    return (array[index] if array.ndim == 3 else array).astype(np.float32)
