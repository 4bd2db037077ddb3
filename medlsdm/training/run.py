"""Training on one machine: the phases in turn, a checkpoint after each slice, and going on where it stopped."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from medlsdm.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from medlsdm.config import Preset, StageConfig
from medlsdm.errors import ConfigError, SchemaError
from medlsdm.model_card import ModelCard
from medlsdm.models.ema import Ema
from medlsdm.models.perceptual import FeatureNetwork
from medlsdm.models.unet import SemanticUNet, build_denoiser
from medlsdm.models.vqgan import VQGAN, build_autoencoder
from medlsdm.training.adversary import build_adversary
from medlsdm.training.devices import memory_advice, rank_and_size
from medlsdm.training.likeness import PatchCritic
from medlsdm.training.logs import TrainingLog
from medlsdm.training.loop import Progress, Report, make_optimiser
from medlsdm.training.memorisation import memorisation_rate
from medlsdm.training.patients import TrainingSet, split_patients
from medlsdm.training.reflow import Trajectories, draw_trajectories, reflow
from medlsdm.training.stage1 import train_stage1
from medlsdm.training.stage2 import LatentSet, encode_latents, held_out_loss, train_stage2
from medlsdm.training.state import Stateful, read_state, write_state
from medlsdm.training.texture import LatentSamples, draw_samples, texture_fits, train_texture
from medlsdm.training.watch import Watch

RESUME = "resume.safetensors"
STAGE1, STAGE2, REFLOW, TEXTURE = "stage 1", "stage 2", "reflow", "texture"


@dataclass(frozen=True, slots=True)
class Phase:
    """Hold one part of a run: its name, settings and module, and what trains ``steps`` steps from ``first_step`` on."""

    name: str
    stage: StageConfig
    module: nn.Module
    train: Callable[[int, int], float]

    def slices(self, done: int) -> list[tuple[int, int]]:
        """Return (first step, steps) of each slice between saves that is still to do."""
        total, every = self.stage.steps, self.stage.save_every
        if done >= total:
            return []
        marks = [done, *range((done // every + 1) * every, total, every), total]
        return [(a, b - a) for a, b in itertools.pairwise(marks)]


class TrainingRun:
    """Train a preset on one data set into a folder; running again goes on from the last save, bit for bit.

    ``parts`` names everything with a state that later steps depend on (weights, optimisers, averages,
    discriminators); ``phases`` are trained in turn. A new phase adds to both.

    Args:
        folder: Receives checkpoint, logs, pictures and the state to resume from.
        preset: Resolved settings.
        data: The patients.
        seed: Makes the run repeatable.
        progress: Called after every step.
        device: Where to train.
        start: Whose weights to begin with, for fine-tuning.
        hold_out: The share of patients that is never trained on, to measure with.
        features: What the perceptual loss of stage 1 looks with; fixed random convolutions by default.
        pictures: Look at cases at every save; they show real patients and stay in the folder.

    Raises:
        ConfigError: The folder holds another run, ``start`` is of another architecture, or ``features`` are given
            to a preset without perceptual loss.
        SchemaError: ``start`` is under another label schema.
        IntegrityError: The state to resume from is damaged.
    """

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        data: TrainingSet,
        *,
        seed: int,
        progress: Report | None = None,
        device: torch.device | str = "cpu",
        start: Checkpoint | None = None,
        hold_out: float = 0.0,
        features: FeatureNetwork | None = None,
        pictures: bool = True,
    ) -> None:
        self.folder, self.preset, self.seed, self.start = folder, preset, seed, start
        self.data, self.held_out = split_patients(data, hold_out)
        self.device = torch.device(device)
        if features is not None and not preset.stage1.losses.perceptual:
            raise ConfigError(
                f"The preset {preset.name!r} has no perceptual loss to use the feature network in.",
                "Set stage1.losses.perceptual above 0 in a preset of your own, or leave the network out.",
            )
        self.features = features
        self._report, self._log = progress, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder, self.denoiser = self._build()
            self._adversary = build_adversary(preset.stage1.losses.adversarial, self.device)
            critic = PatchCritic().to(self.device)
        self.phases = [
            Phase(STAGE1, preset.stage1, self.autoencoder, self._train_stage1),
            Phase(STAGE2, preset.stage2, self.denoiser, self._train_stage2),
        ]
        self._teacher = copy.deepcopy(self.denoiser) if preset.reflow.steps else None
        if self._teacher is not None:
            self.phases.append(Phase(REFLOW, preset.reflow, self.denoiser, self._train_reflow))
        self._critic = None
        if preset.texture.steps and self.autoencoder.texture is not None and texture_fits(self.data, preset.texture):
            self._critic = critic
            self.phases.append(Phase(TEXTURE, preset.texture, self.autoencoder.texture, self._train_texture))
        self._optimisers = {phase.name: make_optimiser(phase.module, phase.stage) for phase in self.phases}
        self.parts: dict[str, Stateful] = {
            "autoencoder": self.autoencoder,
            "denoiser": self.denoiser,
            **{f"optimiser of {name}": optimiser for name, optimiser in self._optimisers.items()},
        }
        self._average = Ema(self.denoiser, preset.denoiser.ema) if preset.denoiser.ema else None
        optional = {
            "adversary": self._adversary,
            "average of the denoiser": self._average,
            "critic": self._critic,
            "teacher": self._teacher,
        }
        self.parts |= {name: part for name, part in optional.items() if part is not None}
        self.position = {phase.name: 0 for phase in self.phases}
        self._watch = None
        if pictures or hold_out:
            self._watch = Watch(folder, self.data, self.held_out, seed, self.device, pictures=pictures)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RESUME).is_file():
            self._resume()

    def train(self) -> ModelCard:
        """Train what is left of every phase and return the card of the final checkpoint."""
        for phase in self.phases:
            for first, steps in phase.slices(self.position[phase.name]):
                phase.train(first, steps)
                self.position[phase.name] = first + steps
                self._save(phase.name)
        if self._log is not None:
            self._log.close()
        return load_checkpoint(self.folder).card

    def _build(self) -> tuple[VQGAN, SemanticUNet]:
        """Return both networks: fresh ones, or with the weights of ``start``."""
        classes = len(self.data.schema.classes)
        autoencoder, denoiser = build_autoencoder(self.preset, classes), build_denoiser(self.preset, classes)
        if self.start is not None:
            check_start(self.start, self.preset, self.data)
            autoencoder = self.start.build_autoencoder()
            denoiser = self.start.build_denoiser() if self.start.denoiser is not None else denoiser
        with memory_advice("loading the model", "Take a smaller preset, or a machine with more memory."):
            return autoencoder.to(self.device), denoiser.to(self.device)

    def _train_stage1(self, first_step: int, steps: int) -> float:
        return train_stage1(
            self.autoencoder, self._augmented(self.preset.stage1), self.preset.stage1, steps=steps,
            first_step=first_step, total_steps=self.preset.stage1.steps, seed=self.seed, progress=self._note,
            optimiser=self._optimisers[STAGE1], adversary=self._adversary, features=self.features,
        )  # fmt: skip

    def _train_texture(self, first_step: int, steps: int) -> float:
        return train_texture(
            self.autoencoder, self._augmented(self.preset.texture), self.preset.texture, steps=steps,
            first_step=first_step, total_steps=self.preset.texture.steps, seed=self.seed + 2, progress=self._note,
            optimiser=self._optimisers[TEXTURE], samples=self.samples if self.draws else None, critic=self._critic,
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Tell whether there is a denoiser that was taught: here, or by the run that this one fine-tunes."""
        return self.position[STAGE2] > 0 or (self.start is not None and self.start.denoiser is not None)

    @cached_property
    def samples(self) -> LatentSamples:
        """Draw synthetic latents once, when stage 2 is done."""
        with self._average.applied() if self._average else nullcontext():
            return draw_samples(
                self.autoencoder, self.denoiser, self.latents, self.preset.sampling, seed=self.seed + 10_000
            )

    def _train_stage2(self, first_step: int, steps: int) -> float:
        return train_stage2(
            self.denoiser, self.latents, self.preset.stage2, steps=steps, first_step=first_step,
            total_steps=self.preset.stage2.steps, seed=self.seed + 1, progress=self._note,
            optimiser=self._optimisers[STAGE2], ema=self._average,
        )  # fmt: skip

    def _train_reflow(self, first_step: int, steps: int) -> float:
        assert self._teacher is not None
        if first_step == 0:
            if self._average is not None:
                self.denoiser.load_state_dict(self._average.weights())
            self._teacher.load_state_dict(self.denoiser.state_dict())
        return reflow(
            self.denoiser, self.trajectories, self.preset.reflow, steps=steps, first_step=first_step,
            total_steps=self.preset.reflow.steps, seed=self.seed + 3, progress=self._note,
            optimiser=self._optimisers[REFLOW], ema=self._average,
        )  # fmt: skip

    @cached_property
    def trajectories(self) -> Trajectories:
        """Draw the paths of what stage 2 has trained, once."""
        assert self._teacher is not None
        few, guidance = self.preset.sampling, self.preset.reflow.guidance
        return draw_trajectories(
            self._teacher, self.latents, segments=few.steps, guidance=guidance, seed=self.seed, shift=few.shift
        )

    def _augmented(self, stage: StageConfig) -> TrainingSet:
        return replace(self.data, augment=stage.augment)

    @cached_property
    def latents(self) -> LatentSet:
        """Encode the patients once, when stage 1 is done."""
        with memory_advice("encoding the scans", "Choose a smaller window in the preset, or use less data."):
            return encode_latents(
                self.autoencoder,
                self._augmented(self.preset.stage2),
                variants=self.preset.stage2.variants,
                seed=self.seed,
            )

    @cached_property
    def _held_out_latents(self) -> LatentSet | None:
        return encode_latents(self.autoencoder, self.held_out, seed=self.seed) if self.held_out else None

    @property
    def log(self) -> TrainingLog:
        """Return the run's log, opened on first use."""
        if self._log is None:
            totals = {phase.name: phase.stage.steps for phase in self.phases}
            self._log = TrainingLog(self.folder, self.position, totals)
        return self._log

    def _note(self, progress: Progress) -> None:
        if rank_and_size()[0] == 0:
            self.log.note(progress)
            if self._report is not None:
                self._report(progress)

    @property
    def _identity(self) -> str:
        """Return a digest of what must be equal for a run to go on."""
        sets = [[p.digest for p in part.patients] if part else [] for part in (self.data, self.held_out)]
        start = self.start.card.digest if self.start else None
        about = [self.preset.digest, self.data.schema.digest, self.seed, sets, start, rank_and_size()[1]]
        text = json.dumps(about + ([self.features.digest] if self.features else []))
        return hashlib.sha256(text.encode()).hexdigest()

    def _save(self, stage: str) -> None:
        """Write checkpoint, logs and, last, the state to resume from: a kill in between repeats the slice."""
        if rank_and_size()[0] == 0:
            self._checkpoint()
            self._look(stage)
            self.log.flush()
            write_state(self.folder / RESUME, self.parts, {"run": self._identity, "position": self.position})
        if rank_and_size()[1] > 1:
            distributed.barrier()

    def _look(self, stage: str) -> None:
        """Measure on patients held out, and let the watch look at cases."""
        step = self.position[stage]
        if stage == STAGE1 and self._adversary is not None and math.isfinite(self._adversary.hinge):
            self.log.measure(stage, step, {"hinge loss": self._adversary.hinge})
        if stage == STAGE2 and self._held_out_latents is not None:
            with self._average.applied() if self._average else nullcontext():
                loss = held_out_loss(self.denoiser, self._held_out_latents, seed=self.seed)
                self.log.measure(stage, step, {"held-out loss": loss})
                if len(np.unique(self._held_out_latents.patient)) > 1:
                    rate = memorisation_rate(self.denoiser, self.latents, self._held_out_latents, seed=self.seed)
                    self.log.measure(stage, step, {"memorisation rate": rate})
        if self._watch is not None:
            self._watch.look(stage, step, self.autoencoder, self.log, samples=self.draws)

    def _resume(self) -> None:
        notes, states = read_state(self.folder / RESUME)
        if notes.get("run") != self._identity or states.keys() != self.parts.keys():
            raise ConfigError(
                "The output folder holds a run with other data, preset, labels or seed.",
                "Give another --out, or the same settings to go on.",
            )
        self.position.update(notes["position"])
        for name, part in self.parts.items():
            part.load_state_dict(states[name])

    def _checkpoint(self) -> ModelCard:
        held = f", {len(self.held_out)} more held out" if self.held_out else ""
        return save_checkpoint(
            self.folder,
            preset=self.preset,
            model_id=f"medlsdm-{self.preset.name}-{self._identity[:8]}",
            schema=self.data.schema,
            modalities=sorted({p.modality for p in self.data.patients}),
            autoencoder=self.autoencoder.state_dict(),
            denoiser=(self._average.weights() if self._average else self.denoiser.state_dict()) if self.draws else None,
            steps=dict(self.position),
            training_data=f"{len(self.data)} pairs of scan and label map on one machine{held}.",
        )


def check_start(start: Checkpoint, preset: Preset, data: TrainingSet) -> None:
    """Refuse to fine-tune a checkpoint that does not fit.

    Raises:
        SchemaError: It is under another label schema.
        ConfigError: It has another architecture.
    """
    if start.schema.digest != data.schema.digest:
        raise SchemaError(
            f"The checkpoint to start from is under the label schema {start.schema.name!r}, the data under "
            f"{data.schema.name!r}.",
            "Give --schema with the checkpoint's classes, or train from scratch.",
        )
    for part in ("autoencoder", "denoiser"):
        if getattr(start.preset, part) != getattr(preset, part):
            raise ConfigError(
                f"The checkpoint to start from has another {part} than the preset {preset.name!r}.",
                "Train with the preset that the checkpoint was trained with.",
            )
