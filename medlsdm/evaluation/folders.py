"""Compare folders of real and synthetic volumes, with their label maps where there are any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlsdm.checks import existing_folder
from medlsdm.errors import DataError, GeometryError
from medlsdm.evaluation.comparison import SMALLEST_SET, Comparison, Yardstick
from medlsdm.evaluation.segmenter import mean_dice, train_segmenter
from medlsdm.training.folders import find_schema, read_labels
from medlsdm.training.patients import class_indices, normalise
from medlsdm.types import Geometry, LabelSchema, Modality
from medlsdm.volumes import list_nifti, named, nifti_stem, read_nifti, to_ras

HELD_OUT = 0.2
SEGMENTER_STEPS = 1500
Volumes = dict[str, tuple[NDArray[Any], Geometry]]


def read_volumes(folder: Path, what: str, modality: Modality) -> Volumes:
    """Read every NIfTI file of a folder, by name without suffix: in -1..1 and RAS, with the file's own grid.

    Raises:
        DataError: There is none, or one cannot be read, is constant or holds values that are not finite.
    """
    paths = list_nifti(existing_folder(folder, f"The folder of {what}"))
    if not paths:
        raise DataError(f"The folder of {what} holds no NIfTI file.", "Put .nii.gz files there.")
    found: Volumes = {}
    for path in paths:
        array, geometry = read_nifti(path)
        with named(f"{path.name} of the {what}"):
            found[nifti_stem(path)] = normalise(to_ras(array, geometry)[0], modality), geometry
    return found


def compare_folders(
    real: Path,
    synthetic: Path,
    modality: Modality,
    *,
    labels: Path | None = None,
    real_labels: Path | None = None,
    steps: int = SEGMENTER_STEPS,
    seed: int = 0,
) -> Comparison:
    """Compare two folders; with both kinds of label maps also by a segmenter trained on the real pairs.

    A fifth of the real pairs is kept from the segmenter, for its Dice on real volumes. Maps have the names
    of their volumes.

    Args:
        real: Folder of real volumes.
        synthetic: Folder of synthetic ones.
        modality: Of all of them.
        labels: Folder of the maps that the synthetic volumes were made from.
        real_labels: Folder of the real volumes' maps.
        steps: How long to train the segmenter.
        seed: Of the segmenter and of what it does not see.

    Raises:
        DataError: A set has fewer than five volumes, a map is missing, or only one folder of maps is given.
        GeometryError: A map lies on another grid than its volume.
        SchemaError: A map holds fractions.
    """
    groups = [
        read_volumes(folder, what, modality)
        for folder, what in ((real, "real volumes"), (synthetic, "synthetic volumes"))
    ]
    units = [[array for array, _ in group.values()] for group in groups]
    if labels is None and real_labels is None:
        return Yardstick(units[0]).measure(units[1])
    if labels is None or real_labels is None:
        raise DataError("Label maps are given for one set only.", "Give those of the real volumes and of the others.")
    if min(len(group) for group in groups) < SMALLEST_SET:
        return Yardstick(units[0]).measure(units[1])  # which says that these are too few
    folders = (real_labels, labels)
    schema = find_schema([path for folder in folders for path in list_nifti(existing_folder(folder, "The folder"))])
    maps = [_read_maps(folder, group, schema) for folder, group in zip(folders, groups, strict=True)]
    order = np.random.default_rng(seed).permutation(len(units[0]))
    held = max(1, round(HELD_OUT * len(order)))
    seen, kept = order[held:], order[:held]
    segmenter = train_segmenter(
        [units[0][i] for i in seen], [maps[0][i] for i in seen], len(schema.classes), steps=steps, seed=seed
    )
    found = Yardstick(units[0], segmenter=segmenter).measure(units[1], maps[1])
    unseen = mean_dice(segmenter, [units[0][i] for i in kept], [maps[0][i] for i in kept])
    return replace(found, dice_real=unseen, dice_real_count=held)


def _read_maps(folder: Path, volumes: Volumes, schema: LabelSchema) -> list[NDArray[Any]]:
    """Return the class indices of each volume, in RAS."""
    paths = {nifti_stem(path): path for path in list_nifti(folder)}
    missing = len(volumes.keys() - paths.keys())
    if missing:
        raise DataError(
            f"{missing} of {len(volumes)} volumes have no label map in {folder.name!r}.",
            "Give each volume and its label map one name.",
        )
    found = []
    for name, (_, geometry) in volumes.items():
        semantic = read_labels(paths[name], schema)
        if not geometry.matches(semantic.geometry):
            raise GeometryError(
                f"{paths[name].name} lies on another grid than its volume.", "Resample the label map onto the volume."
            )
        found.append(to_ras(class_indices(semantic), semantic.geometry)[0])
    return found
