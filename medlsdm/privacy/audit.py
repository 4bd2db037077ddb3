"""Find synthetic volumes that are copies of a site's own patients, and measure how well that works.

The detector is a copy gate, not a proof: passing it is no statement about membership inference and
is never worth an epsilon. Measured on hippocampus MR crops with label maps, 40 plants of each kind
and 90 held-out patients, by number of references (``make bench-gate``; bounds are kept by
``tests/unit/medlsdm_privacy/test_audit_real.py``):

=================================== ======== =========
called a copy                       40 refs  100 refs
=================================== ======== =========
held-out real patients (of 90)      1        0
exact, noise, gamma, flip           40       40
blur sigma 1 / 2 / 2.5 voxels       40/40/23 40/40/22
shift up to 2 / by 3 / by 5         40/40/40 39/40/40
rotation 5 / 10 / 20 degrees        40/3/0   40/6/0
zoom 0.9 / 1.1 / 1.2                27/40/1  24/39/8
intensity inverted                  40       40
=================================== ======== =========

Mixtures of two patients, half and half, passed in 21 to 28 of 40 at slightly lower thresholds.
Small sites block more that is innocent, depending on who their patients are: of 90 unrelated ones
33 at one set of 10 references (14 % over several sets), 4-5 % at 20-30, while every plant of the
first three rows was caught. The margin's factor was chosen on these data.

Limits. Plants are copies that we made, not copies that a diffusion model made: larger rotations and
zooms, strong blur and even mixtures pass, as the table shows. A patient under two pseudonyms hides a
copy from the gap signal and loosens the similarity threshold. Only this site's patients are
searched: a copy of another site's patient is not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medlsdm.errors import DataError, GateError, GeometryError
from medlsdm.privacy import MIN_PATIENTS, index
from medlsdm.types import Geometry, Modality, Scan, SemanticMap

MARGIN = 0.01
SMALL_SITE_DEVIATIONS = 6.0
"""Above the largest value between n real patients: 0.01 and 6 standard deviations / n.

The largest of few values says little about the next; with many patients the second term vanishes.
"""

SMOOTH_SIGMA = 1.0
"""In working voxels: each real patient is also compared smoothed by this much.

Models make volumes smoother than scans, and smooth volumes resemble each other more: procedural CT
rises from 0.28 to 0.35 between unrelated patients. Without this, blur would be taken for copying.
"""

_MAX_CALIBRATION = 200
_BATCH = 64

Reference = Scan | tuple[Scan, SemanticMap]
Labels = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class CopyVerdict:
    """Say how near the nearest training patient is. The numbers never leave the node.

    Attributes:
        similarity: Best absolute normalised cross-correlation with any patient, 0 to 1.
        gap: Its lead over the second best *patient*.
        is_copy: One of both is above what real patients show among themselves.
    """

    similarity: float
    gap: float
    is_copy: bool


@dataclass(frozen=True, slots=True)
class PlantResult:
    """Count how many of the copies that were planted on purpose the detector caught."""

    planted: int
    caught: int
    kinds: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def recall_bound(self) -> float:
        """Return the one-sided 95 % Clopper-Pearson lower bound of the recall."""
        from scipy import stats  # a third of a second that most commands need not wait for

        if not self.caught:
            return 0.0
        return float(stats.beta.ppf(0.05, self.caught, self.planted - self.caught + 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    grid: index.WorkingGrid
    bands: tuple[NDArray[np.float32], ...]
    patients: NDArray[np.intp]
    similarity_threshold: float
    gap_threshold: float


def _split(reference: Reference) -> tuple[Scan, Labels | None]:
    if isinstance(reference, Scan):
        return reference, None
    scan, labels = reference
    if not scan.geometry.matches(labels.geometry):
        raise GeometryError("A scan and its label map lie on different grids.", "Ingest the pair again.")
    return scan, labels.array


def _signals(
    bands: tuple[NDArray[np.float32], ...],
    patients: NDArray[np.intp],
    queries: NDArray[np.float32],
    own: NDArray[np.intp] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return best similarity and gap of each query; ``own`` names a patient to leave out for each."""
    best = np.zeros((len(queries), int(patients.max()) + 1))
    for start in range(0, len(queries), _BATCH):
        part = slice(start, start + _BATCH)
        for band, patient in zip(bands, patients, strict=True):
            best[part, patient] = np.maximum(best[part, patient], index.similarities(band, queries[part]))
    if own is not None:
        best[np.arange(len(best)), own] = 0.0
    ranked = np.sort(best, axis=1)
    return ranked[:, -1], ranked[:, -1] - ranked[:, -2]


class CopyDetector:
    """Compare volumes with every training volume of one site, over small shifts and mirrorings.

    Each volume is made scale-free by its percentiles, turned to RAS, averaged down to half
    resolution or coarser (at most ``index.MAX_SIDE`` working voxels an axis), brought to the site's
    median voxel size, band-passed, and cropped or padded about its centre to the site's median
    extent. The signals are the best absolute normalised cross-correlation of the central template
    over +-3 working voxels and 8 mirrorings, and its lead over the second best patient.

    When references come with label maps, what the map explains is fitted and taken out first, so
    that a shared shape alone is not called a copy. What a map explains beyond its label means
    (shading across an organ, partial volume) stays in and can still raise the similarity.

    The index holds one small float32 array a scan (at most 128 KiB); scans are streamed.
    """

    def __init__(self, indices: Mapping[Modality, _Index], labelled: bool) -> None:
        self._indices = dict(indices)
        self.labelled = labelled

    @classmethod
    def fit(cls, references: Iterable[Reference]) -> Self:
        """Index the site's scans and calibrate by leaving one patient out at a time.

        The thresholds are the largest similarity and gap that any real patient shows to the
        *other* patients, as it is or smoothed, plus a margin. Modalities are kept apart.

        Raises:
            GateError: No modality has ``MIN_PATIENTS`` patients: too few patients to calibrate.
        """
        volumes: dict[Modality, list[tuple[index.Compact, str]]] = defaultdict(list)
        with_labels: set[bool] = set()
        for reference in references:
            scan, labels = _split(reference)
            with_labels.add(labels is not None)
            volumes[scan.modality].append((index.compact(scan.array, scan.geometry, labels), scan.subject))
        if len(with_labels) > 1:
            raise DataError("Some scans come with a label map and some without.", "Give all of them one way.")
        counts = {modality: len({subject for _, subject in rows}) for modality, rows in volumes.items()}
        enough = [modality for modality, count in counts.items() if count >= MIN_PATIENTS]
        if not enough:
            raise GateError(
                "There are too few patients to calibrate the copy check.", f"At least {MIN_PATIENTS} are needed."
            )
        indices = {modality: _calibrated(volumes.pop(modality)) for modality in enough}
        return cls(indices, with_labels == {True})

    def thresholds(self, modality: Modality) -> tuple[float, float]:
        """Return the similarity and the gap above which a volume is a copy. For local eyes only."""
        found = self._index(modality)
        return found.similarity_threshold, found.gap_threshold

    def check(
        self, array: NDArray[np.floating], geometry: Geometry, modality: Modality, labels: Labels | None = None
    ) -> CopyVerdict:
        """Judge one volume against the site's patients of the same modality.

        Raises:
            GateError: The site has too few patients of this modality to judge by.
            DataError: The volume is unusable, or labels are missing where the references had them.
        """
        return self.check_all([(array, geometry, modality, labels)])[0]

    def check_all(
        self, volumes: Iterable[tuple[NDArray[np.floating], Geometry, Modality, Labels | None]]
    ) -> list[CopyVerdict]:
        """Judge several volumes at once, which is faster than one by one."""
        queries: dict[Modality, list[tuple[int, NDArray[np.float32]]]] = defaultdict(list)
        for number, (array, geometry, modality, labels) in enumerate(volumes):
            if self.labelled and labels is None:
                raise DataError("The copy check needs the volume's label map.", "Give the map it was made from.")
            small = index.compact(array, geometry, labels if self.labelled else None)
            band = index.band_passed(small, self._index(modality).grid)
            queries[modality].append((number, index.templates(band)))
        verdicts: dict[int, CopyVerdict] = {}
        for modality, rows in queries.items():
            found = self._index(modality)
            top, gap = _signals(found.bands, found.patients, np.stack([template for _, template in rows]))
            for (number, _), s, g in zip(rows, top.tolist(), gap.tolist(), strict=True):
                verdicts[number] = CopyVerdict(s, g, s > found.similarity_threshold or g > found.gap_threshold)
        return [verdicts[number] for number in sorted(verdicts)]

    @property
    def scans(self) -> int:
        """Return how many scans are indexed."""
        return sum(len(found.bands) for found in self._indices.values())

    def covers(self, modality: Modality) -> bool:
        """Tell whether the site has enough patients of a modality to judge by."""
        return modality in self._indices

    def _index(self, modality: Modality) -> _Index:
        if modality not in self._indices:
            raise GateError(
                f"There are too few {modality} patients to calibrate the copy check.",
                f"At least {MIN_PATIENTS} are needed.",
            )
        return self._indices[modality]


def _calibrated(rows: list[tuple[index.Compact, str]]) -> _Index:
    grid = index.working_grid([volume for volume, _ in rows])
    bands = tuple(index.band_passed(volume, grid) for volume, _ in rows)
    patients = np.unique([subject for _, subject in rows], return_inverse=True)[1].astype(np.intp)
    step = -(-len(bands) // _MAX_CALIBRATION)
    chosen = bands[::step]
    smooth = [np.asarray(ndimage.gaussian_filter(band, SMOOTH_SIGMA), dtype=np.float32) for band in chosen]
    queries = np.stack([index.templates(band) for band in (*chosen, *smooth)])
    top, gap = _signals(bands, patients, queries, np.tile(patients[::step], 2))
    count = int(patients.max()) + 1
    return _Index(grid, bands, patients, _threshold(top, count), _threshold(gap, count))


def _threshold(values: NDArray[np.float64], patients: int) -> float:
    return float(values.max() + MARGIN + SMALL_SITE_DEVIATIONS * values.std() / patients)


_Planted = tuple[NDArray[np.float32], Labels | None]
Plant = Callable[[NDArray[np.float32], Labels | None, np.random.Generator], _Planted]


def _unit(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return (array - array.min()) / max(float(np.ptp(array)), 1e-6)


def _noise(array: NDArray[np.float32], labels: Labels | None, rng: np.random.Generator) -> _Planted:
    low, high = np.percentile(array, [1, 99])
    return (array + 0.1 * (high - low) * rng.standard_normal(array.shape)).astype(np.float32), labels


def _gamma(array: NDArray[np.float32], labels: Labels | None, rng: np.random.Generator) -> _Planted:
    exponent = float(rng.choice([0.6, 1.6]))
    return _unit(array) ** exponent, labels


def _blur(array: NDArray[np.float32], labels: Labels | None, rng: np.random.Generator) -> _Planted:
    return np.asarray(ndimage.gaussian_filter(array, rng.uniform(0.7, 1.3)), dtype=np.float32), labels


def _flip(array: NDArray[np.float32], labels: Labels | None, rng: np.random.Generator) -> _Planted:
    axis = int(rng.integers(3))
    return np.flip(array, axis), None if labels is None else np.flip(labels, axis)


def _shift(array: NDArray[np.float32], labels: Labels | None, rng: np.random.Generator) -> _Planted:
    widths = [(int(n), 0) if rng.random() < 0.5 else (0, int(n)) for n in rng.integers(0, 3, 3)]
    kept = tuple(slice(high, high + n) for n, (_, high) in zip(array.shape, widths, strict=True))
    moved = None if labels is None else np.pad(labels, widths, mode="edge")[kept]
    return np.pad(array, widths, mode="edge")[kept], moved


PLANTS: Mapping[str, Plant] = {
    "exact": lambda array, labels, _: (array, labels),
    "noise": _noise,
    "gamma": _gamma,
    "blur": _blur,
    "flip": _flip,
    "shift": _shift,
}
"""Ways to make a copy: as it is; noise of a tenth of the range; gamma; blur; a mirroring; up to 2 voxels."""

MIN_PLANTS = 60
"""All of 59 caught bounds the miss rate below 5 % at 95 % confidence (Clopper-Pearson)."""


def _dealt(total: int, scans: int, kinds: list[str], rng: np.random.Generator) -> dict[int, list[str]]:
    """Say which scans become which plants: kinds in equal numbers, scans as evenly as can be."""
    order = np.concatenate([rng.permutation(scans) for _ in range(-(-total // scans))])[:total].tolist()
    dealt: dict[int, list[str]] = defaultdict(list)
    for number, scan in enumerate(order):
        dealt[scan].append(kinds[number % len(kinds)])
    return dealt


def plant_recall(
    detector: CopyDetector,
    references: Iterable[Reference],
    seed: int,
    *,
    kinds: Mapping[str, Plant] = PLANTS,
    planted: int = MIN_PLANTS,
) -> PlantResult:
    """Plant copies of the site's own patients and count how many the detector catches.

    Args:
        detector: Fitted on the same ``references``.
        references: The site's scans once more; they are streamed.
        seed: Chooses scans and transforms.
        kinds: Ways to make a copy. Add the round trip through stage 1 where a checkpoint is at hand:
            it is what a memorised sample looks like.
        planted: How many, dealt over scans and kinds in turn.
    """
    rng = np.random.default_rng(seed)
    dealt = _dealt(planted, detector.scans, list(kinds), rng)
    names: list[str] = []

    def copies() -> Iterator[tuple[NDArray[np.float32], Geometry, Modality, Labels | None]]:
        covered = (pair for pair in map(_split, references) if detector.covers(pair[0].modality))
        for position, (scan, labels) in enumerate(covered):
            for name in dealt.get(position, []):
                array, moved = kinds[name](scan.array, labels, rng)
                names.append(name)
                yield array, scan.geometry, scan.modality, moved

    tally: dict[str, tuple[int, int]] = {}
    for verdict, name in zip(detector.check_all(copies()), names, strict=True):
        made, caught = tally.get(name, (0, 0))
        tally[name] = (made + 1, caught + verdict.is_copy)
    return PlantResult(sum(n for n, _ in tally.values()), sum(n for _, n in tally.values()), tally)
