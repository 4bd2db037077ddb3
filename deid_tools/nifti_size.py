"""Say how large a NIfTI file claims to be before anything unpacks it: little gzip can hold much."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

from deid_tools.admit import Refusal

HEADER_BYTES = 540
_LAYOUTS = {348: (("8h", 40), ("f", 108)), 540: (("8q", 16), ("q", 168))}
"""By the header's length, NIfTI-1's or NIfTI-2's: how and where it tells the dimensions and the voxels' offset."""
_MOST_BEFORE_VOXELS = 16 * 1024**2
_UNREADABLE = "the NIfTI file is not a label map that can be read"
_LARGE = "the NIfTI file declares a header of more than 16 MiB"


def declared_voxels(path: Path) -> int:
    """Return how many voxels the header declares, of NIfTI-1 or NIfTI-2 in either byte order.

    Raises:
        Refusal: It is not NIfTI, or so much stands before its voxels that reading it is not safe.
    """
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            header = stream.read(HEADER_BYTES)
        order = "<" if int.from_bytes(header[:4], "little") in _LAYOUTS else ">"
        (length,) = struct.unpack_from(f"{order}i", header)
        if length not in _LAYOUTS:
            raise Refusal(_UNREADABLE)
        (kind, at), (offset_kind, offset_at) = _LAYOUTS[length]
        sizes = struct.unpack_from(f"{order}{kind}", header, at)
        (offset,) = struct.unpack_from(f"{order}{offset_kind}", header, offset_at)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error):
        raise Refusal(_UNREADABLE) from None
    if not 1 <= sizes[0] <= 7 or min(sizes[1 : sizes[0] + 1]) < 1:
        raise Refusal(_UNREADABLE)
    if not 0 <= offset <= _MOST_BEFORE_VOXELS:
        raise Refusal(_LARGE)
    return math.prod(sizes[1 : sizes[0] + 1])
