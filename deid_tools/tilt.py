"""Undo gantry tilt: shift a slice in its own plane onto the upright grid, by linear interpolation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shift_slice(
    values: NDArray[np.float32],
    shift: NDArray[np.float64],
    shape: tuple[int, int],
    fill: float,
    padding: float | None = None,
) -> NDArray[np.float32]:
    """Move a slice by ``shift`` (rows, columns; not whole, 0 or more) into a larger one; the rest is ``fill``.

    A place outside the slice's own pixel centres is ``fill``: nothing is extrapolated. ``padding`` marks
    pixels without a measured value (PixelPaddingValue): it is never mixed with others, the nearer one counts.
    """
    for axis in (0, 1):
        values = _shift_axis(values, float(shift[axis]), shape[axis], axis, fill, padding)
    return values


def _shift_axis(
    values: NDArray[np.float32], shift: float, length: int, axis: int, fill: float, padding: float | None
) -> NDArray[np.float32]:
    if shift == 0 and values.shape[axis] == length:
        return values
    source = np.moveaxis(values, axis, 0)
    places = np.arange(length) - shift
    inside = (places >= -1e-6) & (places <= len(source) - 1 + 1e-6)
    low = np.clip(np.floor(places[inside] + 1e-6).astype(int), 0, len(source) - 1)
    weight = np.clip(places[inside] - low, 0, 1).astype(np.float32)[:, None]
    first, second = source[low], source[np.minimum(low + 1, len(source) - 1)]
    mixed = first * (1 - weight) + second * weight
    if padding is not None:
        mixed = np.where((first == padding) | (second == padding), np.where(weight < 0.5, first, second), mixed)
    moved = np.full((length, source.shape[1]), fill, np.float32)
    moved[inside] = mixed
    return np.moveaxis(moved, 0, axis)
