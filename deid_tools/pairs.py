"""Read a de-identified folder as training pairs, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deid_tools.admit import IMAGE_CLASSES, Refusal, read_strict
from deid_tools.labels import read_label_nifti, read_segmentation
from deid_tools.series import build_scan
from medlsdm.checks import existing_folder
from medlsdm.errors import DataError
from medlsdm.types import LabelSchema, Scan, SemanticMap

NO_LABELS = "the series has no label map"


@dataclass(frozen=True, slots=True)
class PairResult:
    """Hold one series' scan and labels, or the reason why there are none.

    ``reason`` is empty when both are there. A series without a label map keeps its scan and says so.
    """

    token: str
    scan: Scan | None
    labels: SemanticMap | None
    reason: str


def read_pairs(out: Path, schema: LabelSchema) -> Iterator[PairResult]:
    """Yield every series of an output folder as scan and label map; a bad one yields its reason.

    Raises:
        DataError: The folder is missing or empty.
    """
    existing_folder(out, "The de-identified folder")
    return (_read_pair(folder, schema) for folder in sorted(out.glob("P-*/S-*")) if folder.is_dir())


def _read_pair(folder: Path, schema: LabelSchema) -> PairResult:
    token = f"{folder.parent.name}/{folder.name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scan, labels = _read(folder, schema)
    except Refusal as refusal:
        return PairResult(token, None, None, refusal.reason)
    except DataError as error:
        return PairResult(token, None, None, str(error))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError):
        return PairResult(token, None, None, "the series was changed or damaged after it was written")
    except MemoryError:
        return PairResult(token, None, None, "the series is too large for this machine's memory")
    return PairResult(token, scan, labels, "" if labels else NO_LABELS)


def _read(folder: Path, schema: LabelSchema) -> tuple[Scan, SemanticMap | None]:
    images, segmentations = [], []
    for path in sorted(folder.glob("*.dcm")):
        ds = read_strict(path)
        (images if str(ds.SOPClassUID) in IMAGE_CLASSES else segmentations).append(ds)
    maps = sorted(folder.glob("labels*.nii.gz"))
    if not images:
        raise DataError("The series holds no images.")
    if len(segmentations) + len(maps) > 1:
        raise DataError(
            f"The series has {len(segmentations) + len(maps)} label maps; which one holds is not said.",
            "Keep one label map a series.",
        )
    scan = build_scan(images, folder.parent.name)
    if segmentations:
        return scan, read_segmentation(segmentations[0], scan.geometry, schema)
    if maps:
        return scan, read_label_nifti(maps[0], scan.geometry, schema)
    return scan, None
