"""The semantic denoiser of stage 2: a 3D U-Net over latents, guided by a label map through SPADE."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import DenoiserConfig, Preset
from medlsdm.models.layers import Triple, conv, group_norm
from medlsdm.models.spade import LabelPyramid, Modulation, SpadeHead, modulate
from medlsdm.types import Modality

MODALITIES = tuple(Modality)


@dataclass(frozen=True, slots=True)
class LabelGuidance:
    """Hold what the network knows of a label map: computed once, used at every step."""

    entry: Tensor
    modulations: tuple[tuple[Modulation, Modulation], ...]


class Block(nn.Module):
    """Add what two convolutions find, told the time and, with SPADE, the labels."""

    def __init__(self, inputs: int, outputs: int, config: DenoiserConfig, *, spade: bool) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs, affine=not spade)
        self.norm2 = group_norm(outputs, affine=not spade)
        self.conv1, self.conv2 = conv(inputs, outputs), conv(outputs, outputs, zero=True)
        self.condition = nn.Linear(config.embedding_width, 2 * outputs)
        self.skip = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.heads = nn.ModuleList(SpadeHead(config.label_width, c) for c in (inputs, outputs)) if spade else None

    def guide(self, activation: Tensor) -> tuple[Modulation, Modulation]:
        """Return the modulations of both norms for one label activation."""
        assert self.heads is not None
        return self.heads[0](activation), self.heads[1](activation)

    def forward(self, x: Tensor, embedding: Tensor, guides: tuple[Modulation, Modulation] | None) -> Tensor:
        """Return the block's output; ``guides`` come from ``guide``."""
        h = self.norm1(x)
        h = self.conv1(functional.silu(modulate(h, guides[0]) if guides else h))
        h = self.norm2(h)
        h = modulate(h, guides[1]) if guides else h
        scale, shift = self.condition(embedding)[:, :, None, None, None].chunk(2, dim=1)
        h = self.conv2(functional.silu(torch.addcmul(shift, h, scale + 1)))
        return self.skip(x) + h


class SemanticUNet(nn.Module):
    """Predict the velocity of noisy latents under a label map, a modality and a spacing.

    Any latent size works: a scale that does not divide by two is rounded up and cropped on the way back.
    ``strides`` is the autoencoder's compression, so that full-resolution labels meet the latents.

    Source: Med-LSDM (arXiv 2507.00206), stage 2; SPADE in the middle and the decoder.
    """

    def __init__(self, config: DenoiserConfig, latent_channels: int, strides: Triple, n_classes: int) -> None:
        super().__init__()
        self.config, self.strides, self.n_classes = config, strides, n_classes
        widths = config.channels
        scales: list[Triple] = []
        for level in range(len(widths)):
            x, y, z = (s * 2**level for s in strides)
            scales.append((x, y, z))
        self.labels = LabelPyramid(n_classes, config.label_width, tuple(scales))
        self.embed = nn.Sequential(
            nn.Linear(32 + 3 + len(MODALITIES), config.embedding_width),
            nn.SiLU(),
            nn.Linear(config.embedding_width, config.embedding_width),
            nn.SiLU(),
        )
        self.stem = conv(latent_channels + config.label_width, widths[0])
        self.down = nn.ModuleList(
            nn.ModuleList(Block(w, w, config, spade=False) for _ in range(config.blocks)) for w in widths[:-1]
        )
        pairs = list(itertools.pairwise(widths))
        self.shrink = nn.ModuleList(conv(a, b, stride=2) for a, b in pairs)
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], config, spade=True) for _ in range(config.blocks + 1))
        self.grow = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ModuleList(Block(w * (2 if i == 0 else 1), w, config, spade=True) for i in range(config.blocks))
            for w in widths[:-1]
        )
        self.out_norm = group_norm(widths[0])
        self.out = conv(widths[0], latent_channels, zero=True)

    def prepare_labels(self, one_hot: Tensor) -> LabelGuidance:
        """Compute once all that depends on ``one_hot`` [B, K, X, Y, Z] (full resolution) alone.

        A map that is all zero stands for "no labels": the other half of classifier-free guidance.
        """
        activations = self.labels(one_hot)
        modulations = [block.guide(activations[-1]) for block in self.middle]  # type: ignore[operator]
        for level in reversed(range(len(self.up))):
            modulations += [block.guide(activations[level]) for block in self.up[level]]  # type: ignore[operator]
        return LabelGuidance(activations[0], tuple(modulations))

    def forward(
        self, latents: Tensor, times: Tensor, labels: LabelGuidance, spacing: Tensor, modality: Tensor
    ) -> Tensor:
        """Return the velocity [B, C, X, Y, Z].

        Args:
            latents: Noisy standardised latents.
            times: [B], 0 is data and 1 is noise.
            labels: From ``prepare_labels``; batch B.
            spacing: [B, 3] in mm.
            modality: [B], index into ``MODALITIES``.
        """
        kind = functional.one_hot(modality, len(MODALITIES)).to(spacing.dtype)
        embedding = self.embed(torch.cat([time_features(times), spacing.log(), kind], dim=1))
        guides = iter(labels.modulations)
        h = self.stem(torch.cat([latents.to(labels.entry.dtype), labels.entry], dim=1))
        skips: list[Tensor] = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding, None)
            skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, embedding, next(guides))
        for level in reversed(range(len(self.up))):
            skip = skips.pop()
            x, y, z = skip.shape[2:]
            h = functional.interpolate(self.grow[level](h), scale_factor=2.0, mode="nearest")[:, :, :x, :y, :z]
            h = torch.cat([h, skip], dim=1)
            for block in self.up[level]:  # type: ignore[attr-defined]
                h = block(h, embedding, next(guides))
        return self.out(functional.silu(self.out_norm(h))).float()


def time_features(times: Tensor) -> Tensor:
    """Return 32 sines and cosines of times in 0..1."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), 16, device=times.device))
    angles = times[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_denoiser(preset: Preset, n_classes: int) -> SemanticUNet:
    """Return the untrained denoiser of a preset."""
    auto = preset.autoencoder
    return SemanticUNet(preset.denoiser, auto.latent_channels, auto.strides, n_classes)
