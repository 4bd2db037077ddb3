"""Self-attention over the voxels of a coarse scale."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import HEAD_WIDTH
from medlsdm.models.layers import ChannelNorm, conv


class Attention(nn.Module):
    """Let every voxel look at every other one; starts as the identity.

    Queries and keys are normalised per head, so that the logits stay bounded in bfloat16.

    Source: Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters (arXiv 2302.05442), section 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // HEAD_WIDTH)
        if channels % self.heads:
            raise ValueError(f"{channels} channels do not divide into {self.heads} heads of attention")
        self.norm = ChannelNorm()
        self.query_norm, self.key_norm = nn.RMSNorm(channels // self.heads), nn.RMSNorm(channels // self.heads)
        self.project_in = nn.Conv3d(channels, 3 * channels, 1)
        self.project_out = conv(channels, channels, kernel=1, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, C, X, Y, Z] plus what attention gathers."""
        joint = self.project_in(self.norm(x)).flatten(2)
        # [B, 3C, N] -> three of [B, heads, N, C / heads]
        query, key, value = joint.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        gathered = functional.scaled_dot_product_attention(query, key, value)
        return x + self.project_out(gathered.transpose(-1, -2).reshape(x.shape))
