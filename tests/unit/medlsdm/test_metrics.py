from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg, ndimage

from medlsdm.errors import DataError
from medlsdm.evaluation.comparison import compare
from medlsdm.evaluation.metrics import band_power, fingerprints, frechet_distance
from medlsdm.types import Modality


def volumes(seed: int, count: int = 8, blur: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    base = ndimage.gaussian_filter(rng.standard_normal((count, 16, 18, 20)), (0, 1, 1, 1))
    return [ndimage.gaussian_filter(v, blur).astype(np.float32) for v in base]


def test_frechet_distance_equals_the_closed_form():
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((400, 3)), rng.standard_normal((500, 3)) @ np.diag([1.0, 2.0, 0.5]) + [1, 0, 0]
    covariances = np.cov(one.T), np.cov(two.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(one, two) == pytest.approx(expected)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_a_wave_has_its_power_in_its_band():
    x = np.arange(32)[:, None, None]
    wave = np.broadcast_to(np.sin(2 * np.pi * 0.25 * x), (32, 32, 32)).astype(np.float32)
    assert np.argmax(band_power(wave)) == 2


def test_blur_shows_in_sharpness_spectrum_and_fid():
    real = volumes(0)
    good, blurred = compare(real, volumes(1), Modality.MR), compare(real, volumes(1, blur=1.0), Modality.MR)
    assert good.gradient_energy_ratio == pytest.approx(1, abs=0.1)
    assert blurred.gradient_energy_ratio < 0.8
    assert blurred.power_ratio_by_band[3] < 0.5 < good.power_ratio_by_band[3]
    assert blurred.fid > 1.5 * good.fid
    assert good.fid_count == 4


def test_a_copy_is_the_nearest_neighbour():
    real = volumes(0)
    found = compare(real, [*volumes(1)[:4], real[4] * 3 + 5], Modality.MR)
    assert found.nearest_max > 0.99
    assert found.nearest_real_max < 0.7


def test_fingerprints_are_unit_vectors_of_any_size():
    prints = fingerprints([np.random.default_rng(0).random((9, 40, 17), dtype=np.float32)])
    assert np.linalg.norm(prints) == pytest.approx(1)


def test_refuses_too_few_volumes():
    with pytest.raises(DataError, match="at least"):
        compare(volumes(0, 3), volumes(1), Modality.MR)
