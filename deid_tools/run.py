"""The state of one run: what was admitted, what passed, what is held, and the workers that share the files."""

from __future__ import annotations

import errno
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deid_tools.admit import MAX_FILES, NOBODY, Instance, Owner, Refusal, admit
from deid_tools.archives import is_archive, unpack
from deid_tools.crew import FILE_SECONDS, Crew, chunks, time_limit
from deid_tools.device_rules import DeviceRules
from deid_tools.folders import walk
from deid_tools.headers import HeaderCleaner
from deid_tools.keys import SiteKeys
from deid_tools.originals import Originals
from deid_tools.recipes import Recipe
from deid_tools.report import HeldFile
from deid_tools.stacks import SeriesPlan
from deid_tools.tally import Tally
from deid_tools.treatment import NOTHING_DONE, PixelPolicy, PixelRecord
from deid_tools.uids import patient_parts, pseudonym, series_token, study_token
from deid_tools.verify import HARMLESS, check_file
from medlsdm.checks import file_digest
from medlsdm.errors import DataError, MedlsdmError, ResourceError
from medlsdm.types import Geometry, LabelSchema
from medlsdm.volumes import NIFTI_SUFFIXES

_BROKEN_SERIES = "another file of its series is held, and a series with a hole is of no use"
GRID_TOLERANCE = 0.05


Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Series:
    """Follow one series that passed, so that its labels can find it."""

    folder: Path
    modality: str
    plan: SeriesPlan | None
    sources: set[Path]
    frame_of_reference: str
    study_uid: str
    images: int
    sop_uids: tuple[str, ...] = ()
    labels: int = 0
    labels_held: int = 0
    already: bool = False
    notes: tuple[str, ...] = ()
    pixels: PixelRecord = NOTHING_DONE
    study: str = ""
    tally: Tally = field(default_factory=Tally)
    unreadable: Counter[str] = field(default_factory=Counter)

    @property
    def token(self) -> str:
        """Return pseudonym and series token."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def grid(self) -> Geometry | None:
        """Return the grid of its volume, axes nearest to R, A, S; None where it is no single volume."""
        return self.plan.canonical if self.plan else None


@dataclass(slots=True)
class Run:
    """Hold what one run knows; its workers hold one of their own, without files."""

    source: Path
    out: Path
    cleaner: HeaderCleaner
    schema: LabelSchema | None
    policy: PixelPolicy
    rules: DeviceRules
    progress: Progress = lambda *_: None
    crew: Crew = field(init=False, repr=False)
    working: Path = Path()
    files_seen: int = 0
    groups: dict[str, list[Instance]] = field(default_factory=lambda: defaultdict(list))
    maps: list[Path] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    passed: dict[str, Series] = field(default_factory=dict)
    held: list[HeldFile] = field(default_factory=list)
    names: dict[Path, Path] = field(default_factory=dict)
    removed: Counter[str] = field(default_factory=Counter)
    pictures: Path | None = None

    def hold(self, path: Path, reason: str, owner: Owner = NOBODY) -> None:
        """Hold one file."""
        self.held.append(HeldFile(f"item-{len(self.held) + 1:04d}", self.known(path), reason, self.study(owner)))

    def study(self, owner: Owner) -> str:
        """Return the name of a study's evidence: pseudonym and study token; nothing where it is not known."""
        keys, (study_uid, issuer, patient_id) = self.cleaner.keys, owner
        return f"{pseudonym(keys, issuer, patient_id)}-{study_token(keys, study_uid)}" if study_uid else ""

    def known(self, path: Path) -> Path:
        """Return the name below the source that people know a file by: one from an archive lies elsewhere."""
        return self.names.get(path, path)

    def _unpacked(self, files: list[Path]) -> list[Path]:
        """Put the files of each archive in its place."""
        found: list[Path] = []
        for n, path in enumerate(files):
            if not is_archive(path):
                found.append(path)
                continue
            self.progress("unpacking", n, len(files))
            try:
                inside = unpack(path, self.working / "archives" / f"{n:06d}", self.hold)
            except (Refusal, OSError, MemoryError) as problem:
                self.hold(path, reason_of(problem))
                continue
            self.names |= inside
            found += inside
        if len(found) > MAX_FILES:
            raise DataError(f"The source holds more than {MAX_FILES} files.", "De-identify it in parts.")
        return found

    def hold_group(self, instances: list[Instance], reason: str, culprit: Path | None = None) -> None:
        """Hold the files of a series, for a reason that is one file's or theirs."""
        for instance in instances:
            self.hold(instance.path, reason if culprit in (None, instance.path) else _BROKEN_SERIES, instance.owner)

    def admit_all(self) -> None:
        """Sort every file: admitted to its series, a NIfTI label map, or held."""
        files = self._unpacked(walk(self.source, self.hold))
        self.files_seen = len(files) + len(self.held)
        self.maps = [path for path in files if path.name.casefold().endswith(NIFTI_SUFFIXES)]
        others = [path for path in files if not path.name.casefold().endswith(NIFTI_SUFFIXES)]
        for n, (path, answer) in enumerate(self._admitted(others)):
            self.progress("reading", n, len(others))
            if isinstance(answer, Instance):
                self.groups[answer.series_uid].append(answer)
            else:
                self.hold(path, answer.reason, answer.owner)
                self.broken.add(answer.series_uid)
        self.broken.discard("")
        self._hold_mixed()

    def _admitted(self, files: list[Path]) -> Iterator[tuple[Path, Instance | Refusal]]:
        answers = self.crew.map(_admit_stretch, chunks(files), seconds=FILE_SECONDS * len(files), early=True)
        try:
            for stretch in answers:
                yield from stretch
        except Refusal as refusal:
            raise ResourceError(f"The headers could not be read: {refusal.reason}.", "Use fewer workers.") from None

    def _hold_mixed(self) -> None:
        patients, births = defaultdict(set), defaultdict(set)
        for i in (i for instances in self.groups.values() for i in instances):
            patients[i.study_uid].add((i.issuer.casefold(), i.patient_id.casefold()))
            births[patient_parts(i.issuer, i.patient_id)].add(i.birth or None)
        for uid, instances in list(self.groups.items()):
            reason = ""
            if any(len(patients[i.study_uid]) > 1 for i in instances):
                reason = "its study holds several patients"
            elif any(len(births[patient_parts(i.issuer, i.patient_id)] - {None}) > 1 for i in instances):
                reason = "its patient ID stands for people with different birth dates"
            elif len({i.study_uid for i in instances}) > 1 or len({i.sop_class for i in instances}) > 1:
                reason = "its series mixes studies or kinds of object"
            elif uid in self.broken:
                reason = _BROKEN_SERIES
            if reason:
                self.hold_group(self.groups.pop(uid), reason)

    def once(self, instances: list[Instance]) -> list[Instance]:
        """Take one of several identical copies; differing files under one identifier hold the series."""
        by_uid: dict[str, Instance] = {}
        for instance in sorted(instances, key=lambda i: self.known(i.path)):
            first = by_uid.setdefault(instance.sop_uid, instance)
            if first is instance:
                continue
            if file_digest(first.path) != file_digest(instance.path):
                self.hold_group(instances, "two different images of its series have one identifier")
                return []
            self.hold(instance.path, "it is a copy of another file, which was taken", instance.owner)
        return list(by_uid.values())

    def folder(self, first: Instance) -> Path:
        """Return where the series of an instance goes, below the output."""
        keys = self.cleaner.keys
        return Path(pseudonym(keys, first.issuer, first.patient_id)) / series_token(keys, first.series_uid)

    def originals(self, relative: Path) -> Originals:
        """Start to gather what may not stand in what is written for a series."""
        names = [c.name for c in self.schema.classes] if self.schema else []
        return Originals([*HARMLESS, *names, *relative.parts])

    def verify(self, staging: Path, originals: Originals) -> None:
        """Check every file of a folder with the second pass.

        Raises:
            Refusal: One of them says or shows what it may not.
        """
        written = sorted(staging.glob("*"))
        jobs = [(stretch, originals) for stretch in chunks(written, max(16, -(-len(written) // self.crew.workers)))]
        for problem in self.crew.map(_verify_stretch, jobs, seconds=FILE_SECONDS * len(written)):
            if problem:
                raise Refusal(f"the check of what was written failed: {problem}")


def make_run(
    source: Path, out: Path, keys: SiteKeys, schema: LabelSchema | None, recipe: Recipe | None, policy: PixelPolicy
) -> Run:
    """Make what one process works with."""
    cleaner = HeaderCleaner(keys, schema=schema, recipe=recipe)
    return Run(source, out, cleaner, schema, policy, DeviceRules(policy.rules))


def _admit_stretch(run: Run, paths: Sequence[Path]) -> list[tuple[Path, Instance | Refusal]]:
    """Admit some files; whatever goes wrong with one is a Refusal."""
    answers: list[tuple[Path, Instance | Refusal]] = []
    for path in paths:
        try:
            with time_limit():
                answers.append((path, admit(path)))
        except Refusal as refusal:
            answers.append((path, refusal))
        except OSError:
            answers.append((path, Refusal("the file cannot be read")))
    return answers


def _verify_stretch(run: Run, job: tuple[Sequence[Path], Originals]) -> str:
    """Check some written files; the first problem in words, or nothing."""
    paths, originals = job
    return next((problem for path in paths for problem in check_file(path, originals)), "")


def reason_of(problem: BaseException) -> str:
    """Say in words, without a value, what went wrong with one file.

    Raises:
        ResourceError: The disk is full: then nothing more can be done.
    """
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError("The disk is full.", "Free space and run again; what is done stays done.") from problem
    if isinstance(problem, Refusal):
        return problem.reason
    if isinstance(problem, MedlsdmError):
        return problem.message
    if isinstance(problem, MemoryError):
        return "it is too large for this machine's memory"
    return "it cannot be read or written"
