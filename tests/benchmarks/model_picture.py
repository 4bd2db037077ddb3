"""The montage: several subjects in three planes, real beside made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]


def planes(volume: NDArray, centre: Sequence[int]) -> list[NDArray]:
    """Return the sagittal, coronal and axial plane through a voxel, upright."""
    x, y, z = centre
    return [np.rot90(volume[x]), np.rot90(volume[:, y]), np.rot90(volume[:, :, z])]


def draw(path: Path, columns: dict[str, list[Volume]], labels: Sequence[NDArray]) -> None:
    """Write the montage: a column for each kind of volume, three rows for each subject, contours in the second."""
    titles = list(columns)
    titles.insert(1, "labels")
    n_rows = 3 * len(labels)
    figure, axes = plt.subplots(n_rows, len(titles), figsize=(2.1 * len(titles), 1.75 * n_rows), squeeze=False)
    for subject, truth in enumerate(labels):
        centre = (
            [int(np.median(found)) for found in np.nonzero(truth)] if truth.any() else [n // 2 for n in truth.shape]
        )
        for column, title in enumerate(titles):
            volume = columns[titles[0] if title == "labels" else title][subject]
            for plane, (image, outline) in enumerate(zip(planes(volume, centre), planes(truth, centre), strict=True)):
                axis = axes[3 * subject + plane][column]
                axis.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                if title == "labels":
                    for index, colour in zip(range(1, int(truth.max()) + 1), ("tab:red", "tab:cyan"), strict=False):
                        if (outline == index).any():
                            axis.contour(outline == index, levels=[0.5], colors=[colour], linewidths=1)
                axis.axis("off")
                if subject == plane == 0:
                    axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
