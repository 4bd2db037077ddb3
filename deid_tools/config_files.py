"""Where the recipes and lists of the package lie: ``configs/deid``."""

from __future__ import annotations

from pathlib import Path

import medlsdm
from medlsdm.errors import ConfigError


def deid_folder() -> Path:
    """Return ``configs/deid``: inside the installed package, else beside it in a source checkout."""
    package = Path(medlsdm.__file__).resolve().parent
    for folder in (package / "configs" / "deid", package.parent / "configs" / "deid"):
        if folder.is_dir():
            return folder
    raise ConfigError("The folder configs/deid is missing from this installation.", "Install medlsdm again.")
