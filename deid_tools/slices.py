"""What a header says of each slice: where it lies, how its values scale, and what tells its volume apart.

Headers suffice; classic and enhanced multi-frame objects give the same ``Frame``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.terms import COMPONENTS
from medlsdm.errors import GeometryError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

HINT = "Export the series again, complete and uncut, or leave it out."
_APART = {
    "EchoNumbers": "echo",
    "EchoTime": "echo",
    "InversionTime": "inversion time",
    "DiffusionBValue": "b-value",
    "TemporalPositionIdentifier": "time point",
}
_PERHAPS_APART = {
    "ImageType": "image type",
    "FlipAngle": "flip angle",
    "RepetitionTime": "repetition time",
    "KVP": "tube voltage",
    "DiffusionGradientOrientation": "diffusion direction",
    "AcquisitionNumber": "acquisition",
    "TriggerTime": "phase",
    "FrameReferenceTime": "time point",
}
_PLACES = (0x00209057, 0x00200032, 0x00209113)
"""Dimension pointers that say where a frame lies, not which volume it belongs to."""

Key = tuple[Any, ...]
Named = tuple[tuple[str, Key], ...]
"""Attributes that tell volumes apart: what each is in words, and its values."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Hold one slice's place and scaling: which file, which frame in it, mm in LPS.

    ``padding`` is the stored value of pixels without a measured one, where the header states it.
    Frames that differ in ``apart`` never share a volume. ``perhaps`` is asked only where several
    frames lie at one position: its attributes may as well vary inside one good volume.
    """

    source: int
    index: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float
    shape: tuple[int, int]
    slope: float
    intercept: float
    padding: float | None
    apart: Named
    perhaps: Named


def read_frames(ds: Dataset, source: int) -> list[Frame]:
    """Read the frames of one object's header; ``source`` is its number in the series.

    Raises:
        GeometryError: Position, orientation or spacing is missing or not usable.
    """
    try:
        if "PerFrameFunctionalGroupsSequence" in ds:
            return _enhanced(ds, source)
        return [_frame(source, 0, ds, ds, ds, ds, ds, _classic_apart(ds), _classic_perhaps(ds))]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise GeometryError("Position, orientation or spacing of a slice is missing.", HINT) from None


def _classic_apart(ds: Dataset) -> Named:
    named = tuple((word, _values(ds, keyword)) for keyword, word in _APART.items())
    return (*named, ("kind of value", _components(ds, "ImageType")))


def _classic_perhaps(ds: Dataset) -> Named:
    return tuple((word, _values(ds, keyword)) for keyword, word in _PERHAPS_APART.items())


def _components(ds: Dataset, keyword: str) -> Key:
    return tuple(sorted(str(v).upper() for v in _list(ds.get(keyword, None)) if str(v).upper() in COMPONENTS))


def _list(value: Any) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    return [value] if isinstance(value, (str, int, float)) else list(value)


def _values(ds: Dataset, keyword: str) -> Key:
    """Return an attribute's values in a form that compares: numbers rounded, so that 30 and 30.0 are one."""
    found = []
    for value in _list(ds.get(keyword, None)):
        try:
            found.append(round(float(value), 3) + 0.0)
        except (TypeError, ValueError):
            found.append(str(value))
    return tuple(found)


def _enhanced(ds: Dataset, source: int) -> list[Frame]:
    shared = ds.SharedFunctionalGroupsSequence[0]
    pointers = [int(item.DimensionIndexPointer) for item in ds.get("DimensionIndexSequence", None) or ()]
    frames = []
    for index, own in enumerate(ds.PerFrameFunctionalGroupsSequence):
        content = _group(shared, own, "FrameContentSequence")
        kinds = [_group(shared, own, f"{m}FrameTypeSequence") for m in ("MRImage", "CTImage", "PET")]
        apart = (
            ("echo", _values(_group(shared, own, "MREchoSequence"), "EffectiveEchoTime")),
            ("b-value", _values(_group(shared, own, "MRDiffusionSequence"), "DiffusionBValue")),
            ("time point", _values(content, "TemporalPositionIndex")),
            ("time point", _values(ds, "TemporalPositionIdentifier")),
            ("kind of value", tuple(_values(kind, "ComplexImageComponent") for kind in kinds)),
            ("kind of value", tuple(_components(kind, "FrameType") for kind in kinds)),
        )
        dimensions = zip(pointers, _list(content.get("DimensionIndexValues", None)), strict=False)
        perhaps = (
            *(("dimension", (int(value),)) for pointer, value in dimensions if pointer not in _PLACES),
            ("acquisition", _values(content, "FrameAcquisitionNumber")),
            ("acquisition", _values(ds, "AcquisitionNumber")),
        )
        position = _group(shared, own, "PlanePositionSequence")
        orientation = _group(shared, own, "PlaneOrientationSequence")
        measures = _group(shared, own, "PixelMeasuresSequence")
        scaling = _group(shared, own, "PixelValueTransformationSequence")
        frames.append(_frame(source, index, ds, position, orientation, measures, scaling, apart, perhaps))
    if len(frames) != int(ds.get("NumberOfFrames", None) or 1):
        raise GeometryError("The number of frames and of their descriptions differ.", HINT)
    return frames


def _group(shared: Dataset, own: Dataset, name: str) -> Dataset:
    from pydicom.dataset import Dataset

    items = own.get(name, None) or shared.get(name, None)
    return items[0] if items else Dataset()


def _padding(ds: Dataset) -> float | None:
    value = ds.get("PixelPaddingValue", None)
    return float(value) if isinstance(value, (int, float)) else None


def _frame(
    source: int,
    index: int,
    whole: Dataset,
    position: Dataset,
    orientation: Dataset,
    measures: Dataset,
    scaling: Dataset,
    apart: Named,
    perhaps: Named,
) -> Frame:
    slope, intercept = scaling.get("RescaleSlope", None), scaling.get("RescaleIntercept", None)
    frame = Frame(
        source,
        index,
        np.array([float(v) for v in position.ImagePositionPatient]),
        np.array([float(v) for v in orientation.ImageOrientationPatient]),
        (float(measures.PixelSpacing[0]), float(measures.PixelSpacing[1])),
        float(measures.get("SliceThickness", None) or 0),
        (int(whole.Rows), int(whole.Columns)),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        _padding(whole),
        apart,
        perhaps,
    )
    numbers = [*frame.position, *frame.orientation, *frame.spacing, frame.thickness, frame.slope, frame.intercept]
    usable = len(frame.position) == 3 and len(frame.orientation) == 6 and min(frame.spacing) > 0 and frame.slope != 0
    if not usable or not np.isfinite(numbers).all():
        raise GeometryError("Position, orientation or spacing of a slice is not usable.", HINT)
    return frame
