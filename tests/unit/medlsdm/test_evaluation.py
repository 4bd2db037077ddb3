from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medlsdm.errors import DataError
from medlsdm.evaluation.comparison import Yardstick
from medlsdm.evaluation.matched_noise import MatchedNoise
from medlsdm.evaluation.metrics import band_power, mean_frechet
from medlsdm.evaluation.segmenter import (
    Budget,
    Segmenter,
    dice,
    mean_dice,
    segment,
    segmentation_loss,
    segmenter_features,
    train_segmenter,
)
from medlsdm.evaluation.similarity import psnr, ssim
from medlsdm.evaluation.told_apart import area_under_curve, patch_features, patches, told_apart


def textures(seed: int, count: int = 12, blur: float = 0.6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    volumes = ndimage.gaussian_filter(rng.standard_normal((count, 32, 40, 32)), (0, blur, blur, blur))
    return [v.astype(np.float32) for v in volumes]


def balls(seed: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return noisy volumes of odd sizes with a bright ball, and its label maps."""
    rng, images, labels = np.random.default_rng(seed), [], []
    for _ in range(count):
        shape = rng.integers(27, 40, 3)
        at = [rng.integers(10, n - 10) for n in shape]
        distance = np.sqrt(sum((g - a) ** 2 for g, a in zip(np.indices(shape), at, strict=True)))
        labels.append((distance < 8).astype(np.uint8))
        images.append((labels[-1] - 0.5 + 0.2 * rng.standard_normal(shape)).astype(np.float32))
    return images, labels


def test_psnr_and_ssim_equal_scikit_image():
    truth = np.clip(textures(0, 1)[0], -1, 1)
    volume = np.clip(truth + 0.1 * textures(1, 1)[0], -1, 1)
    assert psnr(volume, truth) == pytest.approx(peak_signal_noise_ratio(truth, volume, data_range=2))
    theirs = structural_similarity(truth, volume, data_range=2, gaussian_weights=True, use_sample_covariance=False)
    assert ssim(volume, truth) == pytest.approx(theirs, abs=1e-6)
    assert ssim(truth, truth) == pytest.approx(1)


def test_patches_cover_a_volume_evenly():
    cut = patches(np.zeros((35, 50, 36), dtype=np.float32))
    assert len(cut) == 2 * 2 * 2
    assert {p.shape for p in cut} == {(16, 20, 16)}
    assert len(patches(np.zeros((9, 12, 40), dtype=np.float32))) == 2


def test_patch_features_are_fixed_and_finite_on_a_constant_patch():
    flat = np.full((16, 20, 16), 0.5, dtype=np.float32)
    assert np.isfinite(patch_features(flat)).all()
    one = textures(0, 1)[0]
    assert np.array_equal(patch_features(one), patch_features(one))


def test_area_under_curve_counts_pairs():
    rng = np.random.default_rng(0)
    positives, negatives = rng.integers(0, 5, 30).astype(float), rng.integers(0, 4, 20).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert area_under_curve(positives, negatives) == pytest.approx(np.mean(pairs))


def test_equal_textures_cannot_be_told_apart_and_smoother_ones_can():
    same, smoother = (told_apart(textures(0), textures(1, blur=b)) for b in (0.6, 0.8))
    assert same.auc == pytest.approx(0.5, abs=0.12)
    assert same.low < 0.5 < same.high
    assert smoother.auc > 0.95
    assert smoother.low <= smoother.auc <= smoother.high


def test_copies_in_place_cannot_be_told_apart():
    volumes = textures(0)
    assert told_apart(volumes, volumes).auc == pytest.approx(0.5)


def test_mean_frechet_is_small_for_equal_sets_and_needs_enough_rows():
    rng = np.random.default_rng(0)
    reference, others = rng.standard_normal((30, 4)), rng.standard_normal((90, 4))
    assert mean_frechet(reference, others, 30) < 0.2 * mean_frechet(reference, others + 2, 30)
    assert mean_frechet(reference, others, 30) < mean_frechet(reference, others, 10)
    with pytest.raises(DataError, match="draws of 31"):
        mean_frechet(reference, others, 31)


def test_matched_noise_restores_spectrum_and_spread():
    rng = np.random.default_rng(0)
    smooth = [np.clip(v / v.std() / 3, -0.6, 0.6) for v in textures(3, 6, blur=4.0)]
    grain = [0.4 * ndimage.gaussian_filter(rng.standard_normal(v.shape), 0.5) * np.where(v > 0, 1, 0.5) for v in smooth]
    real = [(v + g).astype(np.float32) for v, g in zip(smooth, grain, strict=True)]
    noise = MatchedNoise.fit(real, smooth)
    made = [noise.add(v, rng) for v in smooth]
    powers = [np.mean([band_power(v) for v in group], axis=0) for group in (made, real)]
    assert powers[0] / powers[1] == pytest.approx(1, abs=0.15)
    assert noise.sigma[-1] == pytest.approx(2 * noise.sigma[0], rel=0.15)


def test_matched_noise_refuses_lists_that_do_not_pair():
    with pytest.raises(DataError, match="pairs"):
        MatchedNoise.fit(textures(0, 2), textures(0, 1))


def test_dice_equals_a_loop_over_sets():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 3, (6, 7, 8)), rng.integers(0, 3, (6, 7, 8))
    for index, found in enumerate(dice(one, two, 4), start=1):
        a, b = ({tuple(p) for p in np.argwhere(m == index)} for m in (one, two))
        if a or b:
            assert found == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        else:
            assert np.isnan(found)


def test_segmentation_loss_ignores_padding():
    scores, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    mask = torch.ones(2, 4, 4, 4)
    mask[:, 2:] = 0
    other = scores.clone()
    other[:, :, 2:] += torch.randn(2, 3, 2, 4, 4)
    assert segmentation_loss(scores, labels, mask) == segmentation_loss(other, labels, mask)
    assert segmentation_loss(scores, labels, torch.ones_like(mask)) != segmentation_loss(scores, labels, mask)


def test_segmenter_learns_balls_and_repeats_itself():
    images, labels = balls(0, 12)
    model = train_segmenter(images, labels, 2, steps=60, seed=1)
    assert mean_dice(model, *balls(1, 4)) > 0.85
    assert segment(model, images[0]).shape == images[0].shape
    assert segmenter_features(model, images[:3]).shape == (3, 64)


def test_fine_features_see_blur_that_the_deepest_hardly_see():
    images, labels = balls(0, 40)
    yardstick = Yardstick(images[:10], images[10:20], labels[:10], train_segmenter(images, labels, 2, steps=30))
    same, blurred = (
        yardstick.measure(images[20:30]),
        yardstick.measure([ndimage.gaussian_filter(v, 0.8) for v in images[30:]]),
    )
    assert same.fid_segmenter_fine is not None
    assert blurred.fid_segmenter_fine is not None
    assert blurred.fid_segmenter_fine > 2 * same.fid_segmenter_fine
    assert same.fid_segmenter_fine_floor == blurred.fid_segmenter_fine_floor


def test_the_same_seed_trains_the_same_segmenter():
    images, labels = balls(0, 3)
    one, two = (train_segmenter(images, labels, 2, steps=2, seed=4) for _ in range(2))
    other = train_segmenter(images, labels, 2, steps=2, seed=5)
    assert np.array_equal(segmenter_features(one, images), segmenter_features(two, images))
    assert not np.array_equal(segmenter_features(one, images), segmenter_features(other, images))


def test_a_budget_of_cpu_seconds_ends():
    images, labels = balls(0, 2)
    begun = time.process_time()
    train_segmenter(images, labels, 2, cpu_seconds=0.5)
    spent = time.process_time() - begun
    assert 0.5 <= spent < 5  # a step takes a tenth of a second, a few on a machine under load


def test_a_budget_of_cpu_seconds_counts_cpu_time():
    begun = time.process_time()
    budget = Budget(cpu_seconds=100.0)
    time.sleep(0.3)
    assert budget.done(0, begun) < 0.002
    assert budget.done(0, begun - 50) == pytest.approx(0.5, abs=0.002)
    assert budget.done(0, begun - 100) >= 1


def test_more_than_256_classes_do_not_wrap():
    model = Segmenter(300).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[8 * 299 :] = 1
    assert (segment(model, np.zeros((9, 8, 10), np.float32)) == 299).all()


@pytest.mark.parametrize(("steps", "seconds"), [(None, None), (3, 1.0), (0, None), (None, -1.0)])
def test_refuses_a_budget_that_is_not_one_number_above_zero(steps: int | None, seconds: float | None):
    with pytest.raises(DataError, match="either"):
        Budget(steps, seconds)


def test_segmenter_has_about_600_thousand_weights():
    assert 5e5 < sum(p.numel() for p in Segmenter(3).parameters()) < 8e5
