"""Run a segmentation program apart: in its own process, in a private folder, with no way to the network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deid_tools.labels import ON_GRID_VOXELS, canonical_labels
from medlsdm.errors import DataError
from medlsdm.types import Scan
from medlsdm.volumes import write_nifti

LONGEST_SECONDS = 2 * 3600
_NOWHERE = "http://127.0.0.1:9"  # the discard port: downloads and statistics end here


def hand_over(scan: Scan, folder: Path) -> Path:
    """Write a scan for a program to read: array and affine, and nothing that names anyone."""
    path = folder / "scan.nii.gz"
    write_nifti(path, scan.array, scan.geometry)
    return path


def run_apart(command: list[str], folder: Path, what: str, settings: dict[str, str] | None = None) -> None:
    """Run a program with its home in ``folder`` and its network pointed at nothing; its words are dropped.

    Raises:
        DataError: It failed or took longer than two hours.
    """
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), _NOWHERE)
    environment = os.environ | proxies | {"NO_PROXY": "", "no_proxy": "", "HOME": str(folder)} | (settings or {})
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LONGEST_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        raise DataError(
            f"{what} failed on this scan.", "Run it by hand to see why; weights are not downloaded."
        ) from None


def take_back(path: Path, scan: Scan) -> NDArray[np.uint16]:
    """Read a program's label map on the scan's grid.

    Raises:
        DataError: There is none, or it is on another grid.
    """
    if not path.is_file():
        raise DataError("The segmenter wrote no label map.", "Run it by hand to see why.")
    array, geometry = canonical_labels(path)
    if not geometry.matches(scan.geometry, tolerance_mm=ON_GRID_VOXELS * min(scan.geometry.spacing)):
        raise DataError("The segmenter's label map is on another grid than the scan.", "It must not resample.")
    return array
