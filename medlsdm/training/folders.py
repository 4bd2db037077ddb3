"""Folders of NIfTI pairs: ``images/`` and ``labels/`` under equal names. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medlsdm.checks import existing_folder
from medlsdm.config import schema_of_values
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.training.patients import SMALLEST_AXIS
from medlsdm.types import MAX_LABEL, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import list_nifti, named, nifti_stem, read_nifti

Pair = tuple[Scan, SemanticMap]

log = logging.getLogger(__name__)


def read_labels(path: Path, schema: LabelSchema) -> SemanticMap:
    """Read one label map under a schema.

    Raises:
        SchemaError: It holds fractions, or labels that the schema does not name.
    """
    array, geometry = read_nifti(path)
    with named(path.name):
        return SemanticMap(_whole(array, path), geometry, schema)


def _whole(array: np.ndarray, path: Path) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) and not (
        np.isfinite(array).all() and np.array_equal(array, np.round(array))
    ):
        raise SchemaError(f"{path.name} holds fractions, so it is no label map.", "Give integer labels.")
    if array.min() < 0 or array.max() > MAX_LABEL:
        raise SchemaError(f"{path.name} holds labels outside 0-{MAX_LABEL}.", "Renumber the classes; 0 is background.")
    return array


def find_schema(paths: list[Path]) -> LabelSchema:
    """Make a schema of the label values found in the files."""
    values: set[int] = set()
    for path in paths:
        values |= {int(v) for v in np.unique(_whole(read_nifti(path)[0], path))}
    return schema_of_values(values)


def read_sources(sources: Sequence[tuple[Path, Modality]], schema: LabelSchema | None) -> list[Pair]:
    """Read several data folders, each of one modality, under one schema: made from all their labels if None.

    Scans with equal names in two folders are taken for one patient's.

    Raises:
        DataError: A folder cannot be used, as in ``read_pairs``.
        SchemaError: No map holds anything but one class.
    """
    names = [_paired(folder) for folder, _ in sources]
    schema = schema or find_schema([labels for pairs in names for _, labels in pairs])
    found = [
        _read_pair(image, labels, modality, schema)
        for pairs, (_, modality) in zip(names, sources, strict=True)
        for image, labels in pairs
    ]
    single = sum(labels.array.min() == labels.array.max() for _, labels in found)
    if single == len(found):
        raise SchemaError("Every label map holds one class only, so labels teach nothing.", "Check the label maps.")
    if single:
        log.warning("%d of %d label maps hold one class only: remove them if that is a mistake.", single, len(found))
    return found


def read_pairs(folder: Path, modality: Modality, schema: LabelSchema | None) -> list[Pair]:
    """Read ``images/`` and ``labels/`` of a folder.

    Raises:
        DataError: A folder is missing or empty, names do not pair up, or an image cannot be used.
        GeometryError: A label map lies on another grid than its image.
        SchemaError: No map holds anything but one class.
    """
    return read_sources([(folder, modality)], schema)


def _paired(folder: Path) -> list[tuple[Path, Path]]:
    """Return the files of images and label maps that belong together, by name."""
    existing_folder(folder, "The data folder")
    images, labels = (
        {nifti_stem(p): p for p in list_nifti(existing_folder(folder / name, "The folder"))}
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
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _read_pair(image: Path, labels: Path, modality: Modality, schema: LabelSchema) -> Pair:
    with named(image.name):
        array, geometry = read_nifti(image)
        scan = Scan(array, geometry, modality, nifti_stem(image))
        if min(geometry.shape) < SMALLEST_AXIS:
            raise GeometryError(
                f"A scan of shape {geometry.shape} is too thin for 3D training.",
                f"Each axis needs at least {SMALLEST_AXIS} voxels.",
            )
    semantic = read_labels(labels, schema)
    if not geometry.matches(semantic.geometry):
        raise GeometryError(
            f"{labels.name} lies on another grid than its image: {semantic.geometry.shape} against {geometry.shape}.",
            "Resample the label map onto the image.",
        )
    if scan.array.min() == scan.array.max():
        raise DataError(f"{image.name} has one value everywhere.", "Remove it, or check how it was converted.")
    return scan, semantic
