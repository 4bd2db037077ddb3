"""The second pass: reads what was written, with its own lists, and trusts nothing that the first pass says."""

from __future__ import annotations

import gzip
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deid_tools.originals import Originals
from deid_tools.quiet import quiet_logs
from deid_tools.verify_options import METHODS, WRITTEN, codes_of, extra_tags, passes

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def _tags(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TOP = _tags(
    """00080005 00080008 00080016 00080018 00080020 00080021 00080022 00080023 0008002A 00080030 00080031 00080032
    00080033 00080050 00080060 00080070 00080090 00081090 00081115 00089205 00089206 00089207 00089208 00089209
    00100010 00100020 00100030 00100040 00120062 00120063 00120064 00180020 00180021 00180022 00180023 00180050
    00180060 00180080 00180081 00180082 00180086 00180087 00180088 00180091 00181000 00181020 00181120 00181181
    00181242 00181314 00185100 00189004 00189005 00189008 00189011 00189012 00189014 00189015 00189017 00189018
    00189024 00189025 00189029 00189032 00189033 00189034 00189064 00189073 00189087 00189093 00189094 00189100
    00189174 0020000D 0020000E 00200010 00200011 00200012 00200013 00200032 00200037 00200052 00200060 00200100
    00201040 00209221 00209222 00280002 00280004 00280008 00280010 00280011 00280030 00280051 00280100 00280101
    00280102 00280103 00280120 00280301 00280303 00281050 00281051 00281052 00281053 00281054 00282110 00400555
    00540016 00540081 00540410 00540414 00541000 00541001 00541002 00541006 00541102 00541300 00541330 00620001
    00620002 0062000E 00620010 00620013 00700080 00700081 00700084 20500020 52009229 52009230 7FE00010"""
)
_NESTED = _tags(
    """00080100 00080102 00080104 0008114A 00081150 00081155 00081160 00082112 00082218 00089007 00089124 00089205
    00089206 00089207 00089208 00089209 00089215 00180050 00180080 00180083 00180088 00180091 00180093 00180094
    00180095 00181250 00181251 00181312 00181314 00189006 00189009 00189010 00189016 00189020 00189021 00189022
    00189026 00189027 00189028 00189036 00189041 00189042 00189043 00189044 00189045 00189047 00189048 00189049
    00189050 00189051 00189058 00189069 00189074 00189075 00189077 00189078 00189079 00189081 00189082 00189087
    00189098 00189112 00189114 00189115 00189117 00189119 00189125 00189151 00189155 00189168 00189176 00189177
    00189178 00189179 00189180 00189181 00189182 00189183 00189220 00189226 00189231 00189232 00189239 00189240
    00189241 0020000E 00200032 00200037 00209056 00209057 00209071 00209072 00209111 00209113 00209116 00209128
    00209156 00209157 00209164 00209165 00209167 00280030 00281050 00281051 00281052 00281053 00281054 00289110
    00289132 00289145 0040A170 00620003 00620004 00620005 00620008 00620009 0062000A 0062000B 0062000F"""
)
_META = _tags("00020000 00020001 00020002 00020003 00020010 00020012 00020013")
_PSEUDONYM = re.compile(r"P-[A-Z2-7]{16}")
_TOKEN = re.compile(r"S-[A-Z2-7]{16}")
_FILE_NAME = re.compile(r"(seg-)?\d{4,12}\.dcm|labels(-\d+)?\.nii\.gz")
_UID = re.compile(r"2\.25\.\d{1,39}|1\.2\.840\.10008\.[0-9.]+")
_DUMMIES = ("", "19000101", "000000", "19000101000000")
_FIXED_TEXT = frozenset(("", "not stated", "SEGMENTATION", *METHODS, "ISO_IR 192", "HU", "US", "OD"))
_CODED = ("CodeMeaning", "CodeValue", "CodingSchemeDesignator", "SegmentLabel", "ImplementationVersionName")
_NET = (
    ("a date", re.compile(r"(?<!\d)(19|20)\d\d([-./]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")),
    ("a date", re.compile(r"(?<!\d)\d{1,2}[./-]\d{1,2}[./-](19|20)\d\d(?!\d)")),
    ("an e-mail address", re.compile(r"[\w.+-]+@[\w-]+\.\w+")),
    ("a telephone or record number", re.compile(r"\+?\d[\d ()/-]{5,}\d")),
)
_STACK = re.compile(r"\d{1,4}")
_SIGNED_OFF = ("PatientIdentityRemoved", "DeidentificationMethod", "LongitudinalTemporalInformationModified")
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
    "REMOVED",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what is wrong with one written file: its path below the folder, and why in words."""

    file: str
    reason: str


def check_file(path: Path, originals: Originals | None = None) -> list[str]:
    """Return what is wrong with one written file, in words; an empty list is a pass."""
    try:
        if path.name.endswith(".nii.gz"):
            return _check_nifti(path, originals)
        return _check_dicom(path, originals)
    except Exception:
        return ["the written file cannot be read back"]


def verify_folder(folder: Path) -> list[Finding]:
    """Check every file of an output folder on its own, with no original at hand.

    The tag lists, private tags, preamble, file meta, stamps, names, and a net of patterns for
    dates, telephone numbers and e-mail addresses in text values.
    """
    findings = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        if relative == Path("report.json"):
            continue
        if path.is_symlink() or not _known_place(relative):
            findings.append(Finding(_shown(relative), "a file that this program does not write"))
            continue
        with quiet_logs():
            findings += [Finding(relative.as_posix(), reason) for reason in check_file(path)]
    return findings


def _known_place(relative: Path) -> bool:
    parts = relative.parts
    return (
        len(parts) == 3
        and _PSEUDONYM.fullmatch(parts[0]) is not None
        and _TOKEN.fullmatch(parts[1]) is not None
        and _FILE_NAME.fullmatch(parts[2]) is not None
    )


def _shown(relative: Path) -> str:
    """Name a foreign file by its depth only: its own name may say too much."""
    return f"a file {len(relative.parts)} levels down"


def _check_dicom(path: Path, originals: Originals | None) -> list[str]:
    import pydicom

    raw = path.read_bytes()
    problems = [] if raw[:128] == b"\0" * 128 else ["the preamble is not empty"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        problems += _walk(ds.file_meta, _META)
        problems += _walk(ds, _TOP | extra_tags(ds), codes_of(ds))
        problems += _check_stamps(ds)
    tags = list(ds.keys())
    if not tags or tags[-1] != 0x7FE00010:
        return [*problems, "the pixels are not the last element"]
    pixels = bytes(ds.PixelData)
    if len(raw) < len(pixels) or raw[len(raw) - len(pixels) :] != pixels:
        return [*problems, "bytes follow the pixels"]
    bits = int(ds.get("NumberOfFrames", None) or 1) * int(ds.Rows) * int(ds.Columns) * int(ds.BitsAllocated)
    if len(pixels) != -(-bits // 16) * 2:
        problems.append("the pixels are longer or shorter than declared")
    if originals and originals.found_in(raw[: len(raw) - len(pixels)], pixels):
        problems.append("a string of the original is still there")
    return sorted(set(problems))


def _walk(ds: Dataset, allowed: frozenset[str], codes: frozenset[str] = frozenset()) -> Iterable[str]:
    for element in ds:
        if f"{int(element.tag):08X}" not in allowed:
            yield "an element that is not on the verifier's list"
        elif element.VR == "SQ":
            for item in element.value:
                yield from _walk(item, _NESTED, codes)
        elif element.VR in ("OB", "OW", "UN", "LT", "ST", "UT", "UC", "UR") and element.keyword not in (
            "PixelData",
            "FileMetaInformationVersion",
        ):
            yield "an element of a kind that can hold anything"
        else:
            for value in element.value if element.VM > 1 else [element.value]:
                text = "" if value is None else str(value)
                if not passes(element, text, codes):
                    yield from _check_value(element, text)


def _check_value(element: Any, text: str) -> Iterable[str]:
    vr, keyword = element.VR, element.keyword
    if vr == "UI" and text and keyword != "ImplementationClassUID" and not _UID.fullmatch(text):
        yield "a UID that is neither keyed nor the standard's"
    elif vr == "PN" or keyword == "PatientID":
        if text and not _PSEUDONYM.fullmatch(text):
            yield "a name or an ID that is not a pseudonym"
    elif vr == "AS" and text:
        yield "an age"
    elif vr in ("DA", "TM", "DT") and text not in _DUMMIES:
        yield "a date or a time"
    elif vr in ("LO", "SH") and keyword not in _CODED and text not in _FIXED_TEXT and not _STACK.fullmatch(text):
        yield "free text"
    if vr in ("LO", "SH", "CS", "PN") and keyword not in (
        "CodeValue",
        "DeidentificationMethod",
        "PatientID",
        "PatientName",
    ):
        yield from (f"{name} in a text value" for name, pattern in _NET if pattern.search(text))


def _check_stamps(ds: Dataset) -> Iterable[str]:
    if any(not ds.get(keyword) for keyword in _SIGNED_OFF) or "DeidentificationMethodCodeSequence" not in ds:
        yield "the stamps that say it was de-identified are missing"
    if ds.get("PatientIdentityRemoved") != "YES" or not _PSEUDONYM.fullmatch(str(ds.get("PatientID", ""))):
        yield "a name or an ID that is not a pseudonym"
    for segment in ds.get("SegmentSequence", None) or ():
        codes = segment.get("SegmentedPropertyTypeCodeSequence", None) or []
        if len(codes) != 1 or codes[0].CodeMeaning != str(segment.SegmentLabel)[:64]:
            yield "a segment's label is not its code's meaning"


def _check_nifti(path: Path, originals: Originals | None) -> list[str]:
    raw = path.read_bytes()
    problems = [] if raw[3] & 0b11100 == 0 and raw[4:8] == b"\0" * 4 else ["the gzip header holds a name or a time"]
    content = gzip.decompress(raw)
    header, voxels = content[:352], content[352:]
    if int.from_bytes(header[:4], "little") != 348 or int(_vox_offset(header)) != 352:
        problems.append("the NIfTI header is not one that this program writes")
    texts = header[4:39] + header[148:252] + header[328:344]
    if any(texts) or header[348:352] != b"\0" * 4:
        problems.append("the NIfTI header holds text or an extension")
    if originals and originals.found_in(header, voxels):
        problems.append("a string of the original is still there")
    return problems


def _vox_offset(header: bytes) -> float:
    import struct

    return struct.unpack("<f", header[108:112])[0]
