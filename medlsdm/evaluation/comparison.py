"""Hold synthetic volumes against real ones, by every measure that needs no eye."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlsdm.errors import DataError
from medlsdm.evaluation.metrics import (
    band_power,
    fingerprints,
    gradient_energy,
    mean_frechet,
    random_features,
)
from medlsdm.evaluation.segmenter import Labels, Segmenter, mean_dice, segmenter_features
from medlsdm.evaluation.told_apart import FOLDS, told_apart
from medlsdm.training.patients import normalise
from medlsdm.types import Modality

Volume = NDArray[np.float32]
Rows = NDArray[np.float64]
SMALLEST_SET = FOLDS


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold what a comparison found. A ratio of 1 is best.

    ``told_apart_auc`` is how well a linear classifier tells patches from real ones (0.5: not at all), with
    its 95 % interval. Each FID is to be read against its floor: what two sets of ``fid_count`` real volumes
    give. ``fid_segmenter`` is of what a segmenter finds deepest, which is nearly blind to blur and noise;
    ``fid_segmenter_fine`` of what it finds first, each feature scaled to spread 1. ``nearest`` is each
    volume's greatest correlation with a real one, ``nearest_real`` the same for real ones. With a segmenter:
    ``dice`` of what it finds in the synthetic volumes against their maps, and ``dice_real`` the same in
    ``dice_real_count`` real volumes.
    """

    real_count: int
    synthetic_count: int
    told_apart_auc: float
    told_apart_low: float
    told_apart_high: float
    gradient_energy_ratio: float
    power_ratio_by_band: tuple[float, ...]
    fid_count: int
    fid: float
    fid_floor: float
    nearest_mean: float
    nearest_max: float
    nearest_real_mean: float
    nearest_real_max: float
    fid_segmenter: float | None = None
    fid_segmenter_floor: float | None = None
    fid_segmenter_fine: float | None = None
    fid_segmenter_fine_floor: float | None = None
    dice: float | None = None
    dice_real: float | None = None
    dice_real_count: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Yardstick:
    """Hold real volumes to measure synthetic ones by.

    Args:
        real: Volumes [X, Y, Z] in -1..1; best some that the model never saw.
        others: Further real ones, best those that the model was trained on: for the floors and for the search
            for copies. Without them the real ones are halved for the floors.
        real_labels: The real ones' class indices, for ``dice_real``.
        segmenter: Trained on real pairs, best others than ``real``.

    Raises:
        DataError: There are fewer than five real volumes.
    """

    def __init__(
        self,
        real: Sequence[Volume],
        others: Sequence[Volume] | None = None,
        real_labels: Sequence[Labels] | None = None,
        segmenter: Segmenter | None = None,
    ) -> None:
        self._enough(len(real), "real")
        self.real, self.segmenter = real, segmenter
        self._energy, self._power = _energy(real), _power(real)
        self._prints = fingerprints(real)
        self._search = self._prints if others is None else fingerprints(others)
        among = self._prints @ self._search.T
        if others is None:
            np.fill_diagonal(among, -1)
        self._nearest = among.max(axis=1)
        order = np.random.default_rng(0).permutation(len(real))
        half = len(real) // 2

        def parts(features: Callable[[Sequence[Volume]], Rows]) -> tuple[Rows, Rows]:
            rows = features(real)
            return (rows[order[:half]], rows[order[half:]]) if others is None else (rows, features(others))

        self._random = parts(random_features)
        self._deep = parts(lambda v: segmenter_features(segmenter, v)) if segmenter else None
        self._fine = parts(lambda v: segmenter_features(segmenter, v, fine=True)) if segmenter else None
        self._dice = mean_dice(segmenter, real, real_labels) if segmenter and real_labels else None

    def measure(self, synthetic: Sequence[Volume], labels: Sequence[Labels] | None = None) -> Comparison:
        """Measure synthetic volumes in -1..1; ``labels`` are the class indices that they were made from.

        Raises:
            DataError: There are fewer than five synthetic volumes.
        """
        self._enough(len(synthetic), "synthetic")
        count = min(len(synthetic), *(len(part) for part in self._random))
        found = told_apart(self.real, synthetic)
        nearest = (fingerprints(synthetic) @ self._search.T).max(axis=1)
        power = _power(synthetic) / np.maximum(self._power, 1e-12)
        by_segmenter = {} if self.segmenter is None else self._by_segmenter(self.segmenter, synthetic, labels, count)
        return Comparison(
            real_count=len(self.real),
            synthetic_count=len(synthetic),
            told_apart_auc=found.auc,
            told_apart_low=found.low,
            told_apart_high=found.high,
            gradient_energy_ratio=_energy(synthetic) / self._energy,
            power_ratio_by_band=tuple(float(ratio) for ratio in power),
            fid_count=count,
            fid=mean_frechet(self._random[0], random_features(synthetic), count),
            fid_floor=mean_frechet(*self._random, count),
            nearest_mean=float(nearest.mean()),
            nearest_max=float(nearest.max()),
            nearest_real_mean=float(self._nearest.mean()),
            nearest_real_max=float(self._nearest.max()),
            dice_real=self._dice,
            dice_real_count=None if self._dice is None else len(self.real),
            **by_segmenter,
        )

    def _by_segmenter(
        self, segmenter: Segmenter, synthetic: Sequence[Volume], labels: Sequence[Labels] | None, count: int
    ) -> dict[str, Any]:
        """Return what needs the segmenter: both distances with their floors, and the Dice on the maps."""
        assert self._deep is not None
        assert self._fine is not None
        scale = 1 / (self._fine[1].std(0) + 1e-9)
        fine_real, fine_others = (rows * scale for rows in self._fine)
        fine = segmenter_features(segmenter, synthetic, fine=True) * scale
        return {
            "fid_segmenter": mean_frechet(self._deep[0], segmenter_features(segmenter, synthetic), count),
            "fid_segmenter_floor": mean_frechet(*self._deep, count),
            "fid_segmenter_fine": mean_frechet(fine_real, fine, count),
            "fid_segmenter_fine_floor": mean_frechet(fine_real, fine_others, count),
            "dice": mean_dice(segmenter, synthetic, labels) if labels else None,
        }

    @staticmethod
    def _enough(count: int, what: str) -> None:
        if count < SMALLEST_SET:
            raise DataError(f"There are only {count} {what} volumes.", f"Give at least {SMALLEST_SET} each.")


def compare(real: Sequence[Volume], synthetic: Sequence[Volume], modality: Modality) -> Comparison:
    """Compare a set of synthetic volumes with a set of real ones, both in scan units.

    Raises:
        DataError: Fewer than five volumes in a set, or a volume that cannot be normalised.
    """
    for group, what in ((real, "real"), (synthetic, "synthetic")):
        Yardstick._enough(len(group), what)
    return Yardstick([normalise(v, modality) for v in real]).measure([normalise(v, modality) for v in synthetic])


def _energy(volumes: Sequence[Volume]) -> float:
    return float(np.mean([gradient_energy(v) for v in volumes]))


def _power(volumes: Sequence[Volume]) -> Rows:
    return np.mean([band_power(v) for v in volumes], axis=0)
