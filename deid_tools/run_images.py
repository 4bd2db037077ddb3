"""The image series of a run: every slice cleaned by a worker, pixels treated, the result checked, then in place."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deid_tools.admit import DAMAGED, IMAGE_CLASSES, Instance, Refusal, read_strict
from deid_tools.crew import FILE_SECONDS, chunks, time_limit
from deid_tools.faces import CODE as FACE_CODE
from deid_tools.faces import LabelledBrain
from deid_tools.filters import filters
from deid_tools.modules import save_clean
from deid_tools.moments import number_volumes
from deid_tools.nifti_size import declared_voxels
from deid_tools.originals import Originals
from deid_tools.pixels import TextSearch, take_pixels
from deid_tools.run import GRID_TOLERANCE, Run, Series, reason_of
from deid_tools.segmentations import read_segmentation
from deid_tools.stacks import SeriesPlan
from deid_tools.survey import Survey
from deid_tools.suv import to_suv
from deid_tools.tally import Tally
from deid_tools.thumbnails import write_thumbnails
from deid_tools.treatment import NOTHING_DONE, PixelRecord, labelled_brain, says_head, treat
from deid_tools.uids import new_uid
from medlsdm.errors import ConfigError, MedlsdmError


@dataclass(frozen=True, slots=True)
class Job:
    """Say which file becomes which, under which number, and in which of its series' volumes it lies."""

    instance: Instance
    path: Path
    number: int
    volume: int | None = None


@dataclass(slots=True)
class Cleaned:
    """Hold what came of a stretch of images: where they lie, and what the originals say and show."""

    survey: Survey = field(default_factory=Survey)
    originals: Originals = field(default_factory=Originals)
    text: TextSearch = field(default_factory=TextSearch)
    head: bool = False
    removed: Counter[str] = field(default_factory=Counter)
    tally: Tally = field(default_factory=Tally)

    def merge(self, later: Cleaned) -> None:
        """Take over what the pixels and places of the files that follow show."""
        self.survey.merge(later.survey)
        self.text.merge(later.text)
        self.head |= later.head
        self.originals.merge(later.originals)
        self.removed.update(later.removed)
        self.tally.merge(later.tally)


def images(run: Run) -> None:
    """De-identify the image series."""
    series = [g for g in run.groups.values() if g[0].sop_class in IMAGE_CLASSES]
    for n, instances in enumerate(series):
        run.progress("de-identifying", n, len(series))
        instances = run.once(instances)
        if instances:
            _image_series(run, instances)


def _image_series(run: Run, instances: list[Instance]) -> None:
    first = instances[0]
    relative = run.folder(first)
    target = run.out / relative
    already = os.path.lexists(target)
    staging = run.working / relative
    originals = run.originals(relative)
    try:
        if target.parent.is_symlink():  # what is written would lie elsewhere, and the report would not say where
            raise Refusal("something else lies where its series belongs")
        if already:
            seen, done = Cleaned(), NOTHING_DONE
            instances = _again(run, instances, target, seen)
        else:
            seen = _clean_series(run, instances, staging, originals)
        files = sorted((target if already else staging).glob("[0-9]*.dcm"))
        if len(files) != len(instances):
            raise Refusal("not every image of its series was written")
        plan, notes = seen.survey.plan(files)
        if not already:
            done = _treat(run, seen, files, instances, plan)
        elif _defaced(files[0]):
            done = _treated_again(run, instances, staging, plan)
        run.verify(target if already else staging, originals)
        if run.pictures and not already:
            write_thumbnails(run.crew, run.pictures, instances, files, plan)
    except (Refusal, OSError, MemoryError) as problem:
        shutil.rmtree(staging, ignore_errors=True)
        run.hold_group(instances, reason_of(problem), getattr(problem, "culprit", None))
        return
    if not already:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(target)
    run.passed[first.series_uid] = Series(
        target,
        IMAGE_CLASSES[first.sop_class],
        plan,
        {run.known(i.path) for i in instances},
        first.frame_of_reference,
        first.study_uid,
        len(instances),
        tuple(i.sop_uid for i in instances),
        already=already,
        notes=notes,
        pixels=done,
        study=run.study(first.owner),
        tally=seen.tally,
        unreadable=seen.removed,
    )


def _defaced(path: Path) -> bool:
    stamps = read_strict(path, headers_only=True).get("DeidentificationMethodCodeSequence", None) or ()
    return any(stamp.get("CodeValue", "") == FACE_CODE for stamp in stamps)


def _treated_again(run: Run, instances: list[Instance], staging: Path, plan: SeriesPlan | None) -> PixelRecord:
    """Find again where an earlier run cut the face off, for label maps that are still to come; write nothing."""
    originals = run.originals(run.folder(instances[0]))
    seen = _clean_series(run, instances, staging, originals)
    try:
        return _treat(run, seen, sorted(staging.glob("[0-9]*.dcm")), instances, plan)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _again(run: Run, instances: list[Instance], target: Path, seen: Cleaned) -> list[Instance]:
    """Return the images of a series that an earlier run wrote, in the order in which they were written.

    Raises:
        Refusal: What is there is not these images.
    """
    if target.is_symlink() or target.parent.is_symlink() or not target.is_dir():
        raise Refusal("something else lies where its series belongs")
    written = sorted(target.glob("[0-9]*.dcm"))
    if len(written) != len(instances):
        raise Refusal("its series is already there with another number of images")
    by_uid = {new_uid(run.cleaner.keys, i.sop_uid): i for i in instances}
    ordered = []
    for path in written:
        ds = read_strict(path, headers_only=True)
        if path.is_symlink() or str(ds.SOPInstanceUID) not in by_uid:
            raise Refusal("its series is already there with other images")
        seen.survey.take(ds)
        ordered.append(by_uid.pop(str(ds.SOPInstanceUID)))
    return ordered


def _clean_series(run: Run, instances: list[Instance], staging: Path, originals: Originals) -> Cleaned:
    """Write every image of a series, and gather what its originals say and show and where its slices lie."""
    volumes = number_volumes({i.path: i.moment for i in instances})
    for instance in instances:
        originals.add_path(run.known(instance.path).relative_to(run.source))
    jobs = [Job(i, staging / f"{k + 1:04d}.dcm", k + 1, volumes.get(i.path)) for k, i in enumerate(instances)]
    seconds, isolate = FILE_SECONDS * len(instances), any(i.compressed for i in instances)
    seen = Cleaned()
    for done in run.crew.map(clean_stretch, chunks(jobs), seconds=seconds, isolate=isolate):
        filters()  # imported while the others work
        seen.merge(done)
    return take_over(run, seen, originals)


def take_over(run: Run, done: Cleaned, originals: Originals) -> Cleaned:
    """Take what a stretch's originals say into the search for it, and count what was removed unread."""
    originals.merge(done.originals)
    run.removed.update(done.removed)
    return done


def _treat(
    run: Run, seen: Cleaned, files: list[Path], instances: list[Instance], plan: SeriesPlan | None
) -> PixelRecord:
    """Hide text and face in a series that was staged; whatever is odd about it, it is not left undone."""
    series = files[0].parent
    try:
        return treat(
            seen.text,
            files,
            run.policy,
            hu=IMAGE_CLASSES[instances[0].sop_class] == "CT",
            head=seen.head,
            frames=seen.survey.frames,
            name=f"{series.parent.name}-{series.name}",
            brain=lambda: _brain(run, instances, plan),
        )
    except (Refusal, OSError, MemoryError):
        raise
    except Exception:
        raise Refusal("its pixels could not be searched for text and faces") from None


def _brain(run: Run, instances: list[Instance], plan: SeriesPlan | None) -> LabelledBrain | None:
    """Find what the series' own label maps call brain: in its DICOM SEG objects, then in NIfTI beside it."""
    from deid_tools.labels import canonical_labels

    if plan is None or run.schema is None:
        return None
    grid, series_uid, images = plan.canonical, instances[0].series_uid, {i.sop_uid for i in instances}
    found: list[LabelledBrain] = []
    for segmentation in (i for group in run.groups.values() for i in group if i.is_segmentation):
        refers = segmentation.refers_to
        if refers is None or segmentation.compressed or not (series_uid in refers.series or refers.images & images):
            continue
        with suppress(Refusal, MedlsdmError, OSError):  # the label map itself is refused where it is taken
            labels = read_segmentation(read_strict(segmentation.path), grid, run.schema)
            found += filter(None, [labelled_brain(labels.array, grid, run.schema)])
    folders = [run.known(i.path).parents for i in instances]
    for path in (m for m in run.maps if any(run.known(m).parent in parents for parents in folders)):
        with suppress(Refusal, MedlsdmError, OSError):
            if declared_voxels(path) != math.prod(grid.shape):
                continue
            array, geometry = canonical_labels(path)
            if geometry.matches(grid, GRID_TOLERANCE * min(grid.spacing)):
                found += filter(None, [labelled_brain(array, grid, run.schema)])
    if not found:
        return None
    return LabelledBrain(np.concatenate([b.points for b in found]), any(b.whole for b in found))


def clean_stretch(run: Run, jobs: Sequence[Job]) -> Cleaned:
    """De-identify some images of one series."""
    done = Cleaned()
    run.cleaner.removed = done.removed
    for job in jobs:
        try:
            with time_limit():
                _clean(run, job, done)
        except (Refusal, OSError, MemoryError) as problem:
            problem.culprit = job.instance.path  # pyright: ignore[reportAttributeAccessIssue]
            raise
    done.tally.settle(run.cleaner.recipe)
    return done


def _clean(run: Run, job: Job, done: Cleaned) -> None:
    """Write one clean file; what it says, shows and asks for goes to ``done``."""
    instance = job.instance
    ds = read_strict(instance.path)
    try:
        done.originals.add(ds, run.cleaner.kept)
        clean = run.cleaner.clean(ds)
        clean.InstanceNumber = job.number
        if job.volume is not None:
            clean.TemporalPositionIdentifier = job.volume
        if IMAGE_CLASSES.get(instance.sop_class) == "PT":
            done.survey.problem(to_suv(ds, clean))
        pixels = take_pixels(ds, clean)
        if not instance.is_segmentation:
            done.text.add(pixels, run.rules.boxes(ds))
            done.head |= says_head(ds)
            done.survey.take(clean)
        save_clean(clean, job.path)
        done.tally.add(ds, clean)
    except (Refusal, ConfigError, OSError, MemoryError):
        raise
    except Exception:
        raise Refusal(DAMAGED) from None
    done.originals.harmless(run.cleaner.wrote)
