"""Noise at volume resolution, a pure function of seed, grid and place, so that tiles equal the whole. No torch."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from medlsdm.windows import Slices, Triple

_STREAM, _GRAIN = 0x7E17, 0x6A1
"""Keep these draws apart from others made of the same seed."""


def grain_of(seed: int) -> float:
    """Draw how strong a sample's grain is, from a standard normal: one value for the whole volume."""
    return float(np.random.default_rng([seed, _GRAIN]).standard_normal())


class NoiseField:
    """Draw standard normal noise [1, X, Y, Z], box by box.

    Each plane along x has a generator of its own, made of seed and place, so a box needs no plane
    but its own. The last planes are kept: boxes with equal x after each other draw once.

    Args:
        seed: Of the sample.
        shape: Of the whole grid.
    """

    def __init__(self, seed: int, shape: Triple) -> None:
        self._seed, self._shape = seed, shape
        self._planes: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    def read(self, box: Slices) -> NDArray[np.float32]:
        """Return the noise [1, X, Y, Z] of a box inside the grid."""
        x, y, z = (range(*part.indices(size)) for part, size in zip(box, self._shape, strict=True))
        planes = [self._plane(place)[y.start : y.stop, z.start : z.stop] for place in x]
        while len(self._planes) > len(x):
            self._planes.popitem(last=False)
        return np.stack(planes)[None]

    def _plane(self, place: int) -> NDArray[np.float32]:
        if place not in self._planes:
            rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([self._seed, _STREAM, place])))
            self._planes[place] = rng.standard_normal(self._shape[1:], dtype=np.float32)
        self._planes.move_to_end(place)
        return self._planes[place]
