"""Studies that look like a hospital's, with made-up identifiers planted in every corner.

For the demo and for tests: each planted token is known, so a leak can be counted.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.instances import cut, images
from deid_tools.nested import class_code, coded
from medlsdm.errors import DataError
from medlsdm.types import Geometry, Modality, SemanticMap

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_ROOT = "1.2.826.0.1.3680043.10.1511"
_CONSONANTS, _VOWELS = "BDFGKLMNPRSTVZ", "AEIOU"
MR_TOP = 4095


@dataclass(slots=True)
class _Planter:
    """Make up tokens of six characters or more, numbers of twelve, which no UID holds by chance, and remember each."""

    random: random.Random
    tokens: list[str]

    def keep(self, token: str) -> str:
        self.tokens.append(token)
        return token

    def name(self) -> str:
        syllables = (self.random.choice(_CONSONANTS) + self.random.choice(_VOWELS) for _ in range(4))
        return self.keep("".join(syllables).capitalize())

    def digits(self, count: int) -> str:
        return self.keep(str(self.random.randrange(10 ** (count - 1), 10**count)))

    def day(self, start: int, end: int) -> str:
        first = date(start, 1, 1)
        return self.keep((first + timedelta(days=self.random.randrange(365 * (end - start)))).strftime("%Y%m%d"))

    def uid(self) -> str:
        return self.keep(f"{_ROOT}.{self.random.randrange(10**9, 10**10)}.{self.random.randrange(10**9, 10**10)}")

    def time(self) -> str:
        below = self.random.randrange
        return self.keep(f"{below(1, 24):02d}{below(60):02d}{below(60):02d}.{below(10**5, 10**6)}")


def write_planted_study(
    array: NDArray[Any],
    geometry: Geometry,
    modality: Modality,
    labels: SemanticMap,
    folder: Path,
    *,
    seed: int,
    hospital: str,
) -> list[str]:
    """Write a made-up patient's study: a classic CT or MR series and a DICOM SEG of its labels.

    Args:
        array: The scan [X, Y, Z]; CT in HU, MR scaled to 0-4095.
        geometry: Its grid.
        modality: CT or MR.
        labels: The label map on the same grid.
        folder: Where the study goes, in a folder of its own.
        seed: Equal seeds give the same made-up patient.
        hospital: The institution's name; it is planted too.

    Returns:
        Every planted token, each at least six characters.

    Raises:
        DataError: The label map holds no label, or is on another grid.
    """
    if not labels.geometry.matches(geometry) or not (labels.array > 0).any():
        raise DataError("The label map is empty or on another grid than the scan.")
    planter = _Planter(random.Random(f"{hospital}/{seed}"), [])  # noqa: S311  # made-up names, not secrets
    slices = cut(_stored_range(array, modality), geometry, slope=1.0)
    uids = {k: planter.uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    identity = _identity(planter, hospital, modality)
    study = folder / f"{identity['PatientID']}_{identity['StudyDate']}"
    series = [_dress(ds, identity, planter, k) for k, ds in enumerate(images(slices, modality, uids))]
    study.mkdir(parents=True)
    for k, ds in enumerate(series):
        _save(ds, study / f"{identity['PatientID']}_{k + 1:04d}.dcm", identity)
    segmentation = _segmentation(series, labels, planter, identity)
    _save(segmentation, study / f"{identity['PatientID']}_SEG.dcm", identity)
    return sorted({t for t in planter.tokens if len(t) >= 6})


def _stored_range(array: NDArray[Any], modality: Modality) -> NDArray[np.int16]:
    values = np.nan_to_num(np.asarray(array, np.float64))
    if modality is Modality.MR:
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (MR_TOP / max(high - low, 1e-12))
    return np.clip(np.rint(values), -32768, 32767).astype(np.int16)


def _identity(planter: _Planter, hospital: str, modality: Modality) -> dict[str, Any]:
    study_day = planter.day(2015, 2024)
    institution = f"{hospital} {planter.name()} Hospital"
    if len(hospital) >= 6:
        planter.keep(hospital)
    return {
        "PatientName": f"{planter.name()}^{planter.name()}^{planter.name()}",
        "PatientID": f"MRN{planter.digits(12)}",
        "OtherPatientIDs": planter.digits(12),
        "PatientBirthDate": planter.day(1930, 2005),
        "PatientSex": "F",
        "PatientAge": "093Y",
        "PatientAddress": f"{planter.name()} street 7",
        "PatientTelephoneNumbers": f"+49{planter.digits(12)}",
        "AccessionNumber": f"ACC{planter.digits(12)}",
        "StudyID": planter.digits(12),
        "StudyDate": study_day,
        "SeriesDate": study_day,
        "AcquisitionDate": study_day,
        "ContentDate": study_day,
        "StudyTime": planter.time(),
        "SeriesTime": planter.time(),
        "ReferringPhysicianName": f"{planter.name()}^{planter.name()}^^Dr",
        "PerformingPhysicianName": f"{planter.name()}^{planter.name()}",
        "OperatorsName": f"{planter.name()}^{planter.name()}",
        "InstitutionName": institution[:64],
        "InstitutionAddress": f"{planter.name()} square, {planter.name()}",
        "StationName": f"ST{planter.name()}",
        "DeviceSerialNumber": f"SN{planter.digits(12)}",
        "Manufacturer": "Example Imaging",
        "StudyDescription": f"{modality.value} referred by {planter.name()}",
        "SeriesDescription": f"thin {planter.name()}",
        "ProtocolName": f"protocol of {planter.name()}",
        "PatientComments": f"daughter {planter.name()} called {planter.digits(12)}",
        "ImageComments": f"seen by {planter.name()}",
        "AdditionalPatientHistory": f"lives with {planter.name()}",
        "RequestedProcedureDescription": f"asked by {planter.name()}",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL" if modality is Modality.CT else "M"],
    }


def _dress(ds: Dataset, identity: dict[str, Any], planter: _Planter, k: int) -> Dataset:
    """Put the made-up patient into one image: flat, nested, private, and in the UIDs."""
    from pydicom.dataset import Dataset

    for keyword, value in identity.items():
        setattr(ds, keyword, value)
    ds.SOPInstanceUID = planter.uid()
    ds.AcquisitionTime = planter.time()
    if ds.Modality == "CT":
        ds.KVP = "120"
    else:
        ds.ScanningSequence, ds.SequenceVariant, ds.EchoTime, ds.RepetitionTime = "GR", "SP", "3.5", "1800"
    item = Dataset()
    item.RequestedProcedureDescription = identity["RequestedProcedureDescription"]
    item.ScheduledProcedureStepID = planter.digits(12) if k == 0 else ""
    deeper = coded("X-001", "99LOCAL", f"for {identity['PatientName'].split('^')[0]}")
    item.RequestedProcedureCodeSequence = [deeper]
    ds.RequestAttributesSequence = [item]
    block = ds.private_block(0x0029, "EXAMPLE IMAGING 1.0", create=True)
    block.add_new(0x10, "LO", identity["PatientName"].replace("^", " "))
    block.add_new(0x11, "OB", f"{identity['PatientID']} {identity['PatientBirthDate']}".encode() + b"\0")
    block.add_new(0x12, "UI", planter.uid() if k == 0 else "")
    hidden = Dataset()
    hidden.PatientID = identity["PatientID"]
    block.add_new(0x13, "SQ", [hidden])
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60000011, "US", 8)
    ds.add_new(0x60000022, "LO", f"overlay {identity['PatientName'].split('^')[0]}")
    ds.add_new(0xFFFCFFFC, "OB", f"{identity['AccessionNumber']} ".encode())
    return ds


def _segmentation(series: list[Dataset], labels: SemanticMap, planter: _Planter, identity: dict[str, Any]) -> Dataset:
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.coding import Code

    slices = cut(labels.array.astype(np.int16 if labels.array.max() < 32768 else np.int32), labels.geometry, slope=1.0)
    present = [c for c in sorted(labels.schema.classes, key=lambda c: c.id) if c.id and (slices.stored == c.id).any()]
    masks = np.stack([slices.stored == c.id for c in present], axis=-1)
    codes = [class_code(c) for c in labels.schema.classes]
    surname = identity["PatientName"].split("^")[0]
    segments = [
        SegmentDescription(
            number,
            cls.name if codes.count(class_code(cls)) > 1 else f"{cls.name} {surname}"[:64],
            Code("123037004", "SCT", "Anatomical Structure"),
            Code(*class_code(cls), cls.name[:64]),
            "MANUAL",
        )
        for number, cls in enumerate(present, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = Segmentation(
            _sources(series),
            masks,
            "BINARY",
            segments,
            series_instance_uid=planter.uid(),
            series_number=300,
            sop_instance_uid=planter.uid(),
            instance_number=1,
            manufacturer="Example Imaging",
            manufacturer_model_name="Contour Desk",
            software_versions="1",
            device_serial_number=identity["DeviceSerialNumber"],
            content_creator_name=identity["OperatorsName"],
            content_description=identity["PatientComments"][:64],
        )
    ds.SeriesDescription = identity["SeriesDescription"]
    return ds


def _sources(series: list[Dataset]) -> list[Dataset]:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    for ds in series:
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return series


def _save(ds: Dataset, path: Path, identity: dict[str, Any]) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.SourceApplicationEntityTitle = identity["StationName"][:16]
    ds.file_meta = meta
    ds.preamble = identity["PatientID"].encode().ljust(128, b"\0")
    ds.save_as(path, enforce_file_format=True)
