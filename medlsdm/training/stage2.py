"""Stage 2: train the semantic denoiser on cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medlsdm.config import DenoiserConfig, StageConfig
from medlsdm.diffusion.objectives import Network, Objective
from medlsdm.diffusion.samplers import guided
from medlsdm.models.ema import Ema
from medlsdm.models.unet import ANY_MODALITY, LabelGuidance, SemanticUNet
from medlsdm.models.vqgan import VQGAN
from medlsdm.training.loop import Report, autocast, device_of, fit
from medlsdm.training.patients import TrainingSet
from medlsdm.training.stage1 import latent_mask


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class LatentSet:
    """Hold standardised latents [M, C, x, y, z] with labels at full resolution, M = patients x variants.

    ``patient`` [M] tells whose latents they are: the unit of privacy. ``position`` [M, 6] tells where in the
    patient's volume they lie (``WHOLE_VOLUME``); without it each is taken for a whole volume.
    """

    latents: NDArray[np.float32]
    labels: NDArray[Any]
    mask: NDArray[np.float32]
    spacing: NDArray[np.float32]
    modality: NDArray[np.int64]
    patient: NDArray[np.int64]
    position: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class LatentBatch:
    """Hold some rows of a ``LatentSet`` as tensors on the network's device."""

    latents: Tensor
    labels: Tensor
    mask: Tensor
    spacing: Tensor
    modality: Tensor
    position: Tensor | None

    @classmethod
    def of(cls, latents: LatentSet, chosen: NDArray[np.int64], device: torch.device) -> LatentBatch:
        """Take the rows named by ``chosen``."""
        labels = latents.labels[chosen]
        if labels.dtype not in (np.uint8, np.int32, np.int64):
            labels = labels.astype(np.int32)
        arrays = (latents.latents, latents.mask, latents.spacing, latents.modality)
        clean, mask, spacing, modality = (torch.from_numpy(column[chosen]).to(device) for column in arrays)
        position = None if latents.position is None else torch.from_numpy(latents.position[chosen]).to(device)
        return cls(clean, torch.from_numpy(labels).to(device), mask, spacing, modality, position)


@torch.no_grad()
def encode_latents(model: VQGAN, data: TrainingSet, *, variants: int = 3, seed: int = 0) -> LatentSet:
    """Encode every patient once and keep it: one central crop, the rest random crops and flips."""
    model.eval()
    device = device_of(model)
    rng = np.random.default_rng(seed)
    parts: list[tuple[NDArray[Any], ...]] = []
    for variant in range(variants):
        for index in range(len(data)):
            batch = data.crops([index], rng if variant else None)
            with autocast(device):
                latents = model.encode(torch.from_numpy(batch.images).to(device))
            mask = latent_mask(torch.from_numpy(batch.mask), data.strides)
            standard = model.standardise(latents.float()).cpu().numpy()
            own = (batch.spacing, batch.modality, np.array([index]), batch.position)
            parts.append((standard, batch.labels, mask.numpy(), *own))
    return LatentSet(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def class_weights(latents: LatentSet, n_classes: int, cap: float) -> Tensor | None:
    """Return how much each class's voxels weigh [K]: by inverse volume, at most ``cap``; None if all alike."""
    if cap <= 1:
        return None
    counts = np.zeros(n_classes)
    for labels in latents.labels:
        counts += np.bincount(labels.ravel(), minlength=n_classes)[:n_classes]
    return torch.from_numpy((counts.max() / np.maximum(counts, 1)).clip(1, cap)).float()


def stage2_loss(denoiser: SemanticUNet, batch: LatentBatch, class_weight: Tensor | None = None) -> Tensor:
    """Return the objective's loss; times, noise and what is hidden come from torch's generator.

    Args:
        denoiser: In training, some maps, classes and modalities are hidden, as its settings say.
        batch: On the network's device.
        class_weight: From ``class_weights``.
    """
    objective, device = Objective(denoiser.config.objective), batch.latents.device
    count, voxels = len(batch.latents), batch.latents[0, 0].numel()
    keep, modality = None, batch.modality
    if denoiser.training:
        keep = kept_classes(denoiser.config, count, denoiser.n_classes).to(device)
        hidden = torch.rand(count).to(device) < denoiser.config.modality_dropout
        modality = modality.masked_fill(hidden, ANY_MODALITY)
    times, noise = objective.draw_times(count, voxels).to(device), torch.randn(batch.latents.shape).to(device)
    noisy = objective.noisy(batch.latents, noise, times)
    with autocast(device):
        guidance = denoiser.prepare_labels(batch.labels, keep)
        output = denoiser(noisy, times, guidance, batch.spacing, modality, batch.position)
    weight = batch.mask
    if class_weight is not None:
        weight = weight * _voxel_weights(batch.labels, class_weight.to(device), denoiser.strides)
    return objective.loss(output, batch.latents, noise, times, weight)


def kept_classes(config: DenoiserConfig, count: int, n_classes: int) -> Tensor:
    """Draw which classes are told [B, K]: most often all, at times none, at times a random part."""
    part = torch.rand(count, n_classes) < torch.rand(count, 1)
    partial = torch.rand(count, 1) < config.partial_labels
    none = torch.rand(count, 1) < config.label_dropout
    return ((~partial | part) & ~none).float()


def _voxel_weights(labels: Tensor, class_weight: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """Return each latent voxel's weight [B, 1, x, y, z]: the mean over the voxels that it stands for."""
    weights = torch.zeros(labels.shape, device=labels.device)
    for index, weight in enumerate(class_weight.tolist()):
        weights += weight * (labels == index)
    return functional.avg_pool3d(weights[:, None], strides)


def train_stage2(
    denoiser: SemanticUNet,
    latents: LatentSet,
    stage: StageConfig,
    *,
    steps: int,
    first_step: int = 0,
    total_steps: int | None = None,
    seed: int,
    progress: Report | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    ema: Ema | None = None,
) -> float:
    """Train the denoiser for a slice of one schedule; arguments as in ``train_stage1``.

    ``ema`` takes in the weights after each step; the denoiser itself keeps its own, and what a run saves
    as its result is ``ema.weights()``. A federated slice passes none: averaging over sites does what
    averaging over steps does on one machine, and a site's average would forget what the others sent.

    Returns:
        The mean loss of the last quarter of the steps.
    """
    device = device_of(denoiser)
    class_weight = class_weights(latents, denoiser.n_classes, denoiser.config.objective.class_weight_cap)

    def step_loss(rng: np.random.Generator) -> Tensor:
        chosen = rng.integers(len(latents), size=stage.batch)
        return stage2_loss(denoiser, LatentBatch.of(latents, chosen, device), class_weight)

    return fit(
        denoiser, step_loss, stage, "stage 2", steps=steps, first_step=first_step, total_steps=total_steps,
        seed=seed, progress=progress, optimiser=optimiser, after_step=ema.update if ema is not None else None,
    )  # fmt: skip


def network_of(
    denoiser: SemanticUNet, batch: LatentBatch, guidance: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Network:
    """Return the denoiser as a function of noisy latents and time, under a batch's labels and conditions."""
    conditions = batch.spacing, batch.modality, batch.position
    x, y, z = batch.labels.shape[1:]
    with autocast(batch.latents.device):
        labelled = denoiser.prepare_labels(batch.labels)
        null = denoiser.prepare_null(len(batch.labels), (x, y, z)) if guidance != 1 else labelled

    def half(labels: LabelGuidance) -> Network:
        def network(noisy: Tensor, times: Tensor) -> Tensor:
            with autocast(noisy.device):
                return denoiser(noisy, times, labels, *conditions)

        return network

    return guided(half(labelled), half(null), guidance, interval)


@torch.no_grad()
def held_out_loss(denoiser: SemanticUNet, latents: LatentSet, *, seed: int = 0, batch: int = 8) -> float:
    """Return the objective's loss on latents never trained on, at the same times and noise in each call."""
    training = denoiser.training
    denoiser.eval()
    device, total = device_of(denoiser), 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(latents), batch):
            chosen = np.arange(start, min(start + batch, len(latents)))
            total += len(chosen) * float(stage2_loss(denoiser, LatentBatch.of(latents, chosen, device)))
    denoiser.train(training)
    return total / len(latents)
