"""The evidence of a run, study by study: what was removed, kept and refused, under which rules; never a value.

A study is named by pseudonym and keyed token. Attributes are named by the standard's keywords, everything else
is counted. Pictures before and after show the original: they are made only where a folder is named for them,
which lies outside the output.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deid_tools.pixels import TextSearch
from deid_tools.png import write_private
from deid_tools.recipes import Option, Recipe, load_recipe
from deid_tools.report import PROGRAM, StudyEvidence
from deid_tools.run import Run, Series
from deid_tools.tally import Fate
from deid_tools.thumbnails import picture_paths
from deid_tools.treatment import PixelPolicy
from medlsdm.errors import DataError

VERSION = 1
PICTURES = "pictures"
CHECKS = (
    "every file was read back, byte by byte, by a reader of its own",
    "every element stands on the verifier's own list, at every depth, with the type that the standard gives it",
    "preamble empty, file meta rebuilt, no private element but those that the recipe names",
    "names and IDs are pseudonyms, UIDs are keyed or the standard's, dates as the recipe's options say",
    "text values hold nothing that looks like a date, a telephone or record number or an e-mail address",
    "none of the original's own strings stands in the file, in one-byte encodings, UTF-8 or UTF-16, nor words of "
    "its file and folder names",
    "the stamps that say how it was de-identified are there",
    "the pixels are as long as declared and the last element",
)
_OPTIONS = {
    Option.MODIFIED_DATES: "dates stay, shifted by one number of days a patient",
    Option.PATIENT_CHARACTERISTICS: "sex, age, size, weight and the like stay",
    Option.AGE_BANDS: "ages stay in bands of five years",
    Option.CLEAN_DESCRIPTORS: "descriptions stay, reduced to known words",
    Option.SAFE_PRIVATE: "private elements that hold numbers stay, named by maker",
}


@dataclass(frozen=True, slots=True)
class EvidenceFolder:
    """Name the private folder for evidence; with ``pictures`` it shows originals."""

    path: Path
    pictures: bool = True

    @property
    def picture_folder(self) -> Path | None:
        """Return where pictures go."""
        return self.path / PICTURES if self.pictures else None

    def prepare(self, source: Path, out: Path) -> None:
        """Make the folder, or raise DataError where it is not private or not apart from source and output."""
        here = self.path.resolve()
        for other in (source.resolve(), out.resolve()):
            if here == other or here in other.parents or other in here.parents:
                raise DataError(
                    "The evidence folder lies in the source or the output, or they in it.",
                    "Give a folder of its own: its pictures show the originals.",
                )
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.path.is_dir() or self.path.stat().st_mode & 0o077:
            raise DataError("Others may look into the evidence folder.", "Run chmod 700 on it, or give a new one.")


def weaker(recipe: Recipe, policy: PixelPolicy) -> tuple[str, ...]:
    """Say in words what a run's settings let stay beyond the default; empty where nothing does."""
    found = []
    if recipe.sha256 != load_recipe().sha256:
        own = recipe.name != "basic" or recipe.sha256 != load_recipe("basic", recipe.options).sha256
        found.append(
            "the recipe is the site's own" if own else "the recipe basic keeps more of a header than the allow-list"
        )
        found += [_OPTIONS[option] for option in recipe.options]
    if not policy.faces:
        found.append("faces in head scans stay")
    if policy.rules is not None:
        found.append("the device rules are the site's own")
    return tuple(found)


def study_evidence(run: Run, tools: Mapping[str, str]) -> tuple[StudyEvidence, ...]:
    """Return the evidence of every study of which something passed or is held, by name."""
    series: dict[str, list[Series]] = defaultdict(list)
    held: dict[str, Counter[str]] = defaultdict(Counter)
    for one in run.passed.values():
        series[one.study].append(one)
    for file in run.held:
        held[file.study][file.reason] += 1
    common = _common(run, tools, sum(held.pop("", Counter()).values()))
    return tuple(
        StudyEvidence(*_parted(name), _document(name, series[name], held[name], common))
        for name in sorted({*series, *held})
    )


def _common(run: Run, tools: Mapping[str, str], elsewhere: int) -> dict[str, Any]:
    recipe, policy = run.cleaner.recipe, run.policy
    return {
        "program": PROGRAM,
        "kind": "evidence",
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": {
            "name": recipe.name,
            "options": [str(option) for option in recipe.options],
            "sha256": recipe.sha256,
            "codes": list(recipe.codes),
        },
        "key_id": run.cleaner.keys.id,
        "pixels": {
            "burned_in_text": policy.text,
            "faces": "remove" if policy.faces else "keep",
            "device_rules": hashlib.sha256(policy.rules.read_bytes()).hexdigest() if policy.rules else "the package's",
            "text_search": TextSearch.state(),
        },
        "weaker": list(weaker(recipe, policy)),
        "tools": dict(tools),
        "files_of_no_study": elsewhere,
    }


def _document(name: str, series: list[Series], held: Counter[str], common: dict[str, Any]) -> dict[str, Any]:
    rows = [_series(one) for one in sorted(series, key=lambda one: one.token)]
    patient, study = _parted(name)
    return common | {
        "patient": patient,
        "study": study,
        "series": rows,
        "held": {"files": sum(held.values()), "reasons": dict(held.most_common())},
        "second_pass": {"files": sum(row["checked"] for row in rows), "problems": 0, "checks": list(CHECKS)},
    }


def _parted(name: str) -> tuple[str, str]:
    """Part the name of a study's evidence into pseudonym and study token, ``P-...`` and ``ST-...``."""
    patient, _, token = name.rpartition("-ST-")
    return patient, f"ST-{token}"


def _series(one: Series) -> dict[str, Any]:
    from pydicom.uid import UID

    tally = one.tally
    return {
        "token": one.token,
        "modality": one.modality,
        "images": one.images,
        "label_maps": one.labels,
        "label_maps_held": one.labels_held,
        "already_there": one.already,
        "headers": tally.files,
        "checked": 0 if one.already else one.images + one.labels,
        "transfer_syntaxes": {UID(uid).name: count for uid, count in sorted(tally.syntaxes.items())},
        "attributes": {
            str(fate): dict(sorted(tally.attributes[fate].items())) for fate in Fate if fate in tally.attributes
        },
        "others": {str(other): count for other, count in sorted(tally.others.items())},
        "unreadable": dict(sorted(one.unreadable.items())),
        "text_boxes_blanked": one.pixels.text_boxes,
        "face": one.pixels.face,
        "face_guard": one.pixels.guard,
        "notes": list(one.notes),
    }


def write_evidence(folder: EvidenceFolder, studies: tuple[StudyEvidence, ...]) -> tuple[StudyEvidence, ...]:
    """Write ``NAME.json`` and ``NAME.html`` for each study, mode 0600; what an earlier run counted stays."""
    from deid_tools.evidence_page import render

    written = []
    for study in studies:
        path = folder.path / f"{study.name}.json"
        document = _with_earlier(study.document, path)
        write_private(path, json.dumps(document, indent=2).encode() + b"\n")
        page = render(document, read_pictures(folder.path / PICTURES, document))
        write_private(path.with_suffix(".html"), page.encode())
        written.append(StudyEvidence(study.patient, study.study, document))
    return tuple(written)


def _with_earlier(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put what an earlier run counted in place of the rows of series that this run found done."""
    if not path.is_file() or not any(row["already_there"] for row in document["series"]):
        return document
    try:
        earlier = json.loads(path.read_bytes())
        rows = {row["token"]: row | {"already_there": True, "done": row.get("done", earlier["made"])}
                for row in earlier["series"] if earlier["version"] == VERSION and row["headers"]}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            "The evidence of an earlier run cannot be read.", "Give another folder for the evidence."
        ) from None
    series = [rows.get(row["token"], row) if row["already_there"] else row for row in document["series"]]
    return document | {"series": series}


def read_pictures(folder: Path, document: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the pictures of a study's series, by ``TOKEN before``, ``TOKEN after`` and ``TOKEN face``."""
    found = {}
    for row in document["series"]:
        before, after = picture_paths(folder, row["token"])
        face = folder / f"{row['token'].replace('/', '-')}.png"
        for what, path in (("before", before), ("after", after), ("face", face)):
            if path.is_file():
                found[f"{row['token']} {what}"] = path.read_bytes()
    return found
