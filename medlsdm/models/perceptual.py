"""Feature distance on slices: by a network from a file, or by fixed random convolutions that need none.

A network comes as safetensors, never as TorchScript or pickle, for those can run what their author wrote.
Any VGG without BatchNorm fits, in one or three input channels: tensors ``features.N.weight`` and
``features.N.bias`` with torchvision's numbering, as in the file ``model.safetensors`` of timm's
``vgg16.tv_in1k``. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.errors import DataError
from medlsdm.models.discriminator import random_slices

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FALLBACK_SEED = 20_250
FALLBACK_WIDTHS = (16, 32, 64)
LAYER = re.compile(r"features\.(\d+)\.weight")


class FeatureNetwork(nn.Module):
    """Hold a frozen trunk of convolutions in stages, between which the image is halved."""

    mean: Tensor
    std: Tensor

    def __init__(self, stages: list[list[nn.Conv2d]], *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in stages)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.requires_grad_(False)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the weights."""
        return hashlib.sha256(save({name: t.cpu().contiguous() for name, t in self.state_dict().items()})).hexdigest()

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Return each stage's features of [N, 1, X, Y] in -1..1, of length 1 at each pixel."""
        h = (((slices + 1) / 2).expand(-1, self.mean.shape[1], -1, -1) - self.mean) / self.std
        found = []
        for place, stage in enumerate(self.stages):
            if place:
                if min(h.shape[2:]) < 2:
                    break
                h = functional.max_pool2d(h, 2)
            for layer in stage:  # type: ignore[attr-defined]
                h = functional.relu(layer(h))
            found.append(functional.normalize(h.float(), dim=1, eps=1e-4))
        return found


def random_features(channels: tuple[int, ...] = FALLBACK_WIDTHS) -> FeatureNetwork:
    """Return the fallback: random convolutions, the same in every run. Each filter sums to zero at the first layer."""
    generator = torch.Generator().manual_seed(FALLBACK_SEED)
    stages = []
    for inputs, outputs in pairwise((1, *channels)):
        layer = nn.Conv2d(inputs, outputs, 3, padding=1)
        weight = torch.randn(layer.weight.shape, generator=generator)
        if inputs == 1:
            weight = weight - weight.mean(dim=(2, 3), keepdim=True)
        layer.weight.data = weight * (2 / (9 * inputs)) ** 0.5
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        stages.append([layer])
    return FeatureNetwork(stages, mean=(0.5,), std=(0.25,))


def load_features(path: Path) -> FeatureNetwork:
    """Return the trunk of a VGG from a safetensors file.

    Raises:
        DataError: The file is missing, no safetensors, or holds no such trunk.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path.name} cannot be read as safetensors.", "Give a VGG's weights as safetensors."
        ) from error
    places = sorted(int(match[1]) for match in map(LAYER.fullmatch, tensors) if match)
    weights = [tensors[f"features.{n}.weight"] for n in places]
    inputs = [weight.shape[1] for weight in weights if weight.ndim == 4]
    outputs = [weight.shape[0] for weight in weights]
    if not places or len(inputs) != len(places) or inputs[0] not in (1, 3) or inputs[1:] != outputs[:-1]:
        raise DataError(
            f"{path.name} holds no VGG trunk.",
            "Its tensors must be features.N.weight and features.N.bias, no BatchNorm.",
        )
    stages: list[list[nn.Conv2d]] = []
    for before, place in pairwise((-3, *places)):
        if place - before > 2:  # convolution, ReLU and pooling lie between: a new stage
            stages.append([])
        stages[-1].append(_convolution(tensors, place))
    mean, std = (values if inputs[0] == 3 else (0.5,) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return FeatureNetwork(stages, mean=mean, std=std)


def _convolution(tensors: dict[str, Tensor], place: int) -> nn.Conv2d:
    weight = tensors[f"features.{place}.weight"].float()
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    bias = tensors.get(f"features.{place}.bias", torch.zeros(len(weight))).float()
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def perceptual_distance(network: FeatureNetwork, rebuilt: Tensor, volumes: Tensor, *, slices: int = 1) -> Tensor:
    """Return the mean squared distance of features on random slices of three planes.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features (arXiv 1801.03924), equation 1,
    each channel of weight one.
    """
    both = torch.cat([rebuilt, volumes])
    total, terms = rebuilt.new_zeros(()), 0
    for axis in range(3):
        for features in network(random_slices(both, axis, slices)):
            one, two = features.chunk(2)
            total, terms = total + (one - two).square().sum(dim=1).mean(), terms + 1
    return total / terms
