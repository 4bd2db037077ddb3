"""Read multipart/related as a stream: a part at a time, in pieces, with a limit on everything that is not content.

What is not exactly as it should be is refused: a body that ends early, a delimiter that content could hold, a length
that is not the part's. Source: RFC 2046, section 5.1; RFC 2387; DICOM PS3.18, section 8.6.1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message

from medlsdm.errors import DataError

MAX_HEAD_BYTES = 8192  # the headers of a part, and what comes before the first
MAX_PADDING_BYTES = 256  # blanks after a delimiter
# RFC 2046 allows 70 characters; Orthanc writes 73
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,199}[0-9A-Za-z'()+_,./:=?-]")


def parse_type(value: str) -> tuple[str, dict[str, str]]:
    """Return a Content-Type's media type, in small letters, and its parameters."""
    message = Message()
    message["content-type"] = value
    found = message.get_params(failobj=[("", "")])
    return message.get_content_type(), {str(key).lower(): str(text) for key, text in found[1:]}


def boundary_of(value: str) -> bytes:
    """Return the boundary of a Content-Type ``multipart/related; type="application/dicom"``.

    Raises:
        DataError: It is another type, or has no boundary.
    """
    kind, parameters = parse_type(value)
    boundary = parameters.get("boundary", "")
    if kind != "multipart/related" or parameters.get("type", "application/dicom").lower() != "application/dicom":
        raise DataError("The body is not multipart/related of application/dicom.")
    if not _BOUNDARY.fullmatch(boundary):
        raise DataError("The multipart body has no boundary.")
    return boundary.encode("ascii")


class Part:
    """Hold one part: its headers, names in small letters, and its content, which can be read once."""

    def __init__(self, headers: dict[str, str], content: Iterator[bytes]) -> None:
        self.headers, self.content = headers, content

    @property
    def is_dicom(self) -> bool:
        """Tell whether its content is a DICOM file as it is, not encoded any further."""
        encoding = self.headers.get("content-transfer-encoding", "binary").lower()
        kind, _ = parse_type(self.headers.get("content-type", ""))
        return kind == "application/dicom" and encoding in ("binary", "8bit")


class MultipartReader:
    """Cut a stream into parts.

    Args:
        chunks: The body, in pieces of any size.
        boundary: The boundary that the Content-Type names.
        max_parts: How many parts a body may have.
    """

    def __init__(self, chunks: Iterator[bytes], boundary: bytes, max_parts: int) -> None:
        self._chunks, self._delimiter, self._max_parts = chunks, b"\r\n--" + boundary, max_parts
        self._buffer = bytearray(b"\r\n")  # a delimiter begins a line, and the first may begin the body

    def parts(self) -> Iterator[Part]:
        """Yield the parts in turn; what the caller left of one is passed over.

        Raises:
            DataError: The body is not right, or over a limit.
        """
        before = 0
        for piece in self._until_delimiter():
            before += len(piece)
            if before > MAX_HEAD_BYTES:
                raise DataError("The multipart body does not begin with its boundary.")
        count = 0
        while not self._is_last():
            count += 1
            if count > self._max_parts:
                raise DataError("The multipart body has too many parts.")
            headers = self._headers()
            content = self._measured(headers.get("content-length"))
            yield Part(headers, content)
            for _ in content:
                continue

    def _more(self) -> None:
        try:
            self._buffer += next(self._chunks)
        except StopIteration:
            raise DataError("The multipart body ends before its last boundary.") from None

    def _until_delimiter(self) -> Iterator[bytes]:
        """Yield what comes before the next delimiter, and take the delimiter away."""
        while True:
            at = self._buffer.find(self._delimiter)
            sure = at if at >= 0 else len(self._buffer) - len(self._delimiter) + 1
            if sure > 0:
                piece = bytes(self._buffer[:sure])
                del self._buffer[:sure]
                yield piece
            if at >= 0:
                del self._buffer[: len(self._delimiter)]
                return
            self._more()

    def _is_last(self) -> bool:
        """Read the rest of a delimiter's line, and tell whether it was the closing one."""
        while len(self._buffer) < 2:
            self._more()
        if self._buffer.startswith(b"--"):
            return True
        line = self._take(b"\r\n", MAX_PADDING_BYTES)
        if line.strip(b" \t"):
            raise DataError("A line of the multipart body begins like its boundary and is not.")
        return False

    def _headers(self) -> dict[str, str]:
        while len(self._buffer) < 2:
            self._more()
        if self._buffer.startswith(b"\r\n"):
            del self._buffer[:2]
            return {}
        headers: dict[str, str] = {}
        for line in self._take(b"\r\n\r\n", MAX_HEAD_BYTES).split(b"\r\n"):
            name, colon, value = line.partition(b":")
            key = name.decode("latin-1").lower()
            printable = all(0x20 <= character <= 0x7E or character == 0x09 for character in value)
            if not colon or not re.fullmatch(r"[a-z0-9-]+", key) or key in headers or not printable:
                raise DataError("The headers of a part do not read.")
            headers[key] = value.decode("ascii").strip()
        return headers

    def _take(self, end: bytes, limit: int) -> bytes:
        """Take what comes before ``end``, and ``end`` itself."""
        while (at := self._buffer.find(end, 0, limit + len(end))) < 0:
            if len(self._buffer) > limit + len(end):
                raise DataError("The headers of a part are too long.")
            self._more()
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        return taken

    def _measured(self, announced: str | None) -> Iterator[bytes]:
        """Yield a part's content, and compare its length with the one that its headers tell, if they do."""
        length = 0
        for piece in self._until_delimiter():
            length += len(piece)
            yield piece
        if announced is not None and announced != str(length):
            raise DataError("The length of a part is not the one that its headers tell.")
