"""Bring the statistics of synthetic patches to those of real ones: what a linear classifier would go by.

The energy score teaches texture given a real volume's latents. Synthetic latents are a little off, and no
real volume belongs to them; but their patches should have the statistics of real patches.

Source: dos Santos et al., Learning Implicit Generative Models by Matching Perceptual Features
(arXiv 1904.02762), with moving averages; here whitened, which is a linear classifier in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.training.loop import autocast

FILTERS = (24, 16, 24)
SEED = 4242
RIDGE = 0.1
MEMORY = 0.99
FLOOR = 4.0
"""Below this squared distance, which is about what chance leaves, the pull fades."""


class PatchCritic(nn.Module):
    """Compare patches by mean, spread and kurtosis of fixed random filters' responses.

    Its buffers hold the real patches' statistics, which describe patients: it stays at the site.
    """

    real_mean: Tensor
    scale: Tensor
    inverse: Tensor
    mean: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        one, two, three = FILTERS
        shapes = {"near": (one, 1, 3, 3, 3), "wide": (two, 1, 5, 5, 5), "curved": (three, one, 3, 3, 3)}
        for name, shape in shapes.items():
            filters = torch.randn(shape, generator=generator)
            if name != "curved":
                filters = filters - filters.mean((1, 2, 3, 4), keepdim=True)
            filters = filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            self.register_buffer(name, filters, persistent=False)
        features = 3 * sum(FILTERS)
        for name in ("real_mean", "scale", "mean"):
            self.register_buffer(name, torch.zeros(features))
        self.register_buffer("inverse", torch.eye(features))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def learn(self, real: Iterable[Tensor]) -> None:
        """Take in the statistics of real crops [B, 1, X, Y, Z] in -1..1, and forget the synthetic ones."""
        rows = torch.cat([self.statistics(volumes) for volumes in real]).double()
        standard = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
        ridge = RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.real_mean.copy_(rows.mean(0))
        self.scale.copy_(rows.std(0) + 1e-6)
        self.inverse.copy_(torch.linalg.inv(standard.T @ standard / len(rows) + ridge))
        self.mean.zero_()
        self.weight.zero_()

    def statistics(self, volumes: Tensor) -> Tensor:
        """Return one row [2 B, F] for each half of each crop."""
        axis = 2 + max(range(3), key=lambda a: volumes.shape[2 + a])
        half = volumes.shape[axis] // 2
        patches = torch.cat([volumes.narrow(axis, 0, half), volumes.narrow(axis, half, half)])
        near, wide, curved = self.get_buffer("near"), self.get_buffer("wide"), self.get_buffer("curved")
        with autocast(volumes.device):
            first = functional.conv3d(patches, near)
            responses = (
                first,
                functional.conv3d(patches, wide, stride=2),
                functional.conv3d(functional.leaky_relu(first, 0.2), curved, stride=2),
            )
        columns = []
        for response in responses:
            flat = response.float().flatten(2)
            centred = flat - flat.mean(2, keepdim=True)
            variance = centred.square().mean(2)
            kurtosis = centred.pow(4).mean(2) / (variance.square() + 1e-8)
            columns += [flat.mean(2), 0.5 * (variance + 1e-8).log(), kurtosis.clamp_max(30).log1p()]
        return torch.cat(columns, dim=1)

    def pull(self, synthetic: Tensor) -> Tensor:
        """Return a loss whose gradient brings synthetic crops [B, 1, X, Y, Z] nearer to the real ones.

        Follows the mean of their statistics; 0 until it knows enough of them.
        """
        rows = (self.statistics(synthetic) - self.real_mean) / self.scale
        with torch.no_grad():
            self.mean.lerp_(rows.detach().mean(0), 1 - MEMORY)
            self.weight.lerp_(torch.ones_like(self.weight), 1 - MEMORY)
            distance = self.mean / self.weight
            direction = self.inverse @ distance
            squared = float(distance @ direction)
        known = float(self.weight) > 0.05
        return (rows.mean(0) @ direction) / (squared + FLOOR) ** 0.5 if known else rows.sum() * 0
