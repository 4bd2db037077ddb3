from __future__ import annotations

import pytest
import torch

from medlsdm.config import config_folder, load_preset
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.adversary import build_adversary

NAMES = sorted(path.stem for path in (config_folder() / "presets").glob("*.yaml"))

MILLIONS = {"base": (5.0, 35), "large": (19, 121), "paper": (1.9, 49)}
"""Weights of autoencoder and denoiser, as the presets' files and docs/model.md say."""


def test_the_four_presets_are_there():
    assert set(NAMES) >= {"tiny", "base", "large", "paper"}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_its_crops_fit(name):
    preset = load_preset(name)
    assert preset.name == name
    with torch.device("meta"):
        autoencoder, denoiser = build_autoencoder(preset, 3), build_denoiser(preset, 3)
        build_adversary(preset.stage1.losses.adversarial, "meta")
    for stage in (preset.stage1, preset.texture):
        if stage.crop:
            assert all(a <= b for a, b in zip(stage.crop, preset.window, strict=True))
    if name in MILLIONS:
        counts = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (autoencoder, denoiser))
        assert list(counts) == [pytest.approx(count, rel=0.05) for count in MILLIONS[name]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("spacing", "share"), [((1, 1, 1), 1), ((0.8, 0.8, 4), 4), ((3, 0.7, 0.7), 4), ((1, 1, 2), 2)])
def test_thick_axes_are_compressed_less(name, spacing, share):
    preset = load_preset(name)
    fitted = preset.for_spacing(spacing)
    thick = spacing.index(max(spacing))
    assert fitted.autoencoder.strides[thick] == preset.autoencoder.strides[thick] // share
    assert fitted.window[thick] == preset.window[thick] // share
    with torch.device("meta"):
        build_autoencoder(fitted, 3)
        build_denoiser(fitted, 3)


def test_fewer_scales_keep_their_widths():
    preset = load_preset("tiny")
    auto = preset.autoencoder.model_copy(update={"strides": (2, 2, 4)})
    fitted = preset.model_copy(update={"autoencoder": auto}).for_spacing((1, 1, 4))
    assert fitted.autoencoder.strides == (2, 2, 1)
    assert fitted.autoencoder.channels == preset.autoencoder.channels[:1]
