"""The training loop that both stages share: schedule, seeds, clipping, progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medlsdm.config import StageConfig
from medlsdm.errors import DataError, MedlsdmError
from medlsdm.training.devices import average_gradients, memory_advice, rank_and_size, recomputed_blocks, share_buffers
from medlsdm.training.muon import Muon, muon_groups


@dataclass(frozen=True, slots=True)
class Progress:
    """Say where training stands: ``step`` of ``steps`` done in this stage, and what the last one was like.

    ``gradient_norm`` is taken before clipping; ``seconds`` is what the step took.
    """

    stage: str
    step: int
    steps: int
    loss: float
    learning_rate: float = math.nan
    gradient_norm: float = math.nan
    seconds: float = math.nan


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


@cache
def sums_depend_on_shape() -> bool:
    """Tell whether oneDNN may take this CPU's AMX units for bfloat16: they add up in an order that the shape decides.

    Seen with torch 2.13: a denoiser's windows then differ from the whole in the last bit of bfloat16, layer after
    layer by up to 3 % of the latents' spread, and a rounding quantiser turns that into other codes.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return "amx_bf16" in flags and (held in ("ALL", "DEFAULT", "") or "AMX" in held or held.startswith("AVX10"))


def sampling_precision(device: torch.device) -> torch.autocast:
    """Return the precision context for sampling, in which windows equal the whole on every CPU."""
    enabled = device.type != "cpu" or (bfloat16_pays() and not sums_depend_on_shape())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's weights are."""
    return next(module.parameters()).device


def learning_rate(stage: StageConfig, step: int, total_steps: int) -> float:
    """Return the rate at ``step`` of one schedule: linear warm-up, then a half cosine to zero."""
    warm = min(1.0, (step + 1) / (stage.warmup + 1))
    return stage.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))


def make_optimiser(module: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """Return the stage's optimiser, with weight decay on matrices and convolutions only.

    Muon leaves the layer ``out``, by which our networks end, to AdamW.
    """
    if stage.optimiser == "muon":
        out = getattr(module, "out", None)
        last = out.parameters() if isinstance(out, nn.Module) else ()
        return Muon(muon_groups(module, stage.weight_decay, last), lr=stage.learning_rate)
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
    after_step: Callable[[], None] | None = None,
) -> float:
    """Take ``steps`` steps of a schedule of ``total_steps`` that begins at ``first_step``.

    Each step draws from a generator of its own, made of ``seed`` and the step's number, so that
    training in slices equals training at once when the optimiser is kept. Without ``optimiser``
    a fresh one starts, with a short ramp of its own. Where several processes train together, each
    draws its own batch and all take one step by the mean gradient.

    Args:
        module: Trained in place.
        step_loss: Returns one step's loss; its draws come from the generator given and from torch's.
        stage: Rates, clipping and how to spend memory.
        name: What to call this in reports, for example "stage 1".
        steps: How many steps to take now.
        first_step: Where this slice begins in the schedule.
        total_steps: How long the whole schedule is; by default it ends with this slice.
        seed: Makes the training repeatable.
        progress: Called after every step.
        optimiser: Kept between slices on one machine; a fresh one otherwise.
        after_step: Called after every update of the weights, for example to move their average.

    Returns:
        The mean loss of the last quarter of the steps.

    Raises:
        MedlsdmError: The loss is no longer finite.
        ResourceError: Memory ran out.
    """
    if steps < 1:
        raise DataError("Training needs at least one step.", "Raise the number of steps.")
    total = total_steps or first_step + steps
    ramp = 10 if optimiser is None else 0
    optimiser = optimiser or make_optimiser(module, stage)
    parameters = [p for p in module.parameters() if p.requires_grad]
    losses: list[float] = []
    _arrange(module, stage)
    module.train()
    advice = f"Lower batch ({stage.batch}) or crop in the preset, set gradient_checkpointing: true, or use less data."
    with (
        torch.random.fork_rng(devices=[d for d in [device_of(module)] if d.type == "cuda"]),
        memory_advice(name, advice),
        recomputed_blocks(module, stage.gradient_checkpointing),
    ):
        for taken in range(steps):
            started, step = time.perf_counter(), first_step + taken
            rng = seeded(seed, step)
            rate = learning_rate(stage, step, total) * min(1.0, (taken + 1) / (ramp + 1))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = step_loss(rng)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise MedlsdmError(f"The loss of {name} is not finite at step {step}.", "Lower the learning rate.")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, stage.gradient_clip))
            optimiser.step()
            share_buffers(module)
            if after_step is not None:
                after_step()
            if progress is not None:
                progress(Progress(name, step + 1, total, losses[-1], rate, norm, time.perf_counter() - started))
    module.eval()
    return float(np.mean(losses[-max(1, steps // 4) :]))


def seeded(seed: int, step: int) -> np.random.Generator:
    """Seed torch for one step and return the step's own generator; both differ between processes."""
    rank = rank_and_size()[0]
    entropy = [seed, step] if rank == 0 else [seed, step, rank]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    return np.random.default_rng(entropy)


def _arrange(module: nn.Module, stage: StageConfig) -> None:
    """Lay out and compile the module as the settings say."""
    if stage.channels_last:
        module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if stage.compile and module._compiled_call_impl is None:
        module.compile()
