"""Few-step sampling: teach the denoiser to take in one stride what it took many small steps for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medlsdm.config import StageConfig
from medlsdm.diffusion.samplers import sample, seeded_noise, time_grid
from medlsdm.errors import ConfigError
from medlsdm.models.ema import Ema
from medlsdm.models.unet import SemanticUNet
from medlsdm.training.loop import Report, device_of, fit
from medlsdm.training.stage2 import LatentBatch, LatentSet, network_of


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Trajectories:
    """Hold the teacher's paths: points [M, segments + 1, C, x, y, z] at ``times``, the noise first.

    Path m goes under the labels and conditions of row ``row[m]`` of ``latents``.
    """

    points: NDArray[np.float32]
    times: NDArray[np.float32]
    row: NDArray[np.int64]
    latents: LatentSet

    def __len__(self) -> int:
        return len(self.points)


@torch.no_grad()
def draw_trajectories(
    teacher: SemanticUNet,
    latents: LatentSet,
    *,
    segments: int,
    substeps: int = 4,
    guidance: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    batch: int = 8,
    shift: float = 1.0,
) -> Trajectories:
    """Follow the teacher from fresh noise under each row's label map, and keep the points between segments.

    Args:
        teacher: Trained on the objective ``flow``.
        latents: Whose label maps and conditions to draw under.
        segments: How many steps the student shall need.
        substeps: Steps of Heun's method in each segment.
        guidance: Goes into the paths, so that the student needs no second call for it.
        draws: Paths for each row.
        seed: Of the noise.
        batch: How many paths to draw at once; they do not depend on it.
        shift: Of the student's time grid.

    Raises:
        ConfigError: The teacher's objective is another.
    """
    if teacher.config.objective.kind != "flow":
        raise ConfigError("Only a denoiser trained on the objective 'flow' can be straightened.", "Train a flow.")
    teacher.eval()
    device, times = device_of(teacher), time_grid(segments, shift).float()
    rows = np.tile(np.arange(len(latents)), draws)
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(len(rows))]
    paths: list[NDArray[np.float32]] = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        network = network_of(teacher, LatentBatch.of(latents, chosen, device), guidance)
        points = [seeded_noise(seeds[start : start + batch], latents.latents.shape[1:]).to(device)]
        for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            points.append(sample(network, points[-1], steps=substeps, method="heun", span=(now, then)))
        paths.append(torch.stack(points, dim=1).cpu().numpy())
    return Trajectories(np.concatenate(paths), times.numpy(), rows, latents)


def reflow_loss(denoiser: SemanticUNet, paths: Trajectories, chosen: NDArray[np.int64]) -> Tensor:
    """Return the error of the velocity along straight lines between neighbouring points of the chosen paths."""
    device = device_of(denoiser)
    batch = LatentBatch.of(paths.latents, paths.row[chosen], device)
    segment = torch.randint(len(paths.times) - 1, (len(chosen),))
    # Half of the draws lie where the student's steps begin, the others anywhere in the segment.
    share = torch.rand(len(chosen)) * (torch.rand(len(chosen)) < 0.5)
    start, stop = (torch.from_numpy(paths.times)[segment + i] for i in (0, 1))
    first, last = (torch.from_numpy(paths.points[chosen, segment.numpy() + i]).to(device) for i in (0, 1))
    step = (stop - start).view(-1, 1, 1, 1, 1).to(device)
    noisy = torch.lerp(first, last, share.view(-1, 1, 1, 1, 1).to(device))
    times = (start + share * (stop - start)).to(device)
    error = network_of(denoiser, batch)(noisy, times) - (last - first) / step
    return (error.square() * batch.mask).sum() / (batch.mask.sum() * error.shape[1])


def reflow(
    denoiser: SemanticUNet,
    paths: Trajectories,
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
    """Straighten the denoiser's flow within each segment of the paths; arguments as in ``train_stage2``.

    Afterwards Euler's method needs one step for each segment. With one segment this is rectified
    flow's own reflow; with more, the lines are shorter and easier to learn.

    Source: Liu et al. (arXiv 2209.03003), algorithm 1; segments: Yan et al., PeRFlow (arXiv 2405.07510).
    """

    def step_loss(rng: np.random.Generator) -> Tensor:
        return reflow_loss(denoiser, paths, rng.integers(len(paths), size=stage.batch))

    return fit(
        denoiser, step_loss, stage, "reflow", steps=steps, first_step=first_step, total_steps=total_steps,
        seed=seed, progress=progress, optimiser=optimiser, after_step=ema.update if ema is not None else None,
    )  # fmt: skip
