"""Variations of small data: turned, scaled and bent with the labels; MR also in contrast, shading and grain. No torch.

Texture suffers from interpolation, so nothing is varied unless a preset says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medlsdm.types import Modality

Strength = Literal["none", "light", "strong"]
Field = NDArray[np.float32]

_KNOTS = 4


@dataclass(frozen=True, slots=True)
class Ranges:
    """Say how far each variation may go, to either side of nothing.

    ``turn`` is in degrees, ``scale``, ``gamma`` and ``shading`` in shares, ``bend`` in shares of each axis,
    ``grain`` in units of an image in -1..1.
    """

    turn: float
    scale: float
    bend: float
    gamma: float
    shading: float
    grain: float


RANGES: dict[Strength, Ranges] = {
    "light": Ranges(turn=5, scale=0.05, bend=0.0, gamma=0.1, shading=0.1, grain=0.01),
    "strong": Ranges(turn=12, scale=0.12, bend=0.03, gamma=0.3, shading=0.25, grain=0.03),
}


def vary(
    image: Field,
    labels: NDArray[Any],
    spacing: tuple[float, float, float],
    modality: Modality,
    strength: Strength,
    rng: np.random.Generator,
) -> tuple[Field, NDArray[Any]]:
    """Return an image [X, Y, Z] in -1..1 and its labels, varied alike in space.

    HU and SUV mean something, so contrast and shading change in MR alone. What is turned in from outside
    the crop is mirrored; no label value is made up. The same generator state gives the same variation.
    """
    if strength == "none":
        return image, labels
    ranges = RANGES[strength]
    places = _places(image.shape, np.array(spacing), ranges, rng)
    nearest = np.rint(places).astype(np.intp)
    labels = labels[nearest[0], nearest[1], nearest[2]]
    image = np.asarray(ndimage.map_coordinates(image, places, order=1, mode="nearest"), dtype=np.float32)
    if modality is Modality.MR:
        image = _shade(image, ranges, rng)
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, ranges.grain))
    return np.clip(image, -1, 1, out=image), labels


def _places(shape: tuple[int, ...], spacing: NDArray[np.float64], ranges: Ranges, rng: np.random.Generator) -> Field:
    """Return where each voxel's value comes from, [3, X, Y, Z] in voxels inside the crop."""
    turns = np.radians(rng.uniform(-ranges.turn, ranges.turn, 3))
    matrix = np.diag(1 + rng.uniform(-ranges.scale, ranges.scale, 3))
    for axis, turn in enumerate(turns):
        a, b = (i for i in range(3) if i != axis)
        rotation = np.eye(3)
        rotation[a, a] = rotation[b, b] = np.cos(turn)
        rotation[a, b], rotation[b, a] = -np.sin(turn), np.sin(turn)
        matrix = rotation @ matrix
    matrix = (matrix * spacing / spacing[:, None]).astype(np.float32)
    offsets = [np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2) for n in shape]
    places = np.empty((3, *shape), dtype=np.float32)
    for axis, length in enumerate(shape):
        x, y, z = (matrix[axis, k] * offsets[k] for k in range(3))
        place = x[:, None, None] + y[:, None] + z
        if ranges.bend:
            place += _smooth_field(shape, rng, ranges.bend * length)
        last = np.float32(length - 1)
        np.abs(place + last / 2, out=place)
        places[axis] = np.clip(last - np.abs(last - place), 0, last)
    return places


def _smooth_field(shape: tuple[int, ...], rng: np.random.Generator, reach: float) -> Field:
    """Return a smooth field with values in -reach..reach."""
    field = rng.uniform(-reach, reach, (_KNOTS,) * 3).astype(np.float32)
    for length in shape:  # each turn takes the first axis in knots and appends it in voxels
        field = np.tensordot(field, _blend(length), axes=(0, 0))
    return field


def _blend(length: int) -> Field:
    """Return how much each knot counts at each voxel, [knots, length]."""
    at = np.linspace(0, _KNOTS - 1, length, dtype=np.float32)
    near = np.clip(1 - np.abs(at - np.arange(_KNOTS, dtype=np.float32)[:, None]), 0, 1)
    return near * near * (3 - 2 * near)


def _shade(image: Field, ranges: Ranges, rng: np.random.Generator) -> Field:
    """Change an MR image's contrast, and its brightness slowly from place to place as coils do."""
    share = np.clip((image + 1) / 2, 0, 1)
    share **= np.float32(np.exp(rng.uniform(-ranges.gamma, ranges.gamma)))
    share *= 1 + _smooth_field(image.shape, rng, ranges.shading)
    return np.asarray(share * 2 - 1, dtype=np.float32)
