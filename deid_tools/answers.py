"""Write planted series from real ones, and remember what each image was: the answer key that a score is made with."""

from __future__ import annotations

import gzip
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deid_tools.corners import Kind, Plant, Planter, dress, save

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

RETAINED = (
    "SOPClassUID",
    "Modality",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "SpacingBetweenSlices",
    "RescaleSlope",
    "RescaleIntercept",
    "NumberOfFrames",
    "KVP",
    "EchoTime",
    "RepetitionTime",
    "FlipAngle",
    "PatientPosition",
)
"""What a volume is built from: these must come through as they are."""

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels; bottom and right are outside."""


@dataclass(frozen=True, slots=True)
class Source:
    """Describe one planted image: whose it is, its UIDs, its pixels' digest, and what must come through.

    ``box`` is where text was drawn, and then the digest is of what stands there. ``near`` is where a
    program may blank an image because another one of its series has text there; the digest is of the rest.
    """

    name: str
    patient: str
    study: str
    series: str
    sop: str
    frame_of_reference: str
    patient_id: str
    study_date: str
    pixels: str
    retained: dict[str, str]
    box: Box | None = None
    near: Box | None = None


@dataclass(slots=True)
class AnswerKey:
    """Hold every planted token and every planted image."""

    plants: list[Plant] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def add(self, planter: Planter) -> None:
        """Take over a planter's tokens."""
        known = {plant.token for plant in self.plants}
        self.plants += [plant for plant in planter.plants.values() if plant.token not in known]


def digest(pixels: NDArray[Any]) -> str:
    """Return the SHA-256 of pixel values, whatever type they are stored as."""
    return hashlib.sha256(np.ascontiguousarray(pixels.astype("<i8")).tobytes()).hexdigest()


def plant_series(
    files: Sequence[Path],
    folder: Path,
    key: AnswerKey,
    *,
    patient: str,
    study: str,
    series: str,
    script: str = "utf-8",
    burned_in: bool = False,
) -> None:
    """Write a planted copy of a real series under ``folder`` and add it to the key.

    Args:
        files: The real series' files, each an image that can be decoded.
        folder: Where to; the tokens are in the names of a new folder and of the files too.
        key: The answer key to add to.
        patient: The patient's name in the key; equal names share tokens and identifiers.
        study: The study's name.
        series: The series' name.
        script: Which character set: latin, utf-8 or japanese.
        burned_in: Draw a name and a date into the middle image's pixels.
    """
    planter = Planter("corners", script)
    scopes = (patient, f"{patient}/{study}", f"{patient}/{study}/{series}")
    name = f"{planter.word(scopes[2], 'folder name')} {planter.day(scopes[2], 'folder name')}"
    for k, path in enumerate(files):
        ds = _read(path)
        pixels = _numbered(ds.pixel_array, len(key.sources))
        box = near = None
        if burned_in:
            drawn, place = _burn(pixels, planter, scopes[2])
            near = (max(0, place[0] - 24), place[1] + 24, max(0, place[2] - 64), place[3] + 64)
            if k == len(files) // 2:
                pixels, box, near = drawn, place, None
        dress(ds, planter, scopes)
        ds.StudyInstanceUID = planter.uid(scopes[1], "StudyInstanceUID")
        ds.SeriesInstanceUID = planter.uid(scopes[2], "SeriesInstanceUID")
        ds.FrameOfReferenceUID = planter.uid(scopes[1], "FrameOfReferenceUID")
        ds.SOPInstanceUID = planter.uid(f"{scopes[2]}/{k}", "SOPInstanceUID")
        ds.PixelData = pixels.tobytes() + planter.value(scopes[2], "behind the pixels", "OB")
        target = folder / name / f"{planter.word(scopes[2], 'file name')}_{k + 1:04d}.dcm"
        save(ds, target, planter, scopes[2])
        key.sources.append(_source(ds, pixels, f"{patient}, {study}, {series}, image {k + 1}", scopes, box, near))
    key.add(planter)


def _read(path: Path) -> Dataset:
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        if ds.file_meta.TransferSyntaxUID.is_compressed:
            ds.decompress()
    return ds


def _numbered(pixels: NDArray[Any], number: int) -> NDArray[Any]:
    """Write a number into the low bits of four corner pixels, so that no two planted images are equal."""
    pixels = pixels.copy()
    for k in range(4):
        pixels.flat[k] = int(pixels.flat[k]) // 16 * 16 + (number >> 4 * k & 15)
    return pixels


def outside(pixels: NDArray[Any], near: Box | None) -> NDArray[Any]:
    """Return an image with nothing in a box."""
    if near is None:
        return pixels
    pixels = pixels.copy()
    pixels[..., near[0] : near[1], near[2] : near[3]] = 0
    return pixels


def _source(
    ds: Dataset,
    pixels: NDArray[Any],
    name: str,
    scopes: tuple[str, str, str],
    box: Box | None,
    near: Box | None,
) -> Source:
    kept = {k: str(ds[k].value) for k in RETAINED if k in ds and ds[k].value not in (None, "")}
    return Source(
        name,
        scopes[0],
        ds.StudyInstanceUID,
        ds.SeriesInstanceUID,
        ds.SOPInstanceUID,
        ds.FrameOfReferenceUID,
        ds.PatientID,
        ds.StudyDate,
        digest(outside(pixels, near) if box is None else pixels[box[0] : box[1], box[2] : box[3]]),
        kept,
        box,
        near,
    )


def _burn(pixels: NDArray[Any], planter: Planter, scope: str) -> tuple[NDArray[Any], Box]:
    """Draw a name and a date into a corner, as scanners do."""
    from PIL import Image, ImageDraw, ImageFont

    day = planter.day(scope, "burned into the pixels")
    text = f"{planter.word(scope, 'burned into the pixels').upper()} ANNA {day[:4]}-{day[4:6]}-{day[6:]}"
    height, width = pixels.shape[-2:]
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(10, width // 28))
    draw.text((6, 6), text, fill=255, font=font)
    drawn = np.asarray(picture) > 100
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    burned = pixels.copy()
    burned[..., drawn] = pixels.max()
    return burned, (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)


def plant_label_map(files: Sequence[Path], folder: Path, key: AnswerKey, *, patient: str, study: str) -> Path:
    """Write a NIfTI label map with tokens in its header, its extension, its gzip name and its file name.

    Args:
        files: The planted series that it belongs to; the map has one label in its middle.
        folder: The folder that the planted series lies in.
        key: The answer key to add to.
        patient: As for ``plant_series``.
        study: As for ``plant_series``.
    """
    import nibabel as nib
    from nibabel.nifti1 import Nifti1Extension

    from deid_tools.series import plan_series

    planter = Planter("corners/nifti")
    scope = f"{patient}/{study}/labels"
    grid = plan_series([_read(path) for path in files]).canonical
    labels = np.zeros(grid.shape, np.uint8)
    labels[tuple(slice(n // 3, 2 * n // 3 + 1) for n in grid.shape)] = 1
    image = nib.Nifti1Image(labels, grid.affine)
    for name, size in (("descrip", 80), ("aux_file", 24), ("intent_name", 16), ("db_name", 18)):
        image.header[name] = f"{planter.word(scope, f'NIfTI {name}')}"[:size].encode()
    comment = f"{planter.word(scope, 'NIfTI extension')} {planter.day(scope, 'NIfTI extension')}"
    image.header.extensions.append(Nifti1Extension("comment", comment.encode()))
    content = image.to_bytes()
    path = folder / f"{planter.word(scope, 'NIfTI file name')}.nii.gz"
    with path.open("wb") as raw, gzip.GzipFile(planter.word(scope, "gzip name"), "wb", fileobj=raw) as stream:
        stream.write(content)
    key.add(planter)
    return path


__all__ = ["AnswerKey", "Kind", "Source", "digest", "plant_label_map", "plant_series"]
