"""Where received instances lie, sealed, from the moment they arrive until their study is taken in or purged.

``spool/incoming`` and ``pulling`` hold what is under way; nothing there was acknowledged and a start wipes it.
``spool/studies/<study>/`` holds what was acknowledged: ``in`` awaits or underwent the pipeline, ``differing`` are
instances whose SOP Instance UID stands for other bytes already, ``late`` are instances of a study whose originals
are gone. A file's name is two keyed hashes, of its SOP Instance UID and of its bytes, so that an equal instance is
recognised by its name alone, without an index that a crash could tear, and no name says anything without the key.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from medlsdm.errors import BusyError, DataError, IntegrityError
from medlsdm_node.home import NodeHome
from medlsdm_node.part10 import META_START, data_set_uids, meta_end
from medlsdm_node.sealed import SealedWriter, read_sealed
from medlsdm_node.vault import Vault

KIND = "spool"  # the vault's kind of study records
PREFIX_BYTES = 4 << 20  # where the study's UID is looked for
_HEX = 32


class Outcome(StrEnum):
    """Say what became of an instance that arrived."""

    STORED = "stored"
    EQUAL = "equal"
    DIFFERING = "differing"
    LATE = "late"


@dataclass(slots=True)
class StudyRecord:
    """Remember what the pipeline said of a study: instances seen, files and series held with their reason.

    ``instances`` maps the hash of a SOP Instance UID to that of its bytes; ``held`` maps a file's name, ``series`` a
    series' token, to the reason. ``pairs`` counts what was stored, ``attempts`` the runs that did not end.
    ``closed``: the originals are gone.
    """

    instances: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    series: dict[str, str] = field(default_factory=dict)
    pairs: int = 0
    taken: float = 0.0
    attempts: int = 0
    closed: bool = False


class Arrival:
    """Take the bytes of one instance as they come: sealed, hashed, and the beginning kept to find its study."""

    def __init__(self, path: Path, key: bytes, name_key: bytes) -> None:
        self.bytes = 0
        self.prefix = bytearray()
        self._digest = hmac.new(name_key, digestmod=hashlib.sha256)
        self._meta_end = 0
        self.writer = SealedWriter(path, key)

    def write(self, content: bytes) -> int:
        """Add bytes of a DICOM file, file meta first."""
        if len(self.prefix) < PREFIX_BYTES:
            self.prefix += content[: PREFIX_BYTES - len(self.prefix)]
        if not self._meta_end and len(self.prefix) >= META_START:
            self._meta_end = meta_end(self.prefix) or META_START
        if self._meta_end:  # the meta group names the writing software, which may change between two sendings
            self._digest.update(content[max(self._meta_end - self.bytes, 0) :])
        self.bytes += len(content)
        return self.writer.write(content)

    def digest(self, syntax: str) -> str:
        """Return the keyed hash of the data set in its transfer syntax."""
        self._digest.update(syntax.encode())
        return self._digest.hexdigest()[:_HEX]

    def study_uid(self) -> str:
        """Return StudyInstanceUID (0020,000D), or "" where the beginning of the file does not tell it."""
        return data_set_uids(self.prefix, ("StudyInstanceUID",))[0]


class Spool:
    """Open the spool of a node. Safe for several threads and processes.

    Args:
        home: The node.
        incoming: The folder of ``spool/`` for what is being received; each program that receives has its own.
    """

    def __init__(self, home: NodeHome, incoming: str = "incoming") -> None:
        self.home, self.vault = home, Vault(home)
        self.root = home.root / "spool"
        self.incoming, self.studies_folder = self.root / incoming, self.root / "studies"
        self._key, self._name_key = home.derive("spool/bytes"), home.derive("spool/names")
        for folder in (self.root, self.incoming, self.studies_folder):
            folder.mkdir(mode=0o700, exist_ok=True)

    def recover(self) -> int:
        """Delete what was half-written in this spool's own folder, and return how many files that were."""
        leftovers = list(self.incoming.iterdir())
        for path in leftovers:
            path.unlink()
        return len(leftovers)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the spool for a moment, against other threads and processes."""
        with (self.root / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def free_bytes(self) -> int:
        """Return the free space of the spool's disk."""
        return shutil.disk_usage(self.root).free

    def begin(self) -> Arrival:
        """Open a file for an instance that begins to arrive."""
        return Arrival(self.incoming / f"{secrets.token_hex(8)}.part", self._key, self._name_key)

    def accept(self, arrival: Arrival, sop_uid: str, syntax: str) -> tuple[str, Outcome]:
        """Keep a complete instance for good, and return its study and what became of it.

        When this returns, the disk has it: the caller may acknowledge.
        """
        arrival.writer.finish()
        study, sop = self.hash(arrival.study_uid()), self.hash(sop_uid)
        name = f"{sop}-{arrival.digest(syntax)}.sealed"
        with self.lock():
            outcome = self._outcome(study, sop, name)
            if outcome is Outcome.EQUAL:
                arrival.writer.path.unlink()
                return study, outcome
            folder = self.folder(study, "in" if outcome is Outcome.STORED else outcome.value)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.utime(arrival.writer.path)
            arrival.writer.path.rename(folder / name)
            for changed in (folder, folder.parent, self.studies_folder):
                _sync(changed)
        return study, outcome

    def hash(self, text: str) -> str:
        """Return the keyed hash of an identifier, 128 bits in hex."""
        return hmac.new(self._name_key, text.encode(errors="replace"), hashlib.sha256).hexdigest()[:_HEX]

    def _outcome(self, study: str, sop: str, name: str) -> Outcome:
        record = self.record(study)
        digest = name.removesuffix(".sealed").partition("-")[2]
        here = [p.name for p in self.folder(study, "in").glob(f"{sop}-*")]
        known = record.instances.get(sop)
        if name in here or (known == digest and not here):
            return Outcome.EQUAL
        if any((self.folder(study, part) / name).exists() for part in ("differing", "late")):
            return Outcome.EQUAL
        if here or known:
            return Outcome.DIFFERING
        return Outcome.LATE if record.closed else Outcome.STORED

    def folder(self, study: str, part: str) -> Path:
        """Return where a part of a study lies: ``in``, ``differing`` or ``late``."""
        return self.studies_folder / study / part

    def known(self, study_uid: str) -> set[str]:
        """Return the (hashed) SOP Instance UIDs of a study that are here or were taken in, whatever their bytes are."""
        study = self.hash(study_uid)
        here = (self.studies_folder / study).glob("*/*.sealed")
        return {instance(path.name)[0] for path in here} | set(self.record(study).instances)

    @contextmanager
    def pull(self, study: str) -> Iterator[None]:
        """Say that a study is being pulled, so that nobody takes it in by halves; the caller holds ``pull``."""
        mark = self.home.run / "pull.study"
        mark.write_text(study)
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def pulling(self, study: str) -> bool:
        """Tell whether a study is being pulled at this moment."""
        try:
            if (self.home.run / "pull.study").read_text() != study:
                return False
        except FileNotFoundError:
            return False
        try:
            with self.home.locked("pull"):
                return False  # who pulled was killed
        except BusyError:
            return True

    def files(self, study: str, part: str = "in") -> list[Path]:
        """Return the sealed files of a part of a study, by name."""
        return sorted(self.folder(study, part).glob("*.sealed"))

    def studies(self) -> list[str]:
        """Return every study that has files here."""
        return sorted(p.name for p in self.studies_folder.iterdir() if p.is_dir())

    def record(self, study: str) -> StudyRecord:
        """Return what is remembered of a study; an empty record if nothing is."""
        try:
            return StudyRecord(**json.loads(self.vault.get(KIND, study)))
        except DataError:
            return StudyRecord()
        except (ValueError, TypeError) as error:
            raise IntegrityError("A study's record cannot be read.", "Restore vault/ from its backup.") from error

    def put_record(self, study: str, record: StudyRecord) -> None:
        """Remember, or forget where nothing is left to remember."""
        if record == StudyRecord():
            self.vault.delete(KIND, study)
        else:
            self.vault.put(KIND, study, json.dumps(asdict(record)).encode())

    def waiting(self, study: str) -> float | None:
        """Return how many seconds ago the last new instance came, or None where nothing new waits."""
        record = self.record(study)
        new = [p for p in self.files(study) if instance(p.name)[0] not in record.instances]
        return max(time.time() - max(p.stat().st_mtime for p in new), 0.0) if new else None

    def changed(self, study: str) -> float:
        """Return when a file of a study last came or went."""
        folder = self.folder(study, "in")
        return folder.stat().st_mtime if folder.is_dir() else 0.0

    def unseal(self, paths: list[Path], folder: Path) -> None:
        """Write files in clear into a private folder, under the names that they have here.

        Raises:
            IntegrityError: One was changed or damaged.
        """
        for path in paths:
            target = folder / path.stem
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                for chunk in read_sealed(path, self._key):
                    stream.write(chunk)

    def prune(self, study: str) -> None:
        """Remove the folders of a study that are empty."""
        folder = self.studies_folder / study
        for path in [*(folder / part for part in ("in", "differing", "late")), folder]:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def instance(name: str) -> tuple[str, str]:
    """Split a file's name into the hash of its SOP Instance UID and that of its bytes."""
    sop, _, digest = name.removesuffix(".sealed").partition("-")
    return sop, digest


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
