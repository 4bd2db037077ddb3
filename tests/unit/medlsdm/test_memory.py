from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from medlsdm.errors import ResourceError, UsageError
from medlsdm.memory import (
    MIB,
    Footprint,
    Grid,
    Needs,
    Plan,
    footprint,
    free_bytes,
    make_plan,
    measured_footprint,
    parse_bytes,
    peak_resident_bytes,
    resident_bytes,
)

GRID = Grid((64, 48, 40), halo=8, align=2, decoder_halo=5, exact=True, halves=1, calls=6, slab_bytes=64 * MIB)
NEEDS = Needs(
    pyramid=Footprint(1500, 40), guide=Footprint(900, 600), network=Footprint(1200, 32),
    decode=Footprint(9000, 256), state=192, labels=64, output=256,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 2**30), ("512 MiB", 512 * MIB), ("1.5g", 3 * 2**29), ("2t", 2**41), ("9kb", 9216)],
)
def test_reads_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "4", "much", "-1GB", "0GB", "4 XB", "1e3GB", "nan GB"])
def test_refuses_what_is_no_size(text):
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_footprint_counts_what_lives_at_once():
    def call() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2  # second and third live: the peak stays at two
        return third.view(10, 100)

    found = footprint(call, voxels=1000)
    assert (found.peak, found.kept) == (8, 4)


def test_footprint_counts_a_shared_storage_once():
    found = footprint(lambda: torch.zeros(100).chunk(2), voxels=100)
    assert (found.peak, found.kept) == (4, 4)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_a_measured_footprint_has_what_is_taken_beside_tensors():
    def call() -> torch.Tensor:
        beside = np.ones(64 * MIB, dtype=np.uint8)
        return torch.full((MIB,), float(beside[-1]))

    found = measured_footprint(call, voxels=MIB, device=torch.device("cpu"))
    assert 60 <= found.peak < 80  # a heap that has room already counts a little less
    assert found.kept == 4


@pytest.mark.parametrize("budget_bytes", [2**40, 1100 * MIB, 800 * MIB, 600 * MIB, 460 * MIB])
def test_plans_keep_to_the_budget_and_cut_no_more_than_needed(budget_bytes):
    plan = make_plan(GRID, NEEDS, budget_bytes, 150 * MIB, batch=4)
    assert plan.estimate_bytes is not None
    assert plan.estimate_bytes <= budget_bytes
    assert plan.whole == (budget_bytes == 2**40)
    assert plan.batch == (4 if budget_bytes == 2**40 else 1)
    assert not plan.blended


def test_less_memory_never_makes_larger_windows():
    budgets = [n * MIB for n in range(460, 2500, 90)]
    plans = [make_plan(GRID, NEEDS, budget, 150 * MIB) for budget in budgets]
    tiles = [int(np.prod(plan.decoding_parts)) for plan in plans]
    assert tiles == sorted(tiles, reverse=True)


def test_windows_of_a_network_that_sees_everything_are_blended():
    grid = Grid((64, 48, 40), halo=8, align=2, decoder_halo=5, exact=False, halves=2, calls=6, slab_bytes=MIB)
    assert make_plan(grid, NEEDS, 460 * MIB, 150 * MIB).blended
    assert not make_plan(grid, NEEDS, 2**40, 150 * MIB).blended


def test_what_fits_in_no_way_is_refused_with_what_it_takes():
    with pytest.raises(ResourceError, match=r"needs \d+ MB at least") as refused:
        make_plan(GRID, NEEDS, 200 * MIB, 150 * MIB)
    least = int(str(refused.value).split(" needs ")[1].split()[0])
    make_plan(GRID, NEEDS, (least + 1) * MIB, 150 * MIB)


def test_a_plan_tells_itself_in_words_and_in_json():
    plan = Plan((2, 1, 1), (3, 3, 1), blended=True, estimate_bytes=2**31)
    assert plan.summary == "sampled in 2 x 1 x 1 windows, decoded in 3 x 3 x 1 windows, blended, about 2.0 GB"
    assert Plan().summary == "sampled whole, decoded whole"
    assert plan.to_json()["decoding_parts"] == (3, 3, 1)


def test_this_process_and_this_machine_have_plausible_sizes():
    before = resident_bytes()
    held = np.ones(8 * MIB)
    assert before + 50 * MIB < resident_bytes() < before + 90 * MIB
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    del held


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_a_peak_is_not_that_of_the_process_that_started_this_one():
    held = np.ones(32 * MIB)  # beyond all that the other will hold
    code = "from medlsdm.memory import peak_resident_bytes as peak; a = peak(); b = b'1' * (64 << 20); print(a, peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split())
    assert before + 60 * MIB < after
    assert after < peak_resident_bytes()
    del held


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_the_estimate_bounds_the_peak_in_truth():
    code = f"""
import numpy as np, torch
from medlsdm.config import load_preset, load_schema
from medlsdm.checkpoints import make_checkpoint
from medlsdm.memory import peak_resident_bytes, resident_bytes
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.synthesis import Synthesiser
from medlsdm.types import Geometry, Modality, SemanticMap
preset, schema = load_preset("tiny"), load_schema("procedural")
parts = build_autoencoder(preset, 12), build_denoiser(preset, 12)
made, _ = make_checkpoint(preset=preset, schema=schema, modalities=[Modality.CT],
                          autoencoder=parts[0].state_dict(), denoiser=parts[1].state_dict())
shape = (144, 128, 112)
labels = SemanticMap(np.zeros(shape, np.uint8), Geometry(np.eye(4), shape), schema)
drawer = Synthesiser(made, threads=1)
allowed = resident_bytes() + {600 * MIB}  # builds of torch differ by hundreds of MB
drawer.synthesise(labels, seed=0, steps=1, memory=allowed)
print(allowed, drawer.last_plan.estimate_bytes, peak_resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    allowed, estimate, peak = map(int, done.stdout.split())
    assert peak <= estimate <= allowed
