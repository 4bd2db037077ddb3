"""Label maps on a scan's grid: NIfTI, and what every source of labels shares, under one label schema.

Nothing is resampled: a label map that does not sit on the scan's voxels is a GeometryError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.nested import code_meaning
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import MAX_LABEL, Geometry, LabelSchema, SemanticMap
from medlsdm.volumes import read_nifti, to_ras

ON_GRID_VOXELS = 0.05
_FEWEST_PAIRS, _ALIKE = 64, 0.5
_FEWEST_GREYS = 40


class Canvas:
    """Collect structures on one grid. Two that claim one voxel need a declared priority, else nothing is kept.

    Args:
        shape: The grid's shape.
        schema: The label schema; its ``priority`` says which class wins.
    """

    def __init__(self, shape: tuple[int, int, int], schema: LabelSchema) -> None:
        self.labels = np.zeros(shape, np.uint16)
        self._schema = schema
        self._rank = np.full(MAX_LABEL + 1, -1, np.int32)
        for rank, name in enumerate(schema.priority):
            self._rank[[c.id for c in schema.classes if c.name == name]] = rank

    def lay(self, where: tuple[Any, ...], classes: NDArray[np.uint16] | int) -> None:
        """Give the voxels at ``where`` (an index into the labels) to classes; 0 takes nothing.

        Raises:
            DataError: A voxel belongs to two classes of which one has no priority.
        """
        old = self.labels[where]
        new = np.broadcast_to(np.asarray(classes, np.uint16), old.shape)
        clash = (old != 0) & (new != 0) & (old != new)
        first, second = self._rank[old], self._rank[new]
        undecided = clash & ((first < 0) | (second < 0))
        if undecided.any():
            raise DataError(
                f"Structures overlap: {self._pair(old, new, undecided)}.",
                "Name both under 'priority' in the label schema, the winner first, or separate them.",
            )
        stay = (new == 0) | (clash & (first < second))
        self.labels[where] = np.where(stay, old, new)

    def _pair(self, old: NDArray[np.uint16], new: NDArray[np.uint16], where: NDArray[np.bool_]) -> str:
        one, other = int(old[where][0]), int(new[where][0])
        return f"{self._schema.by_id(one).name} and {self._schema.by_id(other).name}"


def combine(maps: Iterable[SemanticMap], schema: LabelSchema) -> SemanticMap:
    """Lay the label maps of one scan over each other, such as one an organ; a single one comes back as it is.

    Raises:
        DataError: One class stands in two of them, as when two people drew it; or two classes overlap
            and no priority is declared.
    """
    whole, canvas, seen = None, None, set[int]()
    for found in maps:
        if whole is None:
            whole, seen = found, _classes(found)
            continue
        if twice := seen & (present := _classes(found)):
            raise DataError(
                f"Several label maps of the series hold {schema.by_id(min(twice)).name}; which one counts is not said.",
                "Keep one label map for each class of a series.",
            )
        if canvas is None:
            canvas = Canvas(whole.array.shape, schema)
            canvas.labels[:] = whole.array
        canvas.lay((...,), found.array.astype(np.uint16))
        seen |= present
    assert whole is not None
    return whole if canvas is None else SemanticMap(canvas.labels, whole.geometry, schema)


def _classes(labels: SemanticMap) -> set[int]:
    return {int(value) for value in np.flatnonzero(np.bincount(labels.array.ravel())) if value}


def refuse_unknown(unknown: Mapping[int, tuple[str, str]], total: int, schema: LabelSchema) -> None:
    """Refuse structures that the schema does not know, by number and by what the dictionary calls their code.

    Args:
        unknown: Number of the structure: its code value and coding scheme ("" if it has none).
        total: How many structures there are.
        schema: The schema that they were looked up in.

    Raises:
        SchemaError: There is one; its own words are not quoted, for they may name the patient.
    """
    if not unknown:
        return
    shown = [
        f"number {number}: {code_meaning(*code) or 'a name of its own'}" for number, code in sorted(unknown.items())[:5]
    ]
    more = ", ..." if len(unknown) > len(shown) else ""
    raise SchemaError(
        f"{len(unknown)} of {total} segments are not in the label schema {schema.name!r} ({', '.join(shown)}{more}).",
        "Look at them with 'medlsdm-deid names', and add them to the schema as aliases, or to its background.",
    )


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
        DataError: It is not a map of whole numbers from 0 to 65535, or shows a picture.
    """
    array, geometry = to_ras(*read_nifti(path))
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > MAX_LABEL or (array != np.rint(array)).any():
        raise DataError("The NIfTI file is not a label map: its values are not whole numbers from 0 to 65535.")
    if _is_picture(array):
        raise DataError("The NIfTI file is not a label map: its values change from voxel to voxel, as in a picture.")
    return array.astype(np.uint16), geometry


def _is_picture(array: NDArray[Any]) -> bool:
    """Tell a scan from a label map: in a map, a voxel and the next mostly belong to one structure.

    A scan that was converted to NIfTI often lies beside its DICOM files, on the same grid and in whole numbers; taken
    for labels it would bring back the face.
    """
    alike = pairs = 0
    for axis in range(3):
        first = np.moveaxis(array, axis, 0)[:-1]
        second = np.moveaxis(array, axis, 0)[1:]
        inside = (first != 0) & (second != 0)
        pairs += int(inside.sum())
        alike += int((inside & (first == second)).sum())
    if pairs < _FEWEST_PAIRS or alike >= _ALIKE * pairs:
        return False
    return len(np.unique(array)) > _FEWEST_GREYS  # thin structures on a coarse grid are few, greys are many
