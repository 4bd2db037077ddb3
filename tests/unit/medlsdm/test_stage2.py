from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from medlsdm.config import DenoiserConfig, Preset, SamplerName
from medlsdm.diffusion.samplers import sample, seeded_noise
from medlsdm.errors import ConfigError, DataError
from medlsdm.models.ema import Ema
from medlsdm.models.unet import ANY_MODALITY, SemanticUNet, build_denoiser
from medlsdm.training.loop import make_optimiser
from medlsdm.training.memorisation import _chance_nearer, memorisation_rate
from medlsdm.training.reflow import draw_trajectories, reflow, reflow_loss
from medlsdm.training.stage2 import (
    LatentBatch,
    LatentSet,
    class_weights,
    held_out_loss,
    kept_classes,
    network_of,
    stage2_loss,
    train_stage2,
)

SIZE, CLASSES = (4, 3, 2), 4


def latent_set(patients: int, *, seed: int = 0, variants: int = 1) -> LatentSet:
    """Return made-up latents whose mean follows their label."""
    rng = np.random.default_rng(seed)
    count = patients * variants
    labels = np.repeat(rng.integers(0, CLASSES, (count, 1, 1, 1)), 4 * SIZE[0], axis=1)
    labels = np.broadcast_to(labels, (count, *(4 * n for n in SIZE))).astype(np.uint8)
    latents = rng.normal(size=(count, 8, *SIZE)) * 0.3 + labels[:, None, ::4, ::4, ::4] - 1.5
    return LatentSet(
        latents.astype(np.float32), labels, np.ones((count, 1, *SIZE), dtype=np.float32),
        np.ones((count, 3), dtype=np.float32), np.zeros(count, dtype=np.int64), np.arange(count) % patients,
    )  # fmt: skip


def denoiser_of(preset: Preset, **changes: object):
    torch.manual_seed(0)
    config = DenoiserConfig.model_validate(preset.denoiser.model_dump() | changes)
    return build_denoiser(preset.model_copy(update={"denoiser": config}), CLASSES)


@pytest.mark.parametrize("objective", [
    {"kind": "flow"}, {"kind": "v", "min_snr": 5.0}, {"kind": "epsilon", "loss": "l1"}, {"class_weight_cap": 10.0},
])  # fmt: skip
def test_every_objective_learns(preset, objective):
    denoiser, latents = denoiser_of(preset, objective=objective, norm="voxel"), latent_set(8)
    before = held_out_loss(denoiser, latents)
    assert before == held_out_loss(denoiser, latents)
    train_stage2(denoiser, latents, preset.stage2, steps=60, seed=0)
    assert held_out_loss(denoiser, latents) < 0.95 * before


def test_going_on_equals_training_at_once_with_the_average_too(preset):
    latents, finals = latent_set(6), []
    for slices in ([4], [2, 2]):
        denoiser = denoiser_of(preset, partial_labels=0.3, modality_dropout=0.3)
        optimiser, ema = make_optimiser(denoiser, preset.stage2), Ema(denoiser, 0.9)
        for first, steps in zip(itertools.accumulate([0, *slices]), slices, strict=False):
            state = ema.state_dict()
            ema = Ema(denoiser, 0.9)
            ema.load_state_dict(state)
            train_stage2(
                denoiser, latents, preset.stage2, steps=steps, first_step=first, total_steps=6, seed=3,
                optimiser=optimiser, ema=ema,
            )  # fmt: skip
        finals.append({**denoiser.state_dict(), **{f"average {k}": v for k, v in ema.weights().items()}})
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())
    assert not torch.equal(finals[0]["out.weight"], finals[0]["average out.weight"])


def test_hiding_labels_follows_the_settings():
    torch.manual_seed(0)
    config = DenoiserConfig(label_dropout=0.2, partial_labels=0.5)
    keep = kept_classes(config, 20_000, 3)
    told = keep.mean(dim=1)
    # A map whose part is drawn hides all of its classes in a quarter of cases, and none in a quarter.
    assert (told == 0).float().mean().item() == pytest.approx(0.2 + 0.8 * 0.5 / 4, abs=0.02)
    assert (told == 1).float().mean().item() == pytest.approx(0.8 * (0.5 + 0.5 / 4), abs=0.02)
    assert kept_classes(DenoiserConfig(label_dropout=0), 100, 3).all()


def test_labels_and_modality_are_hidden_in_training_only(preset):
    denoiser, latents = denoiser_of(preset, label_dropout=1.0, modality_dropout=1.0), latent_set(4)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = LatentBatch.of(latents, np.arange(4), torch.device("cpu"))
    untold = torch.full_like(batch.modality, ANY_MODALITY)
    hidden = dataclasses.replace(batch, labels=torch.full_like(batch.labels, CLASSES), modality=untold)

    @torch.no_grad()
    def loss(part, mode):
        torch.manual_seed(1)
        return stage2_loss(denoiser.train(mode), part).item()

    assert loss(batch, True) == loss(hidden, True)
    assert loss(batch, False) != loss(hidden, False)


def test_rare_classes_weigh_more_up_to_the_cap():
    latents = latent_set(1)
    labels = np.zeros_like(latents.labels)
    labels[0, :1] = 1
    labels[0, 0, 0, :1] = 2
    skewed = dataclasses.replace(latents, labels=labels)
    found = class_weights(skewed, 3, 10.0)
    assert found is not None
    assert found.tolist() == pytest.approx([1, 10, 10])
    gentle = class_weights(skewed, 3, 1e9)
    assert gentle is not None
    volumes = np.bincount(labels.ravel())
    assert gentle.tolist() == pytest.approx((volumes[0] / volumes).tolist())
    assert class_weights(latents, 3, 1.0) is None


def test_the_network_of_a_batch_is_guided(preset):
    denoiser, latents = denoiser_of(preset).eval(), latent_set(2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = LatentBatch.of(latents, np.arange(2), torch.device("cpu"))
    x, times = torch.randn(batch.latents.shape), torch.full((2,), 0.5)
    empty = dataclasses.replace(batch, labels=torch.full_like(batch.labels, CLASSES))
    with torch.no_grad():
        plain, null = (network_of(denoiser, part)(x, times) for part in (batch, empty))
        torch.testing.assert_close(network_of(denoiser, batch, 2.0)(x, times), 2 * plain - null, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("ours", "theirs"), [((1.0, 4.0, 5.0), (2.0, 3.0)), ((1.0,), (2.0, 0.5, 3.0))])
def test_the_chance_to_be_nearer_is_that_of_equally_many(ours, theirs):
    count = min(len(ours), len(theirs))
    pairs = list(itertools.product(itertools.combinations(ours, count), itertools.combinations(theirs, count)))
    assert _chance_nearer(list(ours), list(theirs)) == pytest.approx(np.mean([min(a) < min(b) for a, b in pairs]))


def test_memorisation_is_told_from_learning(preset):
    training, held_out = latent_set(4, seed=0), latent_set(6, seed=1)
    fresh = memorisation_rate(denoiser_of(preset), training, held_out, samples=12)
    assert 0.1 < fresh < 0.9
    one = dataclasses.replace(
        training, latents=np.repeat(training.latents[:1], 4, axis=0), labels=np.repeat(training.labels[:1], 4, axis=0)
    )
    unlabelled = denoiser_of(preset, label_dropout=1.0)
    train_stage2(unlabelled, one, preset.stage2, steps=150, seed=0)
    apart = dataclasses.replace(held_out, labels=np.full_like(held_out.labels, CLASSES))
    assert memorisation_rate(unlabelled, one, apart, samples=12) > 0.9
    with pytest.raises(DataError, match="two held-out"):
        memorisation_rate(unlabelled, one, latent_set(1))


def few_steps(denoiser: SemanticUNet, latents: LatentSet, steps: int, method: SamplerName = "euler") -> torch.Tensor:
    batch = LatentBatch.of(latents, np.arange(len(latents)), torch.device("cpu"))
    noise = seeded_noise(list(range(len(latents))), latents.latents.shape[1:])
    with torch.no_grad():
        return sample(network_of(denoiser, batch), noise, steps=steps, method=method)


def test_paths_are_those_of_the_sampler(preset):
    teacher, latents = denoiser_of(preset), latent_set(5)
    train_stage2(teacher, latents, preset.stage2, steps=30, seed=0)
    paths = draw_trajectories(teacher, latents, segments=2, substeps=3, draws=2, seed=4)
    assert paths.points.shape == (10, 3, *latents.latents.shape[1:])
    assert paths.times.tolist() == [1, 0.5, 0]
    batch = LatentBatch.of(latents, paths.row, torch.device("cpu"))
    with torch.no_grad():
        end = sample(network_of(teacher, batch), torch.from_numpy(paths.points[:, 0]), steps=6, method="heun")
    # Where segments meet both take a step of Heun; at time 0 both take one of Euler.
    torch.testing.assert_close(torch.from_numpy(paths.points[:, -1]), end, atol=0.05, rtol=0.05)
    assert paths.row.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert not np.array_equal(paths.points[:5, 0], paths.points[5:, 0])


def test_paths_do_not_depend_on_how_many_are_drawn_at_once(preset):
    latents = latent_set(5)
    teacher = denoiser_of(preset)
    for parameter in teacher.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    first, second = (draw_trajectories(teacher, latents, segments=1, seed=4, batch=n) for n in (5, 2))
    assert np.array_equal(first.points[:, 0], second.points[:, 0])
    assert np.abs(first.points[:, 1] - first.points[:, 0]).max() > 0.1
    # The last bits of convolutions and norms follow the batch.
    np.testing.assert_allclose(first.points, second.points, atol=0.02)


def test_reflow_brings_few_steps_nearer_to_many(preset):
    denoiser, latents = denoiser_of(preset), latent_set(8)
    train_stage2(denoiser, latents, preset.stage2, steps=150, seed=0)
    many, before = few_steps(denoiser, latents, 20, "heun"), few_steps(denoiser, latents, 2)
    paths = draw_trajectories(denoiser, latents, segments=2, draws=4, seed=9)
    stage = preset.stage2.model_copy(update={"learning_rate": 1e-3})
    reflow(denoiser, paths, stage, steps=100, seed=1)
    after = few_steps(denoiser, latents, 2)
    assert (after - many).square().mean() < 0.8 * (before - many).square().mean()


def test_straight_paths_cost_nothing_to_who_knows_them(preset, monkeypatch):
    monkeypatch.setattr(SemanticUNet, "_precondition", lambda self, times: (1.0, 0.0, 1.0))
    latents = latent_set(3)
    paths = draw_trajectories(denoiser_of(preset), latents, segments=2)
    # A fresh denoiser without preconditioning predicts no velocity, so its paths stand still, and it agrees with them.
    assert np.array_equal(paths.points[:, 0], paths.points[:, 2])
    assert reflow_loss(denoiser_of(preset), paths, np.arange(3)).item() == 0


def test_only_a_flow_can_be_straightened(preset):
    with pytest.raises(ConfigError, match="flow"):
        draw_trajectories(denoiser_of(preset, objective={"kind": "v"}), latent_set(1), segments=1)
