"""The second pass over whole series: burned-in text once more, and what dciodvfy says where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deid_tools.admit import Refusal
from deid_tools.explicit import frames_of, read_written
from deid_tools.pixels import TextSearch

_CHECKER_SECONDS = 60
_NEWER_THAN_THE_CHECKER = "(0x0008,0x001c)"


def series_folders(folder: Path) -> Iterator[Path]:
    """Yield every folder, at any depth, that holds DICOM files."""
    yield from sorted({path.parent for path in folder.rglob("*.dcm") if path.is_file() and not path.is_symlink()})


def check_text(series: Path) -> list[str]:
    """Search the maximum projection of one series' written images for text; one call of tesseract a picture size."""
    search = TextSearch()
    try:
        for path in sorted(series.glob("*.dcm")):
            frames = frames_of(read_written(path.read_bytes()))
            if frames is not None:
                search.add(frames)
        return ["text seems to be burned into its pixels"] if search.found() else []
    except (Refusal, OSError, MemoryError, ValueError, struct.error):
        return ["burned-in text could not be searched"]


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
