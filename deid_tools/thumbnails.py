"""A small picture of a series' middle slice, before and after: for people of the hospital, and for nobody else.

The picture before shows the original, with its face and with text that was burned in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import IMAGE_CLASSES, Instance, Refusal, read_strict
from deid_tools.crew import FILE_SECONDS, Crew, time_limit
from deid_tools.pixels import take_pixels
from deid_tools.png import encode_png, write_private
from deid_tools.stacks import SeriesPlan
from deid_tools.staged import read_staged

WIDEST, TALLEST = 256, 384
_HU_WINDOW = (-250.0, 350.0)
_SHARES = (1.0, 99.7)


@dataclass(frozen=True, slots=True)
class _Job:
    """Say which slice is shown: the original's file, the result's file, the frame, and where the pictures go."""

    before: Path
    after: Path
    frame: int | None
    hounsfield: bool
    pictures: tuple[Path, Path]


def picture_paths(folder: Path, token: str) -> tuple[Path, Path]:
    """Return where the pictures of a series, before and after, lie; ``token`` is pseudonym/series."""
    name = token.replace("/", "-")
    return folder / f"{name}-before.png", folder / f"{name}-after.png"


def write_thumbnails(
    crew: Crew, folder: Path, instances: Sequence[Instance], files: Sequence[Path], plan: SeriesPlan | None
) -> None:
    """Write both pictures of a series that was staged and verified; none where a picture cannot be made.

    Args:
        crew: Decodes the original, apart from this process where its pixels are compressed.
        folder: A private folder.
        instances: The originals, in the order of ``files``.
        files: The staged files.
        plan: How slices stack; without it the middle one of the files is shown.
    """
    where, frame = len(files) // 2, None
    if plan is not None:
        middle = plan.frames[len(plan.frames) // 2]
        where, frame = middle.source, middle.index
    series, first = files[where].parent, instances[where]
    token = f"{series.parent.name}/{series.name}"
    hounsfield = IMAGE_CLASSES.get(first.sop_class) == "CT"
    job = _Job(first.path, files[where], frame, hounsfield, picture_paths(folder, token))
    for pair in crew.map(draw, [job], seconds=FILE_SECONDS, isolate=first.compressed):
        for path, content in zip(job.pictures, pair, strict=False):
            write_private(path, content)


def draw(_: Any, job: _Job) -> tuple[bytes, ...]:
    """Return both pictures as PNG, or nothing."""
    from pydicom.dataset import Dataset

    try:
        with time_limit():
            ds, frames = read_staged(job.after)
            number = len(frames) // 2 if job.frame is None else job.frame
            after = frames[number]
            before = take_pixels(read_strict(job.before), Dataset())[number]
    except (Refusal, OSError, MemoryError, IndexError):
        return ()
    slope = float(ds.get("RescaleSlope", None) or 0)
    if job.hounsfield and slope > 0:
        low, high = ((v - float(ds.get("RescaleIntercept", None) or 0)) / slope for v in _HU_WINDOW)
    else:
        low, high = (float(v) for v in np.percentile(before, _SHARES))
    return tuple(encode_png(_grey(picture, low, high)) for picture in (before, after))


def _grey(picture: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Average down to the size of a thumbnail, and turn a window of values to grey."""
    factor = max(1, -(-picture.shape[1] // WIDEST), -(-picture.shape[0] // TALLEST))
    rows, columns = (max(1, n // factor) for n in picture.shape)
    cut = picture[: rows * factor, : columns * factor].astype(np.float32)
    small = cut.reshape(rows, factor, columns, factor).mean((1, 3)) if factor > 1 else cut
    return np.clip((small - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
