from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from deid_tools.admit import Refusal
from deid_tools.burned_in import hide_text
from deid_tools.instances import cut, images
from deid_tools.modules import save_clean, stamp
from deid_tools.pipeline import deidentify
from deid_tools.pixels import TextSearch
from deid_tools.plant import write_planted_study
from deid_tools.treatment import PixelPolicy
from deid_tools.uids import fresh_uid
from medlsdm.errors import ConfigError
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, SemanticMap

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
FRAMES, SIDE = 10, 160


def letters(text: str, height: int) -> np.ndarray:
    """Draw text [Y, X] as true and false."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=height)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(picture).text((2 - left, 2 - top), text, fill=255, font=font)
    return np.asarray(picture) > 110


def scan() -> np.ndarray:
    """Return slices [slice, Y, X] of a noisy disc that differs from slice to slice."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    return np.where(np.hypot(y, x) < 30, 300.0, -1000.0) + rng.normal(0, 15, (FRAMES, SIDE, SIDE)).round()


def write(tmp_path, slices) -> tuple[list, TextSearch]:
    volume = np.transpose(slices, (2, 1, 0))
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    uids = {k: fresh_uid() for k in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    paths, search = [], TextSearch()
    for n, ds in enumerate(images(cut(volume, Geometry(affine, volume.shape)), Modality.CT, uids)):
        stamp(ds)
        paths.append(tmp_path / f"{n + 1:04d}.dcm")
        save_clean(ds, paths[-1])
        search.add(pydicom.dcmread(paths[-1]).pixel_array[None])
    return paths, search


def frames(paths) -> np.ndarray:
    return np.stack([pydicom.dcmread(p).pixel_array for p in paths])


@pytest.mark.usefixtures("without_tesseract")
def test_a_clean_series_is_left_as_it_is(tmp_path):
    paths, search = write(tmp_path, scan())
    before = [p.read_bytes() for p in paths]
    assert hide_text(search, paths) is None
    assert [p.read_bytes() for p in paths] == before


@pytest.mark.usefixtures("without_tesseract")
def test_what_is_drawn_on_one_place_is_blanked_even_without_tesseract(tmp_path):
    slices = scan()
    mark = letters("DOE JANE", 12)
    slices[:, 4 : 4 + mark.shape[0], 2 : 2 + mark.shape[1]][:, mark] = 2000
    paths, search = write(tmp_path, slices)
    done = hide_text(search, paths)
    assert done is not None
    assert done.boxes >= 1
    after = frames(paths)
    assert after.max() < 1000
    np.testing.assert_array_equal(after[:, 30:, :], slices[:, 30:, :])
    ds = pydicom.dcmread(paths[0])
    assert ds.BurnedInAnnotation == "NO"
    assert [i.CodeValue for i in ds.DeidentificationMethodCodeSequence] == ["113100", "113101"]


@pytest.mark.usefixtures("without_tesseract")
def test_text_over_anatomy_that_never_changes_is_found(tmp_path):
    slices = scan()
    mark = letters("A1", 14)
    slices[:, 40 : 40 + mark.shape[0], 40 : 40 + mark.shape[1]][:, mark] = 350  # as bright as its surroundings
    paths, search = write(tmp_path, slices)
    assert hide_text(search, paths) is not None
    spot = frames(paths)[:, 40 : 40 + mark.shape[0], 40 : 40 + mark.shape[1]][:, mark]
    assert not (spot == 350).any()


@pytest.mark.usefixtures("without_tesseract")
def test_quarantine_is_a_policy_and_too_much_text_is_always_held(tmp_path):
    slices = scan()
    slices[:, 2:8, 2:60] = 2000
    paths, search = write(tmp_path / "a", slices)
    with pytest.raises(Refusal, match="text seems to be burned"):
        hide_text(search, paths, "quarantine")
    for row in range(2, 100, 8):
        slices[:, row : row + 4, 2:100] = 2000
    paths, search = write(tmp_path / "b", slices)
    with pytest.raises(Refusal, match="covers too much"):
        hide_text(search, paths)


@pytest.mark.usefixtures("without_tesseract")
def test_declared_boxes_are_blanked_though_nothing_can_be_read(tmp_path):
    paths, _ = write(tmp_path, scan())
    search = TextSearch()
    search.add(frames(paths), [(0, 0, 8, 40)])
    done = hide_text(search, paths)
    assert done is not None
    assert np.unique(frames(paths)[:, :8, :40]).size == 1


@pytest.mark.peers
@needs_tesseract
def test_a_name_on_a_single_slice_is_read_and_blanked(tmp_path):
    slices = scan()
    mark = letters("MILLER 4711", 14)
    slices[4, 130 : 130 + mark.shape[0], 4 : 4 + mark.shape[1]][mark] = 900 + np.arange(mark.sum()) % 7 * 10
    paths, search = write(tmp_path, slices)
    assert hide_text(search, paths) is not None
    assert frames(paths)[4, 130:].max() < 500


@pytest.mark.usefixtures("without_tesseract")
def test_a_block_thicker_than_letters_is_no_text(tmp_path):
    slices = scan()
    slices[:, 60:84, 50:80] = 2000
    slices[:, 10:40, 2:90] = 3000
    _, search = write(tmp_path, slices)
    assert search.found() == {}


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError):
        PixelPolicy("ignore")


@pytest.mark.usefixtures("without_tesseract")
@pytest.mark.parametrize("pixels", ["signed", "unsigned", "eight bits"])
def test_text_is_hidden_whatever_the_pixels_are(tmp_path, keys, pixels):
    """One name on one of several slices, over anatomy, in every layout of pixels that is admitted."""
    array = np.transpose(scan(), (2, 1, 0))
    geometry = Geometry(np.diag([1.5, 1.5, 3.0, 1.0]), array.shape)
    schema = LabelSchema("x", (LabelClass(0, "a"), LabelClass(1, "b")))
    labels = SemanticMap((array > 0).astype(np.uint8), geometry, schema)
    write_planted_study(array, geometry, Modality.MR, labels, tmp_path / "in", seed=3, hospital="Northgate")
    next((tmp_path / "in").rglob("*_SEG.dcm")).unlink()
    paths = sorted((tmp_path / "in").rglob("*.dcm"))
    ink = letters("MILLER 47", 14)
    area = np.s_[74 : 74 + ink.shape[0], 44 : 44 + ink.shape[1]]
    for k, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        values = ds.pixel_array.astype(np.int32)
        if pixels == "eight bits":
            values = values // 20
        top = int(values.max())
        if k == 5:
            values[area][ink] = top + 30
        signed, wide = pixels == "signed", 8 if pixels == "eight bits" else 16
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = wide, wide, wide - 1, int(signed)
        kind = np.uint8 if wide == 8 else np.int16 if signed else np.uint16
        if signed:
            values -= 2000
        ds.add_new(0x7FE00010, "OB" if wide == 8 else "OW", values.astype(kind).tobytes())
        ds.save_as(path)
    was = [pydicom.dcmread(p).pixel_array for p in paths]
    report = deidentify(tmp_path / "in", tmp_path / "out", keys, policy=PixelPolicy(faces=False))
    assert report.series, report.reasons()
    assert report.series[0].pixels.text_boxes >= 1
    out = [pydicom.dcmread(p) for p in sorted((tmp_path / "out").rglob("0*.dcm"))]
    hidden = (out[5].pixel_array[area] != was[5][area])[ink]
    assert hidden.mean() >= 0.9
    assert out[5].BurnedInAnnotation == "NO"
    assert "113101" in [item.CodeValue for item in out[5].DeidentificationMethodCodeSequence]
    blanked = np.mean([(a != ds.pixel_array).mean() for a, ds in zip(was, out, strict=True)])
    assert blanked < 0.15


@pytest.mark.real_data
@pytest.mark.usefixtures("without_tesseract")
def test_no_file_of_the_burned_in_set_passes_with_its_text(data, tmp_path, keys):
    report = deidentify(data / "dicom" / "burned-in", tmp_path / "out", keys)
    assert report.series == ()
    assert len(report.held) == 3
    assert set(report.reasons()) == {
        "a plain radiograph is not a volume",
        "a localizer is not part of a volume",
        "secondary captures often carry text in their pixels",
    }
    assert list((tmp_path / "out").rglob("*.dcm")) == []


@pytest.mark.real_data
@pytest.mark.peers
@needs_tesseract
def test_the_text_of_the_burned_in_ct_is_hidden_where_it_would_be_admitted(data, tmp_path, keys):
    """The localizer dressed as a slice: what its text would meet in a series that is let in."""
    (tmp_path / "in").mkdir()
    before = _as_slices(data / "dicom" / "burned-in" / "2_ORIGINAL.dcm", tmp_path / "in")
    report = deidentify(tmp_path / "in", tmp_path / "out", keys)
    assert [s.pixels.text_boxes > 0 for s in report.series] == [True]
    after = [pydicom.dcmread(p).pixel_array for p in sorted((tmp_path / "out").rglob("0*.dcm"))]
    text = before == 32767
    assert text.sum() > 1000
    assert not any((picture[text] == 32767).any() for picture in after)
    assert np.mean([(picture != before).mean() for picture in after]) < 0.15


def _as_slices(original: Path, folder: Path) -> np.ndarray:
    """Write a localizer twice, as two axial slices; return its pixels."""
    for k in range(2):
        ds = pydicom.dcmread(original)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{k + 1}")
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3 * k]
        ds.PixelSpacing, ds.SliceThickness, ds.InstanceNumber = [1, 1], 3, k + 1
        ds.save_as(folder / f"{k}.dcm")
    return pydicom.dcmread(original).pixel_array
