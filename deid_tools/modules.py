"""What a valid object needs besides its content: Type 1 and 2 attributes, stamps, file meta, preamble."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DUMMY_DATE, DUMMY_TIME = "19000101", "000000"
METHOD = "medlsdm allow-list; PS3.15 basic profile"
STAMP_CODES = (("113100", "Basic Application Confidentiality Profile"),)
LONGITUDINAL = "REMOVED"

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
        "LossyImageCompression": "00",
        "ContentLabel": "SEGMENTATION",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
    },
}
_MULTIFRAME: dict[str, Any] = {
    "Manufacturer": "not stated",
    "ManufacturerModelName": "not stated",
    "DeviceSerialNumber": "not stated",
    "SoftwareVersions": "not stated",
    "ContentDate": DUMMY_DATE,
    "ContentTime": DUMMY_TIME,
}


def complete(ds: Dataset, kind: str, *, multiframe: bool) -> None:
    """Put back, empty or with a dummy, what the object's definition asks for (PS3.3 A and C)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if kind == "PT" and not multiframe and "PatientPosition" in ds:
            del ds.PatientPosition  # classic PET states it as codes, and not both ways (PS3.3 C.8.4.6)
        if multiframe:
            for keyword, value in _MULTIFRAME.items():
                setattr(ds, keyword, value)
        for keyword, value in ({} if multiframe and kind != "SEG" else _FIXED[kind]).items():
            if keyword not in ds:
                setattr(ds, keyword, value)
        for keyword in _EMPTY_ALWAYS + ([] if multiframe and kind != "SEG" else _EMPTY[kind]):
            if keyword not in ds:
                setattr(ds, keyword, [] if keyword.endswith("Sequence") else None)


def stamp(ds: Dataset) -> None:
    """State that the object was de-identified, and how (PS3.15 E.1.1 and CID 7050)."""
    from deid_tools.nested import coded

    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = METHOD
    ds.DeidentificationMethodCodeSequence = [coded(value, "DCM", meaning) for value, meaning in STAMP_CODES]
    ds.LongitudinalTemporalInformationModified = LONGITUDINAL


def save_clean(ds: Dataset, path: Path) -> None:
    """Write a dataset as explicit little endian with a zero preamble and a file meta built from nothing."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    ds.file_meta = meta
    ds.preamble = b"\0" * 128
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True, overwrite=False)
