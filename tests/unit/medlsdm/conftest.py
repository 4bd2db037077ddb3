from __future__ import annotations

import pytest
import torch

from medlsdm.anatomy import generate
from medlsdm.checkpoints import Checkpoint, make_checkpoint
from medlsdm.config import Preset, StageConfig, load_preset, load_schema
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.patients import TrainingSet, prepare
from medlsdm.types import Modality


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def preset() -> Preset:
    """Return a preset that trains in moments, with eight rounded latent channels and no texture."""
    tiny = load_preset("tiny")
    small = {"channels": (8, 16), "label_width": 8, "latent_noise": 0.0, "texture_channels": 0}
    return tiny.model_copy(
        update={
            "window": (16, 20, 16),
            "autoencoder": tiny.autoencoder.model_copy(
                update=small | {"quantiser": "fsq", "levels": (8, 8, 8, 8, 5, 5, 5, 5)}
            ),
            "texture": StageConfig(steps=0),
            "denoiser": tiny.denoiser.model_copy(update={"channels": (16, 24), "label_width": 8}),
        }
    )


@pytest.fixture(scope="session")
def data(preset: Preset) -> TrainingSet:
    kinds = [Modality.CT, Modality.MR, Modality.CT, Modality.MR]
    return prepare([generate(seed, kind, (18, 22, 17)) for seed, kind in enumerate(kinds)], preset)


@pytest.fixture(scope="session")
def checkpoint(preset: Preset) -> Checkpoint:
    """Return random weights, the zeroed layers filled too, so that labels and noise both matter."""
    torch.manual_seed(0)
    schema = load_schema("procedural")
    parts = build_autoencoder(preset, len(schema.classes)), build_denoiser(preset, len(schema.classes))
    for part in parts:
        for parameter in part.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.1)
    made, _ = make_checkpoint(
        preset=preset,
        schema=schema,
        modalities=[Modality.CT, Modality.MR],
        autoencoder=parts[0].state_dict(),
        denoiser=parts[1].state_dict(),
    )
    return made
