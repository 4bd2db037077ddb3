"""The evidence of what was taken in, study by study: kept sealed in the vault, its digest in the signed audit log.

Each ingest and each received study leaves a record of its own, and no later one replaces it. Pictures show
originals: they are kept only where deid.yaml says so, and leave the vault only by ``evidence report``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlsdm.errors import DataError, PolicyError
from medlsdm.sharing.receipt import RECEIPT_NAME, canonical_json
from medlsdm_node.account import who
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import EVIDENCE, EVIDENCE_PICTURES, Vault

if TYPE_CHECKING:
    from deid_tools.report import StudyEvidence

_EVENT = "ingest"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Say what became of the volumes of one ingest: how many pairs by series, why a series was not stored, and how."""

    pairs: Mapping[str, int]
    held: Mapping[str, str]
    origin: str
    settings: str


@dataclass(frozen=True, slots=True)
class Record:
    """Describe one record: its id, its name in the vault, its document, and whether the audit log knows its digest."""

    id: str
    name: str
    document: dict[str, Any] = field(repr=False)
    in_log: bool

    def to_json(self) -> dict[str, Any]:
        """Return the line of a list as plain JSON values."""
        document = self.document
        return {
            "id": self.id,
            "made": document["made"],
            "patient": document["patient"],
            "study": document["study"],
            "series": len(document["series"]),
            "images": sum(row["images"] for row in document["series"]),
            "pairs": document["node"]["pairs"],
            "held": document["held"]["files"],
            "weaker": document["weaker"],
            "pictures": len(document["pictures"]),
            "in_audit_log": self.in_log,
        }


def keep(home: NodeHome, studies: Iterable[StudyEvidence], outcome: Outcome, pictures: Path | None = None) -> list[str]:
    """Seal the evidence of one ingest, and return the digests that belong into its audit entry.

    Args:
        home: The node.
        studies: What the pipeline says.
        outcome: What became of the volumes.
        pictures: The folder with pictures of originals, if any were made.
    """
    from deid_tools.evidence import read_pictures

    vault, stamp, digests = Vault(home), f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}", []
    for study in studies:
        tokens = {row["token"] for row in study.document["series"]}
        shown = read_pictures(pictures, study.document) if pictures else {}
        node = {
            "site": home.settings.site,
            "origin": outcome.origin,
            "settings": outcome.settings,
            "pairs": sum(count for token, count in outcome.pairs.items() if _series(token) in tokens),
            "series_held": {token: why for token, why in outcome.held.items() if _series(token) in tokens},
        }
        seen = {key: hashlib.sha256(png).hexdigest() for key, png in shown.items()}
        document = study.document | {"node": node, "pictures": seen}
        name = f"{stamp}.{study.patient}.{study.study}"
        if shown:
            vault.put(EVIDENCE_PICTURES, name, json.dumps({k: _text(png) for k, png in shown.items()}).encode())
        vault.put(EVIDENCE, name, json.dumps(document).encode())
        digests.append(_digest(document))
    return digests


def records(home: NodeHome) -> list[Record]:
    """Return every record, oldest first."""
    vault = Vault(home)
    logged = {d for r in home.audit.records() if r["event"] == _EVENT for d in r["fields"].get("evidence", [])}
    found = []
    for name in vault.names(EVIDENCE):
        document = json.loads(vault.get(EVIDENCE, name))
        found.append(Record(_id(name), name, document, _digest(document) in logged))
    return found


def find(home: NodeHome, id: str) -> Record:
    """Return one record.

    Raises:
        DataError: There is none of this id.
    """
    for record in records(home):
        if record.id == id:
            return record
    raise DataError(f"There is no evidence {id!r}.", "See 'medlsdm-node evidence list'.")


def write_report(home: NodeHome, id: str, out: Path, *, pictures: bool = True) -> dict[str, Any]:
    """Write one record as an HTML page, mode 0600, and write down who asked for it.

    Args:
        home: The node.
        id: The record's id.
        out: A new file, outside every export.
        pictures: Whether the pictures of originals are in it, where there are any.

    Raises:
        PolicyError: The file would lie in an export, which leaves the hospital.
        DataError: There is no such record, or the file exists.
    """
    from deid_tools.evidence_page import render

    record = find(home, id)
    target = out.resolve()
    if any((folder / RECEIPT_NAME).exists() for folder in target.parents):
        raise PolicyError("The report would lie in an export, which leaves the hospital.", "Give another place.")
    if target.exists() or not target.parent.is_dir():
        raise DataError("The report's file exists already, or its folder does not.", "Give a new file.")
    shown = _pictures(home, record) if pictures and record.document["pictures"] else {}
    page = render(record.document, shown)
    home.audit.append("evidence-report", item=record.id, pictures=len(shown), who=who())
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(handle)
    except BaseException:  # half a page must not pass for a whole one
        target.unlink()
        raise
    return {"id": record.id, "out": str(target), "pictures": len(shown), "in_audit_log": record.in_log}


def _pictures(home: NodeHome, record: Record) -> dict[str, bytes]:
    sealed = json.loads(Vault(home).get(EVIDENCE_PICTURES, record.name))
    return {key: base64.b64decode(text) for key, text in sealed.items()}


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _series(token: str) -> str:
    return "/".join(token.split("/")[:2])


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document)).hexdigest()


def _id(name: str) -> str:
    return f"E-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
