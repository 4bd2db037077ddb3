"""Rebuild the few nested sequences that carry geometry or the meaning of a segment.

The header engine drops every sequence. What multi-frame images and segmentations need is copied
here, item by item, from a tree of keywords: numbers as they are, UIDs under the site's key, codes
with the meaning that the dictionary gives them. No free text passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deid_tools.admit import Refusal
from deid_tools.keys import SiteKeys
from deid_tools.uids import new_uid
from medlsdm.types import LabelClass, LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PRIVATE_SCHEME = "99MEDLSDM"
_CODE = re.compile(r"[A-Z0-9][A-Z0-9.-]{0,15}")
_SCHEMES = ("SCT", "SRT", "DCM", "NCIt", PRIVATE_SCHEME)

Tree = dict[str, "Tree | None"]
_FRAME: Tree = {
    "PixelMeasuresSequence": {"PixelSpacing": None, "SliceThickness": None, "SpacingBetweenSlices": None},
    "PlaneOrientationSequence": {"ImageOrientationPatient": None},
    "PlanePositionSequence": {"ImagePositionPatient": None},
    "FrameContentSequence": {
        "DimensionIndexValues": None,
        "InStackPositionNumber": None,
        "TemporalPositionIndex": None,
    },
    "PixelValueTransformationSequence": {"RescaleSlope": None, "RescaleIntercept": None},
    "MREchoSequence": {"EffectiveEchoTime": None},
    "MRDiffusionSequence": {"DiffusionBValue": None},
    "SegmentIdentificationSequence": {"ReferencedSegmentNumber": None},
}
TREE: Tree = {
    "SharedFunctionalGroupsSequence": _FRAME,
    "PerFrameFunctionalGroupsSequence": _FRAME,
    "DimensionOrganizationSequence": {"DimensionOrganizationUID": None},
    "DimensionIndexSequence": {
        "DimensionOrganizationUID": None,
        "DimensionIndexPointer": None,
        "FunctionalGroupPointer": None,
    },
}
_NUMBERS = ("DS", "IS", "FD", "FL", "US", "UL", "SS", "SL", "AT")


def rebuild(source: Dataset, target: Dataset, keys: SiteKeys, schema: LabelSchema | None, *, multiframe: bool) -> None:
    """Add to ``target`` the nested geometry of a multi-frame ``source``, and its segments if it has any.

    Raises:
        Refusal: A value is not of its kind, or a segment cannot be named without free text.
    """
    if not multiframe:
        return
    _copy(source, target, TREE, keys)
    if "SegmentSequence" in source:
        target.SegmentSequence = [_segment(item, schema) for item in source.SegmentSequence]


def _copy(source: Dataset, target: Dataset, tree: Tree, keys: SiteKeys) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    for keyword, below in tree.items():
        if keyword not in source:
            continue
        element = source[keyword]
        if below is not None:
            items = []
            for item in element.value:
                items.append(Dataset())
                _copy(item, items[-1], below, keys)
            setattr(target, keyword, Sequence(items))
        elif element.VR == "UI":
            setattr(target, keyword, new_uid(keys, str(element.value)))
        elif element.VR in _NUMBERS:
            setattr(target, keyword, element.value)
        else:
            raise Refusal("a nested value is not of the type that the standard gives it")


def _segment(item: Dataset, schema: LabelSchema | None) -> Dataset:
    from pydicom.dataset import Dataset

    value, scheme = _code_of(item, "SegmentedPropertyTypeCodeSequence")
    found = match_class(schema, value, scheme, str(item.get("SegmentLabel", ""))) if schema else None
    meaning = found.name if found else code_meaning(value, scheme)
    if not meaning:
        raise Refusal("a segment's code is in no dictionary and its label is in no label schema")
    segment = Dataset()
    segment.SegmentNumber = int(item.SegmentNumber)
    segment.SegmentLabel = meaning
    algorithm = str(item.get("SegmentAlgorithmType", ""))
    segment.SegmentAlgorithmType = algorithm if algorithm in ("AUTOMATIC", "SEMIAUTOMATIC", "MANUAL") else "MANUAL"
    if segment.SegmentAlgorithmType != "MANUAL":
        segment.SegmentAlgorithmName = "not stated"
    category, category_scheme = _code_of(item, "SegmentedPropertyCategoryCodeSequence")
    known = code_meaning(category, category_scheme)
    segment.SegmentedPropertyCategoryCodeSequence = [
        coded(category, category_scheme, known) if known else coded("85756007", "SCT", "Tissue")
    ]
    if found:
        value, scheme = class_code(found)
    segment.SegmentedPropertyTypeCodeSequence = [coded(value, scheme, meaning)]
    return segment


def segment_words(ds: Dataset) -> Iterator[str]:
    """Yield the names and codes that a rebuilt SEG states: all are the dictionary's or the schema's."""
    yield PRIVATE_SCHEME
    for segment in ds.get("SegmentSequence", None) or ():
        yield segment.SegmentLabel
        for keyword in ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence"):
            for item in segment[keyword].value:
                yield from (item.CodeValue, item.CodeMeaning)


def _code_of(item: Dataset, keyword: str) -> tuple[str, str]:
    codes: Any = item.get(keyword, None) or []
    if len(codes) != 1:
        return "", ""
    value, scheme = str(codes[0].get("CodeValue", "")), str(codes[0].get("CodingSchemeDesignator", ""))
    return (value, scheme) if _CODE.fullmatch(value) and scheme in _SCHEMES else ("", "")


def coded(value: str, scheme: str, meaning: str) -> Dataset:
    """Return a coded concept as a sequence item (PS3.3 section 8)."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning[:64]
    return item


def snomed(value: str, scheme: str) -> str:
    """Return the SNOMED CT code for a code in SCT or the retired SRT, or an empty string."""
    if scheme == "SRT":
        from pydicom.sr._snomed_dict import mapping

        return mapping["SRT"].get(value, "")
    return value if scheme == "SCT" else ""


def code_meaning(value: str, scheme: str) -> str:
    """Return what the DICOM dictionary calls a code, or an empty string; never the file's own words."""
    from pydicom.sr._concepts_dict import concepts

    if scheme == PRIVATE_SCHEME:
        return f"class {value[1:]}" if re.fullmatch(r"L\d{1,5}", value) else ""
    code = snomed(value, scheme)
    scheme = "SCT" if code else scheme
    for row in concepts.get(scheme, {}).values():
        if (code or value) in row:
            return row[code or value][0]
    return ""


def class_code(cls: LabelClass) -> tuple[str, str]:
    """Return the code that stands for a class: SNOMED CT, or our private scheme where it has none."""
    return (cls.snomed, "SCT") if cls.snomed else (f"L{cls.id}", PRIVATE_SCHEME)


def match_class(schema: LabelSchema, value: str, scheme: str, label: str) -> LabelClass | None:
    """Find a segment's class: by SNOMED code or our own, then by exact name, upper and lower case alike."""
    code = snomed(value, scheme)
    classes = [c for c in schema.classes if c.id]
    coded_alike = [c for c in classes if (code and c.snomed == code) or (value, scheme) == class_code(c)]
    if len(coded_alike) == 1:
        return coded_alike[0]
    named = [c for c in coded_alike or classes if c.name.casefold() == label.strip().casefold()]
    return named[0] if named else None
