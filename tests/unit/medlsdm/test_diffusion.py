from __future__ import annotations

import pytest
import torch

from medlsdm.diffusion.objectives import logit_normal_times, rectified_flow_loss
from medlsdm.diffusion.samplers import guided, sample, seeded_noise

MEAN, STD = 2.0, 0.5


def gaussian_velocity(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return the exact velocity for data N(MEAN, STD^2): E[noise - data | x_t]."""
    t = times.view(-1, 1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


@pytest.mark.parametrize(("method", "steps", "tolerance"), [("euler", 100, 0.03), ("heun", 20, 0.01)])
def test_samplers_reach_an_analytic_gaussian(method, steps, tolerance):
    noise = torch.randn(1, 1, 30, 30, 30, generator=torch.Generator().manual_seed(0))
    drawn = sample(gaussian_velocity, noise, steps=steps, method=method)
    # The flow of a Gaussian is affine: each noise value z must land on MEAN + STD * z.
    torch.testing.assert_close(drawn, MEAN + STD * noise, atol=4 * tolerance, rtol=0)
    assert float(drawn.std()) == pytest.approx(STD * float(noise.std()), abs=tolerance)


def test_the_exact_velocity_has_the_least_loss():
    generator = torch.Generator().manual_seed(1)
    latents = MEAN + STD * torch.randn(4, 1, 12, 12, 12, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    times, mask = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.ones_like(latents)
    exact = rectified_flow_loss(gaussian_velocity, latents, times, noise, mask)
    for off in (-0.2, 0.2):
        shifted = rectified_flow_loss(lambda x, t, off=off: gaussian_velocity(x, t) + off, latents, times, noise, mask)
        assert shifted > exact


def test_the_loss_ignores_what_is_masked():
    latents, noise = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 2, 4, 4, 4)
    mask = torch.ones(1, 1, 4, 4, 4)
    mask[..., 2:] = 0
    spoilt = latents.clone()
    spoilt[..., 2:] = 1e3
    losses = [
        rectified_flow_loss(lambda x, t: torch.zeros_like(x), clean, torch.tensor([0.5]), noise, mask)
        for clean in (latents, spoilt)
    ]
    assert losses[0] == losses[1]


def test_noise_does_not_depend_on_the_batch():
    alone = seeded_noise([7], (2, 3, 4, 5))
    assert torch.equal(seeded_noise([3, 7], (2, 3, 4, 5))[1:], alone)
    assert not torch.equal(seeded_noise([8], (2, 3, 4, 5)), alone)


def test_guidance_of_one_asks_the_labelled_half_only():
    def refuse(x, times):
        raise AssertionError

    x, t = torch.ones(1, 1, 1, 1, 1), torch.tensor([0.5])
    assert guided(lambda x, t: 2 * x, refuse, 1.0)(x, t).item() == 2
    assert guided(lambda x, t: 2 * x, lambda x, t: x, 1.5)(x, t).item() == pytest.approx(2.5)


def test_times_lie_strictly_between_data_and_noise():
    times = logit_normal_times(1000)
    assert times.min() > 0
    assert times.max() < 1
    assert times.std() > 0.1
