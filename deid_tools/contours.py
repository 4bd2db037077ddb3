"""RT structure sets onto a series' grid: contours drawn on its slices, filled by our own scan lines.

A contour must lie in one slice of the series, as it does when it is drawn on the images, oblique
ones included. What was drawn across slices, between them or beside them is refused, not projected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.labels import Canvas, refuse_unknown
from deid_tools.nested import match_class
from deid_tools.polygons import fill, inside, on_edges
from deid_tools.series import lps_to_ras
from medlsdm.errors import DataError, GeometryError
from medlsdm.types import Geometry, LabelSchema, SemanticMap
from medlsdm.volumes import to_ras

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ON_SLICE = 0.1
"""How far from a slice a contour may lie, in slice steps."""
MAX_POINTS, MAX_CONTOURS = 20_000, 500
"""How many points a contour and how many contours a slice of one structure may have: a bound on time and memory."""
_CLOSED, _XOR = "CLOSED_PLANAR", "CLOSEDPLANAR_XOR"
_BROKEN = (AttributeError, KeyError, IndexError, TypeError, ValueError)
_DAMAGED = "The structure set is damaged: a structure or a contour is not described as the standard asks."
_HINT = "Export the structures as DICOM SEG on the series itself."

Slices = dict[int, list[tuple[NDArray[np.float64], bool]]]


def read_structures(
    ds: Dataset,
    stack: Geometry,
    schema: LabelSchema,
    *,
    slice_of: Mapping[str, int] | None = None,
    same_frame: bool = True,
) -> SemanticMap:
    """Fill the contours of an RTSTRUCT on a series' grid; axes come back nearest to R, A, S.

    Several contours of one structure on one slice are combined even-odd, so that one inside another
    is a hole. Structures without contours are passed over.

    Args:
        ds: The structure set.
        stack: The grid of the series as it stacks: [slice, row, column].
        schema: Structures map to its classes by SNOMED code, then by name or alias; where two
            overlap, its ``priority`` decides.
        slice_of: The stack index of each image by SOPInstanceUID, to compare with the image that a
            contour names.
        same_frame: Whether the frame of reference is the series' own; if not, every contour must
            name its image.

    Raises:
        SchemaError: Structures are not in the schema.
        GeometryError: A contour does not lie on a slice, or on another one than it says.
        DataError: Structures overlap and no priority is declared, contours of one structure cross,
            are open, or skip slices, or the object is damaged.

    Source: DICOM PS3.3 C.8.8.5 (structure set), C.8.8.6 (ROI contour), C.8.8.8 (observations).
    """
    try:
        classes = _classes(ds, schema)
        canvas = Canvas(stack.shape, schema)
        to_index = np.linalg.inv(stack.affine) @ lps_to_ras(np.eye(4))
        for number, item in _drawn(ds):
            if not classes[number]:
                continue
            slices: Slices = defaultdict(list)
            for contour in item.ContourSequence:
                index, points = _place(contour, to_index, stack)
                _check_image(contour, index, slice_of, same_frame)
                slices[index].append((points, str(contour.ContourGeometricType) == _XOR))
            _check_gaps(sorted(slices))
            for index, contours in slices.items():
                _check_crossings(contours, stack)
                mask = fill([points for points, _ in contours], stack.shape[1:])
                canvas.lay((np.full(int(mask.sum()), index), *np.nonzero(mask)), classes[number])
    except _BROKEN:
        raise DataError(_DAMAGED, _HINT) from None
    labels, geometry = to_ras(canvas.labels, stack)
    return SemanticMap(np.ascontiguousarray(labels), geometry, schema)


def structure_names(ds: Dataset) -> dict[int, tuple[str, str, str]]:
    """Return each structure's own name, code value and coding scheme by ROI number: the site's words, unchecked."""
    names = {int(item.ROINumber): (str(item.get("ROIName", "")), "", "") for item in ds.StructureSetROISequence}
    if len(names) != len(ds.StructureSetROISequence):
        raise ValueError
    for item in ds.get("RTROIObservationsSequence", None) or ():
        codes = item.get("RTROIIdentificationCodeSequence", None) or item.get("SegmentedPropertyTypeCodeSequence", None)
        number = int(item.get("ReferencedROINumber", None) or 0)
        if codes and number in names:
            value, scheme = str(codes[0].get("CodeValue", "")), str(codes[0].get("CodingSchemeDesignator", ""))
            names[number] = (names[number][0], value, scheme)
    return names


def _drawn(ds: Dataset) -> Iterator[tuple[int, Dataset]]:
    for item in ds.get("ROIContourSequence", None) or ():
        if item.get("ContourSequence", None):
            yield int(item.ReferencedROINumber), item


def _classes(ds: Dataset, schema: LabelSchema) -> dict[int, int]:
    names = structure_names(ds)
    found, unknown = {}, {}
    drawn = [number for number, _ in _drawn(ds)]
    if len(set(drawn)) != len(drawn) or not set(drawn) <= set(names):
        raise ValueError
    for number in drawn:
        name, value, scheme = names[number]
        match = match_class(schema, value, scheme, name)
        if match:
            found[number] = match.id
        else:
            unknown[number] = (value, scheme)
    refuse_unknown(unknown, len(drawn), schema)
    return found


def _place(contour: Dataset, to_index: NDArray[Any], stack: Geometry) -> tuple[int, NDArray[np.float64]]:
    """Return the slice that a contour lies on, and its points [N, 2] (row, column)."""
    if str(contour.ContourGeometricType) not in (_CLOSED, _XOR):
        raise DataError("A structure of the schema is drawn as points or open lines, not as closed contours.", _HINT)
    points = _numbers(contour)
    if len(points) != 3 * int(contour.NumberOfContourPoints) or not len(points) or not np.isfinite(points).all():
        raise DataError(_DAMAGED, _HINT)
    if len(points) > 3 * MAX_POINTS:
        raise DataError(f"A contour has more than {MAX_POINTS} points.", _HINT)
    if any(float(v) for v in contour.get("ContourOffsetVector", None) or ()):
        raise GeometryError("A contour is moved by an offset, which is not supported.", _HINT)
    places = points.reshape(-1, 3) @ to_index[:3, :3].T + to_index[:3, 3]
    depth = places[:, 0]
    index = int(np.rint(depth.mean()))
    if np.ptp(depth) > 2 * ON_SLICE:
        raise GeometryError("A contour is not drawn on the series' slices: it crosses several.", _HINT)
    if np.abs(depth - index).max() > ON_SLICE:
        raise GeometryError("A contour lies between the series' slices.", _HINT)
    if not 0 <= index < stack.shape[0]:
        raise GeometryError("A contour lies above or below the series' slices.", _HINT)
    return index, places[:, 1:]


def _numbers(contour: Dataset) -> NDArray[np.float64]:
    """Return ContourData as numbers; from its bytes where it has not been parsed, which is much faster."""
    raw = contour.get_item("ContourData")
    value: Any = raw.value if raw is not None else None
    if isinstance(value, bytes):
        return np.array(value.rstrip(b"\0 ").split(b"\\"), dtype=np.float64)
    return np.array([float(v) for v in contour.ContourData], dtype=np.float64)


def _check_image(contour: Dataset, index: int, slice_of: Mapping[str, int] | None, same_frame: bool) -> None:
    named = [str(item.ReferencedSOPInstanceUID) for item in contour.get("ContourImageSequence", None) or ()]
    found = {(slice_of or {}).get(uid) for uid in named}
    if slice_of and named and found != {index}:
        raise GeometryError("A contour names another image than the one that it lies on.", _HINT)
    if not same_frame and found != {index}:
        raise GeometryError("The structure set lies in another frame of reference than the series.", _HINT)


def _check_gaps(slices: list[int]) -> None:
    if len(slices) > 1 and int(np.diff(slices).min()) > 1:
        raise DataError("A structure is drawn on every second slice or fewer; slices between are not made up.", _HINT)


def _check_crossings(contours: list[tuple[NDArray[np.float64], bool]], stack: Geometry) -> None:
    """Refuse plain contours that are neither apart nor one within the other: nobody can tell what is meant."""
    if len(contours) > MAX_CONTOURS:
        raise DataError(f"A structure has more than {MAX_CONTOURS} contours on one slice.", _HINT)
    plain = [points for points, xor in contours if not xor] if len(contours) > 1 else []
    within = [inside([points], stack.shape[1:]) & ~on_edges([points], stack.shape[1:]) for points in plain]
    for (a, one), (b, other) in combinations(zip(within, plain, strict=True), 2):
        if (one.max(axis=0) < other.min(axis=0)).any() or (other.max(axis=0) < one.min(axis=0)).any():
            continue
        shared, smaller = int((a & b).sum()), min(int(a.sum()), int(b.sum()))
        repeated = np.array_equal(a, b) and abs(_area(one) - _area(other)) < 0.01
        if shared and (shared != smaller or repeated):
            raise DataError("Two contours of one structure cross or repeat on one slice.", _HINT)


def _area(points: NDArray[np.float64]) -> float:
    """Return what a polygon encloses, in pixels (shoelace formula)."""
    after = np.roll(points, -1, axis=0)
    return 0.5 * abs(float((points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum()))
