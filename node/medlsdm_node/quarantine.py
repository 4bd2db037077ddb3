"""What was held, for a person to work through: list, show, release, purge.

Two kinds of item. ``folder``: ``ingest DIR`` held files that lie, in clear, in the hospital's own folder; the node
holds only the list. ``received``: the node itself holds the files, sealed. An item is what one reason holds of one
ingest or one study. Release overrides one decision only, which of two differing instances counts; every check of
the pipeline is done anew, and none is waived.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medlsdm.errors import DataError, PolicyError, QuarantineError
from medlsdm_node.account import who
from medlsdm_node.home import NodeHome
from medlsdm_node.ingest import ingest
from medlsdm_node.intake import INTAKE, take_study
from medlsdm_node.spool import Outcome, Spool, instance
from medlsdm_node.vault import HELD, Vault
from medlsdm_node.working import STUDY, working_folder

FOLDER, RECEIVED = "folder", "received"
REASONS = {
    Outcome.DIFFERING: "another instance with its SOP Instance UID, but other content, came before it",
    Outcome.LATE: "its study was taken in and its originals are gone, and a part of a study is never taken in alone",
}
_SERIES = "series"


@dataclass(frozen=True, slots=True)
class Item:
    """Describe what one reason holds of one ingest (``record``) or one study.

    ``paths`` are the files: the hospital's own, or sealed ones of the spool. ``part`` tells where the latter lie.
    """

    id: str
    origin: str
    reason: str
    since: str
    record: str
    part: str = ""
    paths: tuple[Path, ...] = field(default=(), repr=False)
    tokens: tuple[str, ...] = ()
    source: str = field(default="", repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the files."""
        return {
            "id": self.id,
            "origin": self.origin,
            "reason": self.reason,
            "files": len(self.paths),
            "series": list(self.tokens),
            "since": self.since,
        }


def items(home: NodeHome) -> list[Item]:
    """Return everything that is held, oldest first."""
    return sorted([*_of_folders(home), *_of_studies(Spool(home))], key=lambda item: (item.since, item.id))


def find(home: NodeHome, id: str) -> Item:
    """Return one item.

    Raises:
        DataError: There is none of this id.
    """
    for item in items(home):
        if item.id == id:
            return item
    raise DataError(f"Nothing is held under {id!r}.", "See 'medlsdm-node quarantine list'.")


def show(home: NodeHome, id: str, *, identify: bool = False) -> dict[str, Any]:
    """Return an item with its files.

    Args:
        home: The node.
        id: The item's id.
        identify: For a received item, read the UIDs from the sealed files, so that the hospital finds them in its
            PACS. They are shown and stay nowhere; that they were shown goes into the audit log.
    """
    item = find(home, id)
    shown = item.to_json() | {"paths": [str(p) if item.origin == FOLDER else p.name for p in item.paths]}
    if identify and item.origin == RECEIVED:
        home.audit.append("quarantine-identified", item=item.id, who=who())
        shown["uids"] = [_uids(Spool(home), path) for path in item.paths]
    return shown


def release(home: NodeHome, id: str) -> dict[str, Any]:
    """Run the pipeline again on what an item belongs to, and say what came of it.

    An instance that differs from an earlier one takes its place first, and the earlier one is held instead.

    Raises:
        PolicyError: The item can only be purged.
        QuarantineError: From a folder, and nothing passed this time either.
    """
    item = find(home, id)
    if item.part == Outcome.LATE:
        raise PolicyError(f"It cannot be released: {item.reason}.", "Purge it, then have the whole study sent again.")
    if item.origin == FOLDER:
        if not item.source or not Path(item.source).is_dir():
            raise DataError("The folder that it came from is not there.", "Run 'medlsdm-node ingest' on it anew.")
        home.audit.append("quarantine-release", item=item.id, origin=item.origin, files=len(item.paths), who=who())
        try:
            result = ingest(home, Path(item.source))
        except QuarantineError:  # it wrote a list of its own
            Vault(home).delete(HELD, item.record)
            raise
        Vault(home).delete(HELD, item.record)
    else:
        spool = Spool(home)
        if item.part == Outcome.DIFFERING:
            _swap(spool, item)
        home.audit.append("quarantine-release", item=item.id, origin=item.origin, files=len(item.paths), who=who())
        result = take_study(spool, item.record)
    return {"item": item.id, "pairs": result.pairs, "held": result.held}


def purge(home: NodeHome, id: str) -> dict[str, Any]:
    """Delete what the node holds of an item, for good. A hospital's own folder is never touched."""
    item = find(home, id)
    home.audit.append("quarantine-purge", item=item.id, origin=item.origin, files=len(item.paths), who=who())
    if item.origin == FOLDER:
        _forget(home, item)
        return {"item": item.id, "deleted": 0}
    spool = Spool(home)
    with home.locked(INTAKE), spool.lock():
        record = spool.record(item.record)
        for path in item.paths:
            path.unlink(missing_ok=True)
            record.held.pop(path.stem, None)
            # sent again it is new; but where pairs were stored it stays known: a part of a study is not taken in alone
            if item.part in ("in", _SERIES) and not record.pairs:
                record.instances.pop(instance(path.name)[0], None)
        for token in item.tokens:
            record.series.pop(token, None)
        if item.part == _SERIES and record.pairs:
            record.closed = True
        nothing_left = not record.pairs and not record.instances
        if nothing_left or item.part == Outcome.LATE:  # the whole study may come again, as a new one
            record = type(record)()
        spool.put_record(item.record, record)
        spool.prune(item.record)
    return {"item": item.id, "deleted": len(item.paths)}


def _of_folders(home: NodeHome) -> Iterator[Item]:
    vault = Vault(home)
    for name in vault.names(HELD):
        groups: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in json.loads(vault.get(HELD, name)):
            groups[row["reason"]].append(row)
        for reason, rows in groups.items():
            yield Item(
                _id("F", name, reason),
                FOLDER,
                reason,
                datetime.strptime(name[:15], "%Y%m%dT%H%M%S").astimezone(UTC).isoformat(timespec="seconds"),
                name,
                paths=tuple(Path(row["path"]) for row in rows if row["path"]),
                tokens=tuple(row["token"] for row in rows if not row["path"]),
                source=rows[0].get("source", ""),
            )


def _of_studies(spool: Spool) -> Iterator[Item]:
    for study in spool.studies():
        record, here = spool.record(study), {p.stem: p for p in spool.files(study)}
        groups: dict[str, list[Path]] = defaultdict(list)
        for stem, reason in record.held.items():
            groups[reason] += [here[stem]] if stem in here else []
        for reason, paths in groups.items():
            yield _received(study, "in", reason, paths)
        reasons: dict[str, list[str]] = defaultdict(list)
        for token, reason in record.series.items():
            reasons[reason].append(token)
        used = [p for stem, p in here.items() if stem not in record.held]
        for reason, tokens in reasons.items():
            yield _received(study, _SERIES, reason, used, tuple(tokens))
        for path in spool.files(study, Outcome.DIFFERING):
            yield _received(study, Outcome.DIFFERING, REASONS[Outcome.DIFFERING], [path])
        if late := spool.files(study, Outcome.LATE):
            yield _received(study, Outcome.LATE, REASONS[Outcome.LATE], late)


def _received(study: str, part: str, reason: str, paths: list[Path], tokens: tuple[str, ...] = ()) -> Item:
    since = max((p.stat().st_mtime for p in paths), default=0.0)
    unlike = paths[0].stem if part == Outcome.DIFFERING else reason
    when = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
    return Item(_id("R", study, part, unlike), RECEIVED, reason, when, study, part, tuple(paths), tokens)


def _id(kind: str, *parts: str) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def _forget(home: NodeHome, item: Item) -> None:
    vault = Vault(home)
    left = [row for row in json.loads(vault.get(HELD, item.record)) if row["reason"] != item.reason]
    if left:
        vault.put(HELD, item.record, json.dumps(left).encode())
    else:
        vault.delete(HELD, item.record)


def _swap(spool: Spool, item: Item) -> None:
    """Put a differing instance in the place of the one that came first, which is held instead."""
    (path,) = item.paths
    sop, digest = instance(path.name)
    with spool.home.locked(INTAKE), spool.lock():
        record = spool.record(item.record)
        if record.closed:
            raise PolicyError(
                f"It cannot be released: {REASONS[Outcome.LATE]}.", "Purge it, then have the whole study sent again."
            )
        inside = spool.folder(item.record, "in")
        for earlier in inside.glob(f"{sop}-*.sealed"):
            earlier.rename(path.parent / earlier.name)
            record.held.pop(earlier.stem, None)
        path.rename(inside / path.name)
        if sop in record.instances:
            record.instances[sop] = digest
        spool.put_record(item.record, record)


def _uids(spool: Spool, path: Path) -> dict[str, str]:
    """Read the UIDs of a sealed file, from a clear copy that lives for the moment."""
    from deid_tools.admit import Refusal, read_strict

    keywords = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
    with working_folder(spool.home, STUDY) as folder:
        spool.unseal([path], folder)
        try:
            ds = read_strict(folder / path.stem, headers_only=True)
        except Refusal:
            return dict.fromkeys(keywords, "")
        return {keyword: str(ds.get(keyword, "") or "") for keyword in keywords}
