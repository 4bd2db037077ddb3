"""Decide what may enter: SOP class, image type, size and form of each file, before anything else is read.

Every refusal is a reason in words that quotes no value of the file. Nothing is forced open.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deid_tools.references import References, references

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset

    from deid_tools.moments import Moment

MAX_FILES = 200_000
MAX_FILE_BYTES = 4 * 1024**3
MAX_FRAME_BYTES = 8 * 1024**3
MAX_NESTING = 8
MAX_ELEMENTS = 500_000

_CLASSIC = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
}
_ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
}
_SEGMENTATION = {"1.2.840.10008.5.1.4.1.1.66.4": "SEG", "1.2.840.10008.5.1.4.1.1.66.7": "SEG"}
_LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
_STRUCTURES = {"1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT"}
IMAGE_CLASSES = _CLASSIC | _ENHANCED
ADMITTED = IMAGE_CLASSES | _SEGMENTATION | _STRUCTURES

_REASONS = {
    "1.2.840.10008.1.3.10": "a DICOMDIR index is not an image; it is rebuilt, never copied",
    "1.2.840.10008.5.1.4.1.1.7": "secondary captures often carry text in their pixels",
    "1.2.840.10008.5.1.4.1.1.1": "a plain radiograph is not a volume",
    "1.2.840.10008.5.1.4.1.1.104.1": "an encapsulated PDF holds free text",
}
_REASON_OTHER = "this kind of DICOM object is not on the list of admitted ones (CT, MR, PET, SEG, RTSTRUCT)"
_BAD_IMAGE_TYPES = {
    "LOCALIZER": "a localizer is not part of a volume",
    "SCREEN SAVE": "a screen save may carry text in its pixels",
    "SCREENSAVE": "a screen save may carry text in its pixels",
    "DOSE": "a dose page carries text in its pixels",
    "REPORT": "a report page carries text in its pixels",
    "CSA REPORT": "a report page carries text in its pixels",
}
_SYNTAXES = {
    "1.2.840.10008.1.2": "native",
    "1.2.840.10008.1.2.1": "native",
    "1.2.840.10008.1.2.5": "compressed",
    "1.2.840.10008.1.2.4.57": "compressed",
    "1.2.840.10008.1.2.4.70": "compressed",
    "1.2.840.10008.1.2.4.80": "compressed",
    "1.2.840.10008.1.2.4.81": "compressed",
    "1.2.840.10008.1.2.4.90": "compressed",
    "1.2.840.10008.1.2.4.91": "compressed",
}
_DEFLATED = "1.2.840.10008.1.2.1.99"
DAMAGED = "its header is damaged: a value that is needed is missing or malformed"
_UNSUPPORTED = "its transfer syntax is not supported (deflated, big endian, video or unknown)"


Owner = tuple[str, str, str]
"""Whose a file is: study UID, issuer of the patient ID, patient ID."""
NOBODY: Owner = ("", "", "")


class Refusal(Exception):
    """Carry the reason, in words, why a file or a series is held. Never leaves the package."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.series_uid = ""
        self.owner = NOBODY


@dataclass(frozen=True, slots=True, repr=False)
class Instance:
    """Point at one admitted file: what is needed to group it. Holds identifiers, in memory only."""

    path: Path
    sop_class: str
    sop_uid: str
    study_uid: str
    series_uid: str
    issuer: str
    patient_id: str
    frame_of_reference: str
    refers_to: References | None
    compressed: bool = False
    moment: Moment | None = None
    birth: str = ""

    @property
    def owner(self) -> Owner:
        """Return whose it is."""
        return self.study_uid, self.issuer, self.patient_id

    @property
    def is_segmentation(self) -> bool:
        """Tell whether this is a segmentation."""
        return self.sop_class in _SEGMENTATION

    @property
    def is_structure_set(self) -> bool:
        """Tell whether this is an RT structure set."""
        return self.sop_class in _STRUCTURES


def read_strict(path: Path, *, headers_only: bool = False) -> FileDataset:
    """Read a DICOM file without force; anything odd about its form is a Refusal.

    Raises:
        Refusal: It is not DICOM, is cut short, too large or too deep.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_file_meta_info

    size = path.stat().st_size
    if size == 0:
        raise Refusal("the file is empty")
    if size > MAX_FILE_BYTES:
        raise Refusal("the file is larger than 4 GiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if str(read_file_meta_info(path).get("TransferSyntaxUID", "")) == _DEFLATED:
                raise Refusal(_UNSUPPORTED)  # it would be inflated whole, however large, before anything is checked
            ds = pydicom.dcmread(path, stop_before_pixels=headers_only)
            _check_size(ds, 0, [0])
    except InvalidDicomError:
        raise Refusal("the file is not DICOM") from None
    except Refusal:
        raise
    except Exception:
        raise Refusal("the file is damaged or cut short") from None
    return ds


def _check_size(ds: Dataset, depth: int, count: list[int]) -> None:
    if depth > MAX_NESTING:
        raise Refusal(f"the header is nested deeper than {MAX_NESTING} levels")
    from pydicom.datadict import dictionary_has_tag, dictionary_VR

    count[0] += len(ds)
    if count[0] > MAX_ELEMENTS:
        raise Refusal(f"the header has more than {MAX_ELEMENTS} elements")
    for tag, element in list(ds.items()):  # which reads none of them
        vr = element.VR
        if vr is None and dictionary_has_tag(tag):
            vr = dictionary_VR(tag)
        if vr == "SQ":
            for item in ds[tag].value:
                _check_size(item, depth + 1, count)


def admit(path: Path) -> Instance:
    """Read a file's header and say where it belongs.

    Raises:
        Refusal: The file may not enter; the reason is in words.
    """
    ds = read_strict(path, headers_only=True)
    try:
        return _admit(path, ds)
    except Refusal as refusal:
        refusal.series_uid, refusal.owner = _series_of(ds), _owner_of(ds)
        raise
    except Exception:
        refusal = Refusal(DAMAGED)
        refusal.series_uid, refusal.owner = _series_of(ds), _owner_of(ds)
        raise refusal from None


def _series_of(ds: Dataset) -> str:
    """Return the series that a refused image would have belonged to, where that can be read."""
    try:
        return _text(ds, "SeriesInstanceUID") if _text(ds, "SOPClassUID") in ADMITTED else ""
    except Exception:
        return ""


def _owner_of(ds: Dataset) -> Owner:
    """Return whose a refused file is, where that can be read."""
    try:
        return _text(ds, "StudyInstanceUID"), _text(ds, "IssuerOfPatientID"), _text(ds, "PatientID")
    except Exception:
        return NOBODY


def _admit(path: Path, ds: Dataset) -> Instance:
    from deid_tools.moments import moment

    meta = getattr(ds, "file_meta", {})
    declared = str(meta.get("MediaStorageSOPClassUID", ""))
    if declared == "1.2.840.10008.1.3.10":
        raise Refusal(_REASONS[declared])
    sop_class = _text(ds, "SOPClassUID")
    if not sop_class:
        raise Refusal("the SOP Class UID is missing, so nobody can tell what kind of object this is")
    if sop_class not in ADMITTED:
        raise Refusal(_REASONS.get(sop_class, _REASON_OTHER))
    if declared != sop_class or str(meta.get("MediaStorageSOPInstanceUID", "")) != _text(ds, "SOPInstanceUID"):
        raise Refusal("the file's outer and inner identification differ")
    _check_image(ds, str(meta.get("TransferSyntaxUID", "")))
    missing = [k for k in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID") if not _text(ds, k)]
    if missing:
        raise Refusal(f"{missing[0]} is missing")
    found = references(ds) if sop_class not in IMAGE_CLASSES else None
    return Instance(
        path,
        sop_class,
        _text(ds, "SOPInstanceUID"),
        _text(ds, "StudyInstanceUID"),
        _text(ds, "SeriesInstanceUID"),
        _text(ds, "IssuerOfPatientID"),
        _text(ds, "PatientID"),
        found.frame_of_reference if found else _text(ds, "FrameOfReferenceUID"),
        found,
        compressed=_SYNTAXES[str(meta["TransferSyntaxUID"].value)] == "compressed",
        moment=moment(ds) if sop_class in IMAGE_CLASSES else None,
        birth=_text(ds, "PatientBirthDate").replace(".", "") if sop_class in IMAGE_CLASSES else "",
    )


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword, "")
    return "" if value is None else str(value).strip(" \0")


def _check_image(ds: Dataset, syntax: str) -> None:
    if syntax not in _SYNTAXES:
        raise Refusal(_UNSUPPORTED)
    if _text(ds, "BurnedInAnnotation").upper() == "YES":
        raise Refusal("its own header says that text is burned into the pixels")
    if _text(ds, "SOPClassUID") in IMAGE_CLASSES and _text(ds, "Modality") != IMAGE_CLASSES[_text(ds, "SOPClassUID")]:
        raise Refusal("its modality does not go with its SOP class")
    if _text(ds, "SOPClassUID") in _STRUCTURES:
        return
    if "ModalityLUTSequence" in ds:
        raise Refusal("its values pass through a lookup table, which is not supported")
    kinds = ds.get("ImageType", None) or []
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if str(kind).upper() in _BAD_IMAGE_TYPES:
            raise Refusal(_BAD_IMAGE_TYPES[str(kind).upper()])
    try:
        frame_bits = int(ds.Rows) * int(ds.Columns) * int(ds.BitsAllocated)
        frames = int(ds.get("NumberOfFrames", None) or 1)
        samples, photometric = int(ds.SamplesPerPixel), _text(ds, "PhotometricInterpretation")
    except (AttributeError, TypeError, ValueError):
        raise Refusal("it has no pixel grid (rows, columns or bits are missing)") from None
    grey = ("MONOCHROME2", "PALETTE COLOR") if _text(ds, "SOPClassUID") == _LABEL_MAP else ("MONOCHROME2",)
    if samples != 1 or photometric not in grey:
        raise Refusal("its pixels are in colour or inverted")
    if frame_bits <= 0 or frames <= 0 or frame_bits * frames / 8 > MAX_FRAME_BYTES:
        raise Refusal("its pixels would take more than 8 GiB, or none")
