"""What a label object says about the images that it belongs to: series, images, frame of reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@dataclass(frozen=True, slots=True, repr=False)
class References:
    """Hold the UIDs that an object names. They identify; in memory only."""

    series: tuple[str, ...]
    images: frozenset[str]
    frame_of_reference: str


def references(ds: Dataset) -> References:
    """Collect what a SEG or an RTSTRUCT refers to; an image refers to nothing.

    Source: DICOM PS3.3 C.12.4 (common instance reference), C.8.8.5 (structure set).
    """
    series, images, frames = [], [], [_text(ds, "FrameOfReferenceUID")]
    for item in _items(ds, "ReferencedSeriesSequence"):
        series.append(_text(item, "SeriesInstanceUID"))
        images += [_text(i, "ReferencedSOPInstanceUID") for i in _items(item, "ReferencedInstanceSequence")]
    for group in (*_items(ds, "SharedFunctionalGroupsSequence"), *_items(ds, "PerFrameFunctionalGroupsSequence")):
        for derivation in _items(group, "DerivationImageSequence"):
            images += [_text(i, "ReferencedSOPInstanceUID") for i in _items(derivation, "SourceImageSequence")]
    for frame in _items(ds, "ReferencedFrameOfReferenceSequence"):
        frames.append(_text(frame, "FrameOfReferenceUID"))
        for study in _items(frame, "RTReferencedStudySequence"):
            for item in _items(study, "RTReferencedSeriesSequence"):
                series.append(_text(item, "SeriesInstanceUID"))
                images += [_text(i, "ReferencedSOPInstanceUID") for i in _items(item, "ContourImageSequence")]
    named = sorted({f for f in frames if f})
    return References(
        tuple(sorted({s for s in series if s})), frozenset(i for i in images if i), named[0] if len(named) == 1 else ""
    )


def _items(ds: Dataset, keyword: str) -> Iterator[Dataset]:
    yield from ds.get(keyword, None) or ()


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword, "")
    return "" if value is None else str(value).strip(" \0")
