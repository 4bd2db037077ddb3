"""The second pass over NIfTI files: every byte of the header and of the gzip frame is accounted for."""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path

from deid_tools.originals import Originals

HEADER_BYTES = 352
_FARTHEST = 1e5
_PRINTABLE = re.compile(rb"[ -~]{12}")
_MOST = 8 * 1024**3
_TEXTS = ((4, 39), (56, 70), (124, 252), (328, 344), (348, 352))
"""Where text, intents, old ranges and extensions stand; this program writes zeros there."""


def check_nifti(path: Path, originals: Originals | None) -> list[str]:
    """Return what is wrong with one written NIfTI file, in words."""
    raw = path.read_bytes()
    problems = []
    if path.name.endswith(".gz"):
        if raw[:3] != b"\x1f\x8b\x08" or raw[3] or any(raw[4:8]):
            problems.append("the gzip header holds a name or a time")
        unpack = zlib.decompressobj(wbits=31)
        header = unpack.decompress(raw, HEADER_BYTES)
        declared = _declared(header)
        if declared is None or declared > _MOST:
            return [*problems, "the NIfTI header is not one that this program writes"]
        voxels = unpack.decompress(unpack.unconsumed_tail, declared + 1)
        if not unpack.eof or unpack.unused_data:
            problems.append("bytes follow the voxels")
    else:
        header, voxels = raw[:HEADER_BYTES], raw[HEADER_BYTES:]
        declared = _declared(header)
        if declared is None:
            return [*problems, "the NIfTI header is not one that this program writes"]
    if len(voxels) != declared:
        problems.append("the voxels are longer or shorter than declared")
    if any(any(header[start:end]) for start, end in _TEXTS):
        problems.append("the NIfTI header holds text or an extension")
    if not _plain_numbers(header):
        problems.append("a number of the NIfTI header is not one that this program writes")
    if originals and originals.found_in(header, voxels):
        problems.append("a string of the original is still there")
    return problems


def _plain_numbers(header: bytes) -> bool:
    """Tell whether unused dimensions are empty, there is no scaling, and each length and place is one of a scan."""
    dimensions = struct.unpack_from("<8h", header, 40)
    spacing = struct.unpack_from("<8f", header, 76)
    start, end = struct.unpack_from("<h", header, 74)[0], struct.unpack_from("<h", header, 120)[0]
    slope, intercept = struct.unpack_from("<2f", header, 112)
    places = struct.unpack_from("<18f", header, 256)
    used = 1 + dimensions[0]
    return (
        all(size in (0, 1) for size in dimensions[used:])
        and all(size in (0, 1) for size in spacing[used:])
        and (start, end) == (0, 0)
        and intercept == 0
        and slope in (0, 1)
        and header[122:124] in (b"\0\0", b"\0\2")
        and all(abs(v) < _FARTHEST for v in (*spacing[:used], *places))
        and _PRINTABLE.search(header[76:108] + header[252:328]) is None
    )


def _declared(header: bytes) -> int | None:
    """Return how many bytes of voxels a little endian NIfTI-1 header declares, or None for any other."""
    if len(header) != HEADER_BYTES or header[:4] != struct.pack("<i", 348) or header[344:348] != b"n+1\0":
        return None
    dimensions = struct.unpack_from("<8h", header, 40)
    bits, offset = struct.unpack_from("<h", header, 72)[0], struct.unpack_from("<f", header, 108)[0]
    if not 1 <= dimensions[0] <= 7 or min(dimensions[1 : dimensions[0] + 1]) < 1 or offset != HEADER_BYTES:
        return None
    if bits not in (8, 16, 32, 64):
        return None
    return math.prod(dimensions[1 : dimensions[0] + 1]) * bits // 8
