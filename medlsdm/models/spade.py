"""Spatially adaptive normalisation by label map (SPADE), cheap and computed once per map.

Source: Park et al., Semantic Image Synthesis with Spatially-Adaptive Normalization (arXiv 1903.07291).
Unlike there, one 3x3x3 convolution a scale is shared by all norms, and each norm adds a 1x1x1 head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.models.layers import Triple, conv, space_to_depth

SLAB_BYTES = 64 * 2**20

Modulation = tuple[Tensor, Tensor]
"""gamma and beta of one norm, [B, C, X, Y, Z]; they depend on the label map alone."""


def one_hot(labels: Tensor, n_classes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn class indices [B, X, Y, Z] into one-hot [B, K, X, Y, Z]. An index outside is unlabelled: all zero."""
    classes = torch.arange(n_classes, device=labels.device).view(1, -1, 1, 1, 1)
    if n_classes <= torch.iinfo(labels.dtype).max:
        classes = classes.to(labels.dtype)  # comparing small integers is several times faster
    return (labels.unsqueeze(1) == classes).to(dtype)


class LabelPyramid(nn.Module):
    """Embed a label map at several scales, each a multiple of the stride before it.

    Classes are pooled by area to half the scale's stride and folded into channels, so that a lesion
    of three voxels and a border inside a latent voxel both survive.
    """

    def __init__(self, n_classes: int, width: int, strides: tuple[Triple, ...]) -> None:
        super().__init__()
        self.n_classes, self.strides = n_classes, strides
        folds = [tuple(min(2, s) for s in stride) for stride in strides]
        self.folds: list[Triple] = [(x, y, z) for x, y, z in folds]
        self.embed = nn.ModuleList(nn.Conv3d(n_classes * x * y * z, width, 1) for x, y, z in self.folds)
        self.mix = nn.ModuleList(conv(width, width) for _ in strides)

    def forward(self, labels: Tensor, keep: Tensor | None = None, *, slab_bytes: int = SLAB_BYTES) -> list[Tensor]:
        """Return one activation [B, width, ...] for each scale.

        Args:
            labels: Full resolution: class indices [B, X, Y, Z], where an index outside is unlabelled, or
                one-hot [B, K, X, Y, Z]. Indices never become one-hot as a whole, but slab by slab.
            keep: [B, K], 0 for each class that shall count as unlabelled.
            slab_bytes: How large the one-hot of a slab may be.
        """
        hidden = [torch.cat(parts, dim=2) for parts in zip(*self._slabs(labels, keep, slab_bytes), strict=True)]
        return self._mix(hidden)

    def null(self, batch: int, size: Triple) -> list[Tensor]:
        """Return the activations of a map of ``size`` voxels in which nothing is labelled."""
        hidden = []
        for stride, embed in zip(self.strides, self.embed, strict=True):
            assert isinstance(embed, nn.Conv3d)
            voxel = functional.silu(embed(embed.weight.new_zeros(batch, embed.in_channels, 1, 1, 1)))
            hidden.append(voxel.expand(-1, -1, *(-(-n // s) for n, s in zip(size, stride, strict=True))))
        return self._mix(hidden)

    def _mix(self, hidden: list[Tensor]) -> list[Tensor]:
        return [functional.silu(mix(h)) for mix, h in zip(self.mix, hidden, strict=True)]

    def _slabs(self, labels: Tensor, keep: Tensor | None, slab_bytes: int) -> Iterator[list[Tensor]]:
        """Embed slabs along x; each is as thick as the coarsest stride, or a multiple of it."""
        coarsest = self.strides[-1]
        nx, ny, nz = labels.shape[-3:]
        plane_bytes = 4 * len(labels) * self.n_classes * ny * nz
        thickness = max(1, slab_bytes // (plane_bytes * coarsest[0])) * coarsest[0]
        for start in range(0, nx, thickness):
            slab = labels[..., start : start + thickness, :, :]
            size = slab.shape[-3:]
            fractions = _repeat_to(slab, coarsest)
            hidden, pooled = [], (1, 1, 1)
            for stride, fold, embed in zip(self.strides, self.folds, self.embed, strict=True):
                pool = [s // f for s, f in zip(stride, fold, strict=True)]
                fractions = self._pool(fractions, [now // was for now, was in zip(pool, pooled, strict=True)])
                folded = space_to_depth(fractions, fold)
                if keep is not None:
                    classes = keep.to(folded.dtype).repeat_interleave(folded.shape[1] // self.n_classes, dim=1)
                    folded = folded * classes[:, :, None, None, None]
                x, y, z = (-(-n // s) for n, s in zip(size, stride, strict=True))
                hidden.append(functional.silu(embed(folded))[:, :, :x, :y, :z])
                pooled = pool
            yield hidden

    def _pool(self, labels: Tensor, factor: list[int]) -> Tensor:
        """Return class fractions [B, K, ...] of blocks, from indices or from finer fractions."""
        if labels.ndim == 5:
            return functional.avg_pool3d(labels, factor) if max(factor) > 1 else labels
        counts = one_hot(labels, self.n_classes, dtype=torch.uint8)
        for dim, parts in zip((2, 3, 4), factor, strict=True):
            strided = [counts[(slice(None),) * dim + (slice(part, None, parts),)] for part in range(parts)]
            counts = reduce(torch.add, strided)
        return counts / float(math.prod(factor))


def _repeat_to(labels: Tensor, multiple: Triple) -> Tensor:
    """Repeat the last voxel of each axis until it is a multiple."""
    for dim, m in zip((-3, -2, -1), multiple, strict=True):
        short = -labels.shape[dim] % m
        if short:
            labels = torch.cat([labels, *[labels.narrow(dim, -1, 1)] * short], dim=dim)
    return labels


def cut_activations(activations: list[Tensor], start: Triple, size: Triple) -> list[Tensor]:
    """Cut a window out of a pyramid whose scales halve.

    ``start`` and ``size`` are in voxels of the finest scale; ``start`` is a multiple of the coarsest one's.
    """
    windows = []
    for level, activation in enumerate(activations):
        cuts = (slice(a >> level, -(-(a + n) // 2**level)) for a, n in zip(start, size, strict=True))
        windows.append(activation[(..., *cuts)])
    return windows


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
