"""Read a de-identified folder as training pairs, one volume at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

from deid_tools.admit import IMAGE_CLASSES, Refusal, read_strict
from deid_tools.labels import combine, read_label_nifti
from deid_tools.segmentations import read_segmentation
from deid_tools.segmenters import Segmenter, apply
from deid_tools.series import Built, build_scans
from medlsdm.checks import existing_folder
from medlsdm.errors import DataError
from medlsdm.types import LabelSchema, Scan, SemanticMap

NO_LABELS = "the series has no label map"
LABELS_HELD = "the series' own label map is held"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PairResult:
    """Hold one volume's scan and labels, or the reason why there are none.

    ``reason`` is empty when both are there. A volume without a label map keeps its scan and says so.
    Where a series holds several volumes, ``token`` ends in the volume's number. ``notes`` say what
    was done to the volume, such as a tilt sheared right.
    """

    token: str
    scan: Scan | None
    labels: SemanticMap | None
    reason: str
    notes: tuple[str, ...] = ()


def read_pairs(
    out: Path, schema: LabelSchema, *, segmenter: Segmenter | None = None, held: Collection[str] = ()
) -> Iterator[PairResult]:
    """Yield every volume of an output folder as scan and label map; a bad one yields its reason.

    Args:
        out: The output folder of the pipeline.
        schema: The label schema.
        segmenter: Makes the label map of a series that has none.
        held: Tokens of series whose own label map is held: no segmenter stands in for it.

    Raises:
        DataError: The folder is missing or empty.
    """
    existing_folder(out, "The de-identified folder")
    folders = [folder for folder in sorted(out.glob("P-*/S-*")) if folder.is_dir()]
    return (result for folder in folders for result in _read_series(folder, schema, segmenter, held))


def _read_series(
    folder: Path, schema: LabelSchema, segmenter: Segmenter | None, held: Collection[str]
) -> Iterator[PairResult]:
    token = f"{folder.parent.name}/{folder.name}"
    volumes = _volumes(folder)
    while True:
        built, reason = _guarded(lambda: next(volumes, None))
        if reason:
            yield PairResult(token, None, None, reason)
        if built is None:
            return
        name = token if built.of == 1 else f"{token}/{built.number}"
        if built.scan is None:
            yield PairResult(name, None, None, built.refusal)
            continue
        labels, reason = _guarded(lambda built=built: _labels(folder, built, schema))
        if labels is None and not reason:
            reason = LABELS_HELD if token in held else NO_LABELS
            if segmenter is not None and token not in held:
                scan = built.scan
                labels, reason = _guarded(lambda scan=scan: apply(segmenter, scan, schema, folder.parents[1]))
        kept = built.scan if labels or reason in (NO_LABELS, LABELS_HELD) else None
        yield PairResult(name, kept, labels, reason, built.notes)


def _guarded(read: Callable[[], T]) -> tuple[T | None, str]:
    """Call and return what came, or None and the reason in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(), ""
    except Refusal as refusal:
        return None, refusal.reason
    except DataError as error:
        return None, str(error)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError):
        return None, "the series was changed or damaged after it was written"
    except MemoryError:
        return None, "the series is too large for this machine's memory"


def _volumes(folder: Path) -> Iterator[Built]:
    images = [path for path in _dicom(folder) if _is_image(path)]
    if not images:
        raise DataError("The series holds no images.")
    yield from build_scans(images, folder.parent.name)


def _dicom(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"))


def _is_image(path: Path) -> bool:
    return str(read_strict(path, headers_only=True).SOPClassUID) in IMAGE_CLASSES


def _labels(folder: Path, built: Built, schema: LabelSchema) -> SemanticMap | None:
    segmentations = [path for path in _dicom(folder) if not _is_image(path)]
    maps = sorted(folder.glob("labels*.nii.gz"))
    if not segmentations and not maps:
        return None
    if not built.alone:
        raise DataError(
            "The series holds several volumes on one grid; which one the label map belongs to is not said.",
            "Export one volume a series.",
        )
    assert built.scan is not None
    grid = built.scan.geometry
    drawn = (read_segmentation(read_strict(path), grid, schema) for path in segmentations)
    return combine(chain(drawn, (read_label_nifti(path, grid, schema) for path in maps)), schema)
