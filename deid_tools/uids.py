"""Keyed replacements for UIDs and patient IDs: equal in, equal out, on every run, and no table to keep."""

from __future__ import annotations

import base64
import hashlib
import hmac

from deid_tools.keys import SiteKeys

STANDARD_ROOT = "1.2.840.10008."


def _mac(key: bytes, *parts: str) -> bytes:
    message = b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)
    return hmac.new(key, message, hashlib.sha256).digest()


def _token(prefix: str, digest: bytes) -> str:
    return f"{prefix}-{base64.b32encode(digest[:10]).decode()}"


def new_uid(keys: SiteKeys, uid: str) -> str:
    """Return ``2.25.`` and 128 keyed bits for a UID; those that the standard defines stay.

    Source: PS3.5 B.2 (UUID derived UIDs have at most 39 digits after the root).
    """
    uid = uid.strip(" \0")
    if uid.startswith(STANDARD_ROOT):
        return uid
    return f"2.25.{int.from_bytes(_mac(keys.uid, 'uid', uid)[:16], 'big')}"


def pseudonym(keys: SiteKeys, issuer: str, patient_id: str) -> str:
    """Return the patient's pseudonym, ``P-`` and 80 keyed bits in base 32."""
    return _token("P", _mac(keys.pseudonym, "patient", issuer.strip().casefold(), patient_id.strip().casefold()))


def series_token(keys: SiteKeys, series_uid: str) -> str:
    """Return the folder name of a series, ``S-`` and 80 keyed bits in base 32."""
    return _token("S", _mac(keys.pseudonym, "series", series_uid.strip(" \0")))
