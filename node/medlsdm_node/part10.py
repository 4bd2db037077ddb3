"""Who an instance is, told by the beginning of its DICOM file: file meta by own code, UIDs of the data set by pydicom.

Source: DICOM PS3.10, section 7.1.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

META_START = 128 + 4 + 12  # preamble, "DICM", and the element that tells the meta group's length
SYNTAXES = [  # in the order of our liking; what the pipeline cannot read is taken and then held with its reason
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.2",
]
_MEDIA_SOP_INSTANCE, _TRANSFER_SYNTAX = 0x00020003, 0x00020010
_LONG = (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN")  # their length has four bytes, after two of padding
_STUDY = 0x0020000D
UID = re.compile(r"[0-9]+(\.[0-9]+)*")


@dataclass(frozen=True, slots=True)
class Identity:
    """Name an instance by its UIDs; "" where the file does not tell one, or tells what is no UID."""

    syntax: str = ""
    media_sop: str = ""
    sop_class: str = ""
    sop: str = ""
    study: str = ""


def is_uid(text: str) -> bool:
    """Tell whether a text is a UID: digits and dots, 64 characters at most."""
    return len(text) <= 64 and UID.fullmatch(text) is not None


def meta_end(prefix: bytes | bytearray) -> int:
    """Return where the data set begins; 0 where this is no beginning of a DICOM file."""
    if len(prefix) < META_START or prefix[128:132] != b"DICM" or prefix[132:140] != b"\x02\0\0\0UL\4\0":
        return 0
    (length,) = struct.unpack_from("<I", prefix, META_START - 4)
    return META_START + length


def identify(prefix: bytes | bytearray) -> Identity:
    """Read the UIDs of an instance from the beginning of its file; in a syntax that is not taken, only that.

    Args:
        prefix: The file, or as much of it as holds StudyInstanceUID (0020,000D).
    """
    meta = _meta(prefix)
    syntax, media_sop = meta.get(_TRANSFER_SYNTAX, ""), meta.get(_MEDIA_SOP_INSTANCE, "")
    if syntax not in SYNTAXES:
        return Identity(syntax)
    found = data_set_uids(prefix, ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"))
    return Identity(syntax, media_sop, *(text if is_uid(text) else "" for text in found))


def data_set_uids(prefix: bytes | bytearray, keywords: tuple[str, ...]) -> list[str]:
    """Return UIDs of the data set, none beyond StudyInstanceUID (0020,000D), as they are; "" for what is not there."""
    from pydicom.filereader import read_partial

    try:
        ds = read_partial(io.BytesIO(bytes(prefix)), lambda tag, vr, length: tag > _STUDY)
        return [str(ds.get(keyword, "") or "").strip(" \0") for keyword in keywords]
    except Exception:  # whatever a hostile header makes the parser raise: the caller will say what is wrong
        return ["" for _ in keywords]


def _meta(prefix: bytes | bytearray) -> dict[int, str]:
    """Return the UIDs of the file meta group, which is in explicit VR little endian whatever follows."""
    end, at, found = meta_end(prefix), META_START, {}
    if not end or end > len(prefix):
        return {}
    while at + 8 <= end:
        group, element, vr, length = struct.unpack_from("<HH2sH", prefix, at)
        at += 8
        if vr in _LONG:
            if at + 4 > end:
                return {}
            (length,) = struct.unpack_from("<I", prefix, at)
            at += 4
        if group != 2 or at + length > end:
            return {}
        if vr == b"UI":
            text = bytes(prefix[at : at + length]).decode("ascii", errors="replace").strip(" \0")
            found[group << 16 | element] = text if is_uid(text) else ""
        at += length
    return found
