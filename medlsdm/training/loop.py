"""The training loop that both stages share: schedule, seeds, clipping, progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medlsdm.config import StageConfig
from medlsdm.errors import DataError, MedlsdmError


@dataclass(frozen=True, slots=True)
class Progress:
    """Say where training stands: ``step`` of ``steps`` done in this stage, and the last loss."""

    stage: str
    step: int
    steps: int
    loss: float


Report = Callable[[Progress], None]
StepLoss = Callable[[np.random.Generator], Tensor]


@cache
def bfloat16_pays() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware; elsewhere autocast only costs."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device) -> torch.autocast:
    """Return the precision context for a device: bfloat16 where the hardware has it."""
    enabled = device.type != "cpu" or bfloat16_pays()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's weights are."""
    return next(module.parameters()).device


def learning_rate(stage: StageConfig, step: int, total_steps: int) -> float:
    """Return the rate at ``step`` of one schedule: linear warm-up, then a half cosine to zero."""
    warm = min(1.0, (step + 1) / (stage.warmup + 1))
    return stage.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))


def make_optimiser(module: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and convolutions only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.99))


def fit(
    module: nn.Module,
    step_loss: StepLoss,
    stage: StageConfig,
    name: str,
    *,
    steps: int,
    first_step: int,
    total_steps: int | None,
    seed: int,
    progress: Report | None,
    optimiser: torch.optim.Optimizer | None,
) -> float:
    """Take ``steps`` steps of a schedule of ``total_steps`` that begins at ``first_step``.

    Each step draws from a generator of its own, made of ``seed`` and the step's number, so that
    training in slices equals training at once when the optimiser is kept. Without ``optimiser``
    a fresh one starts, with a short ramp of its own.

    Returns:
        The mean loss of the last quarter of the steps.

    Raises:
        MedlsdmError: The loss is no longer finite.
    """
    if steps < 1:
        raise DataError("Training needs at least one step.", "Raise the number of steps.")
    total = total_steps or first_step + steps
    ramp = 10 if optimiser is None else 0
    optimiser = optimiser or make_optimiser(module, stage)
    parameters = [p for p in module.parameters() if p.requires_grad]
    losses: list[float] = []
    module.train()
    with torch.random.fork_rng(devices=[]):
        for taken in range(steps):
            step = first_step + taken
            torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
            rate = learning_rate(stage, step, total) * min(1.0, (taken + 1) / (ramp + 1))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = step_loss(np.random.default_rng([seed, step]))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise MedlsdmError(f"The loss of {name} is not finite at step {step}.", "Lower the learning rate.")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, stage.gradient_clip)
            optimiser.step()
            if progress is not None:
                progress(Progress(name, step + 1, total, losses[-1]))
    module.eval()
    return float(np.mean(losses[-max(1, steps // 4) :]))
