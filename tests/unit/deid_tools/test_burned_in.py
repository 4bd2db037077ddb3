from __future__ import annotations

import shutil

import numpy as np
import pydicom
import pytest

from deid_tools.admit import Refusal
from deid_tools.burned_in import hide_text
from deid_tools.instances import cut, images
from deid_tools.modules import save_clean, stamp
from deid_tools.pixels import TextSearch
from deid_tools.uids import fresh_uid
from medlsdm.errors import ConfigError
from medlsdm.types import Geometry, Modality

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


@pytest.fixture
def _without_tesseract(monkeypatch):
    monkeypatch.setattr("deid_tools.pixels.shutil.which", lambda name: None)


@pytest.mark.usefixtures("_without_tesseract")
def test_a_clean_series_is_left_as_it_is(tmp_path):
    paths, search = write(tmp_path, scan())
    before = [p.read_bytes() for p in paths]
    assert hide_text(search, paths) is None
    assert [p.read_bytes() for p in paths] == before


@pytest.mark.usefixtures("_without_tesseract")
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


@pytest.mark.usefixtures("_without_tesseract")
def test_text_over_anatomy_that_never_changes_is_found(tmp_path):
    slices = scan()
    mark = letters("A1", 14)
    slices[:, 40 : 40 + mark.shape[0], 40 : 40 + mark.shape[1]][:, mark] = 350  # as bright as its surroundings
    paths, search = write(tmp_path, slices)
    assert hide_text(search, paths) is not None
    spot = frames(paths)[:, 40 : 40 + mark.shape[0], 40 : 40 + mark.shape[1]][:, mark]
    assert not (spot == 350).any()


@pytest.mark.usefixtures("_without_tesseract")
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


@pytest.mark.usefixtures("_without_tesseract")
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


@pytest.mark.usefixtures("_without_tesseract")
def test_a_block_thicker_than_letters_is_no_text(tmp_path):
    slices = scan()
    slices[:, 60:84, 50:80] = 2000
    slices[:, 10:40, 2:90] = 3000
    _, search = write(tmp_path, slices)
    assert search.found() == {}


def test_an_unknown_policy_is_refused():
    from deid_tools.treatment import PixelPolicy

    with pytest.raises(ConfigError):
        PixelPolicy("ignore")
