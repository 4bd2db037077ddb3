from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.models.spade import LabelPyramid, one_hot

SCALES = ((4, 4, 4), (8, 8, 8)), ((4, 4, 1), (8, 8, 2)), ((1, 2, 2), (2, 4, 4), (4, 8, 8))


def naive_fractions(labels: torch.Tensor, stride: tuple[int, int, int], classes: int) -> torch.Tensor:
    """Count the classes in each block of half a stride, the map's last voxels repeated at its end."""
    half = [max(1, s // 2) for s in stride]
    sizes = [-(-n // s) * s // h for n, s, h in zip(labels.shape, stride, half, strict=True)]
    found = torch.zeros(classes, *sizes)
    for x in range(sizes[0] * half[0]):
        for y in range(sizes[1] * half[1]):
            for z in range(sizes[2] * half[2]):
                value = labels[tuple(min(i, n - 1) for i, n in zip((x, y, z), labels.shape, strict=True))]
                if value < classes:
                    found[int(value), x // half[0], y // half[1], z // half[2]] += 1
    return found / (half[0] * half[1] * half[2])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(SCALES), st.tuples(*[st.integers(1, 11)] * 3), st.integers(0, 99))
def test_the_pyramid_counts_classes_by_area(strides, shape, seed):
    torch.manual_seed(seed)
    labels = torch.randint(0, 4, shape)  # class 3 is outside
    pyramid = LabelPyramid(3, 5, strides)
    seen: list[torch.Tensor] = []
    for embed in pyramid.embed:
        embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pyramid(labels[None])
    for stride, folded in zip(strides, seen, strict=True):
        fold = [min(2, s) for s in stride]
        expected = naive_fractions(labels, stride, 3)
        blocks = expected
        for axis, f in enumerate(fold):
            blocks = blocks.unflatten(1 + 2 * axis, (-1, f))
        expected = blocks.permute(0, 2, 4, 6, 1, 3, 5).flatten(0, 3)
        x, y, z = expected.shape[1:]
        torch.testing.assert_close(folded[0][:, :x, :y, :z], expected)


@pytest.mark.parametrize("strides", SCALES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_slabs_and_indices_give_what_one_hot_gives_at_once(strides, dtype):
    torch.manual_seed(0)
    pyramid = LabelPyramid(3, 5, strides)
    labels = torch.randint(0, 4, (2, 37, 10, 9)).to(dtype)
    whole = pyramid(one_hot(labels, 3))
    for part, at_once, in_slabs in zip(pyramid(labels), whole, pyramid(labels, slab_bytes=1), strict=True):
        torch.testing.assert_close(part, at_once)
        torch.testing.assert_close(in_slabs, at_once)


def test_more_classes_than_a_byte_tells_apart():
    found = one_hot(torch.tensor([[[[0, 44]]]], dtype=torch.uint8), 300)
    assert found[0, :, 0, 0].argmax(0).tolist() == [0, 44]
    assert found.sum() == 2
