"""Rounds in which something is killed every time end all the same, with a model as good as an undisturbed run's.

Three rounds by default; ``MEDLSDM_ROUNDS=30`` for the long run (``make test-federation``), ``MEDLSDM_BUSY=6`` for six
busy loops beside it.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from medlsdm.checkpoints import load_checkpoint

from .testbed import Bed, busy_loops, wait

ROUNDS, BUSY = int(os.environ.get("MEDLSDM_ROUNDS", "3")), int(os.environ.get("MEDLSDM_BUSY", "0"))
STEPS, PATIENCE = 20, 900

pytestmark = pytest.mark.slow


def hurt(bed: Bed, rng: random.Random) -> str:
    """Kill one program by SIGKILL; start again what has nobody to start it."""
    site = rng.choice(sorted(bed.patients))
    victims = {
        "node": lambda: bed.kill_program(site),
        "coordinator": lambda: bed.kill_program("server"),
        **{word: (lambda w=word: bed.kill(bed.node(site), w)) for word in ("flower-supernode", "flwr-clientapp")},
        **{word: (lambda w=word: bed.kill(bed.home, w)) for word in ("flower-superlink", "flwr-serverapp")},
        "both superexecs": lambda: (bed.kill(bed.node(site), "superexec"), bed.kill(bed.home, "superexec")),
    }
    name = rng.choice(sorted(victims))
    victims[name]()
    if name == "node":
        bed.join(site)
    if name == "coordinator":
        bed.start_server()
    return f"{name} ({site})"


def reached(bed: Bed, launch: str, rounds: int) -> bool:
    return len(bed.events(launch, "round")) >= rounds or bool(bed.events(launch, "finished", "failed"))


def losses(bed: Bed, launch: str) -> list[float]:
    return [e["loss"] for e in bed.events(launch, "round")]


@pytest.fixture
def bed(tmp_path: Path):
    made = Bed(tmp_path / "bed")
    with busy_loops(BUSY):
        try:
            made.up()
            yield made
        finally:
            took = made.down()
            time.sleep(1)
            left = made.left()
            shutil.rmtree(made.root, ignore_errors=True)
            assert took < 20
            assert left == []


def test_rounds_with_a_kill_in_each_end_with_as_many_rounds_and_as_good_a_model(bed: Bed):
    rng = random.Random(int(os.environ.get("MEDLSDM_SEED", "7")))
    plan = bed.plan(rounds=ROUNDS, steps=STEPS, deadline_s=PATIENCE, gather_s=PATIENCE)
    launch, done = bed.launch(plan), 0
    while not bed.events(launch, "finished", "failed"):
        rounds = len(bed.events(launch, "round"))
        if rounds < done or not bed.events(launch, "asked"):
            time.sleep(0.5)
            continue
        time.sleep(rng.uniform(0, 25))
        print(f"round {rounds + 1}: killed {hurt(bed, rng)}", flush=True)
        done = rounds + 1
        wait(partial(reached, bed, launch, done), PATIENCE, f"round {done}", 1)
    assert [e["event"] for e in bed.events(launch, "finished", "failed")] == ["finished"], bed.status()["launch"]
    rows = bed.events(launch, "round")
    assert [(r["stage"], r["round"]) for r in rows] == [("stage1", n + 1) for n in range(ROUNDS)] + [("stage2", 1)]
    calm = bed.launch(plan)
    wait(lambda: bed.events(calm, "finished", "failed"), PATIENCE, "an undisturbed run", 1)
    hurt_last, calm_last = losses(bed, launch)[ROUNDS - 1], losses(bed, calm)[ROUNDS - 1]
    print(f"stage 1 ends at {hurt_last:.4f} with kills, {calm_last:.4f} without, from {losses(bed, calm)[0]:.4f}")
    assert hurt_last < calm_last + 0.15 * abs(calm_last)
    card = load_checkpoint(bed.home / "models" / rows[-1]["checkpoint"]).card
    assert card.sites == tuple(sorted(bed.patients))
