"""Checks on input that several places share. Each raises a MedlsdmError that says what to do."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

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
    with writing(path, mode=mode) as draft:
        draft.write_bytes(content)


@contextmanager
def writing(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Give a temporary file to write to; it is synced and renamed into place at the end, or deleted after an error.

    Raises:
        ResourceError: It cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb+") as stream:  # whoever wrote may have put another file in its place
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = ""
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise ResourceError(
            f"{path.name} could not be written ({reason}).", "Check free space and permissions."
        ) from error
    finally:
        if temporary:  # whatever stopped us, Ctrl-C included, no draft stays behind
            Path(temporary).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
