from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from medlsdm.training.augment import RANGES, Ranges, _places, vary
from medlsdm.types import Modality

SHAPE = (28, 40, 28)
STILL = Ranges(turn=0, scale=0, bend=0, gamma=0, shading=0, grain=0)


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.normal(size=SHAPE), 2).astype(np.float32)
    image = np.clip(image / np.abs(image).max(), -1, 1)
    return image, (3 * (image > 0.1)).astype(np.uint8)


@pytest.mark.parametrize("strength", ["light", "strong"])
@pytest.mark.parametrize("modality", list(Modality))
def test_labels_and_image_move_together(strength, modality):
    image, labels = case()
    rng = np.random.default_rng(5)
    varied, moved = vary(image, labels, (1, 1, 3), modality, strength, rng)
    assert varied.shape == image.shape
    assert varied.dtype == np.float32
    assert moved.dtype == labels.dtype
    assert set(np.unique(moved)) <= set(np.unique(labels))
    assert np.abs(varied).max() <= 1
    assert not np.array_equal(moved, labels)
    with_labels = np.corrcoef(varied.ravel(), moved.ravel() > 0)[0, 1]
    assert with_labels > 0.7 * np.corrcoef(image.ravel(), labels.ravel() > 0)[0, 1]
    assert with_labels > np.corrcoef(varied.ravel(), labels.ravel() > 0)[0, 1] + 0.02


def test_the_same_generator_state_gives_the_same_variation():
    image, labels = case()
    one, other, third = (
        vary(image, labels, (1, 1, 1), Modality.MR, "strong", np.random.default_rng(s)) for s in (3, 3, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0], third[0])


def test_none_changes_nothing():
    image, labels = case()
    varied, moved = vary(image, labels, (1, 1, 1), Modality.MR, "none", np.random.default_rng(0))
    assert varied is image
    assert moved is labels


def test_no_variation_is_the_identity():
    places = _places(SHAPE, np.ones(3), STILL, np.random.default_rng(0))
    np.testing.assert_allclose(places, np.indices(SHAPE), atol=1e-4)


def test_turning_is_rigid_in_mm_and_never_leaves_the_crop():
    spacing = np.array([1.0, 1.0, 3.0])
    places = _places(SHAPE, spacing, replace(STILL, turn=20), np.random.default_rng(1))
    assert places.min() >= 0
    assert all(places[axis].max() <= n - 1 for axis, n in enumerate(SHAPE))
    centre = tuple(n // 2 for n in SHAPE)
    for axis in range(3):
        ahead = tuple(c + (a == axis) for a, c in enumerate(centre))
        step = (places[(slice(None), *ahead)] - places[(slice(None), *centre)]) * spacing
        assert np.linalg.norm(step) == pytest.approx(spacing[axis], rel=1e-3)


def test_hounsfield_units_keep_their_meaning():
    flat = np.full(SHAPE, 0.25, dtype=np.float32)
    varied, _ = vary(flat, flat.astype(np.uint8), (1, 1, 1), Modality.CT, "strong", np.random.default_rng(0))
    assert varied.mean() == pytest.approx(0.25, abs=1e-3)
    assert varied.std() <= RANGES["strong"].grain * 1.1
