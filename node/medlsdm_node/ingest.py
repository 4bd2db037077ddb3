"""From a folder of DICOM to pairs in the vault: de-identify, verify, build volumes, encrypt."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlsdm.checks import existing_folder
from medlsdm.errors import QuarantineError
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import HELD, Vault

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class IngestResult:
    """Say what came in: pairs stored, patients, what was held and why (counted), seconds."""

    pairs: int
    patients: int
    held: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "pairs": self.pairs,
            "patients": self.patients,
            "held": self.held,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


def ingest(home: NodeHome, source: Path, progress: Report | None = None) -> IngestResult:
    """Take a folder in. De-identified files exist only in a private temporary folder, and not for long.

    Ingesting the same folder again replaces the same pairs.

    Raises:
        DataError: The folder is missing or empty.
        QuarantineError: Nothing in it could be used.
    """
    from deid_tools.keys import SiteKeys
    from deid_tools.pipeline import deidentify, read_pairs

    started = time.monotonic()
    existing_folder(source, "The folder")
    vault, settings = Vault(home), home.settings
    keys = SiteKeys.derive(home.master_key, settings.project)
    reasons: Counter[str] = Counter()
    held: list[dict[str, str]] = []
    stored, patients = 0, set()
    with home.locked("ingest"), tempfile.TemporaryDirectory(dir=home.run, prefix="ingest-") as spool:
        report = deidentify(source, Path(spool), keys, schema=vault.schema, progress=progress)
        for item in report.held:
            reasons[item.reason] += 1
            held.append({"token": item.token, "path": str(item.path), "reason": item.reason})
        for result in read_pairs(Path(spool), vault.schema) if report.series else ():
            reason = result.reason
            if reason or result.scan is None or result.labels is None:
                reasons[reason] += 1
                held.append({"token": result.token, "path": "", "reason": reason})
                continue
            vault.put_pair(result.token.replace("/", "."), result.scan, result.labels)
            stored += 1
            patients.add(result.scan.subject)
    if held:
        vault.put(HELD, f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}", json.dumps(held).encode())
    home.audit.append("ingest", pairs=stored, held=sum(reasons.values()), recipe=report.recipe_sha256)
    result = IngestResult(stored, len(patients), dict(reasons), _notes(report.ocr), time.monotonic() - started)
    if not stored:
        most = "; ".join(f"{count} x {reason.rstrip('.')}" for reason, count in reasons.most_common(3))
        raise QuarantineError(
            f"Nothing could be used: {most or 'no DICOM was found'}.", "See 'medlsdm-node quarantine'."
        )
    return result


def _notes(ocr: str) -> tuple[str, ...]:
    return (f"burned-in text: {ocr}",) if ocr else ()


def quarantine(home: NodeHome) -> list[dict[str, str]]:
    """Return what was held: token, reason, and the local path, newest last."""
    vault = Vault(home)
    return [row for name in vault.names(HELD) for row in json.loads(vault.get(HELD, name))]
