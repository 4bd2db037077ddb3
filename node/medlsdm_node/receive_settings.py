"""Who may send to this node, and how much: ``receive.yaml``, which only the hospital writes."""

from __future__ import annotations

import ssl
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from medlsdm.checks import write_atomic
from medlsdm.errors import ConfigError
from medlsdm_node.home import NodeHome

DEFAULT_RECEIVE = """\
# How a PACS pushes studies to this node (C-STORE). Nothing listens until 'calling' and 'addresses' name somebody.
# The path of a FILE is relative to the folder of this file.
ae_title: MEDLSDM             # our AE title; a sender that calls another one is refused
host: 127.0.0.1               # the address to listen on, such as that of the hospital's network card
port: 11112
calling: []                   # AE titles that may send, such as [PACS1, CT3]
addresses: []                 # addresses or networks that may connect, such as [10.1.2.3, 10.1.4.0/24]
tls: null                     # or {certificate: FILE, key: FILE, client_ca: FILE}; the CA of senders is optional
max_associations: 8           # at the same time
max_pdu_bytes: 262144
max_instance_bytes: 4294967296        # 4 GiB: the pipeline reads no larger file
max_association_bytes: 68719476736    # 64 GiB over one association, then 0xA700
min_free_bytes: 10737418240           # with less free on the disk every instance is answered 0xA700
quiet_seconds: 60             # a study is complete when nothing came for so long
idle_seconds: 60              # an association that says nothing for so long is ended
keep_hours: 24                # originals of a study that was taken in wait so long, sealed, for late instances
web: null                     # DICOMweb (STOW-RS), for sites without C-STORE; see docs/node.md. For example:
#  host: 127.0.0.1            # other than loopback needs 'tls'
#  port: 8043
#  addresses: [10.1.2.3]      # nothing listens without one
#  token_file: FILE           # a bearer token that senders show (chmod 600); or demand a certificate by client_ca
#  tls: {certificate: FILE, key: FILE, client_ca: FILE}
"""
MIN_TOKEN_CHARACTERS = 16
_CHECK_FILE = "Check that the file is there and right; a relative path starts at the node's folder."


def _from_node(path: Path, info: ValidationInfo) -> Path:
    return (info.context or {}).get("folder", Path()) / path


SitePath = Annotated[Path, AfterValidator(_from_node)]  # relative to the node's folder, where that is known


class Tls(BaseModel):
    """Name the certificate that we show, its key, and the CA that a sender's certificate must come from, if any."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    certificate: SitePath
    key: SitePath
    client_ca: SitePath | None = None

    def context(self, section: str = "tls") -> ssl.SSLContext:
        """Return a server's context, TLS 1.2 or newer; ``section`` is the name of this part of receive.yaml.

        Raises:
            ConfigError: A file is missing, does not read, or others may read the key.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        used = section
        try:
            for name in ("certificate", "key", "client_ca"):
                used, path = f"{section}.{name}", getattr(self, name)
                if path is not None:
                    path.open("rb").close()
            if self.key.stat().st_mode & 0o077:
                raise ConfigError(f"Others may read the file of {section}.key of receive.yaml.", "chmod 600 it.")
            used = f"{section}.certificate and {section}.key"
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                used = f"{section}.client_ca"
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"What {used} of receive.yaml names cannot be used.", _CHECK_FILE) from error
        return context


Addresses = tuple[IPv4Network | IPv6Network, ...]


class WebSettings(BaseModel):
    """Hold the rules of the DICOMweb door; its limits on an instance, the disk and silence are those of receive.yaml.

    ``max_request_bytes`` and ``max_parts`` bound one request, ``max_uploads`` how many are read at the same time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    host: str = "127.0.0.1"
    port: int = Field(default=8043, ge=0, le=65535)
    addresses: Addresses = ()
    tls: Tls | None = None
    token_file: SitePath | None = None
    max_uploads: int = Field(default=4, ge=1, le=32)
    max_request_bytes: int = Field(default=16 << 30, ge=1)
    max_parts: int = Field(default=20_000, ge=1, le=100_000)

    def check(self) -> None:
        """Refuse a door that is open to anybody, or on which a token could be overheard.

        Raises:
            ConfigError: It names no address, neither a token nor a CA of senders, or lacks TLS where it needs it.
        """
        if not self.addresses:
            raise ConfigError("The web section of receive.yaml allows nobody to send.", "Name 'addresses' in it.")
        if self.token_file is None and (self.tls is None or self.tls.client_ca is None):
            raise ConfigError(
                "The web section of receive.yaml asks nobody who they are.", "Give it a token_file or tls.client_ca."
            )
        if self.tls is None and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigError("DICOMweb needs TLS but on loopback.", "Give the web section of receive.yaml 'tls'.")

    def token(self) -> bytes | None:
        """Return the bearer token that senders must show, or None where a certificate is asked for instead.

        Raises:
            ConfigError: The file does not read, others may read it, or its token is short or not plain ASCII.
        """
        if self.token_file is None:
            return None
        try:
            if self.token_file.stat().st_mode & 0o077:
                raise ConfigError("Others may read the file of web.token_file of receive.yaml.", "chmod 600 it.")
            token = self.token_file.read_bytes().strip()
        except OSError as error:
            raise ConfigError("The file of web.token_file of receive.yaml cannot be read.", _CHECK_FILE) from error
        if len(token) < MIN_TOKEN_CHARACTERS or not all(0x21 <= character <= 0x7E for character in token):
            raise ConfigError(
                f"web.token_file of receive.yaml holds no token of {MIN_TOKEN_CHARACTERS} characters or more.",
                "Write one line: openssl rand -hex 32.",
            )
        return token


class ReceiveSettings(BaseModel):
    """Hold the rules; see DEFAULT_RECEIVE for what each one means."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ae_title: str = Field(default="MEDLSDM", pattern=r"^[A-Za-z0-9_.-]{1,16}$")
    host: str = "127.0.0.1"
    port: int = Field(default=11112, ge=0, le=65535)
    calling: tuple[str, ...] = ()
    addresses: Addresses = ()
    tls: Tls | None = None
    max_associations: int = Field(default=8, ge=1, le=100)
    max_pdu_bytes: int = Field(default=1 << 18, ge=1 << 12, le=1 << 24)
    max_instance_bytes: int = Field(default=4 << 30, ge=1)
    max_association_bytes: int = Field(default=64 << 30, ge=1)
    min_free_bytes: int = Field(default=10 << 30, ge=0)
    quiet_seconds: float = Field(default=60, gt=0)
    idle_seconds: float = Field(default=60, gt=0)
    keep_hours: float = Field(default=24, ge=0)
    web: WebSettings | None = None

    def allows(self, address: str) -> bool:
        """Tell whether an address may connect to the C-STORE port."""
        return allows(self.addresses, address)


def allows(addresses: Addresses, address: str) -> bool:
    """Tell whether an address is of these networks; an IPv4 address may come mapped into IPv6."""
    found = ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return any(found in network for network in addresses)


def load_receive(home: NodeHome) -> ReceiveSettings:
    """Read ``receive.yaml``; make it where there is none, and refuse while it allows nobody.

    Raises:
        ConfigError: It does not read, or names no sender.
    """
    settings = read_receive(home)
    if settings.web is not None:
        settings.web.check()
    if bool(settings.calling) != bool(settings.addresses) or not (settings.calling or settings.web):
        path = home.root / "receive.yaml"
        raise ConfigError("receive.yaml allows nobody to send.", f"Name 'calling' and 'addresses' in {path}.")
    return settings


def read_receive(home: NodeHome) -> ReceiveSettings:
    """Read ``receive.yaml``, whoever it allows; make it where there is none.

    Raises:
        ConfigError: It does not read.
    """
    path = home.root / "receive.yaml"
    if not path.exists():
        write_atomic(path, DEFAULT_RECEIVE.encode(), mode=0o600)
    try:
        rules = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return ReceiveSettings.model_validate(rules, context={"folder": home.root})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("receive.yaml cannot be read (it is not YAML).", "Correct it.") from error
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(f"receive.yaml cannot be read ({where}).", "Correct it.") from error
