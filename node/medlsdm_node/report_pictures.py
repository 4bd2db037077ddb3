"""The demo report's pictures: slices with label contours, and loss curves. PNG by matplotlib, no display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from medlsdm.types import LabelSchema

_DARK, _PALE, _SOFT = "#0b0e12", "#e8edf2", "#9aa7b5"
_SITES = ("#1f6feb", "#d08a1d", "#1a7f4b", "#9a4fd0", "#c0352b", "#4a8b9c")
_COLUMNS = ("real", "real + labels", "synthetic", "synthetic + labels")
# For each plane: the axis cut through, those shown across and up, and the letters at left, right, top, bottom.
# Radiological: the patient's right is at the left of axial and coronal pictures.
_PLANES = (("axial", 2, 0, 1, "RLAP"), ("coronal", 1, 0, 2, "RLSI"), ("sagittal", 0, 1, 2, "APSI"))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Hold one picture row: arrays [X, Y, Z] in RAS on one grid, and spacing in mm. Stays at its site."""

    site: str
    modality: str
    real: NDArray[np.floating]
    labels: NDArray[np.integer]
    synthetic: NDArray[np.floating]
    spacing: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Hold one loss as a site reported it."""

    stage: str
    round: int
    step: int
    loss: float


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Draw a figure without a display and return its PNG, which carries no metadata of this machine."""
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return stream.getvalue()


def _window(volume: NDArray[np.floating]) -> NDArray[np.floating]:
    low, high = np.percentile(volume[np.isfinite(volume)], [0.5, 99.5]) if np.isfinite(volume).any() else (0.0, 1.0)
    return np.clip((np.nan_to_num(volume) - low) / max(high - low, 1e-6), 0, 1)


def _centre(labels: NDArray[np.integer]) -> tuple[int, int, int]:
    """Return the voxel nearest the labels' centre of mass, or the middle of an empty map."""
    found = np.argwhere(labels > 0)
    x, y, z = np.rint(found.mean(axis=0)).astype(int) if len(found) else np.array(labels.shape) // 2
    return int(x), int(y), int(z)


def _slice(volume: NDArray[Any], cut: int, index: int, mirrored: bool) -> NDArray[Any]:
    """Return a plane as rows from the bottom up: [up, across]."""
    plane = np.take(volume, index, axis=cut).T
    return plane[:, ::-1] if mirrored else plane


def _contours(axes: Any, plane: NDArray[np.integer], schema: LabelSchema) -> None:
    for label in np.unique(plane).tolist():
        if label == 0:
            continue
        colour = np.array(schema.by_id(label).colour) / 255
        mask = np.pad((plane == label).astype(float), 1)
        extent = (-1, plane.shape[1], -1, plane.shape[0])
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.3, extent=extent, origin=None)


def _panel(axes: Any, plane: NDArray[Any], mask: NDArray[Any] | None, aspect: float, schema: LabelSchema) -> None:
    axes.imshow(plane, cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect, interpolation="nearest")
    if mask is not None:
        _contours(axes, mask, schema)
    axes.set_xlim(-0.5, plane.shape[1] - 0.5)
    axes.set_ylim(-0.5, plane.shape[0] - 0.5)
    axes.set_axis_off()


def _letters(axes: Any, letters: str) -> None:
    spots = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
             (0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, (x, y, across, up) in zip(letters, spots, strict=True):
        axes.text(x, y, letter, transform=axes.transAxes, color="#ffd479", fontsize=8, ha=across, va=up,
                  path_effects=[withStroke(linewidth=2, foreground=_DARK)])  # fmt: skip


def draw_examples(examples: Sequence[Example], schema: LabelSchema) -> Figure:
    """Draw three rows (axial, coronal, sagittal) for each example: real, contour, synthetic, contour."""
    ratios, width = [], 4 * 2.2 + 0.5
    for example in examples:
        size = np.multiply(example.labels.shape, example.spacing)
        ratios += [size[up] / size[across] for _, _, across, up, _ in _PLANES]
    height = sum(2.2 * float(np.clip(r, 0.4, 1.8)) for r in ratios) + 0.55 * len(examples)
    figure = Figure(figsize=(width, height), facecolor=_DARK)
    parts = figure.subfigures(len(examples), 1, squeeze=False, height_ratios=[1] * len(examples))[:, 0]
    for part, example in zip(parts, examples, strict=True):
        part.set_facecolor(_DARK)
        _draw_example(part, example, schema)
    return figure


def _draw_example(part: Any, example: Example, schema: LabelSchema) -> None:
    size = np.multiply(example.labels.shape, example.spacing)
    ratios = [float(np.clip(size[up] / size[across], 0.4, 1.8)) for _, _, across, up, _ in _PLANES]
    grid = part.subplots(3, 4, gridspec_kw={
        "height_ratios": ratios, "wspace": 0.02, "hspace": 0.02, "left": 0.05, "right": 0.995, "bottom": 0.01,
        "top": 1 - 0.5 / (2.2 * sum(ratios) + 0.55),
    })  # fmt: skip
    part.suptitle(f"{example.site}, {example.modality}", color=_PALE, fontsize=10, x=0.05, ha="left", y=0.995)
    centre, volumes = _centre(example.labels), (_window(example.real), _window(example.synthetic))
    for row, (name, cut, across, up, letters) in zip(grid, _PLANES, strict=True):
        aspect = example.spacing[up] / example.spacing[across]
        mask = _slice(example.labels, cut, centre[cut], True)
        for column, axes in enumerate(row):
            plane = _slice(volumes[column // 2], cut, centre[cut], True)
            _panel(axes, plane, mask if column % 2 else None, aspect, schema)
            if name == _PLANES[0][0]:
                axes.set_title(_COLUMNS[column], color=_SOFT, fontsize=9, pad=3)
        _letters(row[0], letters)
        row[0].text(-0.04, 0.5, name, transform=row[0].transAxes, rotation=90, color=_SOFT, fontsize=9,
                    ha="right", va="center")  # fmt: skip


def draw_losses(losses: Mapping[str, Sequence[LossPoint]]) -> Figure:
    """Draw loss over steps, one small plot a stage, one line a site, a mark at each round's end."""
    stages = sorted({point.stage for points in losses.values() for point in points})
    figure = Figure(figsize=(4.8 * max(1, len(stages)), 3.2), facecolor="white", layout="constrained")
    for axes, stage in zip(figure.subplots(1, max(1, len(stages)), squeeze=False)[0], stages, strict=False):
        for number, (site, points) in enumerate(sorted(losses.items())):
            kept = sorted((p for p in points if p.stage == stage), key=lambda p: (p.round, p.step))
            if not kept:
                continue
            colour, steps, values = _SITES[number % len(_SITES)], [p.step for p in kept], [p.loss for p in kept]
            axes.plot(steps, values, color=colour, label=site, linewidth=1.6)
            ends = [i for i, p in enumerate(kept) if i + 1 == len(kept) or kept[i + 1].round != p.round]
            axes.plot([steps[i] for i in ends], [values[i] for i in ends], "o", color=colour, markersize=3.5)
        axes.set_title(stage, fontsize=11)
        axes.set_xlabel("local step (dots: end of a round)", fontsize=9)
        axes.set_ylabel("loss", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=9)
    return figure
