"""The way back: sites and certificates by command line, and what each change means to the registry."""

from __future__ import annotations

import json
import os
import ssl
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from medlsdm.errors import ConfigError, EnrolmentError
from medlsdm.federation.identity import EnrolRequest, Invitation
from medlsdm_server import authority
from medlsdm_server import registry as registry_module
from medlsdm_server.authority import (
    certificate_states,
    check_certificates,
    issue_site_certificate,
    renew_server_certificate,
    site_of_certificate,
)
from medlsdm_server.cli import app
from medlsdm_server.registry import Registry


def node_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def asking(site="site-a", token="", **fields) -> EnrolRequest:
    return EnrolRequest.model_validate(
        {"site": site, "token": token, "node_key": node_key(), "identity": os.urandom(32).hex()} | fields
    )


@pytest.fixture
def run(home):
    def call(*arguments: str):
        done = CliRunner().invoke(app, [*arguments, "--home", str(home.root)], catch_exceptions=True)
        return json.loads(done.stdout) if "--json" in arguments and done.exit_code == 0 else done

    return call


@pytest.fixture
def sites(home):
    return Registry(home.registry)


def test_the_life_of_a_site(run, sites, tmp_path):
    first = asking()
    sites.enrol(first)
    assert [(r["site"], r["status"]) for r in run("sites", "list", "--json")] == [("site-a", "pending")]
    run("sites", "admit", "site-a")
    version = sites.version()
    assert run("sites", "revoke", "site-a", "--reason", "left", "--json") == {"site": "site-a", "status": "revoked"}
    assert sites.version() > version
    for again in (first, asking()):
        with pytest.raises(EnrolmentError):
            sites.enrol(again)
    run("sites", "re-invite", "site-a", "--out", str(tmp_path / "ticket"))
    token = Invitation.decode((tmp_path / "ticket").read_text()).token
    assert (tmp_path / "ticket").stat().st_mode & 0o777 == 0o600
    second = asking(token=token)
    assert sites.enrol(second).status == "admitted"
    assert sites.site("site-a").identity == second.identity
    with pytest.raises(EnrolmentError):
        sites.enrol(asking(token=token))
    run("sites", "remove", "site-a")
    assert run("sites", "list", "--json") == []
    assert sites.enrol(asking()).status == "pending"
    run("sites", "deny", "site-a")
    assert sites.sites() == []


@pytest.mark.parametrize("command", ["admit", "deny", "revoke", "remove"])
def test_a_site_that_is_not_there_is_said(run, command):
    done = run("sites", command, "nobody")
    assert "nobody" in str(done.exception)
    assert "sites list" in str(done.exception)


def test_five_of_one_address_wait_and_for_a_day(sites, monkeypatch):
    for n in range(5):
        sites.enrol(asking(f"x{n}"), "10.0.0.1")
    with pytest.raises(EnrolmentError, match="Too many"):
        sites.enrol(asking("x5"), "10.0.0.1")
    sites.enrol(asking("y"), "10.0.0.2")
    later = time.time() + 86_500
    monkeypatch.setattr(registry_module.time, "time", lambda: later)
    assert sites.sites() == []
    assert sites.enrol(asking("x0"), "10.0.0.1").status == "pending"


def test_enrolling_again_brings_the_pledge_up_to_date(sites):
    request = asking()
    sites.enrol(request)
    sites.admit("site-a")
    pledged = request.model_copy(update={"pledge": "a" * 128})
    assert sites.enrol(pledged).pledge == "a" * 128


def test_a_registry_of_before_is_read(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "old.db") as old:
        old.executescript(
            "CREATE TABLE invitations (digest TEXT PRIMARY KEY, site TEXT NOT NULL, expires INTEGER NOT NULL,"
            " used INTEGER NOT NULL DEFAULT 0);"
            "CREATE TABLE sites (name TEXT PRIMARY KEY, status TEXT NOT NULL, node_key TEXT NOT NULL UNIQUE,"
            " identity TEXT NOT NULL, node_id TEXT NOT NULL DEFAULT '', enrolled INTEGER NOT NULL,"
            " seen INTEGER NOT NULL DEFAULT 0);"
            "INSERT INTO sites VALUES ('site-a', 'admitted', 'k', 'i', '7', 1, 2);"
        )
    old.close()
    assert [(s.name, s.pledge) for s in Registry(tmp_path / "old.db").sites()] == [("site-a", "")]


def expire(home, monkeypatch, days):
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(authority, "datetime", Then)


@pytest.mark.parametrize(("days", "word"), [(0, ""), (370, "in 27 days"), (398, "expired")])
def test_a_certificate_is_warned_about_and_refused_by_name(home, monkeypatch, days, word):
    expire(home, monkeypatch, days)
    if word == "expired":
        with pytest.raises(ConfigError, match=r"server certificate expired on .* certificate renew"):
            check_certificates(home)
    else:
        assert word in check_certificates(home)
        assert bool(check_certificates(home)) == bool(word)


def test_a_renewed_certificate_is_of_the_same_ca_and_of_another_key(home, run):
    before, ca = home.server_cert.read_bytes(), home.ca_cert.read_bytes()
    row = run("certificate", "renew", "--host", "new.example.org", "--json")
    assert row["hosts"] == ["new.example.org", "localhost", "127.0.0.1"]
    assert home.ca_cert.read_bytes() == ca
    old, new = (x509.load_pem_x509_certificate(c) for c in (before, home.server_cert.read_bytes()))
    new.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    assert old.public_key() != new.public_key()
    assert home.server_key.stat().st_mode & 0o777 == 0o600
    assert home.server_cert.with_name("server.crt.old").read_bytes() == before
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(home.server_cert, home.server_key)
    assert run("certificate", "show", "--json")[0]["days_left"] > 390


def der(pem: str) -> bytes:
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)


def test_a_site_s_certificate_proves_the_site_and_nothing_else(home):
    key = node_key()
    pem = issue_site_certificate(home, "site-a", key)
    assert site_of_certificate(der(pem)) == ("site-a", key)
    made = x509.load_pem_x509_certificate(pem.encode())
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(home.ca_cert.read_bytes()))
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.not_valid_after_utc > datetime.now(UTC) + timedelta(days=390)
    for other in (der(home.server_cert.read_text()), der(home.ca_cert.read_text()), b"", b"\x30\x00", os.urandom(300)):
        with pytest.raises(EnrolmentError):
            site_of_certificate(other)


def test_state_and_renewal_name_the_hosts(home):
    assert certificate_states(home)[0].hosts == ("localhost", "127.0.0.1")
    assert renew_server_certificate(home).hosts == ("localhost", "127.0.0.1")
