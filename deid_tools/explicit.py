"""Read explicit little endian DICOM byte by byte: a strict reader of its own for what this program writes.

It shares no code with the library that wrote the file, accepts nothing that this program does not
write, and accounts for every byte: what cannot be read as an element is a refusal.

Source: PS3.5 section 7.1.2 (explicit VR), 7.5 (sequences), PS3.10 section 7.1 (file meta).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal

MAX_DEPTH = 8
EXPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2.1\0"
_SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_ITEM = 0xFFFEE000
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_MALFORMED = "the written file is not well formed"


class TagNumber(int):
    """A tag as one number, group and element."""

    @property
    def is_private(self) -> bool:
        """Tell whether the group is odd."""
        return bool(self >> 16 & 1)


@dataclass(frozen=True, slots=True)
class Element:
    """Hold one element as it stands: its bytes, or the items of a sequence."""

    tag: TagNumber
    VR: str
    value: memoryview
    items: tuple[tuple[Element, ...], ...] = ()

    def text(self) -> str:
        """Return the value as UTF-8 text without its padding.

        Raises:
            Refusal: It is not UTF-8.
        """
        try:
            return bytes(self.value).decode("utf-8").rstrip(" \0")
        except UnicodeDecodeError:
            raise Refusal("a text value is not UTF-8") from None


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Hold what one file says: preamble, file meta and data set, in the order of the file."""

    preamble: bytes
    meta: tuple[Element, ...]
    body: tuple[Element, ...]

    def find(self, tag: int) -> Element | None:
        """Return the top element with a tag, from the data set."""
        return next((e for e in self.body if e.tag == tag), None)


def read_written(content: bytes) -> WrittenFile:
    """Take a whole file apart.

    Raises:
        Refusal: It is not the one form that this program writes.
    """
    if len(content) < 144 or content[128:132] != b"DICM":
        raise Refusal("the written file is not DICOM")
    view = memoryview(content)
    try:
        tag, vr, start, length = _head(view, 132)
        if (tag, vr, length) != (0x00020000, "UL", 4):
            raise Refusal(_MALFORMED)
        end = start + 4 + struct.unpack_from("<L", view, start)[0]
        meta = _elements(view, 132, end, 0)
        syntax = [bytes(e.value) for e in meta if e.tag == 0x00020010]
        if syntax != [EXPLICIT_LITTLE_ENDIAN]:
            raise Refusal("the written file is not in explicit little endian")
        return WrittenFile(content[:128], meta, _elements(view, end, len(view), 0))
    except struct.error:
        raise Refusal(_MALFORMED) from None


def _head(view: memoryview, at: int) -> tuple[int, str, int, int]:
    """Return tag, VR, where the value starts, and its length."""
    group, element, vr = struct.unpack_from("<HH2s", view, at)
    if vr in _SHORT:
        return group << 16 | element, vr.decode(), at + 8, struct.unpack_from("<H", view, at + 6)[0]
    reserved, length = struct.unpack_from("<HL", view, at + 6)
    if vr not in _LONG or reserved:
        raise Refusal(_MALFORMED)
    return group << 16 | element, vr.decode(), at + 12, length


def _elements(view: memoryview, at: int, end: int, depth: int) -> tuple[Element, ...]:
    """Read elements up to ``end``; tags must ascend, so that none stands twice."""
    if depth > MAX_DEPTH or end > len(view):
        raise Refusal(_MALFORMED)
    found: list[Element] = []
    last = -1
    while at < end:
        tag, vr, start, length = _head(view, at)
        at = start + length
        if tag <= last or length == _UNDEFINED or length % 2 or at > end:
            raise Refusal(_MALFORMED)
        last = tag
        items = _items(view, start, at, depth + 1) if vr == "SQ" else ()
        found.append(Element(TagNumber(tag), vr, view[start:at], items))
    return tuple(found)


def _items(view: memoryview, at: int, end: int, depth: int) -> tuple[tuple[Element, ...], ...]:
    items = []
    while at < end:
        group, element, length = struct.unpack_from("<HHL", view, at)
        if (group << 16 | element) != _ITEM or length == _UNDEFINED or at + 8 + length > end:
            raise Refusal(_MALFORMED)
        items.append(_elements(view, at + 8, at + 8 + length, depth))
        at += 8 + length
    return tuple(items)


def frames_of(written: WrittenFile) -> NDArray[np.generic] | None:
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
