"""Quantisers: how stage 1 turns encoder outputs into codes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class FiniteScalar(nn.Module):
    """Round each channel to its own number of levels; there is no codebook to collapse or to leak.

    Source: Mentzer et al., Finite Scalar Quantization (arXiv 2309.15505), appendix A.1.
    """

    reach: Tensor
    offset: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        count = torch.tensor(levels, dtype=torch.float32).view(1, -1, 1, 1, 1)
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        half = (count - 1) * 0.5005
        self.register_buffer("reach", half, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", torch.atanh(offset / half), persistent=False)
        self.register_buffer("scale", torch.floor(count / 2), persistent=False)

    def bound(self, latents: Tensor) -> Tensor:
        """Squeeze encoder outputs [B, C, X, Y, Z] smoothly into about -1..1, before rounding."""
        latents = latents.float()
        return (torch.tanh(latents + self.shift) * self.reach - self.offset) / self.scale

    def forward(self, bounded: Tensor) -> Tensor:
        """Round to the nearest level; the gradient passes straight through."""
        steps = bounded.float() * self.scale
        lowest, highest = -self.reach.floor() - 2 * self.offset, self.reach.floor()
        codes = torch.maximum(torch.minimum(steps.round(), highest), lowest)
        return (steps + (codes - steps).detach()) / self.scale


class NoQuantiser(nn.Module):
    """Leave latents continuous."""

    def bound(self, latents: Tensor) -> Tensor:
        """Return the latents as float32."""
        return latents.float()

    def forward(self, bounded: Tensor) -> Tensor:
        """Return the latents unchanged."""
        return bounded


def build_quantiser(kind: Literal["fsq", "none"], levels: tuple[int, ...]) -> FiniteScalar | NoQuantiser:
    """Return the quantiser that a preset names."""
    return FiniteScalar(levels) if kind == "fsq" else NoQuantiser()
