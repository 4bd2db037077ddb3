"""Windows over a grid: cut it, look a little beyond each cut, and put the parts together again. No torch.

Two ways of putting together share one geometry. Where a network's receptive field ends inside the
halo, each window answers for its own part alone and the result is exact. Where it does not, the
overlaps are blended by weights that rise and fall smoothly and sum to one everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
Slices = tuple[slice, slice, slice]


@dataclass(frozen=True, slots=True)
class Span:
    """Hold one window along one axis: it reads ``start:stop`` and answers for ``first:last`` of it."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Hold a box of the grid: what is read, and the part of it that the window answers for.

    The parts kept cover the grid, and no two of them overlap. What is read ends at the grid's border.
    """

    spans: tuple[Span, Span, Span]

    @property
    def read(self) -> Slices:
        """Return what a network gets to see, in the grid."""
        x, y, z = (slice(s.start, s.stop) for s in self.spans)
        return x, y, z

    @property
    def keep(self) -> Slices:
        """Return what the window answers for, in the grid."""
        x, y, z = (slice(s.first, s.last) for s in self.spans)
        return x, y, z

    @property
    def inside(self) -> Slices:
        """Return what the window answers for, inside what was read."""
        x, y, z = (slice(s.first - s.start, s.last - s.start) for s in self.spans)
        return x, y, z

    @property
    def shape(self) -> Triple:
        """Return the size of what is read."""
        x, y, z = (s.stop - s.start for s in self.spans)
        return x, y, z

    def weights(self) -> NDArray[np.float32]:
        """Return weights [X, Y, Z] over what is read: 1 inside, falling to the neighbours' by a squared sine.

        The weights of all windows of a grid, summed where they overlap, need dividing by ``total_weights``.
        """
        x, y, z = (_rise_and_fall(span) for span in self.spans)
        return (x[:, None, None] * y[:, None] * z).astype(np.float32)


def spans(size: int, parts: int, halo: int, align: int = 1) -> list[Span]:
    """Cut an axis into at most ``parts`` parts of nearly equal size.

    Every cut, and every end of what is read but the axis's own, is a multiple of ``align``: a network
    that shrinks its input by ``align`` then sees each window on the grid on which it would see the whole.
    """
    units = -(-size // align)
    parts = min(parts, units)
    cuts = [min(size, units * part // parts * align) for part in range(parts + 1)]
    reach = -(-halo // align) * align
    return [Span(max(0, a - reach), min(size, b + reach), a, b) for a, b in itertools.pairwise(cuts)]


def windows(shape: Triple, parts: Triple, halo: int, align: int = 1) -> list[Window]:
    """Cut a grid into boxes that read ``halo`` voxels (rounded up to ``align``) beyond what they keep."""
    axes = [spans(n, count, halo, align) for n, count in zip(shape, parts, strict=True)]
    return [Window((x, y, z)) for x, y, z in itertools.product(*axes)]


def total_weights(cut: Sequence[Window], shape: Triple) -> NDArray[np.float32]:
    """Return the sum of all windows' weights at every voxel [X, Y, Z]."""
    total = np.zeros(shape, dtype=np.float32)
    for window in cut:
        total[window.read] += window.weights()
    return total


@dataclass(frozen=True, slots=True)
class Cut:
    """Hold one way to cut a grid: parts for each axis, voxels of the largest window and of all together."""

    parts: Triple
    largest: int
    total: int


def cuts(shape: Triple, halo: int, align: int = 1) -> Iterator[Cut]:
    """Yield every sensible way to cut a grid, the whole first."""
    counts = [_useful_counts(-(-n // align)) for n in shape]
    sizes = [
        {count: [s.stop - s.start for s in spans(n, count, halo, align)] for count in some}
        for n, some in zip(shape, counts, strict=True)
    ]
    for x, y, z in itertools.product(*counts):
        axes = [of[count] for of, count in zip(sizes, (x, y, z), strict=True)]
        yield Cut((x, y, z), math.prod(max(a) for a in axes), math.prod(sum(a) for a in axes))


def _useful_counts(units: int) -> list[int]:
    """Return the numbers of parts of which each makes the largest part smaller than the one before."""
    found: list[int] = []
    for count in range(1, units + 1):
        if not found or -(-units // count) < -(-units // found[-1]):
            found.append(count)
    return found


def _rise_and_fall(span: Span) -> NDArray[np.float64]:
    """Return one axis's weights; there is no ramp where what is read ends with what is kept."""
    weights = np.ones(span.stop - span.start)
    for reach, ramp in ((span.first - span.start, weights), (span.stop - span.last, weights[::-1])):
        if reach:
            place = (np.arange(min(2 * reach, len(ramp))) + 0.5) / (2 * reach)
            ramp[: len(place)] *= np.sin(np.pi / 2 * place) ** 2
    return weights
