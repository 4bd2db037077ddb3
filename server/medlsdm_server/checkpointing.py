"""The state of a launch between rounds: averaged weights, kept as one checkpoint a round."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medlsdm.checkpoints import State, load_checkpoint, save_checkpoint
from medlsdm.config import Preset, load_preset, load_schema
from medlsdm.errors import DataError, IntegrityError, MedlsdmError
from medlsdm.federation.arrays import Arrays
from medlsdm.federation.plan import Stage
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.types import LabelSchema
from medlsdm_server.launch import Launch
from medlsdm_server.models import Model, checkpoint_id, list_models

log = logging.getLogger(__name__)

TRAINING_DATA = "Scans of the sites named above, de-identified there; none of them left its hospital."


class Trained:
    """Hold the weights of both stages and write them after every round."""

    def __init__(self, folder: Path, launch: Launch, preset: Preset, schema: LabelSchema) -> None:
        self.folder, self.launch, self.preset, self.schema = folder, launch, preset, schema
        self.done = {Stage.STAGE1: 0, Stage.STAGE2: 0}
        self.sites: set[str] = set()
        self.losses: dict[str, float] = {}  # by checkpoint, where sites share them
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(launch.seed)
            classes = len(schema.ids)
            self.state: dict[Stage, State] = {
                Stage.STAGE1: build_autoencoder(preset, classes).state_dict(),
                Stage.STAGE2: build_denoiser(preset, classes).state_dict(),
            }

    @classmethod
    def resume(cls, folder: Path, launch: Launch) -> Trained:
        """Begin with fresh weights, or after the last checkpoint of this launch."""
        trained = cls(folder, launch, load_preset(launch.preset), load_schema(launch.schema_))
        for last in reversed(trained._mine()):
            try:
                checkpoint = load_checkpoint(folder / last.id)
            except (IntegrityError, DataError):
                log.warning("the checkpoint %s is damaged; going on from the one before", last.id)
                continue
            trained.sites.update(checkpoint.card.sites)
            trained.state[Stage.STAGE1] = checkpoint.autoencoder
            trained.done[Stage.STAGE1] = last.round if last.stage == Stage.STAGE1 else launch.stage1.rounds
            if checkpoint.denoiser is not None:
                trained.state[Stage.STAGE2] = checkpoint.denoiser
                trained.done[Stage.STAGE2] = last.round
            break
        return trained

    def _mine(self) -> list[Model]:
        """Return the checkpoints of this launch in the order of its rounds."""
        mine = [m for m in list_models(self.folder) if m.launch == self.launch.id]
        return sorted(mine, key=lambda m: (m.stage, m.round))

    @property
    def preset_json(self) -> dict[str, Any]:
        """Return the resolved preset, as a round plan carries it."""
        return self.preset.model_dump(mode="json")

    @property
    def autoencoder_id(self) -> str:
        """Return the checkpoint that holds the frozen stage 1."""
        return checkpoint_id(self.launch.id, Stage.STAGE1, self.launch.stage1.rounds)

    def rounds_done(self, stage: Stage) -> int:
        """Return how many rounds of a stage are behind us."""
        return self.done[stage]

    def arrays(self, stage: Stage) -> Arrays:
        """Return the weights that the next round of a stage starts from."""
        return {name: value.numpy() for name, value in self.state[stage].items()}

    def save_round(self, stage: Stage, number: int, arrays: Arrays, sites: list[str], loss: float | None = None) -> str:
        """Take the averaged weights in, write the checkpoint, and return its id. The arrays are kept, not copied.

        Raises:
            ResourceError: There is no room; the round does not count.
        """
        known = self.state[stage], self.done[stage]
        shapes = known[0]
        self.state[stage] = {
            name: torch.from_numpy(np.asarray(value, order="C")).to(shapes[name].dtype)
            for name, value in arrays.items()
        }
        self.done[stage] = number
        identity = checkpoint_id(self.launch.id, stage, number)
        try:
            self._save(stage, identity, sorted(self.sites | set(sites)))
        except MedlsdmError:
            self.state[stage], self.done[stage] = known
            shutil.rmtree(self.folder / identity, ignore_errors=True)
            raise
        self.sites.update(sites)
        if loss is not None:
            self.losses[identity] = loss
        return identity

    def retire(self) -> None:
        """Delete old checkpoints but the latest, the best of each stage, the last of stage 1, and some more."""
        mine = self._mine()
        staying = {m.id for m in mine[-1 - self.launch.keep :]} | {self.autoencoder_id}
        for stage in Stage:
            rated = [m.id for m in mine if m.stage == stage and m.id in self.losses]
            staying |= set(sorted(rated, key=self.losses.__getitem__)[:1])
        for model in mine:
            if model.id not in staying:
                (self.folder / model.id / "card.json").unlink(missing_ok=True)  # from here on it is none
                shutil.rmtree(self.folder / model.id, ignore_errors=True)

    def _save(self, stage: Stage, identity: str, sites: list[str]) -> None:
        save_checkpoint(
            self.folder / identity,
            preset=self.preset,
            schema=self.schema,
            modalities=self.launch.modalities,
            autoencoder=self.state[Stage.STAGE1],
            denoiser=self.state[Stage.STAGE2] if stage is Stage.STAGE2 else None,
            model_id=identity,
            rounds=sum(self.done.values()),
            sites=sites,
            steps={s: self.done[s] * self._plan(s).steps for s in Stage},
            training_data=TRAINING_DATA,
        )

    def _plan(self, stage: Stage) -> Any:
        return self.launch.stage1 if stage is Stage.STAGE1 else self.launch.stage2
