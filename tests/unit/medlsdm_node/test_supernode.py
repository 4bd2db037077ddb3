"""A program that was killed in a round is noticed, buried or not."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from medlsdm_node import supernode as module
from medlsdm_node.status import write_activity
from medlsdm_node.supernode import AppWatch


@pytest.fixture
def watch(home, monkeypatch):
    monkeypatch.setattr(module, "LOST_SECONDS", 0.2)
    write_activity(home, "training", round=1)
    return AppWatch(home)


def lost_soon(watch, *, busy=True, since=0.0):
    first = watch.lost(busy=busy, since=since)
    time.sleep(0.3)
    return (first, watch.lost(busy=busy, since=since))


@pytest.mark.parametrize("buried", [True, False])
def test_a_killed_program_leaves_a_message_that_nobody_will_answer(watch, home, buried):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        (home.run / "app.pid").write_text(str(process.pid))
        assert lost_soon(watch) == (False, False)
        process.kill()
        if buried:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lost_soon(watch) == (False, True)


@pytest.mark.parametrize("activity", ["sending", "refused"])
def test_a_program_that_has_answered_may_go(watch, home, activity):
    (home.run / "app.pid").write_text("999999999")
    write_activity(home, activity)
    assert lost_soon(watch) == (False, False)


def test_the_program_of_an_earlier_message_says_nothing_of_this_one(watch, home):
    (home.run / "app.pid").write_text("999999999")
    assert lost_soon(watch) == (False, True)
    watch.ended = 0.0
    assert lost_soon(watch, since=time.time() + 1) == (False, False)


def test_without_a_message_nothing_is_lost(watch, home):
    assert lost_soon(watch) == (False, False)
    (home.run / "app.pid").write_text("999999999")
    assert lost_soon(watch, busy=False) == (False, False)
    watch.forget()
    assert not (home.run / "app.pid").exists()
