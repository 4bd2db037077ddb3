"""The label maps of a run: DICOM SEG, RTSTRUCT and NIfTI, each to the series that it belongs to."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.admit import Instance, Refusal, read_strict
from deid_tools.crew import FILE_SECONDS
from deid_tools.face_series import clear_segmentation, without_face
from deid_tools.nifti_size import declared_voxels
from deid_tools.originals import Originals
from deid_tools.run import GRID_TOLERANCE, Run, Series, reason_of
from deid_tools.run_images import Job, clean_stretch, take_over
from deid_tools.segmentations import read_segmentation, refuse_undescribed
from deid_tools.uids import new_uid
from medlsdm.checks import file_digest
from medlsdm.errors import DataError, MedlsdmError
from medlsdm.volumes import write_nifti


def segmentations(run: Run) -> None:
    """De-identify the DICOM SEG objects into the folders of their series."""
    _label_objects(run, [g for g in run.groups.values() if g[0].is_segmentation], _segmentation)


def structure_sets(run: Run) -> None:
    """Fill the contours of the RTSTRUCT objects; a label map is written, and nothing of the object itself."""
    _label_objects(run, [g for g in run.groups.values() if g[0].is_structure_set], _structure_set)


def _label_objects(run: Run, groups: list[list[Instance]], take: Callable[[Run, Instance], None]) -> None:
    for n, instances in enumerate(groups):
        run.progress("label maps", n, len(groups))
        for instance in run.once(instances):
            try:
                take(run, instance)
            except (Refusal, MedlsdmError, OSError, MemoryError) as problem:
                run.hold(instance.path, reason_of(problem), instance.owner)
                for series in _candidates(run, instance):
                    series.labels_held += 1


def _candidates(run: Run, instance: Instance) -> list[Series]:
    """Find what a label object belongs to: by series, else by image, else by frame of reference and study."""
    refers, passed = instance.refers_to, run.passed
    assert refers is not None
    if refers.series:
        return [passed[uid] for uid in refers.series if uid in passed]
    if refers.images:
        return [s for s in passed.values() if not refers.images.isdisjoint(s.sop_uids)]
    frame = (refers.frame_of_reference, instance.study_uid)
    return [s for s in passed.values() if frame[0] and (s.frame_of_reference, s.study_uid) == frame]


def _segmented_series(run: Run, instance: Instance) -> Series:
    named = _candidates(run, instance)
    if len(named) != 1:
        raise Refusal("the series that it segments is not among those that passed")
    series = named[0]
    refers = instance.refers_to
    assert refers is not None
    if series.folder.parent.name != run.folder(instance).parent.name:
        raise Refusal("it names another patient than the series that it segments")
    if not refers.images <= set(series.sop_uids):
        raise Refusal("it refers to images that its series does not hold")
    return series


def _structure_set(run: Run, instance: Instance) -> None:
    from deid_tools.contours import read_structures

    series = _segmented_series(run, instance)
    if run.schema is None:
        raise Refusal("contours have a meaning only under a label schema; give one")
    if series.plan is None:
        raise Refusal("the series that it is drawn on does not form a volume")
    ds = read_strict(instance.path)
    frames = [frame.source for frame in series.plan.frames]
    slice_of = {series.sop_uids[source]: k for k, source in enumerate(frames)}
    labels = read_structures(
        ds,
        series.plan.geometry,
        run.schema,
        slice_of=slice_of if len(slice_of) == len(frames) else None,
        same_frame=bool(instance.frame_of_reference) and instance.frame_of_reference == series.frame_of_reference,
    )
    originals = run.originals(series.folder.relative_to(run.out))
    originals.add(ds, frozenset())
    originals.add_path(run.known(instance.path).relative_to(run.source))
    _keep_map(run, labels.array, series, originals)


def _segmentation(run: Run, instance: Instance) -> None:
    series = _segmented_series(run, instance)
    frames = (instance.frame_of_reference, series.frame_of_reference)
    if all(frames) and frames[0] != frames[1]:
        raise Refusal("it lies in another frame of reference than its series")
    relative = series.folder.relative_to(run.out)
    originals = run.originals(relative)
    name = f"seg-{new_uid(run.cleaner.keys, instance.sop_uid)[-12:]}.dcm"
    if series.already and (series.folder / name).exists():
        series.labels += 1
        return
    staged = run.working / "labels" / name
    shutil.rmtree(staged.parent, ignore_errors=True)
    originals.add_path(run.known(instance.path).relative_to(run.source))
    jobs = [[Job(instance, staged, 1)]]
    (done,) = run.crew.map(clean_stretch, jobs, seconds=FILE_SECONDS, isolate=instance.compressed)
    take_over(run, done, originals)
    if series.pixels.cuts:
        clear_segmentation(staged, series.pixels.cuts)
    run.verify(staged.parent, originals)
    refuse_undescribed(read_strict(staged))
    if run.schema and series.grid:
        read_segmentation(read_strict(staged), series.grid, run.schema)
    staged.rename(series.folder / name)
    series.labels += 1
    series.tally.merge(done.tally)
    series.unreadable.update(done.removed)


def label_maps(run: Run) -> None:
    """Rebuild the NIfTI label maps on the grid of the series beside or below them."""
    for n, path in enumerate(run.maps):
        run.progress("label maps", n, len(run.maps))
        try:
            _label_map(run, path)
        except (Refusal, MedlsdmError, OSError, MemoryError) as problem:
            run.hold(path, reason_of(problem))


def _label_map(run: Run, path: Path) -> None:
    from deid_tools.labels import canonical_labels
    from medlsdm.types import SemanticMap

    if declared_voxels(path) not in {math.prod(s.grid.shape) for s in run.passed.values() if s.grid}:
        raise Refusal("it fits the grid of no series beside or below it")
    try:
        array, grid = canonical_labels(path)
    except (MemoryError, DataError):
        raise
    except Exception:
        raise Refusal("the NIfTI file is not a label map that can be read") from None
    beside = [s for s in run.passed.values() if any(run.known(path).parent in p.parents for p in s.sources)]
    fitting = [s for s in beside if s.grid is not None and grid.matches(s.grid, GRID_TOLERANCE * min(grid.spacing))]
    if len(fitting) != 1:
        raise Refusal(
            "it fits the grid of several series" if fitting else "it fits the grid of no series beside or below it"
        )
    series = fitting[0]
    assert series.grid is not None
    series.labels_held += 1
    if run.schema:
        SemanticMap(array, series.grid, run.schema)
    originals = run.originals(series.folder.relative_to(run.out))
    originals.add_path(run.known(path).relative_to(run.source))
    _keep_map(run, array, series, originals)
    series.labels_held -= 1


def _keep_map(run: Run, array: NDArray[Any], series: Series, originals: Originals) -> None:
    """Write a label map on its series' grid beside the images, once."""
    assert series.grid is not None
    staged = run.working / "maps" / "labels.nii.gz"
    shutil.rmtree(staged.parent, ignore_errors=True)
    array = without_face(array.astype(np.uint16), series.grid.affine, series.pixels.cuts)
    write_nifti(staged, array, series.grid)
    run.verify(staged.parent, originals)
    there = sorted(series.folder.glob("labels*.nii.gz"))
    series.labels += 1
    if series.already and file_digest(staged) in [file_digest(p) for p in there]:
        return
    staged.rename(series.folder / (f"labels-{len(there) + 1}.nii.gz" if there else "labels.nii.gz"))
