"""From (scan, label map) pairs to training arrays: orientation, intensity, crops and padding. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlsdm.config import Preset, Triple
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.types import Geometry, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import to_ras

CT_WINDOW = (-1024.0, 1650.0)
"""HU that become -1 and 1."""

RELATIVE_SCALE = (0.0, 1000.0)
"""What -1 and 1 become in synthetic MR and PET, whose real scales mean nothing across scanners."""

SMALLEST_AXIS = 4


def normalise(array: NDArray[Any], modality: Modality) -> NDArray[np.float32]:
    """Bring a scan to -1..1: CT by a fixed window, MR and PET by robust percentiles of the volume.

    Raises:
        DataError: The volume is constant or holds values that are not finite.
    """
    values = np.asarray(array, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("A scan holds values that are not finite.", "Check the source series.")
    if values.min() == values.max():
        raise DataError("A scan has one value everywhere.", "Remove it, or check how it was converted.")
    low, high = CT_WINDOW
    if modality is not Modality.CT:
        low, high = np.percentile(values, (0.5, 99.5))
        if high <= low:
            low, high = values.min(), values.max()
    return np.clip((values - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


def denormalise(array: NDArray[np.float32], modality: Modality) -> NDArray[np.float32]:
    """Bring -1..1 back: to HU for CT, to 0..1000 for MR and PET."""
    low, high = CT_WINDOW if modality is Modality.CT else RELATIVE_SCALE
    return ((np.clip(array, -1, 1).astype(np.float64) + 1) / 2 * (high - low) + low).astype(np.float32)


def class_indices(labels: SemanticMap) -> NDArray[Any]:
    """Return the map with label ids replaced by their place in the schema: the channel of one-hot arrays."""
    return np.searchsorted(np.array(labels.schema.ids), labels.array).astype(labels.array.dtype)


def mirror_to(array: NDArray[Any], shape: Triple) -> NDArray[Any]:
    """Pad at the end of each axis by mirroring, so that no streak and no pad value exists to be learnt."""
    widths = [(0, max(0, want - have)) for have, want in zip(array.shape, shape, strict=True)]
    return np.pad(array, widths, mode="symmetric") if any(after for _, after in widths) else array


def round_up(shape: Sequence[int], multiples: Triple) -> Triple:
    """Round each axis up to a multiple."""
    x, y, z = (-(-n // m) * m for n, m in zip(shape, multiples, strict=True))
    return x, y, z


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Patient:
    """Hold one pair, in RAS: image in -1..1, class indices, spacing in mm."""

    image: NDArray[np.float32]
    labels: NDArray[Any]
    spacing: tuple[float, float, float]
    modality: Modality
    subject: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Batch:
    """Hold equal crops: images [B, 1, X, Y, Z], labels [B, X, Y, Z], mask as images, spacing [B, 3], modality [B]."""

    images: NDArray[np.float32]
    labels: NDArray[Any]
    mask: NDArray[np.float32]
    spacing: NDArray[np.float32]
    modality: NDArray[np.int64]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TrainingSet:
    """Hold a site's patients, ready to train on. ``window`` is the crop that every batch has."""

    patients: tuple[Patient, ...]
    schema: LabelSchema
    window: Triple
    strides: Triple

    def __len__(self) -> int:
        return len(self.patients)

    def crops(self, indices: Iterable[int], rng: np.random.Generator | None, size: Triple | None = None) -> Batch:
        """Cut one crop from each patient named: random and at times flipped left to right, or central without rng.

        ``size`` asks for crops smaller than the window.
        """
        x, y, z = (min(a, b) for a, b in zip(self.window, size or self.window, strict=True))
        kinds = list(Modality)
        chosen = [self.patients[i] for i in indices]
        crops = [self._crop(patient, rng, (x, y, z)) for patient in chosen]
        return Batch(
            images=np.stack([image for image, _, _ in crops])[:, None],
            labels=np.stack([labels for _, labels, _ in crops]),
            mask=np.stack([mask for _, _, mask in crops])[:, None],
            spacing=np.array([patient.spacing for patient in chosen], dtype=np.float32),
            modality=np.array([kinds.index(patient.modality) for patient in chosen], dtype=np.int64),
        )

    def _crop(self, patient: Patient, rng: np.random.Generator | None, size: Triple) -> tuple[NDArray[Any], ...]:
        room = [max(0, have - want) for have, want in zip(patient.image.shape, size, strict=True)]
        starts = [int(rng.integers(r + 1)) if rng else r // 2 for r in room]
        cut = tuple(slice(s, s + want) for s, want in zip(starts, size, strict=True))
        image, labels = patient.image[cut], patient.labels[cut]
        if rng is not None and rng.random() < 0.5:
            image, labels = image[::-1], labels[::-1]
        mask = np.zeros(size, dtype=np.float32)
        mask[tuple(slice(n) for n in image.shape)] = 1
        return mirror_to(image, size), mirror_to(labels, size), mask


def prepare(pairs: Iterable[tuple[Scan, SemanticMap]], preset: Preset) -> TrainingSet:
    """Turn pairs into a training set.

    Raises:
        DataError: There is no pair, or a scan is constant or too thin.
        GeometryError: A label map lies on another grid than its scan.
        SchemaError: The maps do not share one schema.
    """
    patients: list[Patient] = []
    schema: LabelSchema | None = None
    for scan, labels in pairs:
        schema = schema or labels.schema
        if labels.schema.digest != schema.digest:
            raise SchemaError("The label maps do not share one schema.", "Use one schema for all of them.")
        patients.append(_patient(scan, labels))
    if schema is None:
        raise DataError("There is no pair of a scan and a label map to train on.", "Add pairs first.")
    strides = preset.autoencoder.strides
    largest = round_up(np.max([p.image.shape for p in patients], axis=0).tolist(), strides)
    x, y, z = (min(a, b) for a, b in zip(largest, preset.window, strict=True))
    return TrainingSet(tuple(patients), schema, (x, y, z), strides)


def _patient(scan: Scan, labels: SemanticMap) -> Patient:
    if not scan.geometry.matches(labels.geometry):
        raise GeometryError(
            f"A label map ({labels.geometry.shape}) lies on another grid than its scan ({scan.geometry.shape}).",
            "Resample the label map onto the scan.",
        )
    if min(scan.geometry.shape) < SMALLEST_AXIS:
        raise DataError(
            f"A scan of shape {scan.geometry.shape} is too thin for 3D training.",
            f"Each axis needs at least {SMALLEST_AXIS} voxels.",
        )
    image, geometry = to_ras(normalise(scan.array, scan.modality), scan.geometry)
    indices, _ = to_ras(class_indices(labels), labels.geometry)
    return Patient(
        np.ascontiguousarray(image), np.ascontiguousarray(indices), geometry.spacing, scan.modality, scan.subject
    )


def spacing_of(geometry: Geometry) -> NDArray[np.float32]:
    """Return a grid's spacing as [1, 3]."""
    return np.array([geometry.spacing], dtype=np.float32)
