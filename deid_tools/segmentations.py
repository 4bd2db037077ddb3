"""DICOM SEG onto a scan's grid: binary, fractional and label map segmentations.

Every frame says where it lies; it must fall on the scan's voxels one to one. Nothing is resampled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.labels import ON_GRID_VOXELS, Canvas, refuse_unknown
from deid_tools.nested import match_class
from deid_tools.stacks import SPACING_TOLERANCE, lps_to_ras
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Geometry, LabelSchema, SemanticMap

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FRACTION = 0.5
_BROKEN = (AttributeError, KeyError, IndexError, TypeError, ValueError)
_OFF_GRID = "The segmentation does not lie on the scan's voxels."
_OFF_HINT = "Segment the series itself, not a resampled copy."


def read_segmentation(
    ds: Dataset, geometry: Geometry, schema: LabelSchema, *, fraction: float = FRACTION
) -> SemanticMap:
    """Lay a DICOM SEG (BINARY, FRACTIONAL or LABELMAP) on a scan's grid.

    Args:
        ds: The segmentation, with pixels.
        geometry: The scan's grid.
        schema: Segments map to its classes by SNOMED code, then by name or alias; where two
            overlap, its ``priority`` decides.
        fraction: From which share of the maximum a fractional value counts as inside (0 to 1).

    Raises:
        SchemaError: Segments are not in the schema.
        GeometryError: Frames do not sit on the scan's voxels.
        DataError: Segments overlap and no priority is declared, or the pixels cannot be read.

    Source: DICOM PS3.3 C.8.20 (segmentation), C.8.20.2.3 (its types).
    """
    kind = str(ds.get("SegmentationType", ""))
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise DataError("The segmentation is of an unknown type.")
    classes = _classes(ds, kind, schema)
    canvas = Canvas(geometry.shape, schema)
    to_index = np.linalg.inv(geometry.affine)
    for own, values, segment in _frames(ds, kind, fraction):
        chosen = np.argwhere(values)
        if not len(chosen):
            continue
        where = _voxels(ds, own, chosen, to_index, geometry)
        canvas.lay(where, _translated(values, classes) if kind == "LABELMAP" else _class_of(segment, classes))
    return SemanticMap(canvas.labels, geometry, schema)


def segment_name(segment: Dataset) -> tuple[str, str, str]:
    """Return a segment's own label, code value and coding scheme: the site's words, unchecked."""
    codes = segment.get("SegmentedPropertyTypeCodeSequence", None) or []
    value = str(codes[0].get("CodeValue", "")) if codes else ""
    scheme = str(codes[0].get("CodingSchemeDesignator", "")) if codes else ""
    return str(segment.get("SegmentLabel", "")), value, scheme


def refuse_undescribed(ds: Dataset) -> None:
    """Refuse a staged LABELMAP whose pixels hold other numbers than its segments': it may be a picture.

    Raises:
        DataError: It uses a number that it does not describe.
    """
    if str(ds.get("SegmentationType", "")) != "LABELMAP":
        return
    present = set(np.unique(np.frombuffer(ds.PixelData, f"<u{int(ds.BitsAllocated) // 8}")).tolist())
    described = {int(segment.SegmentNumber) for segment in ds.SegmentSequence}
    if present - described - {0, int(ds.get("PixelPaddingValue", None) or 0)}:
        raise DataError("The segmentation uses a segment that it does not describe.")


def _classes(ds: Dataset, kind: str, schema: LabelSchema) -> dict[int, int]:
    """Map segment numbers to class ids; number 0 of a label map is its background."""
    classes: dict[int, int] = {}
    unknown: dict[int, tuple[str, str]] = {}
    try:
        for segment in ds.SegmentSequence:
            number = int(segment.SegmentNumber)
            if number in classes or number in unknown:
                raise DataError("The segmentation describes one segment number twice.")
            name, value, scheme = segment_name(segment)
            found = match_class(schema, value, scheme, name)
            if kind == "LABELMAP" and number == 0:
                classes[0] = 0
            elif found:
                classes[number] = found.id
            else:
                unknown[number] = (value, scheme)
    except _BROKEN:
        raise DataError("The segmentation is damaged: its segments are not described.") from None
    refuse_unknown(unknown, len(ds.SegmentSequence), schema)
    return classes


def _class_of(segment: int, classes: dict[int, int]) -> int:
    if segment not in classes:
        raise DataError("The segmentation uses a segment that it does not describe.")
    return classes[segment]


def _translated(values: NDArray[Any], classes: dict[int, int]) -> NDArray[np.uint16]:
    """Return the class of every pixel that is not 0, in the order of ``argwhere``."""
    present = np.unique(values[values > 0])
    lookup = np.zeros(int(present.max()) + 1, np.uint16)
    lookup[present] = [_class_of(int(v), classes) for v in present]
    return lookup[values[values > 0]]


def _frames(ds: Dataset, kind: str, fraction: float) -> Iterator[tuple[Dataset, NDArray[Any], int]]:
    """Yield each frame's description, its values, and the segment that it belongs to (0 in a label map)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = ds.pixel_array
        array = array[None] if array.ndim == 2 else array
        groups = list(ds.PerFrameFunctionalGroupsSequence)
        if len(groups) != len(array):
            raise DataError("The segmentation does not describe every frame.")
        empty = int(ds.get("PixelPaddingValue", None) or 0)
        threshold = fraction * float(ds.MaximumFractionalValue) if kind == "FRACTIONAL" else 0.0
        for values, own in zip(array, groups, strict=True):
            if kind == "LABELMAP":
                yield own, np.where(values == empty, 0, values), 0
                continue
            segment = int(_group(ds, own, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            yield own, (values >= max(threshold, 1) if kind == "FRACTIONAL" else values > 0), segment
    except DataError:
        raise
    except Exception:  # a decoder may fail in any way
        raise DataError("The segmentation is damaged: pixels or frame descriptions are missing.") from None


def _group(ds: Dataset, own: Dataset, name: str) -> Dataset:
    items = own.get(name, None) or ds.SharedFunctionalGroupsSequence[0].get(name, None)
    return items[0]


def _voxels(
    ds: Dataset, own: Dataset, chosen: NDArray[Any], to_index: NDArray[Any], geometry: Geometry
) -> tuple[NDArray[np.int64], ...]:
    """Return the scan's voxel indices under the chosen pixels (row, column) of a frame."""
    try:
        position = [float(v) for v in _group(ds, own, "PlanePositionSequence").ImagePositionPatient]
        direction = [float(v) for v in _group(ds, own, "PlaneOrientationSequence").ImageOrientationPatient]
        measures = _group(ds, own, "PixelMeasuresSequence")
        spacing = [float(v) for v in measures.PixelSpacing]
        between = float(measures.get("SpacingBetweenSlices", None) or 0)
        plane = np.eye(4)
        plane[:3, 0] = np.array(direction[3:]) * spacing[0]
        plane[:3, 1] = np.array(direction[:3]) * spacing[1]
        plane[:3, 3] = position
    except _BROKEN:
        raise GeometryError("A frame of the segmentation does not say where it lies.") from None
    index = to_index @ lps_to_ras(plane)
    steps = np.rint(index[:3, :2])
    places = chosen @ index[:3, :2].T + index[:3, 3]
    rounded = np.rint(places).astype(np.int64)
    one_to_one = np.abs(steps).sum(axis=0).tolist() == [1, 1] and not (steps[:, 0] * steps[:, 1]).any()
    if not one_to_one or np.abs(index[:3, :2] - steps).max() > ON_GRID_VOXELS:
        raise GeometryError(_OFF_GRID, _OFF_HINT)
    if np.abs(places - rounded).max() > ON_GRID_VOXELS or (rounded < 0).any() or (rounded >= geometry.shape).any():
        raise GeometryError(_OFF_GRID, _OFF_HINT)
    slice_axis = int(np.flatnonzero(np.abs(steps).sum(axis=1) == 0)[0])
    step = geometry.spacing[slice_axis]
    if between and abs(abs(between) - step) > SPACING_TOLERANCE * step:
        raise GeometryError("The segmentation's slices are spaced unlike the scan's.", _OFF_HINT)
    return tuple(rounded.T)
