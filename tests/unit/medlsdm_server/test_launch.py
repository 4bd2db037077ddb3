from __future__ import annotations

import json
import os
import threading

import pytest
import yaml

from medlsdm.config import config_folder
from medlsdm.errors import BusyError, ConfigError
from medlsdm_server.launch import is_led, leading, load_plan, new_launch, note, read_events, read_launch
from medlsdm_server.status import launch_status, server_status

PLAN = {"stage1": {"rounds": 1, "steps": 2}, "stage2": {"rounds": 3, "steps": 4}}


@pytest.mark.parametrize("name", sorted(p.stem for p in (config_folder() / "federation").glob("*.yaml")))
def test_the_plans_that_come_along_can_be_read(name):
    assert load_plan(name).stage1.rounds >= 1


def test_a_launch_comes_back_as_it_was_written(home):
    launch = new_launch(home, load_plan("default"))
    assert read_launch(home, launch.id) == launch
    assert launch.model_dump(exclude={"id"}) == load_plan("default").model_dump()
    assert new_launch(home, load_plan("default")).id != launch.id


@pytest.mark.parametrize(
    "content",
    [
        b"", b"- 1", b"stage1: 3", b"\xff\xfe", b"a: [", yaml.safe_dump(PLAN | {"more": 1}).encode(),
        yaml.safe_dump(PLAN | {"sites": 0}).encode(), yaml.safe_dump(PLAN | {"modalities": ["US"]}).encode(),
        yaml.safe_dump({"stage1": PLAN["stage1"]}).encode(),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_read_is_refused(tmp_path, content):
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_plan(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "../federation/nothing"])
def test_a_plan_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="no federation plan"):
        load_plan(name)


@pytest.mark.parametrize("identity", ["", "nothing", "../server"])
def test_a_launch_that_is_not_there_is_refused(home, identity):
    with pytest.raises(ConfigError, match="no launch"):
        read_launch(home, identity)


def test_the_diary_tells_how_far_a_launch_is(home):
    identity = new_launch(home, load_plan("default")).id
    write_running(home)
    seen = []
    steps = [
        ("launched", {}),
        ("started", {}),
        ("asked", {"stage": "stage1", "round": 1, "rounds": 3}),
        ("round", {"stage": "stage1", "round": 1, "rounds": 3, "sites": []}),
        ("gathering", {"stage": "stage1", "round": 2, "rounds": 3, "missing": ["site-a"]}),
        ("failed", {"message": "one line"}),
        ("resumed", {}),
        ("started", {}),
        ("round", {"stage": "stage1", "round": 1, "rounds": 3, "sites": []}),
        ("finished", {}),
    ]
    for event, fields in steps:
        note(home, identity, event, **fields)
        with leading(home, identity):
            seen.append(launch_status(home, identity)["state"])
    wanted = ["running"] * 4 + ["waiting for sites", "failed"] + ["waiting for sites"] * 2 + ["running", "finished"]
    assert seen == wanted
    status = server_status(home)["launch"]
    assert (status["id"], status["stage"], status["round"], status["rounds"]) == (identity, "stage1", 1, 3)
    assert len(status["finished_rounds"]) == 2


def write_running(home):
    (home.run / "address.json").write_text(json.dumps({"port": 1, "pid": os.getpid()}))


def test_nobody_who_leads_means_that_a_launch_does_not_run(home):
    identity = new_launch(home, load_plan("default")).id
    for event in ("launched", "started"):
        note(home, identity, event)
    assert launch_status(home, identity)["state"] == "interrupted"  # no coordinator
    write_running(home)
    assert launch_status(home, identity)["state"] == "pending"
    with leading(home, identity):
        assert launch_status(home, identity)["state"] == "running"
        with pytest.raises(BusyError), leading(home, identity):
            raise AssertionError("two lead")
    assert not is_led(home, identity)


def test_a_torn_line_costs_itself_alone(home):
    identity = new_launch(home, load_plan("default")).id
    note(home, identity, "started")
    with (home.launches / f"{identity}.diary.jsonl").open("a") as stream:
        stream.write('{"event": "fini')
    note(home, identity, "finished")
    assert [e["event"] for e in read_events(home, identity)] == ["started", "finished"]


def test_a_line_that_is_being_written_is_left_out(home):
    identity = new_launch(home, load_plan("default")).id
    note(home, identity, "started")
    with (home.launches / f"{identity}.diary.jsonl").open("a") as stream:
        stream.write('{"event": "fini')
    assert [e["event"] for e in read_events(home, identity)] == ["started"]


def test_of_several_launches_the_newest_is_shown(home):
    first, second = (new_launch(home, load_plan("default")).id for _ in range(2))
    os.utime(home.launches / f"{first}.spec.json", (1, 1))
    assert server_status(home)["launch"]["id"] == second


def test_who_only_looks_does_not_keep_a_leader_out(home):
    identity = new_launch(home, load_plan("default")).id
    with leading(home, identity):
        pass
    ended = threading.Event()

    def look():
        while not ended.is_set():
            is_led(home, identity)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(200):
            with leading(home, identity):
                pass
    finally:
        ended.set()
        for thread in lookers:
            thread.join()
