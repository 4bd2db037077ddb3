"""Checks on input that several places share. Each raises a MedlsdmError that says what to do."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from medlsdm.errors import DataError, ResourceError


def existing_folder(path: Path, what: str) -> Path:
    """Return ``path`` if it is a folder that holds something, else raise DataError."""
    if not path.is_dir():
        raise DataError(f"{what} {str(path)!r} is not a folder.", "Check the path.")
    if not any(path.iterdir()):
        raise DataError(f"{what} {str(path)!r} is empty.", "Put the files there first.")
    return path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write through a temporary file, fsync, and rename into place, so that no reader sees half a file."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        raise ResourceError(
            f"{path.name} could not be written ({error.strerror}).", "Check free space and permissions."
        ) from error
    finally:
        if temporary:  # whatever stopped us, Ctrl-C included, no draft stays behind
            Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
