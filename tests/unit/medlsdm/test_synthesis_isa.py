"""Windows, tiles and batches equal the whole under every instruction set that oneDNN may take on this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ISAS = {"AVX2": "avx2", "AVX512_CORE": "avx512bw", "AVX512_CORE_BF16": "avx512_bf16", "ALL": "amx_bf16"}
FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()

DRAW = """
import sys
import numpy as np
import torch
import medlsdm.synthesis, medlsdm.training.loop
from medlsdm.anatomy import generate
from medlsdm.checkpoints import make_checkpoint
from medlsdm.config import load_preset, load_schema
from medlsdm.memory import Plan
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.synthesis import Synthesiser
from medlsdm.types import Modality

pays = sys.argv[1] == "bfloat16"
medlsdm.training.loop.bfloat16_pays = medlsdm.synthesis.bfloat16_pays = lambda: pays
torch.set_num_threads(1)
worst = {}
for quantiser in sys.argv[2:]:
    tiny = load_preset("tiny")
    rounded = {"quantiser": "fsq", "levels": (8, 8, 8, 8, 5, 5, 5, 5), "latent_noise": 0.0}
    settings = {"texture_channels": 8, "texture_blocks": 1} | (rounded if quantiser == "fsq" else {})
    preset = tiny.model_copy(update={
        "autoencoder": tiny.autoencoder.model_copy(update=settings),
        "denoiser": tiny.denoiser.model_copy(update={"channels": (16, 24)}),
    })
    schema = load_schema("procedural")
    torch.manual_seed(1)
    parts = build_autoencoder(preset, len(schema.classes)), build_denoiser(preset, len(schema.classes))
    for part in parts:
        for parameter in part.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.05)
    parts[0].texture.trained.fill_(1)
    made, _ = make_checkpoint(preset=preset, schema=schema, modalities=[Modality.CT],
                              autoencoder=parts[0].state_dict(), denoiser=parts[1].state_dict())
    drawer = Synthesiser(made, threads=1)
    labels = generate(3, Modality.CT, (66, 22, 20))[1]
    how = {"seed": 2, "steps": 2, "guidance": 1.5}
    whole = drawer.synthesise(labels, **how, memory=Plan())
    tiled = drawer.synthesise(labels, **how, memory=Plan(sampling_parts=(3, 1, 2), decoding_parts=(4, 2, 2)))
    batch = list(drawer.synthesise_many([labels] * 3, seeds=[1, 2, 3], steps=2, guidance=1.5))[1]
    assert whole.array.std() > 30, "an even volume would prove nothing"
    worst[quantiser] = [float(np.abs(v.array - whole.array).max()) for v in (tiled, batch)]
print(worst)
print("worst", max(max(v) for v in worst.values()))
"""


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("isa", ISAS)
def test_parts_equal_the_whole_under_each_instruction_set(isa, precision):
    if ISAS[isa] not in FLAGS:
        pytest.skip(f"this CPU has no {ISAS[isa]}")
    rest = [] if precision == "bfloat16" and isa in ("AVX2", "AVX512_CORE") else ["none"]  # emulated, and slow
    done = subprocess.run(
        [sys.executable, "-c", DRAW, precision, "fsq", *rest],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) <= 1.4, done.stdout  # Hounsfield units: a thousandth of the range
