from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.config import DenoiserConfig
from medlsdm.models.attention import Attention
from medlsdm.models.unet import ANY_MODALITY, WHOLE_VOLUME, SemanticUNet

CLASSES, STRIDES = 3, (2, 2, 2)


def filled(**changes: object) -> SemanticUNet:
    """Return a small network in double precision whose zeroed layers are filled too."""
    torch.manual_seed(0)
    config = DenoiserConfig.model_validate({"channels": (8, 16), "label_width": 4, "embedding_width": 16} | changes)
    network = SemanticUNet(config, 2, STRIDES, CLASSES).eval()
    for parameter in network.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def random_case(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents of a size and a label map that covers them."""
    generator = torch.Generator().manual_seed(sum(size))
    full = [n * s for n, s in zip(size, STRIDES, strict=True)]
    return torch.randn(1, 2, *size, generator=generator), torch.randint(0, CLASSES, (1, *full), generator=generator)


@torch.no_grad()
def call(network, x, labels, *, modality=0, position=None):
    guidance = network.prepare_labels(labels)
    return network(x, torch.tensor([0.4]), guidance, torch.ones(1, 3), torch.tensor([modality]), position)


def reached(network: SemanticUNet, axis: int, place: int, length: int, what: str) -> set[int]:
    """Return the distances along ``axis`` at which a change of one latent voxel, or its labels, is felt."""
    x, labels = random_case((*(2,) * axis, length, *(2,) * (2 - axis)))
    other_x, other_labels = x.clone(), labels.clone()
    if what == "latents":
        other_x.select(2 + axis, place).add_(1)
    else:
        other_labels.narrow(1 + axis, 2 * place, 2).add_(1).remainder_(CLASSES)
    moved = (call(network, x, labels) != call(network, other_x, other_labels)).movedim(2 + axis, 0).flatten(1).any(1)
    return {int(found) - place for found in moved.nonzero()}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 79), st.sampled_from(["latents", "labels"])
)
def test_nothing_beyond_the_receptive_field_matters(levels, blocks, axis, place, what):
    network = filled(norm="voxel", channels=(4, 8, 8)[:levels], blocks=blocks)
    assert network.receptive_field is not None
    distances = reached(network, axis, place, 80, what)
    assert 0 in distances
    assert max(map(abs, distances)) <= network.receptive_field


@pytest.mark.parametrize(("levels", "blocks"), [(1, 1), (2, 1), (2, 2)])
def test_the_receptive_field_is_hardly_larger_than_need_be(levels, blocks):
    network = filled(norm="voxel", channels=(4, 8)[:levels], blocks=blocks)
    assert network.receptive_field is not None
    felt = set.union(*(reached(network, 0, place, 80, "latents") for place in (40, 41)))
    assert max(map(abs, felt)) >= network.receptive_field - 2**levels


def test_windows_with_a_halo_equal_the_whole():
    network = filled(norm="voxel")
    x, labels = random_case((60, 4, 5))
    whole = call(network, x, labels)
    assert network.receptive_field is not None
    halo = network.receptive_field + network.receptive_field % 2
    for start, stop in itertools.pairwise((0, 22, 40, 60)):
        low, high = max(0, start - halo), min(60, stop + halo)
        part = call(network, x[:, :, low:high], labels[:, 2 * low : 2 * high])
        torch.testing.assert_close(part[:, :, start - low : stop - low], whole[:, :, start:stop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"norm": "group"}, {"norm": "voxel", "attention": 1}])
def test_a_network_that_sees_everything_has_no_receptive_field(changes):
    network = filled(**changes)
    assert network.receptive_field is None
    assert max(reached(network, 0, 0, 60, "latents")) == 59


def test_the_null_half_is_a_map_without_labels():
    network = filled()
    empty = network.prepare_labels(torch.full((2, 9, 8, 13), CLASSES))
    null = network.prepare_null(2, (9, 8, 13))
    torch.testing.assert_close(null.entry, empty.entry)
    for ours, theirs in zip(null.modulations, empty.modulations, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_classes_that_are_not_kept_count_as_unlabelled():
    network = filled()
    _, labels = random_case((5, 4, 3))
    partial = network.prepare_labels(labels, torch.tensor([[1.0, 0.0, 1.0]])).entry
    torch.testing.assert_close(partial, network.prepare_labels(labels.where(labels != 1, CLASSES)).entry)
    assert (partial - network.prepare_labels(labels).entry).abs().max() > 1e-3


def test_position_and_modality_may_stay_untold():
    network = filled()
    x, labels = random_case((4, 4, 4))
    plain = call(network, x, labels)
    assert torch.equal(plain, call(network, x, labels, position=torch.tensor([WHOLE_VOLUME])))
    top = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0, 0.5]])
    assert (plain - call(network, x, labels, position=top)).abs().max() > 1e-4
    assert (plain - call(network, x, labels, modality=ANY_MODALITY)).abs().max() > 1e-4


@pytest.mark.parametrize("attention", [0, 1, 2])
def test_attention_sits_at_the_coarsest_scales(attention):
    network = filled(channels=(8, 16, 32), attention=attention)
    widths = {part.project_out.in_channels for part in network.modules() if isinstance(part, Attention)}
    assert widths == {0: set(), 1: {32}, 2: {32, 16}}[attention]
    x, labels = random_case((5, 6, 7))
    assert call(network, x, labels).isfinite().all()


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    layer = Attention(64)
    torch.nn.init.normal_(layer.project_out.weight, std=0.1)
    x = torch.randn(1, 64, 2, 3, 1)
    normal = x / x.square().mean(1, keepdim=True).sqrt()
    weight, bias = layer.project_in.weight.flatten(1), layer.project_in.bias
    assert bias is not None
    joint = (normal.flatten(2)[0].T @ weight.T + bias).view(6, 3, 2, 32)
    gathered = torch.zeros(6, 2, 32)
    for head in range(2):
        q, k, v = joint[:, :, head].unbind(1)
        q, k = (part / part.square().mean(1, keepdim=True).sqrt() for part in (q, k))
        gathered[:, head] = torch.softmax(q @ k.T / 32**0.5, dim=1) @ v
    out = gathered.flatten(1) @ layer.project_out.weight.flatten(1).T
    torch.testing.assert_close(layer(x), x + out.T.view(x.shape), atol=1e-4, rtol=1e-3)
