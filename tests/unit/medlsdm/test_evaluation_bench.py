from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from medlsdm.anatomy import generate
from medlsdm.checkpoints import Checkpoint
from medlsdm.synthesis import Synthesiser
from medlsdm.types import Modality

FOLDER = Path(__file__).parents[2] / "benchmarks"
SET = {
    "told_apart_auc": 0.9, "gradient_energy_ratio": 1.0, "power_ratio_by_band": [1, 0.9, 0.8, 0.7, 0.6, 1.3],
    "fid_count": 40, "fid": 3.0, "fid_floor": 2.0, "fid_segmenter": 1.0, "fid_segmenter_floor": 2.0, "dice": 0.84,
    "dice_real": 0.86, "nearest_mean": 0.7, "nearest_max": 0.8, "nearest_real_mean": 0.7, "nearest_real_max": 0.8,
}  # fmt: skip
RESULT = {
    "seed": 0, "train": 160, "test": 40, "cpu_seconds": {"stage 1": 400.0, "stage 2": 500.0, "all": 900.0},
    "reconstruction": {"psnr": 22.0, "ssim": 0.9},
    "sets": {"default": SET, "guided": SET | {"dice": 0.87}, "noise": SET},
    "segmenters": {"real": 0.86, "synthetic": 0.85, "both": 0.86}, "seconds": {"default": 0.05},
    "calls": {"default": 11}, "dice_floor": 0.58,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module("model")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("model_table")


def test_verdicts_are_of_the_mean_over_seeds(table: ModuleType):
    other = RESULT | {"reconstruction": {"psnr": 23.2, "ssim": 0.84}}
    found = {row["measure"]: row for row in table.rows([RESULT, other])}
    assert found["stage 1: PSNR, dB"]["verdict"] == "must"
    assert found["stage 1: PSNR, dB"]["low"] == 22.0
    assert found["stage 1: PSNR, dB"]["mean"] == pytest.approx(22.6)
    assert found["stage 1: SSIM"]["verdict"] == "goal"
    assert found["power over real, lowest band"]["verdict"] == "must"
    assert found["power over real, highest band"]["verdict"] == "missed"
    assert found["Dice below real"]["mean"] == pytest.approx(0.02)
    assert found["Dice below real, guided"]["verdict"] == "goal"
    assert found["FID over floor, random features"]["noise"] == pytest.approx(1.5)


def test_what_was_not_measured_is_said(table: ModuleType):
    found = {row["measure"]: row for row in table.rows([RESULT])}
    assert found["times faster than 300 ancestral steps"]["verdict"] == "not measured"
    text = table.render([RESULT])
    assert "not measured" in text
    assert "n = 40" in text


def test_the_split_repeats_and_has_no_patient_twice(bench: ModuleType):
    pairs = [generate(seed, Modality.MR, (16, 16, 16)) for seed in range(10)]
    train, held_out = bench.split(pairs, 3)
    again = bench.split(pairs, 3)
    assert [len(train), len(held_out)] == [7, 3]
    assert [id(p) for p in train + held_out] == [id(p) for part in again for p in part]
    assert len({id(p) for p in train + held_out}) == 10


@pytest.mark.parametrize("shape", [(5, 9, 7), (12, 4, 7), (6, 12, 5)])
def test_centred_keeps_the_middle_and_mirrors_the_rest(bench: ModuleType, shape: tuple[int, int, int]):
    volume = np.random.default_rng(0).random((6, 8, 7), dtype=np.float32)
    found = bench.centred(volume, shape)
    assert found.shape == shape
    before = [max(0, -((have - want) // 2)) for have, want in zip(volume.shape, shape, strict=True)]
    after = [max(0, want - have - b) for have, want, b in zip(volume.shape, shape, before, strict=True)]
    padded = np.pad(volume, list(zip(before, after, strict=True)), mode="symmetric")
    starts = [max(0, (have - want) // 2) for have, want in zip(volume.shape, shape, strict=True)]
    assert np.array_equal(found, padded[tuple(slice(s, s + n) for s, n in zip(starts, shape, strict=True))])


@pytest.mark.parametrize(("sampler", "steps", "guidance", "calls"), [("euler", 5, 2.0, 10), ("heun", 4, 1.0, 7)])
def test_network_calls_are_counted(
    bench: ModuleType, checkpoint: Checkpoint, sampler: str, steps: int, guidance: float, calls: int
):
    changed = bench.with_sampling(checkpoint, sampler=sampler, steps=steps, guidance=guidance)
    _, labels = generate(0, Modality.MR, (16, 16, 16))
    with bench.count_calls() as found:
        Synthesiser(changed, threads=1, device="cpu").synthesise(labels, seed=0)
    assert sum(found) == calls


def test_a_sampler_that_is_not_offered_is_none(bench: ModuleType, checkpoint: Checkpoint):
    assert bench.with_sampling(checkpoint, sampler="magic") is None


def test_results_are_measured_once_and_again_for_another_model(bench: ModuleType, tmp_path: Path):
    path, taken = tmp_path / "result.json", []

    def measure() -> float:
        taken.append(1)
        return 0.5

    for identity, count in (("a", 1), ("a", 1), ("b", 2)):
        assert bench.Results(path, identity).keep("seconds", "default", measure) == 0.5
        assert len(taken) == count


def test_cpu_time_adds_up_over_interruptions(bench: ModuleType, tmp_path: Path):
    from medlsdm.training.loop import Progress

    path, last = tmp_path / "cpu.json", 0.0
    for _ in range(2):
        clock = bench.CpuClock(path)
        sum(i * i for i in range(200_000))
        clock(Progress("stage 1", 1, 1, 0.0))
        assert clock.seconds["stage 1"] > last
        last = clock.seconds["stage 1"]


def test_the_montage_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(FOLDER))
    picture = importlib.import_module("model_picture")
    rng = np.random.default_rng(0)
    volumes = [rng.uniform(-1, 1, (12, 14, 10)).astype(np.float32)] * 2
    labels = [np.zeros((12, 14, 10), dtype=np.uint8), (volumes[0] > 0.5).astype(np.uint8)]
    picture.draw(tmp_path / "montage.png", {"real": volumes, "synthetic": volumes}, labels)
    assert (tmp_path / "montage.png").read_bytes()[:4] == b"\x89PNG"
