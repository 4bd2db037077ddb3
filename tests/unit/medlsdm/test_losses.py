from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from medlsdm.config import Stage1Losses
from medlsdm.errors import DataError
from medlsdm.models.perceptual import load_features, perceptual_distance, random_features
from medlsdm.training.losses import gradient_difference, hide_padding, reconstruction_loss, ssim

NOTHING = Stage1Losses(l1=0, gradient=0)


def smooth(seed: int, *shape: int) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kernel = [min(3, n) for n in shape[2:]]
    return functional.avg_pool3d(noise, kernel, 1, [k // 2 for k in kernel]).clamp(-1, 1)


@given(
    shape=st.tuples(*[st.integers(7, 12)] * 3), noise=st.floats(0, 1), scale=st.floats(0.05, 1), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_ssim_equals_scikit_image(shape, noise, scale, seed):
    first = smooth(seed, 1, 1, *shape) * scale
    second = first + noise * smooth(seed + 1, 1, 1, *shape)
    expected = structural_similarity(first[0, 0].numpy(), second[0, 0].numpy(), data_range=2.0)
    assert ssim(first, second, torch.ones_like(first)).item() == pytest.approx(expected, abs=2e-4)


def test_ssim_of_part_of_a_volume_is_that_of_the_part_alone():
    first, second = smooth(0, 1, 1, 12, 14, 10), smooth(1, 1, 1, 12, 14, 10)
    mask = torch.zeros_like(first)
    mask[..., :9, :11, :] = 1
    part = (slice(None), slice(None), slice(9), slice(11))
    alone = ssim(first[part], second[part], torch.ones_like(first[part])).item()
    assert ssim(first, second, mask).item() == pytest.approx(alone, abs=1e-5)


def test_ssim_of_equal_volumes_is_one_and_its_gradient_is_finite_where_all_is_flat():
    flat = torch.zeros(1, 1, 8, 8, 8, requires_grad=True)
    found = ssim(flat, torch.zeros(1, 1, 8, 8, 8), torch.ones(1, 1, 8, 8, 8))
    assert found.item() == pytest.approx(1)
    found.backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 20, 4), (1, 8, 8)])
def test_ssim_takes_volumes_thinner_than_its_window(shape):
    first = smooth(0, 1, 1, *shape)
    other = smooth(1, 1, 1, *shape)
    assert ssim(first, other, torch.ones_like(first)) < 0.5 < ssim(first, first, torch.ones_like(first))


def test_ssim_where_no_window_fits_the_mask_teaches_nothing():
    first = smooth(0, 1, 1, 8, 8, 8).requires_grad_()
    found = ssim(first, smooth(1, 1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8))
    assert found.item() == 1
    found.backward()
    assert first.grad is not None
    assert not first.grad.any()


def test_gradient_difference_equals_a_loop():
    error, mask = smooth(0, 1, 1, 4, 5, 3), torch.ones(1, 1, 4, 5, 3)
    mask[..., 2] = 0
    array, seen = error[0, 0].numpy(), mask[0, 0].numpy()
    means = []
    for axis in range(3):
        steps = []
        for place in np.ndindex(*array.shape):
            after = tuple(p + (a == axis) for a, p in enumerate(place))
            if after[axis] < array.shape[axis] and seen[place] and seen[after]:
                steps.append(abs(float(array[after]) - float(array[place])))
        means.append(np.mean(steps) if steps else 0.0)
    assert gradient_difference(error, mask).item() == pytest.approx(np.mean(means), rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (Stage1Losses(), 0.1),
        (NOTHING.model_copy(update={"mse": 2.0}), 0.02),
        (NOTHING.model_copy(update={"l1": 3.0}), 0.3),
        (NOTHING, 0.0),
    ],
)
def test_each_loss_counts_by_its_weight_and_padding_never(weights, expected):
    volumes, mask = torch.zeros(1, 1, 9, 8, 12), torch.ones(1, 1, 9, 8, 12)
    mask[..., 9:] = 0
    rebuilt = torch.full_like(volumes, 0.1)
    rebuilt[..., 9:] = 50
    assert reconstruction_loss(rebuilt, volumes, mask, weights).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["l1", "mse", "gradient", "ssim", "perceptual"])
def test_padding_teaches_nothing_in_any_loss(name):
    torch.manual_seed(0)
    volumes, mask = smooth(0, 1, 1, 12, 12, 16), torch.ones(1, 1, 12, 12, 16)
    mask[..., 12:] = 0
    rebuilt = smooth(1, 1, 1, 12, 12, 16).requires_grad_()
    loss = reconstruction_loss(rebuilt, volumes, mask, NOTHING.model_copy(update={name: 1.0}), random_features())
    loss.backward()
    assert rebuilt.grad is not None
    assert rebuilt.grad[..., :12].any()
    assert not rebuilt.grad[..., 12:].any()


def test_hidden_padding_is_that_of_the_real_volume():
    mask = torch.tensor([1.0, 0.0])
    assert hide_padding(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), mask).tolist() == [3, 2]


def test_the_fallback_features_are_the_same_in_every_run_and_leave_the_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = random_features()
    torch.manual_seed(1)
    second = random_features()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(p.requires_grad for p in first.parameters())
    assert len(state) == len(torch.get_rng_state())


def test_perceptual_distance_is_zero_for_equals_and_grows_with_blur():
    network, volumes = random_features(), smooth(0, 2, 1, 16, 20, 12)

    def distance(rebuilt: Tensor) -> float:
        torch.manual_seed(0)
        return perceptual_distance(network, rebuilt, volumes, slices=3).item()

    slight = functional.avg_pool3d(volumes, 3, 1, 1)
    strong = functional.avg_pool3d(slight, 5, 1, 2)
    assert distance(volumes) == 0
    assert 0 < distance(slight) < distance(strong)


def vgg(path: Path, places: list[int], *, inputs: int, widths: list[int]) -> Path:
    tensors = {"head.fc.weight": torch.zeros(2, 2)}
    for place, outputs in zip(places, widths, strict=True):
        tensors[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3)
        tensors[f"features.{place}.bias"] = torch.randn(outputs)
        inputs = outputs
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("inputs", [1, 3])
def test_a_vgg_from_a_file_computes_what_torchs_layers_compute(tmp_path, inputs):
    torch.manual_seed(0)
    path = vgg(tmp_path / "vgg.safetensors", [0, 2, 5], inputs=inputs, widths=[4, 6, 8])
    network = load_features(path)
    slices = torch.rand(2, 1, 8, 10) * 2 - 1
    found = network(slices)
    assert [f.shape[1:] for f in found] == [(6, 8, 10), (8, 4, 5)]
    tensors = {k: v for k, v in network.state_dict().items() if k.startswith("stages")}
    h = ((slices + 1) / 2).expand(-1, inputs, -1, -1)
    h = (h - network.mean) / network.std
    for layer in ("0.0", "0.1"):
        h = functional.relu(
            functional.conv2d(h, tensors[f"stages.{layer}.weight"], tensors[f"stages.{layer}.bias"], padding=1)
        )
    torch.testing.assert_close(found[0], functional.normalize(h, dim=1, eps=1e-4))
    h = functional.max_pool2d(h, 2)
    h = functional.relu(functional.conv2d(h, tensors["stages.1.0.weight"], tensors["stages.1.0.bias"], padding=1))
    torch.testing.assert_close(found[1], functional.normalize(h, dim=1, eps=1e-4))


def test_a_file_that_is_no_vgg_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.safetensors").write_bytes(b"no tensors")
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    save_file(
        {"features.0.weight": torch.zeros(4, 3, 3, 3), "features.2.weight": torch.zeros(4, 5, 3, 3)},
        tmp_path / "torn.safetensors",
    )
    for name in ("missing", "text", "other", "torn"):
        with pytest.raises(DataError):
            load_features(tmp_path / f"{name}.safetensors")
