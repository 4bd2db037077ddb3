"""The cheap trick that every claim of texture must beat: smooth volumes plus noise like the real residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from medlsdm.errors import DataError

Volume = NDArray[np.float32]

KERNEL = 15
BINS = 20


@dataclass(frozen=True, slots=True)
class MatchedNoise:
    """Hold a kernel that gives white noise the residual's spectrum, and the residual's spread by intensity.

    ``kernel`` has unit norm and 15 voxels a side; ``intensity`` are centres of bins in -1..1 and
    ``sigma`` the standard deviation there.
    """

    kernel: NDArray[np.float64]
    intensity: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def fit(cls, real: Sequence[Volume], smooth: Sequence[Volume]) -> MatchedNoise:
        """Measure what reconstructions ``smooth`` lack of ``real``.

        Raises:
            DataError: No pair is given, or a volume has fewer than 15 voxels along an axis.
        """
        if not real or len(real) != len(smooth) or min(min(v.shape) for v in real) < KERNEL:
            raise DataError("The noise needs pairs of volumes of at least 15 voxels a side.", "Give such pairs.")
        differences = [np.asarray(a, dtype=np.float64) - b for a, b in zip(real, smooth, strict=True)]
        values, residuals = (np.concatenate([v.ravel() for v in group]) for group in (smooth, differences))
        edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
        bins = np.digitize(values, edges)
        intensity = np.array([values[bins == b].mean() for b in np.unique(bins)])
        sigma = np.array([residuals[bins == b].std() for b in np.unique(bins)])
        power = np.zeros((KERNEL,) * 3)
        for volume, residual in zip(smooth, differences, strict=True):
            power += _power(residual / (np.interp(volume, intensity, sigma) + 1e-6))
        kernel = np.fft.fftshift(np.fft.ifftn(np.sqrt(power)).real)
        return cls(kernel / np.linalg.norm(kernel), intensity, sigma)

    def add(self, smooth: Volume, rng: np.random.Generator) -> Volume:
        """Return the volume with noise added, clipped to -1..1."""
        white = rng.standard_normal([n + KERNEL - 1 for n in smooth.shape])
        noise = signal.fftconvolve(white, self.kernel, mode="valid")
        sigma = np.interp(smooth, self.intensity, self.sigma)
        return np.clip(smooth + sigma * noise, -1, 1).astype(np.float32)


def _power(residual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean power spectrum of the blocks of 15 x 15 x 15 voxels in a residual."""
    starts = [range(0, n - KERNEL + 1, KERNEL) for n in residual.shape]
    blocks = [
        residual[x : x + KERNEL, y : y + KERNEL, z : z + KERNEL]
        for x in starts[0] for y in starts[1] for z in starts[2]
    ]  # fmt: skip
    return np.mean([np.abs(np.fft.fftn(block)) ** 2 for block in blocks], axis=0)
