"""Samplers: follow the learnt velocity from noise (t=1) to data (t=0)."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from medlsdm.diffusion.objectives import Velocity


def seeded_noise(seeds: list[int], shape: tuple[int, int, int, int]) -> Tensor:
    """Draw noise [B, C, X, Y, Z], each sample from its own seed, so that it does not depend on its batch."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def sample(velocity: Velocity, noise: Tensor, *, steps: int, method: Literal["euler", "heun"] = "heun") -> Tensor:
    """Integrate from ``noise`` to a sample in ``steps`` equal steps.

    Euler calls ``velocity`` once a step, Heun twice but for the last step.
    """
    times = torch.linspace(1.0, 0.0, steps + 1)
    x = noise
    for now, then in itertools.pairwise(times):
        slope = velocity(x, now.expand(len(x)))
        ahead = x + (then - now) * slope
        if method == "heun" and then > 0:
            slope = (slope + velocity(ahead, then.expand(len(x)))) / 2
            ahead = x + (then - now) * slope
        x = ahead
    return x


def guided(labelled: Velocity, unlabelled: Velocity, scale: float) -> Velocity:
    """Combine both halves of classifier-free guidance; a scale of 1 calls the first one only.

    Source: Ho and Salimans (arXiv 2207.12598), equation 6.
    """
    if scale == 1.0:
        return labelled

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        without = unlabelled(x, times)
        return without + scale * (labelled(x, times) - without)

    return velocity
