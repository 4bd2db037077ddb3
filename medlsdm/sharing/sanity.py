"""What any synthetic volume must be before it is worth sharing: sane intensities that follow its labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medlsdm.errors import DataError
from medlsdm.privacy.index import robust_scale
from medlsdm.types import Modality, Scan, SemanticMap

PHYSICAL_RANGE = {Modality.CT: (-2048.0, 32_767.0), Modality.PT: (-1.0, 10_000.0)}
"""HU and SUV that a scanner can write. MR has no physical unit; only its shape is judged."""


@dataclass(slots=True)
class RealRange:
    """Collect, while the site's scans stream by, what is usual among them. Stays on the node."""

    percentiles: dict[Modality, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    label_means: dict[tuple[Modality, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, pairs: Iterable[tuple[Scan, SemanticMap]], min_voxels: int) -> Iterator[tuple[Scan, SemanticMap]]:
        """Yield the pairs unchanged, taking note of each."""
        for scan, labels in pairs:
            low, high = np.percentile(scan.array, [1, 99])
            self.percentiles[scan.modality].append((float(low), float(high)))
            for label, mean in label_means(scan.array, labels.array, min_voxels).items():
                self.label_means[scan.modality, label].append(mean)
            yield scan, labels


def label_means(array: NDArray[np.floating], labels: NDArray[np.integer], min_voxels: int) -> dict[int, float]:
    """Return the mean of each label after robust scaling, leaving out labels of few voxels."""
    scaled = robust_scale(array).reshape(-1)
    found, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse.reshape(-1), scaled)
    kept = zip(found.tolist(), (sums / counts).tolist(), counts.tolist(), strict=True)
    return {label: mean for label, mean, count in kept if count >= min_voxels}


def intensity_faults(array: NDArray[np.floating], modality: Modality, real: RealRange) -> list[str]:
    """Say in words what is wrong with a volume's intensities; nothing if they are sane."""
    if not np.isfinite(array).all():
        return ["it holds values that are not finite"]
    low, high = np.percentile(array, [1, 99])
    if not float(array.max()) > float(array.min()) or not high > low:
        return ["it is constant"]
    if modality not in PHYSICAL_RANGE:
        return []
    least, most = PHYSICAL_RANGE[modality]
    if array.min() < least or array.max() > most:
        return [f"its intensities are outside what {modality} can measure"]
    if seen := real.percentiles.get(modality):
        bottom, top = min(p[0] for p in seen), max(p[1] for p in seen)
        room = 0.5 * (top - bottom)
        if low < bottom - room or high > top + room:
            return ["its intensities are outside the range of the site's own scans"]
    return []


def label_faults(
    array: NDArray[np.floating], labels: SemanticMap, modality: Modality, real: RealRange, min_voxels: int, room: float
) -> list[str]:
    """Say which labels do not look like themselves: mean beyond the reals' mean +- (3 sd + ``room``).

    Labels that the site's own scans lack, or have fewer than 3 times, are not judged.
    """
    try:
        means = label_means(array, labels.array, min_voxels)
    except DataError:
        return []  # not finite or constant, which intensity_faults says
    wrong = []
    for label, mean in means.items():
        seen = real.label_means.get((modality, label), [])
        if len(seen) >= 3 and abs(mean - np.mean(seen)) > 3 * np.std(seen) + room:
            wrong.append(labels.schema.by_id(label).name)
    return [f"it does not follow its labels ({', '.join(wrong)})"] if wrong else []
