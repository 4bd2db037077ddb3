"""Early warning: does the denoiser draw its training patients rather than new ones?"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from medlsdm.config import SamplingConfig
from medlsdm.diffusion.objectives import Objective
from medlsdm.diffusion.samplers import sample, seeded_noise
from medlsdm.errors import DataError
from medlsdm.models.unet import SemanticUNet
from medlsdm.training.loop import device_of
from medlsdm.training.stage2 import LatentBatch, LatentSet, network_of


def memorisation_rate(
    denoiser: SemanticUNet,
    training: LatentSet,
    held_out: LatentSet,
    *,
    samples: int = 32,
    steps: int = 6,
    seed: int = 0,
) -> float:
    """Return how often a sample lies nearer to a training patient than to held-out ones: 0.5 is no memory, 1 copies.

    Samples are drawn under held-out label maps, and the patient whose map it is does not count. The
    larger set has more chances to lie near, so the rate is that for equally many patients on both sides,
    averaged over every choice of them. Encode both sets with equally many ``variants``.

    Raises:
        DataError: Fewer than two patients are held out.
    """
    patients = np.unique(held_out.patient)
    if len(patients) < 2:
        raise DataError("Memorisation cannot be measured on fewer than two held-out patients.", "Hold out more.")
    chosen = np.resize(np.arange(len(held_out)), samples)
    drawn = draw_latents(denoiser, held_out, chosen, SamplingConfig(steps=steps), seeds=range(seed, seed + samples))
    rates = []
    for latents, row in zip(drawn, chosen, strict=True):
        others = _distances(latents, held_out)
        del others[int(held_out.patient[row])]
        rates.append(_chance_nearer(list(_distances(latents, training).values()), list(others.values())))
    return float(np.mean(rates))


def _chance_nearer(ours: list[float], theirs: list[float]) -> float:
    """Return the chance that the nearest of some of ours is nearer than the nearest of as many of theirs."""
    if len(ours) < len(theirs):
        return 1 - _chance_nearer(theirs, ours)
    farther = sum(distance >= min(theirs) for distance in ours)
    return 1 - math.comb(farther, len(theirs)) / math.comb(len(ours), len(theirs))


@torch.no_grad()
def draw_latents(
    denoiser: SemanticUNet,
    latents: LatentSet,
    chosen: NDArray[np.int64],
    sampling: SamplingConfig,
    *,
    seeds: range,
    batch: int = 8,
) -> NDArray[np.float32]:
    """Draw standardised latents [N, C, x, y, z] under the label maps and conditions of the chosen rows."""
    training, device = denoiser.training, device_of(denoiser)
    denoiser.eval()
    parts = []
    for start in range(0, len(chosen), batch):
        rows, own = chosen[start : start + batch], seeds[start : start + batch]
        network = network_of(
            denoiser, LatentBatch.of(latents, rows, device), sampling.guidance, sampling.guidance_interval
        )
        noise = seeded_noise(own, latents.latents.shape[1:]).to(device)
        objective = Objective(denoiser.config.objective)
        drawn = sample(
            network, noise, steps=sampling.steps, method=sampling.sampler, objective=objective, seeds=own,
            shift=sampling.shift,
        )  # fmt: skip
        parts.append(drawn.cpu().numpy())
    denoiser.train(training)
    return np.concatenate(parts)


def _distances(drawn: NDArray[np.float32], among: LatentSet) -> dict[int, float]:
    """Return each patient's mean squared distance: that of the nearest variant, where it is no padding."""
    nearest: dict[int, float] = {}
    for latents, mask, patient in zip(among.latents, among.mask, among.patient.tolist(), strict=True):
        distance = float(((latents - drawn) ** 2 * mask).mean(axis=0).sum() / max(1.0, mask.sum()))
        nearest[patient] = min(distance, nearest.get(patient, math.inf))
    return nearest
