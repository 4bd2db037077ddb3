"""Objectives: how noise is mixed into latents, and what the denoiser is asked to predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medlsdm.config import ObjectiveConfig

Network = Callable[[Tensor, Tensor], Tensor]
"""Maps noisy latents [B, C, X, Y, Z] and times [B] to what the objective asks for."""

LARGEST_ANGLE = math.atan(math.exp(4.5))
"""Where the cosine schedule ends: a log signal-to-noise ratio of -9, so that data can still be told from noise."""

SHIFT_EXPONENT = 1 / 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold what one call says about noisy latents: the data, the noise, and the slope of the path through time."""

    data: Tensor
    noise_pred: Tensor
    velocity: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """Mix noise into data and take it apart again; time 0 is data, time 1 is noise.

    ``flow`` draws straight lines between both and predicts their slope; ``v`` and ``epsilon`` go along
    a quarter of a circle (the cosine schedule).

    Source: Liu et al. (arXiv 2209.03003), equation 1, for ``flow``; Salimans and Ho (arXiv 2202.00512),
    appendix D, for ``v``; Ho et al. (arXiv 2006.11239), equation 14, for ``epsilon``.
    """

    config: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of data and of noise at ``times``, of the same shape."""
        if self.config.kind == "flow":
            return 1 - times, times
        angles = times * LARGEST_ANGLE
        return angles.cos(), angles.sin()

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return latents at ``times`` [B]."""
        signal, sigma = self.levels(_per_sample(times))
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what the network should say of ``noisy(latents, noise, times)``."""
        if self.config.kind == "flow":
            return noise - latents
        if self.config.kind == "epsilon":
            return noise
        signal, sigma = self.levels(_per_sample(times))
        return signal * noise - sigma * latents

    def estimate(self, output: Tensor, noisy: Tensor, times: Tensor) -> Estimate:
        """Turn a network's output for ``noisy`` at ``times`` [B] into data, noise and velocity."""
        signal, sigma = self.levels(_per_sample(times))
        if self.config.kind == "flow":
            return Estimate(noisy - sigma * output, noisy + signal * output, output)
        if self.config.kind == "epsilon":
            data, noise_pred = (noisy - sigma * output) / signal, output
        else:
            data, noise_pred = signal * noisy - sigma * output, sigma * noisy + signal * output
        return Estimate(data, noise_pred, LARGEST_ANGLE * (signal * noise_pred - sigma * data))

    def draw_times(self, count: int, voxels: int) -> Tensor:
        """Draw training times [B] from torch's generator, spread evenly over the batch.

        A flow's are logit-normal: dense in the middle, a little nearer to noise. ``voxels`` is the size of
        a latent volume: the larger, the more noise it takes to hide the same content.

        Source: Esser et al. (arXiv 2403.03206), section 3.1; spread: Kingma et al. (arXiv 2107.00630), appendix I.1.
        """
        places = (torch.randperm(count) + torch.rand(count)) / count
        if self.config.kind == "flow":
            places = torch.sigmoid(torch.special.ndtri(places.clamp(1e-4, 1 - 1e-4)) + 0.3)
        reference = self.config.reference_voxels
        return places if reference is None else shift_times(places, (voxels / reference) ** SHIFT_EXPONENT)

    def loss(self, output: Tensor, latents: Tensor, noise: Tensor, times: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted mean error; ``weight`` [B, 1, X, Y, Z] is 0 where latents stand for padding."""
        error = output - self.target(latents, noise, times)
        error = error.abs() if self.config.loss == "l1" else error.square()
        shares = self._snr_weight(times) * weight
        return (error * shares).sum() / (weight.sum() * latents.shape[1])

    def _snr_weight(self, times: Tensor) -> Tensor:
        """Return the weight of each time. Source: Hang et al. (arXiv 2303.09556), section 3.4."""
        if self.config.min_snr is None or self.config.kind == "flow":
            return _per_sample(torch.ones_like(times))
        signal, sigma = self.levels(_per_sample(times))
        snr = (signal / sigma.clamp_min(1e-4)).square()
        return snr.clamp_max(self.config.min_snr) / (snr + (1 if self.config.kind == "v" else 0))


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Move times towards noise by a ``shift`` above 1, leaving 0 and 1 where they are.

    Source: Esser et al. (arXiv 2403.03206), equation 23.
    """
    return shift * times / (1 + (shift - 1) * times)


def _per_sample(times: Tensor) -> Tensor:
    return times.view(-1, 1, 1, 1, 1)
