"""Every error that a user, another site or a privacy officer may meet.

MedlsdmError                exit 1   something we did not foresee
├── UsageError              exit 2   the command line does not make sense
├── DataError               exit 3   input that cannot be used: empty, unreadable, damaged
│   ├── GeometryError       exit 3   a volume or a label map that does not fit in space
│   ├── SchemaError         exit 3   labels that the label schema does not know
│   └── NotSyntheticError   exit 3   something that is not a SyntheticVolume was to be exported
├── ConfigError             exit 4   settings that are missing or contradict each other
├── PolicyError             exit 5   the site's own policy says no
├── EnrolmentError          exit 6   invitation, identity or certificate is not accepted
├── NetworkError            exit 7   the other side cannot be reached
├── IntegrityError          exit 8   a file was changed after it was written
├── BusyError               exit 9   a port, folder or node is already in use
├── QuarantineError         exit 10  nothing passed admission; see the quarantine list
├── GateError               exit 11  the export gate refused
├── ResourceError           exit 12  memory or disk ran out
└── RoundError              exit 13  a federated round or a program that we supervise failed

Each error carries a message for the person in front of the machine, a hint (what to do next)
and a ``public_text`` without values. Only ``public_text`` may cross the network.
"""

from __future__ import annotations

from typing import ClassVar


class MedlsdmError(Exception):
    """Describe one failure: what happened, what to do, and what may be said in public.

    Args:
        message: One line for the local user. Never a header value or a patient's name.
        hint: What to do next, one line.
    """

    code: ClassVar[str] = "unexpected"
    exit_status: ClassVar[int] = 1
    public_text: ClassVar[str] = "the site met an unexpected error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(MedlsdmError):
    """Say that the command line does not make sense."""

    code = "usage"
    exit_status = 2
    public_text = "the site was started with settings that do not fit together"


class DataError(MedlsdmError):
    """Say that input cannot be used: empty, unreadable, damaged."""

    code = "data"
    exit_status = 3
    public_text = "the site's data could not be used"


class GeometryError(DataError):
    """Say that a volume or a label map does not fit in space."""

    code = "geometry"
    public_text = "the geometry of a volume at the site does not fit"


class SchemaError(DataError):
    """Say that labels are not known to the label schema."""

    code = "schema"
    public_text = "the site's label schema does not match"


class NotSyntheticError(DataError):
    """Say that something other than a SyntheticVolume was to be exported."""

    code = "not-synthetic"
    public_text = "the site refused to export something that is not synthetic"


class ConfigError(MedlsdmError):
    """Say that settings are missing or contradict each other."""

    code = "config"
    exit_status = 4
    public_text = "the site's settings do not fit the request"


class PolicyError(MedlsdmError):
    """Say that the site's own policy refuses."""

    code = "policy"
    exit_status = 5
    public_text = "the site's policy refused the request"


class EnrolmentError(MedlsdmError):
    """Say that an invitation, identity or certificate is not accepted."""

    code = "enrolment"
    exit_status = 6
    public_text = "the invitation or identity was not accepted"


class NetworkError(MedlsdmError):
    """Say that the other side cannot be reached."""

    code = "network"
    exit_status = 7
    public_text = "the connection failed"


class IntegrityError(MedlsdmError):
    """Say that a file was changed after it was written."""

    code = "integrity"
    exit_status = 8
    public_text = "the site found a file that does not match its digest"


class BusyError(MedlsdmError):
    """Say that a port, folder or node is already in use."""

    code = "busy"
    exit_status = 9
    public_text = "the site is busy"


class QuarantineError(MedlsdmError):
    """Say that nothing passed admission."""

    code = "quarantine"
    exit_status = 10
    public_text = "the site admitted no data"


class GateError(MedlsdmError):
    """Say that the export gate refused."""

    code = "gate"
    exit_status = 11
    public_text = "the site's export gate refused"


class ResourceError(MedlsdmError):
    """Say that memory or disk ran out."""

    code = "resource"
    exit_status = 12
    public_text = "the site ran out of memory or disk"


class RoundError(MedlsdmError):
    """Say that a round, or a program that we supervise, failed."""

    code = "round"
    exit_status = 13
    public_text = "the round failed at the site"


UNTOLD = "the site met an error that it may not describe"


def public_texts() -> frozenset[str]:
    """Return every sentence about an error that may cross the network."""
    kinds = [MedlsdmError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(kind.public_text for kind in kinds) | {UNTOLD}
