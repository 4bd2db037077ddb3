"""Launches are led one at a time, started again when they are let go of, and given up after a while."""

from __future__ import annotations

import json
import os
import threading
from contextlib import ExitStack

import pytest

from medlsdm_server import launcher as module
from medlsdm_server.launch import leading, load_plan, new_launch, note, read_events
from medlsdm_server.launcher import Launcher, state


@pytest.fixture
def flower(monkeypatch, home):
    """Stand in for Flower's command line alone: it lists, starts and stops runs; who leads is the real lock."""
    runs: dict[str, str] = {}
    started: list[str] = []

    def flwr(_home, command, *arguments):
        if command == "list":
            wanted = arguments[arguments.index("--run-id") + 1] if "--run-id" in arguments else None
            return {"runs": [{"run-id": i, "status": s} for i, s in runs.items() if wanted in (None, i)]}
        if command == "stop":
            runs[arguments[0]] = "finished:stopped"
            return {}
        started.append(arguments[-1].removeprefix('launch="').rstrip('"'))
        runs[str(len(started))] = "running"
        return {"run-id": str(len(started))}

    monkeypatch.setattr(module, "flwr", flwr)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)
    (home.run / "address.json").write_text(json.dumps({"port": 1, "pid": os.getpid()}))
    return runs, started


def asked(home):
    identity = new_launch(home, load_plan("default")).id
    note(home, identity, "launched")
    return identity


def test_launches_are_led_one_after_the_other(home, flower):
    runs, started = flower
    first, second = asked(home), asked(home)
    leader = Launcher(home)
    leader.look()
    assert started == [first]
    with leading(home, first):
        for _ in range(3):
            leader.look()
        assert started == [first]
        note(home, first, "finished")
    leader.look()
    assert started == [first, second]
    assert runs["1"] == "finished:stopped"


def test_a_launch_that_is_let_go_of_is_started_again_and_the_old_run_is_stopped(home, flower):
    runs, started = flower
    identity = asked(home)
    leader = Launcher(home)
    leader.look()
    with leading(home, identity):
        leader.look()
    leader.look()  # sees that nobody leads
    assert [e["event"] for e in read_events(home, identity)][-1] == "lost"
    leader.look()
    assert started == [identity, identity]
    assert (runs["1"], runs["2"]) == ("finished:stopped", "running")


def test_a_run_that_ends_before_anybody_led_is_started_again(home, flower):
    runs, started = flower
    identity = asked(home)
    leader = Launcher(home)
    leader.look()
    runs["1"] = "finished:failed"
    leader.look()
    leader.look()
    assert started == [identity] * 2


def test_a_launch_that_never_gets_anywhere_fails_with_a_sentence(home, flower):
    runs, started = flower
    identity = asked(home)
    leader = Launcher(home)
    for _ in range(4 * module.MOST_STARTS):
        leader.look()
        runs |= dict.fromkeys(runs, "finished:failed")
    assert len(started) == module.MOST_STARTS
    assert state(home, identity) == "failed"


def test_a_round_between_two_ends_counts_as_getting_somewhere(home, flower):
    runs, started = flower
    identity = asked(home)
    leader = Launcher(home)
    for number in range(3 * module.MOST_STARTS):
        leader.look()
        note(home, identity, "round", stage="stage1", round=number, rounds=99, sites=[])
        runs |= dict.fromkeys(runs, "finished:failed")
        leader.look()
    assert state(home, identity) == "launched"
    assert len(started) > module.MOST_STARTS


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_coordinator_goes_on_unless_told_not_to(home, flower, resume):
    _, started = flower
    identity = asked(home)
    stop, leader = threading.Event(), Launcher(home, resume=resume)
    leader._leave_or_resume()
    leader.look()
    stop.set()
    assert started == ([identity] if resume else [])
    assert state(home, identity) == ("launched" if resume else "interrupted")
    note(home, identity, "resumed")
    leader.look()
    assert started == [identity]


def test_a_stopped_launch_is_left_and_its_run_ended(home, flower):
    runs, started = flower
    identity = asked(home)
    leader = Launcher(home)
    leader.look()
    with ExitStack() as held:
        held.enter_context(leading(home, identity))
        leader.look()
        note(home, identity, "stopped")
        leader.look()
    leader.look()
    assert runs["1"] == "finished:stopped"
    assert started == [identity]
