from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medlsdm.anatomy import generate
from medlsdm.checkpoints import save_checkpoint
from medlsdm.exports.monai_bundle import export_monai_bundle
from medlsdm.types import Geometry, Modality
from medlsdm.volumes import read_nifti, write_nifti

# click warns about itself when streams are captured.
pytestmark = pytest.mark.filterwarnings("ignore:.*get_.*_stream.*:DeprecationWarning")
SHAPE = (14, 13, 9)


@pytest.fixture
def home(tmp_path: Path, checkpoint) -> Path:
    """Return a folder with a checkpoint and two label maps."""
    save_checkpoint(
        tmp_path / "run", preset=checkpoint.preset, schema=checkpoint.schema, modalities=checkpoint.modalities,
        autoencoder=checkpoint.autoencoder, denoiser=checkpoint.denoiser,
    )  # fmt: skip
    for seed in range(2):
        labels = generate(seed, Modality.CT, SHAPE)[1]
        write_nifti(tmp_path / "labels" / f"p{seed}.nii.gz", labels.array, labels.geometry)
    return tmp_path


@pytest.fixture
def draw(home: Path, capsys, monkeypatch):
    """Return a function that runs the command: exit status, stdout, stderr."""
    from medlsdm import cli

    def run(*more: object) -> tuple[int, str, str]:
        words = ["synthesise", "--checkpoint", home / "run", "--labels", home / "labels", "--out", home / "out",
                 "--steps", 1, "--threads", 1, *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["medlsdm", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_tells_what_was_chosen(draw, home):
    status, out, _ = draw("--json", "--memory", "4GB", "--device", "cpu", "--smooth")
    assert status == 0
    rows = json.loads(out)["volumes"]
    assert [row["file"] for row in rows] == ["p0.nii.gz", "p1.nii.gz"]
    assert rows[0]["plan"]["sampling_parts"] == [1, 1, 1]
    assert rows[0]["plan"]["estimate_bytes"] <= rows[0]["plan"]["budget_bytes"] == 4 * 2**30
    assert read_nifti(home / "out" / "p0.nii.gz")[0].shape == SHAPE
    draw("--overwrite")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--memory", "plenty"), 2, "4GB"),
        (("--guidance", "nan"), 2, "guidance"),
        (("--guidance", "inf"), 2, "guidance"),
        (("--guidance", "1e6"), 2, "guidance"),
        (("--seed", "99999999999999999999"), 2, "--seed"),
        (("--seed", 2**63 - 1), 2, "2 seeds"),
        (("--memory", "1MB"), 12, "--memory"),
        (("--device", "tpu"), 4, "cpu"),
        pytest.param(
            ("--device", "cuda"), 4, "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)  # fmt: skip
def test_what_the_machine_cannot_do_is_one_line(draw, words, status, says):
    code, _, err = draw(*words)
    assert code == status
    assert len(err.splitlines()) == 1
    assert says in err


def _foreign(path: Path) -> None:
    write_nifti(path, np.full(SHAPE, 77, np.uint8), Geometry(np.eye(4), SHAPE))


def _negative(path: Path) -> None:
    write_nifti(path, np.full(SHAPE, -1, np.int16), Geometry(np.eye(4), SHAPE))


def _flat(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((8, 8), np.uint8), np.eye(4)), path)


def _zero_spacing(path: Path) -> None:
    image = nib.Nifti1Image(np.ones(SHAPE, np.uint8), np.eye(4))
    image.header["srow_z"] = 0
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    content = bytearray(image.to_bytes())
    content[280:328] = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], "<f4").tobytes()
    plain = path.with_suffix("")
    path.unlink()
    plain.write_bytes(bytes(content))


def _fractions(path: Path) -> None:
    write_nifti(path, np.full(SHAPE, 0.5, np.float32), Geometry(np.eye(4), SHAPE))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_foreign, _negative, _flat, _zero_spacing, _fractions, _empty])
def test_label_maps_that_cannot_be_used_are_one_line(draw, home, spoil):
    spoil(home / "labels" / "p0.nii.gz")
    code, _, err = draw()
    assert code == 3
    assert len(err.splitlines()) == 1
    assert "p0.nii" in err


@pytest.mark.parametrize("spoil", [_foreign, _empty])
def test_what_waits_is_drawn_before_a_bad_map_ends_it(draw, home, spoil):
    spoil(home / "labels" / "p1.nii.gz")
    code, _, err = draw("--device", "cpu")
    assert code == 3
    assert err.splitlines()[0] == "p0.nii.gz (1 of 2)"
    assert "p1.nii.gz" in err.splitlines()[1]
    assert read_nifti(home / "out" / "p0.nii.gz")[0].shape == SHAPE


def test_two_maps_of_one_name_are_refused(draw, home):
    path = home / "labels" / "p1.nii.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    code, _, err = draw()
    assert code == 3
    assert "p1.nii and p1.nii.gz" in err
    assert not (home / "out").exists()


def test_a_bundle_of_ours_is_a_checkpoint(draw, home):
    export_monai_bundle(home / "run", home / "bundle")
    assert draw()[0] == 0
    assert draw("--checkpoint", home / "bundle", "--out", home / "again")[0] == 0
    assert (home / "again" / "p1.nii.gz").read_bytes() == (home / "out" / "p1.nii.gz").read_bytes()


def test_one_class_is_drawn_with_a_warning(draw, home):
    geometry = generate(0, Modality.CT, SHAPE)[1].geometry
    write_nifti(home / "labels" / "p0.nii.gz", np.zeros(SHAPE, np.uint8), geometry)
    code, _, err = draw()
    assert code == 0
    assert "warning: p0.nii.gz holds one class only" in err
    assert "warning: p1" not in err
