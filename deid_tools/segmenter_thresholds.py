"""Tissues of a CT by Hounsfield units alone: air, lung, fat, soft tissue, bone. Crude, quick, needs no weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deid_tools.segmenters import Segments
from medlsdm.errors import ConfigError, DataError
from medlsdm.types import Modality, Scan

EDGES_HU = (-950.0, -400.0, -30.0, 200.0)
NAMES = {
    1: ("air", "15158005"),
    2: ("lung", "39607008"),
    3: ("fat", "256674009"),
    4: ("soft tissue", "87784001"),
    5: ("bone", "272673000"),
}
BODY_HU = -400.0
_OPENING_MM = 4.0


class HuThresholds:
    """Label a CT by bands of HU within the body; what lies around the body is background.

    The bands meet: air below -950, lung to -400, fat to -30, soft tissue to 200, bone above.
    Contrast medium and metal count as bone; gas in the bowel counts as air or lung.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ConfigError("The segmenter 'hu-thresholds' takes no folder.", "Use: --segmenter hu-thresholds")

    def segment(self, scan: Scan, folder: Path) -> Segments:
        """Return the tissues of a CT scan.

        Raises:
            DataError: The scan is not CT.
        """
        if scan.modality is not Modality.CT:
            raise DataError("HU thresholds label CT only.", "Use another segmenter for this series.")
        tissue = (np.searchsorted(EDGES_HU, scan.array, side="right") + 1).astype(np.uint16)
        return Segments(np.where(body(scan.array, scan.geometry.spacing), tissue, 0), NAMES)


def body(array: NDArray[np.float32], spacing: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Return the largest piece of matter in a CT, its holes filled slice by slice along the third axis."""
    matter = array > BODY_HU
    reach = [max(1, round(_OPENING_MM / 2 / step)) for step in spacing[:2]]
    opened = ndimage.binary_opening(matter, np.ones((2 * reach[0] + 1, 2 * reach[1] + 1, 1), bool))
    pieces, count = ndimage.label(opened)  # pyright: ignore[reportGeneralTypeIssues]
    if not count:
        return np.zeros(array.shape, bool)
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    filled = pieces == largest
    for k in range(array.shape[2]):
        filled[:, :, k] = ndimage.binary_fill_holes(filled[:, :, k])
    return filled
