"""A MONAI bundle on the site's disk as a segmenter, run by MONAI itself in a process of its own.

A bundle's configuration is a program: use one that the site trusts as it trusts installed software.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from deid_tools.segmenter_programs import hand_over, run_apart, take_back
from deid_tools.segmenters import Segments
from medlsdm.errors import ConfigError, DataError
from medlsdm.types import Scan

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_RUN = """\
import json, sys
from monai.bundle import run
given = json.load(open("run.json"))
sys.path.insert(0, given["bundle_root"])
run(**given)
"""


class MonaiBundle:
    """Label scans with a bundle's ``configs/inference.*``, by the conventions of MONAI's model zoo.

    ``datalist``, ``dataset_dir`` and ``output_dir`` are given to it; it must write one NIfTI label
    map on the input's grid. ``configs/metadata.json`` says what its numbers mean (``channel_def``).

    Args:
        argument: The bundle's folder.

    Raises:
        ConfigError: MONAI is not installed, or the folder is not such a bundle.
    """

    def __init__(self, argument: str) -> None:
        root = Path(argument).expanduser()
        configs = [root / "configs" / name for name in _CONFIGS if (root / "configs" / name).is_file()]
        if not argument or len(configs) != 1 or not (root / "configs" / "metadata.json").is_file():
            raise ConfigError(
                "There is no MONAI bundle to use.",
                "Give a folder with configs/inference.json and configs/metadata.json: --segmenter monai-bundle=FOLDER",
            )
        if importlib.util.find_spec("monai") is None:
            raise ConfigError("MONAI is not installed.", "Run: pip install 'medlsdm[monai]'")
        self._root, self._config = root.resolve(), configs[0].resolve()
        self._names = _channel_names(root / "configs" / "metadata.json")

    def segment(self, scan: Scan, folder: Path) -> Segments:
        """Return the structures that the bundle finds, under the names of its metadata.

        Raises:
            DataError: The run failed, or wrote none or several label maps.
        """
        source, answers = hand_over(scan, folder), folder / "eval"
        answers.mkdir()
        given: dict[str, Any] = {
            "config_file": str(self._config),
            "bundle_root": str(self._root),
            "dataset_dir": str(folder),
            "datalist": [str(source)],
            "output_dir": str(answers),
        }
        (folder / "run.json").write_text(json.dumps(given))
        run_apart([sys.executable, "-c", _RUN], folder, "The MONAI bundle")
        found = sorted(p for p in answers.rglob("*") if p.name.endswith((".nii", ".nii.gz")))
        if len(found) != 1:
            raise DataError(f"The MONAI bundle wrote {len(found)} label maps; one is needed.", "Check its inference.")
        return Segments(take_back(found[0], scan), self._names)


def _channel_names(path: Path) -> dict[int, tuple[str, str]]:
    """Read what each number of a bundle's answer means.

    Raises:
        ConfigError: The metadata does not say it.
    """
    try:
        outputs = json.loads(path.read_text(encoding="utf-8"))["network_data_format"]["outputs"]
        channels = next(iter(outputs.values()))["channel_def"]
        names = {int(key): (str(name), "") for key, name in channels.items() if int(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        names = {}
    if not names:
        raise ConfigError(
            "The MONAI bundle does not say what its numbers mean.", "Add channel_def to its configs/metadata.json."
        )
    return names
