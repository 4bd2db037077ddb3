"""Pictures of a training run: real, labels, reconstruction and sample side by side.

They show real patients and stay in the run's folder; nothing here names a patient.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Case:
    """Hold one case's volumes [X, Y, Z] in RAS, images in -1..1; ``sample`` is None before stage 2."""

    real: Volume
    labels: NDArray[Any]
    rebuilt: Volume
    sample: Volume | None = None


def fullest_slice(labels: NDArray[Any]) -> int:
    """Return the axial slice with most labelled voxels, the middle one if there are none."""
    counts = (labels > 0).sum(axis=(0, 1))
    return int(counts.argmax()) if counts.any() else labels.shape[2] // 2


def montage(cases: list[Case], n_classes: int) -> tuple[bytes, NDArray[np.uint8]]:
    """Return a PNG, and the same as an array [height, width, RGB]: a row a case, anterior up, right to the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ["real", "labels", "reconstruction", "sample"]
    columns = columns if any(case.sample is not None for case in cases) else columns[:3]
    figure = Figure(figsize=(2.0 * len(columns), 2.0 * len(cases) + 0.3), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), len(columns), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        place = fullest_slice(case.labels)
        shown = (case.real, case.labels, case.rebuilt, case.sample)
        for axis, name, volume in zip(row, columns, shown, strict=False):
            axis.set_axis_off()
            if case is cases[0]:
                axis.set_title(name, fontsize=9)
            if volume is None:
                continue
            style: dict[str, Any] = {"cmap": "gray", "vmin": -1, "vmax": 1}
            if name == "labels":
                style = {"cmap": "nipy_spectral", "vmin": 0, "vmax": max(1, n_classes - 1)}
            axis.imshow(volume[::-1, :, place].T, origin="lower", interpolation="nearest", **style)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue(), picture
