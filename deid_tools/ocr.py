"""Words in a picture, read by tesseract: the text, how sure it is, and the box that it fills."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal
from deid_tools.crew import deaf_to_stops

WIDTH = 1600
MAX_FACTOR = 8
TIMEOUT_SECONDS = 300
_EDGE = 12
_JOIN_HEIGHTS = 4
_TALLEST_SHARE = 0.2
_SHORTEST = 5
_LINE_CONFIDENCE = 20
_BRIGHT_TAIL = 0.4
_ACCEPTED = ((5, 80, 0.0, 0.0), (4, 45, 0.75, 0.0), (3, 45, 0.9, 0.9), (6, 0, 0.9, 0.9))
"""Letters, confidence in percent, sharpness and contrast that a word must have, in any of these ways."""
_HEADER = "level\tpage_num\tblock_num\tpar_num\tline_num\tword_num\tleft\ttop\twidth\theight\tconf\ttext"

Box = tuple[int, int, int, int]
"""Top, left, bottom, right in pixels; bottom and right are outside."""


@dataclass(frozen=True, slots=True)
class Word:
    """Hold one word that was read, where it lies on the sheet; its text is not kept."""

    letters: int
    confidence: float
    line: tuple[str, ...]
    box: Box


def text_boxes(program: str, images: list[NDArray[Any]]) -> list[Box]:
    """Return the boxes of text in pictures of one size [Y, X], read in one call; empty where there is none.

    A word counts where it is long and sure, or less sure and drawn: what a scanner measures is
    blurred, so anatomy that looks like letters has soft edges. Where a word counts, the other words on its
    line do too. The boxes have a margin of half the height of the letters, and reach from word to
    word along a row.

    Raises:
        Refusal: The program failed or took too long.
    """
    panels = [(image, panel) for image in images for panel in _panels(image)]
    if not panels:
        return []
    height, width = images[0].shape
    factor = min(max(1, round(WIDTH / width)), MAX_FACTOR)
    sheet = np.concatenate([_framed(panel) for _, panel in panels])
    tallest = _TALLEST_SHARE * height * factor
    words = []
    for word in _read(program, _enlarge(sheet, factor)):
        if _SHORTEST * factor <= word.box[2] - word.box[0] <= tallest:
            panel = min(int(word.box[0] / factor // (height + 2 * _EDGE)), len(panels) - 1)
            words.append((word, _place(word.box, factor, (height, width), panel), panels[panel][0]))
    lines = {word.line for word, box, image in words if _is_text(word, image, box)}
    return _joined(
        [
            _with_margin(box, (height, width))
            for word, box, _ in words
            if word.line in lines and (word.letters >= 2 or word.confidence >= _LINE_CONFIDENCE)
        ]
    )


def _is_text(word: Word, image: NDArray[Any], box: Box) -> bool:
    """Tell whether a word is text rather than anatomy, by how it was read and how sharply it is drawn."""
    sharpness, contrast = _drawing(image, box)
    return any(
        word.letters >= letters and word.confidence >= confidence and sharpness >= sharp and contrast >= strong
        for letters, confidence, sharp, strong in _ACCEPTED
    )


def _drawing(image: NDArray[Any], box: Box) -> tuple[float, float]:
    """Return how sharp a patch is and how strong, both about 1 for drawn text.

    Sharpness is the share of the patch's range that lies between neighbouring pixels at its edges;
    contrast is its range over that of the whole picture.
    """
    top, left, bottom, right = box
    patch = image[top:bottom, left:right].astype(np.float64)
    if min(patch.shape) < 3:
        return 0.0, 0.0
    low, high = np.percentile(patch, (2, 98))
    if high <= low:
        return 0.0, 0.0
    steps = np.maximum(np.abs(np.diff(patch, axis=1))[:-1], np.abs(np.diff(patch, axis=0))[:, :-1])
    darkest, brightest = np.percentile(image, (1, 99))
    return float(np.percentile(steps, 90) / (high - low)), float((high - low) / max(brightest - darkest, 1.0))


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


def _place(box: Box, factor: int, shape: tuple[int, int], panel: int) -> Box:
    """Bring a box of the enlarged sheet back to the picture in one of its panels."""
    top, left, bottom, right = (v / factor for v in box)
    shift = panel * (shape[0] + 2 * _EDGE) + _EDGE
    return (
        max(0, int(top - shift)),
        max(0, int(left - _EDGE)),
        max(0, min(shape[0], int(np.ceil(bottom - shift)))),
        max(0, min(shape[1], int(np.ceil(right - _EDGE)))),
    )


def _with_margin(box: Box, shape: tuple[int, int]) -> Box:
    top, left, bottom, right = box
    margin = int(np.ceil(2 + 0.5 * (bottom - top)))
    return (
        max(0, top - margin),
        max(0, left - margin),
        min(shape[0], bottom + margin),
        min(shape[1], right + margin),
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
    content = f"P5 {picture.shape[1]} {picture.shape[0]} 255\n".encode() + picture.tobytes()
    command, pipe = [program, "stdin", "stdout", "--psm", "11", "tsv"], subprocess.PIPE
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    try:
        with deaf_to_stops():
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        with process:
            try:
                answer, _ = process.communicate(content, TIMEOUT_SECONDS)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise Refusal("the search for burned-in text failed")
    except (subprocess.SubprocessError, OSError):
        raise Refusal("the search for burned-in text failed") from None
    head, *lines = answer.decode("utf-8", "replace").splitlines() or [""]
    rows = [line.split("\t") for line in lines]
    page = [str(picture.shape[1]), str(picture.shape[0])]
    if head != _HEADER or not any(row[0] == "1" and row[8:10] == page for row in rows):
        raise Refusal("the search for burned-in text failed")  # no table of this picture: silence is not "no text"
    words = []
    for row in rows:
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
