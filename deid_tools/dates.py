"""Dates of one patient, moved together: whole days under the site's key, so that intervals stay.

A value is read by its own rules here (PS3.5 6.2): DA, DT and TM, cut short ("2019", "201903"), ranges
("20190101-20190301"), several values, time zones. Times of day are checked and never moved. What
cannot be read is removed, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, timedelta

from deid_tools.keys import SiteKeys
from deid_tools.uids import keyed_digest, patient_parts

LONGEST_SHIFT_DAYS = 1825
LONGEST_TEXT = 1024
_DAY = re.compile(r"(\d{4})(?:(\d{2})(\d{2})?)?")
_OLD_DAY = re.compile(r"(\d{4})\.(\d{2})\.(\d{2})")
_TIME = re.compile(r"([01]\d|2[0-3])(?:([0-5]\d)(?:([0-5]\d|60)(\.\d{1,6})?)?)?")
_OLD_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)(?::([0-5]\d|60)(\.\d{1,6})?)?")
_ZONE = re.compile(r"(?:\+(?:0\d|1[0-3])[0-5]\d|\+1400|-(?:0[1-9]|1[01])[0-5]\d|-00[1-5]\d|-1200)")


def day_shift(keys: SiteKeys, issuer: str, patient_id: str) -> int:
    """Return by how many days a patient's dates move: 1 to 1825 into the past, each as likely."""
    digest = keyed_digest(keys.date, "shift", *patient_parts(issuer, patient_id))
    return -1 - int.from_bytes(digest[:16], "big") % LONGEST_SHIFT_DAYS


def shift(vr: str, value: str, days: int) -> str:
    """Return a DA, DT, TM or time zone with its dates moved; an empty string if any of its values cannot be read.

    Args:
        vr: DA, DT or TM; anything else is a time zone (SH: TimezoneOffsetFromUTC).
        value: As it stands in the file; several values are parted by backslashes.
        days: Whole days, as ``day_shift`` gives them.
    """
    one = {"DA": _dates, "DT": _moments, "TM": _times}.get(vr, _zone)
    if len(value) > LONGEST_TEXT:
        return ""
    values = [one(part.strip(" \0"), days) for part in value.split("\\")]
    return "\\".join(values) if all(values) else ""


def read_day(text: str) -> date | None:
    """Return a full date, or None if this is not one."""
    found = _DAY.fullmatch(text) or _OLD_DAY.fullmatch(text)
    if not found or not found[3]:
        return None
    try:
        return date(int(found[1]), int(found[2]), int(found[3]))
    except ValueError:
        return None


def _dates(text: str, days: int) -> str:
    return _range(text, lambda part: _moved(part, days))


def _times(text: str, days: int) -> str:
    def one(part: str) -> str:
        return part.replace(":", "") if _TIME.fullmatch(part) or _OLD_TIME.fullmatch(part) else ""

    return _range(text, one)


def _zone(text: str, days: int) -> str:
    return text if _ZONE.fullmatch(text) else ""


def _moments(text: str, days: int) -> str:
    """Move a DT or a range of them; a dash may also begin a time zone, so the whole is tried first."""
    whole = _moment(text, days)
    if whole:
        return whole
    for at in (i for i, c in enumerate(text) if c == "-"):
        ends = [(_moment(part, days), not part) for part in (text[:at], text[at + 1 :])]
        if all(moved or empty for moved, empty in ends) and any(moved for moved, _ in ends):
            return "-".join(moved for moved, _ in ends)
    return ""


def _moment(text: str, days: int) -> str:
    zone = text[-5:] if _ZONE.fullmatch(text[-5:]) and len(text) >= 9 else ""
    rest = text[: len(text) - len(zone)]
    day, clock = rest[:8], rest[8:]
    if (clock and not _TIME.fullmatch(clock)) or not _DAY.fullmatch(day):
        return ""
    moved = _moved(day, days)
    return moved + clock + zone if moved else ""


def _range(text: str, one: Callable[[str], str]) -> str:
    ends = text.split("-")
    if len(ends) == 1:
        return one(text)
    if len(ends) != 2 or not any(ends):
        return ""
    moved = [one(end.strip()) if end.strip() else "" for end in ends]
    return "-".join(moved) if all(bool(m) == bool(e.strip()) for m, e in zip(moved, ends, strict=True)) else ""


def _moved(text: str, days: int) -> str:
    """Move one date; one cut short moves as its middle and is cut to the same length again."""
    found = _DAY.fullmatch(text) or _OLD_DAY.fullmatch(text)
    if not found:
        return ""
    year, month, day = (int(part) if part else None for part in found.groups())
    try:
        moved = date(year or 0, month or 7, day or (15 if month else 1)) + timedelta(days=days)
    except (ValueError, OverflowError):
        return ""
    length = 8 if day is not None else 6 if month is not None else 4
    return moved.strftime("%Y%m%d").rjust(8, "0")[:length]
