"""The conductor with real messages and strategies: hostile sites, lost work, short rounds, a restart in the middle."""

from __future__ import annotations

import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error

from medlsdm.checkpoints import load_checkpoint
from medlsdm.errors import UNTOLD, BusyError, PolicyError, ResourceError, RoundError
from medlsdm_server import conductor as module
from medlsdm_server.conductor import Conductor
from medlsdm_server.contacts import Contact
from medlsdm_server.launch import leading, read_events
from medlsdm_server.registry import Registry
from medlsdm_server.status import launch_status

from .conducting import Grid, answer, coordinator, honest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "ROOM_S", 0.02)


def big(arrays):
    return max(arrays, key=lambda k: arrays[k].size)


def spoilt(arrays, weight, change):
    made = {k: v + np.float32(0.01) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    change(made, big(made))
    return answer(made, weight)


def changed(change):
    return lambda arrays, weight: spoilt(arrays, weight, change)


def setter(value):
    def change(made, name):
        made[name] = np.full(made[name].shape, value)

    return change


def one_value(value):
    def change(made, name):
        made[name] = made[name].copy()
        made[name].flat[np.random.default_rng().integers(made[name].size)] = value

    return change


HOSTILE = {
    "nan": changed(one_value(np.nan)),
    "inf": changed(one_value(np.inf)),
    "shape": changed(lambda made, name: made.__setitem__(name, made[name].ravel())),
    "bool": changed(setter(True)),
    "string": changed(setter("9.9e9")),
    "complex": changed(setter(complex(np.nan, 1))),
    "int": changed(setter(2**60)),
    "f16": changed(lambda made, name: made.__setitem__(name, made[name].astype(np.float16))),
    "f64": changed(lambda made, name: made.__setitem__(name, made[name].astype(np.float64))),
    "big-endian": changed(lambda made, name: made.__setitem__(name, made[name].astype(">f4"))),
    "f64huge": changed(setter(1e300)),
    "largest": changed(lambda made, name: made.__setitem__(name, np.full_like(made[name], 3e38))),
    "scale": lambda a, w: answer({k: v * np.float32(1e6) for k, v in a.items()}, w),
    "missing": changed(lambda made, name: made.pop(name)),
    "more": changed(lambda made, name: made.__setitem__("more", made[name])),
    "bomb": changed(lambda made, name: made.__setitem__(name, np.zeros(50_000_000, np.float32))),
    **{
        f"weight {w}": (lambda a, _, w=w: answer(a, metrics={"weight": w}))
        for w in (float("nan"), float("inf"), 1e12, -12.0, 0.0, 3.0, 0.5, 2.0**17, [4.0, 4.0])
    },
    "weight twice": lambda a, w: answer(a, 16.0, again=4.0),
    "other metric": lambda a, w: answer(a, w, metrics={"weight": w, "patients": 17.0}),
    "no metric": lambda a, w: answer(a, w, metrics={}),
    "no record": lambda a, w: {k: v for k, v in honest(a, w).items() if k != "metrics"},
    "fourth record": lambda a, w: honest(a, w) | {"more": ArrayRecord({"x": Array(np.zeros(3, np.float32))})},
    "swapped records": lambda a, w: honest(a, w) | {"reply": honest(a, w)["metrics"]},
    "words": lambda a, w: honest(a, w) | {"reply": ConfigRecord({"reply": "{}"})},
    "no words": lambda a, w: honest(a, w) | {"reply": ConfigRecord({"reply": 7})},
    "seconds": lambda a, w: answer(a, w, seconds=1e300),
    "markup": lambda a, w: Error(9, "[/bold]"),
    "escape": lambda a, w: Error(9, "\x1b]0;owned\x07\x1b[2J"),
    "path": lambda a, w: Error(2, "<class 'OSError'>:<'/srv/anna'>"),
}


@pytest.mark.parametrize("mode", HOSTILE)
def test_a_hostile_reply_costs_its_own_site_and_nothing_else(tmp_path, mode):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    Conductor(home, launch, Grid(honest, honest, HOSTILE[mode])).run()
    rounds = [e for e in read_events(home, launch.id) if e["event"] == "round"]
    assert launch_status(home, launch.id)["state"] == "finished"
    for row in rounds:
        assert {s["site"]: bool(s["refused"]) for s in row["sites"]} == {
            "site-0": False, "site-1": False, "site-2": True
        }  # fmt: skip
        said = row["sites"][2]["refused"]
        assert said.isprintable()
        assert len(said) <= 200
        assert "anna" not in said
    weights = load_checkpoint(home.models / rounds[-1]["checkpoint"])
    for state in (weights.autoencoder, weights.denoiser):
        assert all(np.isfinite(v.numpy()).all() and np.abs(v.numpy()).max() < 100 for v in state.values())


def test_the_average_is_the_weighted_mean_of_what_was_sent(tmp_path):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    sent = []

    def site(seed):
        def reply(arrays, weight):
            made = {
                k: v + np.float32(0.001 * seed) * np.sign(v + 0.5) if v.dtype.kind == "f" else v
                for k, v in arrays.items()
            }
            sent.append((made, weight))
            return answer(made, weight)

        return reply

    Conductor(home, launch, Grid(site(1), site(2), site(3))).run()
    first = next(e for e in read_events(home, launch.id) if e["event"] == "round")
    assert [s["weight"] for s in first["sites"]] == [4.0, 8.0, 16.0]
    got = load_checkpoint(home.models / f"{launch.id}.stage1-0001").autoencoder
    for name, value in got.items():
        want = sum(made[name].astype(np.float64) * w for made, w in sent[:3]) / sum(w for _, w in sent[:3])
        assert np.allclose(value.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("others", [1, 2])
def test_an_update_that_is_far_longer_than_the_usual_is_refused(tmp_path, others):
    def long(arrays, weight):
        return answer({k: v + np.float32(0.3) if v.dtype.kind == "f" else v for k, v in arrays.items()}, weight)

    home, launch = coordinator(
        tmp_path / "s", sites=others + 1, quorum=1, stage1={"rounds": 1, "steps": 5}, stage2={"rounds": 1, "steps": 5}
    )
    Conductor(home, launch, Grid(*[honest] * others, long)).run()
    rounds = [e for e in read_events(home, launch.id) if e["event"] == "round"]
    assert [[bool(s["refused"]) for s in r["sites"]] for r in rounds] == [[False] * others + [True]] * 2
    assert "10 times" in rounds[0]["sites"][-1]["refused"]


def test_a_site_that_changes_nothing_does_not_condemn_the_others(tmp_path):
    home, launch = coordinator(tmp_path / "s")
    Conductor(home, launch, Grid(answer, honest, honest)).run()
    rounds = [e for e in read_events(home, launch.id) if e["event"] == "round"]
    assert not any(s["refused"] for r in rounds for s in r["sites"])


def test_a_round_that_falls_short_is_tried_twice_more_and_its_refusals_are_kept(tmp_path):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    tries = []

    def refuses_twice(arrays, weight):
        tries.append(1)
        return Error(5, PolicyError.public_text) if len(tries) <= 4 else honest(arrays, weight)

    Conductor(home, launch, Grid(honest, refuses_twice, refuses_twice)).run()
    events = read_events(home, launch.id)
    short = [e for e in events if e["event"] == "short"]
    assert len(short) == 2
    assert {s["site"]: s["refused"] for s in short[0]["sites"]} == {
        "site-0": "", "site-1": PolicyError.public_text, "site-2": PolicyError.public_text
    }  # fmt: skip
    assert [e["event"] for e in events].count("finished") == 1


def test_a_launch_gives_up_after_three_tries_by_name(tmp_path):
    home, launch = coordinator(tmp_path / "s")
    refuses = lambda a, w: Error(5, PolicyError.public_text)  # noqa: E731
    with pytest.raises(RoundError, match="1 usable replies from 3 sites"):
        Conductor(home, launch, Grid(honest, refuses, refuses)).run()
    status = launch_status(home, launch.id)
    assert status["state"] == "failed"
    assert len(status["short_rounds"]) == 3


def test_sites_that_are_missing_are_named(tmp_path):
    home, launch = coordinator(tmp_path / "s", gather_s=0.2)
    grid = Grid(honest, honest, honest)
    grid.online = {101, 102}
    with pytest.raises(RoundError, match="site-2"):
        Conductor(home, launch, grid).run()
    told = next(e for e in read_events(home, launch.id) if e["event"] == "gathering")
    assert told["missing"] == ["site-2"]


def test_two_conductors_do_not_lead_one_launch(tmp_path):
    home, launch = coordinator(tmp_path / "s")
    with leading(home, launch.id), pytest.raises(BusyError):
        Conductor(home, launch, Grid(honest, honest, honest)).run()
    assert read_events(home, launch.id) == []


def test_a_coordinator_that_ends_in_a_round_goes_on_with_the_replies_it_has(tmp_path):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})

    class Killed(BaseException):
        pass

    def dies(arrays, weight):
        raise Killed

    with pytest.raises(Killed):
        Conductor(home, launch, Grid(honest, honest, dies)).run()
    grid = Grid(honest, honest, honest)
    Conductor(home, launch, grid).run()
    assert grid.asked[:1] == [103]  # of the first round only the one that had not replied
    rounds = [(e["stage"], e["round"]) for e in read_events(home, launch.id) if e["event"] == "round"]
    assert rounds == [("stage1", 1), ("stage2", 1)]
    assert not list((home.run / "updates").rglob("*.safetensors"))


def contacts(monkeypatch, **sites):
    monkeypatch.setattr(module, "read_contacts", lambda home: {n.replace("_", "-"): c for n, c in sites.items()})


def now(**fields):
    return Contact(**({"at": time.time(), "pulled": time.time() + 1} | fields))


def test_a_site_that_lost_its_work_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.1)
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    calls = []

    def forgets(arrays, weight):
        calls.append(1)
        return honest(arrays, weight) if grid.asked.count(103) > 1 else None

    grid = Grid(honest, honest, forgets)
    rest, busy = now(activity={"activity": "waiting"}), now(activity={"activity": "training"})
    monkeypatch.setattr(module, "read_contacts", lambda home: {"site-0": busy, "site-1": busy, "site-2": live(rest)})
    Conductor(home, launch, grid).run()
    first = next(e for e in read_events(home, launch.id) if e["event"] == "round")
    assert [s["asks"] for s in first["sites"]] == [1, 1, 2]


def live(contact):
    contact.at = contact.pulled = time.time() + 1
    return contact


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_what_flower_lost_is_asked_for_again(tmp_path, code):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    grid = Grid(
        honest, honest, lambda a, w: Error(code, "Node Unavailable") if grid.asked.count(103) < 2 else honest(a, w)
    )
    Conductor(home, launch, grid).run()
    first = next(e for e in read_events(home, launch.id) if e["event"] == "round")
    assert [(s["asks"], s["refused"]) for s in first["sites"]] == [(1, ""), (1, ""), (2, "")]


def test_work_of_a_site_that_is_away_is_not_thrown_away(tmp_path, monkeypatch):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5}, stage2={"rounds": 1, "steps": 5})
    pulled, back = [], time.time() + 1

    def away(arrays, weight):
        pulled.append(time.time())
        return honest(arrays, weight)

    def heard(home):
        at = time.time() if time.time() > back else time.time() - 100
        return {"site-0": now(), "site-1": now(), "site-2": now(at=at, activity={"activity": "training"})}

    monkeypatch.setattr(module, "read_contacts", heard)
    Conductor(home, launch, Grid(honest, honest, away)).run()
    assert pulled[0] >= back
    assert not any(s["refused"] for e in read_events(home, launch.id) if e["event"] == "round" for s in e["sites"])


def test_who_is_late_after_a_quorum_has_twice_the_time_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_EXTRA_S", 0.3)
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5}, deadline_s=600)
    began = time.monotonic()
    Conductor(home, launch, Grid(honest, honest, lambda a, w: None)).run()
    assert time.monotonic() - began < 15
    first = next(e for e in read_events(home, launch.id) if e["event"] == "round")
    assert first["sites"][2]["refused"] == "The site did not answer in time."


def test_a_revoked_site_is_dropped_from_the_round(tmp_path):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    registry = Registry(home.registry)

    def revoked(arrays, weight):
        registry.revoke("site-2")
        return None

    with pytest.raises(RoundError, match="2 of 3 sites are online"):  # the next round misses it
        Conductor(home, launch, Grid(honest, honest, revoked)).run()
    first = next(e for e in read_events(home, launch.id) if e["event"] == "round")
    assert first["sites"][2]["refused"] == "The coordinator has sent the site away."


def test_a_full_disk_at_the_checkpoint_costs_a_try_and_no_half_checkpoint_counts(tmp_path, monkeypatch):
    home, launch = coordinator(tmp_path / "s", stage1={"rounds": 1, "steps": 5})
    from medlsdm_server import checkpointing

    real, fails = checkpointing.save_checkpoint, [ResourceError("No space.", "Make room.")]

    def full_once(folder, **kwargs):
        if fails:
            folder.mkdir(parents=True)
            (folder / "autoencoder.safetensors").write_bytes(b"half")
            raise fails.pop()
        return real(folder, **kwargs)

    monkeypatch.setattr(checkpointing, "save_checkpoint", full_once)
    Conductor(home, launch, Grid(honest, honest, honest)).run()
    events = read_events(home, launch.id)
    assert [e["event"] for e in events].count("again") == 1
    assert launch_status(home, launch.id)["state"] == "finished"


def test_old_checkpoints_go_and_those_that_matter_stay(tmp_path):
    home, launch = coordinator(
        tmp_path / "s", sites=1, stage1={"rounds": 6, "steps": 5}, stage2={"rounds": 7, "steps": 5}, keep=2
    )
    losses = iter([0.9, 0.2, 0.5, 0.6, 0.7, 0.8, 0.5, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9])
    Conductor(home, launch, Grid(lambda a, w: answer(a, w, loss=next(losses)))).run()
    kept = sorted(p.name.removeprefix(f"{launch.id}.") for p in home.models.iterdir())
    assert kept == ["stage1-0002", "stage1-0006", "stage2-0002", "stage2-0005", "stage2-0006", "stage2-0007"]
    shutil.rmtree(home.models / f"{launch.id}.stage2-0007")
    resumed = checkpoint_rounds(home, launch)
    assert resumed == (6, 6)


def checkpoint_rounds(home, launch):
    from medlsdm.federation.plan import Stage
    from medlsdm_server.checkpointing import Trained

    trained = Trained.resume(home.models, launch)
    return trained.rounds_done(Stage.STAGE1), trained.rounds_done(Stage.STAGE2)


def test_an_error_of_flower_with_our_number_is_told_from_ours(tmp_path):
    home, launch = coordinator(tmp_path / "s")
    conductor = Conductor(home, launch, Grid(honest, honest, honest))
    one = module.Asked("site-0", 101, messages=["m"], asks=1)
    conductor._failed(one, SimpleNamespace(error=Error(5, PolicyError.public_text)))
    assert (one.lost, one.refused) == (0.0, PolicyError.public_text)
    one = module.Asked("site-0", 101, messages=["m"], asks=1)
    conductor._failed(one, SimpleNamespace(error=Error(8, UNTOLD)))
    assert one.lost > 0
    assert one.refused == ""
    conductor._failed(one, SimpleNamespace(error=Error(9, BusyError.public_text)))
    assert one.refused == ""
