import numpy as np
import pytest
from scipy import ndimage, stats

from medlsdm.errors import DataError, GateError
from medlsdm.privacy import MIN_PATIENTS, index
from medlsdm.privacy.audit import PLANTS, CopyDetector, PlantResult, plant_recall
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import from_ras, to_ras

SHAPE = (30, 34, 32)
SCHEMA = LabelSchema("test", (LabelClass(0, "background"), LabelClass(1, "one"), LabelClass(2, "two")))


def texture(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.0)
    return (noise / noise.std()).astype(np.float32)


def scan(seed: int, *, subject: str | None = None, modality: Modality = Modality.MR, gain: float = 1.0) -> Scan:
    return Scan(texture(seed) * gain + 3 * gain, Geometry(np.eye(4), SHAPE), modality, subject or f"p{seed:03d}")


@pytest.fixture(scope="module")
def references() -> list[Scan]:
    return [scan(n, gain=10.0 ** (n % 5)) for n in range(12)]


@pytest.fixture(scope="module")
def detector(references: list[Scan]) -> CopyDetector:
    return CopyDetector.fit(references)


def test_a_copy_is_caught_and_a_stranger_is_not(detector: CopyDetector, references: list[Scan]):
    copied = detector.check(references[3].array, references[3].geometry, Modality.MR)
    assert copied.is_copy
    assert copied.similarity == pytest.approx(1.0, abs=1e-4)
    stranger = scan(500)
    assert not detector.check(stranger.array, stranger.geometry, Modality.MR).is_copy


@pytest.mark.parametrize("kind", sorted(PLANTS))
def test_every_kind_of_plant_is_caught(detector: CopyDetector, references: list[Scan], kind: str):
    result = plant_recall(detector, references, 7, kinds={kind: PLANTS[kind]}, planted=12)
    assert result.planted == 12
    assert result.caught >= 11


def test_plants_are_dealt_over_all_kinds_and_are_the_same_for_one_seed(detector: CopyDetector, references: list[Scan]):
    result = plant_recall(detector, iter(references), 1, planted=18)
    assert {kind: made for kind, (made, _) in result.kinds.items()} == dict.fromkeys(PLANTS, 3)
    assert result == plant_recall(detector, references, 1, planted=18)


def test_a_detector_that_sees_nothing_reports_its_misses(references: list[Scan]):
    others = CopyDetector.fit(scan(n) for n in range(100, 112))
    result = plant_recall(others, references, 1, planted=18)
    assert result.caught <= 2
    assert result.recall_bound < 0.2


def test_intensity_inverted_rescaled_and_turned_copies_are_caught(detector: CopyDetector, references: list[Scan]):
    source = references[5]
    assert detector.check(-1000 * source.array + 7, source.geometry, Modality.MR).is_copy
    lps = Geometry(np.diag([-1.0, -1.0, 1.0, 1.0]), SHAPE)
    turned = from_ras(source.array, lps)
    assert to_ras(turned, lps)[0] == pytest.approx(source.array)
    assert detector.check(turned, lps, Modality.MR).is_copy


def test_a_copy_on_a_finer_grid_is_caught(detector: CopyDetector, references: list[Scan]):
    fine = ndimage.zoom(references[2].array, 2, order=1)
    assert detector.check(fine, Geometry(np.diag([0.5, 0.5, 0.5, 1]), fine.shape), Modality.MR).is_copy


def test_similarity_agrees_with_a_naive_correlation():
    grid = index.WorkingGrid((2.0, 2.0, 2.0), (12, 11, 10))
    one, two = (index.band_passed(index.compact(texture(s, (24, 22, 20)), Geometry(np.eye(4), (24, 22, 20))), grid)
                for s in (1, 2))  # fmt: skip
    inner = one[3:-3, 3:-3, 3:-3]
    best = 0.0
    for axes in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        mirrored = np.flip(inner, axes).ravel()
        for x, y, z in np.ndindex(7, 7, 7):
            window = two[x : x + 6, y : y + 5, z : z + 4].ravel()
            best = max(best, abs(float(np.corrcoef(mirrored, window)[0, 1])))
    assert index.similarities(two, index.templates(one)[None])[0] == pytest.approx(best, abs=1e-4)


def test_too_few_patients_fail_closed(references: list[Scan]):
    with pytest.raises(GateError, match="too few patients"):
        CopyDetector.fit(references[: MIN_PATIENTS - 1])
    one_patient = [scan(n, subject="same") for n in range(10)]
    with pytest.raises(GateError, match="too few patients"):
        CopyDetector.fit(one_patient)
    with pytest.raises(GateError, match="too few patients"):
        CopyDetector.fit([])


def test_another_modality_fails_closed(references: list[Scan]):
    detector = CopyDetector.fit([*references, scan(90, modality=Modality.CT)])
    for modality in (Modality.CT, Modality.PT):
        with pytest.raises(GateError, match="too few"):
            detector.check(references[0].array, references[0].geometry, modality)


def test_two_scans_of_one_patient_do_not_loosen_the_threshold(references: list[Scan]):
    again = [Scan(r.array * 2, r.geometry, r.modality, r.subject) for r in references]
    once, twice = CopyDetector.fit(references), CopyDetector.fit([*references, *again])
    assert twice.thresholds(Modality.MR) == pytest.approx(once.thresholds(Modality.MR), abs=1e-4)


@pytest.mark.parametrize("bad", [np.zeros(SHAPE), np.full(SHAPE, np.nan)])
def test_refuses_a_volume_that_cannot_be_judged(detector: CopyDetector, bad: np.ndarray):
    with pytest.raises(DataError):
        detector.check(bad, Geometry(np.eye(4), SHAPE), Modality.MR)


def blobs(seed: int) -> np.ndarray:
    return np.digitize(texture(seed), [-0.4, 0.4]).astype(np.uint8)


def painted(labels: np.ndarray, seed: int) -> np.ndarray:
    return ndimage.gaussian_filter(labels.astype(np.float32), 0.7) + 0.15 * texture(seed + 1000)


def pair(seed: int) -> tuple[Scan, SemanticMap]:
    geometry = Geometry(np.eye(4), SHAPE)
    return (
        Scan(painted(blobs(seed), seed), geometry, Modality.MR, f"p{seed}"),
        SemanticMap(blobs(seed), geometry, SCHEMA),
    )


def test_a_shared_label_map_alone_is_not_a_copy_but_a_shared_texture_is():
    pairs = [pair(n) for n in range(12)]
    detector = CopyDetector.fit(pairs)
    labels = pairs[4][1].array
    fresh = painted(labels, 700)  # the same anatomy, another texture
    assert not detector.check(fresh, pairs[4][0].geometry, Modality.MR, labels).is_copy
    copied = detector.check(
        np.sqrt(pairs[4][0].array - pairs[4][0].array.min()), pairs[4][0].geometry, Modality.MR, labels
    )
    assert copied.is_copy
    blind = CopyDetector.fit(scan for scan, _ in pairs)
    assert blind.check(fresh, pairs[4][0].geometry, Modality.MR).is_copy  # why the maps are taken out


def test_labels_must_be_given_where_the_references_had_them():
    pairs = [pair(n) for n in range(6)]
    detector = CopyDetector.fit(pairs)
    with pytest.raises(DataError, match="label map"):
        detector.check(pairs[0][0].array, pairs[0][0].geometry, Modality.MR)
    with pytest.raises(DataError, match="some without"):
        CopyDetector.fit([*pairs, scan(50)])


@pytest.mark.parametrize(("caught", "planted"), [(59, 59), (50, 60), (0, 10)])
def test_recall_bound_is_clopper_pearson(caught: int, planted: int):
    bound = PlantResult(planted, caught).recall_bound
    exact = stats.binomtest(max(caught, 0), planted, alternative="greater").proportion_ci(0.95, "exact").low
    assert bound == pytest.approx(exact)
    assert PlantResult(59, 59).recall_bound > 0.95
