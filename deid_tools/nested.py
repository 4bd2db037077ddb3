"""Segments and codes: each with the meaning that the dictionary or the label schema gives it, never the file's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deid_tools.admit import Refusal
from deid_tools.transforms import as_text
from medlsdm.types import LabelClass, LabelSchema

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PRIVATE_SCHEME = "99MEDLSDM"
_CODE = re.compile(r"[A-Z0-9][A-Z0-9.-]{0,15}")
_SCHEMES = ("SCT", "SRT", "DCM", "NCIt", PRIVATE_SCHEME)


def clean_segment(item: Dataset, schema: LabelSchema | None) -> Dataset:
    """Return a segment named by its code or by the schema.

    Raises:
        Refusal: It cannot be named without free text.
    """
    from pydicom.dataset import Dataset

    value, scheme = code_of(item, "SegmentedPropertyTypeCodeSequence")
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
    category, category_scheme = code_of(item, "SegmentedPropertyCategoryCodeSequence")
    known = code_meaning(category, category_scheme)
    segment.SegmentedPropertyCategoryCodeSequence = [
        coded(category, category_scheme, known) if known else coded("85756007", "SCT", "Tissue")
    ]
    if found:
        value, scheme = class_code(found)
    segment.SegmentedPropertyTypeCodeSequence = [coded(value, scheme, meaning)]
    return segment


def segment_words(ds: Dataset) -> Iterator[str]:
    """Yield the names, codes and terms that a rebuilt object states: all are the dictionary's or the schema's."""
    yield PRIVATE_SCHEME
    for element in ds:
        if element.VR == "CS":
            yield from as_text(element.value).split("\\")
        elif element.VR == "SQ":
            for item in element.value:
                yield from segment_words(item)
        elif element.VR in ("LO", "SH") and element.keyword in ("SegmentLabel", "CodeValue", "CodeMeaning"):
            yield str(element.value)


def code_of(item: Dataset, keyword: str) -> tuple[str, str]:
    """Return value and scheme of the one code below a keyword, or two empty strings."""
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
    """Find a structure's class: by SNOMED code or our own, then by declared name or alias; never by guessing."""
    code = snomed(value, scheme)
    alike = [c for c in schema.classes if (code and c.snomed == code) or (value, scheme) == class_code(c)]
    if len(alike) > 1:
        alike = [c for c in alike if c.answers_to(label)]
        return alike[0] if alike else None
    return alike[0] if alike else schema.by_name(label)
