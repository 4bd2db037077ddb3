"""The coordinator's own certificate authority: one CA, one server certificate (ECDSA P-256), one for each site."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medlsdm.checks import write_atomic
from medlsdm.errors import ConfigError, EnrolmentError, IntegrityError
from medlsdm_server.home import ServerHome, ServerSettings

CA_DAYS, SERVER_DAYS, SITE_DAYS, WARNING_DAYS = 3650, 397, 397, 30
SITE_URI = "medlsdm:site:"


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
    server = _server_certificate(ca_name, ca_key, server_key, settings.hosts, now)
    write_atomic(home.ca_key, _private_pem(ca_key), mode=0o600)
    write_atomic(home.server_key, _private_pem(server_key), mode=0o600)
    write_atomic(home.ca_cert, ca.public_bytes(Encoding.PEM))
    write_atomic(home.server_cert, server.public_bytes(Encoding.PEM))


def _server_certificate(
    issuer: x509.Name, ca_key: ec.EllipticCurvePrivateKey, key: ec.EllipticCurvePrivateKey, hosts: Iterable[str],
    now: datetime,
) -> x509.Certificate:  # fmt: skip
    named = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    return (
        _builder(issuer, _name(named[0]), key)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=SERVER_DAYS))
        .add_extension(x509.SubjectAlternativeName([_subject_name(h) for h in named]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


@dataclass(frozen=True, slots=True)
class CertificateState:
    """Say until when a certificate is good and for which hosts."""

    what: str
    until: datetime
    hosts: tuple[str, ...]

    @property
    def days_left(self) -> float:
        """Return the days until it expires; negative afterwards."""
        return (self.until - datetime.now(UTC)).total_seconds() / 86_400


def certificate_states(home: ServerHome) -> tuple[CertificateState, CertificateState]:
    """Return the states of the server's certificate and of the CA's."""
    try:
        server, ca = (x509.load_pem_x509_certificate(p.read_bytes()) for p in (home.server_cert, home.ca_cert))
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise IntegrityError(
            "A certificate of the coordinator cannot be read.", "Restore it from its backup."
        ) from error
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return (
        CertificateState("server certificate", server.not_valid_after_utc, tuple(hosts)),
        CertificateState("CA certificate", ca.not_valid_after_utc, ()),
    )


def check_certificates(home: ServerHome) -> str:
    """Return a warning when a certificate will expire within a month, else ''.

    Raises:
        ConfigError: One has expired.
    """
    for state in certificate_states(home):
        renew = "Run 'medlsdm-server certificate renew'." if state.hosts else "Make a new coordinator and invite anew."
        if state.days_left <= 0:
            raise ConfigError(f"The {state.what} expired on {state.until:%Y-%m-%d}.", renew)
        if state.days_left < WARNING_DAYS:
            return f"The {state.what} expires on {state.until:%Y-%m-%d}, in {state.days_left:.0f} days. {renew}"
    return ""


def renew_server_certificate(home: ServerHome, hosts: Iterable[str] = ()) -> CertificateState:
    """Make a new key and certificate of the server from the same CA; the old pair stays beside as ``.old``.

    A running coordinator takes it up by itself; nodes follow, for they pin the CA.
    """
    settings = home.settings()
    ca_key, ca = _ca(home)
    key = ec.generate_private_key(ec.SECP256R1())
    chosen = tuple(hosts) or settings.hosts
    made = _server_certificate(ca.subject, ca_key, key, chosen, datetime.now(UTC) - timedelta(minutes=5))
    for path in (home.server_key, home.server_cert):
        if path.exists():
            old = path.with_name(path.name + ".old")
            old.unlink(missing_ok=True)
            os.link(path, old)
    write_atomic(home.server_key, _private_pem(key), mode=0o600)
    write_atomic(home.server_cert, made.public_bytes(Encoding.PEM))
    if chosen != settings.hosts:
        write_atomic(
            home.settings_file, settings.model_copy(update={"hosts": chosen}).model_dump_json(indent=2).encode()
        )
    return certificate_states(home)[0]


def _ca(home: ServerHome) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = load_pem_private_key(home.ca_key.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(home.ca_cert.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError("The CA's key or certificate cannot be read.", "Restore keys/ from its backup.") from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, certificate


def issue_site_certificate(home: ServerHome, site: str, node_key: str) -> str:
    """Return a client certificate (PEM) for a site's own P-384 key (OpenSSH form): it proves the site in TLS."""
    ca_key, ca = _ca(home)
    public = load_ssh_public_key(node_key.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    now = datetime.now(UTC) - timedelta(hours=1)  # a node's clock may be behind
    made = (
        x509.CertificateBuilder()
        .issuer_name(ca.subject)
        .subject_name(_name(site))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=SITE_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SITE_URI + site)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


def site_of_certificate(der: bytes) -> tuple[str, str]:
    """Return the site and the key (OpenSSH form) of a certificate that TLS has found to be of our CA.

    Raises:
        EnrolmentError: It is none of a site.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        key = certificate.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except (ValueError, TypeError, x509.ExtensionNotFound) as error:
        raise EnrolmentError("The certificate is none of a site.", "Start the node again.") from error
    if list(uses) != [ExtendedKeyUsageOID.CLIENT_AUTH] or len(uris) != 1 or not uris[0].startswith(SITE_URI):
        raise EnrolmentError("The certificate is none of a site.", "Start the node again.")
    return uris[0].removeprefix(SITE_URI), key
