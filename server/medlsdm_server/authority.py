"""The coordinator's own certificate authority: one CA, one server certificate, ECDSA P-256."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medlsdm.checks import write_atomic
from medlsdm_server.home import ServerHome, ServerSettings

CA_DAYS, SERVER_DAYS = 3650, 397


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().issuer_name(issuer).subject_name(subject)
    return builder.public_key(key.public_key()).serial_number(x509.random_serial_number())


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def create_certificates(home: ServerHome, settings: ServerSettings) -> None:
    """Make the CA and a server certificate for the hosts, and for loopback, where the SuperLink listens."""
    now = datetime.now(UTC) - timedelta(minutes=5)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = _name(f"{settings.name} coordinator CA")
    ca = (
        _builder(ca_name, ca_name, ca_key)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True,
        )
        .sign(ca_key, hashes.SHA256())
    )
    hosts = dict.fromkeys([*settings.hosts, "localhost", "127.0.0.1"])
    server = (
        _builder(ca_name, _name(settings.hosts[0]), server_key)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=SERVER_DAYS))
        .add_extension(x509.SubjectAlternativeName([_subject_name(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_atomic(home.ca_key, _private_pem(ca_key), mode=0o600)
    write_atomic(home.server_key, _private_pem(server_key), mode=0o600)
    write_atomic(home.ca_cert, ca.public_bytes(Encoding.PEM))
    write_atomic(home.server_cert, server.public_bytes(Encoding.PEM))
