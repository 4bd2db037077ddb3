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

    Args:
        features: Channels of the decoder's last features.
        channels: Width.
        blocks: Residual blocks.
        patch: The stem's space-to-depth factor: no convolution runs at full resolution.
    """

    def __init__(self, features: int, channels: int, blocks: int, patch: Triple) -> None:
        super().__init__()
        self.patch = patch
        fold = patch[0] * patch[1] * patch[2]
        self.norm = ChannelNorm()
        self.stem = conv(2 * fold + features, channels)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.out = conv(channels, fold)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    @property
    def halo(self) -> int:
        """Return how many cells of ``patch`` voxels beyond a tile its values depend on."""
        return 2 + 2 * len(self.blocks)

    def forward(self, features: Tensor, smooth: Tensor, noise: Tensor) -> Tensor:
        """Return the residual [B, 1, X, Y, Z] in float32.

        Args:
            features: The decoder's last features, [B, C, X / patch, ...].
            smooth: The decoder's volume, [B, 1, X, Y, Z].
            noise: Standard normal, of the same shape.
        """
        seen = self.norm(features)
        folded = (space_to_depth(volume.to(seen.dtype), self.patch) for volume in (smooth, noise))
        h = self.stem(torch.cat([*folded, seen], dim=1))
        for block in self.blocks:
            h = block(h)
        return depth_to_space(self.out(functional.silu(self.norm(h))), self.patch).float()
