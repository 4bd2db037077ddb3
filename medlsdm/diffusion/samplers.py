"""Samplers: follow a trained network from noise (time 1) to data (time 0)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from medlsdm.config import SamplerName
from medlsdm.diffusion.objectives import Estimate, Network, Objective, shift_times
from medlsdm.errors import ConfigError

FLOW = Objective()


def noise_stream(seeds: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """Draw noise [B, *shape] again and again, each sample from its own seed, so that it does not depend on its batch.

    The first draw is where sampling starts; samplers that need fresh noise take the next ones.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw the noise [B, C, X, Y, Z] that sampling starts from, each sample from its own seed."""
    return next(noise_stream(seeds, shape))


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Return ``steps + 1`` times from 1 to 0; a ``shift`` above 1 puts more of them near noise."""
    return shift_times(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def sample(
    network: Network,
    noise: Tensor,
    *,
    steps: int,
    method: SamplerName = "heun",
    objective: Objective = FLOW,
    seeds: Sequence[int] | None = None,
    shift: float = 1.0,
    span: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """Follow ``network`` from ``noise`` [B, C, X, Y, Z] to a sample in ``steps`` steps.

    Each step calls ``network`` once; Heun calls it twice but for the last step.

    Args:
        network: Trained on ``objective``.
        noise: From ``seeded_noise``.
        steps: At least 1.
        method: ``euler`` and ``heun`` follow the slope, ``ddim`` and ``dpm++`` (2M) the predicted data;
            ``adams`` follows, by this slope and the one before, the path on which noise of variance 1 stands
            still; ``ancestral`` throws away noise and adds fresh noise.
        objective: What the network predicts.
        seeds: Of the samples; the ancestral sampler draws its fresh noise from them.
        shift: See ``time_grid``.
        span: The times to start and to end at, if ``noise`` is not pure or the end is not to be clean.

    Raises:
        ConfigError: The ancestral sampler was given no seeds.

    Source: Song et al. (arXiv 2010.02502), equation 12, for DDIM; Lu et al. (arXiv 2211.01095), algorithm 2,
    for DPM-Solver++(2M); Ho et al. (arXiv 2006.11239), equation 7, for ancestral sampling; Bashforth and
    Adams (1883), of second order, for ``adams``.
    """
    if method == "ancestral" and seeds is None:
        raise ConfigError("The ancestral sampler needs the samples' seeds.", "Give seeds, or take another sampler.")
    fresh = itertools.islice(noise_stream(seeds or (), noise.shape[1:]), 1, None)
    times = span[1] + (span[0] - span[1]) * time_grid(steps, shift)
    levels = list(zip(*(level.tolist() for level in objective.levels(times)), strict=True))

    def look(x: Tensor, index: int) -> Estimate:
        now = times[index].to(x).expand(len(x))
        return objective.estimate(network(x, now), x, now)

    x, history, past = noise, [], None
    for index, (now, then) in enumerate(itertools.pairwise(times.tolist())):
        here = look(x, index)
        if method == "ddim":
            x = levels[index + 1][0] * here.data + levels[index + 1][1] * here.noise_pred
        elif method == "dpm++":
            history = [*history[-1:], here.data]
            x = _multistep(x, history, levels[max(0, index - 1) : index + 2])
        elif method == "adams":
            x, past = _adams(x, here, past, levels[index], levels[index + 1])
        elif method == "ancestral":
            x = _ancestral(x, here.data, levels[index], levels[index + 1], fresh)
        else:
            ahead = x + (then - now) * here.velocity
            if method == "heun" and then > 0:
                ahead = x + (then - now) / 2 * (here.velocity + look(ahead, index + 1).velocity)
            x = ahead
    return x


Level = tuple[float, float]
"""Factors of data and of noise at one time."""

Slope = tuple[Tensor, float]
"""A slope, and how long the step along it was."""


def _multistep(x: Tensor, history: list[Tensor], levels: list[Level]) -> Tensor:
    """Step by the data predicted now and, where there is one, one step ago; the last step is of first order."""
    (_, sigma), (next_signal, next_sigma) = levels[-2:]
    logs = [math.log(a) - math.log(b) if a > 0 and b > 0 else math.copysign(math.inf, a - b) for a, b in levels]
    step, data = logs[-1] - logs[-2], history[-1]
    if len(history) == 2 and math.isfinite(step):
        weight = step / (2 * (logs[-2] - logs[-3]))
        data = data + weight * (data - history[-2])
    return next_sigma / sigma * x - next_signal * math.expm1(-step) * data


def _adams(x: Tensor, here: Estimate, past: Slope | None, now: Level, then: Level) -> tuple[Tensor, Slope]:
    """Step along the angle between data and noise, latents scaled to the variance that white noise would have.

    Standardised latents hardly move on this path, so few steps do. The first step, which has no past, is of
    first order.
    """
    angle, next_angle = (math.atan2(sigma, signal) for signal, sigma in (now, then))
    step, slope = next_angle - angle, math.cos(angle) * here.noise_pred - math.sin(angle) * here.data
    ahead = slope if past is None else slope + step / (2 * past[1]) * (slope - past[0])
    return math.hypot(*then) * (x / math.hypot(*now) + step * ahead), (slope, step)


def _ancestral(x: Tensor, data: Tensor, now: Level, then: Level, fresh: Iterator[Tensor]) -> Tensor:
    """Draw from the distribution of the less noisy latents, given the noisy ones and the predicted data."""
    ratio = now[0] / then[0]
    variance = max(0.0, now[1] ** 2 - (ratio * then[1]) ** 2)
    mean = ratio * (then[1] / now[1]) ** 2 * x + then[0] * variance / now[1] ** 2 * data
    return mean if then[1] == 0 else mean + math.sqrt(variance) * then[1] / now[1] * next(fresh).to(x)


def guided(labelled: Network, unlabelled: Network, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Network:
    """Combine both halves of classifier-free guidance; a scale of 1 calls the first one only.

    Outside ``interval`` of times the first one is called alone, too.

    Source: Ho and Salimans (arXiv 2207.12598), equation 6; interval: Kynkäänniemi et al. (arXiv 2404.07724).
    """
    if scale == 1.0:
        return labelled

    def network(x: Tensor, times: Tensor) -> Tensor:
        with_labels = labelled(x, times)
        if not interval[0] <= float(times[0]) <= interval[1]:
            return with_labels
        without = unlabelled(x, times)
        return without + scale * (with_labels - without)

    return network
