"""From a hospital's folder to a clean one: admit, de-identify, verify, and hold whatever is in doubt."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deid_tools.admit import IMAGE_CLASSES, Instance, Refusal, admit, read_strict
from deid_tools.folders import check_output, check_same_run, start_output, walk
from deid_tools.headers import HeaderCleaner
from deid_tools.keys import SiteKeys
from deid_tools.modules import save_clean
from deid_tools.nested import segment_words
from deid_tools.originals import Originals
from deid_tools.pairs import PairResult, read_pairs
from deid_tools.pixels import TextSearch, take_pixels
from deid_tools.quiet import quiet_logs
from deid_tools.recipes import Recipe
from deid_tools.report import DeidReport, HeldFile, SeriesRecord
from deid_tools.series import SeriesPlan, plan_series
from deid_tools.uids import new_uid, pseudonym, series_token
from deid_tools.verify import HARMLESS, check_file
from medlsdm.checks import existing_folder, file_digest, write_atomic
from medlsdm.errors import DataError, MedlsdmError, ResourceError
from medlsdm.types import Geometry, LabelSchema
from medlsdm.volumes import NIFTI_SUFFIXES, write_nifti

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["PairResult", "deidentify", "read_pairs"]

Progress = Callable[[str, int, int], None]
_BROKEN_SERIES = "another file of its series is held, and a series with a hole is of no use"
_GRID_TOLERANCE = 0.05


def deidentify(
    source: Path,
    out: Path,
    keys: SiteKeys,
    *,
    schema: LabelSchema | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> DeidReport:
    """De-identify every DICOM series under a folder, and the label maps that belong to them.

    Writes ``out/<pseudonym>/<series token>/0001.dcm`` and on, ``seg-<digits>.dcm`` for a DICOM SEG,
    ``labels.nii.gz`` for a NIfTI label map, and ``out/report.json``. A series that is already
    there is left as it is, so that running again resumes.

    Args:
        source: The hospital's folder, searched through; symbolic links are not followed.
        out: Where the result goes: absent, empty, or the output of an earlier run.
        keys: The site's keys for the project; equal keys give equal pseudonyms.
        schema: The label schema; with it, segments may be named by label and values are checked.
        recipe: What stays of a header; by default the allow-list.
        progress: Called with what is being done, how many are done, and how many there are.

    Raises:
        DataError: The source is empty, ``out`` holds something else, or was made with another key or recipe.
    """
    existing_folder(source, "The source folder")
    check_output(source, out)
    cleaner = HeaderCleaner(keys, schema=schema, recipe=recipe)
    check_same_run(out, cleaner.recipe_sha256, keys.id)
    run = _Run(source, out, cleaner, schema, progress or (lambda *_: None))
    start_output(out, cleaner.recipe_sha256, keys.id)
    with quiet_logs(), tempfile.TemporaryDirectory(dir=out, prefix=".working-") as working:
        run.working = Path(working)
        run.admit_all()
        run.images()
        run.segmentations()
        run.label_maps()
    report = run.report()
    write_atomic(out / "report.json", json.dumps(report.to_json(), indent=2).encode())
    return report


@dataclass(slots=True)
class _Series:
    """Follow one series that passed, so that its labels can find it."""

    folder: Path
    modality: str
    plan: SeriesPlan | None
    sources: set[Path]
    frame_of_reference: str
    study_uid: str
    images: int
    labels: int = 0
    already: bool = False

    @property
    def token(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def grid(self) -> Geometry | None:
        return self.plan.canonical if self.plan else None


@dataclass(slots=True)
class _Run:
    source: Path
    out: Path
    cleaner: HeaderCleaner
    schema: LabelSchema | None
    progress: Progress
    working: Path = Path()
    files_seen: int = 0
    groups: dict[str, list[Instance]] = field(default_factory=lambda: defaultdict(list))
    maps: list[Path] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    passed: dict[str, _Series] = field(default_factory=dict)
    held: list[HeldFile] = field(default_factory=list)

    def hold(self, path: Path, reason: str) -> None:
        self.held.append(HeldFile(f"item-{len(self.held) + 1:04d}", path, reason))

    def hold_group(self, instances: list[Instance], reason: str, culprit: Path | None = None) -> None:
        for instance in instances:
            self.hold(instance.path, reason if culprit in (None, instance.path) else _BROKEN_SERIES)

    def admit_all(self) -> None:
        """Sort every file: admitted to its series, a NIfTI label map, or held."""
        files = walk(self.source, self.hold)
        self.files_seen = len(files) + len(self.held)
        for n, path in enumerate(files):
            self.progress("reading", n, len(files))
            if path.name.casefold().endswith(NIFTI_SUFFIXES):
                self.maps.append(path)
                continue
            try:
                instance = admit(path)
                self.groups[instance.series_uid].append(instance)
            except Refusal as refusal:
                self.hold(path, refusal.reason)
                self.broken.add(refusal.series_uid)
            except OSError:
                self.hold(path, "the file cannot be read")
        self.broken.discard("")
        self._hold_mixed()

    def _hold_mixed(self) -> None:
        patients = defaultdict(set)
        for instances in self.groups.values():
            for i in instances:
                patients[i.study_uid].add((i.issuer.casefold(), i.patient_id.casefold()))
        for uid, instances in list(self.groups.items()):
            reason = ""
            if any(len(patients[i.study_uid]) > 1 for i in instances):
                reason = "its study holds several patients"
            elif len({i.study_uid for i in instances}) > 1 or len({i.sop_class for i in instances}) > 1:
                reason = "its series mixes studies or kinds of object"
            elif uid in self.broken:
                reason = _BROKEN_SERIES
            if reason:
                self.hold_group(self.groups.pop(uid), reason)

    def images(self) -> None:
        """De-identify the image series."""
        series = [g for g in self.groups.values() if not g[0].is_segmentation]
        for n, instances in enumerate(series):
            self.progress("de-identifying", n, len(series))
            instances = self._once(instances)
            if instances:
                self._image_series(instances)

    def _once(self, instances: list[Instance]) -> list[Instance]:
        """Take one of several identical copies; differing files under one identifier hold the series."""
        by_uid: dict[str, Instance] = {}
        for instance in sorted(instances, key=lambda i: i.path):
            first = by_uid.setdefault(instance.sop_uid, instance)
            if first is instance:
                continue
            if file_digest(first.path) != file_digest(instance.path):
                self.hold_group(instances, "two different images of its series have one identifier")
                return []
            self.hold(instance.path, "it is a copy of another file, which was taken")
        return list(by_uid.values())

    def _folder(self, first: Instance) -> Path:
        keys = self.cleaner.keys
        return Path(pseudonym(keys, first.issuer, first.patient_id)) / series_token(keys, first.series_uid)

    def _image_series(self, instances: list[Instance]) -> None:
        first = instances[0]
        relative = self._folder(first)
        target, text, headers = self.out / relative, TextSearch(), []
        already = target.exists()
        if already and len(list(target.glob("[0-9]*.dcm"))) != len(instances):
            self.hold_group(instances, "its series is already there with another number of images")
            return
        staging = self.working / relative
        originals = self._originals(relative)
        culprit: Path | None = None
        try:
            for k, instance in enumerate(instances):
                culprit = instance.path
                name = f"{k + 1:04d}.dcm"
                if already:
                    headers.append(read_strict(target / name, headers_only=True))
                    continue
                headers.append(self._clean(instance, staging / name, k + 1, originals, text))
            culprit = None
            self._verify(staging, originals)
            if text.found():
                raise Refusal("text seems to be burned into its pixels")
        except (Refusal, OSError, MemoryError) as problem:
            shutil.rmtree(staging, ignore_errors=True)
            self.hold_group(instances, _reason(problem), culprit)
            return
        if not already:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.rename(target)
        self.passed[first.series_uid] = _Series(
            target,
            IMAGE_CLASSES[first.sop_class],
            _plan(headers),
            {i.path for i in instances},
            first.frame_of_reference,
            first.study_uid,
            len(instances),
            already=already,
        )

    def _originals(self, relative: Path) -> Originals:
        names = [c.name for c in self.schema.classes] if self.schema else []
        return Originals([*HARMLESS, *names, *relative.parts])

    def _clean(
        self, instance: Instance, path: Path, number: int, originals: Originals, text: TextSearch | None
    ) -> Dataset:
        ds = read_strict(instance.path)
        try:
            clean = self.cleaner.clean(ds)
            clean.InstanceNumber = number
            pixels = take_pixels(ds, clean)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, NotImplementedError):
            raise Refusal("its header is damaged: a value that is needed is missing or malformed") from None
        if text is not None:
            text.add(pixels)
        save_clean(clean, path)
        originals.add(ds, self.cleaner.kept)
        originals.harmless(self.cleaner.wrote)
        originals.add_path(instance.path.relative_to(self.source))
        del clean.PixelData
        return clean

    def _verify(self, staging: Path, originals: Originals) -> None:
        for path in sorted(staging.glob("*")):
            problems = check_file(path, originals)
            if problems:
                raise Refusal(f"the check of what was written failed: {problems[0]}")

    def segmentations(self) -> None:
        """De-identify the DICOM SEG objects into the folders of their series."""
        groups = [g for g in self.groups.values() if g[0].is_segmentation]
        for n, instances in enumerate(groups):
            self.progress("label maps", n, len(groups))
            for instance in self._once(instances):
                try:
                    self._segmentation(instance)
                except (Refusal, OSError, MemoryError) as problem:
                    self.hold(instance.path, _reason(problem))

    def _segmentation(self, instance: Instance) -> None:
        named = [self.passed[uid] for uid in instance.referenced_series if uid in self.passed]
        if not instance.referenced_series:
            named = [
                s
                for s in self.passed.values()
                if (s.frame_of_reference, s.study_uid) == (instance.frame_of_reference, instance.study_uid)
            ]
        if len(named) != 1:
            raise Refusal("the series that it segments is not among those that passed")
        series = named[0]
        if series.folder.parent.name != self._folder(instance).parent.name:
            raise Refusal("it names another patient than the series that it segments")
        relative = series.folder.relative_to(self.out)
        originals = self._originals(relative)
        name = f"seg-{new_uid(self.cleaner.keys, instance.sop_uid)[-12:]}.dcm"
        if series.already and (series.folder / name).exists():
            series.labels += 1
            return
        staged = self.working / "labels" / name
        shutil.rmtree(staged.parent, ignore_errors=True)
        clean = self._clean(instance, staged, 1, originals, None)
        originals.harmless(segment_words(clean))
        self._verify(staged.parent, originals)
        staged.rename(series.folder / name)
        series.labels += 1

    def label_maps(self) -> None:
        """Rebuild the NIfTI label maps on the grid of the series beside or below them."""
        for n, path in enumerate(self.maps):
            self.progress("label maps", n, len(self.maps))
            try:
                self._label_map(path)
            except (Refusal, MedlsdmError, OSError, MemoryError) as problem:
                self.hold(path, _reason(problem))

    def _label_map(self, path: Path) -> None:
        from deid_tools.labels import canonical_labels
        from medlsdm.types import SemanticMap

        try:
            array, grid = canonical_labels(path)
        except DataError:
            raise Refusal("the NIfTI file is not a label map that can be read") from None
        beside = [s for s in self.passed.values() if any(path.parent in p.parents for p in s.sources)]
        fitting = [
            s for s in beside if s.grid is not None and grid.matches(s.grid, _GRID_TOLERANCE * min(grid.spacing))
        ]
        if len(fitting) != 1:
            raise Refusal(
                "it fits the grid of several series" if fitting else "it fits the grid of no series beside or below it"
            )
        series = fitting[0]
        assert series.grid is not None
        if self.schema:
            SemanticMap(array, series.grid, self.schema)
        staged = self.working / "maps" / "labels.nii.gz"
        shutil.rmtree(staged.parent, ignore_errors=True)
        write_nifti(staged, array, series.grid)
        originals = self._originals(series.folder.relative_to(self.out))
        originals.add_path(path.relative_to(self.source))
        self._verify(staged.parent, originals)
        there = sorted(series.folder.glob("labels*.nii.gz"))
        series.labels += 1
        if series.already and file_digest(staged) in [file_digest(p) for p in there]:
            return
        staged.rename(series.folder / (f"labels-{len(there) + 1}.nii.gz" if there else "labels.nii.gz"))

    def report(self) -> DeidReport:
        """Sum up."""
        series = tuple(
            SeriesRecord(s.token, s.modality, s.images, s.labels, s.already)
            for s in sorted(self.passed.values(), key=lambda s: s.token)
        )
        return DeidReport(
            series,
            tuple(self.held),
            self.files_seen,
            self.cleaner.recipe_sha256,
            TextSearch.state(),
            _tools(),
            self.cleaner.recipe.label,
            self.cleaner.keys.id,
            dict(self.cleaner.removed),
        )


def _plan(headers: list[Dataset]) -> SeriesPlan | None:
    try:
        return plan_series(headers)
    except MedlsdmError:
        return None


def _reason(problem: BaseException) -> str:
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError("The disk is full.", "Free space and run again; what is done stays done.") from problem
    if isinstance(problem, Refusal):
        return problem.reason
    if isinstance(problem, MedlsdmError):
        return problem.message
    if isinstance(problem, MemoryError):
        return "it is too large for this machine's memory"
    return "it cannot be read or written"


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("medlsdm", "deid", "pydicom", "numpy")}
