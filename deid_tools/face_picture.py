"""The effect of defacing as a picture: the skin as light falls on it, and a slice, before and after.

A picture shows a patient's face. It stays inside the node and is written nowhere else.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.filters import filters
from deid_tools.head import Coarse, body
from deid_tools.png import write_private

_PIXEL_MM = 1.5
_SMOOTH_MM = 2.0
_BAR_MM = 50.0
_DPI = 110
_VIEWS = ("from the front", "from the right", "middle slice")
_ROWS = ("before", "after")
_NOTE = "The upper row shows a patient's face: keep this picture inside the hospital."


@dataclass(frozen=True, slots=True)
class _Upright:
    """Hold a volume on even voxels with its axes along R, A, S: its values, its skin, and what was cut."""

    values: NDArray[np.float32]
    skin: NDArray[np.float32]
    cut: NDArray[np.bool_]


def write_picture(path: Path, volume: Coarse, cut: NDArray[np.bool_]) -> None:
    """Write a PNG with two rows, before and after: the front, the side, and the slice in the middle."""
    upright = _upright(volume, cut)
    air = float(upright.values.min())
    middle = upright.values.shape[0] // 2
    rows = []
    for kept in (np.ones_like(upright.cut), ~upright.cut):
        skin = np.where(kept, upright.skin, 0.0)
        shown = np.where(kept[middle], upright.values[middle], air)
        rows.append([_relief(skin, 1), _relief(skin, 0), _grey(shown, volume.hu)])
    _draw(path, rows)


def _upright(volume: Coarse, cut: NDArray[np.bool_]) -> _Upright:
    """Turn a volume's axes to the nearest of R, A, S, and sample it evenly."""
    ndimage = filters()
    linear = volume.affine[:3, :3]
    order = [int(np.abs(linear[0]).argmax()), 0, 0]
    rest = [axis for axis in range(3) if axis != order[0]]
    order[1] = max(rest, key=lambda axis: abs(float(linear[1, axis])))
    order[2] = next(axis for axis in rest if axis != order[1])
    flips = tuple(n for n, axis in enumerate(order) if linear[n, axis] < 0)
    factors = volume.spacing[order] / _PIXEL_MM

    def even(array: NDArray[Any]) -> NDArray[np.float32]:
        turned = np.flip(np.transpose(array.astype(np.float32), order), flips)
        return np.asarray(ndimage.zoom(turned, factors, order=1, mode="nearest", grid_mode=True))

    skin = ndimage.gaussian_filter(even(body(volume)), _SMOOTH_MM / _PIXEL_MM)
    return _Upright(even(volume.values), skin, even(cut) > 0.5)


def _relief(skin: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Shade the surface seen from the front (axis 1) or from the right (axis 0), as [up, across]."""
    solid = np.flip(skin > 0.5, axis)
    hit = solid.any(axis)
    depth = np.where(hit, solid.argmax(axis) * _PIXEL_MM, np.nan)
    farthest = float(np.nanmax(depth)) if hit.any() else 0.0
    level = filters().gaussian_filter(np.where(hit, depth, farthest), 1.0)
    across, up = np.gradient(level, _PIXEL_MM)
    light = (0.25 * across + 0.45 * up + 1.0) / np.sqrt(across**2 + up**2 + 1.0)
    shaded = np.flipud(np.where(hit, np.clip(0.15 + 0.7 * light, 0.1, 1.0), 0.0).T.astype(np.float32))
    return np.fliplr(shaded) if axis == 1 else shaded  # who looks from the front sees the right on the left


def _grey(values: NDArray[np.float32], hu: bool) -> NDArray[np.float32]:
    low, high = (-150.0, 250.0) if hu else (float(values.min()), float(np.percentile(values, 99.5)))
    return np.flipud(np.clip((values - low) / max(high - low, 1e-6), 0, 1).T)


def _draw(path: Path, rows: list[list[NDArray[np.float32]]]) -> None:
    """Set the pictures [up, across] side by side with their names and a bar for scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = [max(picture.shape[1], 2) for picture in rows[0]]
    height = max(picture.shape[0] for picture in rows[0])
    scale = 3.0 / max(*widths, height)
    figure = Figure(figsize=(sum(widths) * scale + 0.7, 2 * height * scale + 0.9), dpi=_DPI, facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, len(_VIEWS), width_ratios=widths, left=0.06, right=0.995, top=0.93, bottom=0.07, wspace=0.03, hspace=0.03
    )
    for n, pictures in enumerate(rows):
        for k, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[n, k], facecolor="black", xticks=[], yticks=[])
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            axes.spines[:].set_color("0.35")
            if n == 0:
                axes.set_title(_VIEWS[k], color="white", fontsize=9)
            if k == 0:
                axes.set_ylabel(_ROWS[n], color="white", fontsize=11)
    bar = _BAR_MM / _PIXEL_MM
    axes, picture = figure.axes[-1], rows[-1][-1]
    axes.plot([2, 2 + bar], [picture.shape[0] - 4] * 2, color="white", linewidth=2)
    axes.text(2 + bar / 2, picture.shape[0] - 7, f"{_BAR_MM:.0f} mm", color="white", fontsize=7, ha="center")
    figure.text(0.5, 0.015, _NOTE, color="0.75", fontsize=7, ha="center")
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor="black", metadata={"Software": None})
    write_private(path, content.getvalue())
