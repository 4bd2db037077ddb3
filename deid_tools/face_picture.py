"""The effect of defacing as a picture: the skin as light falls on it, and a slice, before and after.

A picture shows a patient's face. It stays inside the node and is written nowhere else.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.head import Coarse, body

_PIXEL_MM = 1.0
_GAP = 4


def write_picture(path: Path, volume: Coarse, cut: NDArray[np.bool_]) -> None:
    """Write a PNG with two rows, before and after: the front, the side, and the slice in the middle."""
    values, spacing, turned = _upright(volume, cut)
    air = float(values.min())
    skin = _upright(volume, body(volume))[2]
    rows = []
    for kept in (np.ones_like(turned), ~turned):
        shown = np.where(kept, values, air)
        rows.append(
            _beside(
                [
                    _enlarge(_relief(skin & kept, 1, spacing), spacing[0], spacing[2]),
                    _enlarge(_relief(skin & kept, 0, spacing), spacing[1], spacing[2]),
                    _enlarge(_slice(shown, volume.hu), spacing[1], spacing[2]),
                ]
            )
        )
    _write_png(path, np.concatenate(rows))


def _upright(volume: Coarse, mask: NDArray[np.bool_]) -> tuple[Any, Any, Any]:
    """Turn a volume's axes to the nearest of R, A, S."""
    linear = volume.affine[:3, :3]
    order = [int(np.abs(linear[0]).argmax()), 0, 0]
    rest = [axis for axis in range(3) if axis != order[0]]
    order[1] = max(rest, key=lambda axis: abs(float(linear[1, axis])))
    order[2] = next(axis for axis in rest if axis != order[1])
    flips = tuple(n for n, axis in enumerate(order) if linear[n, axis] < 0)
    values = np.flip(np.transpose(volume.values, order), flips)
    return values, volume.spacing[order], np.flip(np.transpose(mask, order), flips)


def _relief(skin: NDArray[np.bool_], axis: int, spacing: Any) -> NDArray[np.uint8]:
    """Shade the surface seen from the front (axis 1) or from the right (axis 0)."""
    seen = np.flip(skin, axis)
    hit = seen.any(axis)
    depth = np.where(hit, seen.argmax(axis) * float(spacing[axis]), np.nan)
    other = [spacing[a] for a in range(3) if a != axis]
    slope_x, slope_y = np.gradient(np.where(hit, depth, np.nanmax(depth) if hit.any() else 0.0), *other)
    light = (0.3 * slope_x + 0.4 * slope_y + 1.0) / np.sqrt(slope_x**2 + slope_y**2 + 1.0)
    return np.where(hit, np.clip(40 + 180 * light, 30, 255), 0).astype(np.uint8)


def _slice(values: NDArray[np.float32], hu: bool) -> NDArray[np.uint8]:
    low, high = (-150.0, 250.0) if hu else (float(values.min()), float(np.percentile(values, 99)))
    middle = values[values.shape[0] // 2]
    return np.clip((middle - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)


def _enlarge(picture: NDArray[np.uint8], width_mm: float, height_mm: float) -> NDArray[np.uint8]:
    """Turn [across, up] to rows from the top, at 1 mm a pixel."""
    wide, high = (max(1, round(float(v) / _PIXEL_MM)) for v in (width_mm, height_mm))
    return np.repeat(np.repeat(np.flipud(picture.T), high, 0), wide, 1)


def _beside(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    height = max(p.shape[0] for p in pictures) + _GAP
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, _GAP))) for p in pictures]
    return np.concatenate(padded, axis=1)


def _write_png(path: Path, grey: NDArray[np.uint8]) -> None:
    """Write an 8-bit grey PNG that only the owner may read (ISO/IEC 15948; no text, no time)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + row.tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)
