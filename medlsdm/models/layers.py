"""Small layers that the networks share. Tensors are [B, C, X, Y, Z]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Triple = tuple[int, int, int]


def space_to_depth(x: Tensor, factor: Triple) -> Tensor:
    """Fold blocks of ``factor`` voxels into channels."""
    b, c, nx, ny, nz = x.shape
    fx, fy, fz = factor
    x = x.reshape(b, c, nx // fx, fx, ny // fy, fy, nz // fz, fz)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * fx * fy * fz, nx // fx, ny // fy, nz // fz)


def depth_to_space(x: Tensor, factor: Triple) -> Tensor:
    """Undo ``space_to_depth``. Channels that lie last in memory stay there, so that convolutions need not move them."""
    b, c, nx, ny, nz = x.shape
    fx, fy, fz = factor
    if x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        x = x.permute(0, 2, 3, 4, 1).reshape(b, nx, ny, nz, c // (fx * fy * fz), fx, fy, fz)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, nx * fx, ny * fy, nz * fz, -1)
        return x.permute(0, 4, 1, 2, 3)
    x = x.reshape(b, c // (fx * fy * fz), fx, fy, fz, nx, ny, nz)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, -1, nx * fx, ny * fy, nz * fz)


class ChannelNorm(nn.Module):
    """Normalise each voxel by the root mean square of its channels, so that tiles equal the whole.

    With ``affine`` channels, each is scaled and shifted by what is learnt.
    """

    def __init__(self, affine: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(affine)) if affine else None
        self.bias = nn.Parameter(torch.zeros(affine)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with unit root mean square over the channels, then scaled and shifted."""
        # Several times faster on a CPU than linalg.vector_norm, which walks the channels voxel by voxel.
        power = (x * x).sum(dim=1, keepdim=True, dtype=torch.float32)
        x = x * (x.shape[1] ** 0.5 * (power + 1e-8).rsqrt()).to(x.dtype)
        if self.weight is None or self.bias is None:
            return x
        weight, bias = (p.to(x.dtype).view(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight)


class ResidualBlock(nn.Module):
    """Add what two normalised convolutions find; by default voxel by voxel, so that tiles equal the whole."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module] = ChannelNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the residual."""
        h = self.conv1(functional.silu(self.norm1(x)))
        return x + self.conv2(functional.silu(self.norm2(h)))


def group_norm(channels: int, *, affine: bool = True) -> nn.GroupNorm:
    """Return a GroupNorm with at least four channels a group, at most eight groups."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, affine=affine)


class Convolution(nn.Conv3d):
    """Convolve in three dimensions, around two weak spots of torch on CPUs (seen with 2.13).

    Where an axis is shorter than the kernel, bfloat16 gradients come from memory never written: such small
    volumes are convolved in float32. And one small float32 volume alone is not given to oneDNN but to a
    path 2 to 10 times slower: it is cut into two overlapping halves, which make a batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolved tensor."""
        if min(input.shape[2:]) < self.kernel_size[0]:
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.float())
        return self._in_halves(input) if self._is_overlooked(input) else super().forward(input)

    def _is_overlooked(self, input: Tensor) -> bool:
        """Tell whether torch leaves oneDNN aside (``use_mkldnn`` in ATen's Convolution.cpp)."""
        if input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        batch, channels, x, y, _ = input.shape
        return batch == 1 and channels * x * y <= 20_480 and self.kernel_size[0] > 1 and self.stride == (1, 1, 1)

    def _in_halves(self, input: Tensor) -> Tensor:
        length, reach = input.shape[2], self.kernel_size[0] // 2
        half = -(-length // 2)
        padded = functional.pad(input, (0, 0, 0, 0, reach, reach + 2 * half - length))
        halves = torch.cat([padded[:, :, : half + 2 * reach], padded[:, :, half:]])
        out = functional.conv3d(halves, self.weight, self.bias, padding=(0, reach, reach))
        return torch.cat([out[:1], out[1:]], dim=2)[:, :, :length]


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, zero: bool = False) -> nn.Conv3d:
    """Return a convolution that keeps the size (divided by ``stride``); ``zero`` starts it at zero."""
    layer = Convolution(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return layer
