"""The two folders of a run: what may be read from the source, and what may be written to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deid_tools.admit import MAX_FILES
from deid_tools.report import PROGRAM
from medlsdm.checks import write_atomic
from medlsdm.errors import DataError


def check_output(source: Path, out: Path) -> None:
    """Raise DataError unless ``out`` is absent, empty or an earlier output, and apart from the source."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise DataError("The output folder and the source folder lie in each other.", "Choose another output folder.")
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError("The output is a file.", "Choose another output folder.")
    if any(out.iterdir()):
        try:
            known = json.loads((out / "report.json").read_text())["program"] == PROGRAM
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise DataError(
                "The output folder holds files that are not an earlier output.", "Choose an empty output folder."
            )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the output folder, and keep other runs out of it: they would take each other's working files.

    Raises:
        DataError: Another run is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            "Another run writes into the output folder.", "Wait for it, or choose another folder."
        ) from None
    finally:
        os.close(handle)


def check_same_run(out: Path, recipe_sha256: str, key_id: str, pixel_policy: str) -> None:
    """Raise DataError if an earlier run wrote into ``out`` with other settings: the two must not mix."""
    if not (out / "report.json").exists():
        return
    earlier = json.loads((out / "report.json").read_text())
    if earlier.get("key_id", key_id) != key_id:
        raise DataError(
            "The output folder was made with another key or for another project.",
            "Choose an empty output folder, or give the key and project of the earlier run.",
        )
    if earlier.get("recipe_sha256", recipe_sha256) != recipe_sha256:
        raise DataError(
            "The output folder was made with another recipe or other options.",
            "Choose an empty output folder, or give the recipe and options of the earlier run.",
        )
    if earlier.get("pixel_policy", pixel_policy) != pixel_policy:
        raise DataError(
            "The output folder was made with other settings for text and faces, or with or without tesseract.",
            "Choose an empty output folder, or give the settings of the earlier run.",
        )


def start_output(out: Path, recipe_sha256: str, key_id: str, pixel_policy: str) -> None:
    """Mark the folder as ours and unfinished before anything is written, so that a run that was killed can resume."""
    for leftover in out.glob(".working-*"):
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink()
        else:
            shutil.rmtree(leftover)
    report = out / "report.json"
    mark = json.loads(report.read_text()) if report.exists() else {}
    if mark.get("finished") is not False:
        mark |= {"program": PROGRAM, "finished": False, "recipe_sha256": recipe_sha256, "key_id": key_id}
        mark["pixel_policy"] = pixel_policy
        write_atomic(out / "report.json", json.dumps(mark).encode())


def walk(source: Path, hold: Callable[[Path, str], None]) -> list[Path]:
    """List the files below a folder by path; links, devices and unreadable folders are held."""
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        hold(Path(error.filename or source), "the folder cannot be read")

    for folder, subfolders, names in os.walk(source, onerror=unreadable):
        subfolders.sort()
        for name in [s for s in subfolders if (Path(folder) / s).is_symlink()]:
            hold(Path(folder) / name, "symbolic links are not followed")
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_symlink() or not path.is_file():
                hold(path, "symbolic links and devices are not followed")
                continue
            files.append(path)
            if len(files) > MAX_FILES:
                raise DataError(f"The source holds more than {MAX_FILES} files.", "De-identify it in parts.")
    if not files:
        raise DataError("The source folder holds no files.", "Put the DICOM files there first.")
    return files
