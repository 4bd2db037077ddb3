"""Words in a picture, read by tesseract: the text, how sure it is, and the box that it fills."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal

WIDTH = 1600
MAX_FACTOR = 8
TIMEOUT_SECONDS = 300
_EDGE = 12
_JOIN_HEIGHTS = 4
_TALLEST_SHARE = 0.2
_MIN_LETTERS = 3
_MIN_CONFIDENCE = 55
_LINE_CONFIDENCE = 20
_CLEAR, _LONG = (70, 80), 5
_BRIGHT_TAIL = 0.4

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels; bottom and right are outside."""


@dataclass(frozen=True, slots=True)
class Word:
    """Hold one word that was read; its text stays in memory and is never written down."""

    letters: int
    confidence: float
    line: tuple[str, ...]
    box: Box

    @property
    def sure(self) -> bool:
        """Tell whether this is text rather than anatomy: three letters or digits, read with confidence."""
        return self.letters >= _MIN_LETTERS and self.confidence >= _MIN_CONFIDENCE


def text_boxes(program: str, images: list[NDArray[Any]]) -> list[Box]:
    """Return the boxes of text in pictures of one size [Y, X], read in one call; empty where there is none.

    Where a word is sure, the other words on its line count too. The boxes have a margin of half
    the height of the letters, and reach from word to word along a row.

    Raises:
        Refusal: The program failed or took too long.
    """
    panels = [panel for image in images for panel in _panels(image)]
    if not panels:
        return []
    height, width = images[0].shape
    factor = min(max(1, round(WIDTH / width)), MAX_FACTOR)
    sheet = np.concatenate([_framed(panel) for panel in panels])
    tallest = _TALLEST_SHARE * height * factor
    words = [w for w in _read(program, _enlarge(sheet, factor)) if w.box[2] - w.box[0] <= tallest]
    if not _text_at_all(words):
        return []
    lines = {word.line for word in words if word.sure}
    boxes = []
    for word in words:
        if word.line in lines and (word.sure or word.confidence >= _LINE_CONFIDENCE):
            boxes.append(_place(word.box, factor, (height, width)))
    return _joined(boxes)


def _text_at_all(words: list[Word]) -> bool:
    """Tell whether a picture holds text: anatomy gives a word now and then, not several clear ones."""
    clear = sum(word.letters >= _MIN_LETTERS and word.confidence >= _CLEAR[0] for word in words)
    return clear >= 2 or any(word.letters >= _LONG and word.confidence >= _CLEAR[1] for word in words)


def _joined(boxes: list[Box]) -> list[Box]:
    """Add what lies between neighbours of one row of text: a word there may have gone unread."""
    between = []
    for one in boxes:
        for other in boxes:
            height = min(one[2] - one[0], other[2] - other[0])
            same_row = min(one[2], other[2]) - max(one[0], other[0]) > height / 2
            if same_row and 0 < other[1] - one[3] <= _JOIN_HEIGHTS * height:
                between.append((min(one[0], other[0]), one[3], max(one[2], other[2]), other[1]))
    return [*boxes, *between]


def _framed(panel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Set a picture into an edge of its own border's grey: letters that touch the rim are not read."""
    border = np.concatenate([panel[0], panel[-1], panel[:, 0], panel[:, -1]])
    return np.pad(panel, _EDGE, constant_values=int(np.median(border)))


def _place(box: Box, factor: int, shape: tuple[int, int]) -> Box:
    """Bring a box of the enlarged sheet back to the picture, with a margin."""
    top, left, bottom, right = (v / factor for v in box)
    shift = int(top // (shape[0] + 2 * _EDGE)) * (shape[0] + 2 * _EDGE) + _EDGE
    margin = 2 + 0.5 * (bottom - top)
    return (
        max(0, int(top - shift - margin)),
        max(0, int(left - _EDGE - margin)),
        min(shape[0], int(np.ceil(bottom - shift + margin))),
        min(shape[1], int(np.ceil(right - _EDGE + margin))),
    )


def _panels(image: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """Return the picture in grey, and a second time with its bright tail cut where few pixels set the range."""
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return []
    panels = [_grey(image, low, high)]
    bulk = float(np.percentile(image, 99))
    if low < bulk < low + _BRIGHT_TAIL * (high - low):
        panels.append(_grey(image, low, bulk))
    return panels


def _grey(image: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    scaled = (image.astype(np.float32) - low) * (255 / (high - low))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def _read(program: str, picture: NDArray[np.uint8]) -> list[Word]:
    header = f"P5 {picture.shape[1]} {picture.shape[0]} 255\n".encode()
    try:
        answer = subprocess.run(
            [program, "stdin", "stdout", "--psm", "11", "tsv"],
            input=header + picture.tobytes(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
            env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        )
    except (subprocess.SubprocessError, OSError):
        raise Refusal("the search for burned-in text failed") from None
    words = []
    for line in answer.stdout.decode("utf-8", "replace").splitlines()[1:]:
        row = line.split("\t")
        if len(row) != 12 or not row[11].strip():
            continue
        left, top, width, height = (int(v) for v in row[6:10])
        letters = sum(c.isalnum() for c in row[11])
        words.append(Word(letters, float(row[10]), tuple(row[1:5]), (top, left, top + height, left + width)))
    return words


def _enlarge(grey: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    if factor == 1:
        return grey
    from scipy import ndimage

    larger = np.asarray(ndimage.zoom(grey.astype(np.float32), factor, order=1))
    return np.clip(larger, 0, 255).astype(np.uint8)
