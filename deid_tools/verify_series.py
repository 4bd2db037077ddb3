"""The second pass over whole series: burned-in text once more, and what dciodvfy says where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal
from deid_tools.explicit import WrittenFile, read_written
from deid_tools.pixels import TextSearch

_CHECKER_SECONDS = 60
_NEWER_THAN_THE_CHECKER = "(0x0008,0x001c)"
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")


def series_folders(folder: Path) -> Iterator[Path]:
    """Yield every folder, at any depth, that holds DICOM files."""
    yield from sorted({path.parent for path in folder.rglob("*.dcm") if path.is_file() and not path.is_symlink()})


def check_text(series: Path) -> list[str]:
    """Search the maximum projection of one series' written images for text; one call of tesseract a picture size."""
    search = TextSearch()
    try:
        for path in sorted(series.glob("*.dcm")):
            frames = _frames(read_written(path.read_bytes()))
            if frames is not None:
                search.add(frames)
        return ["text seems to be burned into its pixels"] if search.found() else []
    except (Refusal, OSError, MemoryError, ValueError, struct.error):
        return ["burned-in text could not be searched"]


def _frames(written: WrittenFile) -> NDArray[np.generic] | None:
    """Return the pixels of an image [frames, row, column]; of a segmentation, nothing."""
    kind, pixels = written.find(0x00080016), written.find(0x7FE00010)
    if kind is None or pixels is None or kind.text() in _SEGMENTATIONS:
        return None
    rows, columns, bits, signed = (_number(written, t) for t in (0x00280010, 0x00280011, 0x00280100, 0x00280103))
    dtype = np.dtype(f"<{'i' if signed else 'u'}{bits // 8}")
    frames = len(pixels.value) // (dtype.itemsize * rows * columns)
    return np.frombuffer(pixels.value, dtype, count=frames * rows * columns).reshape(frames, rows, columns)


def _number(written: WrittenFile, tag: int) -> int:
    element = written.find(tag)
    if element is None:
        raise ValueError("the pixels have no grid")
    return struct.unpack("<H", element.value)[0]


def check_conformance(path: Path) -> list[str]:
    """Ask dciodvfy whether a file is what its SOP class says; nothing where it is not installed."""
    program = shutil.which("dciodvfy")
    if not program:
        return []
    try:
        done = subprocess.run(
            [program, str(path)], capture_output=True, text=True, errors="replace", timeout=_CHECKER_SECONDS
        )
    except (subprocess.SubprocessError, OSError):
        return ["dciodvfy could not check it"]
    lines = (done.stdout + done.stderr).splitlines()
    errors = sum(line.startswith("Error") and _NEWER_THAN_THE_CHECKER not in line for line in lines)
    return [f"dciodvfy finds {errors} errors of form"] if errors else []
