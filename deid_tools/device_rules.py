"""Regions that a make of scanner or workstation is known to write text into, declared in YAML.

A rule matches on manufacturer, model, modality, image type and size of the ORIGINAL header. It either
names boxes to be blanked or holds the series. A rule cannot let anything pass: what it does not name
is searched all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.admit import Refusal
from deid_tools.config_files import deid_folder
from deid_tools.ocr import Box
from medlsdm.errors import ConfigError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_TEXT = {"manufacturer": "Manufacturer", "model": "ManufacturerModelName"}
_KEYS = {"name", "manufacturer", "model", "modality", "image_type", "rows", "columns", "action", "boxes"}
_HINT = "Correct the device rules; docs/deid-pixels.md shows their form."


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """Match one make of device and say where it writes. Empty conditions match anything."""

    name: str
    contains: tuple[tuple[str, str], ...]
    equals: tuple[tuple[str, str], ...]
    image_type: str
    blank: bool
    boxes: tuple[Box, ...]

    def matches(self, ds: Dataset) -> bool:
        """Tell whether an original header meets every condition."""
        kinds: Any = ds.get("ImageType", None) or []
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return (
            all(part in str(ds.get(keyword, "") or "").casefold() for keyword, part in self.contains)
            and all(str(ds.get(keyword, "") or "") == value for keyword, value in self.equals)
            and (not self.image_type or self.image_type in [str(kind).upper() for kind in kinds])
        )


class DeviceRules:
    """Hold the declared rules of a site.

    Args:
        path: A YAML list; by default the one that comes with the package.

    Raises:
        ConfigError: The file cannot be read, or a rule is not of the known form.
    """

    def __init__(self, path: Path | None = None) -> None:
        import yaml

        path = path or deid_folder() / "device-rules.yaml"
        try:
            listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            raise ConfigError("The device rules cannot be read.", _HINT) from None
        if not isinstance(listed, list):
            raise ConfigError("The device rules are not a list.", _HINT)
        self.rules = tuple(_rule(entry, n + 1) for n, entry in enumerate(listed))

    def boxes(self, ds: Dataset) -> list[Box]:
        """Return the boxes that the rules want blank in an image, cut to its size.

        Raises:
            Refusal: A rule holds images of this device.
        """
        found = []
        for rule in self.rules:
            if not rule.matches(ds):
                continue
            if not rule.blank:
                raise Refusal("a device rule holds images of this kind, which carry text")
            rows, columns = int(ds.Rows), int(ds.Columns)
            found += [(top, left, min(end, rows), min(right, columns)) for top, left, end, right in rule.boxes]
        return [box for box in found if box[0] < box[2] and box[1] < box[3]]


def _rule(entry: Any, number: int) -> DeviceRule:
    if not isinstance(entry, dict) or not entry.get("name") or set(entry) - _KEYS:
        raise ConfigError(f"Device rule {number} has no name or unknown keys.", _HINT)
    contains = tuple((tag, str(entry[key]).casefold()) for key, tag in _TEXT.items() if entry.get(key))
    named = (("modality", "Modality"), ("rows", "Rows"), ("columns", "Columns"))
    equals = tuple((tag, str(entry[key])) for key, tag in named if entry.get(key) is not None)
    image_type = str(entry.get("image_type") or "").upper()
    action, boxes = entry.get("action"), entry.get("boxes") or []
    if action not in ("blank", "quarantine") or not (contains or equals or image_type):
        raise ConfigError(f"Device rule {number} has no condition, or its action is not blank or quarantine.", _HINT)
    if (action == "blank") != bool(boxes) or not isinstance(boxes, list) or not all(_is_box(box) for box in boxes):
        raise ConfigError(f"Device rule {number} needs boxes [top, left, bottom, right] to blank.", _HINT)
    return DeviceRule(
        str(entry["name"]), contains, equals, image_type, action == "blank", tuple(tuple(box) for box in boxes)
    )


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int) and v >= 0 for v in box)
        and box[0] < box[2]
        and box[1] < box[3]
    )
