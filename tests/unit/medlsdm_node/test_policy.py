from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlsdm.config import load_preset, load_schema
from medlsdm.errors import ConfigError, MedlsdmError, PolicyError, SchemaError
from medlsdm.federation.plan import RoundPlan, Stage
from medlsdm_node.policy import DEFAULT_POLICY, SitePolicy, load_policy

SCHEMA = load_schema("procedural")


def plan(**changes) -> RoundPlan:
    fields = {
        "model": "m",
        "stage": "stage1",
        "round": 1,
        "rounds": 2,
        "steps": 10,
        "first_step": 0,
        "total_steps": 20,
        "preset": load_preset("tiny").model_dump(mode="json"),
        "labels": SCHEMA.to_json(),
        "sites": 3,
    }
    return RoundPlan.model_validate(fields | changes)


def test_the_default_file_says_what_the_code_does(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(DEFAULT_POLICY)
    assert load_policy(path) == SitePolicy()
    SitePolicy().check_plan(plan(), SCHEMA)


@pytest.mark.parametrize(
    ("rule", "asked", "word"),
    [
        ({"stages": ["stage1"]}, {"stage": "stage2"}, "stages"),
        ({"max_steps_per_round": 9}, {"steps": 10}, "max_steps_per_round"),
        ({"min_sites": 4}, {"sites": 3}, "min_sites"),
        ({}, {"sites": 1}, "min_sites"),
    ],
)
def test_each_rule_refuses_and_says_which_it_is(rule, asked, word):
    with pytest.raises(PolicyError, match=word) as caught:
        SitePolicy.model_validate(rule).check_plan(plan(**asked), SCHEMA)
    assert caught.value.public_text == "the site's policy refused the request"


@pytest.mark.parametrize(("rule", "asked"), [({"max_steps_per_round": 10}, {}), ({"min_sites": 3}, {})])
def test_the_limit_itself_is_allowed(rule, asked):
    SitePolicy.model_validate(rule).check_plan(plan(**asked), SCHEMA)


def test_refuses_another_label_schema():
    with pytest.raises(SchemaError):
        SitePolicy().check_plan(plan(labels=load_schema("hippocampus").to_json()), SCHEMA)


def test_refuses_too_few_patients():
    policy = SitePolicy(min_patients=5)
    policy.check_patients(5)
    with pytest.raises(PolicyError, match="min_patients"):
        policy.check_patients(4)


@given(patients=st.integers(1, 5000))
def test_the_declared_weight_never_tells_the_number(patients):
    policy = SitePolicy()
    weight = policy.declared_weight(patients)
    same = [n for n in range(max(policy.min_patients, 1), 10_001) if policy.declared_weight(n) == weight]
    assert len(same) >= 4
    assert patients in same or patients < policy.min_patients
    assert policy.declared_weight(patients + 1) >= weight
    assert SitePolicy(weight="equal").declared_weight(patients) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        b"", b"# only a comment\n", b"stages: [stage1", b"- a\n- b\n", b"no rules\n", b"max_steps: 3\n",
        b"min_sites: many\n", b"stages: [stage3]\n", b"max_epsilon: -1\n", b"share_loss: \xff\xfe\n", b"\x00\x01",
        b"min_patients: 0\n",
    ],
)  # fmt: skip
def test_a_damaged_file_refuses_everything(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"policy\.yaml") as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_refuses_everything(tmp_path):
    with pytest.raises(MedlsdmError, match="missing"):
        load_policy(tmp_path / "policy.yaml")


def test_stages_have_a_name_each():
    assert SitePolicy().stages == tuple(Stage)


@pytest.mark.parametrize("kept", range(1, len(DEFAULT_POLICY.splitlines())))
def test_a_file_cut_at_any_line_end_is_refused(tmp_path, kept):
    path = tmp_path / "policy.yaml"
    path.write_text("\n".join(DEFAULT_POLICY.splitlines()[:kept]) + "\n")
    with pytest.raises(ConfigError):
        load_policy(path)
