"""Letters by their shape: rows of small marks on one line, whatever the script and whatever is behind them.

What a scanner measures is blurred and noisy; what a program draws has one value, pixel for pixel. A
value that far more touching pixels share than its neighbours on the grey scale do is drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.filters import filters
from deid_tools.ocr import Box

TALL_PIXELS = (5, 64)
WIDEST, NARROW = 1.6, 0.45
LEAST_INK, FULL = 0.6, 0.85
MIN_LETTERS = 3
GAP_HEIGHTS = 0.9
ALIGNED, ALIKE = 0.2, 1.6
REACH_HEIGHTS, RIM_PIXELS = 2.0, 2
SOFT = 0.3
FIELD_PIXELS, FIELD_REACH = 300, 31
MIN_DRAWN = 16
SPIKE = 3.0
NEIGHBOURS = 2
MIN_CONTRAST, CRISP, SHARP = 0.04, 0.4, 0.6
MOST_VALUES = 4
MOST_MARKS = 1500
TOUCHING = 0.4
MAX_SHARE = 0.1
LEGIBLE_PIXELS = 64
WORD_PIXELS, WORD_WIDTHS = (4, 64), 2.0
HALF, DARK = 0.4, 0.3
CROSSED, STROKES, STACKED = 3.0, 1.0, 2.6
_EIGHT_CONNECTED = np.ones((3, 3), bool)


def drawn_rows(frame: NDArray[Any]) -> list[Box]:
    """Return boxes around rows of letters of one single value in a frame [Y, X] of integers."""
    if min(frame.shape) < LEGIBLE_PIXELS:
        return []
    found: list[Box] = []
    values = drawn_values(frame)
    low, high = np.percentile(frame[::3, ::3], (1, 99)) if values else (0.0, 0.0)
    least = MIN_CONTRAST * float(high - low)
    for value in values:
        core = frame == value
        if not _stands_out(frame, core, value, least):
            continue
        rows = [*letter_rows(core), *letter_rows(_softened(frame, core, value, SOFT * float(high - low)))]
        beside = _on_field(core)
        on_field = letter_rows(beside) if beside is not None else []
        for box, share in [*((box, CRISP) for box in rows), *((box, 0.0) for box in on_field)]:
            window = _window(box)
            if _crisp(frame[window], core[window], least, share):
                found.append(_whole_row(core, box))
    return found


def _stands_out(frame: NDArray[Any], core: NDArray[np.bool_], value: int, least: float) -> bool:
    """Tell whether enough pixels of a value touch one that is far from it: what noise cuts off at black does not."""
    rows, columns = frame.shape
    places = np.flatnonzero(core)
    y, x = np.divmod(places, columns)
    beside = np.zeros(len(places), bool)
    for step, inside in ((-1, x > 0), (1, x < columns - 1), (-columns, y > 0), (columns, y < rows - 1)):
        near = frame.ravel()[places[inside] + step].astype(np.float32)
        beside[inside] |= np.abs(near - value) >= least
    return int(np.count_nonzero(beside)) >= MIN_DRAWN


def _softened(frame: NDArray[Any], core: NDArray[np.bool_], value: int, reach: float) -> NDArray[np.bool_]:
    """Add the rims of letters that were drawn with soft edges."""
    grown = core.copy()
    grown[1:] |= core[:-1]
    grown[:-1] |= core[1:]
    wide = grown.copy()
    wide[:, 1:] |= grown[:, :-1]
    wide[:, :-1] |= grown[:, 1:]
    rim = np.flatnonzero(wide & ~core)
    soft = rim[np.abs(frame.ravel()[rim].astype(np.float32) - value) < reach]
    softened = core.copy()
    softened.ravel()[soft] = True
    return softened


def _on_field(core: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return what stands on or beside an area that a value fills, where letters of other values may be."""
    if core.sum() < FIELD_PIXELS:
        return None
    edged = np.pad(core, 2, mode="edge")
    down = edged[4:] & edged[3:-1] & edged[2:-2] & edged[1:-3] & edged[:-4]
    filled = down[:, 4:] & down[:, 3:-1] & down[:, 2:-2] & down[:, 1:-3] & down[:, :-4]
    if int(filled.sum()) < FIELD_PIXELS // 8:
        return None
    return filters().maximum_filter(filled.view(np.uint8), FIELD_REACH).view(bool) & ~core


def _whole_row(drawn: NDArray[np.bool_], box: Box) -> Box:
    """Widen a box along its row to what else is drawn there: words and letters that no chain reached."""
    top, left, bottom, right = box
    height = bottom - top
    top, bottom = max(0, top - height // 3), bottom + height // 3
    columns = np.flatnonzero(drawn[top:bottom].any(axis=0))
    far = REACH_HEIGHTS * height
    for column in columns[columns >= right]:
        if column - right > far:
            break
        right = int(column) + 1
    for column in columns[columns < left][::-1]:
        if left - column > far:
            break
        left = int(column)
    return (top, max(0, left - RIM_PIXELS), min(bottom, drawn.shape[0]), min(right + RIM_PIXELS, drawn.shape[1]))


def clear_rows(image: NDArray[Any], mask: NDArray[np.bool_], least: float) -> list[Box]:
    """Return boxes around rows of letters under a mask that differ at once from what is around them.

    Without a value that they share, four marks and sharp edges are asked for.

    Args:
        image: The picture [Y, X].
        mask: Which of its pixels may be ink.
        least: How far the ink must be from its surroundings, in grey values.
    """
    found = []
    for box in letter_rows(mask, MIN_LETTERS + 1):
        window = _window(box)
        if _crisp(image[window], mask[window], least, SHARP):
            found.append(_whole_row(mask, box))
    return found


def words_on_dark(image: NDArray[Any], low: float, least: float) -> list[Box]:
    """Return boxes around words with nothing but background around them, however small or close their letters.

    A word is told by its strokes: wider than high, and more often crossed from left to right than from top to
    bottom, with sharp edges.

    Args:
        image: The picture [Y, X].
        low: The value of the background.
        least: How far the ink must be above it.
    """
    ndimage = filters()
    marks = image > low + least
    if min(image.shape) < LEGIBLE_PIXELS or np.count_nonzero(marks) < MIN_DRAWN:
        return []
    joined, count = ndimage.label(ndimage.maximum_filter(marks.view(np.uint8), (3, 9)))
    if count > 20_000:
        return []
    found = []
    for rows, columns in ndimage.find_objects(joined):
        top, left, bottom, right = box = rows.start + 1, columns.start + 4, rows.stop - 1, columns.stop - 4
        tall = WORD_PIXELS[0] <= bottom - top <= WORD_PIXELS[1]
        if tall and right - left >= WORD_WIDTHS * (bottom - top) and _is_word(image, box, low, least):
            found.append((max(0, top - RIM_PIXELS), max(0, left - RIM_PIXELS), bottom + RIM_PIXELS, right + RIM_PIXELS))
    return found


def _is_word(image: NDArray[Any], box: Box, low: float, least: float) -> bool:
    top, left, bottom, right = box
    patch = image[top:bottom, left:right].astype(np.float64) - low
    ink = patch > max(least, HALF * float(patch.max()))
    window = _window(box)
    around = np.ones(image[window].shape, bool)
    around[top - window[0].start : bottom - window[0].start, left - window[1].start : right - window[1].start] = False
    if not around.any() or float(np.percentile(image[window][around] - low, 95)) > DARK * float(patch.max()):
        return False
    across = np.count_nonzero(np.diff(ink.astype(np.int8), axis=1, prepend=0) == 1, axis=1)
    down = np.count_nonzero(np.diff(ink.astype(np.int8), axis=0, prepend=0) == 1, axis=0)
    crossed, stacked = float(across[across > 0].mean()), float(down[down > 0].mean())
    return crossed >= max(CROSSED, STROKES * (right - left) / (bottom - top)) and stacked <= STACKED


def _window(box: Box) -> tuple[slice, slice]:
    top, left, bottom, right = box
    return slice(max(0, top - 4), bottom + 4), slice(max(0, left - 4), right + 4)


def _crisp(patch: NDArray[Any], marks: NDArray[np.bool_], least: float, share: float) -> bool:
    """Tell whether what lies between and around marks is ``least`` away in grey, and ``share`` of that at once.

    Metal and bone that are cut off at the top of the grey scale have soft edges.
    """
    if marks.all():
        return False
    away = np.abs(patch.astype(np.float64) - float(np.median(patch[marks])))
    steps = filters().distance_transform_cdt(~marks, "chessboard")
    beside, around = away[steps == 1], away[(steps >= 2) & (steps <= 4)]
    if not around.size:
        return float(np.median(beside)) >= least
    return float(np.median(away[~marks])) >= least and float(np.median(beside)) >= share * float(np.median(around))


def drawn_values(frame: NDArray[Any]) -> list[int]:
    """Return the values that suspiciously many touching pixels share, the most suspicious first."""
    same = np.zeros(frame.shape, bool)
    np.equal(frame[:, 1:], frame[:, :-1], out=same[:, 1:])
    same[1:] |= frame[1:] == frame[:-1]
    touching = frame.ravel().take(np.flatnonzero(same)).astype(np.int64)
    if not touching.size:
        return []
    low = int(touching.min())
    histogram = np.bincount(touching - low)
    values = np.flatnonzero(histogram)
    counts = histogram[values]
    padded = np.pad(counts, NEIGHBOURS)
    shifts = [n for n in range(2 * NEIGHBOURS + 1) if n != NEIGHBOURS]
    near = np.max([padded[n : n + len(counts)] for n in shifts], axis=0)
    ratios = counts / (near + 1)
    wanted = np.flatnonzero((counts >= MIN_DRAWN) & (counts <= MAX_SHARE * frame.size) & (ratios >= SPIKE))
    best = [(int(values[k]) + low, int(counts[k])) for k in wanted[np.argsort(-ratios[wanted])][:MOST_VALUES]]
    return [value for value, count in best if count >= TOUCHING * np.count_nonzero(frame == value)]


def letter_rows(mask: NDArray[np.bool_], fewest: int = MIN_LETTERS) -> list[Box]:
    """Return boxes around rows of marks that stand on one line and are of one height, as letters are."""
    marks = _marks(mask)
    if len(marks) < fewest:
        return []
    tops, lefts, bottoms, rights = marks.T
    height = bottoms - tops
    least = np.minimum(height[:, None], height[None, :])
    alike = np.maximum(height[:, None], height[None, :]) <= ALIKE * least
    level = np.abs(bottoms[:, None] - bottoms[None, :]) <= np.maximum(1, ALIGNED * least)
    gap = np.maximum(lefts[:, None], lefts[None, :]) - np.minimum(rights[:, None], rights[None, :])
    near = (gap <= GAP_HEIGHTS * least) & (gap >= -0.3 * least)
    rows = _connected(alike & level & near)
    found: list[Box] = []
    for row in np.flatnonzero(np.bincount(rows) >= fewest):
        inside = rows == row
        top, left = int(tops[inside].min()), int(lefts[inside].min())
        found.append((top, left, int(bottoms[inside].max()), int(rights[inside].max())))
    return found


def _connected(linked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each of N the smallest number of those that it hangs together with by links [N, N]."""
    rows = np.arange(len(linked))
    for _ in range(len(rows)):
        nearest = np.minimum(rows, np.where(linked, rows[None, :], len(rows)).min(axis=1))
        if np.array_equal(nearest, rows):
            break
        rows = nearest
    return rows


def _marks(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the boxes [N, 4] of the connected marks that could be letters."""
    grouped, count = filters().label(mask, _EIGHT_CONNECTED)
    if not count or count > 20_000:
        return np.zeros((0, 4), np.int64)
    tops, lefts, bottoms, rights, areas = _extents(mask, grouped)
    high, wide = bottoms - tops, rights - lefts
    tall = (high >= TALL_PIXELS[0]) & (high <= TALL_PIXELS[1]) & (wide <= WIDEST * high + 2)
    thin = (areas >= LEAST_INK * high) & ((wide <= NARROW * high) | (areas <= FULL * high * wide))
    return np.stack([tops, lefts, bottoms, rights], axis=1)[tall & thin][:MOST_MARKS]


def _extents(mask: NDArray[np.bool_], grouped: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], ...]:
    """Return top, left, bottom, right and area of each mark, in the order of their numbers."""
    inside = np.flatnonzero(mask)
    numbers = grouped.ravel()[inside]
    order = np.argsort(numbers, kind="stable")
    rows, columns = np.divmod(inside[order], mask.shape[1])
    starts = np.flatnonzero(np.diff(numbers[order], prepend=0))
    areas = np.diff(starts, append=len(inside))
    edges = (np.minimum.reduceat(rows, starts), np.minimum.reduceat(columns, starts))
    ends = (np.maximum.reduceat(rows, starts) + 1, np.maximum.reduceat(columns, starts) + 1)
    return (*edges, *ends, areas)
