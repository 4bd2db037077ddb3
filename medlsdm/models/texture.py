"""The texture decoder: what a compressed volume no longer holds, drawn at random in one pass.

Latents decide anatomy; the grain between is only known as a distribution. A decoder that is asked
for the mean of it draws blur. This network takes noise beside the decoder's features and draws one of the
fine structures that fit, taught by a proper score (``medlsdm.training.texture``) instead of an adversary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.models.layers import ChannelNorm, ResidualBlock, Triple, conv, depth_to_space, space_to_depth


class TextureDecoder(nn.Module):
    """Draw what to add to a smooth volume.

    How strong the grain is belongs to the scanner, not to the anatomy, so it is told: ``grain`` is the
    logarithm of its strength, standardised by the buffers ``grain_mean`` and ``grain_mean_square`` of the
    training data, and drawn from a standard normal where there is no scan to measure. ``trained`` is 0 until
    training has begun: volumes stay smooth until then.

    Args:
        features: Channels of the decoder's last features.
        channels: Width.
        blocks: Residual blocks.
        patch: The stem's space-to-depth factor: no convolution runs at full resolution.
    """

    grain_mean: Tensor
    grain_mean_square: Tensor
    trained: Tensor

    def __init__(self, features: int, channels: int, blocks: int, patch: Triple) -> None:
        super().__init__()
        self.patch = patch
        fold = patch[0] * patch[1] * patch[2]
        self.norm = ChannelNorm()
        self.stem = conv(2 * fold + features, channels)
        self.strength = nn.Linear(1, 2 * channels)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.out = conv(channels, fold)
        self.register_buffer("grain_mean", torch.zeros(1))
        self.register_buffer("grain_mean_square", torch.ones(1))
        self.register_buffer("trained", torch.zeros(1))
        nn.init.zeros_(self.strength.weight)
        nn.init.zeros_(self.strength.bias)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    @property
    def halo(self) -> int:
        """Return how many cells of ``patch`` voxels beyond a tile its values depend on."""
        return 2 + 2 * len(self.blocks)

    def forward(self, features: Tensor, smooth: Tensor, noise: Tensor, grain: Tensor | None = None) -> Tensor:
        """Return the residual [B, 1, X, Y, Z] in float32.

        Args:
            features: The decoder's last features, [B, C, X / patch, ...].
            smooth: The decoder's volume, [B, 1, X, Y, Z].
            noise: Standard normal, of the same shape.
            grain: Standardised strength [B]; 0, the mean, if absent.
        """
        seen = self.norm(features)
        folded = (space_to_depth(volume.to(seen.dtype), self.patch) for volume in (smooth, noise))
        h = self.stem(torch.cat([*folded, seen], dim=1))
        grain = noise.new_zeros(len(noise)) if grain is None else grain
        told = grain[:, None] * self.strength.weight[:, 0] + self.strength.bias  # no product that batches round
        scale, shift = told[:, :, None, None, None].to(h.dtype).chunk(2, dim=1)
        h = torch.addcmul(shift, h, scale + 1)
        for block in self.blocks:
            h = block(h)
        return depth_to_space(self.out(functional.silu(self.norm(h))), self.patch).float()

    def standard_grain(self, residual: Tensor, mask: Tensor) -> Tensor:
        """Return the standardised strength [B] of a real volume's grain; ``residual`` is what is not smooth."""
        variance = (self.grain_mean_square - self.grain_mean.square()).clamp_min(1e-4)
        return (grain_strength(residual, mask) - self.grain_mean) / variance.sqrt()


def grain_strength(residual: Tensor, mask: Tensor) -> Tensor:
    """Return the log of the finest grain's root mean square [B], of residuals [B, 1, X, Y, Z] where ``mask`` is 1."""
    fine = (residual - functional.avg_pool3d(residual, 3, 1, 1, count_include_pad=False)) * mask
    power = fine.square().sum(dim=(1, 2, 3, 4)) / mask.sum(dim=(1, 2, 3, 4)).clamp_min(1)
    return 0.5 * (power + 1e-8).log()
