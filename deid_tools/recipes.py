"""Recipes: which attributes stay and how, read from ``configs/deid`` and checked before anything is run.

A recipe is written in the language of pydicom/deid, of which three lines are allowed: REMOVE ALL, KEEP
and REPLACE. What a line may do is bound by the attribute's value representation: only numbers and
the standard's own terms may be kept as they are. The engine itself would accept much more, in silence.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deid_tools.config_files import deid_folder
from deid_tools.terms import TERMS
from medlsdm.errors import ConfigError

NUMBERS = ("DS", "IS", "US", "SS", "UL", "SL", "FD", "FL")
VARIABLES = {"pseudonym": ("LO", "PN")}
FUNCTIONS = {
    "keyed_uid": ("UI",),
    "shift": ("DA", "DT", "TM", "SH"),
    "age": ("AS",),
    "age_band": ("AS",),
    "clean_text": ("LO", "SH", "ST", "LT", "UT"),
}
"""The functions that a recipe may name, and the value representations that each is made for."""

_AS_IT_IS = ("SOPClassUID", "RescaleType")
_FIRST = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName")
_PRIVATE = re.compile(r'\(([0-9A-Fa-f]{4}),"([^"]{1,64})",([0-9A-Fa-f]{2})\)')
_LINE = re.compile(r"(REMOVE|KEEP|REPLACE)\s+(\(.*\)|\S+)(?:\s+(\S+))?")


class Option(StrEnum):
    """Name the options of the basic profile; each is a file ``basic.OPTION.dicom``."""

    MODIFIED_DATES = "modified-dates"
    PATIENT_CHARACTERISTICS = "patient-characteristics"
    AGE_BANDS = "age-bands"
    CLEAN_DESCRIPTORS = "clean-descriptors"
    SAFE_PRIVATE = "safe-private"


OPTION_CODES = {
    Option.MODIFIED_DATES: "113107",
    Option.PATIENT_CHARACTERISTICS: "113108",
    Option.CLEAN_DESCRIPTORS: "113105",
    Option.SAFE_PRIVATE: "113111",
}
"""What each option is called in PS3.16 CID 7050; bands of ages have no code of their own."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hold a checked recipe: the keywords that stay as they are, those that are replaced and by what."""

    name: str
    options: tuple[Option, ...]
    text: str
    kept: frozenset[str]
    replaced: Mapping[str, str]
    private: frozenset[tuple[int, str, int]]

    @property
    def sha256(self) -> str:
        """Return the digest of the whole text, options included."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """Return the name with its options, for a report."""
        return " + ".join((self.name, *self.options))

    @property
    def codes(self) -> tuple[str, ...]:
        """Return the codes of CID 7050 for what this recipe does to a header."""
        return ("113100", *sorted(OPTION_CODES[o] for o in self.options if o in OPTION_CODES))

    @property
    def shifts_dates(self) -> bool:
        """Tell whether dates are moved; else there are none."""
        return Option.MODIFIED_DATES in self.options

    def by(self, function: str) -> frozenset[str]:
        """Return the keywords that a function replaces."""
        return frozenset(k for k, value in self.replaced.items() if value.partition(":")[2] == function)


def load_recipe(name: str | Path = "allow-list", options: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or by path, with options, and check every line.

    Args:
        name: ``allow-list`` or ``basic``, or the path of a file in the same language.
        options: Options of the basic profile.

    Raises:
        ConfigError: There is no such recipe or option, or a line would let a value through unchecked.
    """
    path = Path(name) if isinstance(name, Path) or str(name).endswith(".dicom") else deid_folder() / f"{name}.dicom"
    if not path.is_file() or (not isinstance(name, Path) and "/" in name and not name.endswith(".dicom")):
        raise ConfigError("There is no de-identification recipe of that name.", "Known: allow-list, basic; or a path.")
    chosen = _options(path.stem, options)
    texts = [(f, _read(f)) for f in (path, *(deid_folder() / f"basic.{option}.dicom" for option in chosen))]
    lines, private = _merge(texts)
    problems = [p for line in lines.values() for p in _problems(*line)] + [p for p in private if not private[p]]
    missing = [k for k in _FIRST if k not in lines or lines[k][0] != "REPLACE"]
    if "ALL" not in lines:
        problems.append("it does not start from REMOVE ALL")
    problems += [f"it does not replace {keyword}" for keyword in missing]
    if problems:
        raise ConfigError(f"The de-identification recipe is not safe: {'; '.join(problems)}.", "Correct the recipe.")
    ordered = [f"{action} {field} {value}".strip() for action, field, value in lines.values()]
    return Recipe(
        path.stem,
        chosen,
        "\n".join(["FORMAT dicom", "", "%header", "", *ordered, *(f"# KEEP {p}" for p in private), ""]),
        frozenset(field for action, field, _ in lines.values() if action == "KEEP"),
        {field: value for action, field, value in lines.values() if action == "REPLACE"},
        frozenset(element for element in private.values() if element),
    )


def _options(name: str, options: Iterable[str]) -> tuple[Option, ...]:
    try:
        chosen = tuple(sorted({Option(option) for option in options}, key=list(Option).index))
    except ValueError:
        raise ConfigError("There is no such option of the recipe.", f"Known: {', '.join(Option)}.") from None
    if chosen and name != "basic":
        raise ConfigError("Options belong to the recipe basic.", "Use --recipe basic, or leave the options out.")
    if Option.AGE_BANDS in chosen and Option.PATIENT_CHARACTERISTICS not in chosen:
        raise ConfigError("Bands of ages need ages.", "Add --option patient-characteristics.")
    return chosen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError("The recipe cannot be read.", "Give a text file without accents.") from None


def _merge(texts: list[tuple[Path, str]]) -> tuple[dict[str, tuple[str, str, str]], dict[str, tuple | None]]:
    """Put the files one after the other; an option may say again how a field of the file before is replaced."""
    lines: dict[str, tuple[str, str, str]] = {}
    private: dict[str, tuple | None] = {}
    for path, text in texts:
        here: set[str] = set()
        for line in (raw.strip() for raw in text.splitlines()):
            if not line or line.startswith("#") or line in ("FORMAT dicom", "%header"):
                continue
            found = _LINE.fullmatch(line)
            if not found:
                raise ConfigError(f"The de-identification recipe is not safe: {path.name} holds {line!r}.")
            action, field, value = found[1], found[2], found[3] or ""
            if field.startswith("("):
                private[field] = _private(action, field)
            elif field in here or (field in lines and lines[field][0] != "REPLACE"):
                raise ConfigError(f"The de-identification recipe is not safe: it speaks of {field} twice.")
            else:
                lines[field] = (action, field, value)
                here.add(field)
    return lines, private


def _private(action: str, field: str) -> tuple[int, str, int] | None:
    """Return group, creator and element if the maker's dictionary says that it holds numbers or a UID."""
    from pydicom.datadict import private_dictionary_VR

    found = _PRIVATE.fullmatch(field)
    if not found or action != "KEEP":
        return None
    group, creator, element = int(found[1], 16), found[2], int(found[3], 16)
    try:
        vr = private_dictionary_VR((group << 16) | 0x1000 | element, creator)
    except KeyError:
        return None
    return (group, creator, element) if group % 2 and vr in (*NUMBERS, "UI") else None


def _problems(action: str, field: str, value: str) -> Iterable[str]:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    if (action, field) == ("REMOVE", "ALL"):
        return
    tag = tag_for_keyword(field)
    if tag is None or action == "REMOVE":
        yield f"{action} {field} is not an action on a known attribute"
        return
    vrs = dictionary_VR(tag).split(" or ")
    if action == "KEEP":
        numeric = all(vr in NUMBERS for vr in vrs)
        if not numeric and field not in _AS_IT_IS and not (vrs == ["CS"] and field in TERMS):
            yield f"{field} can hold more than numbers or known terms, so it cannot be kept as it is"
        return
    kind, _, target = value.partition(":")
    known = {"func": FUNCTIONS, "var": VARIABLES}.get(kind, {}).get(target)
    if known is None:
        yield f"{field} is replaced by something undefined"
    elif not set(vrs) <= set(known):
        yield f"{field} is replaced by something that is made for another kind of value"
