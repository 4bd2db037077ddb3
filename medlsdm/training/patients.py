"""From (scan, label map) pairs to training arrays: orientation, intensity, crops and padding. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medlsdm.config import Preset, Spacing, Triple
from medlsdm.errors import ConfigError, DataError, GeometryError, SchemaError
from medlsdm.training.augment import Strength, vary
from medlsdm.training.intensity import CT_WINDOW, RELATIVE_SCALE, Intensity, denormalise, normalise
from medlsdm.types import Geometry, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import to_ras

__all__ = [
    "CT_WINDOW",
    "RELATIVE_SCALE",
    "Batch",
    "Patient",
    "TrainingSet",
    "class_indices",
    "denormalise",
    "mirror_to",
    "normalise",
    "prepare",
    "round_up",
    "split_patients",
    "typical_spacing",
]

SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)
"""In the name of a class that lies on one side."""

SMALLEST_AXIS = 4


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
    """Hold one pair, in RAS: image in -1..1, class indices, spacing in mm, and how the image came to -1..1."""

    image: NDArray[np.float32]
    labels: NDArray[Any]
    spacing: tuple[float, float, float]
    modality: Modality
    subject: str
    intensity: Intensity

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the pair: of who it is, its voxels and how large they are."""
        about = hashlib.sha256(repr((self.subject, self.modality.value, self.spacing, self.image.shape)).encode())
        about.update(np.ascontiguousarray(self.image).data)
        about.update(np.ascontiguousarray(self.labels).data)
        return about.hexdigest()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Batch:
    """Hold equal crops: images [B, 1, X, Y, Z], labels [B, X, Y, Z], mask as images, spacing [B, 3], modality [B].

    ``position`` [B, 6] tells where each crop begins in its volume and how much of it it is, as fractions.
    """

    images: NDArray[np.float32]
    labels: NDArray[Any]
    mask: NDArray[np.float32]
    spacing: NDArray[np.float32]
    modality: NDArray[np.int64]
    position: NDArray[np.float32]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TrainingSet:
    """Hold a site's patients, ready to train on.

    ``window`` is the crop that every batch has; ``augment`` says how much random crops are varied, ``mirrored``
    whether half of them are flipped left to right.
    """

    patients: tuple[Patient, ...]
    schema: LabelSchema
    window: Triple
    strides: Triple
    augment: Strength = "none"
    mirrored: bool = True

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
            images=np.stack([image for image, *_ in crops])[:, None],
            labels=np.stack([labels for _, labels, *_ in crops]),
            mask=np.stack([mask for _, _, mask, _ in crops])[:, None],
            spacing=np.array([patient.spacing for patient in chosen], dtype=np.float32),
            modality=np.array([kinds.index(patient.modality) for patient in chosen], dtype=np.int64),
            position=np.array([position for _, _, _, position in crops], dtype=np.float32),
        )

    def _crop(self, patient: Patient, rng: np.random.Generator | None, size: Triple) -> tuple[Any, ...]:
        room = [max(0, have - want) for have, want in zip(patient.image.shape, size, strict=True)]
        starts = [int(rng.integers(r + 1)) if rng else r // 2 for r in room]
        cut = tuple(slice(s, s + want) for s, want in zip(starts, size, strict=True))
        image, labels = patient.image[cut], patient.labels[cut]
        extents = [part / whole for part, whole in zip(image.shape, patient.image.shape, strict=True)]
        begins = [start / whole for start, whole in zip(starts, patient.image.shape, strict=True)]
        if rng is not None and rng.random() < 0.5 and self.mirrored:
            image, labels = image[::-1], labels[::-1]
            begins[0] = 1 - begins[0] - extents[0]
        if rng is not None and self.augment != "none":
            image, labels = vary(image, labels, patient.spacing, patient.modality, self.augment, rng)
        mask = np.zeros(size, dtype=np.float32)
        mask[tuple(slice(n) for n in image.shape)] = 1
        return mirror_to(image, size), mirror_to(labels, size), mask, begins + extents


def prepare(pairs: Iterable[tuple[Scan, SemanticMap]], preset: Preset) -> TrainingSet:
    """Turn pairs into a training set. Crops are not flipped where a class is named after its side.

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
    sided = any(SIDE.search(cls.name) for cls in schema.classes)
    return TrainingSet(tuple(patients), schema, (x, y, z), strides, mirrored=not sided)


def typical_spacing(geometries: Iterable[Geometry]) -> Spacing:
    """Return the median voxel size along R, A and S, in mm."""
    spacings = []
    for geometry in geometries:
        axes = nib.orientations.io_orientation(geometry.affine)[:, 0].astype(int)
        spacings.append(np.array(geometry.spacing)[np.argsort(axes)])
    x, y, z = np.median(spacings, axis=0).tolist()
    return x, y, z


def split_patients(data: TrainingSet, hold_out: float) -> tuple[TrainingSet, TrainingSet | None]:
    """Return the patients to train on and those held out: whole patients, always the same ones.

    Scans of one subject stay together: equal names, and names that begin with the same ``sub-...``.

    Raises:
        DataError: Fewer than two subjects would be left to train on.
    """
    if not 0 <= hold_out < 1:
        raise ConfigError(f"Holding out a share of {hold_out:g} makes no sense.", "Give a number from 0 to below 1.")
    if hold_out == 0:
        return data, None
    groups = sorted({_group(p.subject) for p in data.patients}, key=lambda g: hashlib.sha256(g.encode()).hexdigest())
    count = max(1, round(hold_out * len(groups)))
    if len(groups) - count < 2:
        raise DataError(
            f"Of {len(groups)} patients, {len(groups) - count} would be left to train on.", "Lower --hold-out."
        )
    held = set(groups[:count])
    parts = ([p for p in data.patients if (_group(p.subject) in held) == wanted] for wanted in (False, True))
    training, held_out = (replace(data, patients=tuple(part)) for part in parts)
    return training, held_out


def _group(subject: str) -> str:
    found = re.match(r"sub-[A-Za-z0-9]+", subject)
    return found.group() if found else subject


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
    intensity = Intensity.of(scan.array, scan.modality)
    image, geometry = to_ras(intensity.apply(scan.array), scan.geometry)
    indices, _ = to_ras(class_indices(labels), labels.geometry)
    arrays = np.ascontiguousarray(image), np.ascontiguousarray(indices)
    return Patient(*arrays, geometry.spacing, scan.modality, scan.subject, intensity)
