"""The signed list of what left a node: anyone with the public key can tell whether a folder is intact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from medlsdm.checks import file_digest
from medlsdm.errors import IntegrityError

RECEIPT_NAME = "receipt.json"


def canonical_json(value: Any) -> bytes:
    """Return the one JSON form that is signed: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


class ExportReceipt(BaseModel):
    """List what left, when, from where, and what the gate said; signed with the site's Ed25519 key.

    Attributes:
        id: Random.
        time: UTC, to the second, ISO 8601.
        public_key: The site's raw Ed25519 key, hex.
        files: SHA-256 by name relative to the folder, with ``/``; every file but the receipt.
        checkpoint_digests: The checkpoints that the volumes were made with.
        gate: What the gate may say in public.
        audit_head: Head of the node's audit log before this export.
        signature: Ed25519 over the canonical JSON of all other fields, hex.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    id: str
    time: str
    site: str
    public_key: str = ""
    files: dict[str, str]
    card_digest: str
    checkpoint_digests: tuple[str, ...]
    gate: dict[str, Any]
    audit_head: str
    signature: str = ""

    @property
    def signed_bytes(self) -> bytes:
        """Return what the signature covers."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def sign(self, key: Ed25519PrivateKey) -> Self:
        """Return the receipt with the key's public half and its signature."""
        named = self.model_copy(update={"public_key": key.public_key().public_bytes_raw().hex(), "signature": ""})
        return named.model_copy(update={"signature": key.sign(named.signed_bytes).hex()})

    def to_bytes(self) -> bytes:
        """Return the receipt's file: readable JSON. The signature covers the values, not the layout."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n"


def files_below(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by relative name with ``/``, the receipt left out.

    Raises:
        IntegrityError: Something is neither a plain file nor a folder.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise IntegrityError("The export holds a link or a special file.", "Ask the site for a fresh copy.")
        if path.is_file() and path != folder / RECEIPT_NAME:
            found[path.relative_to(folder).as_posix()] = path
    return found


def verify_receipt(folder: Path, public_key: bytes | None = None) -> ExportReceipt:
    """Return an export's receipt if everything in the folder is as it was signed.

    Args:
        folder: The export.
        public_key: The site's raw 32-byte Ed25519 key, known from elsewhere. None trusts the key in the
            receipt: that shows damage, but not who signed.

    Raises:
        IntegrityError: A file is changed, missing or extra, the receipt was changed, or the key is foreign.
    """
    try:
        receipt = ExportReceipt.model_validate_json((folder / RECEIPT_NAME).read_bytes())
        key = bytes.fromhex(receipt.public_key)
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(receipt.signature), receipt.signed_bytes)
    except OSError as error:
        raise IntegrityError("The export has no receipt.", "Ask the site for a fresh copy.") from error
    except (InvalidSignature, ValidationError, ValueError) as error:
        raise IntegrityError(
            "The receipt was changed after it was signed.", "Ask the site for a fresh copy."
        ) from error
    if public_key is not None and key != public_key:
        raise IntegrityError("The receipt was signed with another key than the site's.", "Ask the site which is right.")
    found = files_below(folder)
    for problem, names in (
        ("is missing", sorted(receipt.files.keys() - found.keys())),
        ("is not on the receipt", sorted(found.keys() - receipt.files.keys())),
        ("was changed", [n for n in sorted(found) if file_digest(found[n]) != receipt.files.get(n)]),
    ):
        if names:
            raise IntegrityError(f"{names[0]!r} {problem}.", "Ask the site for a fresh copy.")
    return receipt
