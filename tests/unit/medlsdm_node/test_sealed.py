"""Files that are written encrypted: what comes back, and what is noticed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from medlsdm.errors import IntegrityError
from medlsdm_node.sealed import CHUNK_BYTES, SealedWriter, read_sealed

KEY = b"k" * 32


def seal(path, content: bytes, step: int = 100_003) -> None:
    writer = SealedWriter(path, KEY)
    for start in range(0, len(content), step):
        writer.write(content[start : start + step])
    writer.finish()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_what_was_sealed_comes_back(tmp_path, size):
    content = os.urandom(size)
    seal(tmp_path / "x", content)
    assert b"".join(read_sealed(tmp_path / "x", KEY)) == content
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_nothing_lies_in_clear_and_equal_files_look_different(tmp_path):
    content = b"DOE^JANE" * 300_000
    for name in ("a", "b"):
        seal(tmp_path / name, content)
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert b"DOE^" not in a
    assert a != b


def test_every_change_is_noticed(tmp_path):
    seal(tmp_path / "x", os.urandom(2 * CHUNK_BYTES + 5))
    good = (tmp_path / "x").read_bytes()
    chunk = CHUNK_BYTES + 16
    head, first, second = good[:20], good[20 : 20 + chunk], good[20 + chunk : 20 + 2 * chunk]
    last = good[20 + 2 * chunk :]
    bad = {
        "a bit": good[:500] + bytes([good[500] ^ 1]) + good[501:],
        "swapped": head + second + first + last,
        "dropped": head + first + last,
        "cut at a chunk": head + first + second,
        "cut in a chunk": good[:-1],
        "longer": good + b"x",
        "repeated": head + first + first + second + last,
        "other salt": good[:4] + bytes(16) + good[20:],
        "other kind": b"MLV1" + good[4:],
        "only a head": head,
        "nothing": b"",
    }
    for what, content in bad.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(IntegrityError):
            list(read_sealed(tmp_path / "x", KEY))
        assert content != good, what
    (tmp_path / "x").write_bytes(good)
    with pytest.raises(IntegrityError):
        list(read_sealed(tmp_path / "x", b"z" * 32))


FULL = """
import os, resource, sys
from pathlib import Path
from medlsdm_node.sealed import SealedWriter, read_sealed

for room in (0, 10):  # not even the head fits
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        SealedWriter(Path(sys.argv[1]) / "x", b"k" * 32)
    except OSError:
        print(os.listdir(sys.argv[1]))
"""


def test_a_disk_that_is_full_leaves_no_file_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[]\n[]\n", done.stderr


def test_a_writer_that_is_discarded_leaves_nothing_and_never_overwrites(tmp_path):
    writer = SealedWriter(tmp_path / "x", KEY)
    writer.write(b"abc")
    with pytest.raises(FileExistsError):
        SealedWriter(tmp_path / "x", KEY)
    writer.discard()
    assert list(tmp_path.iterdir()) == []
