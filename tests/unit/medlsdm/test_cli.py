from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlsdm.anatomy import generate
from medlsdm.types import Geometry, Modality
from medlsdm.volumes import write_nifti

# click warns about itself when streams are captured.
pytestmark = pytest.mark.filterwarnings("ignore:.*get_.*_stream.*:DeprecationWarning")


def run(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """Run the program in this process; return exit status, stdout and stderr."""
    from medlsdm import cli

    words = [str(a) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["medlsdm", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(2):
        scan, labels = generate(seed, Modality.MR, (12, 12, 12))
        write_nifti(tmp_path / "data" / "images" / f"p{seed}.nii.gz", scan.array, scan.geometry)
        write_nifti(tmp_path / "data" / "labels" / f"p{seed}.nii.gz", labels.array, labels.geometry)
    return tmp_path / "data"


def _empty(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.unlink()


def _unpaired(folder: Path) -> None:
    (folder / "labels" / "p1.nii.gz").unlink()


def _moved(folder: Path) -> None:
    geometry = Geometry(np.diag([9.0, 9, 9, 1]), (12, 12, 12))
    write_nifti(folder / "labels" / "p1.nii.gz", np.ones((12, 12, 12), np.uint8), geometry)


def _flat(folder: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((12, 12), np.float32), np.eye(4)), folder / "images" / "p1.nii.gz")


def _nan(folder: Path) -> None:
    geometry = generate(1, Modality.MR, (12, 12, 12))[0].geometry
    write_nifti(folder / "images" / "p1.nii.gz", np.full((12, 12, 12), np.nan, np.float32), geometry)


def _constant(folder: Path) -> None:
    geometry = generate(1, Modality.MR, (12, 12, 12))[0].geometry
    write_nifti(folder / "images" / "p1.nii.gz", np.ones((12, 12, 12), np.float32), geometry)


def _damaged(folder: Path) -> None:
    path = folder / "images" / "p1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def _no_spacing(folder: Path) -> None:
    content = bytearray(gzip.decompress((folder / "images" / "p1.nii.gz").read_bytes()))
    for row in (288, 304, 320):  # srow_x, srow_y, srow_z: the third column of the affine
        content[row : row + 4] = bytes(4)
    (folder / "images" / "p1.nii.gz").write_bytes(gzip.compress(bytes(content)))


def _flattened(folder: Path) -> None:
    for kind, dtype in (("images", np.float32), ("labels", np.uint8)):
        array = np.arange(144).reshape(12, 12, 1) % 3
        write_nifti(folder / kind / "p1.nii.gz", array.astype(dtype), Geometry(np.eye(4), (12, 12, 1)))


def _one_class(folder: Path) -> None:
    for path in (folder / "labels").iterdir():
        image = nib.Nifti1Image.from_filename(path)
        write_nifti(path, np.ones(image.shape, np.uint8), Geometry(np.asarray(image.affine), image.shape))


def _no_labels(folder: Path) -> None:
    for path in (folder / "labels").iterdir():
        image = nib.Nifti1Image.from_filename(path)
        write_nifti(path, np.zeros(image.shape, np.uint8), Geometry(np.asarray(image.affine), image.shape))


def _fractions(folder: Path) -> None:
    geometry = generate(1, Modality.MR, (12, 12, 12))[0].geometry
    write_nifti(folder / "labels" / "p1.nii.gz", np.full((12, 12, 12), 0.5, np.float32), geometry)


def _labels_of(folder: Path, value: int) -> None:
    geometry = generate(1, Modality.MR, (12, 12, 12))[0].geometry
    write_nifti(folder / "labels" / "p1.nii.gz", np.full((12, 12, 12), value, np.int32), geometry)


def _negative(folder: Path) -> None:
    _labels_of(folder, -3)


def _too_large(folder: Path) -> None:
    _labels_of(folder, 65_536)


def _twice(folder: Path) -> None:
    path = folder / "labels" / "p1.nii.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, "/images' is empty"),
        (_negative, "p1.nii.gz holds labels outside 0-65535. Renumber"),
        (_too_large, "p1.nii.gz holds labels outside 0-65535. Renumber"),
        (_twice, "p1.nii and p1.nii.gz"),
        (_unpaired, "2 images and 1 label maps"),
        (_moved, "another grid"),
        (_flat, "2 axes"),
        (_nan, "p1.nii.gz"),
        (_constant, "one value"),
        (_damaged, "cannot be read"),
        (_fractions, "no label map"),
        (_no_spacing, "p1.nii.gz: The spacing is zero"),
        (_flattened, "too thin"),
        (_one_class, "one class only"),
        (_no_labels, "background only"),
    ],
)
def test_bad_data_gives_one_line_and_exit_status_3(capsys, monkeypatch, folder, tmp_path, spoil, words):
    spoil(folder)
    status, out, err = run(capsys, monkeypatch, "train", "--data", folder, "--out", tmp_path / "run")
    assert status == 3
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_bad_settings_are_named(capsys, monkeypatch, folder, tmp_path):
    start = ("train", "--data", folder, "--out", tmp_path / "run")
    assert run(capsys, monkeypatch, *start, "--preset", "huge")[0] == 4
    assert run(capsys, monkeypatch, *start, "--modality", "XX")[0] == 2
    for scale in ("0", "-1", "nan", "inf", "1e300"):
        status, _, err = run(capsys, monkeypatch, *start, "--steps-scale", scale)
        assert status == 4
        assert "step scale" in err
        assert err.count("\n") == 1
    assert run(capsys, monkeypatch, *start, "--seed", 2**64)[0] == 2
    status, _, err = run(capsys, monkeypatch, *start, "--schema", "hippocampus")
    assert status == 3
    assert "does not name" in err


def test_a_gpu_that_is_not_there_is_one_line(capsys, monkeypatch, folder, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    start = ("train", "--data", folder, "--out", tmp_path / "run")
    status, _, err = run(capsys, monkeypatch, *start, "--device", "cuda")
    assert status == 4
    assert "no GPU" in err
    assert err.count("\n") == 1
    assert run(capsys, monkeypatch, *start, "--device", "tpu")[0] == 4


def test_modalities_must_match_the_folders(capsys, monkeypatch, folder, tmp_path):
    data = ("train", "--out", tmp_path / "run", "--data", folder, "--data", folder, "--data", folder)
    status, _, err = run(capsys, monkeypatch, *data, "--modality", "CT", "--modality", "MR")
    assert status == 2
    assert "3 --data and 2 --modality" in err


def test_two_modalities_train_one_model(capsys, monkeypatch, folder, tmp_path, preset):
    for seed in range(2):
        scan, labels = generate(seed, Modality.CT, (11, 13, 12))
        write_nifti(tmp_path / "ct" / "images" / f"p{seed}.nii.gz", scan.array, scan.geometry)
        write_nifti(tmp_path / "ct" / "labels" / f"p{seed}.nii.gz", labels.array, labels.geometry)
    settings = tmp_path / "moment.yaml"
    moment = {name: {"steps": steps} for name, steps in (("stage1", 3), ("stage2", 2), ("texture", 1))}
    moment["autoencoder"] = {"texture_channels": 8}
    updates = {name: getattr(preset, name).model_copy(update=values) for name, values in moment.items()}
    settings.write_text(preset.model_copy(update=updates).model_dump_json())  # JSON is YAML
    words = (
        "train", "--data", folder, "--modality", "MR", "--data", tmp_path / "ct", "--modality", "CT", "--schema",
        "procedural", "--preset", settings, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    status, out, err = run(capsys, monkeypatch, *words)
    assert status == 0, err
    made = json.loads(out)
    assert made["pairs"] == 4
    assert made["held_out"] == 0
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert card["modalities"] == ["CT", "MR"]
    assert sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir()) == [
        "stage1-000003.png", "stage2-000002.png", "texture-000001.png",
    ]  # fmt: skip
    status, out, err = run(capsys, monkeypatch, *words[:-3], "--estimate", "--out", tmp_path / "no", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert set(found["phases"]) == {"stage 1", "stage 2", "texture"}
    assert found["memory_bytes"] > 2**26
    assert found["disk_bytes"] > (tmp_path / "run" / "resume.safetensors").stat().st_size
    assert not (tmp_path / "no").exists()
    status, out, err = run(
        capsys, monkeypatch, "train", "--data", folder, "--from", tmp_path / "run", "--out", tmp_path / "tuned",
        "--steps-scale", "0.5", "--no-pictures", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["steps"] == {"stage 1": 2, "stage 2": 1, "texture": 1}


def test_any_affine_trains(capsys, monkeypatch, folder, tmp_path, preset):
    turn = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -7], [0, 0, 1.2, 3], [0, 0, 0, 1]])
    for kind in ("images", "labels"):
        image = nib.Nifti1Image.from_filename(folder / kind / "p1.nii.gz")
        array = np.asarray(image.dataobj)[:11, :9, :7]
        write_nifti(folder / kind / "p1.nii.gz", array, Geometry(turn, array.shape))
    settings = tmp_path / "moment.yaml"
    settings.write_text(preset.model_dump_json())
    status, _, err = run(
        capsys, monkeypatch, "train", "--data", folder, "--preset", settings, "--steps-scale", "0.0001", "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert status == 0, err


def test_errors_are_json_on_request(capsys, monkeypatch, tmp_path):
    status, out, _ = run(
        capsys, monkeypatch, "synthesise", "--checkpoint", tmp_path, "--labels", tmp_path / "no", "--out",
        tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 3
    assert json.loads(out)["error"]["code"] == "data"


def test_synthesise_refuses_a_folder_that_is_not_empty(capsys, monkeypatch, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    status, _, err = run(
        capsys, monkeypatch, "synthesise", "--checkpoint", tmp_path, "--labels", folder / "labels", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert status == 9
    assert "not empty" in err


def test_evaluate_needs_enough_volumes(capsys, monkeypatch, folder):
    status, _, err = run(capsys, monkeypatch, "evaluate", "--real", folder / "images", "--synthetic", folder / "images")
    assert status == 3
    assert "at least 5" in err


def test_help_is_quick():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "medlsdm.cli", "--help"], capture_output=True, text=True, check=True)
    assert "synthesise" in done.stdout
    assert time.monotonic() - started < 5  # well under a second on an idle machine
