from __future__ import annotations

import json

import pytest

from medlsdm.errors import ConfigError
from medlsdm.federation.plan import RoundPlan, RoundReply, Stage

PLAN = {
    "version": 1,
    "model": "20260101-000000-ab",
    "stage": "stage2",
    "round": 2,
    "rounds": 3,
    "steps": 10,
    "first_step": 10,
    "total_steps": 30,
    "preset": {"name": "tiny"},
    "labels": {"name": "x", "classes": []},
    "autoencoder": "20260101-000000-ab.stage1-0003",
    "sites": 3,
    "seed": 0,
    "privacy": "none",
}
REPLY = {"version": 1, "weight": 4.0, "loss": None, "training_seconds": 1.5}


def test_a_plan_comes_back_as_it_was():
    plan = RoundPlan.from_json(json.dumps(PLAN))
    assert plan.stage is Stage.STAGE2
    assert json.loads(plan.to_json()) == PLAN | {"schedule": {}, "roster": [], "proximal_mu": 0.0}
    assert RoundPlan.from_json(plan.to_json()) == plan
    assert json.loads(RoundReply.from_json(json.dumps(REPLY)).to_json()) == REPLY


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"extra": 1},
        {"stage": "stage3"},
        {"privacy": "dp"},
        {"steps": 0},
        {"steps": 10**9},
        {"round": 0},
        {"sites": 0},
        {"model": "../x"},
        {"model": "A"},
        {"autoencoder": "../../etc"},
        {"autoencoder": "x/../../y.stage1-0001"},
        {"autoencoder": "x.stage1-0001\n"},
        {"autoencoder": ".stage1-0001"},
        {"preset": "tiny"},
        {"first_step": -1},
    ],
)
def test_a_plan_of_another_form_is_refused(changed):
    with pytest.raises(ConfigError) as caught:
        RoundPlan.from_json(json.dumps(PLAN | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [{"version": 0}, {"patients": 5}, {"weight": 0}, {"weight": "x"}, {"loss": "x"}])
def test_a_reply_of_another_form_is_refused(changed):
    with pytest.raises(ConfigError):
        RoundReply.from_json(json.dumps(REPLY | changed))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", "\x00"])
def test_no_json_is_refused(text):
    with pytest.raises(ConfigError):
        RoundPlan.from_json(text)
