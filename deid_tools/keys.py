"""The secrets behind pseudonyms: keys for one site and one project, derived from one master key."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medlsdm.errors import ConfigError

KEY_BYTES = 32
ID_DIGITS = 12


@dataclass(frozen=True, slots=True, repr=False)
class SiteKeys:
    """Hold the keys for UIDs, pseudonyms and dates, 32 bytes each; ``repr`` shows nothing.

    Guarantee: without the keys, nobody can test whether a guessed UID, patient ID or date is behind
        what was written (HMAC-SHA256), and nothing that the keys made links two projects; equal pixels do.
    """

    uid: bytes
    pseudonym: bytes
    date: bytes

    def __post_init__(self) -> None:
        if any(len(key) != KEY_BYTES for key in (self.uid, self.pseudonym, self.date)):
            raise ConfigError("A site key does not have 32 bytes.", "Derive the keys from one master key.")

    def __repr__(self) -> str:
        return "SiteKeys(secret)"

    @property
    def id(self) -> str:
        """Return 12 hex digits that name these keys and tell nothing about them: which key made an output."""
        return hmac.new(self.pseudonym, b"medlsdm-deid/1/key-id", hashlib.sha256).hexdigest()[:ID_DIGITS]

    @classmethod
    def derive(cls, master: bytes, project: str) -> Self:
        """Derive the keys from one master key by HKDF-SHA256, bound to the project's name.

        Raises:
            ConfigError: The master key is shorter than 32 bytes or the project has no name.
        """
        if len(master) < KEY_BYTES or not project:
            raise ConfigError(
                "The master key is too short or the project has no name.", "Use 32 random bytes and a project name."
            )

        def expand(purpose: str) -> bytes:
            info = f"medlsdm-deid/1/{purpose}/{project}".encode()
            return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(master)

        return cls(expand("uid"), expand("pseudonym"), expand("date"))
