"""Patch discriminators that tell reconstructions from real volumes, on whole crops and on slices of three planes.

Reconstructions differ from real volumes in their fine texture, which holds little of the intensity's
variance; so each discriminator also sees the volume minus its local mean, made louder. There is no
BatchNorm: real and rebuilt samples share no statistics, and a site's patients leave none behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.config import AdversarialConfig
from medlsdm.models.layers import group_norm

HIGH_PASS_GAIN = 8.0
SLOPE = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Hold what one discriminator says: logits [N, 1, ...], positive for real, and what each layer saw."""

    logits: Tensor
    features: list[Tensor]


def with_high_pass(x: Tensor) -> Tensor:
    """Return [N, 1, ...] beside itself minus the mean of its 3-wide neighbourhood, [N, 2, ...]."""
    pool = functional.avg_pool3d if x.ndim == 5 else functional.avg_pool2d
    blurred = pool(x, 3, 1, 1, count_include_pad=False)
    return torch.cat([x, HIGH_PASS_GAIN * (x - blurred)], dim=1)


class PatchDiscriminator(nn.Module):
    """Judge patches of slices (``axes`` 2) or volumes (3): two halvings, then two layers at that scale.

    Everything is float32, whatever the autocast: the margins that count are small.

    Source: Isola et al., Image-to-Image Translation with Conditional Adversarial Networks (arXiv 1611.07004).
    """

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.layers = nn.ModuleList(
            [
                nn.Sequential(convolution(2, channels, 4, 2, 1)),
                nn.Sequential(convolution(channels, 2 * channels, 4, 2, 1), group_norm(2 * channels)),
                nn.Sequential(convolution(2 * channels, 4 * channels, 3, 1, 1), group_norm(4 * channels)),
            ]
        )
        self.judge = convolution(4 * channels, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Verdict:
        """Judge [N, 1, X, Y] or [N, 1, X, Y, Z]; each axis needs at least 4 voxels."""
        with torch.autocast(x.device.type, enabled=False):
            h, features = with_high_pass(x.float()), []
            for layer in self.layers:
                h = functional.leaky_relu(layer(h), SLOPE)
                features.append(h)
            return Verdict(self.judge(h), features)


class Discriminators(nn.Module):
    """Hold the discriminators that a preset asks for."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.slices = config.slices
        self.volume = PatchDiscriminator(3, config.channels) if "3d" in config.discriminators else None
        planes = 3 if "2d" in config.discriminators else 0
        self.planes = nn.ModuleList(PatchDiscriminator(2, config.channels) for _ in range(planes))

    def forward(self, volumes: Tensor) -> list[Verdict]:
        """Judge volumes [N, 1, X, Y, Z], on random slices where planes are judged: the same for all N."""
        verdicts = [] if self.volume is None else [self.volume(volumes)]
        for axis, judge in enumerate(self.planes):
            verdicts.append(judge(random_slices(volumes, axis, self.slices)))
        return verdicts


def random_slices(volumes: Tensor, axis: int, count: int) -> Tensor:
    """Cut ``count`` random slices across spatial ``axis`` (0 to 2) of [N, C, X, Y, Z]: [N * count, C, ...].

    Slices of one volume lie together. The places are drawn from torch's generator, the same for all volumes.
    """
    places = torch.randint(volumes.shape[2 + axis], (count,)).tolist()
    return torch.stack([volumes.select(2 + axis, place) for place in places], dim=1).flatten(0, 1)
