"""Pixels: decoded and cut to what the header declares, and gathered to be searched for burned-in text."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import ADMITTED, Refusal
from deid_tools.filters import filters
from deid_tools.ocr import Box, text_boxes
from deid_tools.strokes import LEGIBLE_PIXELS, clear_rows, drawn_rows, letter_rows, words_on_dark

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

OCR_ABSENT = "burned-in text was looked for by drawn letters only: tesseract, which reads words, is not installed"
OCR_PRESENT = "burned-in text was looked for: letters that were drawn, on every frame, and words on projections"

FIXED_FRAMES = 8
FIXED_PIXELS = 24
INK_PIXELS = 60
INK_SHARE = 0.3
EIGHT_BITS = 255
SMALL_SERIES = 3
STROKE_PIXELS = 8
LONE_FRAMES = 4
LONE_SHARE, LONE_MOST = 0.2, 0.03
CLEAR_SHARE = 0.2
LONE_READ, LONE_PIXELS = 0.35, 24
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
        if ADMITTED.get(str(source.SOPClassUID)) != "SEG":
            raise Refusal("its pixels are not 8 or 16 bit integers")
        content = _one_bit(source, shape)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = np.asarray(source.pixel_array).reshape(shape)
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a compiled decoder's panic is no Exception
            raise Refusal("its pixels are missing, cut short or cannot be decoded") from None
        if allocated not in (8, 16) or content.dtype.kind not in "iu":
            raise Refusal("its pixels are not 8 or 16 bit integers")
        _check_bits(content, source)
    raw = content
    if not isinstance(content, bytes):
        raw = content.astype(f"<{content.dtype.kind}{allocated // 8}", copy=False).tobytes()
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
    if content.size and int(raw.max()) >> stored:
        as_written = content.astype(f"<{content.dtype.kind}{allocated // 8}").view(raw.dtype)
        if not np.array_equal(raw, as_written):  # the sign may stand in all upper bits
            raise Refusal("bits above BitsStored are in use; an overlay may hide there")


@dataclass(slots=True)
class Projection:
    """Hold what is kept of all frames of one size: brightest and darkest values, and the rules' boxes.

    ``brighter`` and ``darker`` are the second brightest and second darkest values of each pixel, so
    that what stands on one single frame can be told from what the others show there. ``singles``
    are the frames themselves while they are so few that projecting them saves nothing.
    """

    brightest: NDArray[Any]
    darkest: NDArray[Any]
    brighter: NDArray[Any]
    darker: NDArray[Any]
    frames: int = 0
    singles: list[NDArray[Any]] = field(default_factory=list)
    declared: set[Box] = field(default_factory=set)
    drawn: set[Box] = field(default_factory=set)

    @classmethod
    def of(cls, frames: NDArray[Any], declared: Iterable[Box]) -> Projection:
        """Look at the first frames [frames, Y, X] of one size."""
        first = frames[0]
        lowest, highest = np.iinfo(first.dtype).min, np.iinfo(first.dtype).max
        seen = cls(first.copy(), first.copy(), np.full_like(first, lowest), np.full_like(first, highest), 1, [first])
        seen.declared, seen.drawn = set(declared), set(drawn_rows(first))
        for frame in frames[1:]:
            seen.see(frame)
        return seen

    def see(self, frame: NDArray[Any]) -> None:
        """Fold in one more frame [Y, X]."""
        if frame.dtype != self.brightest.dtype:
            self.merge(Projection.of(frame[None], ()))
            return
        both = np.minimum(self.brightest, frame)
        np.maximum(self.brighter, both, out=self.brighter)
        np.maximum(self.brightest, frame, out=self.brightest)
        np.maximum(self.darkest, frame, out=both)
        np.minimum(self.darker, both, out=self.darker)
        np.minimum(self.darkest, frame, out=self.darkest)
        self.frames += 1
        self.singles = [*self.singles, frame] if self.frames <= SMALL_SERIES else []
        self.drawn.update(drawn_rows(frame))

    def merge(self, later: Projection) -> None:
        """Fold in the frames of another stretch of the same size."""
        both = np.minimum(self.brightest, later.brightest)
        self.brighter = np.maximum(np.maximum(self.brighter, later.brighter), both)
        both = np.maximum(self.darkest, later.darkest)
        self.darker = np.minimum(np.minimum(self.darker, later.darker), both)
        self.brightest = np.maximum(self.brightest, later.brightest)
        self.darkest = np.minimum(self.darkest, later.darkest)
        self.frames += later.frames
        self.singles = [*self.singles, *later.singles] if self.frames <= SMALL_SERIES else []
        self.declared |= later.declared
        self.drawn |= later.drawn

    def background(self) -> float:
        """Return the value that the border of the frames holds most often."""
        low = self.darkest
        border = np.concatenate([low[0], low[-1], low[:, 0], low[:, -1]])
        values, counts = np.unique(border, return_counts=True)
        return float(values[counts.argmax()])

    def pictures(self) -> list[NDArray[Any]]:
        """Return what is to be read: the projections, or the frames of a small series.

        What one frame alone shows is a picture too, where it is strong enough to be drawn.
        """
        if self.singles:
            return self.singles
        lone = [over for over in self._alone() if _worth_reading(over, LONE_READ * self._range())]
        return [self.brightest, self.darkest, *lone]

    def _alone(self) -> list[NDArray[Any]]:
        """Return how much the brightest and the darkest frame differ from the next, in each pixel."""
        if self.frames < LONE_FRAMES:
            return []
        return [self.brightest.astype(np.int32) - self.brighter, self.darker.astype(np.int32) - self.darkest]

    def _range(self) -> float:
        """Return the range of grey values, the outermost hundredth left out."""
        return float(np.percentile(self.brightest, 99)) - float(np.percentile(self.darkest, 1))

    def kinds(self) -> dict[str, list[Box]]:
        """Return the boxes by what found them.

        Raises:
            Refusal: The search itself failed.
        """
        return {
            "rule": list(self.declared),
            "drawn": list(self.drawn),
            "fixed": self.fixed(),
            "ink": self.ink(),
            "lone": self.lone(),
            "clear": self.clear(),
            "dark": self.dark(),
            "words": read_boxes(self.pictures()),
        }

    def lone(self) -> list[Box]:
        """Return boxes around rows of letters that stand on one frame, far brighter or darker than all others.

        Where slices are so far apart that anatomy itself stands out, the most striking pixels only are looked at.
        """
        least, found = LONE_SHARE * self._range(), list[Box]()
        for over in self._alone():
            limit = max(least, float(np.percentile(over[::2, ::2], 100 * (1 - LONE_MOST))))
            found += clear_rows(over, over > limit, least)
        return found

    def dark(self) -> list[Box]:
        """Return boxes around words with nothing around them: on all frames, or on one and background on all others."""
        least = LONE_SHARE * self._range()
        views = [(over, 0.0) for over in self._alone()]
        views += [(image, float(np.percentile(image, 1))) for image in self.singles or [self.brightest]]
        return [box for image, low in views for box in words_on_dark(image, low, least)]

    def clear(self) -> list[Box]:
        """Return boxes around rows of sharp letters: on all frames alike, or in a frame that stands alone."""
        low, grey = float(np.percentile(self.darkest, 1)), self._range()
        views = [(self.darkest, 0.35, True), (self.brightest, 0.2, False)]
        if self.singles:
            views = [(f, at, above) for f in self.singles for at, above in ((0.5, True), (0.8, True), (0.15, False))]
        elif self.frames < LONE_FRAMES:
            return []
        found: list[Box] = []
        for image, at, above in views:
            ink = image > low + at * grey if above else image < low + at * grey
            found += clear_rows(image, ink, CLEAR_SHARE * grey)
        return found

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
        marks = _strokes(self.brightest == values[counts.argmax()]) & dark_near
        return _around(marks) if letter_rows(marks) else []  # metal that is cut off at the top forms no rows

    def fixed(self) -> list[Box]:
        """Return boxes around bright pixels that have one value on every frame: no anatomy does that."""
        if self.frames < FIXED_FRAMES or min(self.brightest.shape) < LEGIBLE_PIXELS:
            return []
        low, high = float(self.darkest.min()), float(self.brightest.max())
        same = _strokes((self.brightest == self.darkest) & (self.brightest > low + 0.25 * (high - low)))
        return _around(same) if same.sum() >= FIXED_PIXELS else []


def _worth_reading(over: NDArray[Any], least: float) -> bool:
    """Tell whether enough pixels stand out for a word, and not so many that they are anatomy."""
    return LONE_PIXELS <= int((over > least).sum()) <= over.size // 20


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
        known = self.sizes.get(frames.shape[1:])
        if known is None:
            self.sizes[frames.shape[1:]] = Projection.of(frames, declared)
            return
        known.declared.update(declared)
        for frame in frames:
            known.see(frame)

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
        boxes: dict[tuple[int, ...], list[Box]] = {}
        for by_size in self.kinds().values():
            for size, listed in by_size.items():
                boxes.setdefault(size, []).extend(listed)
        return boxes

    def kinds(self) -> dict[str, dict[tuple[int, ...], list[Box]]]:
        """Return the boxes by what found them, then by size of frame.

        Raises:
            Refusal: The search itself failed.
        """
        found: dict[str, dict[tuple[int, ...], list[Box]]] = {}
        for size, seen in self.sizes.items():
            for kind, boxes in seen.kinds().items():
                if boxes:
                    found.setdefault(kind, {})[size] = boxes
        return found


def read_boxes(pictures: list[NDArray[Any]]) -> list[Box]:
    """Return the boxes of the words in pictures of one size; none where tesseract is not installed.

    Raises:
        Refusal: The search itself failed.
    """
    program = shutil.which("tesseract")
    return text_boxes(program, pictures) if program else []
