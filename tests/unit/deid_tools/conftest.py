from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.keys import SiteKeys
from deid_tools.plant import write_planted_study
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, SemanticMap

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
OBLIQUE = np.array([[0.9, 0.1, 0.0, -20.0], [-0.1, 0.9, 0.0, 3.0], [0.0, 0.0, 2.5, 7.0], [0.0, 0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Study:
    source: Path
    tokens: list[str]
    labels: SemanticMap
    schema: LabelSchema
    array: np.ndarray


@pytest.fixture
def data() -> Path:
    if not (DATA / "dicom").is_dir():
        pytest.skip("the real data folder is not beside the checkout")
    return DATA


@pytest.fixture
def organ_ct(data: Path, tmp_path: Path) -> Path:
    """TotalSegmentator's sample: a compressed CT whose headers name no patient or class, repaired, and its labels."""
    folder = tmp_path / "organs"
    folder.mkdir()
    for k, path in enumerate(sorted((data / "dicom" / "ct-organs" / "dicom").iterdir())):
        ds = pydicom.dcmread(path)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID, ds.Modality = "1.2.3", "1.2.3.4", "ORGANS-1", "CT"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{k + 1}"
        ds.save_as(folder / path.name)
    shutil.copy(data / "dicom" / "ct-organs" / "labels.nii.gz", folder)
    return folder


@pytest.fixture(scope="session")
def keys() -> SiteKeys:
    return SiteKeys.derive(bytes(range(32)), "test")


@pytest.fixture(scope="session")
def schema() -> LabelSchema:
    return LabelSchema(
        "organs", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004"), LabelClass(2, "Geschwür"))
    )


@pytest.fixture
def study(tmp_path: Path, schema: LabelSchema) -> Study:
    return plant(tmp_path / "hospital", schema)


def plant(folder: Path, schema: LabelSchema, *, seed: int = 1, modality: Modality = Modality.CT) -> Study:
    geometry = Geometry(OBLIQUE, (20, 16, 8))
    array = np.random.default_rng(seed).normal(0, 300, geometry.shape).round().astype(np.float32)
    values = np.zeros(geometry.shape, np.uint8)
    values[4:9, 5:10, 3:7] = 1
    values[10:14, 5:10, 3:8] = 2
    labels = SemanticMap(values, geometry, schema)
    tokens = write_planted_study(array, geometry, modality, labels, folder, seed=seed, hospital="Northgate")
    return Study(folder, tokens, labels, schema, array)


def structures(drawn, *, images=(), series="1.2.3.4", frame="1.2.3.5", **header):
    """Build an RTSTRUCT. ``drawn``: (name, code or "", [(points LPS [N, 3], type, image UID or ""), ...]), ..."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    def item(**values):
        ds = Dataset()
        for keyword, value in values.items():
            setattr(ds, keyword, value)
        return ds

    def image(uid):
        return item(ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2", ReferencedSOPInstanceUID=uid)

    ds = item(SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", SOPInstanceUID="1.2.3.99", Modality="RTSTRUCT")
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID = "1.2.3.98", "1.2.3", "A1"
    named = item(SeriesInstanceUID=series, ContourImageSequence=[image(uid) for uid in images])
    ds.ReferencedFrameOfReferenceSequence = [
        item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[item(RTReferencedSeriesSequence=[named])])
    ]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    for number, (name, code, contours) in enumerate(drawn, start=1):
        ds.StructureSetROISequence.append(item(ROINumber=number, ROIName=name))
        coded = [item(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning="x")] if code else []
        ds.RTROIObservationsSequence.append(
            item(ObservationNumber=number, ReferencedROINumber=number, RTROIIdentificationCodeSequence=coded)
        )
        sequence = []
        for points, kind, uid in contours:
            values = np.round(np.asarray(points, float), 5).ravel().tolist()
            contour = item(ContourGeometricType=kind, NumberOfContourPoints=len(points), ContourData=values)
            if uid:
                contour.ContourImageSequence = [image(uid)]
            sequence.append(contour)
        ds.ROIContourSequence.append(item(ReferencedROINumber=number, ContourSequence=sequence))
    for keyword, value in header.items():
        setattr(ds, keyword, value)
    return ds


@pytest.fixture(name="structures")
def _structures():
    return structures
