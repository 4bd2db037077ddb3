"""The second pass: reads what was written with its own reader and lists, and trusts nothing of the first pass."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from deid_tools.admit import MAX_FILE_BYTES, Refusal
from deid_tools.explicit import Element, WrittenFile, read_written
from deid_tools.originals import Originals
from deid_tools.verify_nifti import check_nifti
from deid_tools.verify_options import METHODS, WRITTEN, codes_of, extra_tags, passes, tags_of
from deid_tools.verify_report import check_report
from deid_tools.verify_values import BINARY, code_problems, meta_problems, number_problems, uid_problems


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOP = tags_of(
    """00080005 00080008 00080016 00080018 00080020 00080021 00080022 00080023 0008002A 00080030 00080031 00080032
    00080033 00080050 00080060 00080070 00080090 00081090 00081115 00089205 00089206 00089207 00089208 00089209
    00100010 00100020 00100030 00100040 00120062 00120063 00120064 00180020 00180021 00180022 00180023 00180050
    00180060 00180080 00180081 00180082 00180086 00180087 00180088 00180091 00181000 00181020 00181060 00181120
    00181181 00181242 00181314 00185100 00189004 00189005 00189008 00189011 00189012 00189014 00189015 00189017
    00189018 00189024 00189025 00189029 00189032 00189033 00189034 00189064 00189073 00189087 00189089 00189093
    00189094 00189100 00189174 0020000D 0020000E 00200010 00200011 00200012 00200013 00200032 00200037 00200052
    00200060 00200100 00201040 00209221 00209222 00280002 00280004 00280008 00280010 00280011 00280030 00280051
    00280100 00280101 00280102 00280103 00280120 00280301 00280302 00280303 00281050 00281051 00281052 00281053
    00281054 00282110 00400555 00540016 00540081 00540410 00540414 00541000 00541001 00541002 00541006 00541102
    00541300 00541330 00620001 00620002 0062000E 00620010 00620013 00700080 00700081 00700084 20500020 52009229
    52009230 7FE00010"""
)
_NESTED = tags_of(
    """00080100 00080102 00080104 0008114A 00081150 00081155 00081160 00082112 00082218 00089007 00089124 00089205
    00089206 00089207 00089208 00089209 00089215 00180050 00180080 00180083 00180088 00180091 00180093 00180094
    00180095 00181250 00181251 00181312 00181314 00189006 00189009 00189010 00189016 00189020 00189021 00189022
    00189026 00189027 00189028 00189036 00189041 00189042 00189043 00189044 00189045 00189047 00189048 00189049
    00189050 00189051 00189058 00189069 00189074 00189075 00189077 00189078 00189079 00189081 00189082 00189087
    00189098 00189112 00189114 00189115 00189117 00189119 00189125 00189151 00189155 00189168 00189176 00189177
    00189178 00189179 00189180 00189181 00189182 00189183 00189220 00189226 00189231 00189232 00189239 00189240
    00189241 00189329 00189751 0020000E 00200032 00200037 00209056 00209057 00209071 00209072 00209111 00209113
    00209116 00209128 00209156 00209157 00209164 00209165 00209167 00280030 00281050 00281051 00281052 00281053
    00281054 00289110 00289132 00289145 0040A170 00620003 00620004 00620005 00620008 00620009 0062000A 0062000B
    0062000F"""
)
_META = tags_of("00020000 00020001 00020002 00020003 00020010 00020012 00020013")
_CODE_STRINGS = _words(
    """CT MR PT SEG ISO_IR_192 ORIGINAL DERIVED PRIMARY SECONDARY AXIAL M M_FFE NONE NORM DIS2D DIS3D ADD VOLUME
    MIXED T1 T2 PROTON_DENSITY DIFFUSION FFE SE HFP HFS HFDR HFDL FFDR FFDL FFP FFS 2D 3D IR GR EP RM SK MTC SS TRSS
    SP MP OSP CNTS CM2 PCNT CPS BQML MGMINML UMOLMINML MLMING MLG 1CM UMOLML PROPCNTS GML STDDEV BSA BW LBM
    LBMJAMES128 LBMJANMA IBW START ADMIN DECY RADL ATTN SCAT DTIM MOTN PMOT CLN RAN DCAL MONOCHROME2 00 01 BINARY
    FRACTIONAL LABELMAP PROBABILITY OCCUPANCY YES NO UNDEFINED REMOVED MODIFIED UNMODIFIED EMISSION TRANSMISSION
    STATIC DYNAMIC IMAGE F O AUTOMATIC SEMIAUTOMATIC MANUAL SEGMENTATION P R I MAGNITUDE PHASE REAL IMAGINARY
    FIELD_MAP FIELDMAP B0 M_SE M_IR P_FFE P_SE R_FFE I_FFE WATER FAT W IP OP IN_PHASE OUT_PHASE ADC FA TRACEW T1_MAP
    T2_MAP T2_STAR_MAP R2_STAR_MAP 129XE 13C 19F 1H 23NA 31P 3HE 7LI ABDOMEN ABDOMENPELVIS ADDITION ALTERED ANKLE
    ARM B BARIUM BIPED BLADDER BODY BOTH BRAIN BREAST CARBON_DIOXIDE CC CENTRIC CHEST CHESTABDOMEN CHESTABDPELVIS
    COL COLOR COLUMN COSINE COSINE_SQUARED CSPINE CURVED_MPR CW CYLINDRICAL DB_DT DIRECTIONAL DISTORTED DLYD ELBOW
    ELECTRIC_FIELD ELLIPSOIDAL ELLIPTICAL EXTREMITY FAT_AND_WATER FDA FERMI FLOW_ENCODED FLUID_ATTENUATED FOOT
    FOREARM FREE_PRECESSION FREQUENCY FULL GADOLINIUM GATED GAUSSIAN GRADIENT HAMMING HAND HANNING HEAD HEADNECK
    HEART HIP HORIZONTAL HU HUMERUS IAC IDENTITY IEC IEC_FIRST_LEVEL IEC_HEAD IEC_LOCAL IEC_NORMAL IEC_PARTIAL_BODY
    IEC_SECOND_LEVEL IEC_WHOLE_BODY IODINE ISOTROPIC ISO_10918_1 ISO_13818_2 ISO_14495_1 ISO_14496_10 ISO_15444_1
    JAW KIDNEY KNEE L LEG LINEAR LINEAR_EXACT LINE_PARALLEL LIVER LONGITUDINAL LORENTZIAN LRNTZ_GSS_TRNSFM LSPINE
    LUNG MAX_IP MHW MIN_IP MONOCHROME MPR MULTICOIL N NECK NORMAL OD ORBIT OTHER PANCREAS PARALLEL PARTIAL PELVIS
    PERFUSION PER_NERVE_STIM PILS PLANE_PARALLEL PRODUCT PROSTATE QUADRUPED RADIAL RECTILINEAR REPROJECTION RESEARCH
    REVERSE_CENTRIC REVERSE_LINEAR RF RF_AND_GRADIENT RIESZ RING ROW SAMPLED SEGMENTED SELECTIVE SENSE SERVICE
    SHOULDER SIGMOID SILICON_GEL SING SINGLE SKULL SLAB SLICE SMASH SMS SPATIAL_SPECTRAL SPIN SPINE SPIRAL SPOILED
    SSPINE STATIC_FIELD STEADY_STATE STIR SURFACE SURFACE_RENDER T2_STAR TAGGING TEMPERATURE THIGH TIME_OF_FLIGHT
    TLSPINE TOF TRANSVERSE TRANSVERSE_LONGITUDINAL TSPINE TUKEY U UNALTERED UNKNOWN US USER_DEFINED VERTICAL
    VOLUME_RENDER WEDGE WHOLEBODY WHOLE_BODY WRIST XENON Y"""
)
_PSEUDONYM = re.compile(r"P-[A-Z2-7]{16}")
_TOKEN = re.compile(r"S-[A-Z2-7]{16}")
_FILE_NAME = re.compile(r"(seg-)?\d{4,12}\.dcm|labels(-\d+)?\.nii\.gz")
_NUMBER = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)? *")
_DUMMIES = ("", "19000101", "000000", "19000101000000")
_FIXED_TEXT = frozenset(("", "not stated", "SEGMENTATION", *METHODS, "ISO_IR 192", "HU", "US", "OD"))
_PATIENT_ID, _IMPLEMENTATION = 0x00100020, (0x00020012, 0x00020013)
_META_VERSION, _PIXELS = 0x00020001, 0x7FE00010
_CODED = tags_of("00080104 00080100 00080102 00620005")  # meanings and codes: the dictionary's or the schema's
_NOT_IN_THE_NET = tags_of("00080100 00120063 00100020 00100010")
_STAMPS = tags_of("00120062 00120063 00120064 00280303")
_NET = (
    ("a date", re.compile(r"(?<!\d)(19|20)\d\d([-./]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")),
    ("a date", re.compile(r"(?<!\d)\d{1,2}[./-]\d{1,2}[./-](19|20)?\d\d(?!\d)")),
    ("a date", re.compile(r"(?i)(?<!\d)\d{1,2}[ -](jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*[ -]\d{2,4}")),
    ("an e-mail address", re.compile(r"[\w.+-]+@[\w-]+\.\w+")),
    ("a telephone or record number", re.compile(r"\+?\d[\d ()/-]{5,}\d")),
    ("a telephone or record number", re.compile(r"(?i)\b(mrn|pat|id)[ :#-]*\d{3,}")),
)
_STACK = re.compile(r"\d{1,4}")
HARMLESS = (
    *WRITTEN,
    "Basic Application Confidentiality Profile",
    "SEGMENTATION",
    "not stated",
    "PYDICOM",
    "ISO_IR 192",
    "19000101",
    "000000",
    "Tissue",
    "85756007",
    "113100",
    "113101",
    "113102",
    "Clean Pixel Data Option",
    "Clean Recognizable Visual Features Option",
    "REMOVED",
)
_CANNOT_READ = "the written file cannot be read back"

Problem = tuple[str, str]
"""What is wrong in words, and where: a tag, or nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what is wrong with one written file: its path below the folder, why in words, and at which tag.

    The value that was found is never part of it.
    """

    file: str
    reason: str
    where: str = ""

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.file}: {self.reason}" + (f" {self.where}" if self.where else "")


def check_file(path: Path, originals: Originals | None = None) -> list[str]:
    """Return what is wrong with one written file, in words; an empty list is a pass."""
    return sorted({reason for reason, _ in problems_of(path, originals)})


def problems_of(path: Path, originals: Originals | None = None) -> list[Problem]:
    """Return what is wrong with one written file and at which tag; a file that cannot be read is a problem."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return [("the written file is larger than 4 GiB", "")]
        if path.name.endswith((".nii.gz", ".nii")):
            return [(reason, "") for reason in check_nifti(path, originals)]
        return sorted(set(_check_dicom(path.read_bytes(), originals)))
    except Refusal as refusal:
        return [(refusal.reason, "")]
    except Exception:
        return [(_CANNOT_READ, "")]


def verify_folder(folder: Path, *, whole_series: bool = False) -> list[Finding]:
    """Check every file of a folder on its own, with no original at hand.

    The tag lists, private tags, preamble, file meta, stamps, names, and a net of patterns for
    dates, telephone numbers and e-mail addresses in text values. A file of another kind, in
    another place or under another name than this program writes is a finding.

    Args:
        folder: Any folder; nothing in it is changed.
        whole_series: Also search each series for burned-in text, where tesseract is installed.
    """
    findings = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            if not _known_folder(relative) and not any(path.iterdir()):
                findings.append(Finding(_shown(relative), "an empty folder that this program does not make"))
            continue
        if relative == Path("report.json") and not path.is_symlink():
            findings += [Finding("report.json", reason) for reason in check_report(path, _NET)]
            continue
        known = _known_place(relative)
        name = relative.as_posix() if known else _shown(relative)
        if path.is_symlink() or not known:
            findings.append(Finding(name, "a file that this program does not write"))
        if path.is_file() and not path.is_symlink() and (known or path.name.endswith((".dcm", ".nii", ".nii.gz"))):
            findings += [Finding(name, reason, where) for reason, where in problems_of(path)]
    return findings + (list(_check_series(folder)) if whole_series else [])


def count_files(folder: Path) -> int:
    """Return how many files ``verify_folder`` looks at: everything below the folder that is no folder."""
    return sum(path.is_symlink() or not path.is_dir() for path in folder.rglob("*"))


def _check_series(folder: Path) -> Iterator[Finding]:
    from deid_tools.verify_series import check_text, series_folders

    for series in series_folders(folder):
        for reason in check_text(series):
            yield Finding(_series_name(series, folder), reason)


def conformance(folder: Path) -> list[Finding]:
    """Ask dciodvfy about the first file of each series: errors of form, as originals often have; no leaks."""
    from deid_tools.verify_series import check_conformance, series_folders

    return [
        Finding(_series_name(series, folder), reason)
        for series in series_folders(folder)
        for reason in check_conformance(min(series.glob("*.dcm")))
    ]


def _series_name(series: Path, folder: Path) -> str:
    relative = series.relative_to(folder)
    return relative.as_posix() if _known_place(relative / "0001.dcm") else _shown(relative)


def _known_place(relative: Path) -> bool:
    parts = relative.parts
    return (
        len(parts) == 3
        and _PSEUDONYM.fullmatch(parts[0]) is not None
        and _TOKEN.fullmatch(parts[1]) is not None
        and _FILE_NAME.fullmatch(parts[2]) is not None
    )


def _known_folder(relative: Path) -> bool:
    return all(pattern.fullmatch(part) for pattern, part in zip((_PSEUDONYM, _TOKEN), relative.parts, strict=False))


def _shown(relative: Path) -> str:
    """Name a foreign file by its depth only: its own name may say too much."""
    return f"a file {len(relative.parts)} levels down"


def _check_dicom(raw: bytes, originals: Originals | None) -> Iterator[Problem]:
    written = read_written(raw)
    if any(written.preamble):
        yield "the preamble is not empty", ""
    codes = codes_of(written)
    yield from _walk(written.meta, _META, frozenset())
    yield from _walk(written.body, _TOP | extra_tags(written, codes), codes)
    yield from _check_stamps(written)
    if not written.body or written.body[-1].tag != _PIXELS:
        yield "the pixels are not the last element", ""
        return
    pixels = written.body[-1].value
    frames, allocated = written.find(0x00280008), written.find(0x00280100)
    rows, columns = written.find(0x00280010), written.find(0x00280011)
    if allocated is None or rows is None or columns is None:
        yield "the pixels have no grid", ""
        return
    bits = int(frames.text() or 1) if frames else 1
    for side in (rows, columns, allocated):
        bits *= struct.unpack("<H", side.value)[0]
    if len(pixels) != -(-bits // 16) * 2:
        yield "the pixels are longer or shorter than declared", ""
    yield from _check_upper_bits(written, pixels)
    if originals and originals.found_in(raw[: len(raw) - len(pixels)], pixels):
        yield "a string of the original is still there", ""


def _check_upper_bits(written: WrittenFile, pixels: memoryview) -> Iterator[Problem]:
    """Find bits above the stored ones: an overlay or a text may lie there."""
    numbers = [written.find(tag) for tag in (0x00280100, 0x00280101, 0x00280102, 0x00280103)]
    if any(n is None or len(n.value) != 2 for n in numbers):
        yield "the pixels do not say how they are stored", ""
        return
    allocated, stored, high, signed = (struct.unpack("<H", n.value)[0] for n in numbers if n is not None)
    if not 0 < stored <= allocated or high != stored - 1 or signed > 1:
        yield "the pixels are stored in an impossible way", ""
    elif stored < allocated and allocated in (8, 16) and not len(pixels) % (allocated // 8):
        values = np.frombuffer(pixels, f"<{'i' if signed else 'u'}{allocated // 8}")
        least, most = (-1 << stored - 1, (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)
        if len(values) and (values.min() < least or values.max() > most):
            yield "bits above the stored ones are in use", ""


@cache
def _representations(tag: int) -> tuple[str, ...]:
    from pydicom.datadict import dictionary_VR

    return tuple(dictionary_VR(tag).split(" or "))


def _walk(elements: tuple[Element, ...], allowed: frozenset[int], codes: frozenset[str]) -> Iterator[Problem]:
    for element in elements:
        where = f"({element.tag >> 16:04X},{element.tag & 0xFFFF:04X})"
        if element.tag not in allowed:
            yield "an element that is not on the verifier's list", where
        elif not element.tag.is_private and element.VR not in _representations(element.tag):
            yield "an element is not of the type that the standard gives it", where
        elif element.VR == "SQ":
            for item in element.items:
                yield from ((reason, where) for reason in code_problems(item, element.tag))
                yield from _walk(item, _NESTED, codes)
        else:
            yield from ((reason, where) for reason in _check_element(element, codes))


def _check_element(element: Element, codes: frozenset[str]) -> Iterator[str]:
    vr, tag = element.VR, element.tag
    if vr in BINARY:
        yield from number_problems(element)
    elif vr in ("OB", "OW", "UN", "LT", "ST", "UT", "UC", "UR"):
        if tag != _PIXELS and not (tag == _META_VERSION and element.value == b"\0\1"):
            yield "an element of a kind that can hold anything"
    elif tag in _IMPLEMENTATION:
        yield from meta_problems(tag, element.text())
    else:
        if vr in ("DS", "IS"):
            yield from number_problems(element)
        for text in (part.strip(" ") for part in element.text().split("\\")):
            if not passes(element, text, codes):
                yield from _check_value(tag, vr, text)


def _check_value(tag: int, vr: str, text: str) -> Iterator[str]:
    if vr == "UI":
        if text:
            yield from uid_problems(text)
    elif vr == "PN" or tag == _PATIENT_ID:
        if text and not _PSEUDONYM.fullmatch(text):
            yield "a name or an ID that is not a pseudonym"
    elif vr == "AS":
        if text:
            yield "an age"
    elif vr in ("DA", "TM", "DT"):
        if text not in _DUMMIES:
            yield "a date or a time"
    elif vr in ("DS", "IS"):
        if text and not _NUMBER.fullmatch(text):
            yield "a number that is none"
    elif vr == "CS":
        if text and text.replace(" ", "_") not in _CODE_STRINGS:
            yield "a code string that is not on the verifier's list"
    elif vr not in ("LO", "SH"):
        yield "an element of a kind that can hold anything"
    elif tag not in _CODED and text not in _FIXED_TEXT and not _STACK.fullmatch(text):
        yield "free text"
    if vr in ("LO", "SH", "CS", "PN") and tag not in _NOT_IN_THE_NET:
        yield from (f"{name} in a text value" for name, pattern in _NET if pattern.search(text))


def _check_stamps(written: WrittenFile) -> Iterator[Problem]:
    top: dict[int, Element] = {element.tag: element for element in written.body}
    meta: dict[int, Element] = {element.tag: element for element in written.meta}
    if any(tag not in top or not len(top[tag].value) for tag in _STAMPS) or top[0x00120062].text() != "YES":
        yield "the stamps that say it was de-identified are missing", ""
    if _PATIENT_ID not in top or not _PSEUDONYM.fullmatch(top[_PATIENT_ID].text()):
        yield "a name or an ID that is not a pseudonym", "(0010,0020)"
    for inner, outer in ((0x00080016, 0x00020002), (0x00080018, 0x00020003)):
        if inner not in top or outer not in meta or top[inner].text() != meta[outer].text():
            yield "the file's outer and inner identification differ", ""
    for segment in top[0x00620002].items if 0x00620002 in top else ():
        labels = [e.text() for e in segment if e.tag == 0x00620005]
        codes = [item for e in segment if e.tag == 0x0062000F for item in e.items]
        meanings = [e.text() for item in codes for e in item if e.tag == 0x00080104]
        if len(codes) != 1 or meanings != [label[:64] for label in labels]:
            yield "a segment's label is not its code's meaning", ""
