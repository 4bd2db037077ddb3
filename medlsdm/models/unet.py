"""The semantic denoiser of stage 2: a 3D U-Net over latents, guided by a label map through SPADE."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import DenoiserConfig, Preset
from medlsdm.models.attention import Attention
from medlsdm.models.layers import ChannelNorm, Triple, conv, group_norm
from medlsdm.models.spade import LabelPyramid, Modulation, SpadeHead, modulate
from medlsdm.types import Modality

MODALITIES = tuple(Modality)

ANY_MODALITY = -1
"""Stands for "not told" in place of an index into ``MODALITIES``."""

WHOLE_VOLUME = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
"""The position of a crop that is the whole volume: its start, then its extent, as fractions of each axis."""


@dataclass(frozen=True, slots=True)
class LabelGuidance:
    """Hold what the network knows of a label map: computed once, used at every step."""

    entry: Tensor
    modulations: tuple[tuple[Modulation, Modulation], ...]


class Block(nn.Module):
    """Add what two convolutions find, told the time and, with SPADE, the labels; then attend, if asked."""

    def __init__(self, inputs: int, outputs: int, config: DenoiserConfig, *, spade: bool, attend: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (norm_layer(config, c, affine=not spade) for c in (inputs, outputs))
        self.conv1, self.conv2 = conv(inputs, outputs), conv(outputs, outputs, zero=True)
        self.condition = nn.Linear(config.embedding_width, 2 * outputs)
        self.skip = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.heads = nn.ModuleList(SpadeHead(config.label_width, c) for c in (inputs, outputs)) if spade else None
        self.attention = Attention(outputs) if attend else None

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
        h = self.skip(x) + self.conv2(functional.silu(torch.addcmul(shift, h, scale + 1)))
        return self.attention(h) if self.attention is not None else h


class SemanticUNet(nn.Module):
    """Predict what the objective asks of noisy latents, under a label map and global conditions.

    Any latent size works: a scale that does not divide by two is rounded up and cropped on the way back.
    ``strides`` is the autoencoder's compression, so that full-resolution labels meet the latents.

    Source: Med-LSDM (arXiv 2507.00206), stage 2; SPADE in the middle and the decoder.
    """

    def __init__(self, config: DenoiserConfig, latent_channels: int, strides: Triple, n_classes: int) -> None:
        super().__init__()
        self.config, self.strides, self.n_classes = config, strides, n_classes
        widths, levels = config.channels, range(len(config.channels))
        attend = [level >= len(widths) - config.attention for level in levels]
        scales: list[Triple] = []
        for level in levels:
            x, y, z = (s * 2**level for s in strides)
            scales.append((x, y, z))
        self.labels = LabelPyramid(n_classes, config.label_width, tuple(scales))
        self.embed = nn.Sequential(
            nn.Linear(32 + 3 + len(WHOLE_VOLUME) + len(MODALITIES), config.embedding_width),
            nn.SiLU(),
            nn.Linear(config.embedding_width, config.embedding_width),
            nn.SiLU(),
        )
        self.stem = conv(latent_channels + config.label_width, widths[0])
        self.down = nn.ModuleList(
            nn.ModuleList(Block(w, w, config, spade=False, attend=a) for _ in range(config.blocks))
            for w, a in zip(widths[:-1], attend, strict=False)
        )
        pairs = list(itertools.pairwise(widths))
        self.shrink = nn.ModuleList(conv(a, b, stride=2) for a, b in pairs)
        self.middle = nn.ModuleList(
            Block(widths[-1], widths[-1], config, spade=True, attend=attend[-1] and i < config.blocks)
            for i in range(config.blocks + 1)
        )
        self.grow = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ModuleList(
                Block(w * (2 if i == 0 else 1), w, config, spade=True, attend=a) for i in range(config.blocks)
            )
            for w, a in zip(widths[:-1], attend, strict=False)
        )
        self.out_norm = norm_layer(config, widths[0], affine=True)
        self.out = conv(widths[0], latent_channels, zero=True)

    @property
    def receptive_field(self) -> int | None:
        """Return how many latent voxels to each side can matter to an output voxel; None means all of them.

        Latents and labels cut at multiples of ``2 ** (levels - 1)`` latent voxels, with this many to spare,
        give the values that the whole gives.
        """
        if self.config.attention or self.config.norm == "group":
            return None
        blocks, levels = self.config.blocks, len(self.config.channels)
        # At each scale: the blocks of both ways, the way down, and nearest neighbours on the way up.
        reach = sum((4 * blocks + 2) * 2**level for level in range(levels - 1))
        ends = 3  # the first and the last convolution, and the one that mixes labels
        return ends + reach + 2 * (blocks + 1) * 2 ** (levels - 1)

    def prepare_labels(self, labels: Tensor, keep: Tensor | None = None) -> LabelGuidance:
        """Compute once all that depends on the label map alone; arguments as ``LabelPyramid.forward``."""
        return self.guide(self.labels(labels, keep))

    def prepare_null(self, batch: int, size: Triple) -> LabelGuidance:
        """Compute the other half of classifier-free guidance: no label known in a volume of ``size`` voxels."""
        return self.guide(self.labels.null(batch, size))

    def guide(self, activations: list[Tensor]) -> LabelGuidance:
        """Turn the pyramid's activations (``self.labels``), or a window of them, into guidance."""
        modulations = [block.guide(activations[-1]) for block in self.middle]  # type: ignore[operator]
        for level in reversed(range(len(self.up))):
            modulations += [block.guide(activations[level]) for block in self.up[level]]  # type: ignore[operator]
        return LabelGuidance(activations[0], tuple(modulations))

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        labels: LabelGuidance,
        spacing: Tensor,
        modality: Tensor,
        position: Tensor | None = None,
    ) -> Tensor:
        """Return the objective's target [B, C, X, Y, Z]: the velocity, for a flow.

        Args:
            latents: Noisy standardised latents.
            times: [B], 0 is data and 1 is noise.
            labels: From ``prepare_labels``; batch B.
            spacing: [B, 3] in mm.
            modality: [B], index into ``MODALITIES`` or ``ANY_MODALITY``.
            position: [B, 6], see ``WHOLE_VOLUME``, which is the default.
        """
        embedding = self.embed(global_features(times, spacing, modality, position))
        guides = iter(labels.modulations)
        c_in, c_skip, c_out = self._precondition(times.view(-1, 1, 1, 1, 1))
        h = self.stem(torch.cat([(c_in * latents).to(labels.entry.dtype), labels.entry], dim=1))
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
        return c_skip * latents + c_out * self.out(functional.silu(self.out_norm(h))).float()

    def _precondition(self, times: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return the factors of the input, of the input in the output, and of the network in the output.

        For ``flow`` they are such that, were latents white noise of variance 1, the input would have that
        variance, nothing would be left to learn, and errors would weigh alike at all times; ``v`` is so by
        itself. Derived as in Karras et al. (arXiv 2206.00364), appendix B.6.
        """
        if self.config.objective.kind != "flow":
            return 1.0, 0.0, 1.0
        power = times.square() + (1 - times).square()
        return power.rsqrt(), (2 * times - 1) / power, power.rsqrt()


def norm_layer(config: DenoiserConfig, channels: int, *, affine: bool) -> nn.Module:
    """Return the norm that the settings name; the per-voxel one has no weights of its own."""
    return ChannelNorm() if config.norm == "voxel" else group_norm(channels, affine=affine)


def global_features(times: Tensor, spacing: Tensor, modality: Tensor, position: Tensor | None) -> Tensor:
    """Return what every voxel is told [B, F]: time, spacing, place of the crop and modality."""
    if position is None:
        position = torch.tensor([WHOLE_VOLUME], device=times.device).expand(len(times), -1)
    start, extent = position.to(spacing.dtype).chunk(2, dim=1)
    place = torch.cat([2 * start + extent - 1, extent.log()], dim=1)  # all 0 for the whole volume
    kind = functional.one_hot(modality.clamp_min(0), len(MODALITIES)) * (modality >= 0)[:, None]
    return torch.cat([time_features(times), spacing.log(), place, kind.to(spacing.dtype)], dim=1)


def time_features(times: Tensor) -> Tensor:
    """Return 32 sines and cosines of times in 0..1."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), 16, device=times.device))
    angles = times[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_denoiser(preset: Preset, n_classes: int) -> SemanticUNet:
    """Return the untrained denoiser of a preset."""
    auto = preset.autoencoder
    return SemanticUNet(preset.denoiser, auto.latent_channels, auto.strides, n_classes)
