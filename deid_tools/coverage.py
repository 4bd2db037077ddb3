"""What each recipe does with every row of PS3.15 table E.1-1: ``python -m deid_tools.coverage`` writes the page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from deid_tools.config_files import deid_folder
from deid_tools.frames import NESTED_DATES, NESTED_UIDS, REFERENCES
from deid_tools.modules import written_by_us
from deid_tools.recipes import Option, Recipe, load_recipe

TABLE = "ps315-e1-1.tsv"
EDITION = "2026c"
_RULES = {
    "keyed_uid": "new UID",
    "pseudonym": "pseudonym",
    "shift": "moved",
    "age": "kept, 90 and over as 090Y",
    "age_band": "kept in bands of five years",
    "clean_text": "cleaned",
}
_MAY = {
    "X": ("removed",),
    "Z": ("removed", "empty or removed", "dummy or removed", "pseudonym"),
    "D": ("removed", "dummy or removed", "pseudonym"),
    "U": ("removed", "new UID"),
}
_OPTION = {
    "moved": "dates",
    "kept": "characteristics",
    _RULES["age"]: "characteristics",
    _RULES["age_band"]: "characteristics",
    "cleaned": "descriptors",
    "named numbers kept": "private",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Hold one row: tag or group, the profile's action, the options that name it, its name and keyword."""

    tag: str
    action: str
    options: frozenset[str]
    name: str
    keyword: str


def rows() -> list[Row]:
    """Read the table's rows from ``configs/deid``."""
    from pydicom.datadict import keyword_for_tag

    found = []
    for line in (deid_folder() / TABLE).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            tag, action, options, name = line.split("\t")
            keyword = keyword_for_tag(int(tag, 16)) if _is_tag(tag) else ""
            found.append(Row(tag, action, frozenset(options.split(",")), name, keyword))
    return found


def _is_tag(text: str) -> bool:
    return len(text) == 8 and "x" not in text


def treatment(row: Row, recipe: Recipe) -> str:
    """Return in words what a recipe does with an attribute of CT, MR, PET and SEG objects."""
    keyword = row.keyword
    if row.tag == "odd":
        return "named numbers kept" if recipe.private else "removed"
    if keyword in recipe.replaced:
        return _RULES[recipe.replaced[keyword].partition(":")[2]]
    if keyword and keyword in recipe.kept:
        return "kept"
    if keyword in NESTED_UIDS or (keyword in REFERENCES and recipe.name == "basic"):
        return "new UID"
    if keyword in NESTED_DATES:
        return "dummy or removed"
    sets = [written_by_us(kind) for kind in ("CT", "MR", "PT", "SEG")]
    if keyword and any(keyword in dummies for _, dummies in sets):
        return "dummy or removed"
    return "empty or removed" if keyword and any(keyword in empties for empties, _ in sets) else "removed"


def agrees(row: Row, done: str) -> bool:
    """Tell whether what is done fits the profile's action, or an option that names the row."""
    if any(done in _MAY[code] for code in row.action.replace("*", "").split("/")):
        return True
    return _OPTION.get(done) in row.options


def page() -> str:
    """Return the page of the documentation."""
    minimal, basic = load_recipe(), load_recipe("basic")
    full = load_recipe("basic", Option)
    table = rows()
    lines = [*_opening(table), "| tag | attribute | profile | options | allow-list | basic | basic, all options |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in table:
        tag = f"{row.tag[:4]},{row.tag[4:]}" if row.tag != "odd" else "odd groups"
        options = ", ".join(sorted(row.options - {"-"})) or ""
        done = [treatment(row, recipe) for recipe in (minimal, basic, full)]
        lines.append(f"| {tag} | {row.keyword or row.name} | {row.action} | {options} | {' | '.join(done)} |")
    return "\n".join(lines) + "\n"


def _opening(table: list[Row]) -> Iterator[str]:
    yield "# Coverage of PS3.15 table E.1-1"
    yield ""
    yield (
        f"All {len(table)} rows of edition {EDITION}, written down in November 2026, and what the recipes of "
        "`configs/deid` do with each at the top of a CT, MR, PET or SEG object. This page is made by "
        "`python -m deid_tools.coverage`, and a test plants a value in every row and looks for it."
    )
    yield ""
    yield (
        "Profile: X remove, Z empty or dummy, D dummy, U new UID. Both recipes are allow-lists, so what the "
        "standard does not list is removed too unless the recipe names it, and so is every sequence but those "
        "that carry geometry, frames, segments and (basic) references, at every depth. "
        '"Removed" where the profile says Z or D: no object that is written has the attribute; where one needs it, it '
        "is put back empty or as a dummy. Options: the columns that name the row (`?`: the row is "
        "younger than the list of options that was at hand; no option is applied to it). `uids`, `device`, "
        "`institution`, `graphics` and `structured` are not offered. Also stricter than an option asks: "
        "ethnic group, allergies, patient state, pre-medication and special needs are free text and go."
    )
    yield ""


def main() -> None:
    """Print the page."""
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
