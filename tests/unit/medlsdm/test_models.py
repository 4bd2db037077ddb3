from __future__ import annotations

import numpy as np
import pytest
import torch

from medlsdm.config import AutoencoderConfig, load_preset
from medlsdm.models.layers import ChannelNorm, conv, depth_to_space, space_to_depth
from medlsdm.models.spade import LabelPyramid, one_hot
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import VQGAN, build_autoencoder
from medlsdm.training.loop import autocast


def test_depth_to_space_undoes_space_to_depth():
    x = torch.randn(2, 3, 4, 6, 5)
    folded = space_to_depth(x, (2, 3, 1))
    assert folded.shape == (2, 18, 2, 2, 5)
    assert torch.equal(depth_to_space(folded, (2, 3, 1)), x)
    assert folded[1, 0, 1, 1, 2] == x[1, 0, 2, 3, 2]


def test_channel_norm_looks_at_one_voxel_only():
    x = torch.randn(1, 8, 4, 4, 4)
    torch.testing.assert_close(ChannelNorm()(x)[..., :2], ChannelNorm()(x[..., :2]))
    assert ChannelNorm()(x).square().mean(1) == pytest.approx(1, abs=1e-2)


def test_one_hot_leaves_unknown_labels_empty():
    found = one_hot(torch.tensor([[[[0, 2, 9]]]]), 3)
    assert found[0, :, 0, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_label_pyramid_sees_a_single_voxel_at_every_scale():
    pyramid = LabelPyramid(2, 4, ((4, 4, 4), (8, 8, 8)))
    empty = one_hot(torch.zeros(1, 11, 16, 9, dtype=torch.int64), 2)
    dotted = empty.clone()
    dotted[0, :, 5, 7, 3] = torch.tensor([0.0, 1.0])
    for before, after in zip(pyramid(empty), pyramid(dotted), strict=True):
        assert (before - after).abs().max() > 1e-5


@pytest.mark.parametrize("strides", [(4, 4, 4), (4, 4, 1), (8, 4, 2), (2, 2, 2)])
def test_autoencoder_keeps_the_shape_for_any_strides(strides):
    channels = {8: (8, 8, 16), 4: (8, 16), 2: (8,)}[max(strides)]
    blocks = (1,) * len(channels)
    config = AutoencoderConfig(strides=strides, channels=channels, encoder_blocks=blocks, decoder_blocks=blocks)
    model = VQGAN(config, 3).eval()
    x, labels = torch.randn(2, 1, 16, 24, 8), one_hot(torch.zeros(2, 16, 24, 8, dtype=torch.int64), 3)
    latents = model.encode(x)
    assert latents.shape == (2, 8, 16 // strides[0], 24 // strides[1], 8 // strides[2])
    assert model.decode(latents, labels).shape == x.shape
    assert torch.equal(latents, model.encode(x))


def test_standardise_uses_the_buffers_and_is_undone():
    model = VQGAN(AutoencoderConfig(), 2)
    model.latents_mean.fill_(0.5)
    model.latents_mean_square.fill_(4.25)
    latents = torch.full((1, 8, 1, 1, 1), 2.5)
    assert model.standardise(latents).flatten().tolist() == pytest.approx([1.0] * 8)
    torch.testing.assert_close(model.unstandardise(model.standardise(latents)), latents)
    assert {"latents_mean", "latents_mean_square"} <= model.state_dict().keys()


@pytest.mark.parametrize("size", [(5, 7, 3), (1, 2, 9), (4, 4, 4)])
def test_unet_takes_latents_whose_size_divides_by_nothing(checkpoint, size):
    denoiser = checkpoint.build_denoiser()
    labels = one_hot(torch.zeros(1, *(4 * n for n in size), dtype=torch.int64), 12)
    x = torch.randn(1, 8, *size)
    guidance = denoiser.prepare_labels(labels)
    assert denoiser(x, torch.tensor([0.5]), guidance, torch.ones(1, 3), torch.tensor([1])).shape == x.shape


def test_unet_with_cached_labels_equals_labels_computed_each_time(checkpoint):
    denoiser = checkpoint.build_denoiser()
    rng = np.random.default_rng(0)
    labels = one_hot(torch.from_numpy(rng.integers(0, 12, (1, 16, 16, 16))), 12)
    conditions = torch.ones(1, 3), torch.tensor([0])
    cached = denoiser.prepare_labels(labels)
    for t in (0.9, 0.1):
        x = torch.randn(1, 8, 4, 4, 4)
        again = denoiser(x, torch.tensor([t]), denoiser.prepare_labels(labels), *conditions)
        assert torch.equal(denoiser(x, torch.tensor([t]), cached, *conditions), again)


@pytest.mark.parametrize("change", ["labels", "time", "spacing", "modality"])
def test_unet_listens_to_every_condition(checkpoint, change):
    denoiser = checkpoint.build_denoiser()
    labels = one_hot(torch.ones(1, 16, 16, 16, dtype=torch.int64), 12)
    other = torch.zeros_like(labels) if change == "labels" else labels
    x = torch.randn(1, 8, 4, 4, 4)
    plain = denoiser(x, torch.tensor([0.5]), denoiser.prepare_labels(labels), torch.ones(1, 3), torch.tensor([0]))
    changed = denoiser(
        x,
        torch.tensor([0.8 if change == "time" else 0.5]),
        denoiser.prepare_labels(other),
        torch.ones(1, 3) * (3 if change == "spacing" else 1),
        torch.tensor([1 if change == "modality" else 0]),
    )
    assert (plain - changed).abs().max() > 1e-4


def test_label_dropout_happens_in_training_only(preset):
    always = preset.model_copy(update={"autoencoder": preset.autoencoder.model_copy(update={"label_dropout": 1.0})})
    model = VQGAN(always.autoencoder, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 1, 8, 8, 8)
    labels = one_hot(torch.ones(1, 8, 8, 8, dtype=torch.int64), 2)
    unlabelled = model.decode(model.encode(x), torch.zeros_like(labels))
    torch.testing.assert_close(model.train()(x, labels), unlabelled)
    assert (model.eval()(x, labels) - unlabelled).abs().max() > 1e-4


def test_a_fresh_denoiser_predicts_nothing(preset):
    denoiser = build_denoiser(preset, 3).eval()
    labels = denoiser.prepare_labels(one_hot(torch.zeros(1, 8, 8, 8, dtype=torch.int64), 3))
    out = denoiser(torch.randn(1, 8, 2, 2, 2), torch.tensor([0.5]), labels, torch.ones(1, 3), torch.tensor([0]))
    assert not out.detach().any()


@pytest.mark.parametrize(("shape", "stride"), [((2, 3, 2), 1), ((2, 5, 5), 1), ((5, 5, 1), 2)])
def test_gradients_of_small_volumes_never_read_unwritten_memory(shape, stride):
    torch.manual_seed(0)
    layer, x = conv(16, 16, stride=stride), torch.randn(8, 16, *shape)
    seen = []
    for _ in range(6):
        spoilt = [torch.full((n,), torch.nan) for n in (1_000, 30_000, 300_000, 3_000_000)]
        del spoilt
        layer.zero_grad()
        with autocast(torch.device("cpu")):
            layer(x).float().square().sum().backward()
        assert layer.weight.grad is not None
        seen.append(layer.weight.grad.clone())
    assert all(torch.equal(seen[0], other) for other in seen)


@pytest.mark.parametrize("name", ["tiny", "base", "large", "paper"])
def test_every_weight_has_an_axis_so_that_federations_average_it_as_it_is(name: str):
    preset = load_preset(name)
    with torch.device("meta"):
        states = build_autoencoder(preset, 3).state_dict() | build_denoiser(preset, 3).state_dict()
    assert [key for key, value in states.items() if value.ndim == 0] == []
