"""The plug-in point for sites without label maps: what a segmenter is, how one is found, how its answer is used.

A segmenter is found under the entry point group ``medlsdm.segmenters``: a callable that takes the
text after ``NAME=`` (a folder, or nothing) and returns an object with ``segment``. Three are built in.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deid_tools.nested import match_class
from medlsdm.errors import ConfigError, DataError, MedlsdmError, SchemaError
from medlsdm.types import LabelSchema, Scan, SemanticMap

GROUP = "medlsdm.segmenters"
BUILT_IN = {
    "hu-thresholds": "deid_tools.segmenter_thresholds:HuThresholds",
    "totalsegmentator": "deid_tools.segmenter_total:TotalSegmentator",
    "monai-bundle": "deid_tools.segmenter_monai:MonaiBundle",
}


@dataclass(frozen=True, slots=True, repr=False)
class Segments:
    """Hold what a segmenter found: whole numbers on the scan's grid, and what each number means.

    ``names`` gives, for every number but 0, a name and a SNOMED CT code ("" if none).
    """

    array: NDArray[Any]
    names: dict[int, tuple[str, str]]


class Segmenter(Protocol):
    """Label a scan. ``folder`` is private and empty; whatever is written there is removed afterwards."""

    def segment(self, scan: Scan, folder: Path) -> Segments:
        """Return the structures of a scan.

        Raises:
            DataError: The scan is not of a kind that this segmenter knows, or the run failed.
        """
        ...


def segmenter_names() -> list[str]:
    """Return the names that ``load_segmenter`` knows on this machine."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def load_segmenter(text: str) -> Segmenter:
    """Make the segmenter that ``NAME`` or ``NAME=FOLDER`` asks for. A built-in name cannot be taken over.

    Raises:
        ConfigError: There is none of this name, or it cannot run here.
    """
    name, _, argument = text.partition("=")
    if name in BUILT_IN:
        module, _, factory = BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), factory)(argument)
    points = list(entry_points(group=GROUP, name=name))
    if len(points) != 1:
        found = "Several plug-ins call themselves" if points else "There is no segmenter"
        raise ConfigError(f"{found} {name!r}.", f"Known are: {', '.join(segmenter_names())}.")
    try:
        return points[0].load()(argument)
    except MedlsdmError:
        raise
    except Exception:
        raise ConfigError(f"The segmenter {name!r} cannot be loaded.", "Install it again, or ask its makers.") from None


def apply(segmenter: Segmenter, scan: Scan, schema: LabelSchema, work: Path) -> SemanticMap:
    """Run a segmenter and bring its answer under the schema, by SNOMED code, then by name or alias.

    Args:
        segmenter: What ``load_segmenter`` returned.
        scan: The scan to label.
        schema: The site's label schema.
        work: Where the segmenter's private folder is made; it is gone when this returns.

    Raises:
        SchemaError: It found structures that the schema does not know.
        DataError: It failed, or its answer is not on the scan's grid.
    """
    try:
        with tempfile.TemporaryDirectory(dir=work, prefix=".working-") as folder:
            found = segmenter.segment(scan, Path(folder))
            array, names = np.asarray(found.array), dict(found.names)
    except (MedlsdmError, MemoryError):
        raise
    except Exception:  # a plug-in may fail in any way, and its words may hold anything
        raise DataError("The segmenter failed on this scan.", "Run it by hand to see why.") from None
    if array.shape != scan.geometry.shape or array.dtype.kind not in "iu" or array.min() < 0:
        raise DataError("The segmenter's answer is not a label map on the scan's grid.", "Ask its makers.")
    return SemanticMap(_under_schema(array, names, schema), scan.geometry, schema)


def _under_schema(array: NDArray[Any], names: dict[int, tuple[str, str]], schema: LabelSchema) -> NDArray[np.uint16]:
    values, inverse = np.unique(array, return_inverse=True)
    classes, unknown = np.zeros(len(values), np.uint16), []
    for k, value in enumerate(values.tolist()):
        if value == 0:
            continue
        name, code = names.get(value, ("", ""))
        found = match_class(schema, code, "SCT" if code else "", name) if name else None
        if found is None:
            unknown.append(name or f"value {value}")
        else:
            classes[k] = found.id
    if unknown:
        shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        raise SchemaError(
            f"The segmenter finds {len(unknown)} structures that the label schema {schema.name!r} lacks: {shown}.",
            "Add them to the schema as aliases, or to its background ('*' there leaves out what is not named).",
        )
    return classes[inverse].reshape(array.shape)
