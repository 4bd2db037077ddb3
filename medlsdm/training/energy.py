"""The energy score of drawn textures: a proper score, seen through fresh random filters.

Two draws for one real crop are compared with it. Each filter's responses are scored by
E|a - y| - E|a - b| / 2, which is least only when draws and reality have one distribution; over all filters
that pins the distribution of whole patches down. It is a mean over patients, with no second network to
collapse and no statistics of the data.

Source: Gneiting and Raftery, Strictly Proper Scoring Rules (JASA 2007), section 4.3; generative networks
trained so: Pacchiardi et al. (arXiv 2112.08217).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medlsdm.training.loop import autocast

FILTERS = 32
GROUP = 4
"""Responses that are scored as one vector, so that what goes together is seen together."""

VOXEL_WEIGHT = 0.3
CURVED_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Probe:
    """Say what random filters look at: ``kernel`` voxels wide, at every ``stride``-th place, halved first or not.

    ``sharp`` filters have the mean of their surroundings taken out, so that they see the finest grain.
    """

    kernel: int
    stride: int
    halved: bool = False
    sharp: bool = False


PROBES = (Probe(3, 2, sharp=True), Probe(5, 3), Probe(5, 3, sharp=True), Probe(5, 2, halved=True))


def energy_score(first: Tensor, second: Tensor, real: Tensor, group: int = 1) -> Tensor:
    """Return the energy score of two draws against reality, over its size for typical values.

    Args:
        first: Responses [B, F, ...] of one draw.
        second: Responses of another draw for the same input.
        real: Responses of the real crop.
        group: So many neighbouring responses are one vector; F is a multiple.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if group == 1:
            return (a - b).abs()
        return ((a - b).unflatten(1, (-1, group)).square().sum(2) + 1e-8).sqrt()

    score = 0.5 * (distance(first, real) + distance(second, real)) - 0.5 * distance(first, second)
    axes = (0, *range(2, real.ndim))
    size = distance(real, real.mean(axes, keepdim=True)).mean(axes, keepdim=True).detach()
    return (score / (size + 1e-4)).mean()


def texture_score(first: Tensor, second: Tensor, real: Tensor, smooth: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the mean energy score through fresh random filters, linear and curved, and by voxel.

    All tensors are [B, 1, X, Y, Z]. Linear filters look at what is left of ``smooth``.
    """
    volumes = torch.cat([first, second, real])
    residuals = volumes - torch.cat([smooth] * 3)
    total = VOXEL_WEIGHT * _score(residuals, 1)
    with autocast(real.device):
        for probe in PROBES:
            total = total + _score(_look(residuals, probe, rng), GROUP) / len(PROBES)
        return total + CURVED_WEIGHT * _score(_look_curved(volumes, rng), GROUP)


def _score(responses: Tensor, group: int) -> Tensor:
    first, second, real = responses.float().chunk(3)
    return energy_score(first, second, real, group)


def _filters(inputs: int, outputs: int, kernel: int, device: torch.device, *, sharp: bool = False) -> Tensor:
    """Draw filters of unit length."""
    filters = torch.randn(outputs, inputs, kernel, kernel, kernel)
    if sharp:
        filters = filters - functional.avg_pool3d(filters, 3, 1, 1, count_include_pad=False)
    return (filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)).to(device)


def _shift(volumes: Tensor, stride: int, rng: np.random.Generator) -> Tensor:
    """Begin at a random place below ``stride``, so that strided filters see every place in time."""
    x, y, z = (int(n) for n in rng.integers(stride, size=3))
    return volumes[:, :, x:, y:, z:]


def _look(residuals: Tensor, probe: Probe, rng: np.random.Generator) -> Tensor:
    if probe.halved:
        residuals = functional.avg_pool3d(_shift(residuals, 2, rng), 2)
    kernel = min(probe.kernel, *(n - probe.stride + 1 for n in residuals.shape[2:]))
    filters = _filters(1, FILTERS, kernel, residuals.device, sharp=probe.sharp)
    return functional.conv3d(_shift(residuals, probe.stride, rng), filters, stride=probe.stride)


def _look_curved(volumes: Tensor, rng: np.random.Generator) -> Tensor:
    """Look through two layers with a bend between: sees how grain goes with brightness and edges."""
    device = volumes.device
    hidden = functional.conv3d(_shift(volumes, 2, rng), 2 * _filters(1, 16, 3, device))
    hidden = _shift(functional.leaky_relu(hidden, 0.2), 2, rng)
    return functional.conv3d(hidden, _filters(16, FILTERS, 3, device), stride=3)
