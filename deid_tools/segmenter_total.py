"""TotalSegmentator as a segmenter: the site's own installation, and weights that already lie on its disk."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from deid_tools.segmenter_programs import hand_over, run_apart, take_back
from deid_tools.segmenters import Segments
from medlsdm.errors import ConfigError, DataError
from medlsdm.types import Modality, Scan

_LABEL = re.compile(r'<Label Key="(\d+)"[^>]*><!\[CDATA\[([\w .-]+)\]\]></Label>')
_TASKS = {Modality.CT: "total", Modality.MR: "total_mr"}


class TotalSegmentator:
    """Label CT and MR with TotalSegmentator (tasks ``total`` and ``total_mr``).

    Args:
        argument: The folder with the weights (``TOTALSEG_WEIGHTS_PATH``); nothing is downloaded and
            no usage statistics are sent.

    Raises:
        ConfigError: The program is not installed, or the folder holds no weights.
    """

    def __init__(self, argument: str) -> None:
        beside = Path(sys.executable).with_name("TotalSegmentator")
        program = str(beside) if beside.is_file() else shutil.which("TotalSegmentator")
        if not program:
            raise ConfigError("TotalSegmentator is not installed.", "Run: pip install 'medlsdm[totalsegmentator]'")
        weights = Path(argument).expanduser()
        if not argument or not weights.is_dir() or not any(weights.iterdir()):
            raise ConfigError(
                "TotalSegmentator has no weights to use.",
                "Fetch them once with totalseg_download_weights, then: --segmenter totalsegmentator=FOLDER",
            )
        self._program, self._weights = program, weights.resolve()

    def segment(self, scan: Scan, folder: Path) -> Segments:
        """Return the structures of a CT or MR scan under TotalSegmentator's own names.

        Raises:
            DataError: The scan is PET, or the run failed.
        """
        if scan.modality not in _TASKS:
            raise DataError("TotalSegmentator labels CT and MR only.", "Use another segmenter for this series.")
        source, answer, settings = hand_over(scan, folder), folder / "labels.nii.gz", folder / "settings"
        settings.mkdir()
        quiet = {"totalseg_id": "none", "send_usage_stats": False, "prediction_counter": 0}
        (settings / "config.json").write_text(json.dumps(quiet | {"statistics_disclaimer_shown": True}))
        run_apart(
            [self._program, "-i", str(source), "-o", str(answer), "--ml", "--task", _TASKS[scan.modality], "--quiet"],
            folder,
            "TotalSegmentator",
            {"TOTALSEG_WEIGHTS_PATH": str(self._weights), "TOTALSEG_HOME_DIR": str(settings)},
        )
        return Segments(take_back(answer, scan), label_names(answer))


def label_names(path: Path) -> dict[int, tuple[str, str]]:
    """Read the names that TotalSegmentator keeps in its label map's NIfTI extension.

    Raises:
        DataError: There are none.
    """
    import nibabel as nib

    texts = [
        bytes(e.get_content()).decode("utf-8", "replace") for e in nib.Nifti1Image.from_filename(path).header.extensions
    ]
    names = {int(key): (name, "") for text in texts for key, name in _LABEL.findall(text)}
    if not names:
        raise DataError("TotalSegmentator's label map does not say what its numbers mean.", "Use version 2 or later.")
    return names
