"""One instance on its way into the spool: within limits while it comes, identified and kept when it is whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from medlsdm.errors import MedlsdmError
from medlsdm_node.part10 import SYNTAXES, Identity, identify
from medlsdm_node.receive_settings import ReceiveSettings
from medlsdm_node.spool import Arrival, Outcome, Spool

REFUSED_PREFIX_BYTES = 1 << 16
LOW, FULL, TOO_LARGE = "the disk is low", "the disk is full", "the instance is too large"
NOT_DICOM, SYNTAX = "it is no DICOM file", "its transfer syntax is not taken"
UIDS, CONTRADICTS = "its UIDs cannot be read", "its file meta contradicts its data set"
OTHER_STUDY, OTHER_INSTANCE = "it is of another study", "it is another instance"


@dataclass(frozen=True, slots=True)
class Taken:
    """Say what became of an instance: its study (hashed) and outcome, or why it was refused."""

    identity: Identity = field(repr=False)
    refused: str = ""
    study: str = ""
    outcome: Outcome | None = None


class Taking:
    """Take the bytes of one instance as they come, or let them go once it is refused.

    Args:
        spool: Where it goes.
        settings: Free space that must be left, and how large an instance may be.
    """

    def __init__(self, spool: Spool, settings: ReceiveSettings) -> None:
        self.spool, self.settings = spool, settings
        self.arrival: Arrival | None = None
        self.refused = ""
        self._prefix = bytearray()  # kept of a refused one too: its sender wants to know which one it was
        try:
            if spool.free_bytes() < settings.min_free_bytes:
                self.refused = LOW
            else:
                self.arrival = spool.begin()
        except OSError:
            self.refused = FULL

    def write(self, content: bytes) -> int:
        """Add bytes; memory holds the beginning and one chunk."""
        if self.arrival is not None:
            if self.arrival.bytes + len(content) > self.settings.max_instance_bytes:
                self.refuse(TOO_LARGE)
            else:
                try:
                    return self.arrival.write(content)
                except OSError:
                    self.refuse(FULL)
        self._prefix += content[: max(REFUSED_PREFIX_BYTES - len(self._prefix), 0)]
        return len(content)

    def refuse(self, reason: str) -> None:
        """Let go of what came, and of what comes. The first reason counts."""
        self.refused = self.refused or reason
        if self.arrival is not None:
            self._prefix = self.arrival.prefix
        self.discard()

    def discard(self) -> None:
        """Let go of what is not acknowledged."""
        if self.arrival is not None:
            self.arrival.writer.discard()
            self.arrival = None

    def finish(self, study_uid: str = "", sop_uid: str = "") -> Taken:
        """Keep a DICOM file that is whole, if it says who it is, and is the one that was asked for.

        When this returns with an outcome, the disk has it: the caller may acknowledge.
        """
        identity = identify(self._prefix if self.arrival is None else self.arrival.prefix)
        if not self.refused and (wrong := _wrong(identity, study_uid, sop_uid)):
            self.refuse(wrong)
        return self.keep(identity.sop, identity.syntax, identity)

    def keep(self, sop_uid: str, syntax: str, identity: Identity | None = None) -> Taken:
        """Keep an instance that is whole, of which the caller knows who it is."""
        arrival, self.arrival = self.arrival, None
        identity = identity or Identity(syntax, sop=sop_uid)
        if arrival is None:
            return Taken(identity, self.refused)
        try:
            study, outcome = self.spool.accept(arrival, sop_uid, syntax)
        except OSError:
            arrival.writer.discard()
            return Taken(identity, FULL)
        except MedlsdmError:  # what is remembered of the study cannot be read
            arrival.writer.discard()
            raise
        return Taken(identity, "", study, outcome)


def _wrong(identity: Identity, study_uid: str, sop_uid: str) -> str:
    """Say what is wrong with an instance, if anything is."""
    if not identity.syntax:
        return NOT_DICOM
    if identity.syntax not in SYNTAXES:
        return SYNTAX
    if not (identity.sop and identity.study and identity.sop_class):
        return UIDS
    if identity.media_sop != identity.sop:
        return CONTRADICTS
    if study_uid and identity.study != study_uid:
        return OTHER_STUDY
    return OTHER_INSTANCE if sop_uid and identity.sop != sop_uid else ""
