"""The hospital's folder: settings, keys, vault, audit log, models, logs."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medlsdm.chain import HashChain
from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError, ConfigError, IntegrityError
from medlsdm.federation.identity import SITE_NAME
from medlsdm.types import LabelSchema

HOME_VARIABLE = "MEDLSDM_NODE_HOME"
_RULES = {"policy.yaml", "deid.yaml", "receive.yaml"}  # a hospital may lay them there before the node is made


class NodeSettings(BaseModel):
    """Name the site, its project, its label schema, and the CPU threads that training may use (0: all)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    site: str = Field(pattern=SITE_NAME)
    project: str = Field(default="default", max_length=64)
    labels: dict[str, Any]
    threads: int = Field(default=0, ge=0)

    @property
    def label_schema(self) -> LabelSchema:
        """Return the label schema that this site works under."""
        return LabelSchema.from_json(self.labels)


class NodeHome:
    """Name every path of the node's folder and open its keys. ``root`` is private to the service user."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.settings_file = self.root / "node.json"
        self.policy_file = self.root / "policy.yaml"
        self.keys = self.root / "keys"
        self.node_key, self.node_public = self.keys / "node.key", self.keys / "node.pub"
        self.vault = self.root / "vault"
        self.models = self.root / "models"
        self.server_file, self.ca_cert = self.root / "server.json", self.root / "ca.crt"
        self.tls_file = self.keys / "site.pem"  # the certificate that the coordinator gave us, with its key
        self.flwr = self.root / "flower"
        self.logs = self.root / "logs"
        self.run = self.root / "run"
        self.losses = self.root / "losses.jsonl"

    @classmethod
    def default(cls, given: Path | None) -> Self:
        """Use the path given, else ``MEDLSDM_NODE_HOME``, else ``~/.medlsdm/node``."""
        return cls(given or Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".medlsdm/node"))

    def create(self, settings: NodeSettings) -> None:
        """Make the folder, its keys and its policy file; go on where making it was interrupted.

        Raises:
            ConfigError: There is a node already, or the folder holds something else; it is as it was.
        """
        if self.settings_file.exists():
            raise ConfigError(f"There is a node in {self.root} already.", "Use it, or give another --home.")
        if not self._is_free():
            raise ConfigError(
                f"{self.root} holds other files and is no node.", "Give a new or empty folder as --home (or empty it)."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for folder in (self.keys, self.vault, self.models, self.flwr, self.logs, self.run):
            folder.mkdir(exist_ok=True)
        if not (self.keys / "master.key").exists():
            self._create_keys()
        if not self.policy_file.exists():
            from medlsdm_node.policy import DEFAULT_POLICY

            write_atomic(self.policy_file, DEFAULT_POLICY.encode(), mode=0o600)
        from medlsdm_node.deid_settings import write_default

        write_default(self)
        write_atomic(self.settings_file, settings.model_dump_json(indent=2).encode(), mode=0o600)
        self.audit.append("created", site=settings.site, labels=settings.label_schema.digest)

    def _is_free(self) -> bool:
        """Tell whether a node may be made here: nothing is here but its rules, or what an interrupted init left."""
        if (self.keys / "master.key").exists() or not self.root.is_dir():
            return self.root.is_dir() or not self.root.exists()
        own = {self.node_key, self.node_public, self.keys / "identity.key"}
        empty = {self.keys, self.vault, self.models, self.flwr, self.logs, self.run}
        rules = {self.root / name for name in _RULES}
        here = [path for folder in (self.root, self.keys) if folder.is_dir() for path in folder.iterdir()]
        return all(
            path in own | rules
            or path.name == "lost+found"  # of a new disk
            or path.name.startswith(".writing-")
            or (path in empty and path.is_dir() and (path == self.keys or not any(path.iterdir())))
            for path in here
        )

    def _create_keys(self) -> None:
        identity, node = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
        openssh = node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        raw = identity.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        write_atomic(self.node_key, openssh, mode=0o600)
        write_atomic(self.node_public, public, mode=0o600)
        write_atomic(self.keys / "identity.key", raw, mode=0o600)
        write_atomic(self.keys / "master.key", secrets.token_bytes(32), mode=0o600)

    @cached_property
    def settings(self) -> NodeSettings:
        """Read the settings, or say that ``init`` comes first."""
        if not self.settings_file.exists():
            raise ConfigError(f"There is no node in {self.root}.", "Run 'medlsdm-node init' first.")
        try:
            return NodeSettings.model_validate_json(self.settings_file.read_bytes())
        except ValidationError as error:
            raise IntegrityError("node.json cannot be read.", "Restore it or run init in a new folder.") from error

    @property
    def identity(self) -> Ed25519PrivateKey:
        """Return the key that signs this site's requests and receipts."""
        return Ed25519PrivateKey.from_private_bytes(self._key("identity.key"))

    def derive(self, purpose: str) -> bytes:
        """Return a 32-byte key for one purpose, derived from the master key by HKDF-SHA256."""
        return HKDF(hashes.SHA256(), 32, None, f"medlsdm-node/{purpose}".encode()).derive(self.master_key)

    @property
    def master_key(self) -> bytes:
        """Return the key that all others are derived from."""
        return self._key("master.key")

    def node_public_key(self) -> str:
        """Return the public half of the key that Flower's SuperNode authenticates with, in OpenSSH form."""
        try:
            public = load_ssh_private_key(self._stored(self.node_key.name), None).public_key()
        except ValueError as error:
            raise _damaged(self.node_key.name) from error
        return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def node_private_pem(self) -> bytes:
        """Return the same key's private half as PEM, as TLS wants it beside the site's certificate."""
        key = load_ssh_private_key(self._stored(self.node_key.name), None)
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _key(self, name: str) -> bytes:
        content = self._stored(name)
        if len(content) != 32:
            raise _damaged(name)
        return content

    def _stored(self, name: str) -> bytes:
        path = self.keys / name
        if not path.is_file():
            raise IntegrityError(f"The key {name} is missing.", "Restore keys/ from its backup; the vault needs it.")
        return path.read_bytes()

    @property
    def audit(self) -> HashChain:
        """Return the audit log: what was done here, never an old value; signed with this site's identity."""
        return HashChain(self.root / "audit.jsonl", self.identity)

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold a lock for ``what`` (``join``, ``ingest``, ...), so that two processes do not do it at once."""
        self.run.mkdir(parents=True, exist_ok=True)
        with (self.run / f"{what}.lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BusyError(f"'{what}' is running in this node already.", "Wait for it, or stop it.") from error
            yield


def _damaged(name: str) -> IntegrityError:
    return IntegrityError(f"The key {name} is damaged.", "Restore keys/ from its backup; the vault needs it.")
