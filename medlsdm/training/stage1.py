"""Stage 1: train the VQ-GAN to compress and rebuild volumes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medlsdm.config import StageConfig
from medlsdm.models.spade import one_hot
from medlsdm.models.vqgan import VQGAN
from medlsdm.training.loop import Report, autocast, device_of, fit
from medlsdm.training.patients import Batch, TrainingSet

GRADIENT_WEIGHT = 0.5
STATISTICS_PATIENTS = 64


def reconstruction_loss(rebuilt: Tensor, volumes: Tensor, mask: Tensor) -> Tensor:
    """Return L1 plus the L1 difference of neighbouring voxels' steps, both where ``mask`` is 1."""
    error = rebuilt - volumes
    loss = (error.abs() * mask).sum() / mask.sum()
    for axis in (2, 3, 4):
        # The difference of gradients is the gradient of the difference.
        steps = error.diff(dim=axis).abs()
        both = mask.narrow(axis, 1, mask.shape[axis] - 1)
        loss = loss + GRADIENT_WEIGHT / 3 * (steps * both).sum() / both.sum().clamp_min(1)
    return loss


def train_stage1(
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
) -> float:
    """Train the autoencoder for a slice of one schedule, then measure the latent statistics.

    Args:
        model: Trained in place.
        data: The site's patients.
        stage: Rates and batch size.
        steps: How many steps to take now.
        first_step: Where this slice begins in the schedule.
        total_steps: How long the whole schedule is; by default it ends with this slice.
        seed: Makes the training repeatable.
        progress: Called after every step.
        optimiser: Kept between slices on one machine; a fresh one otherwise.

    Returns:
        The mean loss of the last quarter of the steps.
    """
    device = device_of(model)

    def step_loss(rng: np.random.Generator) -> Tensor:
        batch = data.crops(rng.integers(len(data), size=stage.batch), rng, stage.crop)
        volumes, labels, mask = on_device(batch, model.n_classes, device)
        with autocast(device):
            rebuilt = model(volumes, labels)
        return reconstruction_loss(rebuilt, volumes, mask)

    loss = fit(
        model, step_loss, stage, "stage 1", steps=steps, first_step=first_step,
        total_steps=total_steps, seed=seed, progress=progress, optimiser=optimiser,
    )  # fmt: skip
    measure_latents(model, data)
    return loss


def on_device(batch: Batch, n_classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's images, one-hot labels and mask as tensors."""
    images, mask = (torch.from_numpy(a).to(device) for a in (batch.images, batch.mask))
    labels = torch.from_numpy(batch.labels.astype(np.int32)).to(device)
    return images, one_hot(labels, n_classes), mask


@torch.no_grad()
def measure_latents(model: VQGAN, data: TrainingSet) -> None:
    """Write mean and mean square of each latent channel into the model's buffers."""
    model.eval()
    device = device_of(model)
    chosen = np.linspace(0, len(data) - 1, min(len(data), STATISTICS_PATIENTS)).round().astype(int)
    total, total_square = torch.zeros_like(model.latents_mean), torch.zeros_like(model.latents_mean)
    count = torch.zeros((), device=device)
    for index in chosen:
        batch = data.crops([int(index)], None)
        with autocast(device):
            latents = model.encode(torch.from_numpy(batch.images).to(device)).float()
        mask = latent_mask(torch.from_numpy(batch.mask).to(device), data.strides)
        total = total + (latents * mask).sum(dim=(0, 2, 3, 4))
        total_square = total_square + (latents.square() * mask).sum(dim=(0, 2, 3, 4))
        count = count + mask.sum()
    model.latents_mean.copy_(total / count)
    model.latents_mean_square.copy_(total_square / count)


def latent_mask(mask: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """Return 1 for each latent voxel that is at least half real."""
    return (torch.nn.functional.avg_pool3d(mask, strides) >= 0.5).float()
