"""The 3D VQ-GAN of stage 1: volumes to latents, and back under the guidance of a label map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import AutoencoderConfig, Preset
from medlsdm.models.layers import ChannelNorm, ResidualBlock, Triple, conv, depth_to_space, space_to_depth
from medlsdm.models.quantizers import build_quantiser
from medlsdm.models.spade import LabelPyramid, Modulation, SpadeHead, modulate
from medlsdm.models.texture import TextureDecoder


class DecoderBlock(nn.Module):
    """Add what two convolutions find, each modulated by the label map."""

    def __init__(self, channels: int, label_width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm()
        self.head1, self.head2 = SpadeHead(label_width, channels), SpadeHead(label_width, channels)
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels, zero=True)

    def forward(self, x: Tensor, activation: Tensor) -> Tensor:
        """Return ``x`` plus the residual."""
        h = self._convolve(x, self.head1(activation), self.conv1)
        return x + self._convolve(h, self.head2(activation), self.conv2)

    def _convolve(self, x: Tensor, modulation: Modulation, layer: nn.Module) -> Tensor:
        return layer(functional.silu(modulate(self.norm(x), modulation)))


class VQGAN(nn.Module):
    """Compress volumes [B, 1, X, Y, Z] in -1..1 by ``config.strides`` and decode them with one-hot labels.

    Sizes must be multiples of the strides. The buffers ``latents_mean`` and ``latents_mean_square``
    standardise latents per channel; sites average them like any weight.

    Source: Med-LSDM (arXiv 2507.00206), stage 1.
    """

    latents_mean: Tensor
    latents_mean_square: Tensor

    def __init__(self, config: AutoencoderConfig, n_classes: int) -> None:
        super().__init__()
        self.config, self.n_classes = config, n_classes
        fold = config.patch[0] * config.patch[1] * config.patch[2]
        widths, down = config.channels, config.down
        self.stem = conv(fold, widths[0])
        self.encoder = nn.ModuleList(
            nn.ModuleList(ResidualBlock(w) for _ in range(n))
            for w, n in zip(widths, config.encoder_blocks, strict=True)
        )
        self.shrink = nn.ModuleList(
            nn.Conv3d(a * d[0] * d[1] * d[2], b, 1) for a, b, d in zip(widths, widths[1:], down, strict=False)
        )
        self.to_latents = nn.Sequential(ChannelNorm(widths[-1]), nn.SiLU(), conv(widths[-1], config.latent_channels))
        self.quantiser = build_quantiser(config)
        self.from_latents = conv(config.latent_channels, widths[-1])
        self.labels = LabelPyramid(n_classes, config.label_width, _scales(config))
        self.decoder = nn.ModuleList(
            nn.ModuleList(DecoderBlock(w, config.label_width) for _ in range(n))
            for w, n in zip(widths, config.decoder_blocks, strict=True)
        )
        self.grow = nn.ModuleList(
            nn.Conv3d(b, a * d[0] * d[1] * d[2], 1) for a, b, d in zip(widths, widths[1:], down, strict=False)
        )
        self.out_norm = ChannelNorm()
        self.out = conv(widths[0], fold)
        self.texture = (
            TextureDecoder(widths[0], config.texture_channels, config.texture_blocks, config.patch)
            if config.texture_channels
            else None
        )
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_mean_square", torch.ones(config.latent_channels))

    def encode(self, volumes: Tensor) -> Tensor:
        """Return latents [B, C, X/4, ...] before rounding: deterministic, and smooth for stage 2."""
        h = self.stem(space_to_depth(volumes, self.config.patch))
        for scale, blocks in enumerate(self.encoder):
            if scale:
                h = self.shrink[scale - 1](space_to_depth(h, self.config.down[scale - 1]))
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h)
        return self.quantiser.bound(self.to_latents(h))

    def decode(
        self, latents: Tensor, one_hot: Tensor, noise: Tensor | None = None, grain: Tensor | None = None
    ) -> Tensor:
        """Round the latents and decode them.

        Args:
            latents: Not standardised, [B, C, x, y, z].
            one_hot: [B, K, X, Y, Z], all zero where nothing is known.
            noise: Standard normal, [B, 1, X, Y, Z]: draws texture from it. Without, the volume is smooth.
            grain: How strong the texture is, [B], standard normal over scans; the mean if absent.
        """
        features, smooth = self.decode_features(latents, one_hot)
        if noise is None or self.texture is None or not self.draws_texture:
            return smooth
        return smooth + self.texture(features, smooth, noise, grain)

    @property
    def draws_texture(self) -> bool:
        """Tell whether there is a texture decoder, and one that was trained."""
        return self.texture is not None and bool(self.texture.trained.any())

    def decode_features(self, latents: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's last features [B, C, X / patch, ...] and the smooth volume."""
        activations = self.labels(one_hot)
        h = self.from_latents(self.quantiser(latents))
        for scale in reversed(range(len(self.decoder))):
            for block in self.decoder[scale]:  # type: ignore[attr-defined]
                h = block(h, activations[scale])
            if scale:
                h = depth_to_space(self.grow[scale - 1](h), self.config.down[scale - 1])
        out = self.out(functional.silu(self.out_norm(h)))
        return h, depth_to_space(out, self.config.patch).float()

    def forward(self, volumes: Tensor, one_hot: Tensor) -> Tensor:
        """Reconstruct; in training, whole label maps are dropped at random and latents get ``latent_noise``."""
        if self.training and self.config.label_dropout:
            keep = torch.rand(len(volumes), 1, 1, 1, 1, device=volumes.device) >= self.config.label_dropout
            one_hot = one_hot * keep
        latents = self.encode(volumes)
        if self.training and self.config.latent_noise:
            latents = latents + self.config.latent_noise * torch.randn_like(latents)
        return self.decode(latents, one_hot)

    def standardise(self, latents: Tensor) -> Tensor:
        """Bring latents to mean 0 and variance 1 per channel."""
        mean, std = self._moments()
        return (latents - mean) / std

    def unstandardise(self, latents: Tensor) -> Tensor:
        """Undo ``standardise``."""
        mean, std = self._moments()
        return latents * std + mean

    def _moments(self) -> tuple[Tensor, Tensor]:
        variance = (self.latents_mean_square - self.latents_mean.square()).clamp_min(1e-6)
        return self.latents_mean.view(1, -1, 1, 1, 1), variance.sqrt().view(1, -1, 1, 1, 1)


def _scales(config: AutoencoderConfig) -> tuple[Triple, ...]:
    """Return each decoder scale's stride against the full volume."""
    scales = [config.patch]
    for down in config.down:
        x, y, z = (a * b for a, b in zip(scales[-1], down, strict=True))
        scales.append((x, y, z))
    return tuple(scales)


def build_autoencoder(preset: Preset, n_classes: int) -> VQGAN:
    """Return the untrained VQ-GAN of a preset."""
    return VQGAN(preset.autoencoder, n_classes)
