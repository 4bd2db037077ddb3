"""Label maps on a scan's grid: DICOM SEG and NIfTI, under one label schema.

Nothing is resampled: a label map that does not sit on the scan's voxels is a GeometryError.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.nested import match_class
from deid_tools.series import lps_to_ras
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import MAX_LABEL, Geometry, LabelSchema, SemanticMap
from medlsdm.volumes import read_nifti, to_ras

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ON_GRID_VOXELS = 0.05
FRACTION = 0.5


def read_segmentation(
    ds: Dataset, geometry: Geometry, schema: LabelSchema, *, priority: tuple[str, ...] = ()
) -> SemanticMap:
    """Lay a DICOM SEG (BINARY, FRACTIONAL from 0.5, LABELMAP) on a scan's grid.

    Args:
        ds: The segmentation, with pixels.
        geometry: The scan's grid.
        schema: Segments map to its classes by SNOMED code, then by exact name.
        priority: Class names, the one that wins first; where segments overlap, both must be here.

    Raises:
        SchemaError: Segments are not in the schema.
        GeometryError: Frames do not sit on the scan's voxels.
        DataError: Segments overlap, or the pixels cannot be read.
    """
    classes = _classes(ds, schema)
    kind = str(ds.SegmentationType)
    ranks = {cls.id: priority.index(cls.name) for cls in schema.classes if cls.name in priority}
    labels = np.zeros(geometry.shape, np.uint16)
    to_index = np.linalg.inv(geometry.affine)
    for frame, (values, segment) in enumerate(_frames(ds, kind)):
        chosen = np.argwhere(values)
        if not len(chosen):
            continue
        index = _voxels(ds, frame, chosen, to_index, geometry)
        if kind == "LABELMAP":
            present = np.unique(values[values > 0])
            if any(int(v) not in classes for v in present):
                raise DataError("The segmentation uses a segment that it does not describe.")
            lookup = np.zeros(int(present.max()) + 1, np.uint16)
            lookup[present] = [classes[int(v)] for v in present]
            new = lookup[values[tuple(chosen.T)]]
        else:
            new = np.full(len(chosen), classes[segment], np.uint16)
        _lay(labels, index, new, ranks)
    return SemanticMap(labels, geometry, schema)


def _classes(ds: Dataset, schema: LabelSchema) -> dict[int, int]:
    """Map segment numbers to class ids."""
    classes: dict[int, int] = {}
    unknown: list[str] = []
    for segment in ds.SegmentSequence:
        codes = segment.get("SegmentedPropertyTypeCodeSequence", None) or []
        value = str(codes[0].get("CodeValue", "")) if codes else ""
        scheme = str(codes[0].get("CodingSchemeDesignator", "")) if codes else ""
        found = match_class(schema, value, scheme, str(segment.get("SegmentLabel", "")))
        if found:
            classes[int(segment.SegmentNumber)] = found.id
        else:
            unknown.append(_public_name(value, scheme))
    if unknown:
        raise SchemaError(
            f"{len(unknown)} of {len(ds.SegmentSequence)} segments are not in the label schema {schema.name!r}"
            f" ({', '.join(sorted(set(unknown))[:5])}).",
            "Add them to the label schema or leave them out of the segmentation.",
        )
    return classes


def _public_name(value: str, scheme: str) -> str:
    from deid_tools.nested import code_meaning

    return code_meaning(value, scheme) or "a name of the site's own"


def _frames(ds: Dataset, kind: str) -> Any:
    """Yield the values of each frame and the segment that it belongs to (0 in a LABELMAP)."""
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise DataError("The segmentation is of an unknown type.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = ds.pixel_array
        array = array[None] if array.ndim == 2 else array
        groups = list(ds.PerFrameFunctionalGroupsSequence)
        if len(groups) != len(array):
            raise DataError("The segmentation does not describe every frame.")
        for values, own in zip(array, groups, strict=True):
            segment = (
                0
                if kind == "LABELMAP"
                else int(_group(ds, own, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            )
            threshold = FRACTION * float(ds.MaximumFractionalValue) if kind == "FRACTIONAL" else 0
            yield (values >= threshold if kind == "FRACTIONAL" else values), segment
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise DataError("The segmentation is damaged: pixels or frame descriptions are missing.") from None


def _group(ds: Dataset, own: Dataset, name: str) -> Dataset:
    items = own.get(name, None) or ds.SharedFunctionalGroupsSequence[0].get(name, None)
    return items[0]


def _voxels(
    ds: Dataset, frame: int, chosen: NDArray[Any], to_index: NDArray[Any], geometry: Geometry
) -> NDArray[np.int64]:
    """Return the scan's voxel indices [N, 3] under the chosen pixels (row, column) of a frame."""
    own = ds.PerFrameFunctionalGroupsSequence[frame]
    try:
        position = [float(v) for v in _group(ds, own, "PlanePositionSequence").ImagePositionPatient]
        direction = [float(v) for v in _group(ds, own, "PlaneOrientationSequence").ImageOrientationPatient]
        spacing = [float(v) for v in _group(ds, own, "PixelMeasuresSequence").PixelSpacing]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise GeometryError("A frame of the segmentation does not say where it lies.") from None
    plane = np.eye(4)
    plane[:3, 0] = np.array(direction[3:]) * spacing[0]
    plane[:3, 1] = np.array(direction[:3]) * spacing[1]
    plane[:3, 2] = 0
    plane[:3, 3] = position
    index = to_index @ lps_to_ras(plane)
    places = chosen @ index[:3, :2].T + index[:3, 3]
    steps = np.abs(index[:3, :2])
    rounded = np.rint(places).astype(np.int64)
    off = np.abs(places - rounded).max()
    inside = (rounded >= 0).all() and (rounded < geometry.shape).all()
    if off > ON_GRID_VOXELS or np.abs(steps - np.rint(steps)).max() > ON_GRID_VOXELS or not inside:
        raise GeometryError(
            "The segmentation does not lie on the scan's voxels.", "Segment the series itself, not a resampled copy."
        )
    return rounded


def _lay(labels: NDArray[np.uint16], index: NDArray[np.int64], new: NDArray[np.uint16], ranks: dict[int, int]) -> None:
    where = tuple(index.T)
    old = labels[where]
    clash = (old != 0) & (old != new)
    if clash.any():
        pairs = {(int(a), int(b)) for a, b in zip(old[clash], new[clash], strict=True)}
        if any(a not in ranks or b not in ranks for a, b in pairs):
            raise DataError(
                f"Segments overlap in {int(clash.sum())} or more voxels.", "Declare which class wins, or separate them."
            )
        keep = np.array([ranks.get(int(a), 0) < ranks.get(int(b), 0) for a, b in zip(old, new, strict=True)])
        new = np.where(clash & keep, old, new)
    labels[where] = new


def read_label_nifti(path: Path, geometry: Geometry, schema: LabelSchema) -> SemanticMap:
    """Read a NIfTI label map that sits on a scan's grid, whatever the order of its axes.

    Raises:
        GeometryError: It is on another grid.
        SchemaError: It holds values that the schema does not name.
    """
    array, found = canonical_labels(path)
    if not found.matches(geometry, tolerance_mm=ON_GRID_VOXELS * min(geometry.spacing)):
        raise GeometryError("The label map is on another grid than the scan.", "Export it on the scan's own grid.")
    return SemanticMap(array, geometry, schema)


def canonical_labels(path: Path) -> tuple[NDArray[np.uint16], Geometry]:
    """Read a NIfTI label map with its axes nearest to R, A, S.

    Raises:
        DataError: It is not a map of whole numbers from 0 to 65535.
    """
    array, geometry = to_ras(*read_nifti(path))
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > MAX_LABEL or (array != np.rint(array)).any():
        raise DataError("The NIfTI file is not a label map: its values are not whole numbers from 0 to 65535.")
    return array.astype(np.uint16), geometry
