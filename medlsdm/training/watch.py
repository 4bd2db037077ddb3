"""What is looked at whenever a run saves: losses on patients held out, copies of training patients, pictures."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medlsdm.checkpoints import load_checkpoint
from medlsdm.checks import write_atomic
from medlsdm.models.vqgan import VQGAN
from medlsdm.synthesis import Synthesiser
from medlsdm.training.logs import TrainingLog
from medlsdm.training.loop import autocast, device_of
from medlsdm.training.patients import TrainingSet, normalise
from medlsdm.training.pictures import Case, montage
from medlsdm.training.stage1 import on_device
from medlsdm.types import Geometry, SemanticMap

PICTURES = "pictures"
CASES = 4
COMPARED = 16
"""Samples drawn at most for each side of the comparison at a save."""

FEWEST = 5
"""Held-out patients below which nothing can be said about copies."""

ALARM = 0.01
"""The chance at which a model that copies nobody is suspected, at each save."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Likeness:
    """Say how near samples are to patients that were trained on, against patients that were not.

    ``copy_rate`` is the share of samples under trained maps that are nearer to their patient than 95 % of
    those under unseen maps: 0.05 where nobody is copied. ``chance`` is how likely the difference is without copying.
    """

    copy_rate: float
    chance: float

    @property
    def alarming(self) -> bool:
        """Tell whether samples are nearer to trained patients than chance explains."""
        return self.chance < ALARM


@torch.no_grad()
def held_out_quality(model: VQGAN, data: TrainingSet) -> dict[str, float]:
    """Return mean absolute error and PSNR (data range 2) of reconstructions, where scans are real."""
    model.eval()
    errors: list[tuple[float, float]] = []
    for index in range(len(data)):
        volumes, labels, mask = on_device(data.crops([index], None), model.n_classes, device_of(model))
        with autocast(volumes.device):
            rebuilt = model(volumes, labels)
        error = (rebuilt - volumes).abs() * mask
        errors.append((float(error.sum() / mask.sum()), float(error.square().sum() / mask.sum())))
    absolute, squared = np.mean(errors, axis=0)
    return {"held-out l1": float(absolute), "held-out psnr": 10 * math.log10(4 / max(float(squared), 1e-12))}


def draw(synthesiser: Synthesiser, data: TrainingSet, index: int, seed: int) -> NDArray[np.float32]:
    """Return a sample in -1..1 under one patient's map, cut to the window as in ``crops``."""
    batch, patient = data.crops([index], None), data.patients[index]
    values = np.array(data.schema.ids)[batch.labels[0]]
    affine = np.diag([*patient.spacing, 1.0])
    labels = SemanticMap(values, Geometry(affine, values.shape), data.schema)
    volume = synthesiser.synthesise(labels, seed=seed, modality=patient.modality)
    if volume.array.min() == volume.array.max():
        return np.zeros(values.shape, dtype=np.float32)
    return normalise(volume.array, patient.modality)


def fingerprint(volume: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what is compared: means of 2 x 2 x 2 voxels, without mean, of unit length."""
    x, y, z = (n // 2 for n in volume.shape)
    coarse = (volume * mask)[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5)).ravel()
    coarse = coarse - coarse.mean()
    return coarse / max(float(np.linalg.norm(coarse)), 1e-9)


def likeness(trained: NDArray[np.float32], held_out: NDArray[np.float32]) -> Likeness:
    """Compare how samples lean towards the patients whose maps they were drawn under.

    Args:
        trained: [N], for one sample under each trained patient's map, its correlation with that patient
            less that with the nearest other patient of either side.
        held_out: [M], the same under the maps of patients held out.

    A map brings its sample near to its own patient. It does so alike on both sides, unless trained
    patients were learnt by heart.

    Source: Mann and Whitney's rank test, one-sided.
    """
    from scipy.stats import mannwhitneyu

    chance = float(mannwhitneyu(trained, held_out, alternative="greater").pvalue)
    return Likeness(float((trained > np.quantile(held_out, 0.95)).mean()), chance)


class Watch:
    """Look at a run whenever it saves; what it finds goes to the run's log, and pictures to ``pictures/``.

    Args:
        folder: The run's folder, with its checkpoint.
        data: The patients trained on.
        held_out: Those that are not; without them there are pictures only.
        seed: Of the samples: the same at every save, so that pictures can be compared.
        device: Where to draw.
        pictures: Whether to save any: they show real patients.
    """

    def __init__(
        self, folder: Path, data: TrainingSet, held_out: TrainingSet | None, seed: int, device: torch.device,
        *, pictures: bool = True,
    ) -> None:  # fmt: skip
        self.folder, self.data, self.held_out, self.seed, self._device = folder, data, held_out, seed, device
        self._pictures = pictures

    def look(self, stage: str, step: int, model: VQGAN, output: TrainingLog, *, samples: bool) -> None:
        """Draw cases and, with patients held out, measure; ``samples`` says that stage 2 has begun.

        Warns in the log, once a save, when samples look copied from patients that were trained on.
        """
        synthesiser = Synthesiser(load_checkpoint(self.folder), device=self._device.type) if samples else None
        if self._pictures:
            png, picture = montage(self.cases(model, synthesiser), model.n_classes)
            write_atomic(self.folder / PICTURES / f"{stage.replace(' ', '')}-{step:06d}.png", png, mode=0o600)
            output.picture(stage, step, "cases", picture)
        if self.held_out is None:
            return
        if synthesiser is None:
            output.measure(stage, step, held_out_quality(model, self.held_out))
            return
        if min(len(self.held_out), len(self.data)) < FEWEST:
            return
        found = self.likeness(synthesiser, self.held_out)
        output.measure(stage, step, {"copy rate": found.copy_rate, "copying by chance": found.chance})
        if found.alarming:
            log.warning(
                "Step %d of %s: samples are nearer to patients trained on than chance explains (copy rate %.2f "
                "instead of 0.05). Stop earlier, add patients, or set augment.", step, stage, found.copy_rate,
            )  # fmt: skip

    def likeness(self, synthesiser: Synthesiser, held_out: TrainingSet) -> Likeness:
        """Draw under maps of both sides and see how each sample leans towards the patient whose map it has."""
        count = min(COMPARED, len(self.data), len(held_out))
        cases = [(g, int(i)) for g in (self.data, held_out) for i in np.linspace(0, len(g) - 1, count).round()]
        crops = [group.crops([index], None) for group, index in cases]
        patients = np.stack([fingerprint(crop.images[0, 0], crop.mask[0, 0]) for crop in crops])
        leans = []
        for n, (group, index) in enumerate(cases):
            sample = draw(synthesiser, group, index, self.seed + n)
            near = patients @ fingerprint(sample, crops[n].mask[0, 0])
            leans.append(near[n] - np.delete(near, n).max())
        return likeness(np.array(leans[:count]), np.array(leans[count:]))

    def cases(self, model: VQGAN, synthesiser: Synthesiser | None) -> list[Case]:
        """Return some cases, held-out ones where there are any."""
        group, device = self.held_out or self.data, device_of(model)
        cases = []
        for index in np.linspace(0, len(group) - 1, min(CASES, len(group))).round().astype(int).tolist():
            batch = group.crops([index], None)
            volumes, labels, _ = on_device(batch, model.n_classes, device)
            with torch.no_grad(), autocast(device):
                rebuilt = model.eval()(volumes, labels)[0, 0].float().cpu().numpy()
            sample = draw(synthesiser, group, index, self.seed + index) if synthesiser else None
            cases.append(Case(batch.images[0, 0], batch.labels[0], rebuilt, sample))
        return cases
