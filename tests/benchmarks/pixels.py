"""How much burned-in text is found and hidden, what it costs, and how often clean scans raise an alarm.

Text of several sizes, fonts, tones and places is drawn into real clean series, on one slice, on all
slices, and into a single image of eight bits as captures are. What the search of the pipeline finds is taken as it
would be blanked: a text counts as hidden when nine of ten of its pixels lie in boxes. Every series
of the folder is also searched as it is, and every box there is a false alarm.

    python tests/benchmarks/pixels.py DATA [--cases N] [--seed N] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from deid_tools import ocr
from deid_tools.admit import IMAGE_CLASSES
from deid_tools.pixels import TextSearch

SIZES = (8, 10, 12, 16, 24, 32)
TONES = ("bright", "mid-grey", "dark", "outlined", "boxed")
PLACES = ("corner", "border", "anatomy")
SPREADS = ("one slice", "all slices", "capture")
FONTS = ("DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf", "built-in")
WORDS = ("MILLER", "SMITH^ANNA", "DOE JOHN", "MRN 4711082", "12.03.1961", "BAUER M", "1961-03-12", "St. Mary Hospital")
HIDDEN = 0.9
MAX_SLICES = 40


@dataclass(frozen=True)
class Case:
    """One text to be drawn."""

    series: str
    spread: str
    tone: str
    size: int
    place: str


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=0, help="how many texts, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    calls = _count_calls()
    everything = read_all(options.data)
    clean = {name: frames for name, frames in everything.items() if "burned-in" not in name}
    alarms = false_alarms(clean, calls)
    results = planted(hosts(clean), options.cases, options.seed)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"alarms": alarms, "texts": results}, indent=1))


def read_all(folder: Path) -> dict[str, list[np.ndarray]]:
    """Return the frames [Y, X] of every image series below a folder, by the names of its folder and series."""
    found: dict[str, list[tuple[float, np.ndarray]]] = defaultdict(list)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            ds = pydicom.dcmread(path)
            if not (ds.get("SOPClassUID") in IMAGE_CLASSES or ds.get("Modality") in ("CT", "MR", "CR")):
                continue
            if "LOCALIZER" in ds.get("ImageType", []) or ds.SamplesPerPixel != 1:
                continue
            pixels = ds.pixel_array
        except Exception:
            continue
        frames = pixels if pixels.ndim == 3 else pixels[None]
        number = float(ds.get("InstanceNumber", 0) or 0)
        name = f"{path.parent.relative_to(folder)} {str(ds.SeriesInstanceUID)[-6:]}"
        found[name] += [(number, frame) for frame in frames]
    return {name: [f for _, f in sorted(listed, key=lambda pair: pair[0])] for name, listed in found.items()}


def _count_calls() -> list[int]:
    """Count the calls of tesseract in the list that is returned."""
    calls, read = [0], ocr._read

    def counted(*arguments: object) -> object:
        calls[0] += 1
        return read(*arguments)  # pyright: ignore[reportArgumentType]

    ocr._read = counted  # pyright: ignore[reportAttributeAccessIssue]
    return calls


def false_alarms(clean: dict[str, list[np.ndarray]], calls: list[int]) -> list[dict[str, object]]:
    """Search every clean series as it is, and each of its frames alone in series of few."""
    print(f"{'clean series':54} frames  boxes by kind           calls  gather s  search s")
    rows = []
    for name, frames in clean.items():
        calls[0], start = 0, time.perf_counter()
        search = TextSearch()
        for frame in frames:
            search.add(frame[None])
        gathered = time.perf_counter()
        kinds = {kind: len(boxes) for kind, boxes in search.kinds().items() if boxes}
        ended = time.perf_counter()
        row = {
            "series": name,
            "frames": len(frames),
            "boxes": kinds,
            "calls": calls[0],
            "gather_s": gathered - start,
            "search_s": ended - gathered,
        }
        rows.append(row)
        print(f"{name:54} {len(frames):6}  {kinds or '-'!s:22} {calls[0]:6}", end=" ")
        print(f"{gathered - start:9.2f} {ended - gathered:9.2f}")
    return rows


def hosts(clean: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Choose the series to draw into: large enough, with several slices, at most two of one folder."""
    return {
        name: frames[:MAX_SLICES]
        for name, frames in clean.items()
        if len(frames) >= 8 and min(frames[0].shape) >= 200 and len({f.shape for f in frames}) == 1
    }


def planted(series: dict[str, list[np.ndarray]], cases: int, seed: int) -> list[dict[str, object]]:
    """Draw texts one by one, search, and print the share that is hidden."""
    rng = np.random.default_rng(seed)
    plan = [Case(*values) for values in itertools.product(series, SPREADS, TONES, SIZES, PLACES)]
    plan = [case for case in plan if case.tone != "dark" or case.place == "anatomy"]  # black on black cannot be seen
    if cases and cases < len(plan):
        plan = [plan[k] for k in sorted(rng.choice(len(plan), cases, replace=False))]
    results = []
    for case in plan:
        frames, glyphs = draw(case, series[case.series], rng)
        search = TextSearch()
        for frame in frames:
            search.add(frame[None])
        mask = np.zeros(glyphs.shape, bool)
        for top, left, bottom, right in search.found().get(glyphs.shape, []):
            mask[top:bottom, left:right] = True
        hidden = float((mask & glyphs).sum() / glyphs.sum())
        results.append(_row(case, hidden, mask))
    for axis in ("spread", "tone", "size", "place", "series"):
        table(results, axis)
    print()
    for spread in SPREADS:
        table([r for r in results if r["spread"] == spread and r["place"] == "anatomy"], "tone", f"{spread}, anatomy: ")
    return results


def _row(case: Case, hidden: float, mask: np.ndarray) -> dict[str, object]:
    row = {name: getattr(case, name) for name in ("series", "spread", "tone", "size", "place")}
    return {**row, "hidden": hidden, "blanked": float(mask.mean())}


def table(results: list[dict], axis: str, title: str = "") -> None:
    """Print the share of texts hidden, and of the frame blanked, by the values of one axis."""
    groups: dict[object, list[dict]] = defaultdict(list)
    for row in results:
        groups[row[axis]].append(row)
    print(f"\n{title}{axis:46} texts  hidden  blanked of the frame (mean, largest)")
    for value, rows in groups.items():
        shares = [float(r["blanked"]) for r in rows]
        good = sum(float(r["hidden"]) >= HIDDEN for r in rows)
        print(f"{value!s:52} {len(rows):5}  {good / len(rows):6.0%}  {np.mean(shares):6.2%} {max(shares):6.2%}")


def draw(case: Case, frames: list[np.ndarray], rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the frames with the text in them, and which pixels its letters fill."""
    word, font = str(rng.choice(WORDS)), str(rng.choice(FONTS))
    ink = glyph_picture(word, font, case.size, antialiased=bool(rng.random() < 0.5))
    height, width = frames[0].shape
    ink = ink[:height, :width]
    ring = _ring(ink)
    chosen = range(len(frames)) if case.spread == "all slices" else [int(len(frames) * rng.uniform(0.3, 0.7))]
    stack = [f.copy() for f in frames]
    if case.spread == "capture":
        stack = [_eight_bits(frames[chosen[0]])]
        chosen = [0]
    low, high = float(min(f.min() for f in stack)), float(max(f.max() for f in stack))
    typical = float(np.percentile(stack[len(stack) // 2], 90))
    if np.iinfo(stack[0].dtype).max > 255 and rng.random() < 0.5:
        high = float(np.iinfo(stack[0].dtype).max if rng.random() < 0.3 else 1.5 * high)
    tone = {"bright": high, "outlined": high, "mid-grey": low + 0.6 * (max(typical, low + 4) - low) + 1}.get(
        case.tone, low
    )
    top, left = _spot(case.place, ink.shape, (height, width), rng)
    if case.tone == "dark":
        for _ in range(20):
            patch = stack[chosen[0]][top : top + ink.shape[0], left : left + ink.shape[1]]
            if np.percentile(patch, 20) > low + 0.2 * (typical - low):
                break
            top, left = _spot("anatomy", ink.shape, (height, width), rng)
    for k in chosen:
        part = stack[k][top : top + ink.shape[0], left : left + ink.shape[1]]
        under = part.astype(float)
        if case.tone == "outlined":
            under = np.where(ring, low, under)
        if case.tone == "boxed":
            under = np.full(under.shape, high)
        drawn = under * (1 - ink) + tone * ink
        part[:] = np.clip(np.rint(drawn), np.iinfo(part.dtype).min, np.iinfo(part.dtype).max).astype(part.dtype)
    glyphs = np.zeros((height, width), bool)
    glyphs[top : top + ink.shape[0], left : left + ink.shape[1]] = ink > 0.5
    return stack, glyphs


def glyph_picture(word: str, font: str, size: int, *, antialiased: bool) -> np.ndarray:
    """Return how much of each pixel [Y, X] the letters fill, from 0 to 1."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(get_data_path()) / "fonts" / "ttf"
    face = ImageFont.load_default(size=size) if font == "built-in" else ImageFont.truetype(str(folder / font), size)
    left, top, right, bottom = face.getbbox(word)
    picture = Image.new("L", (int(right - left) + 6, int(bottom - top) + 6))
    pen = ImageDraw.Draw(picture)
    pen.fontmode = "L" if antialiased else "1"
    pen.text((3 - left, 3 - top), word, fill=255, font=face)
    return np.asarray(picture) / 255.0


def _ring(ink: np.ndarray) -> np.ndarray:
    """Return the letters and what lies within one pixel of them."""
    padded = np.pad(ink > 0.3, 1)
    rows, columns = ink.shape
    near = [padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)]
    return np.any(near, axis=0)


def _spot(place: str, text: tuple[int, ...], frame: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    free = [max(0, frame[k] - text[k]) for k in (0, 1)]
    if place == "corner":
        return tuple(int(rng.choice([min(4, f), max(0, f - 4)])) for f in free)  # pyright: ignore[reportReturnType]
    if place == "border":
        return int(rng.choice([0, free[0]])), int(free[1] * rng.uniform(0.2, 0.8))
    return int(free[0] * rng.uniform(0.35, 0.65)), int(free[1] * rng.uniform(0.4, 0.6))


def _eight_bits(frame: np.ndarray) -> np.ndarray:
    """Return a frame as a capture shows it: windowed to 8 bits."""
    low, high = np.percentile(frame, (1, 99.5))
    return np.clip((frame.astype(float) - low) * (255 / max(float(high - low), 1.0)), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
