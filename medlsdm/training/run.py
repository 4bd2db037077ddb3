"""Training on one machine: both stages, a checkpoint after each, and going on where it stopped."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from medlsdm.checkpoints import load_checkpoint, save_checkpoint
from medlsdm.checks import write_atomic
from medlsdm.config import Preset
from medlsdm.errors import ConfigError, IntegrityError
from medlsdm.model_card import ModelCard
from medlsdm.models.unet import SemanticUNet, build_denoiser
from medlsdm.models.vqgan import VQGAN, build_autoencoder
from medlsdm.training.loop import Progress, Report, make_optimiser
from medlsdm.training.patients import TrainingSet
from medlsdm.training.stage1 import train_stage1
from medlsdm.training.stage2 import encode_latents, train_stage2

RESUME = "resume.safetensors"
LOSSES = "losses.csv"


@dataclass(slots=True)
class Position:
    """Say how many steps of each stage are done."""

    stage1: int = 0
    stage2: int = 0


class TrainingRun:
    """Train a preset on one data set into a folder; running again goes on from the last save.

    Args:
        folder: Receives checkpoint, losses and the state to resume from.
        preset: Resolved settings.
        data: The patients.
        seed: Makes the run repeatable.
        progress: Called after every step.
    """

    def __init__(
        self, folder: Path, preset: Preset, data: TrainingSet, *, seed: int, progress: Report | None = None
    ) -> None:
        self.folder, self.preset, self.data, self.seed = folder, preset, data, seed
        self._report = progress
        self._rows: list[Progress] = []
        self.position = Position()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder: VQGAN = build_autoencoder(preset, len(data.schema.classes))
            self.denoiser: SemanticUNet = build_denoiser(preset, len(data.schema.classes))
        self._optimisers = {
            "stage1": make_optimiser(self.autoencoder, preset.stage1),
            "stage2": make_optimiser(self.denoiser, preset.stage2),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RESUME).is_file():
            self._resume()

    def train(self) -> ModelCard:
        """Train what is left of both stages and return the card of the final checkpoint."""
        for now, steps in self._slices(self.preset.stage1.steps, self.preset.stage1.save_every, "stage1"):
            train_stage1(
                self.autoencoder, self.data, self.preset.stage1, steps=steps, first_step=now,
                total_steps=self.preset.stage1.steps, seed=self.seed, progress=self._note,
                optimiser=self._optimisers["stage1"],
            )  # fmt: skip
            self.position.stage1 = now + steps
            self._save()
        left = self._slices(self.preset.stage2.steps, self.preset.stage2.save_every, "stage2")
        latents = encode_latents(self.autoencoder, self.data, seed=self.seed) if left else None
        for now, steps in left:
            assert latents is not None
            train_stage2(
                self.denoiser, latents, self.preset.stage2, steps=steps, first_step=now,
                total_steps=self.preset.stage2.steps, seed=self.seed + 1, progress=self._note,
                optimiser=self._optimisers["stage2"],
            )  # fmt: skip
            self.position.stage2 = now + steps
            self._save()
        return load_checkpoint(self.folder).card

    def _slices(self, total: int, every: int, stage: str) -> list[tuple[int, int]]:
        """Return (first step, steps) of each slice between saves that is still to do."""
        done = getattr(self.position, stage)
        return [(now, min(every - now % every, total - now)) for now in _marks(done, total, every)]

    def _note(self, progress: Progress) -> None:
        self._rows.append(progress)
        if self._report is not None:
            self._report(progress)

    @property
    def _identity(self) -> str:
        """Return a digest of what must be equal for a run to go on."""
        subjects = [patient.subject for patient in self.data.patients]
        text = json.dumps([self.preset.digest, self.data.schema.digest, self.seed, subjects])
        return hashlib.sha256(text.encode()).hexdigest()

    def _parts(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "denoiser": self.denoiser}

    def _save(self) -> None:
        """Write weights, optimiser state, losses and a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts().items():
            tensors |= {f"{name}/{key}": value for key, value in part.state_dict().items()}
        for name, optimiser in self._optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}/{index}/{key}": value for key, value in state.items()}
        meta = {"run": self._identity, "stage1": str(self.position.stage1), "stage2": str(self.position.stage2)}
        content = save_tensors({key: value.contiguous() for key, value in tensors.items()}, metadata=meta)
        write_atomic(self.folder / RESUME, content)
        self._write_losses()
        self._checkpoint()

    def _resume(self) -> None:
        try:
            with safe_open(self.folder / RESUME, framework="pt") as stream:
                meta = stream.metadata() or {}
                tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(
                f"{RESUME} cannot be read, so the run cannot go on.", "Delete the run's folder and start again."
            ) from error
        if meta.get("run") != self._identity:
            raise ConfigError(
                "The output folder holds a run with other data, preset, labels or seed.",
                "Give another --out, or the same settings to go on.",
            )
        self.position = Position(int(meta["stage1"]), int(meta["stage2"]))
        for name, part in self._parts().items():
            part.load_state_dict({k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")})
        for name, optimiser in self._optimisers.items():
            states: dict[int, dict[str, Tensor]] = {}
            for key in (k for k in tensors if k.startswith(f"{name}/")):
                _, index, field = key.split("/")
                states.setdefault(int(index), {})[field] = tensors[key]
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states})

    def _write_losses(self) -> None:
        path = self.folder / LOSSES
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if fresh:
                writer.writerow(["stage", "step", "loss"])
            writer.writerows((row.stage, row.step, f"{row.loss:.6f}") for row in self._rows)
        self._rows.clear()

    def _checkpoint(self) -> ModelCard:
        return save_checkpoint(
            self.folder,
            preset=self.preset,
            model_id=f"medlsdm-{self.preset.name}-{self._identity[:8]}",
            schema=self.data.schema,
            modalities=sorted({p.modality for p in self.data.patients}),
            autoencoder=self.autoencoder.state_dict(),
            denoiser=self.denoiser.state_dict() if self.position.stage2 else None,
            steps={"stage 1": self.position.stage1, "stage 2": self.position.stage2},
            training_data=f"{len(self.data)} pairs of scan and label map on one machine.",
        )


def _marks(done: int, total: int, every: int) -> list[int]:
    """Return the steps at which slices begin: where we are, then each multiple of ``every``."""
    return sorted({done, *range((done // every + 1) * every, total, every)}) if done < total else []
