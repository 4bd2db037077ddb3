"""What other people's programs say about our files: dciodvfy, dcmtk and tesseract, where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.keys import SiteKeys
from deid_tools.pipeline import deidentify
from deid_tools.plant import write_planted_study
from deid_tools.treatment import PixelPolicy
from deid_tools.write import write_synthetic_series
from medlsdm.types import (
    SYNTHESIS_SEAL,
    Geometry,
    LabelClass,
    LabelSchema,
    Modality,
    Provenance,
    SemanticMap,
    SyntheticVolume,
)

pytestmark = pytest.mark.peers
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
GRID = Geometry(np.diag([0.8, 0.8, 2.0, 1.0]), (16, 14, 6))
SCHEMA = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004")))
KEYS = SiteKeys.derive(b"k" * 32, "peers")


def need(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def errors(path: Path) -> list[str]:
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("modality", list(Modality))
def test_synthetic_series_are_valid(tmp_path, modality):
    need("dciodvfy")
    array = np.random.default_rng(0).normal(0, 100, GRID.shape).astype(np.float32)
    volume = SyntheticVolume(array, GRID, modality, Provenance("a", "b", "c", 1), seal=SYNTHESIS_SEAL)
    for path in write_synthetic_series(volume, tmp_path / "out"):
        unknown = [e for e in errors(path) if "(0x0008,0x001c)" not in e]  # SyntheticData is newer than the checker
        assert unknown == []


def planted(folder: Path, modality: Modality) -> None:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[3:8, 4:9, 1:5] = 1
    array = np.random.default_rng(0).normal(0, 100, GRID.shape)
    write_planted_study(array, GRID, modality, SemanticMap(labels, GRID, SCHEMA), folder, seed=3, hospital="Westend")


@pytest.mark.parametrize("modality", [Modality.CT, Modality.MR])
def test_de_identified_images_and_segmentations_are_valid(tmp_path, modality):
    need("dciodvfy")
    planted(tmp_path / "in", modality)
    deidentify(tmp_path / "in", tmp_path / "out", KEYS, schema=SCHEMA)
    written = sorted((tmp_path / "out").rglob("*.dcm"))
    assert len(written) == 7
    assert {path.name: errors(path) for path in written if errors(path)} == {}


def test_dcmtk_reads_what_is_written(tmp_path):
    need("dcmdump")
    planted(tmp_path / "in", Modality.CT)
    deidentify(tmp_path / "in", tmp_path / "out", KEYS, schema=SCHEMA)
    for path in (tmp_path / "out").rglob("*.dcm"):
        done = subprocess.run(["dcmdump", "+P", "PatientID", str(path)], capture_output=True, text=True, check=True)
        assert "[P-" in done.stdout
        assert done.stderr == ""


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_series_with_a_name_in_its_pixels_is_held_or_blanked(tmp_path):
    need("tesseract")
    if not DATA.is_dir():
        pytest.skip("the real data folder is not beside the checkout")
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (512, 512))
    ImageDraw.Draw(picture).text((10, 10), "DOE JANE 1961-03-04", fill=255, font=ImageFont.load_default(16))
    source = tmp_path / "in"
    source.mkdir()
    for k, path in enumerate(sorted((DATA / "ct-philips-phantom").glob("I*"))):
        ds = pydicom.dcmread(path)
        if k == 5:
            pixels = ds.pixel_array.copy()
            pixels[np.array(picture) > 100] = 2500
            ds.PixelData = pixels.tobytes()
        ds.save_as(source / path.name)
    report = deidentify(source, tmp_path / "held", KEYS, policy=PixelPolicy(text="quarantine"))
    assert report.series == ()
    assert report.reasons() == {"text seems to be burned into its pixels": 28}
    report = deidentify(source, tmp_path / "out", KEYS, policy=PixelPolicy(faces=False))  # a plastic head has none
    assert [s.pixels.text_boxes > 0 for s in report.series] == [True]
    written = next(path for path in (tmp_path / "out").rglob("0006.dcm"))
    assert not (pydicom.dcmread(written).pixel_array[np.array(picture) > 100] == 2500).any()


def first_of_each_series(folder: Path) -> list[Path]:
    """Return one admitted file of every real series."""
    from deid_tools.admit import Refusal, admit

    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            instance = admit(path)
            if not instance.is_structure_set:  # of which nothing is written but a label map
                found.setdefault(instance.series_uid, path)
        except Refusal:
            continue
    return list(found.values())


@pytest.mark.real_data
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("recipe", ["allow-list", "basic"])
def test_no_real_series_gets_an_error_that_it_did_not_have(tmp_path, recipe):
    need("dciodvfy")
    if not DATA.is_dir():
        pytest.skip("the real data folder is not beside the checkout")
    from deid_tools.admit import read_strict
    from deid_tools.headers import HeaderCleaner
    from deid_tools.modules import save_clean
    from deid_tools.pixels import take_pixels
    from deid_tools.recipes import Option, load_recipe

    cleaner = HeaderCleaner(KEYS, recipe=load_recipe(recipe, Option if recipe == "basic" else ()))
    series = first_of_each_series(DATA)
    assert len(series) >= 10
    new = {}
    for n, path in enumerate(series):
        ds = read_strict(path)
        clean = cleaner.clean(ds)
        clean.InstanceNumber = 1
        take_pixels(ds, clean)
        save_clean(clean, tmp_path / f"{n}.dcm")
        new[path.parent.name] = sorted(set(errors(tmp_path / f"{n}.dcm")) - set(errors(path)))
    assert not any(new.values()), new
