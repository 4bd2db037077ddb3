"""Folders of NIfTI pairs: ``images/`` and ``labels/`` under equal names. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medlsdm.checks import existing_folder
from medlsdm.config import schema_of_values
from medlsdm.errors import DataError, GeometryError, MedlsdmError, SchemaError
from medlsdm.types import LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import list_nifti, nifti_stem, read_nifti

Pair = tuple[Scan, SemanticMap]


def read_labels(path: Path, schema: LabelSchema) -> SemanticMap:
    """Read one label map under a schema.

    Raises:
        SchemaError: It holds fractions, or labels that the schema does not name.
    """
    array, geometry = read_nifti(path)
    return SemanticMap(_whole(array, path), geometry, schema)


def _whole(array: np.ndarray, path: Path) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) and not (
        np.isfinite(array).all() and np.array_equal(array, np.round(array))
    ):
        raise SchemaError(f"{path.name} holds fractions, so it is no label map.", "Give integer labels.")
    return array


def find_schema(paths: list[Path]) -> LabelSchema:
    """Make a schema of the label values found in the files."""
    values: set[int] = set()
    for path in paths:
        values |= {int(v) for v in np.unique(_whole(read_nifti(path)[0], path))}
    return schema_of_values(values)


def read_pairs(folder: Path, modality: Modality, schema: LabelSchema | None) -> list[Pair]:
    """Read ``images/`` and ``labels/`` of a folder.

    Raises:
        DataError: A folder is missing or empty, names do not pair up, or an image cannot be used.
        GeometryError: A label map lies on another grid than its image.
    """
    existing_folder(folder, "The data folder")
    images, labels = (
        {nifti_stem(p): p for p in list_nifti(existing_folder(folder / name, f"The folder {name!r} in"))}
        for name in ("images", "labels")
    )
    if not images:
        raise DataError("The folder images/ holds no NIfTI file.", "Put .nii.gz files there.")
    single = len(images.keys() ^ labels.keys())
    if single:
        raise DataError(
            f"{len(images)} images and {len(labels)} label maps do not pair up: {single} have no partner.",
            "Give each image and its label map one name.",
        )
    schema = schema or find_schema(list(labels.values()))
    return [_read_pair(images[stem], labels[stem], modality, schema) for stem in sorted(images)]


def _read_pair(image: Path, labels: Path, modality: Modality, schema: LabelSchema) -> Pair:
    array, geometry = read_nifti(image)
    semantic = read_labels(labels, schema)
    try:
        scan = Scan(array, geometry, modality, nifti_stem(image))
    except MedlsdmError as error:
        raise DataError(f"{image.name}: {error.message}", error.hint) from error
    if not geometry.matches(semantic.geometry):
        raise GeometryError(
            f"{labels.name} lies on another grid than its image: {semantic.geometry.shape} against {geometry.shape}.",
            "Resample the label map onto the image.",
        )
    if scan.array.min() == scan.array.max():
        raise DataError(f"{image.name} has one value everywhere.", "Remove it, or check how it was converted.")
    return scan, semantic
