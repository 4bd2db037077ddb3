"""Where the package's recipes, lists and label schemas lie: ``configs/deid`` and ``configs/schemas``."""

from __future__ import annotations

from pathlib import Path

import medlsdm
from medlsdm.errors import ConfigError, DataError


def deid_folder() -> Path:
    """Return ``configs/deid``: inside the installed package, else beside it in a source checkout."""
    package = Path(medlsdm.__file__).resolve().parent
    for folder in (package / "configs" / "deid", package.parent / "configs" / "deid"):
        if folder.is_dir():
            return folder
    raise ConfigError("The folder configs/deid is missing from this installation.", "Install medlsdm again.")


def schema_file(name_or_path: str) -> Path:
    """Return the file of a label schema, given by its name in the package (``tissues``) or by its path.

    Raises:
        DataError: There is neither such a name nor such a file.
    """
    built_in = {path.stem: path for path in (deid_folder().parent / "schemas").glob("*.yaml")}
    path = built_in.get(name_or_path, Path(name_or_path))
    if not path.exists():
        known = ", ".join(sorted(built_in))
        raise DataError(f"There is no label schema {name_or_path!r}.", f"Known: {known}; or give a YAML or JSON file.")
    return path
