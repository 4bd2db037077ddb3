"""Stage 1: train the VQ-GAN to compress and rebuild volumes."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from torch import Tensor

from medlsdm.config import Stage1Config
from medlsdm.models.perceptual import FeatureNetwork, random_features
from medlsdm.models.spade import one_hot
from medlsdm.models.vqgan import VQGAN
from medlsdm.training.adversary import Adversary
from medlsdm.training.loop import Report, autocast, device_of, fit
from medlsdm.training.losses import hide_padding, reconstruction_loss
from medlsdm.training.patients import Batch, TrainingSet

STATISTICS_PATIENTS = 64


def train_stage1(
    model: VQGAN,
    data: TrainingSet,
    stage: Stage1Config,
    *,
    steps: int,
    first_step: int = 0,
    total_steps: int | None = None,
    seed: int,
    progress: Report | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    adversary: Adversary | None = None,
    features: FeatureNetwork | None = None,
) -> float:
    """Train the autoencoder for a slice of one schedule, then measure the latent statistics.

    Args:
        model: Trained in place.
        data: The site's patients.
        stage: Rates, batch size and the losses' weights.
        steps: How many steps to take now.
        first_step: Where this slice begins in the schedule.
        total_steps: How long the whole schedule is; by default it ends with this slice.
        seed: Makes the training repeatable.
        progress: Called after every step.
        optimiser: Kept between slices on one machine; a fresh one otherwise.
        adversary: Discriminators that train beside the model, kept between slices; none otherwise.
        features: What the perceptual loss looks with; fixed random convolutions otherwise.

    Returns:
        The mean loss of the last quarter of the steps.
    """
    device, total = device_of(model), total_steps or first_step + steps
    if stage.losses.perceptual:
        features = (features or random_features()).to(device)
    numbers = count(first_step)

    def step_loss(rng: np.random.Generator) -> Tensor:
        batch = data.crops(rng.integers(len(data), size=stage.batch), rng, stage.crop)
        volumes, labels, mask = on_device(batch, model.n_classes, device)
        with autocast(device):
            rebuilt = model(volumes, labels)
        loss = reconstruction_loss(rebuilt, volumes, mask, stage.losses, features)
        commitment = model.quantiser.take_commitment()
        if commitment is not None:
            loss = loss + stage.losses.commitment * commitment
        if adversary is not None:
            shown = hide_padding(rebuilt, volumes, mask)
            loss = loss + adversary.push(shown, volumes, loss, model.out.weight, step=next(numbers), total=total)
        return loss

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
