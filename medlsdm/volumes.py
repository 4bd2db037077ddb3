"""Volumes on disk and on other grids: NIfTI in and out, orientation, resampling. No torch."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from medlsdm.checks import write_atomic
from medlsdm.errors import DataError, GeometryError, MedlsdmError
from medlsdm.types import Geometry

_UNREADABLE = (ImageFileError, WrapStructError, HeaderDataError, zlib.error, OSError, EOFError, ValueError, TypeError)
NIFTI_SUFFIXES = (".nii.gz", ".nii")


def nifti_stem(path: Path) -> str:
    """Return the file name without ``.nii`` or ``.nii.gz``."""
    for suffix in NIFTI_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def list_nifti(folder: Path) -> list[Path]:
    """Return the NIfTI files of a folder (not below it), by name, hidden files left out.

    Raises:
        DataError: Two files differ in nothing but ``.nii`` and ``.nii.gz``, so one would be taken for the other.
    """
    found = sorted(p for p in folder.iterdir() if p.name.endswith(NIFTI_SUFFIXES) and not p.name.startswith("."))
    first: dict[str, Path] = {}
    for path in found:
        twin = first.setdefault(nifti_stem(path), path)
        if twin is not path:
            raise DataError(f"{twin.name} and {path.name} have one name.", "Rename or remove one of them.")
    return found


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put a file's own name before errors that do not say it."""
    try:
        yield
    except MedlsdmError as error:
        if name in error.message:
            raise
        raise type(error)(f"{name}: {error.message}", error.hint) from error


def read_nifti(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Read a 3D NIfTI file: float32 [X, Y, Z] in file order, or its integer type, and its grid.

    Raises:
        DataError: The file is missing, damaged or not NIfTI, or it holds colours or complex numbers.
        GeometryError: It is not 3D, or its affine or voxel size is unusable.
    """
    try:
        with _silent():
            image = nib.Nifti1Image.from_filename(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise GeometryError(f"{path.name} has {len(shape)} axes; three are needed.", "Give one 3D volume a file.")
        if np.dtype(image.get_data_dtype()).kind not in "iuf":
            raise DataError(f"{path.name} holds colours or complex numbers.", "Give one plain number a voxel.")
        _check_spacing(path)
        scaled = image.dataobj.slope not in (1.0, None) or image.dataobj.inter not in (0.0, None)  # type: ignore[union-attr]
        integer = np.issubdtype(image.get_data_dtype(), np.integer) and not scaled
        array = np.asarray(image.dataobj if integer else image.get_fdata(dtype=np.float32)).reshape(shape)
        with named(path.name):
            return array, Geometry(np.asarray(image.affine, dtype=np.float64), shape)
    except _UNREADABLE as error:
        raise DataError(f"{path.name} cannot be read as NIfTI.", "It may be damaged or of another format.") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep nibabel from printing what it repairs in a header."""
    before, imageglobals.logger.disabled = imageglobals.logger.disabled, True
    try:
        yield
    finally:
        imageglobals.logger.disabled = before


def _check_spacing(path: Path) -> None:
    """Refuse a voxel size that is needed and not above 0: nibabel would put 1 mm, or the value without its sign."""
    with ImageOpener(str(path)) as stream:
        header = nib.Nifti1Header.from_fileobj(stream, check=False)
    if header["sform_code"] == 0 and not (np.asarray(header["pixdim"], dtype=np.float64)[1:4] > 0).all():
        raise GeometryError(
            f"{path.name}: The voxel size in its header is zero or negative, and no sform stands in for it.",
            "Convert it again from its source.",
        )


def write_nifti(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write a NIfTI file whose header holds nothing but the array's type and the affine.

    The gzip header carries neither time nor name, so equal volumes give equal bytes.
    """
    image = nib.Nifti1Image(array, geometry.affine)
    image.header.set_xyzt_units("mm", "unknown")
    image.set_sform(geometry.affine, code=1)
    image.set_qform(geometry.affine, code=1)
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=4, mtime=0)
    write_atomic(path, content)


def to_ras(array: NDArray[Any], geometry: Geometry) -> tuple[NDArray[Any], Geometry]:
    """Flip and permute the axes so that they point as nearly as possible to R, A and S."""
    orientation = nib.orientations.io_orientation(geometry.affine)
    turned = nib.orientations.apply_orientation(array, orientation)
    affine = geometry.affine @ nib.orientations.inv_ornt_aff(orientation, geometry.shape)
    return turned, Geometry(affine, turned.shape)


def from_ras(array: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """Undo ``to_ras``: bring a RAS array back to the axes of ``geometry``."""
    to = nib.orientations.io_orientation(geometry.affine)
    canonical = np.array([[0, 1], [1, 1], [2, 1]])
    return nib.orientations.apply_orientation(array, nib.orientations.ornt_transform(canonical, to))


def resample(array: NDArray[Any], geometry: Geometry, target: Geometry, *, order: int, fill: float) -> NDArray[Any]:
    """Resample onto another grid by spline of ``order`` (0 for labels, 1 for scans); outside is ``fill``."""
    from scipy import ndimage

    index = np.linalg.inv(geometry.affine) @ target.affine
    return ndimage.affine_transform(
        array,
        index[:3, :3],
        index[:3, 3],  # pyright: ignore[reportArgumentType]  # an offset for each axis is documented
        output_shape=target.shape,
        order=order,
        mode="constant",
        cval=fill,
    )
