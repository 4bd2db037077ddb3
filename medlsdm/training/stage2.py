"""Stage 2: train the semantic denoiser on cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medlsdm.config import StageConfig
from medlsdm.diffusion.objectives import logit_normal_times, rectified_flow_loss
from medlsdm.models.spade import one_hot
from medlsdm.models.unet import SemanticUNet
from medlsdm.models.vqgan import VQGAN
from medlsdm.training.loop import Report, autocast, device_of, fit
from medlsdm.training.patients import TrainingSet
from medlsdm.training.stage1 import latent_mask


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class LatentSet:
    """Hold standardised latents [M, C, x, y, z] with labels at full resolution, M = patients x variants.

    ``patient`` [M] tells whose latents they are: the unit of privacy.
    """

    latents: NDArray[np.float32]
    labels: NDArray[Any]
    mask: NDArray[np.float32]
    spacing: NDArray[np.float32]
    modality: NDArray[np.int64]
    patient: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.latents)


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
            parts.append((standard, batch.labels, mask.numpy(), batch.spacing, batch.modality, np.array([index])))
    latents, labels, masks, spacing, modality, patient = (np.concatenate(column) for column in zip(*parts, strict=True))
    return LatentSet(latents, labels, masks, spacing, modality, patient)


def flow_loss(denoiser: SemanticUNet, latents: LatentSet, chosen: NDArray[np.int64]) -> Tensor:
    """Return the flow loss of the chosen rows; times, noise and label dropout come from torch's generator."""
    device = device_of(denoiser)
    clean, mask, spacing, modality = (
        torch.from_numpy(column[chosen]).to(device)
        for column in (latents.latents, latents.mask, latents.spacing, latents.modality)
    )
    labels = one_hot(torch.from_numpy(latents.labels[chosen].astype(np.int32)).to(device), denoiser.n_classes)
    dropout = denoiser.config.label_dropout if denoiser.training else 0.0
    if dropout:
        labels = labels * (torch.rand(len(chosen), 1, 1, 1, 1) >= dropout).to(device)
    times, noise = logit_normal_times(len(chosen)).to(device), torch.randn(clean.shape).to(device)
    with autocast(device):
        guidance = denoiser.prepare_labels(labels)
        return rectified_flow_loss(
            lambda x, t: denoiser(x, t, guidance, spacing, modality), clean, times, noise, mask
        )  # fmt: skip


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
) -> float:
    """Train the denoiser for a slice of one schedule; arguments as in ``train_stage1``.

    Returns:
        The mean loss of the last quarter of the steps.
    """

    def step_loss(rng: np.random.Generator) -> Tensor:
        return flow_loss(denoiser, latents, rng.integers(len(latents), size=stage.batch))

    return fit(
        denoiser, step_loss, stage, "stage 2", steps=steps, first_step=first_step,
        total_steps=total_steps, seed=seed, progress=progress, optimiser=optimiser,
    )  # fmt: skip
