"""Open zip archives that nobody vouches for: files under names of our own, within limits, or a reason in words.

No name of an archive ever becomes a path on the disk. What an archive says about its sizes is checked before
anything is written, and counted again while it is written. An archive with anything hostile or unreadable in it is
refused as a whole: a series of which one image is missing must not pass for a whole one.
"""

from __future__ import annotations

import errno
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from deid_tools.admit import MAX_FILE_BYTES, MAX_FILES, Refusal
from medlsdm.volumes import NIFTI_SUFFIXES

MAX_ARCHIVE_BYTES = 64 * 1024**3  # unpacked
MAX_DIRECTORY_BYTES = 64 * 1024**2  # the archive's list of entries is read into memory
MAX_RATIO, RATIO_FREE_BYTES = 200, 256 * 1024**2  # a small archive may shrink as it likes: an empty mask does
MIN_FREE_BYTES = 1024**3  # left on the disk when all is unpacked
_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_PIECE = 1 << 20


def is_archive(path: Path) -> bool:
    """Tell by its first bytes whether a file is a zip archive, whatever its name; an unreadable one is none."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) in _SIGNATURES
    except OSError:
        return False


def unpack(archive: Path, folder: Path, hold: Callable[[Path, str], None]) -> dict[Path, Path]:
    """Unpack an archive into a new folder, and return {file there: the name that people know it by}.

    An archive inside it, and a link, are held one by one.

    Args:
        archive: The zip file.
        folder: A folder that does not exist yet; after a Refusal it does not exist again.
        hold: Called with the known name and the reason of an entry that is held.

    Raises:
        Refusal: The archive may not be used; the reason is in words and quotes nothing of it.
        OSError: The disk is full.
    """
    held: list[tuple[Path, str]] = []
    folder.mkdir(mode=0o700, parents=True)
    try:
        stated = _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            if len(opened.infolist()) != stated:
                raise Refusal("the archive is damaged: it lists fewer or more entries than it says")
            entries = _checked(opened, archive.stat().st_size, shutil.disk_usage(folder).free)
            files = _write(opened, entries, archive, folder, held)
    except Exception as problem:  # on damage zipfile raises BadZipFile, zlib.error, EOFError, OSError and others
        shutil.rmtree(folder)
        if isinstance(problem, (Refusal, MemoryError)) or getattr(problem, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Refusal("the archive is damaged") from None
    for name, reason in held:
        hold(name, reason)
    return files


def _check_directory(archive: Path) -> int:
    """Return how many entries an archive says that it has; refuse a list that would fill the memory unread."""
    with archive.open("rb") as stream:
        start = max(archive.stat().st_size - (_END.size + 0xFFFF + _END64.size + 20), 0)
        stream.seek(start)
        tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise Refusal("the archive is damaged or cut short")
    count, size = _END.unpack_from(tail, at)[4:6]
    if tail[max(at - 20, 0) : at].startswith(b"PK\x06\x07") and at - 20 >= _END64.size:
        count, size = _END64.unpack_from(tail, at - 20 - _END64.size)[7:9]
    if size > MAX_DIRECTORY_BYTES:
        raise Refusal(f"the archive has more than {MAX_FILES} entries, or very long names")
    return count


def _checked(opened: zipfile.ZipFile, packed_bytes: int, free_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the entries that are files, once all of what the archive says about itself is acceptable."""
    entries = opened.infolist()
    if len(entries) > MAX_FILES:
        raise Refusal(f"the archive has more than {MAX_FILES} entries")
    for entry in entries:
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        if ".." in parts or entry.filename.startswith(("/", "\\")) or entry.filename[1:2] == ":":
            raise Refusal("the archive holds a name that points outside of it")
        if entry.flag_bits & 0x1:
            raise Refusal("the archive is encrypted; unpack it with its password and give the folder")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refusal("the archive is packed by a rare method; unpack it and give the folder")
        if entry.file_size > MAX_FILE_BYTES:
            raise Refusal("the archive holds a file larger than 4 GiB")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_ARCHIVE_BYTES:
        raise Refusal("the archive would unpack to more than 64 GiB")
    if total > _budget(packed_bytes):
        raise Refusal(f"the archive would unpack to more than {MAX_RATIO} times its size")
    if total + MIN_FREE_BYTES > free_bytes:
        raise Refusal("the archive does not fit on the disk when it is unpacked")
    files = [entry for entry in entries if entry.file_size or not entry.is_dir()]
    return sorted(files, key=lambda entry: PurePosixPath(entry.filename))  # as in a folder: the same images, in order


def _write(
    opened: zipfile.ZipFile,
    entries: list[zipfile.ZipInfo],
    archive: Path,
    folder: Path,
    held: list[tuple[Path, str]],
) -> dict[Path, Path]:
    files: dict[Path, Path] = {}
    budget = _budget(archive.stat().st_size)
    for number, entry in enumerate(entries):
        inner = PurePosixPath(entry.filename.replace("\\", "/").replace("\0", ""))
        if stat.S_ISLNK(entry.external_attr >> 16):
            held.append((archive / inner, "symbolic links are not followed"))
            continue
        path = folder / f"{number:06d}{_suffix(inner)}"
        budget -= _copy(opened, entry, path, budget)
        if is_archive(path):
            path.unlink()
            held.append((archive / inner, "an archive inside an archive is not opened; unpack it and give the folder"))
            continue
        files[path] = archive / inner
    if not files and not held:
        raise Refusal("the archive is empty")
    return files


def _budget(packed_bytes: int) -> int:
    return max(packed_bytes * MAX_RATIO, RATIO_FREE_BYTES)


def _suffix(inner: PurePosixPath) -> str:
    return next((suffix for suffix in NIFTI_SUFFIXES if inner.name.casefold().endswith(suffix)), "")


def _copy(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, budget: int) -> int:
    """Write one entry and return how many bytes it really has."""
    written = 0
    with opened.open(entry) as source, path.open("xb") as target:
        while piece := source.read(_PIECE):
            written += len(piece)
            if written > min(entry.file_size, budget):
                raise Refusal("the archive unpacks to more than it says")
            target.write(piece)
    if written != entry.file_size:
        raise Refusal("the archive is damaged")
    return written
