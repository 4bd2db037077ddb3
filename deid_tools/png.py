"""Grey pictures as PNG (ISO/IEC 15948) with nothing in them but pixels: no text, no time, no colour profile."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medlsdm.checks import write_atomic


def encode_png(grey: NDArray[np.uint8]) -> bytes:
    """Return an 8-bit grey picture [Y, X] as PNG."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + row.tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only the owner may read, in a folder that only the owner may enter; whole, or not at all.

    A link of its name is replaced and not followed.

    Raises:
        ResourceError: The disk refused it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, content, mode=0o600)
