"""What volumes are measured by: sharpness, spectrum, distances of distributions, likeness to another volume."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medlsdm.errors import DataError
from medlsdm.training.patients import mirror_to

Volume = NDArray[np.float32]
BANDS = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0])
"""Borders of the radial bands, in cycles per voxel; the last one holds the cube's corners."""

COMPARE_GRID = (16, 16, 16)


def gradient_energy(volume: Volume) -> float:
    """Return the mean squared step between neighbours, averaged over the axes."""
    return float(np.mean([np.mean(np.diff(volume, axis=axis) ** 2) for axis in range(3)]))


def band_power(volume: Volume) -> NDArray[np.float64]:
    """Return the mean spectral power in each radial band, a Hann window against the borders applied."""
    window = np.ones(volume.shape)
    for axis, n in enumerate(volume.shape):
        shape = [1, 1, 1]
        shape[axis] = n
        window = window * np.hanning(n + 2)[1:-1].reshape(shape)
    centred = (volume - volume.mean()) * window
    power = np.abs(np.fft.fftn(centred)) ** 2 / np.sum(window**2)
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*[np.fft.fftfreq(n) for n in volume.shape], indexing="ij")))
    band = np.digitize(radius, BANDS[1:-1])
    counts = np.maximum(np.bincount(band.ravel(), minlength=6), 1)
    return np.bincount(band.ravel(), weights=power.ravel(), minlength=6) / counts


def random_features(volumes: Sequence[Volume]) -> NDArray[np.float64]:
    """Return features [N, 64] of a fixed random 3D network: means and spreads of its responses."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(20_250)
    widths = (1, 16, 32, 32)
    weights = [torch.randn(b, a, 3, 3, 3, generator=generator) / (27 * a) ** 0.5 for a, b in itertools.pairwise(widths)]
    rows = []
    with torch.inference_mode():
        for volume in volumes:
            h = torch.from_numpy(mirror_to(volume, (8, 8, 8)))[None, None]
            for weight in weights:
                h = functional.leaky_relu(functional.conv3d(h, weight, padding=1), 0.2)
                h = functional.avg_pool3d(h, 2) if min(h.shape[2:]) > 1 else h
            flat = h[0].flatten(1)
            rows.append(torch.cat([flat.mean(1), flat.std(1, unbiased=False)]).double().numpy())
    return np.stack(rows)


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the Frechet distance of two Gaussians fitted to feature rows.

    Source: Heusel et al. (arXiv 1706.08500), equation 6. The trace of the root is taken as the sum of
    singular values of the product of both data matrices, which needs no root of a singular matrix.
    """
    means = first.mean(0), second.mean(0)
    one, two = (
        (rows - mean) / np.sqrt(max(1, len(rows) - 1)) for rows, mean in zip((first, second), means, strict=True)
    )
    cross = float(np.linalg.svd(one @ two.T, compute_uv=False).sum())
    return float(max(0.0, np.sum((means[0] - means[1]) ** 2) + np.sum(one**2) + np.sum(two**2) - 2 * cross))


def mean_frechet(first: NDArray[np.float64], second: NDArray[np.float64], count: int, draws: int = 8) -> float:
    """Return the mean Frechet distance over draws of ``count`` rows of each: comparable at equal ``count`` only.

    Raises:
        DataError: A set has fewer rows.
    """
    if min(len(first), len(second)) < count:
        raise DataError(f"{len(first)} and {len(second)} volumes give no draws of {count}.", "Give more volumes.")
    rng = np.random.default_rng(0)
    drawn = [(rng.permutation(len(first))[:count], rng.permutation(len(second))[:count]) for _ in range(draws)]
    return float(np.mean([frechet_distance(first[a], second[b]) for a, b in drawn]))


def fingerprints(volumes: Sequence[Volume]) -> NDArray[np.float64]:
    """Return each volume as a unit vector: shrunk to 16^3, mean removed. Their products are correlations."""
    rows = []
    for volume in volumes:
        sigma = [max(0.0, (n / g - 1) / 2) for n, g in zip(volume.shape, COMPARE_GRID, strict=True)]
        smooth = ndimage.gaussian_filter(volume, sigma)
        zoom = [g / n for n, g in zip(volume.shape, COMPARE_GRID, strict=True)]
        row = np.asarray(ndimage.zoom(smooth, zoom, order=1), dtype=np.float64).ravel()
        row -= row.mean()
        rows.append(row / (np.linalg.norm(row) + 1e-12))
    return np.stack(rows)
