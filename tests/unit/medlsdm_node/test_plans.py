"""What a hospital agrees to: plans by digest, hospitals by their own signed words, hours, bounds, its own seed."""

from __future__ import annotations

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medlsdm.errors import ConfigError, IntegrityError, PolicyError, UsageError
from medlsdm.federation.identity import RosterEntry, fingerprint, node_digest, public_hex, sign_pledge
from medlsdm_node.plans import check_approved, check_roster, decide, find, plans
from medlsdm_node.policy import DEFAULT_POLICY, SitePolicy, load_policy
from medlsdm_node.rounds import _seed
from medlsdm_server.authority import create_certificates
from medlsdm_server.home import ServerHome, ServerSettings

from .test_policy import SCHEMA, plan

SCHEDULE = {"stage1": (2, 10), "stage2": (3, 20)}


@pytest.fixture
def joined(home, tmp_path):
    """Pin a real CA, as a node that has joined has it."""
    server = ServerHome(tmp_path / "server")
    server.create(ServerSettings(hosts=("localhost",)))
    create_certificates(server, server.settings())
    home.ca_cert.write_bytes(server.ca_cert.read_bytes())
    return home


def entry(home, site, key=None, **changed):
    key = key or Ed25519PrivateKey.generate()
    ca, node = fingerprint(home.ca_cert.read_bytes()), f"ecdsa-sha2-nistp384 {site}"
    fields = {
        "site": site, "identity": public_hex(key), "node_digest": node_digest(node),
        "pledge": sign_pledge(key, ca, site, node),
    } | changed  # fmt: skip
    return RosterEntry.model_validate(fields)


def roster(home, *others):
    return [entry(home, "site-a", home.identity), *others]


def test_two_rounds_of_one_launch_are_one_plan_and_any_other_setting_is_another():
    first = plan(schedule=SCHEDULE)
    same = plan(schedule=SCHEDULE, stage="stage2", round=2, rounds=3, steps=20, first_step=20, model="other")
    assert first.digest == same.digest
    others = [
        plan(schedule=SCHEDULE | {"stage2": (3, 21)}),
        plan(schedule=SCHEDULE, sites=4), plan(schedule=SCHEDULE, seed=1),
        plan(schedule=SCHEDULE, preset=first.preset | {"name": "x"}), plan(schedule=SCHEDULE, labels={}),
    ]  # fmt: skip
    assert len({first.digest, *(p.digest for p in others)}) == 6
    assert "2 rounds of 10 steps" in first.summary
    assert "procedural" in first.summary


def test_a_round_that_is_not_the_one_of_its_plan_is_refused():
    with pytest.raises(PolicyError, match="not the one"):
        SitePolicy().check_plan(plan(schedule={"stage1": (2, 11)}), SCHEMA)


def test_a_plan_needs_approval_where_the_policy_says_so(home):
    asked, policy = plan(schedule=SCHEDULE), SitePolicy(plans="approved")
    check_approved(home, asked, SitePolicy())
    with pytest.raises(PolicyError, match=asked.digest[:12]):
        check_approved(home, asked, policy)
    assert [row["approved"] for row in plans(home)] == [False]
    assert decide(home, asked.digest[:8], approved=True)["approved"]
    check_approved(home, asked, policy)
    with pytest.raises(PolicyError):
        check_approved(home, plan(schedule=SCHEDULE, sites=4), policy)
    decide(home, asked.digest, approved=False)
    with pytest.raises(PolicyError):
        check_approved(home, asked, policy)
    events = [r["event"] for r in home.audit.records()]
    assert [e for e in events if e.startswith("plan")] == ["plan-seen", "plan-approved", "plan-seen", "plan-withdrawn"]


@pytest.mark.parametrize("start", ["", "abc", "zzzzzzzz"])
def test_a_digest_that_names_no_single_plan_is_refused(home, start):
    check_approved(home, plan(), SitePolicy())
    with pytest.raises(UsageError):
        find(home, start)


def test_a_damaged_list_of_plans_is_said(home):
    (home.root / "plans.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"plans\.json"):
        plans(home)


def test_a_roster_counts_hospitals_by_their_signed_words(joined):
    policy = SitePolicy(min_sites=3)
    others = [entry(joined, "site-b"), entry(joined, "site-c")]
    check_roster(joined, plan(roster=roster(joined, *others)), policy)
    assert set(json.loads((joined.root / "roster.json").read_text())) == {"site-a", "site-b", "site-c"}
    for wrong in (
        [], roster(joined, others[0]), others,
        roster(joined, others[0], others[0]),  # one twice
        roster(joined, others[0], entry(joined, "site-d", pledge="0" * 128)),
        roster(joined, others[0], entry(joined, "site-d", identity="0" * 64)),
        roster(joined, others[0], entry(joined, "site-d", node_digest="0" * 64)),
    ):  # fmt: skip
        with pytest.raises(PolicyError):
            check_roster(joined, plan(roster=wrong), policy)


def test_a_hospital_s_key_is_pinned_when_first_seen(joined):
    policy = SitePolicy(min_sites=2)
    check_roster(joined, plan(roster=roster(joined, entry(joined, "site-b"))), policy)
    with pytest.raises(PolicyError, match="key of site-b"):
        check_roster(joined, plan(roster=roster(joined, entry(joined, "site-b"))), policy)


def test_only_hospitals_that_the_policy_names_count(joined):
    key = Ed25519PrivateKey.generate()
    known = {
        "site-a": public_hex(joined.identity),
        "site-b": " ".join(public_hex(key)[i : i + 4] for i in range(0, 64, 4)),
    }
    policy = SitePolicy(min_sites=2, known_sites=known)
    check_roster(joined, plan(roster=roster(joined, entry(joined, "site-b", key))), policy)
    with pytest.raises(PolicyError, match="at least 2"):
        check_roster(joined, plan(roster=roster(joined, entry(joined, "site-c"), entry(joined, "site-d"))), policy)


def test_words_for_another_federation_do_not_count(joined, tmp_path):
    other = ServerHome(tmp_path / "other")
    other.create(ServerSettings(hosts=("localhost",)))
    create_certificates(other, other.settings())
    given = roster(joined, entry(joined, "site-b"))
    joined.ca_cert.write_bytes(other.ca_cert.read_bytes())
    with pytest.raises(PolicyError, match="not signed"):
        check_roster(joined, plan(roster=given), SitePolicy(min_sites=2))


@pytest.mark.parametrize(
    ("hours", "moment", "open_"),
    [
        ("always", "12:00", True), (["20:00-06:00"], "23:59", True), (["20:00-06:00"], "05:59", True),
        (["20:00-06:00"], "06:00", False), (["20:00-06:00"], "12:00", False),
        (["08:00-09:00", "12:00-13:00"], "12:30", True),
        (["08:00-09:00"], "09:00", False), (["08:00-09:00"], "08:00", True),
    ],
)  # fmt: skip
def test_rounds_begin_only_in_their_hours(hours, moment, open_):
    policy, now = SitePolicy.model_validate({"hours": hours}), time.strptime(moment, "%H:%M")
    if open_:
        policy.check_hours(now)
    else:
        with pytest.raises(PolicyError, match="hours"):
            policy.check_hours(now)


@pytest.mark.parametrize("hours", ["[]", "[25:00-26:00]", "night", "[20:00]", "['20:00-06:0']"])
def test_hours_that_cannot_be_read_refuse_everything(tmp_path, hours):
    path = tmp_path / "policy.yaml"
    path.write_text(DEFAULT_POLICY.replace("hours: always", f"hours: {hours}"))
    with pytest.raises(ConfigError, match="hours"):
        load_policy(path)


@pytest.mark.parametrize(
    ("rule", "asked", "word"),
    [
        ({"max_rounds": 1}, {}, "max_rounds"),
        ({"max_batch": 3}, {"preset": {"stage1": {"batch": 4}}}, "max_batch"),
    ],
)
def test_bounds_on_rounds_and_batch(rule, asked, word):
    with pytest.raises(PolicyError, match=word):
        SitePolicy.model_validate(rule).check_plan(plan(**asked), SCHEMA)
    SitePolicy().check_plan(plan(**asked), SCHEMA)


def test_the_site_draws_its_own_seed_unless_it_leaves_it_to_the_coordinator(home, tmp_path):
    from .conftest import new_home

    first, again, later = (_seed(home, plan(seed=7, round=r), SitePolicy()) for r in (1, 1, 2))
    assert first == again != later
    assert _seed(new_home(tmp_path / "other"), plan(seed=7), SitePolicy()) != first
    assert _seed(home, plan(seed=7), SitePolicy(seed="coordinator")) == 7


def test_a_policy_of_before_keeps_its_meaning(tmp_path):
    old = "\n".join(line for line in DEFAULT_POLICY.splitlines() if line.split(":")[0] not in (
        "plans", "hours", "max_rounds", "max_batch", "seed", "niceness", "known_sites"
    ))  # fmt: skip
    (tmp_path / "policy.yaml").write_text(old)
    assert load_policy(tmp_path / "policy.yaml") == SitePolicy()


def test_the_proximal_term_pulls_training_back_to_the_weights_that_were_sent():
    import torch

    from medlsdm_node.rounds import _pull_back

    def trained(mu):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        start = model.weight.detach().clone()
        _pull_back(model, mu)
        x, y = torch.randn(8, 3), torch.randn(8, 2)
        for _ in range(60):
            model.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad
        return float((model.weight.detach() - start).norm()), model, start, x, y

    assert trained(10.0)[0] < 0.2 * trained(0.0)[0]
    _, model, start, x, y = trained(1.0)  # the hook's gradient is that of the term written out
    model.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    hooked = model.weight.grad.clone()
    plain = torch.nn.functional.linear(x, weight := model.weight.detach().clone().requires_grad_(), model.bias.detach())
    (torch.nn.functional.mse_loss(plain, y) + 0.5 * ((weight - start) ** 2).sum()).backward()
    assert torch.allclose(hooked, weight.grad, atol=1e-6)
