"""Pixels: decoded and cut to what the header declares, and gathered to be searched for burned-in text."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal
from deid_tools.filters import filters
from deid_tools.ocr import Box, text_boxes

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

OCR_ABSENT = "burned-in text was not checked: tesseract is not installed"
OCR_PRESENT = "burned-in text was checked on each series' maximum and minimum projection"

FIXED_FRAMES = 8
FIXED_PIXELS = 24
INK_PIXELS = 60
INK_SHARE = 0.3
EIGHT_BITS = 255
SMALL_SERIES = 3
LEGIBLE_PIXELS = 64
STROKE_PIXELS = 8
_MARGIN = 3


def take_pixels(source: Dataset, target: Dataset) -> NDArray[Any]:
    """Move the pixels as plain little endian values, cut to the declared grid, and return them [frames, Y, X].

    Decoding drops what else may hide in a compressed stream or behind the last pixel.

    Raises:
        Refusal: Pixels are missing, cut short, cannot be decoded or use bits above BitsStored.
    """
    frames = int(source.get("NumberOfFrames", None) or 1)
    shape = (frames, int(source.Rows), int(source.Columns))
    allocated = int(source.BitsAllocated)
    if allocated == 1:
        content = _one_bit(source, shape)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = np.asarray(source.pixel_array).reshape(shape)
        except Exception:
            raise Refusal("its pixels are missing, cut short or cannot be decoded") from None
        if allocated not in (8, 16) or content.dtype.kind not in "iu":
            raise Refusal("its pixels are not 8 or 16 bit integers")
        _check_bits(content, source)
    raw = content if isinstance(content, bytes) else content.astype(f"<{content.dtype.kind}{allocated // 8}").tobytes()
    target.add_new(0x7FE00010, "OW" if allocated == 16 else "OB", raw + b"\0" * (len(raw) % 2))
    if isinstance(content, bytes):
        return np.zeros(shape, np.uint8)
    return content


def _one_bit(source: Dataset, shape: tuple[int, int, int]) -> bytes:
    expected = -(-shape[0] * shape[1] * shape[2] // 8)
    raw = bytes(source.get("PixelData", b""))
    if source.file_meta.TransferSyntaxUID.is_compressed:
        raise Refusal("compressed one-bit pixels are not supported")
    if len(raw) < expected:
        raise Refusal("its pixels are missing, cut short or cannot be decoded")
    return raw[:expected]


def _check_bits(content: NDArray[Any], source: Dataset) -> None:
    """Refuse native pixels that carry more than values: the decoder has already dropped the upper bits."""
    allocated, stored = int(source.BitsAllocated), int(source.BitsStored)
    if stored >= allocated or source.file_meta.TransferSyntaxUID.is_compressed:
        return
    raw = np.frombuffer(source.PixelData, f"<u{allocated // 8}", count=content.size).reshape(content.shape)
    as_written = content.astype(f"<{content.dtype.kind}{allocated // 8}").view(raw.dtype)
    if (raw >> stored).any() and not np.array_equal(raw, as_written):
        raise Refusal("bits above BitsStored are in use; an overlay may hide there")


@dataclass(slots=True)
class Projection:
    """Hold what is kept of all frames of one size: brightest and darkest values, and the rules' boxes.

    ``singles`` are the frames themselves while they are so few that projecting them saves nothing.
    """

    brightest: NDArray[Any]
    darkest: NDArray[Any]
    frames: int = 0
    singles: list[NDArray[Any]] = field(default_factory=list)
    declared: set[Box] = field(default_factory=set)

    def merge(self, later: Projection) -> None:
        """Fold in the frames of another stretch of the same size."""
        np.maximum(self.brightest, later.brightest, out=self.brightest)
        np.minimum(self.darkest, later.darkest, out=self.darkest)
        self.frames += later.frames
        self.singles = [*self.singles, *later.singles] if self.frames <= SMALL_SERIES else []
        self.declared |= later.declared

    def background(self) -> float:
        """Return the value that the border of the frames holds most often."""
        low = self.darkest
        border = np.concatenate([low[0], low[-1], low[:, 0], low[:, -1]])
        values, counts = np.unique(border, return_counts=True)
        return float(values[counts.argmax()])

    def pictures(self) -> list[NDArray[Any]]:
        """Return what is to be read: the projections, or the frames of a small series."""
        return self.singles or [self.brightest, self.darkest]

    def ink(self) -> list[Box]:
        """Return boxes around sharp bright pixels of one value that stand on the dark: drawn, not scanned."""
        ndimage = filters()

        low, high = float(self.darkest.min()), float(self.brightest.max())
        if high - low <= EIGHT_BITS or min(self.brightest.shape) < LEGIBLE_PIXELS:
            return []  # with few grey values, anatomy holds one value often enough
        bright = self.brightest > low + 0.5 * (high - low)
        dark_near = ndimage.minimum_filter(self.brightest, 5) <= low + 0.1 * (high - low)
        values, counts = np.unique(self.brightest[bright & dark_near], return_counts=True)
        if not len(counts) or counts.max() < INK_PIXELS or counts.max() < INK_SHARE * counts.sum():
            return []
        return _around(_strokes(self.brightest == values[counts.argmax()]) & dark_near)

    def fixed(self) -> list[Box]:
        """Return boxes around bright pixels that have one value on every frame: no anatomy does that."""
        if self.frames < FIXED_FRAMES or min(self.brightest.shape) < LEGIBLE_PIXELS:
            return []
        low, high = float(self.darkest.min()), float(self.brightest.max())
        same = _strokes((self.brightest == self.darkest) & (self.brightest > low + 0.25 * (high - low)))
        return _around(same) if same.sum() >= FIXED_PIXELS else []


def _strokes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out what is thicker than letters are drawn: a phantom's insert, a saturated table."""
    ndimage = filters()
    thick = ndimage.binary_opening(mask, np.ones((STROKE_PIXELS + 1, STROKE_PIXELS + 1), bool))
    return mask & ~ndimage.binary_dilation(thick, iterations=STROKE_PIXELS)


def _around(mask: NDArray[np.bool_]) -> list[Box]:
    ndimage = filters()

    grouped, _ = ndimage.label(ndimage.binary_dilation(mask, iterations=_MARGIN))
    return [(y.start, x.start, y.stop, x.stop) for y, x in ndimage.find_objects(grouped)]


class TextSearch:
    """Gather the frames of one series, and look for burned-in text with tesseract where it is installed."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[int, ...], Projection] = {}

    @staticmethod
    def state() -> str:
        """Say in words whether burned-in text can be checked on this machine."""
        return OCR_PRESENT if shutil.which("tesseract") else OCR_ABSENT

    def add(self, frames: NDArray[Any], declared: Iterable[Box] = ()) -> None:
        """Fold frames [frames, Y, X] into the projections of their size; ``declared`` boxes hold text for sure."""
        seen = Projection(frames.max(axis=0), frames.min(axis=0), len(frames), declared=set(declared))
        seen.singles = list(frames) if len(frames) <= SMALL_SERIES else []
        size = seen.brightest.shape
        if size in self.sizes:
            self.sizes[size].merge(seen)
        else:
            self.sizes[size] = seen

    def merge(self, other: TextSearch) -> None:
        """Fold in what another search of the same series has seen."""
        for size, later in other.sizes.items():
            if size in self.sizes:
                self.sizes[size].merge(later)
            else:
                self.sizes[size] = later

    def found(self) -> dict[tuple[int, ...], list[Box]]:
        """Return the boxes with text by size of frame: declared, fixed in all frames, drawn, or read.


        Raises:
            Refusal: The search itself failed.
        """
        boxes = {size: [*seen.declared, *seen.fixed(), *seen.ink()] for size, seen in self.sizes.items()}
        for size, seen in self.sizes.items():
            boxes[size] += read_boxes(seen.pictures())
        return {size: found for size, found in boxes.items() if found}


def read_boxes(pictures: list[NDArray[Any]]) -> list[Box]:
    """Return the boxes of the words in pictures of one size; none where tesseract is not installed.

    Raises:
        Refusal: The search itself failed.
    """
    program = shutil.which("tesseract")
    return text_boxes(program, pictures) if program else []
