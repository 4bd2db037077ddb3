import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from medlsdm.models.layers import ChannelNorm, Convolution, conv, depth_to_space, space_to_depth

sizes = st.integers(3, 9)


@settings(deadline=None, max_examples=25)
@given(x=sizes, y=sizes, z=sizes, channels=st.integers(1, 5), kernel=st.sampled_from([1, 3]))
def test_a_small_volume_alone_is_convolved_like_any_other(x: int, y: int, z: int, channels: int, kernel: int):
    torch.manual_seed(0)
    layer = conv(channels, 3, kernel=kernel)
    ours = torch.randn(1, channels, x, y, z, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    weights = torch.randn(3, x, y, z)
    expected = functional.conv3d(plain, layer.weight, layer.bias, padding=kernel // 2)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [plain, layer.weight, layer.bias])
    out = layer(ours)
    gradients = torch.autograd.grad((out * weights).sum(), [ours, layer.weight, layer.bias])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_torch_gives_every_small_float32_volume_to_onednn():
    layer = conv(8, 8)
    assert isinstance(layer, Convolution)
    for batch in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.inference_mode():
            layer(torch.randn(batch, 8, 9, 10, 11))
        names = {event.key for event in seen.key_averages()}
        assert "aten::slow_conv3d" not in names
        if torch.backends.mkldnn.is_available():
            assert "aten::mkldnn_convolution" in names


def test_one_sample_gives_what_it_gives_in_a_batch():
    torch.manual_seed(0)
    layer, batch = conv(4, 6), torch.randn(3, 4, 7, 6, 5)
    for row in range(3):
        torch.testing.assert_close(layer(batch[row : row + 1])[0], layer(batch)[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_norm_is_the_root_mean_square_of_each_voxel(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 4, 5) * torch.logspace(-2, 2, 5)
    naive = x / x.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(ChannelNorm()(x.to(dtype)).float(), naive, atol=tolerance, rtol=tolerance)


def test_a_voxel_of_zeros_stays_zero_and_its_gradient_finite():
    x = torch.zeros(1, 4, 2, 2, 2, requires_grad=True)
    out = ChannelNorm()(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_folding_and_unfolding_undo_each_other_in_any_layout(layout):
    volumes = torch.randn(2, 3, 4, 6, 8)
    folded = space_to_depth(volumes, (2, 1, 4)).contiguous(memory_format=layout)
    assert folded.shape == (2, 24, 2, 6, 2)
    assert torch.equal(folded[:, 8], volumes[:, 1, ::2, :, ::4])
    unfolded = depth_to_space(folded, (2, 1, 4))
    assert torch.equal(unfolded, volumes)
    assert unfolded.is_contiguous(memory_format=layout)
