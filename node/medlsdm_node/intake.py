"""From the spool to the vault: a study that is complete goes through the pipeline as a whole."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medlsdm.errors import BusyError, MedlsdmError, ResourceError
from medlsdm_node.deid_settings import load_deid
from medlsdm_node.home import NodeHome
from medlsdm_node.ingest import IngestResult, take
from medlsdm_node.spool import Spool, StudyRecord, instance
from medlsdm_node.working import STUDY, wipe_leftovers, working_folder

if TYPE_CHECKING:
    from medlsdm_node.door import Door
    from medlsdm_node.receive_settings import ReceiveSettings

TICK_SECONDS, AUDIT_SECONDS, RETRY_SECONDS = 1.0, 60.0, 30.0
MAX_ATTEMPTS = 3
INTAKE = "intake"  # held by who takes a study in, swaps its files or deletes them: each needs them to stay
Say = Callable[[str], None]


def take_study(spool: Spool, study: str) -> IngestResult:
    """Run a study's instances through the pipeline, all of them, and remember what it said.

    The same study may be taken again, with what came later: the same pairs are replaced. If the node is killed on
    the way, the study still waits.

    Raises:
        BusyError: Another study is being taken in, released or purged at this moment, or another ingest runs.
    """
    with spool.home.locked(INTAKE):
        return _take_study(spool, study)


def _take_study(spool: Spool, study: str) -> IngestResult:
    with spool.lock():
        paths, before = spool.files(study), spool.record(study)
        before.attempts += 1
        spool.put_record(study, before)
    with working_folder(spool.home, STUDY) as private:
        folder = private / "in"
        folder.mkdir()
        spool.unseal(paths, folder)
        result = take(spool.home, folder, "received")
    stems = {p.stem for p in paths}
    with spool.lock():
        spool.put_record(
            study,
            StudyRecord(
                instances=before.instances | dict(instance(p.name) for p in paths),
                held={row.path.name: row.reason for row in result.rows if row.path.name in stems},
                series={row.token: row.reason for row in result.rows if not row.path.name},
                pairs=result.pairs + (before.pairs if before.closed else 0),
                taken=time.time(),
                closed=before.closed,
            ),
        )
    return result


def hold_study(spool: Spool, study: str, reason: str) -> None:
    """Hold everything of a study that waits: it is in quarantine until somebody releases or purges it."""
    with spool.lock():
        record = spool.record(study)
        for path in spool.files(study):
            sop, digest = instance(path.name)
            if sop not in record.instances:
                record.held[path.stem] = reason
            record.instances[sop] = digest
        record.attempts = 0
        spool.put_record(study, record)


def forget_attempts(spool: Spool, study: str) -> None:
    """Begin to count anew how often the node was stopped while it took a study in."""
    with spool.lock():
        record = spool.record(study)
        record.attempts = 0
        spool.put_record(study, record)


def expire(spool: Spool, study: str, keep_hours: float) -> bool:
    """Delete the originals that are in the vault once nobody may still add to them; what is held stays."""
    try:
        with spool.home.locked(INTAKE), spool.lock():
            return _expire(spool, study, keep_hours)
    except BusyError:  # somebody works with its files: the next time
        return False


def _expire(spool: Spool, study: str, keep_hours: float) -> bool:
    record = spool.record(study)
    waits = any(instance(p.name)[0] not in record.instances for p in spool.files(study))
    done = record.pairs and not record.series and not record.closed
    if waits or not done or time.time() - record.taken < keep_hours * 3600:
        return False
    record.closed = True
    spool.put_record(study, record)  # first: a kill in between leaves a file too many, never one too few
    for path in spool.files(study):
        if path.stem not in record.held:
            path.unlink()
    spool.prune(study)
    return True


@dataclass(slots=True)
class Intake:
    """Watch the spool: take in what is complete, let go of what is done, write down what came."""

    home: NodeHome
    spool: Spool
    doors: Sequence[Door]
    settings: ReceiveSettings
    say: Say
    stopping: bool = False
    counted: float = 0.0
    later: dict[str, float] = field(default_factory=dict)
    quiet: dict[str, float] = field(default_factory=dict)
    uncounted: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    refused: bool = False

    def run(self) -> None:
        """Go on until ``stopping``."""
        while not self.stopping:
            self._unless_refused(self.tick)
            time.sleep(TICK_SECONDS)
        self._unless_refused(self.count)

    def _unless_refused(self, act: Callable[[], None]) -> None:
        """Go on where the disk refuses to be written: the doors stay open, and say so to who sends."""
        try:
            act()
            self.refused = False
        except (ResourceError, OSError) as error:
            if not self.refused:
                self.say(f"Nothing is taken in: {error if isinstance(error, MedlsdmError) else 'the disk refuses.'}")
            self.refused = True

    def tick(self) -> None:
        """Look once; at a study in which nothing changed only once a minute."""
        sweep = time.monotonic() - self.counted > AUDIT_SECONDS
        for study in self.spool.studies():
            mark = self.spool.changed(study)
            if self.quiet.get(study) == mark and not sweep:
                continue
            waited = self.spool.waiting(study)
            if waited is None:
                self.quiet[study] = mark
                expire(self.spool, study, self.settings.keep_hours)
            elif waited >= self.settings.quiet_seconds and self._may_take(study):
                self.count()
                self.take(study)
            if self.stopping:
                return
        if sweep:
            self.count()

    def _may_take(self, study: str) -> bool:
        busy = self.spool.pulling(study) or any(door.busy_with(study) for door in self.doors)
        return not busy and time.monotonic() >= self.later.get(study, 0.0)

    def take(self, study: str) -> None:
        """Take one study in; one that fails is held, so that it stops no other."""
        attempts = self.spool.record(study).attempts
        self.later[study] = time.monotonic() + RETRY_SECONDS
        try:
            if attempts >= MAX_ATTEMPTS:
                hold_study(self.spool, study, f"the node was stopped {attempts} times while it was taken in")
                return
            result = take_study(self.spool, study)
            self.say(f"Took in a study: {result.pairs} scans, {len(result.rows)} files or series held.")
        except (BusyError, ResourceError, OSError) as error:
            forget_attempts(self.spool, study)  # they count what stopped the node, not what made it wait
            self.say(f"A study waits: {error if isinstance(error, MedlsdmError) else 'the disk refused its files.'}")
        except MedlsdmError as error:
            hold_study(self.spool, study, error.message)
            self.say(f"A study is held: {error}")
        except Exception as error:
            hold_study(self.spool, study, f"the pipeline failed on it ({type(error).__name__})")
            self.say("A study is held: the pipeline failed on it.")

    def count(self) -> None:
        """Write what happened at the doors into the audit log: counts and AE titles of receive.yaml, nothing else."""
        self.counted = time.monotonic()
        for door in self.doors:
            for caller, row in door.counts().items():
                self.uncounted[caller].update(row)
        if self.uncounted:
            self.home.audit.append("received", counts={caller: dict(row) for caller, row in self.uncounted.items()})
            total = sum(self.uncounted.values(), Counter[str]())
            self.uncounted.clear()  # only now: what the disk refused is written the next time
            self.say("; ".join(f"{number} x {what}" for what, number in total.items()))


def receive(home: NodeHome, say: Say) -> None:
    """Listen for senders until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: receive.yaml does not read, or allows nobody; or deid.yaml does not read.
        BusyError: This node receives already, or a port is taken.
    """
    import signal
    import threading
    import warnings

    from medlsdm_node.receive_settings import load_receive

    settings = load_receive(home)
    load_deid(home).check_segmenter()
    warnings.simplefilter("ignore")  # pydicom's warnings quote the value that they warn of
    threading.excepthook = lambda caught: say(f"A connection ended with {caught.exc_type.__name__}.")
    with home.locked("receive"):
        spool = Spool(home)
        if left := wipe_leftovers(home):
            say(f"{left} folders that an earlier run left in clear when it was killed were deleted.")
        if torn := spool.recover():
            say(f"{torn} half-received files of an earlier run were deleted; they were never acknowledged.")
        doors = _doors(spool, settings)
        intake = Intake(home, spool, doors, settings, say)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(intake, "stopping", True))
        try:
            for door in doors:
                door.start()
                say(f"{door.announcement}. Ctrl-C stops it.")
            intake.run()
        finally:
            for door in doors:
                door.stop()
    say("Stopped.")


def _doors(spool: Spool, settings: ReceiveSettings) -> list[Door]:
    """Return the doors that receive.yaml asks for; what it does not ask for is not even loaded."""
    doors: list[Door] = []
    if settings.calling:
        from medlsdm_node.receive import Receiver

        doors.append(Receiver(spool, settings))
    if settings.web is not None:
        from medlsdm_node.stow import WebDoor

        doors.append(WebDoor(spool, settings, settings.web))
    return doors
