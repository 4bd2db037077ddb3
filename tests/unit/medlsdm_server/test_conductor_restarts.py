"""The conductor where something ends or fails between two steps: nothing counts twice, nothing received is lost."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from flwr.app import Error

from medlsdm.checkpoints import load_checkpoint
from medlsdm.errors import IntegrityError, PolicyError, ResourceError
from medlsdm.federation.plan import Stage
from medlsdm_server import checkpointing, replies
from medlsdm_server import conductor as module
from medlsdm_server.checkpointing import Trained
from medlsdm_server.conductor import Conductor
from medlsdm_server.launch import read_events
from medlsdm_server.replies import Reply
from medlsdm_server.status import launch_status

from .conducting import Grid, coordinator, honest

ONE = {"stage1": {"rounds": 1, "steps": 5}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "ROOM_S", 0.02)


def rounds(home, launch):
    return [e for e in read_events(home, launch.id) if e["event"] == "round"]


class Garbled(Grid):
    """Carry one site's reply so that Flower cannot put it together."""

    def pull_messages(self, names):
        if self.pushed[names[0]].metadata.dst_node_id == 103:
            raise ValueError("Unexpected set of `children` in /srv/anna")
        return super().pull_messages(names)


def test_a_reply_that_flower_cannot_put_together_costs_its_own_site(tmp_path):
    home, launch = coordinator(tmp_path / "s", **ONE)
    Conductor(home, launch, Garbled(honest, honest, honest)).run()
    assert [[bool(s["refused"]) for s in r["sites"]] for r in rounds(home, launch)] == [[False, False, True]] * 2
    assert "anna" not in str(read_events(home, launch.id))


def test_after_a_restart_the_others_have_twice_the_time_that_training_takes(tmp_path, monkeypatch):
    home, launch = coordinator(tmp_path / "s", deadline_s=3600)
    grid = Grid(honest, honest, honest)
    conductor, trained = Conductor(home, launch, grid), Trained.resume(home.models, launch)
    kept = [Reply(f"site-{n}", 4.0, None, 600.0, 1.0, tmp_path / "x") for n in range(2)]
    monkeypatch.setattr(module, "kept_replies", lambda *_: kept)
    sites, current = list(conductor._sites().values()), trained.arrays(Stage.STAGE1)
    asked = conductor._ask_all(sites, trained, Stage.STAGE1, 1, current, tmp_path)
    assert grid.asked == [103]
    for waited, over in ((0, False), (1150, False), (100, True)):
        for one in asked:
            one.since -= waited
        assert conductor._over(asked) is over


def test_a_round_that_fell_short_keeps_what_it_had(tmp_path):
    home, launch = coordinator(tmp_path / "s", **ONE)
    tries = []

    def refuses(arrays, weight):
        tries.append(1)
        return Error(5, PolicyError.public_text) if len(tries) <= 2 else honest(arrays, weight)

    grid = Grid(honest, refuses, refuses)
    Conductor(home, launch, grid).run()
    stage1 = grid.asked[: grid.asked.index(101, 1)]
    assert stage1 == [101, 102, 103, 102, 103]
    assert [s["refused"] for s in rounds(home, launch)[0]["sites"]] == ["", "", ""]


def test_replies_of_rounds_that_are_over_do_not_stay(tmp_path):
    home, launch = coordinator(tmp_path / "s", **ONE)
    left = home.run / "updates" / launch.id / "stage1-0000"
    left.mkdir(parents=True)
    (left / "site-0.safetensors").write_bytes(b"weights")
    Conductor(home, launch, Grid(honest, honest, honest)).run()
    assert not left.parent.exists()


def test_a_full_disk_while_a_reply_is_kept_costs_a_try_and_no_site(tmp_path, monkeypatch):
    home, launch = coordinator(tmp_path / "s", **ONE)
    real, fails = replies._packed, [OSError(errno.ENOSPC, "No space left on device")]

    def full_once(*given):
        if fails:
            raise fails.pop()
        return real(*given)

    monkeypatch.setattr(replies, "_packed", full_once)
    Conductor(home, launch, Grid(honest, honest, honest)).run()
    assert [e["event"] for e in read_events(home, launch.id)].count("again") == 1
    assert not any(s["refused"] for r in rounds(home, launch) for s in r["sites"])


def test_an_average_that_cannot_be_used_costs_a_try(tmp_path, monkeypatch):
    home, launch = coordinator(tmp_path / "s", **ONE)
    real, fails = module.Aggregator.aggregate, [IntegrityError("The average holds values that are not finite.")]

    def once(*given):
        if fails:
            raise fails.pop()
        return real(*given)

    monkeypatch.setattr(module.Aggregator, "aggregate", once)
    Conductor(home, launch, Grid(honest, honest, honest)).run()
    assert launch_status(home, launch.id)["state"] == "finished"


def weights_of_adam(folder, monkeypatch, fails):
    home, launch = coordinator(folder, strategy={"name": "fedadam", "eta": 0.1}, stage1={"rounds": 3, "steps": 5})
    real = checkpointing.save_checkpoint

    def full(path, **given):
        if path.name.removeprefix(f"{launch.id}.") in fails:
            fails.remove(path.name.removeprefix(f"{launch.id}."))
            raise ResourceError("No space.", "Make room.")
        return real(path, **given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_checkpoint", full)
        Conductor(home, launch, Grid(honest, honest, honest)).run()
    assert not fails
    return load_checkpoint(home.models / f"{launch.id}.stage1-0003").autoencoder


def test_a_round_that_is_done_twice_moves_the_moments_of_adam_once(tmp_path, monkeypatch):
    whole = weights_of_adam(tmp_path / "a", monkeypatch, [])
    broken = weights_of_adam(tmp_path / "b", monkeypatch, ["stage1-0001", "stage1-0002"])
    for name, value in whole.items():
        assert np.array_equal(value.numpy(), broken[name].numpy()), name


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 2, "steps": 5})
    Conductor(home, launch, Grid(honest, honest, honest)).run()
    file = home.models / f"{launch.id}.stage2-0001/denoiser.safetensors"
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:-1] + b"?")
    trained = Trained.resume(home.models, launch)
    assert [trained.rounds_done(s) for s in Stage] == [2, 0]
