"""``pull``: fetch studies from a PACS over DICOMweb into the spool, then take them in.

What is here already, or was taken in, is not fetched again, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlsdm.errors import BusyError, DataError, NetworkError, ResourceError, UsageError
from medlsdm_node import taking
from medlsdm_node.archive import Archive
from medlsdm_node.home import NodeHome
from medlsdm_node.intake import Intake, Say, expire
from medlsdm_node.part10 import is_uid
from medlsdm_node.receive_settings import ReceiveSettings, read_receive
from medlsdm_node.spool import Spool
from medlsdm_node.taking import Taken, Taking
from medlsdm_node.working import wipe_leftovers

ATTEMPTS, PAUSE_SECONDS = 3, 1.0
MAX_FAILURES_IN_A_ROW = 3
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Selection:
    """Say what to pull: studies by UID, or those of a modality and of days.

    ``modality`` selects whole studies in which it occurs, so that label maps come with their scans.
    """

    studies: tuple[str, ...] = ()
    modality: str = ""
    date: str = ""

    def check(self) -> None:
        """Refuse what selects nothing, or cannot be meant.

        Raises:
            UsageError: It is not a UID, a modality or a date.
        """
        if not (self.studies or self.modality or self.date):
            raise UsageError("Nothing says what to pull.", "Give --study, --studies, --modality or --date.")
        if self.studies and (self.modality or self.date):
            raise UsageError("Studies by UID and a search do not go together.", "Give one of them.")
        if not all(is_uid(uid) for uid in self.studies):
            raise UsageError("A study is given by its Study Instance UID: digits and dots.")
        if self.modality and not re.fullmatch("[A-Z0-9_]{1,16}", self.modality):
            raise UsageError("A modality is given as DICOM writes it, such as CT.")
        days = re.fullmatch(r"(\d{8})(-(\d{8})?)?|-\d{8}", self.date)
        if self.date and (not days or (days[3] and days[3] < days[1])):
            raise UsageError("Days are given as 20240131 or 20240101-20240131.")

    @property
    def filters(self) -> dict[str, str]:
        """Return the search of QIDO-RS."""
        wanted = {"ModalitiesInStudy": self.modality, "StudyDate": self.date}
        return {name: value for name, value in wanted.items() if value}


def read_studies(file: Path) -> tuple[str, ...]:
    """Return the UIDs of a file, one a line."""
    try:
        return tuple(file.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("The file of --studies cannot be read.", "One Study Instance UID a line.") from error


@dataclass(slots=True)
class PullResult:
    """Say what came: instances that the archive named, those known already, outcomes, refusals, and what it led to."""

    studies: int = 0
    instances: int = 0
    known: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    bytes: int = 0
    pairs: int = 0
    held: int = 0
    waiting: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "studies": self.studies,
            "instances": self.instances,
            "known": self.known,
            "fetched": dict(self.outcomes),
            "refused": dict(self.refused),
            "failed": self.failed,
            "bytes": self.bytes,
            "pairs": self.pairs,
            "held": self.held,
            "waiting": self.waiting,
            "seconds": round(self.seconds, 2),
        }

    def in_words(self) -> str:
        """Return lines for a person."""
        fetched = sum(self.outcomes.values())
        lines = [
            f"{self.studies} studies of {self.instances} instances: {fetched} fetched, {self.known} were here already.",
            f"{self.pairs} scans went into the vault, {self.held} files or series held ({self.seconds:.1f} s).",
        ]
        lines += [f"  {outcome}: {count}" for outcome, count in sorted(self.outcomes.items()) if outcome != "stored"]
        lines += [f"  refused: {count} x {reason}" for reason, count in sorted(self.refused.items())]
        lines += [f"  waiting: {self.waiting} studies"] if self.waiting else []
        return "\n".join(lines)


def pull(home: NodeHome, archive: Archive, selection: Selection, progress: Report, say: Say) -> PullResult:
    """Fetch what is selected and not here yet, study by study, and take in each study when it is whole.

    While ``receive`` runs, what was fetched is left to it.

    Raises:
        UsageError: Nothing sensible is selected.
        BusyError: This node pulls already.
        NetworkError: The archive cannot be reached, or not any more. What came stays.
        ResourceError: The disk is low.
    """
    selection.check()
    result, since = PullResult(), time.monotonic()
    with home.locked("pull"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote the value that they warn of
        one = _Pull(home, archive, progress, say, result)
        one.recover()
        try:
            one.run(selection)
        finally:
            result.seconds = time.monotonic() - since
            told = {k: v for k, v in result.to_json().items() if k not in ("pairs", "held", "seconds")}
            home.audit.append("pulled", archive=archive.host, **told)
    return result


class _Enough(Exception):
    """Break off an instance that is refused: what follows may have no end."""


class _Pull:
    """One run of ``pull``."""

    def __init__(self, home: NodeHome, archive: Archive, progress: Report, say: Say, result: PullResult) -> None:
        self.home, self.archive, self.progress, self.say, self.result = home, archive, progress, say, result
        self.spool = Spool(home, "pulling")
        self.settings: ReceiveSettings = read_receive(home)
        self._failures = 0

    def recover(self) -> None:
        """Delete what killed runs left half-fetched or in clear."""
        wipe_leftovers(self.home)
        self.spool.recover()

    def run(self, selection: Selection) -> None:
        """Go through the studies."""
        self.progress("searching", 0, 0)
        studies = list(dict.fromkeys(selection.studies or self.archive.studies(selection.filters)))
        self.result.studies = len(studies)
        for number, study in enumerate(studies):
            name = self.spool.hash(study)
            failed = self.result.failed
            with self.spool.pull(name):
                self._fetch_study(study, f"study {number + 1} of {len(studies)}")
            if self.result.failed == failed:
                self._take(name)
        self._expire()

    def _fetch_study(self, study: str, text: str) -> None:
        rows = list(self.archive.instances(study))
        if not rows:
            raise DataError("The archive has nothing of a study that was asked for.", "Check the UID.")
        known = self.spool.known(study)
        missing = [row for row in rows if self.spool.hash(row[1]) not in known]
        self.result.instances += len(rows)
        self.result.known += len(rows) - len(missing)
        for done, (series, instance) in enumerate(missing):
            self.progress(text, done, len(missing))
            self._fetch(study, series, instance)
        self.progress(text, len(missing), len(missing))

    def _fetch(self, study: str, series: str, instance: str) -> None:
        """Fetch one instance; one that fails again and again is counted, unless nothing comes any more."""
        for attempt in range(ATTEMPTS):
            try:
                taken = self._fetch_once(study, series, instance)
                break
            except (NetworkError, DataError) as error:
                if attempt + 1 < ATTEMPTS:
                    time.sleep(PAUSE_SECONDS * 2**attempt)
                    continue
                self.result.failed += 1
                self._failures += 1
                if self._failures >= MAX_FAILURES_IN_A_ROW:
                    raise
                self.say(f"An instance could not be fetched: {error.message}")
                return
        else:
            raise AssertionError("unreachable")
        self._failures = 0
        if taken.outcome is not None:
            self.result.outcomes[taken.outcome.value] += 1
        elif taken.refused in (taking.LOW, taking.FULL):
            raise ResourceError(f"Nothing more was fetched: {taken.refused}.", "Make room, then run it again.")
        else:
            self.result.refused[taken.refused] += 1

    def _fetch_once(self, study: str, series: str, instance: str) -> Taken:
        one = Taking(self.spool, self.settings)
        try:
            with suppress(_Enough), self.archive.fetch(study, series, instance) as pieces:
                for piece in pieces:
                    self.result.bytes += one.write(piece)
                    if one.refused:
                        raise _Enough
            return one.finish(study, instance)
        finally:
            one.discard()

    def _take(self, study: str) -> None:
        """Take a study in, unless ``receive`` runs and will."""
        if self.spool.waiting(study) is None:
            return
        try:
            with self.home.locked("receive"):
                self.progress("taking in", 0, 0)
                Intake(self.home, self.spool, (), self.settings, self.say).take(study)
        except BusyError:
            self.result.waiting += 1
            return
        record = self.spool.record(study)
        self.result.pairs += record.pairs
        self.result.held += len(record.held) + len(record.series)
        self.result.waiting += self.spool.waiting(study) is not None

    def _expire(self) -> None:
        """Let go of originals whose time has come, unless ``receive`` runs and will."""
        try:
            with self.home.locked("receive"):
                for study in self.spool.studies():
                    expire(self.spool, study, self.settings.keep_hours)
        except BusyError:
            self.say("The receiver runs: it takes in what was fetched.")
