"""Folders of ``run/`` in which originals lie in clear while something works on them: private, and wiped.

Who works in a folder holds a lock on it, which ends with the process however that ends. A folder that nobody holds is
what a killed run left: the next ``ingest``, ``receive``, ``pull``, ``join`` or ``quarantine release`` deletes it, and
``status`` counts it until then. Deleting is unlinking: what the disk keeps below is for its own encryption.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medlsdm.errors import ResourceError
from medlsdm_node.home import NodeHome

INGEST, STUDY = "ingest-", "study-"


@contextmanager
def working_folder(home: NodeHome, prefix: str) -> Iterator[Path]:
    """Make a folder, mode 0700, that is deleted when the block ends; what killed runs left goes first.

    Args:
        home: The node.
        prefix: ``INGEST`` or ``STUDY``.
    """
    wipe_leftovers(home)
    with _gate(home):
        folder = Path(tempfile.mkdtemp(dir=home.run, prefix=prefix))
        handle = _claim(folder)
    assert handle is not None, "nobody else claims a folder while the gate is held"
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        finally:
            os.close(handle)


def wipe_leftovers(home: NodeHome) -> int:
    """Delete the folders that nobody works in any more, write down that it was done, and return how many.

    Raises:
        ResourceError: One cannot be deleted.
    """
    wiped = 0
    try:
        with _gate(home), _abandoned(home) as folders:
            for folder in folders:
                shutil.rmtree(folder)
                wiped += 1
    except OSError as error:
        raise ResourceError(
            "What a killed run left in clear cannot be deleted.", f"Delete ingest-* and study-* in {home.run}."
        ) from error
    if wiped:
        home.audit.append("leftovers-wiped", folders=wiped)
    return wiped


def leftovers(home: NodeHome) -> int:
    """Return how many folders hold what a killed run left in clear."""
    if not home.run.is_dir():
        return 0
    with _gate(home), _abandoned(home) as folders:
        return len(folders)


@contextmanager
def _abandoned(home: NodeHome) -> Iterator[list[Path]]:
    """Claim every folder that nobody works in, for the block."""
    claimed: dict[Path, int] = {}
    try:
        for folder in sorted(home.run.iterdir()):
            if folder.name.startswith((INGEST, STUDY)) and folder.is_dir() and not folder.is_symlink():
                handle = _claim(folder)
                if handle is not None:
                    claimed[folder] = handle
        yield list(claimed)
    finally:
        for handle in claimed.values():
            os.close(handle)


def _claim(folder: Path) -> int | None:
    """Lock a folder, and return the handle that holds the lock; None where somebody else holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _gate(home: NodeHome) -> Iterator[None]:
    """Hold, for a moment, what making and wiping folders have in common: one that is made is not taken for left."""
    home.run.mkdir(parents=True, exist_ok=True)
    with (home.run / "working.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
