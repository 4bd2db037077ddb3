"""Burned-in text of a series that was written: blanked where the policy allows it, else the series is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Refusal
from deid_tools.modules import add_stamp
from deid_tools.ocr import Box
from deid_tools.pixels import TextSearch, read_boxes
from deid_tools.staged import read_staged, write_staged

POLICIES = ("blank", "quarantine")
LOOKS = 3
MAX_BLANK_SHARE = 0.15
PER_SLICE_AT_ONCE = 4
CLEAN_PIXEL = "113101"
_FOUND = "text seems to be burned into its pixels"


@dataclass(frozen=True, slots=True)
class Blanked:
    """Say what was hidden in one series: how many boxes, and the share of a frame that they cover."""

    boxes: int
    share: float


def hide_text(text: TextSearch, files: list[Path], policy: str = "blank") -> Blanked | None:
    """Blank the text that a search finds in staged files, look again, and stamp them; None if there is none.

    Every slice is read where the projection holds text. All boxes are blanked on every frame of
    their size: a word that was read on one slice may be there, unread, on its neighbours.

    Args:
        text: The search that saw every frame of the files.
        files: The staged files, all of one series.
        policy: ``blank`` or ``quarantine``.

    Raises:
        Refusal: Text is there and the policy is to hold it, it covers too much, or it is still there.
    """
    found = text.found()
    if not found:
        return None
    if policy == "quarantine":
        raise Refusal(_FOUND)
    fill = {size: text.sizes[size].background() for size in found}
    boxes = {size: [*found.get(size, [])] for size in text.sizes}
    for size, frames in _by_size(files):
        if size in found:
            boxes[size] += _read_each(frames)
    for _ in range(LOOKS):
        masks = {size: _mask(size, listed) for size, listed in boxes.items() if listed}
        share = max(float(mask.mean()) for mask in masks.values())
        if share > MAX_BLANK_SHARE:
            raise Refusal(f"{_FOUND}, and it covers too much of them to be blanked")
        again = _blank(files, masks, fill)
        more = again.found()
        if not more:
            return Blanked(sum(len(listed) for listed in boxes.values()), share)
        for size, listed in more.items():
            boxes[size] += listed
            fill.setdefault(size, text.sizes[size].background())
    raise Refusal(f"{_FOUND}, and some is still there after blanking")


def _by_size(files: list[Path]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """Yield the frames of each file, after their size."""
    for path in files:
        _, frames = read_staged(path)
        yield frames.shape[1:], frames


def _read_each(frames: NDArray[Any]) -> list[Box]:
    found: list[Box] = []
    for start in range(0, len(frames), PER_SLICE_AT_ONCE):
        found += read_boxes(list(frames[start : start + PER_SLICE_AT_ONCE]))
    return found


def _mask(size: tuple[int, ...], boxes: list[Box]) -> NDArray[np.bool_]:
    mask = np.zeros(size, bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def _blank(files: list[Path], masks: dict[Any, NDArray[np.bool_]], fill: dict[Any, float]) -> TextSearch:
    """Fill the boxes in every file, and return a fresh search over what is there now."""
    again = TextSearch()
    for path in files:
        ds, frames = read_staged(path)
        size = frames.shape[1:]
        if size in masks:
            frames[:, masks[size]] = fill[size]
            ds.BurnedInAnnotation = "NO"
            add_stamp(ds, CLEAN_PIXEL)
            write_staged(ds, frames, path)
        again.add(frames)
    return again
