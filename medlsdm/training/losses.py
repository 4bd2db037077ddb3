"""Losses of stage 1 on reconstructions. ``mask`` is 1 on real voxels and 0 on padding, which never counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from medlsdm.config import Stage1Losses
from medlsdm.models.perceptual import FeatureNetwork, perceptual_distance

SSIM_CONSTANTS = 0.01, 0.03
AXES = 2, 3, 4


def reconstruction_loss(
    rebuilt: Tensor,
    volumes: Tensor,
    mask: Tensor,
    weights: Stage1Losses = Stage1Losses(),  # noqa: B008 (frozen)
    features: FeatureNetwork | None = None,
) -> Tensor:
    """Return the weighted sum of what ``weights`` asks for; ``features`` serves the perceptual term."""
    error = rebuilt - volumes
    loss = rebuilt.new_zeros(())
    if weights.l1:
        loss = loss + weights.l1 * masked_mean(error.abs(), mask)
    if weights.mse:
        loss = loss + weights.mse * masked_mean(error.square(), mask)
    if weights.gradient:
        loss = loss + weights.gradient * gradient_difference(error, mask)
    if weights.ssim:
        loss = loss + weights.ssim * (1 - ssim(rebuilt, volumes, mask))
    if weights.perceptual:
        assert features is not None
        loss = loss + weights.perceptual * perceptual_distance(features, hide_padding(rebuilt, volumes, mask), volumes)
    return loss


def hide_padding(rebuilt: Tensor, volumes: Tensor, mask: Tensor) -> Tensor:
    """Return the reconstruction with the padding of ``volumes``, so that no network sees a difference there."""
    return torch.where(mask > 0, rebuilt, volumes)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``mask`` is 1; zero where it is 1 nowhere."""
    return (values * mask).sum() / mask.expand_as(values).sum().clamp_min(1)


def gradient_difference(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute difference of the steps between neighbours, over three axes.

    The difference of gradients is the gradient of the difference, so the ``error`` alone is needed.
    """
    total = error.new_zeros(())
    for axis in AXES:
        both = mask.narrow(axis, 1, mask.shape[axis] - 1)
        total = total + masked_mean(error.diff(dim=axis).abs(), both)
    return total / len(AXES)


def ssim(first: Tensor, second: Tensor, mask: Tensor, *, window: int = 7, data_range: float = 2.0) -> Tensor:
    """Return the mean structural similarity over windows that lie wholly where ``mask`` is 1.

    With a mask of ones it equals scikit-image's mean with its default uniform window.
    The window shrinks on axes shorter than it. Where no window fits the mask, 1 is returned.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (2004).
    """
    size = [min(window, n) for n in first.shape[2:]]
    count = size[0] * size[1] * size[2]
    whole = _box(mask, size) > 1 - 0.5 / count
    if not whole.any():
        return first.sum() * 0 + 1
    first, second = first.float(), second.float()
    maps = torch.cat([first, second, first * first, second * second, first * second], dim=1)
    mean1, mean2, square1, square2, product = _box(maps, size).chunk(5, dim=1)
    unbiased = count / max(1, count - 1)
    variance1 = unbiased * (square1 - mean1 * mean1)
    variance2 = unbiased * (square2 - mean2 * mean2)
    covariance = unbiased * (product - mean1 * mean2)
    c1, c2 = ((k * data_range) ** 2 for k in SSIM_CONSTANTS)
    similar = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    similar = similar / ((mean1 * mean1 + mean2 * mean2 + c1) * (variance1 + variance2 + c2))
    return masked_mean(similar, whole.to(similar.dtype))


def _box(x: Tensor, size: list[int]) -> Tensor:
    """Return the means over boxes, as differences of running sums: three times faster than pooling."""
    for axis, n in zip(AXES, size, strict=True):
        before = [0, 0] * (AXES[-1] - axis) + [1, 0]
        sums = functional.pad(x.cumsum(axis), before)
        windows = sums.shape[axis] - n
        x = (sums.narrow(axis, n, windows) - sums.narrow(axis, 0, windows)) / n
    return x
