from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.config import ObjectiveConfig
from medlsdm.diffusion.objectives import Objective, shift_times
from medlsdm.diffusion.samplers import guided, noise_stream, sample, seeded_noise, time_grid
from medlsdm.errors import ConfigError

MEAN, STD = 2.0, 0.5
KINDS = ("flow", "v", "epsilon")
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "adams": 2, "dpm++": 2}


def objective_of(kind: str, **changes: object) -> Objective:
    return Objective(ObjectiveConfig.model_validate({"kind": kind} | changes))


def exact_network(objective: Objective):
    """Return the best possible network for data N(MEAN, STD^2), in closed form."""

    def network(x, times):
        signal, sigma = (level.view(-1, 1, 1, 1, 1) for level in objective.levels(times))
        surprise = (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
        return objective.target(MEAN + signal * STD**2 * surprise, sigma * surprise, times)

    return network


def exact_end(objective: Objective, noise: torch.Tensor) -> torch.Tensor:
    """Return where the exact flow takes noise: its path keeps each value's place within the Gaussian."""
    signal, sigma = (float(level) for level in objective.levels(torch.ones((), dtype=torch.float64)))
    return MEAN + STD * (noise - signal * MEAN) / math.sqrt(signal**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ORDERS)
def test_samplers_converge_to_the_exact_flow_at_their_order(kind, method):
    objective = objective_of(kind)
    noise = torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 1, 5, 1, 1)
    coarse, fine = (
        sample(exact_network(objective), noise, steps=steps, method=method, objective=objective)
        - exact_end(objective, noise)
        for steps in (512, 1024)
    )
    # On even times, DPM-Solver++(2M) has an error of log(steps) / steps^2.
    order = math.log2(coarse.abs().max().item() / fine.abs().max().item())
    assert order == pytest.approx(ORDERS[method], abs=0.25)
    assert fine.abs().max() < 2e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*ORDERS, "ancestral"])
def test_samples_have_the_mean_and_the_variance_of_the_data(kind, method):
    objective, seeds = objective_of(kind), [0, 1]
    noise = seeded_noise(seeds, (1, 24, 24, 24))
    drawn = sample(exact_network(objective), noise, steps=150, method=method, objective=objective, seeds=seeds)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.std().item() == pytest.approx(STD, rel=0.03)


def test_ancestral_samples_do_not_keep_their_starting_noise():
    objective, noise = objective_of("flow"), seeded_noise([0], (1, 16, 16, 16))
    drawn = sample(exact_network(objective), noise, steps=100, method="ancestral", objective=objective, seeds=[0])
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), drawn.flatten()]))[0, 1].item()) < 0.1


def test_ancestral_sampling_needs_seeds():
    with pytest.raises(ConfigError, match="seeds"):
        sample(lambda x, t: x, torch.zeros(1, 1, 1, 1, 1), steps=2, method="ancestral")


@pytest.mark.parametrize("method", [*ORDERS, "ancestral"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_gives_the_data_that_the_network_sees_in_noise(kind, method):
    objective, noise = objective_of(kind), torch.randn(1, 1, 2, 2, 2)
    drawn = sample(exact_network(objective), noise, steps=1, method=method, objective=objective, seeds=[0])
    seen = objective.estimate(exact_network(objective)(noise, torch.ones(1)), noise, torch.ones(1))
    if method in ("ddim", "dpm++", "ancestral") or (kind == "flow" and method != "adams"):
        torch.testing.assert_close(drawn, seen.data)
    assert drawn.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 99))
def test_a_right_answer_is_taken_apart_into_data_noise_and_slope(kind, time, seed):
    objective, generator = objective_of(kind), torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 1, 2, 1, 3, 1, generator=generator, dtype=torch.float64)
    times = torch.tensor([time], dtype=torch.float64)
    noisy = objective.noisy(data, noise, times)
    found = objective.estimate(objective.target(data, noise, times), noisy, times)
    torch.testing.assert_close(found.data, data, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.noise_pred, noise, atol=1e-6, rtol=1e-6)
    step = 1e-6
    slope = (objective.noisy(data, noise, times + step) - objective.noisy(data, noise, times - step)) / (2 * step)
    torch.testing.assert_close(found.velocity, slope, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_network_beats_the_exact_one(kind):
    objective, generator = objective_of(kind), torch.Generator().manual_seed(1)
    latents = MEAN + STD * torch.randn(4, 1, 12, 12, 12, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    times, weight = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.ones_like(latents)
    output = exact_network(objective)(objective.noisy(latents, noise, times), times)
    best = objective.loss(output, latents, noise, times, weight)
    for off in (-0.2, 0.2):
        assert objective.loss(output + off, latents, noise, times, weight) > best


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_ignores_what_has_no_weight(loss):
    objective = objective_of("flow", loss=loss)
    latents, noise, weight = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 2, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)
    weight[..., 2:] = 0
    spoilt = latents.clone()
    spoilt[..., 2:] = 1e3
    found = [objective.loss(torch.zeros_like(noise), x, noise, torch.tensor([0.5]), weight) for x in (latents, spoilt)]
    error = (noise - latents)[..., :2]
    assert found[0] == found[1]
    torch.testing.assert_close(found[0], (error.abs() if loss == "l1" else error.square()).mean())


@pytest.mark.parametrize(("kind", "plus"), [("v", 1), ("epsilon", 0)])
def test_min_snr_caps_the_weight_of_little_noise(kind, plus):
    objective, capped = objective_of(kind), objective_of(kind, min_snr=5.0)
    weight, latents, noise = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    for time in (0.1, 0.5, 0.9):
        times = torch.tensor([time])
        signal, sigma = (level.item() for level in objective.levels(times))
        snr = (signal / sigma) ** 2
        output = objective.target(latents, noise, times) + 1
        found = capped.loss(output, latents, noise, times, weight).item()
        assert found == pytest.approx(min(snr, 5) / (snr + plus), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_times_lie_between_data_and_noise_and_spread_over_the_batch(kind):
    torch.manual_seed(0)
    objective = objective_of(kind)
    times = objective.draw_times(1000, 1000)
    assert 0 < times.min() < 0.05
    assert 0.95 < times.max() < 1
    halves = torch.stack([objective.draw_times(2, 1000) for _ in range(50)]).sort(dim=1).values
    assert halves[:, 0].max() <= halves[:, 1].min() + 1e-6


def test_larger_volumes_train_at_noisier_times():
    objective = objective_of("flow", reference_voxels=1000)
    means = []
    for voxels in (1000, 8000):
        torch.manual_seed(0)
        means.append(objective.draw_times(100, voxels))
    torch.testing.assert_close(means[1], shift_times(means[0], 2.0))
    torch.manual_seed(0)
    torch.testing.assert_close(means[0], objective_of("flow").draw_times(100, 8000))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_grids_keep_both_ends(shift):
    times = time_grid(8, shift)
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()
    assert (times[4] > 0.5) == (shift > 1)


def test_noise_does_not_depend_on_the_batch():
    alone = noise_stream([7], (2, 3, 4, 5))
    among = noise_stream([3, 7], (2, 3, 4, 5))
    draws = [(next(alone), next(among)) for _ in range(3)]
    assert all(torch.equal(a[0], b[1]) for a, b in draws)
    assert not torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(seeded_noise([7], (2, 3, 4, 5)), draws[0][0])
    assert not torch.equal(seeded_noise([8], (2, 3, 4, 5)), draws[0][0])


def test_white_noise_of_variance_one_stands_still_on_the_path_of_adams():
    def network(x, times):  # the exact one for data N(0, 1)
        signal, sigma = (level.view(-1, 1, 1, 1, 1) for level in Objective().levels(times))
        power = signal**2 + sigma**2
        return sigma * x / power - signal * x / power

    noise = torch.randn(1, 1, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(sample(network, noise, steps=3, method="adams"), noise)


@pytest.mark.parametrize("method", ["heun", "adams", "dpm++", "ancestral"])
def test_a_sample_does_not_depend_on_its_batch(checkpoint, method):
    denoiser, seeds = checkpoint.build_denoiser(), list(range(8))
    labels = torch.randint(0, 12, (8, 16, 12, 8), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw(rows):
        guidance = denoiser.prepare_labels(labels[rows])
        spacing, modality = torch.ones(len(rows), 3), torch.zeros(len(rows), dtype=torch.int64)
        chosen = [seeds[row] for row in rows]
        noise = seeded_noise(chosen, (8, 4, 3, 2))
        return sample(
            lambda x, t: denoiser(x, t, guidance, spacing, modality), noise, steps=4, method=method, seeds=chosen
        )

    together = draw(seeds)
    for row in (0, 5):
        torch.testing.assert_close(draw([row])[0], together[row], atol=1e-5, rtol=1e-5)


def test_guidance_of_one_asks_the_labelled_half_only():
    def refuse(x, times):
        raise AssertionError

    x, t = torch.ones(1, 1, 1, 1, 1), torch.tensor([0.5])
    assert guided(lambda x, t: 2 * x, refuse, 1.0)(x, t).item() == 2
    assert guided(lambda x, t: 2 * x, lambda x, t: x, 1.5)(x, t).item() == pytest.approx(2.5)


def test_guidance_acts_within_its_interval_only():
    x = torch.ones(1, 1, 1, 1, 1)
    network = guided(lambda x, t: 2 * x, lambda x, t: x, 3.0, (0.2, 0.8))
    assert [network(x, torch.tensor([t])).item() for t in (0.1, 0.5, 0.9)] == [2, 4, 2]
    assert network(x, torch.tensor([0.2])).item() == 4


def test_guidance_sharpens_the_condition():
    """With a condition that shifts the mean by 1 and a null half without it, scale 2 shifts it by 2."""
    objective = objective_of("flow")

    def towards(mean):
        exact = exact_network(objective)
        return lambda x, t: exact(x - (1 - t.view(-1, 1, 1, 1, 1)) * mean, t) - mean

    noise = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [sample(guided(towards(1.0), towards(0.0), scale), noise, steps=50) for scale in (0.0, 1.0, 2.0)]
    assert (ends[1] - ends[0]).mean().item() == pytest.approx(1, abs=0.01)
    assert (ends[2] - ends[1]).mean().item() == pytest.approx(1, abs=0.01)
