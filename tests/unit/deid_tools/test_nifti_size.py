from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from deid_tools.admit import Refusal
from deid_tools.nifti_size import declared_voxels


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_header_says_how_many_voxels_there_are(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    nib.save(kind(np.zeros((3, 4, 5), np.uint8), np.eye(4)), path)
    assert declared_voxels(path) == 60


def test_big_endian_is_read(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4), header=nib.Nifti1Header(endianness=">"))
    nib.save(image, path)
    assert path.read_bytes()[:4] == b"\0\0\x01\x5c"
    assert declared_voxels(path) == 60


def test_a_bomb_is_not_unpacked(tmp_path):
    header = bytearray(nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.eye(4)).to_bytes()[:352])
    struct.pack_into("<8h", header, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bytes(header)))
    assert declared_voxels(path) == 32767**3
    struct.pack_into("<f", header, 108, 2e9)
    path.write_bytes(gzip.compress(bytes(header)))
    with pytest.raises(Refusal, match="16 MiB"):
        declared_voxels(path)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"\x1f\x8b\x08\0junk", b"x" * 600, bytes(600)])
def test_what_is_not_nifti_is_refused(tmp_path, content):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    with pytest.raises(Refusal, match="label map that can be read"):
        declared_voxels(path)
