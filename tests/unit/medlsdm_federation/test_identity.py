from __future__ import annotations

import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import assume, given
from hypothesis import strategies as st

from medlsdm.errors import EnrolmentError
from medlsdm.federation.identity import (
    CLOCK_SKEW_S,
    SIGNATURE_HEADER,
    SITE_HEADER,
    SITE_NAME,
    TIME_HEADER,
    EnrolRequest,
    Invitation,
    fingerprint,
    public_hex,
    shown,
    sign_request,
    verify_request,
)

KEY = Ed25519PrivateKey.generate()
names = st.from_regex(SITE_NAME.replace("$", ""), fullmatch=True)
invitations = st.builds(
    Invitation,
    site=names,
    token=st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", min_size=20, max_size=80),
    ca=st.text("0123456789abcdef", min_size=64, max_size=64),
    expires=st.integers(0, 2**40),
)


@given(invitation=invitations, before=st.sampled_from(["", " ", "\n\t"]), after=st.sampled_from(["", "\n", "\r\n "]))
def test_an_invitation_comes_back_from_its_line(invitation, before, after):
    line = invitation.encode()
    assert "\n" not in line
    assert line.isascii()
    assert Invitation.decode(before + line + after) == invitation


@given(invitation=invitations, cut=st.integers(1, 10_000))
def test_a_cut_invitation_is_refused(invitation, cut):
    line = invitation.encode()
    with pytest.raises(EnrolmentError, match="cut short"):
        Invitation.decode(line[: -(1 + cut % len(line))].rstrip("="))


@given(text=st.text(max_size=200))
def test_any_other_text_is_refused(text):
    for garbled in (text, "medlsdm-invitation-1:" + text):
        with pytest.raises(EnrolmentError) as caught:
            Invitation.decode(garbled)
        assert "\n" not in str(caught.value)


def test_an_invitation_shows_no_token():
    invitation = Invitation.new("site-a", "0" * 64, 1)
    request = EnrolRequest(site="site-a", token=invitation.token, node_key="k", identity="0" * 64)
    assert invitation.token not in repr(invitation) + str(invitation) + repr(request) + str(request)
    assert invitation.token not in invitation.token_digest
    assert 3500 < invitation.expires - time.time() < 3601
    assert Invitation.new("site-a", "0" * 64, 1).token != invitation.token


@pytest.mark.parametrize("site", ["", "Site", "-a", "a b", "a" * 33, "a\n", "../a", "ä"])
def test_refuses_a_name_that_is_none(site):
    with pytest.raises(ValueError, match="site"):
        EnrolRequest(site=site, node_key="k", identity="0" * 64)


@given(site=names, body=st.binary(max_size=100), method=st.sampled_from(["GET", "post"]))
def test_a_signed_request_is_accepted(site, body, method):
    headers = sign_request(KEY, site, method, "/v1/x", body)
    verify_request(public_hex(KEY), headers, method, "/v1/x", body=body)


SIGNED = sign_request(KEY, "site-a", "POST", "/v1/enrol", b"body")
WHOLE = {"headers": SIGNED, "method": "POST", "path": "/v1/enrol", "body": b"body"}


@pytest.mark.parametrize(
    "changed",
    [
        {"body": b"bodY"},
        {"body": b""},
        {"path": "/v1/site"},
        {"path": "/v1/enrol/"},
        {"method": "GET"},
        {"headers": SIGNED | {SITE_HEADER: "site-b"}},
        {"headers": SIGNED | {TIME_HEADER: str(int(SIGNED[TIME_HEADER]) + 1)}},
        {"headers": SIGNED | {TIME_HEADER: "soon"}},
        {"headers": SIGNED | {SIGNATURE_HEADER: "00" * 64}},
        {"headers": SIGNED | {SIGNATURE_HEADER: "zz"}},
        {"headers": SIGNED | {SIGNATURE_HEADER: ""}},
        {"headers": {k: v for k, v in SIGNED.items() if k != SIGNATURE_HEADER}},
        {"headers": {}},
    ],
)
def test_whatever_is_changed_is_refused(changed):
    verify_request(public_hex(KEY), **WHOLE)
    with pytest.raises(EnrolmentError):
        verify_request(public_hex(KEY), **(WHOLE | changed))


def test_a_foreign_key_is_refused():
    with pytest.raises(EnrolmentError):
        verify_request(public_hex(Ed25519PrivateKey.generate()), **WHOLE)


@pytest.mark.parametrize("identity", ["", "zz", "00", "00" * 33])
def test_an_identity_that_is_no_key_is_refused(identity):
    with pytest.raises(EnrolmentError):
        verify_request(identity, **WHOLE)


@pytest.mark.parametrize("later", [CLOCK_SKEW_S + 1, -CLOCK_SKEW_S - 1, 86_400])
def test_a_replay_after_five_minutes_is_refused(later):
    moment = int(SIGNED[TIME_HEADER])
    verify_request(public_hex(KEY), **WHOLE, now=moment + CLOCK_SKEW_S)
    with pytest.raises(EnrolmentError, match="clock"):
        verify_request(public_hex(KEY), **WHOLE, now=moment + later)


@given(
    first=st.tuples(names, st.text(max_size=8), st.binary(max_size=8)),
    other=st.tuples(names, st.text(max_size=8), st.binary(max_size=8)),
)
def test_a_signature_fits_one_request_only(first, other):
    assume(first != other)
    headers = sign_request(KEY, first[0], "GET", "/" + first[1], first[2])
    with pytest.raises(EnrolmentError):
        verify_request(public_hex(KEY), headers | {SITE_HEADER: other[0]}, "GET", "/" + other[1], body=other[2])


def test_a_fingerprint_is_shown_in_groups(tmp_path):
    from medlsdm_server.authority import create_certificates
    from medlsdm_server.home import ServerHome, ServerSettings

    homes = [ServerHome(tmp_path / name) for name in ("one", "two")]
    for home in homes:
        home.create(ServerSettings(hosts=("localhost",)))
        create_certificates(home, home.settings())
    first, second = (fingerprint(home.ca_cert.read_bytes()) for home in homes)
    assert first != second
    assert shown(first).replace(" ", "") == first
    assert len(shown(first).split()) == 16
    with pytest.raises(ValueError, match="PEM"):
        fingerprint(b"nothing")
