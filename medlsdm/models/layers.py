"""Small layers that the networks share. Tensors are [B, C, X, Y, Z]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Triple = tuple[int, int, int]


def space_to_depth(x: Tensor, factor: Triple) -> Tensor:
    """Fold blocks of ``factor`` voxels into channels."""
    b, c, nx, ny, nz = x.shape
    fx, fy, fz = factor
    x = x.reshape(b, c, nx // fx, fx, ny // fy, fy, nz // fz, fz)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * fx * fy * fz, nx // fx, ny // fy, nz // fz)


def depth_to_space(x: Tensor, factor: Triple) -> Tensor:
    """Undo ``space_to_depth``."""
    b, c, nx, ny, nz = x.shape
    fx, fy, fz = factor
    x = x.reshape(b, c // (fx * fy * fz), fx, fy, fz, nx, ny, nz)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, -1, nx * fx, ny * fy, nz * fz)


class ChannelNorm(nn.Module):
    """Normalise each voxel by the root mean square of its channels, so that tiles equal the whole."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with unit root mean square over the channels."""
        power = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        return x * (x.shape[1] ** 0.5 / (power + 1e-4)).to(x.dtype)


def group_norm(channels: int, *, affine: bool = True) -> nn.GroupNorm:
    """Return a GroupNorm with at least four channels a group, at most eight groups."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, affine=affine)


class Convolution(nn.Conv3d):
    """Convolve in three dimensions, safely where an axis is shorter than the kernel.

    There the CPU's bfloat16 gradients come from memory never written (seen with torch 2.13 on an axis
    of 1 or 2 voxels), so such small volumes are convolved in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved tensor."""
        if min(input.shape[2:]) >= self.kernel_size[0]:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, zero: bool = False) -> nn.Conv3d:
    """Return a convolution that keeps the size (divided by ``stride``); ``zero`` starts it at zero."""
    layer = Convolution(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return layer
