"""Score a de-identifier against an answer key: ten classes of action, and a search in raw bytes.

The classes are those of the MIDI-B challenge. The scorer opens whatever lies in the output folder; it
shares no code with the verifier, and it judges any program's output, not only ours.
"""

from __future__ import annotations

import datetime
import gzip
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.answers import AnswerKey, Box, Source, digest, outside
from deid_tools.corners import Kind

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_CODECS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "iso2022_jp", "shift_jis")
_STRETCH = 5
_PRINTABLE = re.compile(rb"[\x21-\x7e]{5,}")
_NOT_NULL = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "PatientName",
    "Modality",
)
_WORDS = ("Modality", "PhotometricInterpretation", "PatientPosition")


class Action(StrEnum):
    """Name the ten classes."""

    TAG_RETAINED = "tag retained"
    TEXT_NOT_NULL = "text not null"
    TEXT_RETAINED = "text retained"
    TEXT_REMOVED = "text removed"
    DATE_SHIFTED = "date shifted"
    UID_CHANGED = "uid changed"
    UID_CONSISTENT = "uid consistent"
    PATIENT_CONSISTENT = "patient id consistent"
    PIXELS_HIDDEN = "pixels hidden"
    PIXELS_RETAINED = "pixels retained"


@dataclass(slots=True)
class Score:
    """Count passes and checks by class, and name each failure (the place, never the token)."""

    passed: dict[Action, int] = field(default_factory=lambda: dict.fromkeys(Action, 0))
    total: dict[Action, int] = field(default_factory=lambda: dict.fromkeys(Action, 0))
    failures: list[tuple[Action, str]] = field(default_factory=list)
    intervals: str = "no dates were kept"

    def check(self, action: Action, good: bool, what: str) -> None:
        """Count one check."""
        self.total[action] += 1
        self.passed[action] += good
        if not good:
            self.failures.append((action, what))

    @property
    def leaks(self) -> int:
        """Return how many identifiers can still be found."""
        kinds = (Action.TEXT_REMOVED, Action.DATE_SHIFTED, Action.UID_CHANGED, Action.PIXELS_HIDDEN)
        return sum(self.total[a] - self.passed[a] for a in kinds)


def score(key: AnswerKey, out: Path) -> Score:
    """Judge what a program wrote to ``out`` for the planted images of ``key``."""
    result = Score()
    _search(key, out, result)
    outputs = dict(_outputs(out, {s.near for s in key.sources if s.box is None}))
    matched = {s.name: outputs.get((s.near, s.pixels)) for s in key.sources if s.box is None}
    for source in key.sources:
        if source.box is None:
            _judge_image(source, matched[source.name], result)
    pairs = [(s, ds) for s in key.sources if (ds := matched.get(s.name)) is not None]
    _judge_uids(pairs, result)
    _judge_patients(pairs, result)
    _judge_hidden(key, out, result)
    result.intervals = _intervals(pairs)
    return result


def leaks_in(content: bytes, tokens: list[str]) -> set[str]:
    """Return the tokens that stand in bytes, in any of six encodings and in either case.

    ASCII tokens are searched in the printable stretches, as they stand and with zeros left out (UTF-16
    of either order); all others in the bytes, form by form.
    """
    lower = content.lower()
    printable = b"\n".join(_PRINTABLE.findall(lower) + _PRINTABLE.findall(lower.replace(b"\0", b"")))
    found = set()
    for token in tokens:
        if token.isascii() and len(token) >= _STRETCH and _PRINTABLE.fullmatch(token.encode()):
            good = token.lower().encode() in printable
        else:
            good = any(form in lower for form in _encoded(token))
        if good:
            found.add(token)
    return found


@cache
def _encoded(token: str) -> frozenset[bytes]:
    forms = set()
    for case in {token, token.upper(), token.lower()}:
        for codec in _CODECS:
            try:
                forms.add(case.encode(codec).lower().removeprefix(b"\x1b$b").removesuffix(b"\x1b(b").strip(b"\0"))
            except UnicodeEncodeError:
                continue
    return frozenset(forms)


def _forms(token: str, kind: Kind) -> list[str]:
    if kind is not Kind.DATE:
        return [token]
    year, month, day = token[:4], token[4:6], token[6:]
    return [token, f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}"]


def _search(key: AnswerKey, out: Path, result: Score) -> None:
    by_form = {form: plant for plant in key.plants for form in _forms(plant.token, plant.kind)}
    found: dict[str, str] = {}
    for path in sorted(out.rglob("*")):
        content = str(path.relative_to(out)).encode()
        if path.is_file():
            raw = path.read_bytes()
            content += b"\n" + raw + b"\n" + _unpacked(raw)
        for form in leaks_in(content, list(by_form)):
            found.setdefault(by_form[form].token, path.suffix or "folder")
    actions = {Kind.TEXT: Action.TEXT_REMOVED, Kind.DATE: Action.DATE_SHIFTED, Kind.UID: Action.UID_CHANGED}
    for plant in key.plants:
        result.check(actions[plant.kind], plant.token not in found, plant.place)


def _unpacked(raw: bytes) -> bytes:
    if raw[:2] != b"\x1f\x8b":
        return b""
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error):
        return b""


def _images(out: Path) -> Iterator[tuple[Dataset, Any]]:
    import pydicom

    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = pydicom.dcmread(path)
                pixels = ds.pixel_array
            except Exception:  # noqa: S112  # reports, label maps and what another program wrote: no image
                continue
            yield ds, pixels


def _outputs(out: Path, boxes: set[Box | None]) -> Iterator[tuple[tuple[Box | None, str], Dataset]]:
    for ds, pixels in _images(out):
        del ds.PixelData
        for near in boxes:
            yield (near, digest(outside(pixels, near))), ds


def _judge_image(source: Source, ds: Dataset | None, result: Score) -> None:
    result.check(Action.PIXELS_RETAINED, ds is not None, source.name)
    for keyword, value in source.retained.items():
        kept = ds is not None and keyword in ds and _same(str(ds[keyword].value), value)
        result.check(Action.TAG_RETAINED, kept, f"{keyword} of {source.name}")
        if keyword in _WORDS:
            result.check(Action.TEXT_RETAINED, kept, f"{keyword} of {source.name}")
    for keyword in _NOT_NULL:
        result.check(Action.TEXT_NOT_NULL, bool(ds is not None and ds.get(keyword)), f"{keyword} of {source.name}")


def _same(found: str, expected: str) -> bool:
    try:
        numbers = [[float(v) for v in text.strip("[]").split(",")] for text in (found, expected)]
    except ValueError:
        return found == expected
    return numbers[0] == numbers[1]


def _judge_uids(pairs: list[tuple[Source, Dataset]], result: Score) -> None:
    """Check that equal UIDs became equal ones, different ones different ones, and file meta agrees."""
    maps: dict[str, str] = {}
    for source, ds in pairs:
        meta = str(getattr(ds, "file_meta", {}).get("MediaStorageSOPInstanceUID", ""))
        sop = str(ds.get("SOPInstanceUID", ""))
        result.check(Action.UID_CONSISTENT, bool(sop) and meta == sop, f"file meta of {source.name}")
        for keyword, old in (
            ("SOPInstanceUID", source.sop),
            ("SeriesInstanceUID", source.series),
            ("StudyInstanceUID", source.study),
            ("FrameOfReferenceUID", source.frame_of_reference),
        ):
            new = str(ds.get(keyword, "") or "")
            good = bool(new) and maps.setdefault(old, new) == new
            result.check(Action.UID_CONSISTENT, good, f"{keyword} of {source.name}")
    new_ones = list(maps.values())
    result.check(Action.UID_CONSISTENT, len(set(new_ones)) == len(new_ones), "two UIDs became one")


def _judge_patients(pairs: list[tuple[Source, Dataset]], result: Score) -> None:
    new: dict[str, set[str]] = defaultdict(set)
    for source, ds in pairs:
        new[source.patient].add(str(ds.get("PatientID", "") or ""))
    for patient, ids in new.items():
        others = {i for p, found in new.items() if p != patient for i in found}
        good = len(ids) == 1 and "" not in ids and not ids & others
        result.check(Action.PATIENT_CONSISTENT, good, patient)


def _judge_hidden(key: AnswerKey, out: Path, result: Score) -> None:
    """Check that no written image still shows the box of text that was drawn."""
    burned = [s for s in key.sources if s.box is not None]
    if not burned:
        return
    shown = set()
    for _, pixels in _images(out):
        for source in burned:
            box = source.box
            if box and pixels.ndim == 2 and digest(pixels[box[0] : box[1], box[2] : box[3]]) == source.pixels:
                shown.add(source.name)
    for source in burned:
        result.check(Action.PIXELS_HIDDEN, source.name not in shown, source.name)


def _intervals(pairs: list[tuple[Source, Dataset]]) -> str:
    """Say whether the days between a patient's studies are as they were, where dates were kept."""
    days: dict[str, dict[str, str]] = defaultdict(dict)
    for source, ds in pairs:
        new = str(ds.get("StudyDate", "") or "")
        if new and new != "19000101":
            days[source.patient][source.study_date] = new
    good = total = 0
    for known in days.values():
        first, *rest = sorted(known)
        for old in rest:
            total += 1
            good += _days(old) - _days(first) == _days(known[old]) - _days(known[first])
    return f"{good} of {total} kept" if total else "no dates were kept"


def _days(text: str) -> int:
    try:
        return datetime.datetime.strptime(text, "%Y%m%d").toordinal()
    except ValueError:
        return 0
