from __future__ import annotations

import sqlite3
import stat
import time

import pytest

from medlsdm.errors import EnrolmentError, UsageError
from medlsdm.federation.identity import EnrolRequest, Invitation
from medlsdm_server.registry import ADMITTED, MOST_PENDING, PENDING, Registry


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry.db")


def invited(registry, site="site-a", hours=1.0) -> Invitation:
    invitation = Invitation.new(site, "0" * 64, hours)
    registry.invite(invitation)
    return invitation


def asking(site="site-a", token="", key="key-1", identity="1" * 64) -> EnrolRequest:
    return EnrolRequest(site=site, token=token, node_key=key, identity=identity)


def test_a_token_admits_once(registry):
    token = invited(registry).token
    assert registry.enrol(asking(token=token)).status == ADMITTED
    with pytest.raises(EnrolmentError, match="other keys"):
        registry.enrol(asking(token=token, key="key-2"))
    with pytest.raises(EnrolmentError, match="used up"):
        registry.enrol(asking("site-b", token, "key-2"))


def test_asking_again_changes_nothing(registry):
    request = asking(token=invited(registry).token)
    first = registry.enrol(request)
    registry.set_node_id("site-a", "77")
    assert registry.enrol(request).node_id == "77"
    assert registry.enrol(asking()) == registry.site("site-a")
    assert [s.enrolled for s in registry.sites()] == [first.enrolled]


def test_an_expired_token_is_refused(registry):
    invitation = Invitation.new("site-a", "0" * 64, -0.001)
    registry.invite(invitation)
    assert invitation.expires <= time.time()
    with pytest.raises(EnrolmentError, match="expired"):
        registry.enrol(asking(token=invitation.token))
    assert registry.sites() == []


@pytest.mark.parametrize("token", ["x", "x" * 43])
def test_an_unknown_token_is_refused(registry, token):
    invited(registry)
    with pytest.raises(EnrolmentError):
        registry.enrol(asking(token=token))
    assert registry.sites() == []


def test_a_token_for_another_site_is_refused_and_stays_good(registry):
    token = invited(registry, "site-a").token
    with pytest.raises(EnrolmentError):
        registry.enrol(asking("site-b", token))
    assert registry.enrol(asking("site-a", token)).status == ADMITTED


def test_a_name_with_other_keys_is_refused(registry):
    registry.enrol(asking(token=invited(registry).token))
    for other in (asking(key="key-2"), asking(identity="2" * 64)):
        with pytest.raises(EnrolmentError, match="other keys"):
            registry.enrol(other)


def test_a_key_of_another_site_is_refused(registry):
    registry.enrol(asking())
    with pytest.raises(EnrolmentError, match="this key"):
        registry.enrol(asking("site-b"))
    token = invited(registry, "site-b").token
    with pytest.raises(EnrolmentError, match="this key"):
        registry.enrol(asking("site-b", token))
    assert registry.enrol(asking("site-b", token, "key-2")).status == ADMITTED, "what failed used nothing up"


def test_without_a_token_a_site_waits_until_it_is_admitted(registry):
    assert registry.enrol(asking()).status == PENDING
    registry.admit("site-a")
    assert registry.enrol(asking()).status == ADMITTED
    with pytest.raises(UsageError, match="site-b"):
        registry.admit("site-b")


def test_a_waiting_site_that_got_an_invitation_is_admitted(registry):
    registry.enrol(asking())
    token = invited(registry).token
    assert registry.enrol(asking(token=token)).status == ADMITTED
    assert len(registry.sites()) == 1


def test_nobody_can_keep_a_name_from_who_is_invited(registry):
    registry.enrol(asking(key="squatter", identity="2" * 64))
    token = invited(registry).token
    site = registry.enrol(asking(token=token))
    assert (site.status, site.node_key) == (ADMITTED, "key-1")
    with pytest.raises(EnrolmentError):
        registry.enrol(asking(key="squatter", identity="2" * 64))


def test_no_more_than_so_many_may_wait(registry):
    for number in range(MOST_PENDING):
        registry.enrol(asking(f"site-{number}", key=f"key-{number}"))
    with pytest.raises(EnrolmentError, match="Too many"):
        registry.enrol(asking("one-more", key="one-more"))
    token = invited(registry, "invited").token
    assert registry.enrol(asking("invited", token, "invited")).status == ADMITTED


def test_an_admitted_site_is_not_invited_again(registry):
    registry.enrol(asking(token=invited(registry).token))
    with pytest.raises(UsageError, match="already"):
        invited(registry)


def test_no_token_is_stored(registry):
    token = invited(registry).token
    registry.enrol(asking(token=token))
    assert token.encode() not in registry.path.read_bytes()
    assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600
    with sqlite3.connect(registry.path) as database:
        assert database.execute("SELECT used FROM invitations").fetchall() == [(1,)]
    database.close()


def test_a_site_is_seen(registry):
    registry.enrol(asking())
    assert registry.site("site-a").seen == 0
    registry.touch("site-a")
    assert abs(registry.site("site-a").seen - time.time()) < 5
    assert registry.site("site-b") is None
