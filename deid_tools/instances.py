"""Classic DICOM images from an array: the part that synthetic exports and planted test studies share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.modules import complete
from deid_tools.series import lps_to_ras
from deid_tools.uids import fresh_uid
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Geometry, Modality

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SOP_CLASSES = {
    Modality.CT: "1.2.840.10008.5.1.4.1.1.2",
    Modality.MR: "1.2.840.10008.5.1.4.1.1.4",
    Modality.PT: "1.2.840.10008.5.1.4.1.1.128",
}


@dataclass(frozen=True, slots=True)
class Slices:
    """Hold slices as DICOM lays them out: int16 [slice, row, column], mm in LPS, and the rescale."""

    stored: NDArray[np.int16]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    thickness: float
    positions: NDArray[np.float64]
    slope: str
    intercept: str


def cut(array: NDArray[Any], geometry: Geometry, *, slope: float | None = None, centred: bool = True) -> Slices:
    """Cut a volume [X, Y, Z] into slices along its third axis; RAS becomes LPS here.

    Args:
        array: Finite values.
        geometry: Its grid; the axes must stand at right angles.
        slope: The rescale slope; by default 1 where all values are whole and fit, else as fine as fits.
        centred: Whether the intercept may be other than 0 (PET must have 0).

    Raises:
        GeometryError: The grid is sheared, or has a single slice.
        DataError: Values are not finite.
    """
    if array.shape != geometry.shape:
        raise GeometryError(f"An array of shape {array.shape} does not fit a grid of shape {geometry.shape}.")
    if geometry.shape[2] < 2:
        raise GeometryError("A series needs two slices or more.", "Give a volume, not an image.")
    if not np.isfinite(array).all():
        raise DataError("The volume holds values that are not finite.")
    stack, affine = _face_on(np.transpose(array, (2, 1, 0)), lps_to_ras(geometry.affine))
    columns, rows, step = affine[:3, 0], affine[:3, 1], affine[:3, 2]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    if not np.allclose(directions.T @ directions, np.eye(3), atol=1e-4):
        raise GeometryError("The grid is sheared; DICOM slices stand at right angles.", "Resample it first.")
    stored, slope_text, intercept_text = _store(stack, slope, centred)
    return Slices(
        stored,
        (*(columns / spacing[0]), *(rows / spacing[1])),
        (float(spacing[1]), float(spacing[0])),
        float(spacing[2]),
        affine[:3, 3] + np.arange(len(stack))[:, None] * step,
        slope_text,
        intercept_text,
    )


def _face_on(stack: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Flip rows and columns so that pictures show as readers expect: positive LPS directions."""
    affine = affine.copy()
    for axis, stack_axis in ((0, 2), (1, 1)):
        direction = affine[:3, axis]
        if direction[np.abs(direction).argmax()] < 0:
            affine[:3, 3] += direction * (stack.shape[stack_axis] - 1)
            affine[:3, axis] = -direction
            stack = np.flip(stack, stack_axis)
    return stack, affine


def _store(stack: NDArray[Any], slope: float | None, centred: bool) -> tuple[NDArray[np.int16], str, str]:
    from pydicom.valuerep import format_number_as_ds

    low, high = float(stack.min()), float(stack.max())
    whole = np.issubdtype(stack.dtype, np.integer) or bool((stack == np.rint(stack)).all())
    if slope is None and whole and low >= -32768 and high <= 32767:
        slope = 1.0
    if slope is not None and low >= -32768 * slope and high <= 32767 * slope:
        intercept = 0.0
    elif not centred:
        slope, intercept = max(abs(low), abs(high), 1e-9) / 32_000, 0.0
    else:
        slope, intercept = max((high - low) / 65_000, 1e-9), (high + low) / 2
    slope_text, intercept_text = format_number_as_ds(slope), format_number_as_ds(intercept)
    stored = np.rint((stack.astype(np.float64) - float(intercept_text)) / float(slope_text))
    return np.clip(stored, -32768, 32767).astype(np.int16), slope_text, intercept_text


def images(slices: Slices, modality: Modality, uids: dict[str, str]) -> Iterator[Dataset]:
    """Yield one dataset a slice: pixels, geometry, UIDs and what the object's definition asks for.

    Args:
        slices: The pixels and their place.
        modality: CT, MR or PT.
        uids: StudyInstanceUID, SeriesInstanceUID and FrameOfReferenceUID; each image gets a random one.
    """
    from pydicom.dataset import Dataset
    from pydicom.valuerep import format_number_as_ds

    def numbers(values: Any) -> list[str]:
        return [format_number_as_ds(float(v)) for v in values]

    for k, picture in enumerate(slices.stored):
        ds = Dataset()
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.SOPClassUID, ds.SOPInstanceUID = SOP_CLASSES[modality], fresh_uid()
        ds.Modality = modality.value
        for keyword, uid in uids.items():
            setattr(ds, keyword, uid)
        ds.SeriesNumber, ds.InstanceNumber = 1, k + 1
        ds.ImageOrientationPatient = numbers(slices.orientation)
        ds.ImagePositionPatient = numbers(slices.positions[k])
        ds.PixelSpacing = numbers(slices.spacing)
        ds.SliceThickness = ds.SpacingBetweenSlices = format_number_as_ds(slices.thickness)
        if modality is not Modality.MR:
            del ds.SpacingBetweenSlices
        ds.Rows, ds.Columns = picture.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        if modality is not Modality.MR or (float(slices.slope), float(slices.intercept)) != (1.0, 0.0):
            ds.RescaleSlope, ds.RescaleIntercept = slices.slope, slices.intercept
        if modality is Modality.CT:
            ds.RescaleType = "HU"
        if modality is Modality.PT:
            ds.Units, ds.NumberOfSlices, ds.ImageIndex = "GML", len(slices.stored), k + 1
        ds.PatientPosition = "HFS"
        ds.add_new(0x7FE00010, "OW", picture.astype("<i2").tobytes())
        complete(ds, modality.value, multiframe=False)
        yield ds
