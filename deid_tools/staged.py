"""Files that this run has written and may still change: read with their frames, and written back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import read_strict
from deid_tools.explicit import frames_of, read_written
from deid_tools.modules import save_clean

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def read_staged(path: Path) -> tuple[Dataset, NDArray[Any]]:
    """Return a staged dataset and a copy of its frames [frames, Y, X] as stored."""
    ds = read_strict(path)
    kind = "i" if int(ds.PixelRepresentation) else "u"
    width = int(ds.BitsAllocated) // 8
    frames = int(ds.get("NumberOfFrames", None) or 1)
    shape = (frames, int(ds.Rows), int(ds.Columns))
    values = np.frombuffer(ds.PixelData, f"<{kind}{width}", count=frames * shape[1] * shape[2])
    return ds, values.reshape(shape).copy()


def read_frames_of(path: Path) -> NDArray[Any]:
    """Return the frames [frames, Y, X] of a staged image, read byte by byte, to look at."""
    frames = frames_of(read_written(path.read_bytes()))
    assert frames is not None, "a staged segmentation has no frames to look at"
    return frames


def write_staged(ds: Dataset, frames: NDArray[Any], path: Path) -> None:
    """Write changed frames back in place of a staged file."""
    write_content(ds, frames.tobytes(), path)


def write_content(ds: Dataset, raw: bytes, path: Path) -> None:
    """Write changed pixel data back in place of a staged file."""
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    changed = path.with_suffix(".changed")
    save_clean(ds, changed)
    changed.replace(path)
