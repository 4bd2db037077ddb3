from __future__ import annotations

import numpy as np
import pytest
import torch

from medlsdm.config import Preset, StageConfig
from medlsdm.errors import ConfigError
from medlsdm.models.texture import TextureDecoder
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.energy import energy_score, texture_score
from medlsdm.training.patients import TrainingSet
from medlsdm.training.texture import train_first_stage, train_texture


@pytest.fixture
def textured(preset: Preset) -> Preset:
    auto = preset.autoencoder.model_copy(update={"texture_channels": 8, "texture_blocks": 1})
    stage = StageConfig(steps=3, batch=1, crop=(12, 12, 12), learning_rate=3e-3)
    return preset.model_copy(update={"autoencoder": auto, "texture": stage})


def test_the_energy_score_of_gaussians_is_what_theory_says():
    # Half of E|a - y| * 2 - E|a - b|, over E|y - mean|: for draws N(0, s^2) and reality N(0, 1).
    torch.manual_seed(0)
    real = torch.randn(1, 1, 400_000)
    for spread in (0.0, 0.5, 1.0, 2.0):
        first, second = spread * torch.randn(2, 1, 1, 400_000)
        expected = (1 + spread**2) ** 0.5 - 0.5 * 2**0.5 * spread
        assert float(energy_score(first, second, real)) == pytest.approx(expected, rel=0.01)


def test_the_score_is_least_for_draws_from_the_right_distribution():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    blur = torch.nn.functional.avg_pool3d

    def draws(kind: str) -> torch.Tensor:
        white = torch.randn(4, 1, 20, 20, 20)
        return blur(white, 3, 1, 1) * 5.2 if kind == "grain" else white * (0.4 if kind == "weak" else 1.0)

    def score(kind: str) -> float:
        smooth = torch.zeros(4, 1, 20, 20, 20)
        return float(
            np.mean([
                float(texture_score(draws(kind), draws(kind), draws("grain"), smooth, rng)) for _ in range(20)
            ])
        )  # fmt: skip

    scores = {kind: score(kind) for kind in ("grain", "white", "weak")}
    assert scores["grain"] < 0.98 * scores["white"]
    assert scores["grain"] < 0.98 * scores["weak"]


def test_groups_see_what_goes_together():
    torch.manual_seed(0)
    shared = torch.randn(1, 1, 200_000)
    real = torch.cat([shared, shared], dim=1)
    apart = [torch.randn(1, 2, 200_000) for _ in range(2)]
    together = [torch.randn(1, 1, 200_000).expand(1, 2, -1) for _ in range(2)]
    # One at a time both are right; as pairs, only the second is.
    assert float(energy_score(*apart, real)) == pytest.approx(float(energy_score(*together, real)), rel=0.01)
    assert float(energy_score(*together, real, 2)) < 0.97 * float(energy_score(*apart, real, 2))


def test_texture_of_a_tile_equals_that_of_the_whole_beyond_its_halo():
    torch.manual_seed(0)
    net = TextureDecoder(4, 8, 2, (2, 2, 1))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features, volumes = torch.randn(1, 4, 20, 8, 10), torch.randn(2, 1, 1, 40, 16, 10)
    whole = net(features, *volumes)
    tile = net(features[:, :, 4:], *volumes[:, :, :, 8:])
    assert torch.allclose(whole[:, :, 8 + 2 * net.halo :], tile[:, :, 2 * net.halo :], atol=1e-5)
    assert not torch.allclose(whole[:, :, 8 : 8 + 2 * net.halo], tile[:, :, : 2 * net.halo], atol=1e-5)


def test_decoding_with_noise_adds_texture_once_it_was_trained(textured: Preset):
    torch.manual_seed(0)
    model = build_autoencoder(textured, 12).eval()
    assert model.texture is not None
    latents, labels = torch.randn(1, 8, 4, 4, 4), torch.zeros(1, 12, 16, 16, 16)
    noise = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        smooth, untrained = model.decode(latents, labels), model.decode(latents, labels, noise)
        model.texture.trained.fill_(1)
        drawn, again = (model.decode(latents, labels, noise) for _ in range(2))
    assert torch.equal(untrained, smooth)
    assert torch.equal(drawn, again)
    assert not torch.allclose(drawn, smooth)


def test_training_touches_the_texture_decoder_alone(textured: Preset, data: TrainingSet):
    torch.manual_seed(0)
    model = build_autoencoder(textured, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_texture(model, data, textured.texture, steps=2, seed=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("texture.") for name in changed)


def test_training_brings_the_energy_of_grain_back(textured: Preset, data: TrainingSet):
    torch.manual_seed(0)
    model = build_autoencoder(textured, 12)
    torch.nn.init.zeros_(model.out.weight)
    stage = textured.texture.model_copy(update={"crop": (16, 16, 16), "batch": 2})
    train_texture(model, data, stage, steps=150, seed=0)
    batch = data.crops(range(4), None)
    real = torch.from_numpy(batch.images)
    with torch.no_grad():
        latents, labels = model.encode(real), torch.zeros(4, 12, *real.shape[2:])
        smooth, drawn = model.decode(latents, labels), model.decode(latents, labels, torch.randn(real.shape))

    def energy(volume: torch.Tensor) -> float:
        return float(sum(volume.diff(dim=axis).square().mean() for axis in (2, 3, 4)))

    # This decoder knows nothing, so its volume is flat; the drawn one is about as rough as reality.
    assert energy(smooth) < 0.1 * energy(real)
    assert 0.5 * energy(real) < energy(drawn.clamp(-1, 1)) < 1.6 * energy(real)


def test_a_slice_across_the_border_trains_both(textured: Preset, data: TrainingSet):
    torch.manual_seed(0)
    preset = textured.model_copy(update={"stage1": textured.stage1.model_copy(update={"steps": 3})})
    seen: list[tuple[str, int, int]] = []
    train_first_stage(
        build_autoencoder(preset, 12), data, preset, steps=3, first_step=1, total_steps=6, seed=0,
        progress=lambda p: seen.append((p.stage, p.step, p.steps)),
    )  # fmt: skip
    assert seen == [("stage 1", 2, 3), ("stage 1", 3, 3), ("texture", 1, 3)]


def test_a_schedule_too_short_for_texture_leaves_volumes_smooth(textured: Preset, data: TrainingSet):
    long = textured.texture.model_copy(update={"steps": 2000})
    preset = textured.model_copy(update={"texture": long, "stage1": textured.stage1.model_copy(update={"steps": 2000})})
    model = build_autoencoder(preset, 12)
    seen: list[str] = []
    train_first_stage(
        model, data, preset, steps=2, first_step=4, total_steps=6, seed=0, progress=lambda p: seen.append(p.stage)
    )
    assert set(seen) == {"stage 1"}
    assert not model.draws_texture


def test_a_preset_without_a_texture_decoder_is_refused(preset: Preset, data: TrainingSet):
    with pytest.raises(ConfigError, match="texture"):
        train_texture(build_autoencoder(preset, 12), data, StageConfig(steps=1), steps=1, seed=0)
