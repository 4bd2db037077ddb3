"""From a folder of DICOM to pairs in the vault: de-identify, verify, build volumes, encrypt."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlsdm.checks import existing_folder
from medlsdm.errors import QuarantineError
from medlsdm_node.deid_settings import load_deid
from medlsdm_node.evidence import Outcome, keep
from medlsdm_node.home import NodeHome
from medlsdm_node.vault import HELD, Vault
from medlsdm_node.working import INGEST, working_folder

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class HeldRow:
    """Say why a file is held, or, where ``path`` has no name, the whole series ``token``."""

    token: str
    path: Path = field(repr=False)
    reason: str


@dataclass(frozen=True, slots=True)
class IngestResult:
    """Say what came in: pairs stored, patients, what was held and why (counted; ``rows`` one by one), seconds."""

    pairs: int
    patients: int
    held: dict[str, int]
    notes: tuple[str, ...]
    seconds: float
    rows: tuple[HeldRow, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "pairs": self.pairs,
            "patients": self.patients,
            "held": self.held,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


def ingest(home: NodeHome, source: Path, progress: Report | None = None, *, segmenter: str = "") -> IngestResult:
    """Take a folder in. De-identified files exist only in a private temporary folder, and not for long.

    Ingesting the same folder again replaces the same pairs.

    Args:
        home: The node.
        source: The folder.
        progress: Called with what is being done, how many are done, and how many there are.
        segmenter: What labels a series that came without a label map, in place of deid.yaml's: ``NAME`` or
            ``NAME=FOLDER``.

    Raises:
        ConfigError: deid.yaml does not read, there is no such segmenter, or it cannot run here.
        DataError: The folder is missing or empty.
        QuarantineError: Nothing in it could be used.
    """
    existing_folder(source, "The folder")
    result = take(home, source, "folder", progress, segmenter=segmenter)
    if result.rows:
        held = [
            {"token": r.token, "path": str(r.path) if r.path.name else "", "reason": r.reason, "source": str(source)}
            for r in result.rows
        ]
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}"
        Vault(home).put(HELD, name, json.dumps(held).encode())
    if not result.pairs:
        most = "; ".join(f"{n} x {reason.rstrip('.')}" for reason, n in Counter(result.held).most_common(3))
        raise QuarantineError(
            f"Nothing could be used: {most or 'no DICOM was found'}.", "See 'medlsdm-node quarantine'."
        )
    return result


def take(
    home: NodeHome, source: Path, origin: str, progress: Report | None = None, *, segmenter: str = ""
) -> IngestResult:
    """Run a folder through the pipeline into the vault, and say what is held; ``origin`` is for the audit log."""
    from deid_tools.evidence import EvidenceFolder
    from deid_tools.keys import SiteKeys
    from deid_tools.pipeline import deidentify, read_pairs
    from deid_tools.segmenters import load_segmenter

    rules = load_deid(home)
    segmenter = segmenter or rules.settings.segmenter or ""
    labeller = load_segmenter(segmenter) if segmenter else None
    started = time.monotonic()
    vault, settings = Vault(home), home.settings
    keys = SiteKeys.derive(home.master_key, settings.project)
    rows: list[HeldRow] = []
    stored, patients, done = Counter[str](), set(), Counter[str]()
    with home.locked("ingest"), working_folder(home, INGEST) as private:
        spool = private / "clean"
        seen = EvidenceFolder(private / "evidence") if rules.settings.pictures else None
        report = deidentify(
            source, spool, keys, schema=vault.schema, recipe=rules.recipe, policy=rules.policy(), progress=progress,
            workers=rules.settings.workers, evidence=seen,
        )  # fmt: skip
        rows += [HeldRow(item.token, item.path, item.reason) for item in report.held]
        unlabelled = {s.token for s in report.series if s.labels_held}
        pairs = read_pairs(spool, vault.schema, segmenter=labeller, held=unlabelled) if report.series else ()
        for result in pairs:
            if result.reason or result.scan is None or result.labels is None:
                rows.append(HeldRow(result.token, Path(), result.reason))
                continue
            vault.put_pair(result.token.replace("/", "."), result.scan, result.labels)
            stored[result.token] += 1
            patients.add(result.scan.subject)
            done.update(result.notes)
        outcome = Outcome(stored, {r.token: r.reason for r in rows if not r.path.name}, origin, rules.digest)
        evidence = keep(home, report.studies, outcome, seen.picture_folder if seen else None)
    reasons = dict(Counter(row.reason for row in rows))
    home.audit.append(
        "ingest",
        origin=origin,
        pairs=stored.total(),
        held=len(rows),
        recipe=report.recipe_sha256,
        settings=rules.digest,
        weaker="; ".join(rules.weaker),
        text_search="drawn letters only" if "not installed" in report.ocr else "checked",
        segmenter=segmenter.partition("=")[0],
        evidence=evidence,
    )
    notes = _notes(report.ocr, done, rules.weaker)
    return IngestResult(stored.total(), len(patients), reasons, notes, time.monotonic() - started, tuple(rows))


def _notes(ocr: str, done: Counter[str], weaker: tuple[str, ...]) -> tuple[str, ...]:
    volumes = (f"{count} x {note}" for note, count in done.most_common())
    settings = (f"weaker than the default: {line}" for line in weaker)
    return (*((f"burned-in text: {ocr}",) if ocr else ()), *settings, *volumes)
