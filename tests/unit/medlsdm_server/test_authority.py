from __future__ import annotations

import os
import stat

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from medlsdm.errors import ConfigError
from medlsdm_server.authority import create_certificates
from medlsdm_server.home import ServerHome, ServerSettings


def verify(ca: bytes, server: bytes, host: str) -> None:
    store = Store([x509.load_pem_x509_certificate(ca)])
    name = x509.IPAddress(__import__("ipaddress").ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
    PolicyBuilder().store(store).build_server_verifier(name).verify(x509.load_pem_x509_certificate(server), [])


def test_the_server_is_who_its_ca_says(home, tmp_path):
    other = ServerHome(tmp_path / "other")
    other.create(ServerSettings(hosts=("coordinator.example", "192.0.2.7")))
    create_certificates(other, other.settings())
    for host in ("coordinator.example", "192.0.2.7", "localhost", "127.0.0.1"):
        verify(other.ca_cert.read_bytes(), other.server_cert.read_bytes(), host)
    with pytest.raises(VerificationError):
        verify(home.ca_cert.read_bytes(), other.server_cert.read_bytes(), "coordinator.example")
    with pytest.raises(VerificationError):
        verify(other.ca_cert.read_bytes(), other.server_cert.read_bytes(), "elsewhere.example")


def test_private_keys_are_for_the_owner_only(tmp_path):
    home, before = ServerHome(tmp_path / "coordinator"), os.umask(0)
    try:
        home.create(ServerSettings(hosts=("localhost",)))
        create_certificates(home, home.settings())
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in (home.root / "keys").iterdir()} == {"0o600"}
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700


def test_a_second_init_is_refused(home):
    with pytest.raises(ConfigError, match="already"):
        home.create(ServerSettings(hosts=("localhost",)))
