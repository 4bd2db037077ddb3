"""The published Med-LSDM networks, written anew from their description, to be timed beside ours.

Kept as published, faults included: labels go through a convolution path in every pass, its padding shifts
them in depth, middle blocks know no time. Axis X is the through-plane axis: there all kernels but the attention
have size 1 and nothing is downsampled. Sources: arXiv 2507.00206; the blocks follow video diffusion
(arXiv 2204.03458) and TATS (arXiv 2204.03638). ``test_paper_networks`` checks parameter counts and FLOPs.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS, HEAD_WIDTH = 8, 32
GROUPS = 8
SPADE_WIDTH = 128


class EmaCodebook(nn.Module):
    """Replace each latent by the nearest code; codes follow the running mean of what fell to them."""

    embeddings: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int = 16_384, width: int = 8, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("embeddings", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.embeddings.clone())

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantised latents [B, C, X, Y, Z] (straight through) and the commitment loss."""
        rows = latents.movedim(1, -1).flatten(0, -2).float()
        squares = rows.square().sum(1, keepdim=True) + self.embeddings.square().sum(1)
        chosen = (squares - 2 * rows @ self.embeddings.t()).argmin(1)
        one_hot = functional.one_hot(chosen, len(self.embeddings)).to(rows.dtype)
        codes = functional.embedding(chosen, self.embeddings)
        quantised = codes.view(*latents.movedim(1, -1).shape).movedim(-1, 1)
        if self.training:
            self._follow(rows.detach(), one_hot)
        commitment = 0.25 * functional.mse_loss(latents.float(), quantised.detach())
        return latents + (quantised - latents).detach(), commitment

    @torch.no_grad()
    def _follow(self, rows: Tensor, one_hot: Tensor) -> None:
        self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
        self.sums.lerp_((one_hot.t() @ rows).float(), 1 - self.decay)
        total = self.counts.sum()
        smooth = (self.counts + 1e-7) / (total + len(self.counts) * 1e-7) * total
        drawn = rows[torch.randint(len(rows), (len(self.embeddings),))]
        used = (self.counts >= 1).float()[:, None]
        self.embeddings.copy_(self.sums / smooth[:, None] * used + drawn * (1 - used))


class AutoencoderBlock(nn.Module):
    """Add what two normalised 3x3x3 convolutions find."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(2))
        self.convs = nn.ModuleList(
            nn.Conv3d(channels, channels, 3, padding=1, padding_mode="replicate") for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(functional.silu(norm(h)))
        return x + h


class Double(nn.ConvTranspose3d):
    """Double the size by a transposed 4x4x4 convolution, its input padded with its border."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=3)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(functional.pad(input, (1,) * 6, mode="replicate"))


class PaperAutoencoder(nn.Module):
    """Compress volumes by 4 on every axis to 8 channels, quantise by an EMA codebook, rebuild."""

    def __init__(self, hidden: int = 16, width: int = 8, codes: int = 16_384) -> None:
        super().__init__()
        one, two, four = hidden, 2 * hidden, 4 * hidden
        self.encoder = nn.Sequential(
            nn.Conv3d(1, one, 3, padding=1, padding_mode="replicate"),
            nn.Conv3d(one, two, 4, stride=2, padding=1, padding_mode="replicate"),
            AutoencoderBlock(two),
            nn.Conv3d(two, four, 4, stride=2, padding=1, padding_mode="replicate"),
            AutoencoderBlock(four),
            nn.GroupNorm(32, four),
            nn.SiLU(),
            nn.Conv3d(four, width, 1),
        )
        self.codebook = EmaCodebook(codes, width)
        self.decoder = nn.Sequential(
            nn.Conv3d(width, four, 1),
            nn.GroupNorm(32, four),
            nn.SiLU(),
            Double(four, four),
            AutoencoderBlock(four),
            AutoencoderBlock(four),
            Double(four, two),
            AutoencoderBlock(two),
            AutoencoderBlock(two),
            nn.Conv3d(two, 1, 3, padding=1, padding_mode="replicate"),
            nn.Tanh(),
        )

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of [B, 1, X, Y, Z] and the commitment loss."""
        quantised, commitment = self.codebook(self.encoder(volumes))
        return self.decoder(quantised), commitment


def plane_conv(inputs: int, outputs: int) -> nn.Conv3d:
    """Return a convolution within planes."""
    return nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1))


class LabelPath(nn.Module):
    """Bring a one-hot map to latent resolution by three convolutions and two max-pools ("SegConv3D").

    Padding of 1 on the axis whose kernel is 1 adds planes, as published: 32 become 11 instead of 8.
    """

    def __init__(self, n_classes: int, channels: int) -> None:
        super().__init__()
        widths = (n_classes, 64, 128, channels)
        self.convs = nn.ModuleList(nn.Conv3d(a, b, (1, 3, 3), padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, one_hot: Tensor) -> Tensor:
        first, second, last = self.convs
        h = functional.max_pool3d(functional.relu(first(one_hot)), 2)
        h = functional.max_pool3d(functional.relu(second(h)), 2)
        return last(h)


class Spade(nn.Module):
    """Normalise, then scale and shift by three convolutions over the label features."""

    def __init__(self, channels: int, label_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, affine=False)
        self.shared = plane_conv(label_channels, SPADE_WIDTH)
        self.gamma, self.beta = plane_conv(SPADE_WIDTH, channels), plane_conv(SPADE_WIDTH, channels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = functional.relu(self.shared(functional.interpolate(labels, size=x.shape[2:], mode="nearest")))
        return self.norm(x) * (1 + self.gamma(hidden)) + self.beta(hidden)


class ResidualBlock(nn.Module):
    """Add what two in-plane convolutions find; knows the time if ``time_width``, the labels if ``label_channels``."""

    def __init__(self, inputs: int, outputs: int, *, time_width: int = 0, label_channels: int = 0) -> None:
        super().__init__()
        widths = (inputs, outputs)
        self.norms = nn.ModuleList(
            Spade(w, label_channels) if label_channels else nn.GroupNorm(GROUPS, w) for w in widths
        )
        self.convs = nn.ModuleList(plane_conv(w, outputs) for w in widths)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * outputs)) if time_width else None
        self.skip = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None, labels: Tensor) -> Tensor:
        h = self.convs[0](functional.silu(self._normalise(0, x, labels)))
        h = self._normalise(1, h, labels)
        if self.time is not None and time is not None:
            scale, shift = self.time(time)[:, :, None, None, None].chunk(2, dim=1)
            h = h * (scale + 1) + shift
        return self.skip(x) + self.convs[1](functional.silu(h))

    def _normalise(self, which: int, x: Tensor, labels: Tensor) -> Tensor:
        norm = self.norms[which]
        return norm(x, labels) if isinstance(norm, Spade) else norm(x)


class ChannelLayerNorm(nn.Module):
    """Normalise each voxel over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.gamma


class PlaneLinearAttention(nn.Module):
    """Attend within planes at linear cost, and add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.to_out = nn.Conv2d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, depth, height, width = x.shape
        planes = self.norm(x).transpose(1, 2).reshape(b * depth, c, height, width)
        q, k, v = self.to_qkv(planes).view(b * depth, 3, HEADS, HEAD_WIDTH, height * width).unbind(1)
        q, k = q.softmax(dim=-2) * HEAD_WIDTH**-0.5, k.softmax(dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q).reshape(b * depth, -1, height, width)
        return x + self.to_out(out).view(b, depth, c, height, width).transpose(1, 2)


class TokenAttention(nn.Module):
    """Attend in full along the through-plane axis (``through``, rotary and relative bias) or within planes; add."""

    def __init__(self, channels: int, *, through: bool) -> None:
        super().__init__()
        self.through = through
        self.norm = ChannelLayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = self.norm(x)
        rows = rows.permute(0, 3, 4, 2, 1) if self.through else rows.permute(0, 2, 3, 4, 1).flatten(2, 3)
        q, k, v = self._split(rows)
        q = q * HEAD_WIDTH**-0.5
        if self.through:
            q, k = _rotate(q), _rotate(k)
        scores = q @ k.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        out = self.to_out((weights @ v).transpose(-2, -3).flatten(-2))
        out = out.permute(0, 4, 3, 1, 2) if self.through else out.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return x + out

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [..., heads, tokens, width]."""
        q, k, v = self.to_qkv(rows).unflatten(-1, (3, HEADS, HEAD_WIDTH)).unbind(-3)
        return q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)


def _rotate(rows: Tensor) -> Tensor:
    """Turn pairs of channels by an angle that grows with the position (rotary embedding)."""
    positions = torch.arange(rows.shape[-2], device=rows.device, dtype=torch.float32)
    rates = 10_000 ** (-torch.arange(0, HEAD_WIDTH, 2, device=rows.device) / HEAD_WIDTH)
    angles = (positions[:, None] * rates).repeat_interleave(2, dim=-1)
    even, odd = rows.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return rows * angles.cos() + turned * angles.sin()


class RelativeBias(nn.Module):
    """Hold one bias a head for each of 32 buckets of distance, wider with the distance."""

    def __init__(self, buckets: int = 32, farthest: int = 32) -> None:
        super().__init__()
        self.buckets, self.farthest = buckets, farthest
        self.table = nn.Embedding(buckets, HEADS)

    def forward(self, count: int) -> Tensor:
        positions = torch.arange(count, device=self.table.weight.device)
        offset = positions[:, None] - positions[None, :]
        half = self.buckets // 2
        exact = half // 2
        distance = offset.abs()
        far = exact + (
            (distance.clamp_min(1) / exact).log() / math.log(self.farthest / exact) * (half - exact)
        ).long().clamp_max(half - 1 - exact)
        bucket = (offset < 0) * half + torch.where(distance < exact, distance, far)
        return self.table(bucket).permute(2, 0, 1)


class PaperUNet(nn.Module):
    """Predict the noise of latents [B, 8, X, Y, Z] under a one-hot map [B, K, 4X, 4Y, 4Z]."""

    def __init__(
        self, n_classes: int, label_channels: int = 64, *, channels: int = 8, width: int = 64,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, time_width = width, 4 * width
        pairs = list(itertools.pairwise((width, *(width * m for m in multipliers))))
        self.labels = LabelPath(n_classes, label_channels)
        self.time = nn.Sequential(nn.Linear(width, time_width), nn.GELU(), nn.Linear(time_width, time_width))
        self.bias = RelativeBias()
        self.stem = nn.Conv3d(channels, width, (1, 7, 7), padding=(0, 3, 3))
        self.stem_attention = TokenAttention(width, through=True)
        self.down = nn.ModuleList(ResidualBlock(a, b, time_width=time_width) for a, b in pairs)
        self.down_plane = nn.ModuleList(PlaneLinearAttention(b) for _, b in pairs)
        self.down_through = nn.ModuleList(TokenAttention(b, through=True) for _, b in pairs)
        self.shrink = nn.ModuleList(
            nn.Conv3d(b, b, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)) for _, b in pairs[:-1]
        )
        last = pairs[-1][1]
        self.middle = nn.ModuleList(ResidualBlock(last, last, label_channels=label_channels) for _ in range(2))
        self.middle_plane = TokenAttention(last, through=False)
        self.middle_through = TokenAttention(last, through=True)
        ups = pairs[::-1]
        self.up = nn.ModuleList(
            ResidualBlock(2 * b, a, time_width=time_width, label_channels=label_channels) for a, b in ups
        )
        self.up_plane = nn.ModuleList(PlaneLinearAttention(a) for a, _ in ups)
        self.up_through = nn.ModuleList(TokenAttention(a, through=True) for a, _ in ups)
        self.grow = nn.ModuleList(
            nn.ConvTranspose3d(a, a, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)) for a, _ in ups[:-1]
        )
        self.out_block = ResidualBlock(2 * width, width)
        self.out = nn.Conv3d(width, channels, 1)

    def forward(self, latents: Tensor, times: Tensor, one_hot: Tensor) -> Tensor:
        """Return the predicted noise; ``times`` [B] are steps out of 500."""
        labels = self.labels(one_hot)
        time, bias = self.time(self._time_features(times)), self.bias(latents.shape[2])
        h = first = self.stem_attention(self.stem(latents), bias)
        skips = []
        for level, block in enumerate(self.down):
            h = self.down_through[level](self.down_plane[level](block(h, time, labels)), bias)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle_through(self.middle_plane(self.middle[0](h, None, labels)), bias)
        h = self.middle[1](h, None, labels)
        for level, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), time, labels)
            h = self.up_through[level](self.up_plane[level](h), bias)
            if level < len(self.grow):
                h = self.grow[level](h)
        return self.out(self.out_block(torch.cat([h, first], dim=1), None, labels))

    def _time_features(self, times: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / (half - 1))
        angles = times[:, None].float() * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)
