"""Spatially adaptive normalisation by label map (SPADE), cheap and computed once per map.

Source: Park et al., Semantic Image Synthesis with Spatially-Adaptive Normalization (arXiv 1903.07291).
Unlike there, one 3x3x3 convolution a scale is shared by all norms, and each norm adds a 1x1x1 head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.models.layers import Triple, conv, space_to_depth

Modulation = tuple[Tensor, Tensor]
"""gamma and beta of one norm, [B, C, X, Y, Z]; they depend on the label map alone."""


def one_hot(labels: Tensor, n_classes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn class indices [B, X, Y, Z] into one-hot [B, K, X, Y, Z]. An index outside is unlabelled: all zero."""
    classes = torch.arange(n_classes, device=labels.device).view(1, -1, 1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


class LabelPyramid(nn.Module):
    """Embed a one-hot map at several scales, each a multiple of the stride before it.

    Classes are pooled by area to half the scale's stride and folded into channels, so that a lesion
    of three voxels and a border inside a latent voxel both survive.
    """

    def __init__(self, n_classes: int, width: int, strides: tuple[Triple, ...]) -> None:
        super().__init__()
        self.strides = strides
        folds = [tuple(min(2, s) for s in stride) for stride in strides]
        self.folds: list[Triple] = [(x, y, z) for x, y, z in folds]
        self.embed = nn.ModuleList(nn.Conv3d(n_classes * x * y * z, width, 1) for x, y, z in self.folds)
        self.mix = nn.ModuleList(conv(width, width) for _ in strides)

    def forward(self, labels: Tensor) -> list[Tensor]:
        """Return one activation [B, width, ...] for each scale of ``labels`` [B, K, X, Y, Z]."""
        activations = []
        for stride, fold, embed, mix in zip(self.strides, self.folds, self.embed, self.mix, strict=True):
            pool = [s // f for s, f in zip(stride, fold, strict=True)]
            short = [-n % s for n, s in zip(labels.shape[2:], stride, strict=True)]
            pads = [p for n in reversed(short) for p in (0, n)]
            padded = functional.pad(labels, pads, mode="replicate") if any(short) else labels
            pooled = functional.avg_pool3d(padded, pool) if max(pool) > 1 else padded
            hidden = functional.silu(embed(space_to_depth(pooled, fold)))
            activations.append(functional.silu(mix(hidden)))
        return activations


class SpadeHead(nn.Module):
    """Turn a label activation into gamma and beta for one norm; starts as the identity."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.project = conv(width, 2 * channels, kernel=1, zero=True)

    def forward(self, activation: Tensor) -> Modulation:
        """Return gamma (as 1 + gamma) and beta."""
        gamma, beta = self.project(activation).chunk(2, dim=1)
        return gamma + 1, beta


def modulate(normalised: Tensor, modulation: Modulation) -> Tensor:
    """Scale and shift what a norm returned."""
    return torch.addcmul(modulation[1], normalised, modulation[0])
