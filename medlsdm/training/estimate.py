"""What a training will take, from a few real steps of each of its phases."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medlsdm.memory import peak_resident_bytes
from medlsdm.training.run import REFLOW, STAGE2, TEXTURE, Phase, TrainingRun
from medlsdm.training.state import state_bytes

AIM_SECONDS = 3.0
"""How long to look at each phase, about."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Hold CPU seconds (all threads) and wall seconds."""

    cpu: float
    wall: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.cpu * factor, self.wall * factor)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Say what a run will take: CPU and wall minutes of each phase, peak memory and disk.

    ``memory_bytes`` is the peak of this process, data included; ``gpu_bytes`` that on the GPU, if any.
    """

    phases: dict[str, dict[str, float]]
    cpu_minutes: float
    wall_minutes: float
    memory_bytes: int
    gpu_bytes: int
    disk_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def estimate(run: TrainingRun) -> Estimate:
    """Train a few steps of each phase of a fresh run and say what all of them will take.

    The run's weights change and its folder gets logs: give it a folder of its own, and throw it away.
    """
    costs: dict[str, Cost] = {}
    for phase in run.phases:
        costs[phase.name] = _once(run, phase.name) + _phase(phase)
    run.log.close()
    total = sum(costs.values(), Cost(0, 0))
    weights = sum(p.numel() * p.element_size() for net in (run.autoencoder, run.denoiser) for p in net.parameters())
    return Estimate(
        phases={
            phase.name: {
                "steps": phase.stage.steps,
                "cpu_minutes": round(costs[phase.name].cpu / 60, 2),
                "wall_minutes": round(costs[phase.name].wall / 60, 2),
            }
            for phase in run.phases
        },
        cpu_minutes=round(total.cpu / 60, 2),
        wall_minutes=round(total.wall / 60, 2),
        memory_bytes=peak_resident_bytes(),
        gpu_bytes=torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0,
        disk_bytes=len(state_bytes(run.parts, {})) + weights,
    )


def estimate_training(**arguments: Any) -> Estimate:
    """Return the estimate for the ``TrainingRun`` that these arguments (without ``folder``) make."""
    with tempfile.TemporaryDirectory(prefix="medlsdm-estimate-") as folder:
        return estimate(TrainingRun(Path(folder), **arguments, pictures=False))


def _phase(phase: Phase) -> Cost:
    """Return the cost of a whole phase: per step, and per slice for what follows each."""
    if not phase.stage.steps:
        return Cost(0, 0)
    phase.train(0, 1)  # makes ready what a phase prepares once, and the first step is slow
    one = _timed(phase, 1)
    more = max(2, min(40, round(AIM_SECONDS / max(one.wall, 1e-3))))
    many = _timed(phase, 1 + more)
    step = (many + one * -1) * (1 / more)
    step = Cost(max(step.cpu, 0.0), max(step.wall, 0.0))
    rest = Cost(max(one.cpu - step.cpu, 0.0), max(one.wall - step.wall, 0.0))
    return step * phase.stage.steps + rest * len(phase.slices(0))


def _timed(phase: Phase, steps: int) -> Cost:
    """Train at the end of the schedule, where everything that a preset asks for has begun."""
    cpu, wall = time.process_time(), time.perf_counter()
    phase.train(max(0, phase.stage.steps - steps), steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def _once(run: TrainingRun, phase: str) -> Cost:
    """Return the cost of what comes once before a phase: encoding the scans, drawing paths, or drawing samples."""
    cpu, wall = time.process_time(), time.perf_counter()
    if phase == STAGE2:
        _ = run.latents
    if phase == REFLOW:
        _ = run.trajectories
    if phase == TEXTURE:
        _ = run.samples
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)
