"""Fill polygons on a pixel grid by scan lines: even-odd inside, and every centre that lies on an edge.

A pixel belongs to the shape when its centre is inside an odd number of polygons, or on an edge of
one. Contours drawn around a mask run through the centres of its outermost pixels, in the outer
ring and around a hole alike, so edges count; contours drawn between pixels meet no centre.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EDGE_TOLERANCE = 0.02

Polygon = NDArray[np.float64]


def inside(polygons: list[Polygon], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centre is inside an odd number of polygons [N, 2] (row, column), cut at the grid.

    Along a scan line a pixel counts from a crossing (included) to the next (left out).
    """
    toggles = np.zeros((shape[0], shape[1] + 1), np.int32)
    for start, end in map(_edges, polygons):
        low, high = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
        first = np.clip(np.ceil(low), 0, shape[0]).astype(np.int64)
        last = np.clip(np.ceil(high), 0, shape[0]).astype(np.int64)
        edge, row = _ranges(first, last - first)
        along = (row - start[edge, 0]) / (end[edge, 0] - start[edge, 0])
        column = start[edge, 1] + along * (end[edge, 1] - start[edge, 1])
        np.add.at(toggles, (row, np.clip(np.ceil(column), 0, shape[1]).astype(np.int64)), 1)
    return (np.cumsum(toggles, axis=1)[:, :-1] & 1).astype(bool)


def on_edges(polygons: list[Polygon], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centre lies on an edge, to within ``EDGE_TOLERANCE`` of a pixel."""
    touched = np.zeros(shape, bool)
    for start, end in map(_edges, polygons):
        steep = np.abs(end[:, 0] - start[:, 0]) >= np.abs(end[:, 1] - start[:, 1])
        for axis, chosen in ((0, steep), (1, ~steep)):
            a, b = start[chosen], end[chosen]
            low, high = np.minimum(a[:, axis], b[:, axis]), np.maximum(a[:, axis], b[:, axis])
            first = np.clip(np.ceil(low - EDGE_TOLERANCE), 0, shape[axis]).astype(np.int64)
            last = np.clip(np.floor(high + EDGE_TOLERANCE) + 1, 0, shape[axis]).astype(np.int64)
            edge, line = _ranges(first, np.maximum(last - first, 0))
            at = np.clip(line, low[edge], high[edge])
            length = (b - a)[edge, axis]
            share = np.divide(at - a[edge, axis], length, out=np.zeros(len(at)), where=length != 0)
            across = a[edge, 1 - axis] + share * (b - a)[edge, 1 - axis]
            nearest = np.rint(across).astype(np.int64)
            on = (np.hypot(across - nearest, at - line) <= EDGE_TOLERANCE) & (nearest >= 0)
            on &= nearest < shape[1 - axis]
            touched[(line[on], nearest[on]) if axis == 0 else (nearest[on], line[on])] = True
    return touched


def fill(polygons: list[Polygon], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels of a shape: inside an odd number of its polygons, or on an edge."""
    return inside(polygons, shape) | on_edges(polygons, shape)


def _edges(polygon: Polygon) -> tuple[Polygon, Polygon]:
    return polygon, np.roll(polygon, -1, axis=0)


def _ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each edge, its number once for every line it meets, and those lines."""
    edge = np.repeat(np.arange(len(first)), count)
    before = np.repeat(np.cumsum(count) - count, count)
    return edge, np.repeat(first, count) + np.arange(len(edge)) - before
