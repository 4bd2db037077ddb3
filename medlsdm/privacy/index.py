"""Small band-passed forms of volumes, and the correlation between them: what the copy detector compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medlsdm.errors import DataError
from medlsdm.types import Geometry
from medlsdm.volumes import to_ras

SEARCH = 3
"""How far a template is moved along each axis, in working voxels (of half resolution or coarser)."""

MAX_SIDE = 32
"""Volumes are averaged down until no axis has more working voxels than this."""

MIN_SIDE = 2 * SEARCH + 4

_FINE_SIGMA, _COARSE_SIGMA = 0.6, 2.5
_FLIPS = [tuple(axis for axis in range(3) if bits >> axis & 1) for bits in range(8)]


@dataclass(frozen=True, slots=True, eq=False)
class Compact:
    """Hold a volume in RAS order, scale-free and averaged down, with its voxel size in mm."""

    array: NDArray[np.float32]
    spacing: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class WorkingGrid:
    """Name the voxel size (mm) and shape on which every volume of one modality is compared."""

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]


def robust_scale(array: NDArray[np.floating]) -> NDArray[np.float32]:
    """Map the 1st and 99th percentile to 0 and 1 and clip a little beyond: the source's units vanish.

    Raises:
        DataError: The volume is not finite or is constant.
    """
    values = np.asarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataError("A volume holds values that are not finite.", "Make it again.")
    low, high = np.percentile(values, [1, 99])
    if not high > low:
        low, high = float(values.min()), float(values.max())
    if not high > low:
        raise DataError("A volume is constant.", "Make it again.")
    return np.clip((values - low) / (high - low), -0.5, 1.5).astype(np.float32)


def without_labels(scaled: NDArray[np.float32], labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """Take from a volume what its label map explains: an image of the label means, sharp and blurred.

    Two volumes made from one label map share its shapes without either copying the other; what is
    left after this least-squares fit is texture and unlabelled anatomy.
    """
    _, inverse = np.unique(labels, return_inverse=True)
    inverse = inverse.reshape(-1)
    sums = np.bincount(inverse, scaled.reshape(-1).astype(np.float64))
    means = (sums / np.bincount(inverse))[inverse].reshape(labels.shape).astype(np.float32)
    if np.ptp(means) < 1e-6:
        return scaled
    layers = [np.ones_like(means), means, *(ndimage.gaussian_filter(means, s) for s in (1.0, 2.0))]
    design = np.stack([layer.reshape(-1) for layer in layers], axis=1)
    gram = design.T.astype(np.float64) @ design
    weights = np.linalg.lstsq(gram, design.T.astype(np.float64) @ scaled.reshape(-1), rcond=None)[0]
    return (scaled.reshape(-1) - design @ weights.astype(np.float32)).reshape(scaled.shape)


def compact(
    array: NDArray[np.floating], geometry: Geometry, labels: NDArray[np.integer] | None = None, *, side: int = MAX_SIDE
) -> Compact:
    """Normalise, take out what the labels explain, turn to RAS and average down by whole factors of 2 or more.

    Raises:
        DataError: Not finite, constant, or fewer than ``2 * MIN_SIDE`` voxels along an axis.
    """
    scaled = robust_scale(array)
    if labels is not None:
        scaled = without_labels(scaled, labels)
    turned, grid = to_ras(scaled, geometry)
    if min(turned.shape) < 2 * MIN_SIDE:
        raise DataError(
            f"A volume of shape {geometry.shape} is too small for the copy check.",
            f"It needs {2 * MIN_SIDE} voxels along each axis.",
        )
    factors = [max(2, -(-n // side)) for n in turned.shape]
    kept = tuple(slice((n % f) // 2, (n % f) // 2 + n // f * f) for n, f in zip(turned.shape, factors, strict=True))
    blocks = [part for n, f in zip(turned.shape, factors, strict=True) for part in (n // f, f)]
    small = turned[kept].reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32)
    x, y, z = (s * f for s, f in zip(grid.spacing, factors, strict=True))
    return Compact(small, (x, y, z))


def working_grid(volumes: list[Compact]) -> WorkingGrid:
    """Choose the median voxel size and extent of the site's own volumes."""
    spacing = np.median([v.spacing for v in volumes], axis=0)
    extent = np.median([np.multiply(v.spacing, v.array.shape) for v in volumes], axis=0)
    x, y, z = np.clip(np.round(extent / spacing), MIN_SIDE, MAX_SIDE).astype(int).tolist()
    return WorkingGrid((float(spacing[0]), float(spacing[1]), float(spacing[2])), (x, y, z))


def band_passed(volume: Compact, grid: WorkingGrid) -> NDArray[np.float32]:
    """Bring a volume to the working grid, centre on centre, as a difference of Gaussians."""
    zoom = np.divide(volume.spacing, grid.spacing)
    array = volume.array
    if np.abs(zoom - 1).max() > 0.1:
        if min(zoom) < 1:
            array = ndimage.gaussian_filter(array, [0.5 * max(0.0, 1 / z - 1) for z in zoom])
        array = ndimage.zoom(array, zoom, order=1, mode="nearest", grid_mode=True)
    band = ndimage.gaussian_filter(array, _FINE_SIGMA) - ndimage.gaussian_filter(array, _COARSE_SIGMA)
    out = np.zeros(grid.shape, dtype=np.float32)
    source, target = [], []
    for have, want in zip(band.shape, grid.shape, strict=True):
        kept = min(have, want)
        source.append(slice((have - kept) // 2, (have - kept) // 2 + kept))
        target.append(slice((want - kept) // 2, (want - kept) // 2 + kept))
    out[tuple(target)] = band[tuple(source)]
    return out


def _unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = rows - rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norm, 1e-6)


def templates(band: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the volume's centre in its 8 mirrorings, each with zero mean and unit norm: [8, voxels]."""
    inner = band[SEARCH:-SEARCH, SEARCH:-SEARCH, SEARCH:-SEARCH]
    return _unit_rows(np.stack([np.flip(inner, flip).reshape(-1) for flip in _FLIPS]))


def similarities(reference: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each query's best absolute correlation with one reference, over shifts and flips.

    Args:
        reference: One band-passed volume on the working grid.
        queries: Stacked ``templates``, [Q, 8, voxels].
    """
    inner = tuple(n - 2 * SEARCH for n in reference.shape)
    windows = np.lib.stride_tricks.sliding_window_view(reference, inner).reshape(-1, int(np.prod(inner)))
    scores = _unit_rows(windows) @ queries.reshape(-1, queries.shape[-1]).T
    return np.abs(scores).max(axis=0).reshape(len(queries), -1).max(axis=1)
