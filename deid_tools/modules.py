"""What a valid object needs besides its content: Type 1 and 2 attributes, stamps, file meta, preamble."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.frames import NOT_STATED
from medlsdm.errors import ConfigError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PIXELS = 0x7FE00010
DUMMY_DATE, DUMMY_TIME = "19000101", "000000"
METHODS = {"basic": "medlsdm basic; PS3.15 basic profile"}
METHOD = "medlsdm allow-list; PS3.15 basic profile"

_EMPTY_ALWAYS = [
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "SeriesNumber",
    "InstanceNumber",
    "Manufacturer",
    "PositionReferenceIndicator",
]
_EMPTY = {
    "CT": ["KVP", "AcquisitionNumber", "PatientPosition", "Laterality"],
    "MR": [
        "ScanOptions",
        "MRAcquisitionType",
        "EchoTime",
        "EchoTrainLength",
        "PatientPosition",
        "RepetitionTime",
        "Laterality",
    ],
    "PT": [
        "CollimatorType",
        "CorrectedImage",
        "RadiopharmaceuticalInformationSequence",
        "PatientOrientationCodeSequence",
        "PatientGantryRelationshipCodeSequence",
        "Laterality",
    ],
    "SEG": ["ContentCreatorName", "ContentDescription"],
}
_EMPTY_FRAMES = ["AcquisitionContextSequence"]
_FIXED: dict[str, dict[str, Any]] = {
    "CT": {},
    "MR": {"ScanningSequence": "RM", "SequenceVariant": "NONE"},
    "PT": {
        "SeriesDate": DUMMY_DATE,
        "SeriesTime": DUMMY_TIME,
        "AcquisitionDate": DUMMY_DATE,
        "AcquisitionTime": DUMMY_TIME,
        "CountsSource": "EMISSION",
        "SeriesType": ["STATIC", "IMAGE"],
        "DecayCorrection": "NONE",
        "NumberOfSlices": 1,
        "FrameReferenceTime": 0,
        "ActualFrameDuration": 0,
        "ImageIndex": 1,
        "Units": "NONE",
    },
    "SEG": {
        "SegmentationType": "BINARY",
        "PhotometricInterpretation": "MONOCHROME2",  # a label map's palette is not needed
        "LossyImageCompression": "00",
        "ContentLabel": "SEGMENTATION",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
    },
}
_MULTIFRAME: dict[str, Any] = {
    "Manufacturer": NOT_STATED,
    "ManufacturerModelName": NOT_STATED,
    "DeviceSerialNumber": NOT_STATED,
    "SoftwareVersions": NOT_STATED,
    "ContentDate": DUMMY_DATE,
    "ContentTime": DUMMY_TIME,
}


def written_by_us(kind: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the keywords that are put back empty, and those that get a dummy value, for CT, MR, PT or SEG."""
    return frozenset(_EMPTY_ALWAYS + _EMPTY[kind] + _EMPTY_FRAMES), frozenset({*_FIXED[kind], *_MULTIFRAME})


def complete(ds: Dataset, kind: str, *, multiframe: bool) -> None:
    """Put back, empty or with a dummy, what the object's definition asks for (PS3.3 A and C)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if kind == "PT" and not multiframe and "PatientPosition" in ds:
            del ds.PatientPosition  # classic PET states it as codes, and not both ways (PS3.3 C.8.4.6)
        if multiframe:
            for keyword, value in _MULTIFRAME.items():
                if keyword not in ds:
                    setattr(ds, keyword, value)
        for keyword, value in ({} if multiframe and kind != "SEG" else _FIXED[kind]).items():
            if keyword not in ds:
                setattr(ds, keyword, value)
        empty = _EMPTY_FRAMES if multiframe and kind != "SEG" else _EMPTY[kind]
        for keyword in _EMPTY_ALWAYS + empty:
            if keyword == "Laterality" and "BodyPartExamined" in ds:
                continue  # asked for of paired parts only, and then the original has it
            if keyword not in ds:
                setattr(ds, keyword, [] if keyword.endswith("Sequence") else None)


def stamp(ds: Dataset, codes: Iterable[str] = ("113100",), *, name: str = "allow-list", dates: bool = False) -> None:
    """State that the object was de-identified, and how (PS3.15 E.1.1 and CID 7050).

    Args:
        ds: The object.
        codes: Codes of CID 7050 for what was really done.
        name: The recipe's name.
        dates: Whether dates were moved; else they were removed.
    """
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = METHODS.get(name, METHOD)
    ds.DeidentificationMethodCodeSequence = []
    for code in codes:
        add_stamp(ds, code)
    ds.LongitudinalTemporalInformationModified = "MODIFIED" if dates else "REMOVED"


def add_stamp(ds: Dataset, code: str) -> None:
    """Add one more code of CID 7050 for what was done, such as 113101 once pixels were cleaned.

    Raises:
        ConfigError: There is no such code.
    """
    from deid_tools.nested import code_meaning, coded

    meaning = code_meaning(code, "DCM")
    if not meaning or not re.fullmatch(r"1131(0\d|1[0-2])", code):
        raise ConfigError(f"{code} is not a code of CID 7050.", "See PS3.16.")
    if all(item.CodeValue != code for item in ds.DeidentificationMethodCodeSequence):
        ds.DeidentificationMethodCodeSequence.append(coded(code, "DCM", meaning))


def save_clean(ds: Dataset, path: Path) -> None:
    """Write a dataset as explicit little endian with a zero preamble and a file meta built from nothing."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomIO
    from pydicom.filewriter import write_dataset, write_file_meta_info
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    pixels = ds.get(_PIXELS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        header = DicomIO(file)
        header.is_little_endian, header.is_implicit_VR = True, False
        header.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(header, meta)
        write_dataset(header, ds[:_PIXELS])
        if pixels is not None:  # by themselves: the library would copy them four times
            head = _PIXELS >> 16, _PIXELS & 0xFFFF, pixels.VR.encode(), 0, len(pixels.value)
            file.write(struct.pack("<HH2sHL", *head))
            file.write(pixels.value)
