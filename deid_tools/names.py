"""What a hospital's own label objects call their structures, and the class that each would become.

For the screen of the person who writes the label schema: the names are the files' own words, may say
anything, and are written down nowhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deid_tools.admit import ADMITTED, Refusal, read_strict
from deid_tools.contours import structure_names
from deid_tools.nested import match_class
from deid_tools.segmentations import segment_name
from medlsdm.types import LabelSchema


@dataclass(frozen=True, slots=True)
class StructureName:
    """Hold one name as the files use it: its code ("" if none), how often, and its class ("" if unknown)."""

    name: str
    code: str
    count: int
    becomes: str


def list_names(folder: Path, schema: LabelSchema | None) -> list[StructureName]:
    """List the segments and structures of every SEG and RTSTRUCT below a folder, the most frequent first."""
    found: Counter[tuple[str, str, str]] = Counter()
    for parent, _, files in os.walk(folder):
        for file in files:
            found.update(_names(Path(parent) / file))
    rows = []
    for (name, value, scheme), count in found.most_common():
        cls = match_class(schema, value, scheme, name) if schema else None
        rows.append(StructureName(name, f"{value} {scheme}".strip(), count, cls.name if cls else ""))
    return rows


def _names(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        ds = read_strict(path, headers_only=True)
        kind = ADMITTED.get(str(ds.get("SOPClassUID", "")), "")
        if kind == "RTSTRUCT":
            yield from structure_names(ds).values()
        elif kind == "SEG":
            yield from map(segment_name, ds.SegmentSequence)
    except (Refusal, OSError, AttributeError, KeyError, IndexError, TypeError, ValueError):
        return  # 'run' says why a file is held; here it has no names to show
