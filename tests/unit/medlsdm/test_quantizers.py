from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medlsdm.config import AutoencoderConfig
from medlsdm.models import quantizers
from medlsdm.models.quantizers import FiniteScalar, MovingAverage, Quantiser, build_quantiser
from medlsdm.models.vqgan import VQGAN, build_autoencoder
from medlsdm.training.stage1 import train_stage1

SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
SEEDS = st.integers(0, 1000)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voxels(latents: Tensor) -> list[list[float]]:
    """Return each voxel's vector, by a loop."""
    b, _, nx, ny, nz = latents.shape
    return [latents[i, :, x, y, z].tolist() for i in range(b) for x in range(nx) for y in range(ny) for z in range(nz)]


def naive_fsq(value: float, levels: int) -> float:
    """Bound and round one number, by the paper's listing."""
    half = (levels - 1) * 1.001 / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    bounded = math.tanh(value + math.atanh(offset / half)) * half - offset
    return round(bounded) / (levels // 2)


def naive_nearest(vector: list[float], codebook: list[list[float]]) -> int:
    distances = [sum((a - b) ** 2 for a, b in zip(vector, code, strict=True)) for code in codebook]
    return distances.index(min(distances))


@pytest.mark.parametrize("levels", [2, 3, 5, 8])
def test_fsq_equals_the_papers_listing(levels):
    values = torch.linspace(-5, 5, 101)
    quantiser = FiniteScalar((levels,))
    found = quantiser(quantiser.bound(values.view(1, 1, -1, 1, 1))).flatten()
    assert found.tolist() == pytest.approx([naive_fsq(float(v), levels) for v in values])
    assert len(found.unique()) == levels


@given(shape=SHAPES, levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_fsq_equals_a_loop_over_voxels_and_numbers_its_codes(shape, levels, seed):
    batch, *size = shape
    latents = noise(seed, batch, len(levels), *size) * 2
    quantiser = FiniteScalar(tuple(levels))
    bounded = quantiser.bound(latents)
    expected = [[naive_fsq(v, n) for v, n in zip(vector, levels, strict=True)] for vector in voxels(latents)]
    assert voxels(quantiser(bounded)) == [pytest.approx(codes) for codes in expected]
    indices = quantiser.indices(bounded)
    assert indices.shape == (batch, *size)
    for number, codes in zip(indices.flatten().tolist(), expected, strict=True):
        place = 0
        for code, n in zip(reversed(codes), reversed(levels), strict=True):
            place = place * n + round(code * (n // 2)) + n // 2
        assert number == place < math.prod(levels)


def test_fsq_rounds_once_and_stays_inside_its_levels():
    quantiser = FiniteScalar((8, 5))
    codes = quantiser(noise(0, 1, 2, 4, 4, 4) * 3)
    assert torch.equal(quantiser(codes), codes)
    assert codes[:, 0].min() >= -1
    assert codes[:, 0].max() <= 0.75


@pytest.mark.parametrize("kind", ["fsq", "ema", "none"])
def test_the_gradient_passes_straight_through(kind):
    quantiser = build_quantiser(AutoencoderConfig(quantiser=kind, levels=(8, 8), codebook=4))
    bounded = noise(0, 1, 2, 3, 3, 3).requires_grad_()
    (quantiser(bounded) * 3).sum().backward()
    assert bounded.grad is not None
    torch.testing.assert_close(bounded.grad, torch.full_like(bounded, 3.0))


@given(shape=SHAPES, width=st.integers(1, 5), size=st.integers(2, 12), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_ema_takes_the_nearest_code_of_each_voxel(shape, width, size, seed):
    batch, *grid = shape
    torch.manual_seed(seed)
    quantiser = MovingAverage(size, width).eval()
    latents = noise(seed, batch, width, *grid)
    codebook = quantiser.codebook.tolist()
    expected = [naive_nearest(vector, codebook) for vector in voxels(latents)]
    assert quantiser.indices(latents).flatten().tolist() == expected
    assert voxels(quantiser(latents)) == [pytest.approx(codebook[i], abs=1e-5) for i in expected]


def naive_update(state: dict[str, Any], vectors: list[list[float]], decay: float) -> tuple[list[float], list[list]]:
    """Return counts and codes after one step, by hand, no code being dead."""
    counts, sums = list(state["counts"]), [list(row) for row in state["sums"]]
    for k, code in enumerate(state["codebook"]):
        mine = [v for v in vectors if naive_nearest(v, state["codebook"]) == k]
        counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        sums[k] = [decay * s + (1 - decay) * sum(v[c] for v in mine) for c, s in enumerate(sums[k])]
        assert len(code) == len(sums[k])
    return counts, [[s / n for s in row] for row, n in zip(sums, counts, strict=True)]


@given(shape=SHAPES, width=st.integers(1, 3), size=st.integers(2, 6), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_ema_moves_its_codes_as_by_hand(shape, width, size, seed):
    batch, *grid = shape
    torch.manual_seed(seed)
    quantiser = MovingAverage(size, width, decay=0.9, dead_below=0.0).train()
    quantiser(noise(seed, 2, width, 3, 3, 3))
    before = {name: value.tolist() for name, value in quantiser.state_dict().items()}
    latents = noise(seed + 1, batch, width, *grid)
    rounded = quantiser(latents)
    counts, codebook = naive_update(before, voxels(latents), 0.9)
    assert quantiser.counts.tolist() == pytest.approx(counts, abs=1e-5)
    for found, expected in zip(quantiser.codebook.tolist(), codebook, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    used = [before["codebook"][naive_nearest(v, before["codebook"])] for v in voxels(latents)]
    assert voxels(rounded) == [pytest.approx(code, abs=1e-5) for code in used]


def test_ema_draws_its_codebook_from_the_first_training_batch_and_never_again():
    quantiser = MovingAverage(8, 2)
    fresh = quantiser.codebook.clone()
    quantiser.eval()(noise(0, 1, 2, 4, 4, 4))
    assert torch.equal(quantiser.codebook, fresh)
    assert not quantiser.drawn
    first = noise(1, 1, 2, 4, 4, 4)
    quantiser.train()(first)
    assert quantiser.drawn
    loaded = MovingAverage(8, 2)
    loaded.load_state_dict(quantiser.state_dict())
    loaded.train()(first + 100)
    still = (loaded.codebook - quantiser.codebook).abs().amax(dim=1) < 1e-5
    assert 4 <= still.sum() < 8  # moved where used, not drawn anew
    loaded.eval()
    kept = copy.deepcopy(loaded.state_dict())
    loaded(noise(2, 1, 2, 4, 4, 4))
    assert all(torch.equal(kept[name], value) for name, value in loaded.state_dict().items())


def test_ema_draws_dead_codes_anew_from_the_batch():
    torch.manual_seed(0)
    quantiser = MovingAverage(4, 1).train()
    quantiser(torch.tensor([-1.0, -1.1, 1.0, 1.1]).view(1, 1, 4, 1, 1))
    quantiser.codebook[3], quantiser.sums[3], quantiser.counts[3] = 500.0, 0.5, 0.001
    quantiser(torch.tensor([-1.0, -1.1, 1.0, 1.1]).view(1, 1, 4, 1, 1))
    assert quantiser.codebook.abs().max() < 1.2
    assert quantiser.counts[3] > 0.5


def test_restarting_dead_codes_saves_a_codebook_that_began_in_one_corner():
    centres = noise(0, 16, 3) * 10

    def distortion(dead_below: float) -> float:
        torch.manual_seed(0)
        quantiser = MovingAverage(32, 3, decay=0.8, dead_below=dead_below).train()
        quantiser((centres[0] + 0.01 * torch.randn(256, 3)).T.reshape(1, 3, 256, 1, 1))
        error = torch.zeros(())
        for _ in range(60):
            points = centres[torch.randint(16, (256,))].T.reshape(1, 3, 256, 1, 1)
            error = (quantiser(points) - points).square().mean()
        return error.item()

    assert distortion(0.1) < 0.05 * distortion(0.0)


def test_ema_pulls_latents_to_their_codes_once_a_step():
    torch.manual_seed(0)
    quantiser = MovingAverage(4, 2).train()
    latents = noise(0, 1, 2, 4, 4, 4).requires_grad_()
    rounded = quantiser(latents)
    commitment = quantiser.take_commitment()
    assert commitment is not None
    torch.testing.assert_close(commitment, (latents - rounded).square().mean())
    commitment.backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, 2 * (latents - rounded).detach() / latents.numel())
    assert quantiser.take_commitment() is None
    quantiser.eval()(latents)
    assert quantiser.take_commitment() is None


def test_ema_never_holds_all_distances_at_once(monkeypatch):
    torch.manual_seed(0)
    quantiser = MovingAverage(32, 2).eval()
    latents = noise(0, 2, 2, 5, 7, 3)
    whole = quantiser.indices(latents)
    monkeypatch.setattr(quantizers, "DISTANCES_AT_ONCE", 32 * 9)
    assert torch.equal(quantiser.indices(latents), whole)


def test_ema_is_exact_under_bfloat16_autocast():
    torch.manual_seed(0)
    quantiser = MovingAverage(64, 4).train()
    quantiser(noise(0, 1, 4, 8, 8, 8))
    twin = copy.deepcopy(quantiser)
    latents = noise(1, 1, 4, 8, 8, 8).bfloat16()
    torch.manual_seed(1)
    plain = quantiser(latents.float())
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = twin(latents)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)
    assert all(torch.equal(a, b) for a, b in zip(quantiser.buffers(), twin.buffers(), strict=True))


def test_continuous_latents_have_no_codes():
    latents = noise(0, 1, 2, 3, 3, 3)
    assert torch.equal(Quantiser()(latents), latents)
    with pytest.raises(NotImplementedError):
        Quantiser().indices(latents)


def test_the_autoencoder_saves_the_codebook_of_ema():
    config = AutoencoderConfig(quantiser="ema", codebook=16, levels=(8, 8, 8))
    torch.manual_seed(0)
    model, volumes = VQGAN(config, 2).train(), noise(0, 1, 1, 16, 16, 16)
    labels = torch.zeros(1, 2, 16, 16, 16)
    model(volumes, labels)
    again = VQGAN(config, 2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(volumes, labels), model.eval()(volumes, labels))
    assert again.quantiser.state_dict().keys() == {"codebook", "sums", "counts", "drawn"}


def test_stage_1_trains_with_the_codebook_of_ema(preset, data):
    autoencoder = preset.autoencoder.model_copy(update={"quantiser": "ema", "codebook": 32, "levels": (8, 8, 8, 8)})
    torch.manual_seed(0)
    model = build_autoencoder(preset.model_copy(update={"autoencoder": autoencoder}), len(data.schema.classes))
    seen: list[float] = []
    train_stage1(model, data, preset.stage1, steps=30, seed=0, progress=lambda now: seen.append(now.loss))
    assert model.quantiser.drawn
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])
    assert model.quantiser.take_commitment() is None
    volumes = torch.from_numpy(data.crops([0, 1], None).images)
    assert len(model.quantiser.indices(model.encode(volumes)).unique()) > 8


TOGETHER = """
import sys
import torch
from torch import distributed
from medlsdm.models.quantizers import MovingAverage
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
quantiser = MovingAverage(6, 2, dead_below=0.3).train()
torch.manual_seed(rank)  # every process draws its own batch
for _ in range(20):
    quantiser(torch.randn(1, 2, 4, 4, 4) + 3 * rank)
print([round(value, 5) for value in torch.cat([quantiser.codebook.flatten(), quantiser.counts]).tolist()])
distributed.destroy_process_group()
"""


def test_processes_that_train_together_keep_one_codebook(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in processes)
    assert first == second
    assert sum(first[-6:]) == pytest.approx(128, rel=0.05)  # the voxels of both
