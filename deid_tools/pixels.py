"""Pixels: decoded and cut to what the header declares, and searched for burned-in text."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

OCR_WIDTH = 1600
OCR_TIMEOUT_SECONDS = 120
OCR_ABSENT = "burned-in text was not checked: tesseract is not installed"
OCR_PRESENT = "burned-in text was checked on each series' maximum projection"


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


class TextSearch:
    """Look for burned-in text on the maximum projection of one series, with tesseract where it is installed."""

    def __init__(self) -> None:
        self._projections: dict[tuple[int, ...], NDArray[Any]] = {}

    @staticmethod
    def state() -> str:
        """Say in words whether burned-in text can be checked on this machine."""
        return OCR_PRESENT if shutil.which("tesseract") else OCR_ABSENT

    def add(self, frames: NDArray[Any]) -> None:
        """Fold frames [frames, Y, X] into the projection of their size."""
        top = frames.max(axis=0)
        key = top.shape
        self._projections[key] = np.maximum(self._projections[key], top) if key in self._projections else top

    def found(self) -> bool:
        """Tell whether confident words stand in a projection.

        Raises:
            Refusal: The search itself failed.
        """
        program = shutil.which("tesseract")
        if not program:
            return False
        return any(_confident(_words(program, image)) for image in self._projections.values())


def _confident(words: list[tuple[str, float]]) -> bool:
    letters = [("".join(c for c in word if c.isalnum()), confidence) for word, confidence in words]
    several = sum(len(word) >= 3 and confidence >= 70 for word, confidence in letters)
    return several >= 2 or any(len(word) >= 5 and confidence >= 80 for word, confidence in letters)


def _words(program: str, image: NDArray[Any]) -> list[tuple[str, float]]:
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return []
    grey = ((image.astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    factor = max(1, round(OCR_WIDTH / grey.shape[1]))
    grey = _enlarge(grey, min(factor, 8))
    picture = f"P5 {grey.shape[1]} {grey.shape[0]} 255\n".encode() + grey.tobytes()
    try:
        answer = subprocess.run(
            [program, "stdin", "stdout", "--psm", "11", "tsv"],
            input=picture,
            capture_output=True,
            timeout=OCR_TIMEOUT_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        raise Refusal("the search for burned-in text failed") from None
    rows = [line.split("\t") for line in answer.stdout.decode("utf-8", "replace").splitlines()[1:]]
    return [(row[11], float(row[10])) for row in rows if len(row) == 12 and row[11].strip()]


def _enlarge(grey: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    if factor == 1:
        return grey
    from scipy import ndimage

    larger = np.asarray(ndimage.zoom(grey.astype(np.float32), factor, order=1))
    return np.clip(larger, 0, 255).astype(np.uint8)
