"""The second pass over ``report.json``: the parts that this program writes, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deid_tools.report import PROGRAM

UNFINISHED = "the run that writes this folder is not finished; run it again, it goes on where it stopped"
_STRANGE = "the report is not one that this program writes"
_PARTS: dict[str, type] = {
    "program": str,
    "finished": bool,
    "files_seen": int,
    "patients": int,
    "series": list,
    "quarantined": list,
    "reasons": dict,
    "recipe": str,
    "key_id": str,
    "unreadable_values": dict,
    "recipe_sha256": str,
    "pixel_policy": str,
    "burned_in_text": str,
    "tools": dict,
}
_SERIES: dict[str, type] = {
    "token": str,
    "modality": str,
    "images": int,
    "labels": int,
    "already_there": bool,
    "labels_held": int,
    "notes": list,
    "text_boxes_blanked": int,
    "face": str,
    "face_guard": str,
}
_HELD: dict[str, type] = {"token": str, "reason": str}
_FORMS = (
    ("program", re.compile(re.escape(PROGRAM))),
    ("key_id", re.compile(r"[0-9a-f]{12}|")),
    ("recipe_sha256", re.compile(r"[0-9a-f]{64}")),
    ("pixel_policy", re.compile(r"[0-9a-f]{12}|")),
)
_TOKEN = re.compile(r"P-[A-Z2-7]{16}/S-[A-Z2-7]{16}")
_ITEM = re.compile(r"item-\d{4,6}")
_MODALITY = re.compile(r"CT|MR|PT")
_TOOL, _VERSION = re.compile(r"medlsdm|deid|pydicom|numpy"), re.compile(r"[0-9][0-9A-Za-z.+-]{0,30}")
_SENTENCE = 400


def check_report(path: Path, net: tuple[tuple[str, re.Pattern[str]], ...]) -> Iterator[str]:
    """Yield what is wrong with a report; one that does not say that its run is finished is a problem too.

    Args:
        path: The file.
        net: Names and patterns that no sentence may hold.
    """
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        yield _STRANGE
        return
    if not _well_formed(report):
        yield _STRANGE
        return
    if report.get("finished") is not True:
        yield UNFINISHED
    sentences = [*report.get("reasons", ()), *report.get("unreadable_values", ()), report.get("burned_in_text", "")]
    sentences += [held["reason"] for held in report.get("quarantined", ())]
    for series in report.get("series", ()):
        sentences += [series.get("face", ""), series.get("face_guard", ""), *series.get("notes", ())]
    sentences.append(report.get("recipe", ""))
    if any(not isinstance(text, str) or len(text) > _SENTENCE for text in sentences):
        yield _STRANGE
        return
    yield from (f"{name} in the report" for name, pattern in net if any(pattern.search(text) for text in sentences))


def _well_formed(report: Any) -> bool:
    if not _has(report, _PARTS) or any(not form.fullmatch(report.get(part, "")) for part, form in _FORMS[:2]):
        return False
    if any(part in report and not form.fullmatch(report[part]) for part, form in _FORMS):
        return False
    counts = [*report.get("reasons", {}).values(), *report.get("unreadable_values", {}).values()]
    if not all(type(count) is int for count in counts):
        return False
    series, held = report.get("series", []), report.get("quarantined", [])
    tools = report.get("tools", {}).items()
    return (
        all(_has(row, _SERIES) and _TOKEN.fullmatch(row.get("token", "")) for row in series)
        and all(_MODALITY.fullmatch(row.get("modality", "")) for row in series)
        and all(_has(row, _HELD) and _ITEM.fullmatch(row.get("token", "")) and "reason" in row for row in held)
        and all(_TOOL.fullmatch(name) and _VERSION.fullmatch(str(version)) for name, version in tools)
    )


def _has(row: Any, parts: dict[str, type]) -> bool:
    """Tell whether a row is an object with no other parts than these, each of its type."""
    return isinstance(row, dict) and all(type(value) is parts.get(key) for key, value in row.items())
