"""Teach the texture decoder: an energy score on real volumes, then likeness of synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medlsdm.config import Preset, SamplingConfig, StageConfig
from medlsdm.errors import ConfigError
from medlsdm.models.spade import one_hot
from medlsdm.models.texture import TextureDecoder, grain_strength
from medlsdm.models.unet import SemanticUNet
from medlsdm.models.vqgan import VQGAN
from medlsdm.training.devices import share_buffers
from medlsdm.training.energy import texture_score
from medlsdm.training.likeness import PatchCritic
from medlsdm.training.loop import Report, autocast, device_of, fit
from medlsdm.training.memorisation import draw_latents
from medlsdm.training.patients import TrainingSet
from medlsdm.training.stage1 import STATISTICS_PATIENTS, on_device, train_stage1
from medlsdm.training.stage2 import LatentSet

MATCHING_WEIGHT = 0.005
MATCHED_SHARE = 0.5
"""The last part of the schedule, in which synthetic volumes are matched too."""

CRITIC_CROPS = 640
SAMPLES = 160
SMALLEST_CROP = 8
"""Voxels that a crop needs along each axis: filters of five, begun at places of chance, must fit."""

FEWEST_STEPS = 500
"""Texture that was taught for less is stripes rather than grain."""
SEED = 20_251


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class LatentSamples:
    """Hold what the denoiser drew under training maps.

    ``latents`` [M, C, x, y, z] are as the decoder takes them, ``labels`` [M, X, Y, Z] are class indices, and
    ``shapes`` [M, 3] tell how much of each window is no padding.
    """

    latents: Tensor
    labels: NDArray[Any]
    shapes: NDArray[np.int64]


def train_texture(
    model: VQGAN,
    data: TrainingSet,
    stage: StageConfig,
    *,
    steps: int,
    first_step: int = 0,
    total_steps: int | None = None,
    seed: int,
    progress: Report | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    samples: LatentSamples | None = None,
    critic: PatchCritic | None = None,
) -> float:
    """Train ``model.texture``; the rest of the autoencoder stays as it is. Other arguments as in ``train_stage1``.

    With ``samples`` and a ``critic``, kept between slices, the last part of the schedule also brings volumes
    of synthetic latents nearer to real ones.

    Raises:
        ConfigError: The preset gives the autoencoder no texture decoder.
    """
    texture = model.texture
    if texture is None:
        raise ConfigError("The preset has no texture decoder to train.", "Set autoencoder.texture_channels.")
    model.eval()
    texture.trained.fill_(1)
    if first_step == 0:
        measure_grain(model, data, stage)
        if critic is not None:
            critic.learn(_real_crops(data, stage, device_of(model)))
    begin = (1 - MATCHED_SHARE) * (total_steps or first_step + steps)
    numbers = count(first_step)

    def step_loss(rng: np.random.Generator) -> Tensor:
        loss = _score_of_batch(model, texture, data, stage, rng)
        if next(numbers) >= begin and samples is not None and critic is not None:
            loss = loss + MATCHING_WEIGHT * critic.pull(_draw_synthetic(model, texture, samples, data, stage, rng))
        return loss

    return fit(
        texture, step_loss, stage, "texture", steps=steps, first_step=first_step,
        total_steps=total_steps, seed=seed, progress=progress, optimiser=optimiser,
        after_step=(lambda: share_buffers(critic)) if critic is not None else None,
    )  # fmt: skip


def _score_of_batch(
    model: VQGAN, texture: TextureDecoder, data: TrainingSet, stage: StageConfig, rng: np.random.Generator
) -> Tensor:
    """Return the score of two draws for crops of real volumes, told how strong their grain is."""
    device = device_of(model)
    batch = data.crops(rng.integers(len(data), size=stage.batch), rng, stage.crop)
    volumes, labels, mask = on_device(batch, model.n_classes, device)
    with autocast(device):
        with torch.no_grad():
            features, smooth = model.decode_features(model.encode(volumes), labels)
        grain = texture.standard_grain(volumes - smooth, mask)
        noise = torch.randn(2 * len(volumes), *volumes.shape[1:]).to(device)
        drawn = texture(torch.cat([features] * 2), torch.cat([smooth] * 2), noise, torch.cat([grain] * 2))
    first, second = ((smooth + residual).clamp(-1, 1) * mask for residual in drawn.chunk(2))
    return texture_score(first, second, volumes * mask, smooth * mask, rng)


def _draw_synthetic(
    model: VQGAN, texture: TextureDecoder, samples: LatentSamples, data: TrainingSet, stage: StageConfig,
    rng: np.random.Generator,
) -> Tensor:  # fmt: skip
    """Return textured crops [B, 1, X, Y, Z] of synthetic volumes; the gradient reaches the texture decoder alone."""
    device, size = device_of(model), stage.crop or data.window
    latents, labels = [], []
    for index in rng.integers(len(samples.latents), size=stage.batch):
        room = [
            max(0, have - want) // s for have, want, s in zip(samples.shapes[index], size, data.strides, strict=True)
        ]
        starts = [int(rng.integers(r + 1)) for r in room]
        x, y, z = (slice(a, a + want // s) for a, want, s in zip(starts, size, data.strides, strict=True))
        u, v, w = (slice(a * s, a * s + want) for a, want, s in zip(starts, size, data.strides, strict=True))
        latents.append(samples.latents[index][:, x, y, z])
        labels.append(samples.labels[index][u, v, w])
    classes = torch.from_numpy(np.stack(labels).astype(np.int32)).to(device)
    with autocast(device):
        with torch.no_grad():
            features, smooth = model.decode_features(
                torch.stack(latents).to(device), one_hot(classes, model.n_classes)
            )  # fmt: skip
        noise, grain = torch.randn(smooth.shape).to(device), torch.randn(len(smooth)).to(device)
        drawn = smooth + texture(features, smooth, noise, grain)
    # Values beyond the range are cut, as they are in the end; the gradient passes straight through.
    return drawn + (drawn.clamp(-1, 1) - drawn).detach()


def texture_fits(data: TrainingSet, stage: StageConfig) -> bool:
    """Tell whether crops are large enough to see texture in; where they are thinner, volumes stay smooth."""
    return min(min(pair) for pair in zip(data.window, stage.crop or data.window, strict=True)) >= SMALLEST_CROP


@torch.no_grad()
def measure_grain(model: VQGAN, data: TrainingSet, stage: StageConfig) -> None:
    """Write mean and mean square of the grain's strength over patients into the texture decoder's buffers."""
    assert model.texture is not None
    device, rng = device_of(model), np.random.default_rng(SEED)
    found = []
    for index in np.linspace(0, len(data) - 1, min(len(data), STATISTICS_PATIENTS)).round().astype(int):
        volumes, labels, mask = on_device(data.crops([int(index)], rng, stage.crop), model.n_classes, device)
        with autocast(device):
            smooth = model.decode(model.encode(volumes), labels)
        found.append(grain_strength(volumes - smooth, mask))
    model.texture.grain_mean.copy_(torch.cat(found).mean())
    model.texture.grain_mean_square.copy_(torch.cat(found).square().mean())


def _real_crops(data: TrainingSet, stage: StageConfig, device: torch.device) -> Iterator[Tensor]:
    """Cut a few crops of each patient for the critic."""
    rng = np.random.default_rng(SEED)
    for _ in range(min(4, max(1, CRITIC_CROPS // len(data)))):
        for index in range(len(data)):
            yield torch.from_numpy(np.ascontiguousarray(data.crops([index], rng, stage.crop).images)).to(device)


def draw_samples(
    model: VQGAN, denoiser: SemanticUNet, latents: LatentSet, sampling: SamplingConfig, *, seed: int
) -> LatentSamples:
    """Draw latents under the label maps of at most ``SAMPLES`` patients, from the central crop of each."""
    count = len(np.unique(latents.patient))
    chosen = np.linspace(0, count - 1, min(count, SAMPLES)).round().astype(int)
    seeds = range(seed, seed + len(chosen))
    drawn = draw_latents(denoiser, latents, chosen, sampling, seeds=seeds)
    real = latents.mask[chosen, 0] > 0
    inside = [real.any(axis=tuple({1, 2, 3} - {axis})).sum(1) for axis in (1, 2, 3)]
    strides = np.array(model.config.strides)
    with torch.no_grad():
        raw = model.unstandardise(torch.as_tensor(drawn).to(device_of(model))).cpu()
    return LatentSamples(raw, latents.labels[chosen], np.stack(inside, axis=1) * strides)


def train_first_stage(
    model: VQGAN,
    data: TrainingSet,
    preset: Preset,
    *,
    steps: int,
    first_step: int,
    total_steps: int,
    seed: int,
    progress: Report | None = None,
) -> float:
    """Train a slice of one schedule that holds the autoencoder and then its texture decoder, as rounds do.

    The schedule is shared out as the preset's steps are; where that leaves the texture decoder too few to be
    better than none, it gets none, and volumes stay smooth. Returns the mean loss of what was trained last.
    """
    whole = preset.stage1.steps + preset.texture.steps
    texture_steps = round(total_steps * preset.texture.steps / whole) if whole and model.texture is not None else 0
    if texture_steps < min(FEWEST_STEPS, preset.texture.steps) or not texture_fits(data, preset.texture):
        texture_steps = 0
    border = total_steps - texture_steps
    loss = float("nan")
    if first_step < border:
        now = min(steps, border - first_step)
        loss = train_stage1(
            model, data, preset.stage1, steps=now, first_step=first_step, total_steps=border, seed=seed,
            progress=progress,
        )  # fmt: skip
        first_step, steps = first_step + now, steps - now
    if steps:
        loss = train_texture(
            model, data, preset.texture, steps=steps, first_step=first_step - border, total_steps=texture_steps,
            seed=seed, progress=progress,
        )  # fmt: skip
    return loss
