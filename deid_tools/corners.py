"""Plant a token of its own into every place of a real DICOM file that can hold text, a date or a UID.

``plant.py`` makes studies that look like a hospital's; here the aim is the opposite: no place is left
out, however odd, so that a de-identifier can be scored place by place. The answer key says what was
planted where.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_ROOT = "1.2.826.0.1.3680043.10.1511"
_CONSONANTS, _VOWELS, _UMLAUTS = "bdfgklmnprstvz", "aeiou", "äöü"
_IDEOGRAPHS = "山田川島林森高橋鈴木佐藤伊渡辺中村小加吉井松清水斎藤原石前後岡長谷近坂遠青福西三浦"

CHARACTER_SETS: dict[str, list[str] | str] = {
    "latin": "ISO_IR 100",
    "utf-8": "ISO_IR 192",
    "japanese": ["", "ISO 2022 IR 87"],
}


class Kind(StrEnum):
    """Name what a planted token is."""

    TEXT = "text"
    DATE = "date"
    UID = "uid"


@dataclass(frozen=True, slots=True)
class Plant:
    """Say which token stands where, in words."""

    token: str
    kind: Kind
    place: str


@dataclass(slots=True)
class Planter:
    """Make up tokens: one for each place and scope, equal for equal seeds, none twice."""

    seed: str
    script: str = "utf-8"
    plants: dict[str, Plant] = field(default_factory=dict)
    _made: dict[tuple[str, str, Kind, str], str] = field(default_factory=dict)

    def _token(self, scope: str, place: str, kind: Kind, make: Callable[[random.Random], str], form: str = "") -> str:
        memory = (scope, place, kind, form)
        if memory not in self._made:
            draw = random.Random(f"{self.seed}/{scope}/{place}/{kind}/{form}")  # noqa: S311  # made-up, not secret
            token = make(draw)
            while token in self.plants:
                token = make(draw)
            self.plants[token] = Plant(token, kind, f"{place} ({form})" if form else place)
            self._made[memory] = token
        return self._made[memory]

    def word(self, scope: str, place: str) -> str:
        """Return eight letters that no language holds."""
        return self._token(scope, place, Kind.TEXT, lambda r: _syllables(r, _VOWELS).capitalize())

    def foreign(self, scope: str, place: str) -> str:
        """Return a word in the planter's script: with umlauts, or four ideographs."""
        if self.script == "japanese":
            return self._token(scope, place, Kind.TEXT, lambda r: "".join(r.choices(_IDEOGRAPHS, k=4)), "ideographs")
        return self._token(scope, place, Kind.TEXT, lambda r: _syllables(r, _UMLAUTS), "umlauts")

    def number(self, scope: str, place: str) -> str:
        """Return nine digits, the first not a zero: a decimal string, an integer string or an ID can hold them."""
        return self._token(scope, place, Kind.TEXT, lambda r: str(r.randrange(3 * 10**8, 10**9)), "number")

    def day(self, scope: str, place: str) -> str:
        """Return a date, YYYYMMDD, of the years 1931 to 2019."""
        first = date(1931, 1, 1)
        return self._token(
            scope, place, Kind.DATE, lambda r: (first + timedelta(days=r.randrange(365 * 88))).strftime("%Y%m%d")
        )

    def time(self, scope: str, place: str) -> str:
        """Return a time with six decimals."""

        def make(r: random.Random) -> str:
            return f"{r.randrange(1, 24):02d}{r.randrange(60):02d}{r.randrange(60):02d}.{r.randrange(10**5, 10**6)}"

        return self._token(scope, place, Kind.TEXT, make, "time")

    def uid(self, scope: str, place: str) -> str:
        """Return a UID under a root of its own."""
        return self._token(
            scope, place, Kind.UID, lambda r: f"{_ROOT}.{r.randrange(10**9, 10**10)}.{r.randrange(10**9, 10**10)}"
        )

    def value(self, scope: str, place: str, vr: str) -> Any:
        """Return a value of a type of element, tokens in it."""
        if vr == "PN":
            given = f"{self.word(scope, place)}^{self.word(scope, place + ', given name')}"
            return f"{given}={self.foreign(scope, place)}" if self.script == "japanese" else given
        if vr in ("LT", "ST", "UT", "UC"):
            day = self.day(scope, place)
            return f"{self.word(scope, place)} {self.foreign(scope, place)} on {day[:4]}-{day[4:6]}-{day[6:]}"
        if vr == "LO":
            return f"{self.word(scope, place)} {self.foreign(scope, place)}"
        if vr in ("OB", "UN", "OW"):
            content = f"{self.word(scope, place)} {self.number(scope, place)} {self.day(scope, place)} "
            return content.encode() + self.word(scope, place + ", in UTF-16").encode("utf-16-le") + b"\0\0"
        if vr == "UR":
            return f"https://{self.word(scope, place)}.example/studies"
        if vr == "DT":
            return f"{self.day(scope, place)}{self.time(scope, place)}+0100"
        simple: dict[str, Callable[[str, str], str]] = {
            "DA": self.day,
            "TM": self.time,
            "UI": self.uid,
            "DS": self.number,
            "IS": self.number,
            "SH": self.word,
        }
        make = simple.get(vr)
        return make(scope, place) if make else self.word(scope, place).upper()


def _syllables(draw: random.Random, vowels: str) -> str:
    return "".join(draw.choice(_CONSONANTS) + draw.choice(vowels) for _ in range(4))


def _keywords(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PATIENT = _keywords(
    """PatientName PatientID PatientBirthDate IssuerOfPatientID OtherPatientIDs OtherPatientNames PatientBirthName
    PatientMotherBirthName PatientBirthTime PatientAddress PatientTelephoneNumbers MilitaryRank BranchOfService
    CountryOfResidence RegionOfResidence Occupation EthnicGroup PatientReligiousPreference MedicalRecordLocator
    ResponsiblePerson ResponsibleOrganization InsurancePlanIdentification PatientSpeciesDescription
    PatientBreedDescription"""
)
_STUDY = _keywords(
    """StudyDate StudyTime AccessionNumber StudyID StudyDescription ReferringPhysicianName
    ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers PhysiciansOfRecord NameOfPhysiciansReadingStudy
    RequestingPhysician RequestingService AdmissionID AdmittingDate AdmittingTime AdmittingDiagnosesDescription
    CurrentPatientLocation PatientInstitutionResidence VisitComments StudyComments StudyIDIssuer ReasonForStudy
    RequestedProcedureDescription RequestedProcedureID ConfirmationCode IssueDateOfImagingServiceRequest
    PlacerOrderNumberImagingServiceRequest FillerOrderNumberImagingServiceRequest MedicalAlerts Allergies PatientState
    SpecialNeeds AdditionalPatientHistory PatientComments LastMenstrualDate ScheduledStudyStartDate StudyArrivalDate
    StudyVerifiedDate StudyReadDate DischargeDate PatientTransportArrangements NamesOfIntendedRecipientsOfResults
    OrderEnteredBy OrderEntererLocation OrderCallbackPhoneNumber ConfidentialityConstraintOnPatientDataDescription
    DistributionName InterpretationRecorder InterpretationText InterpretationApproverSequence ResultsComments
    Impressions ArbitraryText TextComments IdentifyingComments"""
)
_SERIES = _keywords(
    """SeriesDate SeriesTime AcquisitionDate AcquisitionTime ContentDate ContentTime AcquisitionDateTime
    InstanceCreationDate InstanceCreationTime TimezoneOffsetFromUTC SeriesDescription ProtocolName
    PerformingPhysicianName OperatorsName InstitutionName InstitutionAddress InstitutionalDepartmentName StationName
    DeviceSerialNumber GantryID DetectorID PlateID CassetteID DateOfLastCalibration TimeOfLastCalibration
    DateOfLastDetectorCalibration ImageComments FrameComments DerivationDescription AcquisitionComments
    AcquisitionProtocolDescription ContrastBolusAgent Manufacturer ManufacturerModelName SoftwareVersions
    BodyPartExamined PerformedProcedureStepID PerformedProcedureStepDescription PerformedProcedureStepStartDate
    PerformedStationName PerformedStationAETitle PerformedLocation CommentsOnThePerformedProcedureStep
    ScheduledStationAETitle RetrieveAETitle StationAETitle RetrieveURL TextString UnformattedTextValue TextValue
    PersonName SOPAuthorizationComment ContentCreatorName ContentLabel ContentDescription PatientWeight PatientSize
    WindowCenterWidthExplanation LUTExplanation RequestedSeriesDescription ApplicationName XRayTubeCurrentInuA
    DeviceUID SynchronizationFrameOfReferenceUID InstanceCreatorUID ConcatenationUID IrradiationEventUID
    StorageMediaFileSetUID StorageMediaFileSetID PositionReferenceIndicator DestinationAE ManufacturerDeviceIdentifier
    SourceManufacturer ReviewerName ReviewDate ReviewTime ModifyingSystem DateTimeOfLastCalibration"""
)
_CHAIN = (
    "RequestAttributesSequence",
    "RequestedProcedureCodeSequence",
    "ContentSequence",
    "ReferencedImageSequence",
    "PurposeOfReferenceCodeSequence",
)
_INSIDE = _keywords(
    "PatientName PatientID CodeMeaning StudyDate TextValue ReferencedSOPInstanceUID ScheduledProcedureStepID"
)
_PRIVATE = ("LO", "SH", "LT", "UT", "PN", "DA", "DT", "UI", "OB", "UN", "AE", "ST", "DS")


def dress(ds: Dataset, planter: Planter, scopes: tuple[str, str, str]) -> None:
    """Fill every place of a data set but for its UIDs, file meta and pixels.

    Args:
        ds: A real image; what it needs to be read as an image stays.
        planter: Where the tokens come from.
        scopes: The patient, the study and the series; equal scopes get equal tokens.
    """
    patient, study, series = scopes
    ds.remove_private_tags()
    ds.SpecificCharacterSet = CHARACTER_SETS[planter.script]
    for keywords, scope in ((_PATIENT, patient), (_STUDY, study), (_SERIES, series)):
        for keyword in keywords:
            _put(ds, keyword, planter, scope)
    ds.PatientAge = "093Y"
    kinds = list(ds.get("ImageType", None) or ["ORIGINAL", "PRIMARY"])
    ds.ImageType = [*kinds[:3], planter.value(series, "ImageType", "CS")]
    _nested(ds, planter, series)
    _private(ds, planter, series)
    _graphics(ds, planter, series)
    _odd_corners(ds, planter, series)


def _put(ds: Dataset, keyword: str, planter: Planter, scope: str, before: str = "") -> None:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    if tag is None:
        return  # the dictionary's edition does not know it
    vr = dictionary_VR(tag).split(" or ")[0]
    if vr in ("US", "FL", "FD", "SQ"):
        return
    ds.add_new(tag, vr, planter.value(scope, before + keyword, vr))


def _nested(ds: Dataset, planter: Planter, scope: str) -> None:
    """Build a chain of sequences, one inside the other, each item with text, a date and a UID."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    outer = ds
    for depth, keyword in enumerate(_CHAIN, start=1):
        item = Dataset()
        for inner in _INSIDE:
            _put(item, inner, planter, scope, f"depth {depth}: ")
        setattr(outer, keyword, Sequence([item]))
        outer = item
    source = Dataset()
    source.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    _put(source, "ReferencedSOPInstanceUID", planter, scope, "SourceImageSequence: ")
    ds.SourceImageSequence = Sequence([source])


def _private(ds: Dataset, planter: Planter, scope: str) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    for group in (0x0009, 0x0029, 0x7001):
        block = ds.private_block(group, f"MAKER {planter.word(scope, f'private creator {group:04X}')}", create=True)
        for k, vr in enumerate(_PRIVATE):
            block.add_new(k, vr, planter.value(scope, f"private {group:04X} {vr}", vr))
        hidden, deeper = Dataset(), Dataset()
        for item, depth in ((hidden, 1), (deeper, 2)):
            for keyword in _INSIDE:
                _put(item, keyword, planter, scope, f"private {group:04X} SQ, depth {depth}: ")
            own = item.private_block(group, "MAKER", create=True)
            own.add_new(1, "UN", planter.value(scope, f"private {group:04X} SQ, depth {depth}: UN", "UN"))
        hidden.ContentSequence = Sequence([deeper])
        block.add_new(0x40, "SQ", Sequence([hidden]))
    ds.add_new(0x00331001, "LO", planter.value(scope, "private without a creator", "LO"))


def _graphics(ds: Dataset, planter: Planter, scope: str) -> None:
    """Put text beside and into overlays, curves and a thumbnail."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    for group in (0x6000, 0x601E):
        base = group << 16
        place = f"overlay {group:04X}"
        for element, number in ((0x10, 64), (0x11, 64), (0x100, 1), (0x102, 0)):
            ds.add_new(base | element, "US", number)
        ds.add_new(base | 0x40, "CS", "G")
        ds.add_new(base | 0x50, "SS", [1, 1])
        ds.add_new(base | 0x22, "LO", planter.value(scope, f"{place} description", "LO"))
        ds.add_new(base | 0x1500, "LO", planter.value(scope, f"{place} label", "LO"))
        ds.add_new(base | 0x4000, "LT", planter.value(scope, f"{place} comments", "LT"))
        ds.add_new(base | 0x3000, "OW", planter.value(scope, f"{place} data", "OW").ljust(512, b"\0"))
    ds.add_new(0x50000020, "CS", planter.value(scope, "curve type", "CS"))
    ds.add_new(0x50000022, "LO", planter.value(scope, "curve description", "LO"))
    ds.add_new(0x50000030, "SH", planter.value(scope, "curve axis units", "SH"))
    ds.add_new(0x50003000, "OW", planter.value(scope, "curve data", "OW"))
    icon = Dataset()
    icon.Rows = icon.Columns = 16
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 8, 8, 7, 0
    icon.add_new(0x7FE00010, "OB", planter.value(scope, "thumbnail pixels", "OB").ljust(256, b"\0"))
    ds.IconImageSequence = Sequence([icon])


def _odd_corners(ds: Dataset, planter: Planter, scope: str) -> None:
    """Fill unknown, retired and binary elements."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    places = (
        (0x00189F02, "LO", "unknown even element"),
        (0x00109F04, "UN", "unknown even element, no type"),
        (0x00209F06, "UI", "unknown even element, UID"),
        (0x32049F02, "UT", "unknown even group"),
        (0x00080001, "UL", ""),
        (0x00280200, "US", ""),
        (0x00420010, "ST", "encapsulated document title"),
        (0x00420011, "OB", "encapsulated document"),
        (0x00420012, "LO", "encapsulated document type"),
        (0x54001010, "OW", "waveform data"),
        (0x00281199, "UI", "palette UID"),
        (0xFFFCFFFC, "OB", "trailing padding"),
    )
    for tag, vr, place in places:
        ds.add_new(tag, vr, planter.value(scope, place, vr) if place else 0)
    signature = Dataset()
    signature.DigitalSignatureUID = planter.uid(scope, "digital signature UID")
    signature.DigitalSignatureDateTime = planter.value(scope, "digital signature date", "DT")
    signature.add_new(0x04000115, "OB", planter.value(scope, "digital signature certificate", "OB"))
    ds.DigitalSignaturesSequence = Sequence([signature])


def save(ds: Dataset, path: Path, planter: Planter, scope: str) -> None:
    """Write an image uncompressed, with tokens in its preamble, its file meta and behind its pixels."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationVersionName = planter.word(scope, "file meta: implementation")
    meta.SourceApplicationEntityTitle = planter.value(scope, "file meta: source AE", "AE")
    meta.SendingApplicationEntityTitle = planter.value(scope, "file meta: sending AE", "AE")
    meta.PrivateInformationCreatorUID = UID(planter.uid(scope, "file meta: private information creator"))
    meta.PrivateInformation = planter.value(scope, "file meta: private information", "OB")
    ds.file_meta = meta
    preamble = f"{planter.word(scope, 'preamble')} {planter.day(scope, 'preamble')} {planter.number(scope, 'preamble')}"
    ds.preamble = preamble.encode().ljust(128, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
