"""Objectives: what the denoiser is asked to predict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Maps noisy latents [B, C, X, Y, Z] and times [B] to a velocity."""


def logit_normal_times(count: int, *, mean: float = 0.3, std: float = 1.0) -> Tensor:
    """Draw times in 0..1, dense in the middle, a little nearer to noise (1)."""
    return torch.sigmoid(torch.randn(count) * std + mean)


def rectified_flow_loss(velocity: Velocity, latents: Tensor, times: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """Return the masked squared error of the velocity from data (t=0) to noise (t=1).

    ``mask`` [B, 1, X, Y, Z] is 0 where latents stand for padding. Source: Liu et al., Flow Straight
    and Fast (arXiv 2209.03003), equation 1; times as in arXiv 2403.03206, section 3.1.
    """
    t = times.view(-1, 1, 1, 1, 1)
    noisy = torch.lerp(latents, noise, t)
    error = (velocity(noisy, times) - (noise - latents)).square()
    return (error * mask).sum() / (mask.sum() * latents.shape[1])
