"""One file written as a stream and never in clear: AES-256-GCM in chunks, each bound to its place and to the end.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015): a nonce is the chunk's number and a flag for
the last one, under a key of the file's own, so that chunks cannot be dropped, repeated, reordered or cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medlsdm.errors import IntegrityError

MAGIC = b"MLS1"
SALT_BYTES, CHUNK_BYTES, TAG_BYTES = 16, 1 << 20, 16


class SealedWriter:
    """Write a file that is encrypted as it is written, with mode 0600; a file of that name must not exist.

    Args:
        path: The file.
        key: 32 bytes; the file's own key is derived from it and a random salt.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        salt = os.urandom(SALT_BYTES)
        self._cipher, self._count, self._pending = _cipher(key, salt), 0, bytearray()
        self._stream = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)
        try:
            self._write(MAGIC + salt)
        except OSError:
            self.discard()
            raise

    def write(self, content: bytes) -> int:
        """Add bytes; memory holds one chunk at most."""
        self._pending += content
        while len(self._pending) > CHUNK_BYTES:  # the last chunk is kept back: only ``finish`` knows that it is last
            self._seal(bytes(self._pending[:CHUNK_BYTES]), last=False)
            del self._pending[:CHUNK_BYTES]
        return len(content)

    def finish(self) -> None:
        """Write the last chunk and have the disk confirm it."""
        self._seal(bytes(self._pending), last=True)
        self._pending.clear()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def discard(self) -> None:
        """Close and delete the file."""
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def _seal(self, chunk: bytes, *, last: bool) -> None:
        self._write(self._cipher.encrypt(_nonce(self._count, last=last), chunk, MAGIC))
        self._count += 1

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[self._stream.write(left) :]


def read_sealed(path: Path, key: bytes) -> Iterator[bytes]:
    """Yield what was sealed, chunk by chunk. What was yielded is genuine; only after the last chunk is it whole.

    Raises:
        IntegrityError: The file was changed, cut short or sealed by another node.
    """
    size = CHUNK_BYTES + TAG_BYTES
    with path.open("rb") as stream:
        head = stream.read(len(MAGIC) + SALT_BYTES)
        if len(head) != len(MAGIC) + SALT_BYTES or not head.startswith(MAGIC):
            raise _changed()
        cipher, count, chunk = _cipher(key, head[len(MAGIC) :]), 0, stream.read(size)
        while True:
            following = stream.read(size)
            try:
                yield cipher.decrypt(_nonce(count, last=not following), chunk, MAGIC)
            except (InvalidTag, ValueError) as error:
                raise _changed() from error
            if not following:
                return
            chunk, count = following, count + 1


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(hashes.SHA256(), 32, salt, b"medlsdm-sealed-1").derive(key))


def _nonce(count: int, *, last: bool) -> bytes:
    return count.to_bytes(11, "big") + bytes([last])


def _changed() -> IntegrityError:
    return IntegrityError(
        "A received file was changed or damaged in the spool.", "Purge its study and have it sent again."
    )
