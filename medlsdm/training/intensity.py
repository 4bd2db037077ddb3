"""Scanner values to -1..1 and back: HU and SUV by fixed curves, MR by each volume's own percentiles. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medlsdm.errors import DataError
from medlsdm.types import Modality

CT_WINDOW = (-1024.0, 1650.0)
"""HU that become -1 and 1; what lies outside is clipped, so denser metal and teeth read 1650 HU."""

SUV_WINDOW = (0.0, 40.0)
"""SUV that become -1 and 1 on a square-root curve, which evens out counting noise; outside is clipped."""

RELATIVE_SCALE = (0.0, 1000.0)
"""What -1 and 1 become in synthetic MR, whose real scales mean nothing across scanners."""

MR_PERCENTILES = (0.5, 99.5)
IMPLAUSIBLE_SUV = 100.0


@dataclass(frozen=True, slots=True)
class Intensity:
    """Say how values from ``low`` to ``high`` become -1..1: in proportion to their ``root``-th root.

    ``invert`` undoes ``apply`` inside the window, to 1e-3 HU and better.
    """

    low: float
    high: float
    root: int = 1

    @classmethod
    def of(cls, array: NDArray[Any], modality: Modality) -> Self:
        """Return the curve for a scan: fixed for CT and PET, from the volume itself for MR.

        Percentiles move with the values, so neither the scale nor the offset of an MR scan matters.

        Raises:
            DataError: The volume is constant, holds values that are not finite, or is PET but not in SUV.
        """
        values = np.asarray(array, dtype=np.float64)
        if not np.isfinite(values).all():
            raise DataError("A scan holds values that are not finite.", "Check the source series.")
        if values.size == 0 or values.min() == values.max():
            raise DataError("A scan has one value everywhere.", "Remove it, or check how it was converted.")
        if modality is not Modality.MR:
            return cls.fixed(modality, values)
        low, high = np.percentile(values, MR_PERCENTILES)
        if high <= low:
            low, high = values.min(), values.max()
        return cls(float(low), float(high))

    @classmethod
    def fixed(cls, modality: Modality, values: NDArray[np.float64] | None = None) -> Self:
        """Return the curve that a modality has before any scan is seen; ``values`` are checked to fit it."""
        if modality is Modality.CT:
            return cls(*CT_WINDOW)
        if modality is Modality.MR:
            return cls(*RELATIVE_SCALE)
        if values is not None and values.max() > 0 and np.percentile(values[values > 0], 95) > IMPLAUSIBLE_SUV:
            raise DataError("A PET scan is not in SUV.", "Convert it to SUV (g/ml) first.")
        return cls(*SUV_WINDOW, root=2)

    def apply(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Bring scanner values to -1..1."""
        share = np.clip((np.asarray(array, dtype=np.float64) - self.low) / (self.high - self.low), 0, 1)
        return (share ** (1 / self.root) * 2 - 1).astype(np.float32)

    def invert(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """Bring -1..1 back to scanner values."""
        share = ((np.clip(array, -1, 1).astype(np.float64) + 1) / 2) ** self.root
        return (share * (self.high - self.low) + self.low).astype(np.float32)


def normalise(array: NDArray[Any], modality: Modality) -> NDArray[np.float32]:
    """Bring a scan to -1..1; errors as in ``Intensity.of``."""
    return Intensity.of(array, modality).apply(array)


def denormalise(array: NDArray[np.float32], modality: Modality) -> NDArray[np.float32]:
    """Bring -1..1 back: to HU for CT, to SUV for PET, to 0..1000 for MR."""
    return Intensity.fixed(modality).invert(array)
