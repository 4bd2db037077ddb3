"""Train a preset on real pairs and measure its pictures. ``make bench-model DATA=DIR``.

DIR holds ``images/`` and ``labels/`` under equal names; a file is a patient. 160 patients train, 40 are held
out, the same ones for every seed. Time is CPU time of one thread. What is done stays in --out, so that an
interrupted benchmark goes on; delete a seed's folder there to measure it anew.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_picture import draw
from model_table import render, rows
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from medlsdm.checkpoints import Checkpoint, load_checkpoint
from medlsdm.checks import write_atomic
from medlsdm.config import Preset, load_preset, parse_preset
from medlsdm.errors import ConfigError, MedlsdmError
from medlsdm.evaluation.comparison import Yardstick
from medlsdm.evaluation.matched_noise import MatchedNoise
from medlsdm.evaluation.segmenter import Segmenter, mean_dice, train_segmenter
from medlsdm.evaluation.similarity import psnr, ssim
from medlsdm.models.spade import one_hot
from medlsdm.models.unet import SemanticUNet
from medlsdm.synthesis import Synthesiser
from medlsdm.training.folders import Pair, read_pairs
from medlsdm.training.loop import Progress, autocast
from medlsdm.training.patients import Patient, denormalise, mirror_to, prepare, round_up
from medlsdm.training.run import TrainingRun
from medlsdm.types import Modality
from medlsdm.volumes import to_ras

DATA = Path("../shared/data/hippocampus")
SPLIT_SEED = 0
GUIDANCE = 1.5
SIDE_BY_SIDE = 2
PICTURED = 3
Volume = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plan:
    """Say how large everything is."""

    data: Path
    out: Path
    preset: Preset
    held_out: int
    most: int | None
    segmenter_steps: int
    ancestral_steps: int
    checkpoint: Path | None


def split(pairs: list[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and those held out, by patient, the same at every call."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    return [pairs[i] for i in sorted(order[:-held_out])], [pairs[i] for i in sorted(order[-held_out:])]


class CpuClock:
    """Add up the CPU seconds of each stage from its progress reports, over interruptions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self._last = time.process_time()
        self._saved = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.process_time()
        self.seconds[progress.stage] = self.seconds.get(progress.stage, 0.0) + now - self._last
        self._last = now
        if now - self._saved > 5 or progress.step == progress.steps:
            self._saved = now
            write_atomic(self._path, json.dumps(self.seconds).encode())
        if progress.step % max(1, progress.steps // 5) == 0:
            say(f"{progress.stage}: step {progress.step} of {progress.steps}, {self.seconds[progress.stage]:.0f} CPU-s")


class Results:
    """Keep a seed's results in a JSON file, section by section; a section that is there is not measured again."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        if self.content.get("identity") != identity:
            self.content = {"identity": identity, "sets": {}, "segmenters": {}, "seconds": {}, "calls": {}}

    def keep(self, section: str, key: str | None, measure: Callable[[], Any]) -> Any:
        """Return what is kept under a name, measured now if it is not there."""
        place, name = (self.content, section) if key is None else (self.content[section], key)
        if name not in place:
            started = time.process_time()
            place[name] = measure()
            write_atomic(self._path, json.dumps(self.content, indent=1).encode())
            say(f"{name}: done in {time.process_time() - started:.0f} CPU-s")
        return place[name]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def with_sampling(checkpoint: Checkpoint, **changes: object) -> Checkpoint | None:
    """Return the checkpoint with other settings of sampling; None where this version does not offer them."""
    settings = checkpoint.preset.model_dump(mode="json")
    try:
        preset = parse_preset(settings | {"sampling": settings["sampling"] | changes})
    except ConfigError:
        return None
    return replace(checkpoint, preset=preset)


@contextmanager
def count_calls() -> Iterator[list[int]]:
    """Collect the batch size of every call of a denoiser."""
    calls: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], _: object) -> None:
        if isinstance(module, SemanticUNet):
            calls.append(len(inputs[0]))

    handle = register_module_forward_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class Way:
    """Name a way to draw: a checkpoint with its settings of sampling, and whether texture is left out."""

    checkpoint: Checkpoint
    smooth: bool = False


def centred(volume: Volume, shape: Sequence[int]) -> Volume:
    """Return the volume's middle on another grid, mirrored where that is larger."""
    for axis, (have, want) in enumerate(zip(volume.shape, shape, strict=True)):
        places = np.arange(want) + (have - want) // 2
        places = np.where(places < 0, -1 - places, np.where(places >= have, 2 * have - 1 - places, places))
        volume = np.take(volume, places, axis=axis)
    return volume


class SeedBench:
    """Measure one seed."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed, self.folder = plan, seed, plan.out / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        pairs = read_pairs(plan.data, Modality.MR, None)[: plan.most]
        self.train_pairs, self.test_pairs = split(pairs, plan.held_out)
        self.train_set = prepare(self.train_pairs, plan.preset)
        self.train = self.train_set.patients
        self.test = prepare(self.test_pairs, plan.preset).patients
        self.n_classes = len(self.train_set.schema.classes)

    def run(self) -> None:
        """Train, measure, and write result and montage."""
        self.checkpoint, cpu_seconds = self._model()
        identity = f"{self.checkpoint.card.digest} {self.plan.segmenter_steps} {self.plan.ancestral_steps}"
        self.results = Results(self.folder / "result.json", identity)
        keep, content = self.results.keep, self.results.content
        content |= {"seed": self.seed, "train": len(self.train), "test": len(self.test), "cpu_seconds": cpu_seconds}
        keep("reconstruction", None, self._reconstruction)
        keep("sets", "real", self._real)
        for name, way in self._ways().items():
            keep("sets", name, lambda w=way, n=name: self._judge(w, n))
        keep("sets", "noise", lambda: self._compare(self._noise(self._smooth_volumes), self.test))
        keep("sets", "reconstruction", lambda: self._compare(self._rebuilt(self.test), self.test))
        if self.checkpoint.preset.autoencoder.texture_channels:
            keep("sets", "textured reconstruction", lambda: self._compare(self._rebuilt(self.test, True), self.test))
        keep("dice_floor", None, self._dice_floor)
        keep("segmenters", "real", lambda: self._dice_of(self._segmenter))
        keep("segmenters", "synthetic", lambda: self._trained_on(self._made_for_training))
        keep("segmenters", "both", lambda: self._trained_on(self._made_for_training, with_real=True))
        if not (self.folder / "montage.png").is_file():
            self._montage()

    def _model(self) -> tuple[Checkpoint, dict[str, float]]:
        """Return the trained checkpoint and the CPU seconds of its stages."""
        if self.plan.checkpoint is not None:
            return load_checkpoint(self.plan.checkpoint), {}
        clock = CpuClock(self.folder / "cpu-seconds.json")
        run = self.folder / "run"
        TrainingRun(run, self.plan.preset, self.train_set, seed=self.seed, progress=clock).train()
        return load_checkpoint(run), clock.seconds | {"all": sum(clock.seconds.values())}

    def _ways(self) -> dict[str, Way]:
        """Return the ways to draw that the checkpoint offers."""
        own = self.checkpoint
        ways = {"default": Way(own)}
        if own.preset.autoencoder.texture_channels:
            ways["smooth"] = Way(own, smooth=True)
        changed = {
            "guided": with_sampling(own, guidance=GUIDANCE),
            "ancestral": with_sampling(own, sampler="ancestral", steps=self.plan.ancestral_steps, guidance=1.0),
        }
        return ways | {name: Way(checkpoint) for name, checkpoint in changed.items() if checkpoint is not None}

    @cached_property
    def _segmenter(self) -> Segmenter:
        """Return the segmenter trained on real pairs; kept, as it does not depend on the model."""
        path = self.plan.out / f"segmenter-{len(self.train)}-{self.plan.segmenter_steps}-{self.seed}.safetensors"
        if path.is_file():
            model = Segmenter(self.n_classes)
            model.load_state_dict(load_file(path))
            return model.eval()
        model = self._train([p.image for p in self.train], [p.labels for p in self.train])
        save_file(model.state_dict(), path)
        return model

    def _train(self, images: list[Volume], labels: list[Any]) -> Segmenter:
        return train_segmenter(images, labels, self.n_classes, steps=self.plan.segmenter_steps, seed=self.seed)

    def _dice_of(self, segmenter: Segmenter) -> float:
        return mean_dice(segmenter, [p.image for p in self.test], [p.labels for p in self.test])

    def _trained_on(self, made: list[Volume], with_real: bool = False) -> float:
        """Train a segmenter on synthetic volumes, for as many steps as the real one, and test it on real ones."""
        labels = [p.labels for p in self.train]
        real = [p.image for p in self.train] if with_real else []
        return self._dice_of(self._train(made + real, labels + (labels if with_real else [])))

    @cached_property
    def _yardstick(self) -> Yardstick:
        return Yardstick(
            [p.image for p in self.test], [p.image for p in self.train], [p.labels for p in self.test], self._segmenter
        )

    def _compare(self, volumes: Sequence[Volume], patients: Sequence[Patient]) -> dict[str, Any]:
        return self._yardstick.measure(volumes, [p.labels for p in patients]).to_json()

    def _real(self) -> dict[str, Any]:
        """Return the mean comparison of as many real training volumes as are held out, over disjoint draws."""
        order = np.random.default_rng(1).permutation(len(self.train))
        count = len(self.test)
        draws = [order[start : start + count] for start in range(0, len(order) - count + 1, count)]
        found = [self._yardstick.measure([self.train[i].image for i in rows]).to_json() for rows in draws]
        return {key: np.mean([f[key] for f in found], axis=0).tolist() for key in found[0]}

    def _judge(self, way: Way, name: str) -> dict[str, Any]:
        with count_calls() as calls:
            next(iter(self._draw(way, self.test_pairs[:1], 0)))
        started = time.process_time()
        volumes = list(self._draw(way, self.test_pairs, 1000 * self.seed))
        self.results.content["seconds"][name] = (time.process_time() - started) / len(volumes)
        self.results.content["calls"][name] = sum(calls)
        return self._compare(volumes, self.test)

    def _draw(self, way: Way, pairs: Sequence[Pair], seed: int) -> Iterator[Volume]:
        """Draw volumes in about -1..1 and RAS, one by one: as the product makes them, from seeds ``seed`` upwards."""
        synthesiser = Synthesiser(way.checkpoint, threads=1, device="cpu", smooth=way.smooth)
        for index, (_, labels) in enumerate(pairs):
            made = synthesiser.synthesise(labels, seed=seed + index)
            low, high = denormalise(np.array([-1, 1], dtype=np.float32), made.modality)
            unit = (made.array - low) / (high - low) * 2 - 1
            yield np.ascontiguousarray(to_ras(unit, made.geometry)[0], dtype=np.float32)

    @cached_property
    def _smooth_volumes(self) -> list[Volume]:
        return list(self._draw(Way(self.checkpoint, smooth=True), self.test_pairs, 1000 * self.seed))

    @cached_property
    def _made_for_training(self) -> list[Volume]:
        return list(self._draw(Way(self.checkpoint), self.train_pairs, 100_000 + 1000 * self.seed))

    def _noise(self, smooth: Sequence[Volume]) -> list[Volume]:
        """Return smooth volumes with noise like what reconstructions of training volumes lack."""
        some = self.train[: len(self.test)]
        noise, rng = MatchedNoise.fit([p.image for p in some], self._rebuilt(some)), np.random.default_rng(self.seed)
        return [noise.add(volume, rng) for volume in smooth]

    @torch.inference_mode()
    def _rebuilt(self, patients: Sequence[Patient], textured: bool = False) -> list[Volume]:
        """Return stage 1's reconstructions."""
        model, volumes = self.checkpoint.build_autoencoder(), []
        generator = torch.Generator().manual_seed(self.seed)
        for patient in patients:
            shape = round_up(patient.image.shape, self.checkpoint.preset.autoencoder.strides)
            image = torch.from_numpy(np.ascontiguousarray(mirror_to(patient.image, shape)))[None, None]
            labels = one_hot(torch.from_numpy(mirror_to(patient.labels, shape).astype(np.int32))[None], self.n_classes)
            noise = (torch.randn(image.shape, generator=generator),) if textured else ()
            with autocast(image.device):
                rebuilt = model.decode(model.encode(image), labels, *noise)
            cut = tuple(slice(n) for n in patient.image.shape)
            volumes.append(rebuilt[0, 0].float().clamp(-1, 1).numpy()[cut])
        return volumes

    def _reconstruction(self) -> dict[str, float]:
        pairs = [(v, p.image) for v, p in zip(self._rebuilt(self.test), self.test, strict=True)]
        return {"psnr": float(np.mean([psnr(*p) for p in pairs])), "ssim": float(np.mean([ssim(*p) for p in pairs]))}

    def _dice_floor(self) -> float:
        """Return the Dice of unrelated real volumes under the held-out labels: what chance gives."""
        order = np.random.default_rng(2).permutation(len(self.train))
        labels = [p.labels for p in self.test]
        others = [centred(self.train[i].image, m.shape) for i, m in zip(order, labels, strict=False)]
        return mean_dice(self._segmenter, others, labels)

    def _montage(self) -> None:
        some = self.test[:PICTURED]
        columns = {"real": [p.image for p in some], "rebuilt": self._rebuilt(some)}
        if self.checkpoint.preset.autoencoder.texture_channels:
            columns["rebuilt, textured"] = self._rebuilt(some, textured=True)
        for name, way in self._ways().items():
            columns[f"synthetic, {name}"] = list(self._draw(way, self.test_pairs[:PICTURED], 1000 * self.seed))
        columns["matched noise"] = self._noise(self._smooth_volumes[:PICTURED])
        draw(self.folder / "montage.png", columns, [p.labels for p in some])


def run_seeds(seeds: Sequence[int], arguments: Sequence[str]) -> None:
    """Run each seed in a process of its own, two at a time.

    Raises:
        MedlsdmError: A seed failed.
    """
    waiting, running = list(seeds), {}
    while waiting or running:
        while waiting and len(running) < SIDE_BY_SIDE:
            seed = waiting.pop(0)
            running[seed] = subprocess.Popen([sys.executable, __file__, *arguments, "--worker", str(seed)])
        for seed, process in list(running.items()):
            if process.poll() is not None:
                del running[seed]
                if process.returncode:
                    raise MedlsdmError(f"Seed {seed} failed.", "See above; run again to go on.")
        time.sleep(0.2)


def report(out: Path, seeds: Sequence[int]) -> str:
    """Write table.txt and table.json, and return the text."""
    results = [json.loads((out / f"seed-{seed}" / "result.json").read_text()) for seed in seeds]
    text = render(results)
    write_atomic(out / "table.txt", (text + "\n").encode())
    write_atomic(out / "table.json", json.dumps({"rows": rows(results), "results": results}, indent=1).encode())
    return text


def plan_of(chosen: argparse.Namespace) -> Plan:
    """Return the sizes that the options ask for."""
    scale = chosen.steps_scale * (0.002 if chosen.quick else 1)
    preset = load_preset(chosen.preset).scaled(scale)
    sizes = (6, 18, 8, 10) if chosen.quick else (40, None, chosen.segmenter_steps, 300)
    out = chosen.out / "quick" if chosen.quick else chosen.out
    return Plan(chosen.data, out, preset, *sizes, chosen.checkpoint)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--segmenter-steps", type=int, default=1500)
    parser.add_argument("--checkpoint", type=Path, help="Measure this one instead of training.")
    parser.add_argument("--quick", action="store_true", help="Try everything in a minute; the figures mean nothing.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if not chosen.data.is_dir():
            sys.exit(f"There is no data folder {str(chosen.data)!r}. Give one with images/ and labels/.")
        plan = plan_of(chosen)
        if chosen.worker is not None:
            SeedBench(plan, chosen.worker).run()
            return
        run_seeds(chosen.seeds, sys.argv[1:])
        print(report(plan.out, chosen.seeds))
    except MedlsdmError as error:
        sys.exit(f"{error.message} {error.hint}")


if __name__ == "__main__":
    main()
