"""The vault: scans with their label maps, cached latents and waiting synthetic volumes, encrypted at rest.

Each record is one file, AES-256-GCM under a key of its kind, bound to site, kind and name, so that a
record cannot be moved, renamed or passed off as another kind: a scan never opens as a synthetic volume.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medlsdm.checks import write_atomic
from medlsdm.errors import DataError, IntegrityError, NotSyntheticError
from medlsdm.types import Geometry, LabelSchema, Modality, Scan, SemanticMap, SyntheticVolume
from medlsdm_node.home import NodeHome

MAGIC = b"MLV1"
NONCE_BYTES = 12
PAIR, LATENTS, SYNTHETIC, MAP, HELD = "pair", "latents", "synthetic", "map", "held"
EVIDENCE, EVIDENCE_PICTURES = "evidence", "evidence-pictures"
_NAME = re.compile(r"^[A-Za-z0-9._-]{1,120}$")


class Vault:
    """Open the vault of a node."""

    def __init__(self, home: NodeHome) -> None:
        self.home = home
        self.site = home.settings.site
        self.schema = home.settings.label_schema

    def put(self, kind: str, name: str, content: bytes) -> None:
        """Encrypt and store one record, replacing one of the same name."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = AESGCM(self.home.derive(f"vault/{kind}")).encrypt(nonce, content, self._bound(kind, name))
        write_atomic(self._path(kind, name), MAGIC + nonce + sealed, mode=0o600)

    def get(self, kind: str, name: str) -> bytes:
        """Return one record.

        Raises:
            DataError: There is none of this name.
            IntegrityError: It was changed, or moved from elsewhere.
        """
        path = self._path(kind, name)
        if not path.exists():
            raise DataError(f"The vault holds no {kind} called {name}.", "See 'medlsdm-node status'.")
        content = path.read_bytes()
        nonce, sealed = content[len(MAGIC) : len(MAGIC) + NONCE_BYTES], content[len(MAGIC) + NONCE_BYTES :]
        try:
            if not content.startswith(MAGIC):
                raise InvalidTag
            return AESGCM(self.home.derive(f"vault/{kind}")).decrypt(nonce, sealed, self._bound(kind, name))
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(
                f"The vault's {kind} {name} was changed or damaged.", "Restore it, or delete it and ingest again."
            ) from error

    def names(self, kind: str) -> list[str]:
        """Return the names of one kind, sorted."""
        folder = self.home.vault / kind
        return sorted(p.name.removesuffix(".sealed") for p in folder.glob("*.sealed")) if folder.is_dir() else []

    def delete(self, kind: str, name: str) -> None:
        """Remove one record."""
        self._path(kind, name).unlink(missing_ok=True)

    def _path(self, kind: str, name: str) -> Any:
        if not _NAME.fullmatch(name):
            raise DataError("A record's name may hold letters, digits, dots and dashes only.")
        return self.home.vault / kind / f"{name}.sealed"

    def _bound(self, kind: str, name: str) -> bytes:
        return json.dumps(["medlsdm-vault-1", self.site, kind, name]).encode()

    def put_pair(self, name: str, scan: Scan, labels: SemanticMap) -> None:
        """Store a scan with the label map on its grid."""
        from safetensors.numpy import save

        if not scan.geometry.matches(labels.geometry):
            raise DataError("A label map lies on another grid than its scan.", "Nothing was stored.")
        facts = {
            "subject": scan.subject,
            "modality": str(scan.modality),
            "affine": json.dumps(scan.geometry.affine.tolist()),
            "schema": labels.schema.digest,
        }
        arrays = {"scan": np.ascontiguousarray(scan.array), "labels": np.ascontiguousarray(labels.array)}
        self.put(PAIR, name, save(arrays, metadata=facts))

    def pairs(self) -> Iterator[tuple[Scan, SemanticMap]]:
        """Yield every pair, one at a time."""
        for name in self.names(PAIR):
            arrays, facts = _read(self.get(PAIR, name))
            if facts["schema"] != self.schema.digest:
                raise IntegrityError("A pair was stored under another label schema.", "Ingest it again.")
            geometry = Geometry(np.array(json.loads(facts["affine"])), arrays["scan"].shape)
            scan = Scan(arrays["scan"], geometry, Modality(facts["modality"]), facts["subject"])
            yield scan, SemanticMap(arrays["labels"], geometry, self.schema)

    def subjects(self) -> set[str]:
        """Return the pseudonyms, read from the names of the pairs."""
        return {name.partition(".")[0] for name in self.names(PAIR)}

    def put_synthetic(self, name: str, volume: SyntheticVolume, labels: SemanticMap) -> None:
        """Store a synthetic volume that waits for the gate, with its label map."""
        from safetensors.numpy import save

        from medlsdm.synthesis import to_bytes

        if type(volume) is not SyntheticVolume:
            raise NotSyntheticError("Only synthetic volumes wait for export.", "Nothing was stored.")
        facts = {"affine": json.dumps(labels.geometry.affine.tolist()), "schema": json.dumps(labels.schema.to_json())}
        self.put(MAP, name, save({"labels": np.ascontiguousarray(labels.array)}, metadata=facts))
        self.put(SYNTHETIC, name, to_bytes(volume))  # last: what waits is complete

    def synthetic(self, name: str) -> tuple[SyntheticVolume, SemanticMap]:
        """Return a waiting synthetic volume and its label map."""
        from medlsdm.synthesis import restore

        arrays, facts = _read(self.get(MAP, name))
        geometry = Geometry(np.array(json.loads(facts["affine"])), arrays["labels"].shape)
        labels = SemanticMap(arrays["labels"], geometry, LabelSchema.from_json(json.loads(facts["schema"])))
        return restore(self.get(SYNTHETIC, name)), labels


def _read(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors.numpy import load

    header_bytes = int.from_bytes(content[:8], "little")
    return load(content), json.loads(content[8 : 8 + header_bytes]).get("__metadata__", {})
