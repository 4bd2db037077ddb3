"""Procedural anatomy: made-up patients with label maps. The embedded default data; no torch.

Every patient differs in shape, size, pose, contrast and in texture that the labels do not tell:
vessels, folds, lesion grain, bias field. One schema, ``configs/schemas/procedural.yaml``, names the
classes of both the torso (CT, PT) and the head (MR).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medlsdm.config import Triple, load_schema
from medlsdm.types import Geometry, Modality, Scan, SemanticMap

Field = NDArray[np.float32]
BODY, LUNG, LIVER, BONE, AORTA, LESION, WHITE, GREY, FLUID, HIPPOCAMPUS, SKULL = range(1, 12)

TORSO_CT = {0: -1000, BODY: 20, LUNG: -820, LIVER: 95, BONE: 520, AORTA: 230, LESION: 45}
TORSO_PT = {0: 0.0, BODY: 0.8, LUNG: 0.4, LIVER: 2.4, BONE: 1.1, AORTA: 1.6, LESION: 9.0}
HEAD_MR = {0: 10, BODY: 380, SKULL: 60, WHITE: 820, GREY: 560, FLUID: 150, HIPPOCAMPUS: 610, LESION: 930}


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """Hold coordinates in about -1..1, bent so that no two patients have one shape, and the patient's dice."""

    x: Field
    y: Field
    z: Field
    rng: np.random.Generator

    def ellipsoid(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> NDArray[np.bool_]:
        """Return the voxels inside an ellipsoid whose radii vary by 10 %."""
        a, b, c = (r * self.rng.uniform(0.9, 1.1) for r in radii)
        x, y, z = centre
        return ((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2 + ((self.z - z) / c) ** 2 < 1


def smooth_noise(rng: np.random.Generator, shape: Triple, scale: float) -> Field:
    """Return Gaussian noise of variance 1 whose grain is about ``scale`` voxels."""
    coarse = [max(2, int(np.ceil(n / scale)) + 2) for n in shape]
    noise = rng.standard_normal(coarse).astype(np.float32)
    factors = [n / c for n, c in zip(shape, coarse, strict=True)]
    zoomed = np.asarray(ndimage.zoom(noise, factors, order=1 if scale < 4 else 3), dtype=np.float32)
    return (zoomed - zoomed.mean()) / (zoomed.std() + 1e-6)


def generate(
    seed: int,
    modality: Modality = Modality.CT,
    size: Triple = (40, 48, 40),
    spacing: tuple[float, float, float] | None = None,
) -> tuple[Scan, SemanticMap]:
    """Make one patient: a torso for CT and PT, a head for MR.

    Args:
        seed: The same seed gives the same patient.
        modality: What to draw.
        size: Voxels along R, A and S.
        spacing: In mm; by default about what fits the anatomy, varied by patient.

    Returns:
        A scan in HU, SUV or MR units, in RAS, and its label map under the schema ``procedural``.
    """
    rng = np.random.default_rng([seed, list(Modality).index(modality)])
    canvas = _canvas(rng, size)
    head = modality is Modality.MR
    labels = _head(canvas) if head else _torso(canvas)
    image = _paint(labels, {Modality.CT: TORSO_CT, Modality.PT: TORSO_PT, Modality.MR: HEAD_MR}[modality], rng)
    image = {Modality.CT: _ct_texture, Modality.PT: _pt_texture, Modality.MR: _mr_texture}[modality](image, labels, rng)
    extent = np.array([170.0, 200.0, 170.0]) if head else np.array([360.0, 280.0, 300.0])
    step = np.array(spacing) if spacing else np.round(extent * rng.uniform(0.92, 1.08) / np.array(size), 2)
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -step * (np.array(size) - 1) / 2
    geometry = Geometry(affine, size)
    scan = Scan(image, geometry, modality, f"procedural-{modality.lower()}-{seed}")
    return scan, SemanticMap(labels, geometry, load_schema("procedural"))


def _canvas(rng: np.random.Generator, size: Triple) -> Canvas:
    grid = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in size], indexing="ij")
    angle = rng.uniform(-0.12, 0.12)
    x, y = grid[0] * np.cos(angle) - grid[1] * np.sin(angle), grid[0] * np.sin(angle) + grid[1] * np.cos(angle)

    def bent(axis: Field) -> Field:
        bend = smooth_noise(rng, size, max(size) / 3) * 0.045
        shift, stretch = np.float32(rng.uniform(-0.07, 0.07)), np.float32(rng.uniform(0.9, 1.12))
        return np.asarray((axis - shift) * stretch + bend, dtype=np.float32)

    return Canvas(bent(x), bent(y), bent(grid[2]), rng)


def _torso(c: Canvas) -> NDArray[np.uint8]:
    rng, labels = c.rng, np.zeros(c.x.shape, dtype=np.uint8)
    body = (np.abs(c.x) / 0.9) ** 2.4 + (np.abs(c.y) / 0.78) ** 2.4 < 1
    labels[body] = BODY
    ring = (np.abs(c.x) / 0.76) ** 2.3 + (np.abs(c.y) / 0.64) ** 2.3
    ribs = (np.abs(ring - 1) < 0.09) & (np.cos((c.z + 0.35 * c.y) * rng.uniform(13, 17)) > 0.35) & (c.y < 0.6)
    labels[ribs & body] = BONE
    diaphragm = rng.uniform(-0.25, 0.1) - 0.35 * (c.x**2 + c.y**2)
    for side in (-1, 1):
        lung = c.ellipsoid((0.4 * side, 0.02, 0.35), (0.31, 0.48, 0.95)) & (c.z > diaphragm + 0.06 * side)
        labels[lung & body] = LUNG
    liver = c.ellipsoid((0.3, 0.08, -0.6), (0.46, 0.48, 0.62)) & (c.z < diaphragm) & body
    labels[liver & (labels != BONE)] = LIVER
    heart = c.ellipsoid((-0.12, 0.2, 0.1), (0.27, 0.25, 0.3))
    labels[heart & body & (labels != LIVER)] = BODY
    spine = c.ellipsoid((0.0, -0.5, 0.0), (0.14, 0.14, 5.0))
    labels[spine] = BONE
    sway = 0.05 * np.sin(c.z * 2 + rng.uniform(0, 6))
    aorta = (c.x + 0.13 + sway) ** 2 + (c.y + 0.28) ** 2 < (0.085 * rng.uniform(0.85, 1.3)) ** 2
    labels[aorta & body & (labels != BONE)] = AORTA
    return _lesion(c, labels, LIVER if rng.random() < 0.6 else LUNG)


def _head(c: Canvas) -> NDArray[np.uint8]:
    rng, labels = c.rng, np.zeros(c.x.shape, dtype=np.uint8)
    radius = np.sqrt((c.x / 0.78) ** 2 + (c.y / 0.9) ** 2 + ((c.z + 0.08) / 0.92) ** 2)
    folds = 0.035 * np.sin(11 * c.x + 4 * np.sin(5 * c.z)) * np.sin(10 * c.y + 3 * np.sin(6 * c.x))
    skull = rng.uniform(0.86, 0.9)
    labels[radius < 1] = BODY
    labels[radius < skull + 0.05] = SKULL
    labels[radius < skull - 0.07] = FLUID
    labels[radius + folds < skull - 0.12] = GREY
    labels[radius + 1.6 * folds < skull - 0.12 - rng.uniform(0.14, 0.2)] = WHITE
    width = rng.uniform(0.75, 1.6)
    for side in (-1, 1):
        labels[c.ellipsoid((0.3 * side, 0.05, -0.02), (0.13, 0.17, 0.14))] = GREY
        labels[c.ellipsoid((0.13 * side * width, 0.08, 0.1), (0.075 * width, 0.34, 0.16))] = FLUID
        labels[c.ellipsoid((0.36 * side, -0.08, -0.33), (0.085, 0.24, 0.09))] = HIPPOCAMPUS
    return _lesion(c, labels, WHITE)


def _lesion(c: Canvas, labels: NDArray[np.uint8], organ: int) -> NDArray[np.uint8]:
    """Put one small lesion into an organ, or none in a fifth of the patients."""
    places = np.argwhere(ndimage.binary_erosion(labels == organ, iterations=2))
    if len(places) == 0 or c.rng.random() < 0.2:
        return labels
    x, y, z = places[c.rng.integers(len(places))]
    radius = c.rng.uniform(0.06, 0.15)
    spot = c.ellipsoid((float(c.x[x, y, z]), float(c.y[x, y, z]), float(c.z[x, y, z])), (radius, radius, radius))
    labels[spot & (labels == organ)] = LESION
    return labels


def _paint(labels: NDArray[np.uint8], values: dict[int, Any], rng: np.random.Generator) -> Field:
    """Give each class its value, varied by patient, and blur the borders as partial volume does."""
    table = np.zeros(max(values) + 1, dtype=np.float32)
    spread = max(abs(v) for k, v in values.items() if k)
    for label, value in values.items():
        table[label] = value + (rng.normal(0, 0.035) * spread if label else 0)
    return np.asarray(ndimage.gaussian_filter(table[labels], rng.uniform(0.45, 0.7)), dtype=np.float32)


def _vessels(rng: np.random.Generator, shape: Triple, width: float) -> Field:
    """Return 0..1 where two smooth fields cross zero: branching threads that no label tells."""
    first, second = smooth_noise(rng, shape, 9), smooth_noise(rng, shape, 9)
    return np.exp(-(first**2 + second**2) / width).astype(np.float32)


def _ct_texture(image: Field, labels: NDArray[np.uint8], rng: np.random.Generator) -> Field:
    shape = labels.shape
    lung, liver, body = labels == LUNG, labels == LIVER, labels == BODY
    threads = _vessels(rng, shape, 0.05)
    image += lung * (threads * 650 + 45 * smooth_noise(rng, shape, 5))
    image += liver * (threads * rng.uniform(60, 110) + 12 * smooth_noise(rng, shape, 4))
    image -= body * ndimage.gaussian_filter(np.clip(smooth_noise(rng, shape, 6) + 0.2, 0, 1), 0.6) * 130
    image += (labels == BONE) * smooth_noise(rng, shape, 2.5) * 130
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), 0.5) * rng.uniform(22, 40)
    return np.clip(image + noise, -1024, 1650).astype(np.float32)


def _pt_texture(image: Field, labels: NDArray[np.uint8], rng: np.random.Generator) -> Field:
    shape = labels.shape
    image += (labels == BODY) * 0.5 * np.clip(smooth_noise(rng, shape, 6), 0, None)
    image = np.asarray(ndimage.gaussian_filter(image, 0.9), dtype=np.float32)
    return np.clip(image * (1 + 0.12 * rng.standard_normal(shape)), 0, None).astype(np.float32)


def _mr_texture(image: Field, labels: NDArray[np.uint8], rng: np.random.Generator) -> Field:
    shape = labels.shape
    grey, white, scalp = labels == GREY, labels == WHITE, labels == BODY
    image -= grey * _vessels(rng, shape, 0.09) * rng.uniform(200, 330)
    image += grey * 45 * smooth_noise(rng, shape, 4) + white * 38 * smooth_noise(rng, shape, 5)
    image += scalp * 150 * smooth_noise(rng, shape, 3)
    image *= 1 + 0.12 * smooth_noise(rng, shape, max(shape) / 2)
    noise = rng.standard_normal((2, *shape)).astype(np.float32) * rng.uniform(14, 30)
    magnitude = np.sqrt((np.maximum(image, 0) + noise[0]) ** 2 + noise[1] ** 2)
    return (magnitude * np.exp(rng.uniform(-2, 5))).astype(np.float32)
