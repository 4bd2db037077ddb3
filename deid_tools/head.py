"""Is there a head in a volume, and where can its brain be: by shape and grey values, with no atlas.

The skin of a head ends in a dome. An ellipsoid is laid into that dome from the skin alone, whatever
the contrast; it encloses the brain. Where grey values tell the brain from the skull, a tighter
estimate is found inside it. Both are guards: what they enclose is never cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deid_tools.filters import filters

FACE_EXTENT_MM = 70.0
_LEVEL_MM = (55.0, 90.0)
_MIN_AREA_MM2 = 400.0
_LENGTH_MM, _WIDTH_MM, _RATIO = (125.0, 240.0), (95.0, 195.0), (0.6, 1.0)
_SMALL = 0.72
_HEIGHT_SHARE = 0.4
_DOME = 0.86
_OPENINGS_MM = (4.5, 6.0, 7.5)
_CLOSING_MM = 9.0
_CORE_SHARE = 0.6
_BRIGHT_SHARES = (0.6, 0.75, 0.45)
_SHARE, _TYPICAL_SHARE = (0.38, 0.8), 0.57
_HU_TISSUE, _HU_BODY, _HU_BONE, _BONE_SHARE = (-5.0, 150.0), -350.0, 200.0, 0.08

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Coarse:
    """Hold a volume at about 3 mm, for looking at shapes: values [i, j, k] and its affine (RAS, mm)."""

    values: NDArray[np.float32]
    affine: NDArray[np.float64]
    hu: bool

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Return the size of a voxel along each axis in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def along(self, direction: int) -> NDArray[np.float64]:
        """Return each voxel's place in mm along R (0), A (1) or S (2)."""
        row = self.affine[direction]
        i, j, k = (np.arange(n) for n in self.values.shape)
        return row[0] * i[:, None, None] + row[1] * j[None, :, None] + row[2] * k[None, None, :] + row[3]


@dataclass(frozen=True, slots=True)
class Dome:
    """Hold the ellipsoid that lies in the dome of a head: its middle and half axes in mm along R, A, S."""

    middle: tuple[float, float, float]
    half: tuple[float, float, float]

    def holds(self, volume: Coarse) -> Mask:
        """Return the voxels inside."""
        x, y, z = ((volume.along(a) - self.middle[a]) / self.half[a] for a in range(3))
        return x**2 + y**2 + z**2 <= 1.0

    def scaled(self, share: float) -> Dome:
        """Return the ellipsoid about the same middle with half axes so much shorter."""
        x, y, z = self.half
        return Dome(self.middle, (share * x, share * y, share * z))

    def reach(self, angle: float) -> float:
        """Return how far it reaches, in mm, in the direction ``angle`` degrees below straight forward."""
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        middle = c * self.middle[1] - s * self.middle[2]
        return float(middle + np.hypot(c * self.half[1], s * self.half[2]))


def body(volume: Coarse) -> Mask:
    """Return what is not air: the largest connected part, with its hollows filled slice by slice."""
    ndimage = filters()

    tissue = volume.values > (_HU_BODY if volume.hu else _air_limit(volume.values))
    largest = _largest(ndimage.binary_opening(tissue))
    for axis in range(3):
        for plane in np.moveaxis(largest, axis, 0):
            plane |= ndimage.binary_fill_holes(plane)
    return largest


def too_small(*extents_mm: float) -> bool:
    """Tell whether a volume is so short along an axis that it shows no face."""
    return min(extents_mm) < FACE_EXTENT_MM


def face_in_view(volume: Coarse, skin: Mask) -> bool:
    """Tell whether the body reaches far enough along R, A and S for a face to be in view."""
    if not skin.any():
        return False
    return all(float(np.ptp(volume.along(axis)[skin])) >= FACE_EXTENT_MM for axis in range(3))


def find_dome(volume: Coarse, skin: Mask, *, small: bool = False) -> Dome | None:
    """Lay an ellipsoid into the top of a head; None where the body does not end like one.

    ``small`` allows a newborn's head; a shoulder may be as large, so it is for what is said to be a head.
    """
    if not skin.any():
        return None
    dome = _laid(volume, skin, 1.0)
    return _laid(volume, skin, _SMALL) if small and dome is None else dome


def _laid(volume: Coarse, skin: Mask, scale: float) -> Dome | None:
    """Lay an ellipsoid into the top of a head of an adult's size times ``scale``, or larger."""
    right, forward, upward = (np.broadcast_to(volume.along(a), skin.shape)[skin] for a in range(3))
    voxel = float(abs(np.linalg.det(volume.affine[:3, :3])))
    step = 4.0
    counts, edges = np.histogram(upward, np.arange(upward.min(), upward.max() + 2 * step, step))
    wide = np.flatnonzero(counts * voxel / step >= _MIN_AREA_MM2)
    if not len(wide):
        return None
    vertex = float(edges[wide[-1] + 1])
    level = (upward < vertex - scale * _LEVEL_MM[0]) & (upward > vertex - scale * _LEVEL_MM[1])
    if level.sum() < 50:
        return None
    front, back = np.percentile(forward[level], (99.5, 0.5))
    side, other = np.percentile(right[level], (99.5, 0.5))
    length, width = float(front - back), float(side - other)
    if not (scale * _LENGTH_MM[0] <= length <= _LENGTH_MM[1] and scale * _WIDTH_MM[0] <= width <= _WIDTH_MM[1]):
        return None
    if not _RATIO[0] <= width / length <= _RATIO[1]:
        return None
    height = _HEIGHT_SHARE * length
    dome = Dome((float(side + other) / 2, float(front + back) / 2, vertex - height), (width / 2, length / 2, height))
    return dome if _fits(dome, volume, skin) else None


def _fits(dome: Dome, volume: Coarse, skin: Mask) -> bool:
    """Tell whether the body above the dome's middle and the dome's upper half are alike (Dice)."""
    inside = dome.holds(volume)
    above = np.broadcast_to(volume.along(2) > dome.middle[2], skin.shape)
    both = float((inside & skin & above).sum())
    alike = 2 * both / max(float((inside & above).sum() + (skin & above).sum()), 1.0)
    if volume.hu and float((volume.values[inside] > _HU_BONE).mean()) < _BONE_SHARE:
        return False
    return alike >= _DOME


def find_brain(volume: Coarse, skin: Mask, dome: Dome) -> Mask | None:
    """Estimate the brain inside the dome by grey values; None where no part of it can be one."""
    ndimage = filters()

    inside = dome.holds(volume) & skin
    values = volume.values
    low = float(np.percentile(values, 2))
    core = dome.scaled(_CORE_SHARE).holds(volume) & skin
    typical = float(np.median(values[core])) - low if core.any() else 0.0
    limits = [float("nan")] if volume.hu else [low + share * typical for share in _BRIGHT_SHARES]
    best, nearest = None, float("inf")
    for limit in limits:
        if volume.hu:
            tissue = inside & (values > _HU_TISSUE[0]) & (values < _HU_TISSUE[1])
        else:
            tissue = inside & (values > limit)
        depth = ndimage.distance_transform_edt(np.pad(tissue, 1), sampling=volume.spacing)[1:-1, 1:-1, 1:-1]
        for radius in _OPENINGS_MM:
            found = _grown(_largest(depth > radius), tissue, radius, volume.spacing)
            share = float(found.sum() / inside.sum())
            if _SHARE[0] <= share <= _SHARE[1] and abs(share - _TYPICAL_SHARE) < nearest:
                best, nearest = found, abs(share - _TYPICAL_SHARE)
    return best


def _grown(core: Mask, tissue: Mask, radius: float, spacing: NDArray[np.float64]) -> Mask:
    """Grow a core back into its tissue, and close its folds and hollows."""
    ndimage = filters()

    if not core.any():
        return core
    near = ndimage.distance_transform_edt(~core, sampling=spacing) <= radius + 1.5
    grown = np.pad(tissue & near, 6)
    wide = ndimage.distance_transform_edt(~grown, sampling=spacing) <= _CLOSING_MM
    closed = ndimage.distance_transform_edt(wide, sampling=spacing) > _CLOSING_MM
    return ndimage.binary_fill_holes(closed | grown)[6:-6, 6:-6, 6:-6]


def _largest(mask: Mask) -> Mask:
    ndimage = filters()

    grouped, count = ndimage.label(mask)
    if count == 0:
        return np.zeros(mask.shape, bool)
    return grouped == 1 + int(np.bincount(grouped.ravel())[1:].argmax())


def _air_limit(values: NDArray[np.float32]) -> float:
    """Return the grey value between air and body: well below what Otsu calls bright."""
    low = float(np.percentile(values, 2))
    return low + 0.4 * (otsu(values) - low)


def otsu(values: NDArray[np.float32]) -> float:
    """Return the threshold that parts values best into two classes.

    Source: N. Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    top = float(np.percentile(values, 99.5))
    counts, edges = np.histogram(np.minimum(values, top), 128)
    middle = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * middle) / np.maximum(below, 1)
    mean_above = np.cumsum((counts * middle)[::-1])[::-1] / np.maximum(above, 1)
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return float(middle[int(between.argmax())])
