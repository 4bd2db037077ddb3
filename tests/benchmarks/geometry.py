"""Compare the geometry planner with dcm2niix, series by series, and write the table of docs/deid-geometry.md.

    python tests/benchmarks/geometry.py DATA [--write docs/deid-geometry.md] [--json] [--only WORDS]

DATA holds the real DICOM series (its folder ``dicom``). Each row is "equal" (every volume of ours is
one of dcm2niix's: affine within 0.01 mm at every corner, voxels equal), "refused", or "DIFFERS".
The exit status is 1 where a row is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from deid_tools.series import Built, build_scans
from medlsdm.errors import DataError
from medlsdm.types import Geometry
from medlsdm.volumes import resample, to_ras

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
BY_AFFINE = "equal to scipy's affine resampler; dcm2niix misplaces it by 43 mm"
CT = "1.2.840.10008.5.1.4.1.1.2"
Volume = tuple[np.ndarray, Geometry]


@dataclass(frozen=True)
class Case:
    """One series: how to put it into a folder, and what must come of it."""

    name: str
    build: Callable[[Path], list[Dataset] | Path]
    expect: str = "equal"
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    series: str
    ours: str
    dcm2niix: str
    verdict: str
    good: bool


def clean_cases() -> Iterator[Case]:
    """Yield the real series as they are."""
    for name in (
        "ct-philips-phantom",
        "ct-liver-seg/ct-3slice",
        "ct-rtstruct",
        "mr-siemens-brain",
        "mr-siemens-prone",
        "mr-hippocampus-crops/study2",
        "mr-hippocampus-crops/study3",
        "mr-enhanced/Siemens/XA10",
        "mr-enhanced/Philips",
    ):
        yield Case(f"{name}, as found", lambda data, name=name: data / name)
    yield Case("ct-organs, JPEG 2000 (SOP class put back)", organs)
    yield Case("ct-ge-gantry-tilt, as found: the slices of 4 mm", lambda data: gantry(data, 4), tolerance=0.51)
    yield Case("ct-ge-gantry-tilt, as found: the slices of 7 mm", lambda data: gantry(data, 7), tolerance=0.51)


def read(folder: Path) -> list[Dataset]:
    """Read the images of a folder."""
    found = [pydicom.dcmread(path) for path in sorted(folder.iterdir()) if path.is_file()]
    return [ds for ds in found if "PixelData" in ds]


def organs(data: Path) -> list[Dataset]:
    """Return the JPEG 2000 series, which came without a SOP class, as CT."""
    found = read(data / "ct-organs" / "dicom")
    for ds in found:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT
    return found


def gantry(data: Path, thickness: float) -> list[Dataset]:
    """Return one of the two runs of the tilted series; the whole is two scans, which ours tells apart."""
    return [ds for ds in read(data / "ct-ge-gantry-tilt") if float(ds.SliceThickness) == thickness]


def crop(folder: Path, slices: int, size: int = 96) -> list[Dataset]:
    """Return neighbouring slices of a real series, cut to a square, in order of position."""
    found = read(folder)
    normal = np.cross(found[0].ImageOrientationPatient[:3], found[0].ImageOrientationPatient[3:])
    found.sort(key=lambda ds: float(np.dot(ds.ImagePositionPatient, normal)))
    found = found[:slices]
    for ds in found:
        r, c = (int(ds.Rows) - size) // 2, (int(ds.Columns) - size) // 2
        pixels = ds.pixel_array[r : r + size, c : c + size]
        row, column = np.array(ds.ImageOrientationPatient[:3]), np.array(ds.ImageOrientationPatient[3:])
        moved = ds.ImagePositionPatient + row * c * ds.PixelSpacing[1] + column * r * ds.PixelSpacing[0]
        ds.ImagePositionPatient = [round(float(v), 6) for v in moved]
        ds.Rows = ds.Columns = size
        ds.PixelData = np.ascontiguousarray(pixels).tobytes()
    return found


def ct(data: Path) -> list[Dataset]:
    """Return ten cropped slices of the real CT."""
    return crop(data / "ct-philips-phantom", 10)


def mr(data: Path) -> list[Dataset]:
    """Return eight cropped slices of the real MR."""
    return crop(data / "mr-siemens-brain", 8)


def again(found: list[Dataset], **changes: Any) -> list[Dataset]:
    """Return copies of slices as new instances, values one and a half times as large, with changed attributes."""
    import copy

    copies = copy.deepcopy(found)
    for n, ds in enumerate(copies):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.InstanceNumber = 100 + n
        ds.PixelData = (ds.pixel_array * 3 // 2).astype(ds.pixel_array.dtype).tobytes()
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
    return copies


def compressed_cases() -> Iterator[Case]:
    """Yield the real CT in each lossless compression."""

    def by_pydicom(data: Path, syntax: str) -> list[Dataset]:
        found = ct(data)
        for ds in found:
            ds.compress(syntax, generate_instance_uid=False)
        return found

    for name, syntax in (("RLE", RLELossless), ("JPEG-LS", JPEGLSLossless), ("JPEG 2000", JPEG2000Lossless)):
        yield Case(f"CT, {name}", lambda data, syntax=syntax: by_pydicom(data, syntax))

    def by_gdcm(data: Path) -> list[Dataset]:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for n, ds in enumerate(ct(data)):
                plain, packed = Path(folder) / f"{n}.dcm", Path(folder) / f"{n}.jpg.dcm"
                ds.save_as(plain)
                program = Path(sysconfig.get_path("scripts")) / "gdcmconv"
                subprocess.run([program, "--jpeg", plain, packed], check=True, capture_output=True)
                found.append(pydicom.dcmread(packed))
        return found

    yield Case("CT, lossless JPEG", by_gdcm)


def value_cases() -> Iterator[Case]:
    """Yield real slices whose values are stored in other ways."""

    def rescaled(data: Path) -> list[Dataset]:
        found = ct(data)
        for n, ds in enumerate(found):
            ds.RescaleSlope, ds.RescaleIntercept = 1 + 0.25 * n, -1024 + n
        return found

    def signed(data: Path) -> list[Dataset]:
        found = ct(data)
        for ds in found:
            values = ds.pixel_array.astype(np.int16) - 1024
            ds.PixelData = (values.view(np.uint16) & 0x0FFF).tobytes()
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 12, 11, 1, 0
        return found

    def oblique(data: Path) -> list[Dataset]:
        found = ct(data)
        for n, ds in enumerate(found):
            ds.ImageOrientationPatient = [1, 0, 5e-8 * (n % 2), 0, 1, 0]
        return found

    yield Case("CT, a rescale of its own in each slice", rescaled, tolerance=1e-2)
    yield Case("CT, signed values in 12 of 16 bits", signed)
    yield Case("CT, orientation differing by 5e-8", oblique)


def several_cases() -> Iterator[Case]:
    """Yield real slices that make several volumes, interleaved in one series."""

    def shuffled(found: list[Dataset]) -> list[Dataset]:
        return found[::2] + found[1::2]

    def echoes(data: Path) -> list[Dataset]:
        found = mr(data)
        return shuffled(found + again(found, EchoTime="30.0", EchoNumbers=2))

    def points(data: Path) -> list[Dataset]:
        found = mr(data)
        for ds in found:
            ds.TemporalPositionIdentifier, ds.AcquisitionNumber = 1, 1
        return shuffled(found + again(found, TemporalPositionIdentifier=2, AcquisitionNumber=2))

    def phases(data: Path) -> list[Dataset]:
        found = mr(data)
        for ds in found:
            ds.TriggerTime = 0
        return shuffled(found + again(found, TriggerTime=120))

    yield Case("MR, two echoes interleaved", echoes)
    yield Case("MR, two time points interleaved", points)
    yield Case("MR, two cardiac phases interleaved", phases)


def tilted(data: Path, degrees: float) -> list[Dataset]:
    """Return the real CT as a gantry of this tilt would place it: slices turned, table moving along z."""
    found = ct(data)
    c, s = float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))
    x, y, z = (float(v) for v in found[0].ImagePositionPatient)
    for n, ds in enumerate(found):
        ds.ImageOrientationPatient = [1, 0, 0, 0, c, s]
        ds.ImagePositionPatient = [x, y, z + 5 * n]
        ds.GantryDetectorTilt = -degrees  # the sign that GE's header gives to this direction
    return found


def damage_cases() -> Iterator[Case]:
    """Yield real slices that were damaged: each must come out right, or be refused."""

    def missing(data: Path) -> list[Dataset]:
        found = ct(data)
        return found[:4] + found[5:]

    def doubled(data: Path) -> list[Dataset]:
        found = ct(data)
        (twin,) = again([found[4]])
        twin.PixelData = found[4].PixelData
        return [*found, twin]

    def turned(data: Path, replace: bool) -> list[Dataset]:
        found = ct(data)
        (other,) = again([found[4]], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
        return [*found[:4], other, *found[5 if replace else 4 :]]

    def half(data: Path) -> list[Dataset]:
        found = mr(data)
        second = again(found, EchoTime="30.0", EchoNumbers=2)
        return found + second[:3] + second[4:]

    def uneven(data: Path) -> list[Dataset]:
        found = ct(data)
        for ds in found[5:]:
            x, y, z = ds.ImagePositionPatient
            ds.ImagePositionPatient = [x, y, float(z) + 1.3]
        return found

    yield Case("CT, gantry tilt of 16.5 degrees", lambda data: tilted(data, 16.5), BY_AFFINE, 0.51)
    yield Case("CT, gantry tilt of -16.5 degrees", lambda data: tilted(data, -16.5), tolerance=0.51)
    yield Case("CT, one slice missing", missing, "refused")
    yield Case("CT, one slice twice, equal", doubled, "undamaged")
    yield Case("CT, one slice twice, differing", lambda data: (f := ct(data)) + again([f[4]]), "refused")
    yield Case("CT, one slice more, turned", lambda data: turned(data, False), "undamaged, rest refused")
    yield Case("CT, one slice turned", lambda data: turned(data, True), "refused")
    yield Case("CT, uneven spacing", uneven, "refused")
    yield Case("MR, two echoes, the second lacks a slice", half, "equal, rest refused")


def ours(folder: Path) -> tuple[list[Built], list[str]]:
    """Return what the planner builds of a folder, and what it refuses."""
    try:
        built = list(build_scans(sorted(folder.iterdir()), "P"))
    except DataError as error:
        return [], [str(error)]
    return [b for b in built if b.scan], [b.refusal for b in built if not b.scan]


def theirs(source: Path, out: Path) -> list[Volume]:
    """Return every 3D volume that dcm2niix makes of a folder."""
    program = Path(sysconfig.get_path("scripts")) / "dcm2niix"
    command = [program, "-b", "n", "-z", "n", "-p", "n", "-f", "v", "-o", out, source]
    subprocess.run([str(c) for c in command], capture_output=True, check=False)
    found = []
    for path in sorted(out.glob("*.nii")):
        image = nib.Nifti1Image.from_filename(path)
        values = np.asarray(image.get_fdata(dtype=np.float32))
        for one in np.moveaxis(values.reshape(*values.shape[:3], -1), 3, 0):
            found.append(to_ras(one, Geometry(np.asarray(image.affine, np.float64), one.shape)))
    return found


def by_affine(files: list[Dataset], grid: Geometry) -> Volume:
    """Return a series, in order of position, on another grid: values and place straight from the headers."""
    first, last = files[0], files[-1]
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.ImageOrientationPatient[:3]) * first.PixelSpacing[1]
    affine[:3, 1] = np.array(first.ImageOrientationPatient[3:]) * first.PixelSpacing[0]
    affine[:3, 2] = (np.array(last.ImagePositionPatient) - first.ImagePositionPatient) / (len(files) - 1)
    affine[:3, 3] = first.ImagePositionPatient
    stack = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in files])
    source = Geometry(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, stack.T.shape)
    return resample(stack.T.astype(np.float32), source, grid, order=1, fill=float(stack.min())), grid


def apart(mine: Volume, other: Volume, tolerance: float, tilted: bool) -> str:
    """Return how two volumes differ, in words, or an empty string."""
    if mine[0].shape != other[0].shape:
        return f"shape {other[0].shape}"
    if not mine[1].matches(other[1], 0.01):
        return f"affine by {np.abs(mine[1].affine - other[1].affine).max():.3g}"
    differ = np.abs(mine[0] - other[0]) > tolerance
    if tilted:  # dcm2niix repeats a slice's last row half a pixel outwards; ours extrapolates nothing
        differ &= (mine[0] != mine[0].min()) & (other[0] != other[0].min())
    return f"{differ.mean():.2%} of the voxels" if differ.any() else ""


def compare(case: Case, data: Path) -> Row:
    """Run one case through both."""
    with tempfile.TemporaryDirectory() as name:
        folder, out, plain = (Path(name) / part for part in ("in", "out", "plain"))
        for path in (folder, out, plain):
            path.mkdir()
        source = case.build(data)
        files = read(source) if isinstance(source, Path) else source
        for n, ds in enumerate(files):
            ds.save_as(folder / f"{n:04d}.dcm")
        built, refused = ours(folder)
        others = theirs(folder, out)
        reference = others
        if case.expect.startswith("undamaged"):
            for n, ds in enumerate(ct(data)):
                ds.save_as(plain / f"{n:04d}.dcm")
            reference = theirs(plain, out / "..")
        if case.expect == BY_AFFINE:
            reference = [by_affine(files, b.scan.geometry) for b in built if b.scan]
    problems, taken = [], set()
    if case.expect == "equal" and case.tolerance < 0.5 and len(built) != len(reference):
        problems.append(f"{len(built)} volumes, where dcm2niix makes {len(reference)}")
    for b in built:
        assert b.scan
        tilt = any("tilt" in note for note in b.notes)
        found = [apart((b.scan.array, b.scan.geometry), v, case.tolerance, tilt) for v in reference]
        match = next((n for n, differ in enumerate(found) if not differ and n not in taken), None)
        taken.add(match)
        if match is None:
            problems.append("; ".join(found) or "dcm2niix makes nothing")
    return _row(case, built, refused, others, problems)


def _row(case: Case, built: list[Built], refused: list[str], others: list[Volume], problems: list[str]) -> Row:
    want = (not case.expect.startswith("refused"), "refused" in case.expect)
    good = not problems and (bool(built), bool(refused)) == want
    said = [_shape(b.scan.array) + _marks(b) for b in built if b.scan]
    said += [f"refused: {text.split(' Export ')[0].rsplit('): ', 1)[-1]}" for text in refused]
    verdict = f"DIFFERS: {'; '.join(problems)}" if problems else case.expect if good else "NOT AS EXPECTED"
    if verdict == "equal" and case.tolerance > 0.5:
        verdict = "equal, rounding apart"
    return Row(case.name, ", ".join(said), ", ".join(_shape(v[0]) for v in others) or "nothing", verdict, good)


def _shape(array: np.ndarray) -> str:
    return "x".join(str(n) for n in array.shape)


def _marks(built: Built) -> str:
    notes = [note for note in built.notes if not note.startswith("volume ")]
    return f" ({'; '.join(notes)})" if notes else ""


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| series | ours | dcm2niix | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r.series} | {r.ours} | {r.dcm2niix} | {r.verdict} |" for r in rows])


def cases() -> list[Case]:
    """Return every case, in the order of the table."""
    return [*clean_cases(), *compressed_cases(), *value_cases(), *several_cases(), *damage_cases()]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=DATA, help="a folder of real DICOM series")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for case in cases():
        if options.only in case.name:
            rows.append(compare(case, options.data))
            print(f"{rows[-1].verdict:>24}  {rows[-1].series}", file=sys.stderr, flush=True)
    if options.write:
        text = options.write.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        options.write.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")
    print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else table(rows))
    sys.exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    main()
