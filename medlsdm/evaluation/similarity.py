"""How near a volume is to the very one it should equal: PSNR and SSIM, for reconstructions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Volume = NDArray[np.float32]

DATA_RANGE = 2.0
"""Volumes lie in -1..1."""

SIGMA = 1.5
RADIUS = 5
"""Of the Gaussian window: 11 voxels wide."""


def psnr(volume: Volume, truth: Volume) -> float:
    """Return the peak signal-to-noise ratio in dB, for values in -1..1."""
    error = np.mean((np.asarray(volume, dtype=np.float64) - truth) ** 2)
    return float(10 * np.log10(DATA_RANGE**2 / max(error, 1e-12)))


def ssim(volume: Volume, truth: Volume) -> float:
    """Return the mean structural similarity over 3D Gaussian windows, for values in -1..1.

    Windows that would leave the volume do not count, where it is wide enough.

    Source: Wang et al., IEEE Trans. Image Processing 13 (2004), equation 13.
    """
    x, y = np.asarray(volume, dtype=np.float64), np.asarray(truth, dtype=np.float64)

    def local(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.gaussian_filter(values, SIGMA, radius=RADIUS)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    inner = tuple(slice(RADIUS, n - RADIUS) if n > 2 * RADIUS else slice(None) for n in index.shape)
    return float(index[inner].mean())
