"""Cut the face off a head: all that lies in front of and below the brain's own hull.

Planes that face forward and down, seen along the left-right axis, are pushed against the brain, and
what lies beyond any of them by more than a margin is removed. No plane can enter the brain, since
each is set by the brain's own outermost point; so a brain that is known is never touched.

Source: the tangent plane is that of N. Schimke and J. Hale, Quickshear defacing for neuroimages,
HealthSec 2011; here a fan of planes takes the place of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ANGLES_DEGREES = tuple(range(5, 71, 5))
MARGIN_LABELS_MM = 5.0
MARGIN_ESTIMATE_MM = 12.0
MARGIN_DOME_MM = 8.0
CODE = "113102"


@dataclass(frozen=True, slots=True)
class FaceCut:
    """Hold the planes: the angle below straight forward in degrees, and the place beyond which is cut, in mm."""

    limits: tuple[tuple[float, float], ...]

    def removes(self, forward: NDArray[np.float64], upward: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which points are cut, from their places along A and S in mm; the two broadcast."""
        cut = np.zeros(np.broadcast_shapes(forward.shape, upward.shape), bool)
        for angle, limit in self.limits:
            cut |= _reach(angle, forward, upward) > limit
        return cut

    def joined(self, other: FaceCut) -> FaceCut:
        """Return the cut that removes only what both remove by each plane."""
        pairs = zip(self.limits, other.limits, strict=True)
        return FaceCut(tuple((angle, max(limit, second)) for (angle, limit), (_, second) in pairs))


@dataclass(frozen=True, slots=True)
class LabelledBrain:
    """Hold the places [N, 3] in mm (RAS) of voxels labelled as brain, and whether they are a whole brain."""

    points: NDArray[np.float64]
    whole: bool


def face_cut(points: NDArray[np.float64], margin_mm: float) -> FaceCut:
    """Set the planes by the brain's points [N, 3] in mm (RAS), a margin away from the outermost."""
    forward, upward = points[:, 1], points[:, 2]
    return FaceCut(
        tuple((float(a), float(_reach(a, forward, upward).max()) + margin_mm) for a in ANGLES_DEGREES),
    )


def _reach(angle: float, forward: NDArray[np.float64], upward: NDArray[np.float64]) -> NDArray[np.float64]:
    turned = np.radians(angle)
    return np.cos(turned) * forward - np.sin(turned) * upward


def mask_points(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the places in mm (RAS) of the voxels of a mask [X, Y, Z]."""
    return np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
