"""A small 3D U-Net that segments, to ask whether synthetic volumes follow their label maps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from medlsdm.errors import DataError
from medlsdm.models.layers import ResidualBlock, Triple, conv, depth_to_space, group_norm, space_to_depth
from medlsdm.training.loop import autocast, device_of
from medlsdm.training.patients import mirror_to, round_up

Volume = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]

STRIDE = (8, 8, 8)
CROP = (32, 48, 32)
BATCH = 2
LEARNING_RATE = 2e-3
CALLBACK_EVERY = 50


class Segmenter(nn.Module):
    """Turn images [B, 1, X, Y, Z] in -1..1 into class scores [B, K, X, Y, Z]; sizes are multiples of 8.

    The first and last layer fold blocks of 2 x 2 x 2 voxels, so nothing runs at full resolution.
    """

    def __init__(self, n_classes: int, widths: Triple = (32, 48, 64)) -> None:
        super().__init__()
        fine, middle, deep = widths
        self.n_classes, self.feature_width = n_classes, deep
        self.stem = conv(8, fine)
        self.down = nn.ModuleList([conv(fine, middle, stride=2), conv(middle, deep, stride=2)])
        self.encoder = nn.ModuleList(ResidualBlock(width, group_norm) for width in widths)
        self.grow = nn.ModuleList([conv(deep, middle, kernel=1), conv(middle, fine, kernel=1)])
        self.decoder = nn.ModuleList(ResidualBlock(width, group_norm) for width in (middle, fine))
        self.norm, self.head = group_norm(fine), conv(fine, 8 * n_classes)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the activations of the three scales, the finest first."""
        h = self.stem(space_to_depth(images, (2, 2, 2)))
        scales = [self.encoder[0](h)]
        for shrink, block in zip(self.down, self.encoder[1:], strict=True):  # type: ignore[arg-type]
            scales.append(block(shrink(scales[-1])))
        return scales

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores, in float32."""
        fine, middle, h = self.encode(images)
        for grow, block, skip in zip(self.grow, self.decoder, (middle, fine), strict=True):
            h = block(functional.interpolate(grow(h), scale_factor=2.0) + skip)
        return depth_to_space(self.head(functional.silu(self.norm(h))), (2, 2, 2)).float()


@dataclass(frozen=True, slots=True)
class Budget:
    """Say how long to train: a number of steps, or CPU seconds of this process."""

    steps: int | None = None
    cpu_seconds: float | None = None

    def __post_init__(self) -> None:
        chosen = self.steps if self.cpu_seconds is None else self.cpu_seconds
        if (self.steps is None) == (self.cpu_seconds is None) or not chosen or chosen <= 0:
            raise DataError("A segmenter needs either steps or CPU seconds to train.", "Give one of them, above 0.")

    def done(self, step: int, started: float) -> float:
        """Return the share of the budget that is spent."""
        if self.steps is not None:
            return step / self.steps
        assert self.cpu_seconds is not None
        return (time.process_time() - started) / self.cpu_seconds


def train_segmenter(
    images: Sequence[Volume],
    labels: Sequence[Labels],
    n_classes: int,
    *,
    steps: int | None = None,
    cpu_seconds: float | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    each: Callable[[Segmenter, int], None] | None = None,
) -> Segmenter:
    """Train a segmenter on volumes in -1..1 and their class indices.

    Args:
        images: Arrays [X, Y, Z], of any sizes.
        labels: Class indices 0..n_classes-1 on the same grids; 0 is the background.
        n_classes: Number of classes with the background.
        steps: Length of the training; the same seed gives the same weights.
        cpu_seconds: The length as CPU time of this process instead; not repeatable.
        seed: Of weights, crops and augmentation.
        device: Where to train; the CPU by default.
        each: Called with the network and the step now and then.

    Raises:
        DataError: No volume is given, the lists differ in length, or the budget is not one number above 0.
    """
    if not images or len(images) != len(labels):
        raise DataError(f"{len(images)} volumes and {len(labels)} label maps do not pair up.", "Give one map a volume.")
    budget, rng = Budget(steps, cpu_seconds), np.random.default_rng(seed)
    device, started, step = device or torch.device("cpu"), time.process_time(), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(n_classes).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    while (done := budget.done(step, started)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        batch = [_crop(images[i], labels[i], rng) for i in rng.integers(len(images), size=BATCH)]
        x, y, mask = (torch.from_numpy(np.stack(column)).to(device) for column in zip(*batch, strict=True))
        with autocast(device):
            scores = model(x[:, None])
        loss = segmentation_loss(scores, y.long(), mask)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if each is not None and step % CALLBACK_EVERY == 0:
            each(model, step)
    return model.eval()


def segmentation_loss(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice of the classes but the background, where ``mask`` is 1.

    Args:
        scores: [B, K, X, Y, Z].
        labels: Class indices [B, X, Y, Z].
        mask: [B, X, Y, Z], 0 on padding.
    """
    entropy = (functional.cross_entropy(scores, labels, reduction="none") * mask).sum() / mask.sum()
    shares = scores.softmax(1)[:, 1:] * mask[:, None]
    truth = functional.one_hot(labels, scores.shape[1]).movedim(-1, 1)[:, 1:] * mask[:, None]
    axes = (0, 2, 3, 4)
    overlap = (2 * (shares * truth).sum(axes) + 1) / (shares.sum(axes) + truth.sum(axes) + 1)
    return entropy + 1 - overlap.mean()


def _crop(image: Volume, labels: Labels, rng: np.random.Generator) -> tuple[Volume, Labels, Volume]:
    """Cut a random crop, at times flipped left to right, with other contrast; mirrored where the volume ends."""
    starts = [int(rng.integers(max(0, have - want) + 1)) for have, want in zip(image.shape, CROP, strict=True)]
    cut = tuple(slice(s, s + want) for s, want in zip(starts, CROP, strict=True))
    image, labels = image[cut], labels[cut]
    if rng.random() < 0.5:
        image, labels = image[::-1], labels[::-1]
    mask = np.zeros(CROP, dtype=np.float32)
    mask[tuple(slice(n) for n in image.shape)] = 1
    unit = np.clip((image + 1) / 2, 0, 1) ** np.exp(rng.normal(0, 0.15))
    varied = (unit * 2 - 1) * np.exp(rng.normal(0, 0.1)) + rng.normal(0, 0.1)
    varied = varied + rng.uniform(0, 0.05) * rng.standard_normal(image.shape)
    return mirror_to(varied.astype(np.float32), CROP), mirror_to(labels, CROP).astype(np.int32), mask


@torch.inference_mode()
def segment(model: Segmenter, volume: Volume) -> NDArray[np.int32]:
    """Return class indices on the volume's own grid."""
    device = device_of(model)
    padded = mirror_to(volume, round_up(volume.shape, STRIDE))
    with autocast(device):
        scores = model(torch.from_numpy(np.ascontiguousarray(padded))[None, None].to(device))
    return scores[0].argmax(0).int().cpu().numpy()[tuple(slice(n) for n in volume.shape)]


@torch.inference_mode()
def segmenter_features(model: Segmenter, volumes: Sequence[Volume], *, fine: bool = False) -> NDArray[np.float64]:
    """Return features [N, 64] of each volume, for a Frechet distance.

    They are the means of the deepest activations. These tell what is where, and are nearly blind to blur and
    noise; with ``fine`` they are means and spreads of the finest activations, which are not.
    """
    device, rows = device_of(model), []
    for volume in volumes:
        padded = mirror_to(volume, round_up(volume.shape, STRIDE))
        with autocast(device):
            scales = model.encode(torch.from_numpy(np.ascontiguousarray(padded))[None, None].to(device))
        flat = (scales[0] if fine else scales[-1])[0].double().flatten(1)
        row = torch.cat([flat.mean(1), flat.std(1)]) if fine else flat.mean(1)
        rows.append(row.cpu().numpy())
    return np.stack(rows)


def dice(predicted: Labels, truth: Labels, n_classes: int) -> NDArray[np.float64]:
    """Return the Dice overlap of each class but the background; NaN for a class in neither map."""
    result = np.full(n_classes - 1, np.nan)
    for index in range(1, n_classes):
        one, two = predicted == index, truth == index
        total = int(one.sum() + two.sum())
        if total:
            result[index - 1] = 2 * int((one & two).sum()) / total
    return result


def mean_dice(model: Segmenter, volumes: Sequence[Volume], labels: Sequence[Labels]) -> float:
    """Return the Dice of the segmenter against the maps: mean over volumes, then over classes present."""
    rows = [dice(segment(model, v), truth, model.n_classes) for v, truth in zip(volumes, labels, strict=True)]
    present = np.array(rows)[:, ~np.isnan(rows).all(0)]
    return float(np.nanmean(present, axis=0).mean()) if present.size else float("nan")
