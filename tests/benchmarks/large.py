"""Measure time and peak memory of large volumes within a budget. ``make bench-large``.

Each case runs in a process of its own with untrained weights (no layer left at zero), few steps and one
thread; what is measured is the process's peak resident memory, torch included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CASES = {
    # name: preset, shape, steps, budget, bar in GiB (must, goal)
    "tiny 512x512x256, 6 GB": ("tiny", (512, 512, 256), 1, "6GB", (6, 3)),
    "tiny 512x512x256, 3 GB": ("tiny", (512, 512, 256), 1, "3GB", (6, 3)),
    "tiny 512x512x256, 1.5 GB": ("tiny", (512, 512, 256), 1, "1.5GB", (6, 3)),
    "tiny 301x203x111, 1 GB": ("tiny", (301, 203, 111), 2, "1GB", (6, 3)),
    "base 256x256x128, 2 GB": ("base", (256, 256, 128), 1, "2GB", (2, 1)),
    "base 256x256x128, 1 GB": ("base", (256, 256, 128), 1, "1GB", (2, 1)),
}


def label_map(shape):
    """Return nested ellipsoids of classes 0 to 3, made plane by plane."""
    y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[1:])
    labels = np.zeros(shape, np.uint8)
    for plane, x in zip(labels, np.linspace(-1, 1, shape[0]), strict=True):
        radius = np.sqrt(x**2 + y[:, None] ** 2 + z**2)
        for label, edge in enumerate((0.9, 0.6, 0.3), 1):
            plane[radius < edge] = label
    return labels


def save_untrained(folder: Path, name: str) -> None:
    """Write a checkpoint whose zeroed layers are filled too."""
    import torch

    from medlsdm.checkpoints import save_checkpoint
    from medlsdm.config import load_preset
    from medlsdm.models.unet import build_denoiser
    from medlsdm.models.vqgan import build_autoencoder
    from medlsdm.types import LabelClass, LabelSchema, Modality

    torch.manual_seed(0)
    names = ("background", "first", "second", "third")
    schema = LabelSchema("shells", tuple(LabelClass(i, n) for i, n in enumerate(names)))
    preset = load_preset(name)
    parts = build_autoencoder(preset, len(names)), build_denoiser(preset, len(names))
    for part in parts:
        for parameter in part.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.05)
    if parts[0].texture is not None:
        parts[0].texture.trained.fill_(1)
    states = {"autoencoder": parts[0].state_dict(), "denoiser": parts[1].state_dict()}
    save_checkpoint(folder, preset=preset, schema=schema, modalities=[Modality.MR], **states)


def draw(folder: Path, shape: tuple[int, int, int], steps: int, budget: str) -> dict:
    """Draw one volume and say what it took."""
    from medlsdm.checkpoints import load_checkpoint
    from medlsdm.memory import parse_bytes, peak_resident_bytes
    from medlsdm.synthesis import Synthesiser
    from medlsdm.types import Geometry, SemanticMap

    checkpoint = load_checkpoint(folder)
    labels = SemanticMap(label_map(shape), Geometry(np.diag([0.7, 0.7, 1.5, 1.0]), shape), checkpoint.schema)
    synthesiser = Synthesiser(checkpoint, threads=1)
    started = time.process_time()
    volume = synthesiser.synthesise(labels, seed=1, steps=steps, memory=parse_bytes(budget))
    assert synthesiser.last_plan is not None
    assert np.isfinite(volume.array).all()
    return {
        "cpu_seconds": round(time.process_time() - started, 1),
        "peak_gib": round(peak_resident_bytes() / 2**30, 2),
        "plan": synthesiser.last_plan.to_json(),
    }


def in_process(*arguments: str) -> str:
    """Run this file again, so that its memory is its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="Part of a case's name.")
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.save:
        save_untrained(Path(chosen.save[0]), chosen.save[1])
        return
    if chosen.draw:
        folder, shape, steps, budget = chosen.draw
        x, y, z = map(int, shape.split("x"))
        print(json.dumps(draw(Path(folder), (x, y, z), int(steps), budget)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name, (preset, shape, steps, budget, bars) in CASES.items():
            if chosen.only not in name:
                continue
            folder = Path(scratch) / preset
            if not folder.exists():
                in_process("--save", str(folder), preset)
            size = "x".join(map(str, shape))
            result = json.loads(in_process("--draw", str(folder), size, str(steps), budget))
            plan = result["plan"]
            print(
                f"{name}: {result['peak_gib']:.2f} GiB (estimated {plan['estimate_bytes'] / 2**30:.2f}; "
                f"must {bars[0]}, goal {bars[1]}), {result['cpu_seconds']} CPU-s with {steps} steps, sampling in "
                f"{plan['sampling_parts']}, decoding in {plan['decoding_parts']}, cached {plan['cached']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
