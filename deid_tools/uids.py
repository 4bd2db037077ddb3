"""Keyed replacements for UIDs and patient IDs: equal in, equal out, on every run, and no table to keep."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import uuid
from itertools import count

from deid_tools.keys import SiteKeys

STANDARD_ROOT = "1.2.840.10008."
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")


def keyed_digest(key: bytes, *parts: str) -> bytes:
    """Return HMAC-SHA256 of the parts, each preceded by its length, so that no two lists of parts collide."""
    message = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    return hmac.new(key, message, hashlib.sha256).digest()


def _token(prefix: str, digest: bytes) -> str:
    return f"{prefix}-{base64.b32encode(digest[:10]).decode()}"


def new_uid(keys: SiteKeys, uid: str) -> str:
    """Return ``2.25.`` and 128 keyed bits for a UID; those that the dictionary lists stay.

    One number in forty holds digits that read like a date; the next one is taken instead, so that a
    search for dates in what was written finds only dates.

    Source: PS3.5 B.2 (UUID derived UIDs have at most 39 digits after the root).
    """
    uid = uid.strip(" \0")
    if uid.startswith(STANDARD_ROOT) and _is_standard(uid):
        return uid
    drawn = (keyed_digest(keys.uid, "uid", uid, *([str(n)] if n else [])) for n in count())
    return next(u for mac in drawn if not _DATE.search(u := f"2.25.{int.from_bytes(mac[:16], 'big')}"))


def _is_standard(uid: str) -> bool:
    """Tell whether the dictionary lists the UID: under the standard's root anybody can write anything."""
    from pydicom._uid_dict import UID_dictionary

    return uid in UID_dictionary


def fresh_uid() -> str:
    """Return a random UID for something new, which holds no digits that read like a date."""
    return next(u for _ in count() if not _DATE.search(u := f"2.25.{uuid.uuid4().int}"))


def pseudonym(keys: SiteKeys, issuer: str, patient_id: str) -> str:
    """Return the patient's pseudonym, ``P-`` and 80 keyed bits in base 32."""
    return _token("P", keyed_digest(keys.pseudonym, "patient", *patient_parts(issuer, patient_id)))


def patient_parts(issuer: str, patient_id: str) -> tuple[str, str]:
    """Return what makes a patient one and the same: issuer and ID without case and outer blanks."""
    return issuer.strip().casefold(), patient_id.strip().casefold()


def series_token(keys: SiteKeys, series_uid: str) -> str:
    """Return the folder name of a series, ``S-`` and 80 keyed bits in base 32."""
    return _token("S", keyed_digest(keys.pseudonym, "series", series_uid.strip(" \0")))


def study_token(keys: SiteKeys, study_uid: str) -> str:
    """Return the name of a study in reports, ``ST-`` and 80 keyed bits in base 32."""
    return _token("ST", keyed_digest(keys.pseudonym, "study", study_uid.strip(" \0")))
