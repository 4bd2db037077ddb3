from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from medlsdm.anatomy import generate
from medlsdm.checkpoints import CARD, Checkpoint, load_checkpoint, save_checkpoint
from medlsdm.errors import BusyError, DataError, IntegrityError
from medlsdm.exports.folders import from_pretrained
from medlsdm.exports.hugging_face import export_hugging_face
from medlsdm.exports.monai_bundle import FolderSynthesis, export_monai_bundle
from medlsdm.synthesis import Synthesiser
from medlsdm.types import Modality, SemanticMap
from medlsdm.volumes import read_nifti, write_nifti

LAYOUTS = {"hf": export_hugging_face, "monai": export_monai_bundle}
PRIVACY_WORDS = ("No formal guarantee", "share them only where")


def saved(folder: Path, checkpoint: Checkpoint, *, both: bool = True) -> Path:
    save_checkpoint(
        folder,
        preset=checkpoint.preset,
        schema=checkpoint.schema,
        modalities=checkpoint.modalities,
        autoencoder=checkpoint.autoencoder,
        denoiser=checkpoint.denoiser if both else None,
        training_data="Made-up patients.",
    )
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    folder = saved(tmp_path / "run", checkpoint)
    (folder / "losses.csv").write_text("stage,step,loss\n")
    (folder / "pictures").mkdir()
    return folder


@pytest.fixture(scope="module")
def labels() -> SemanticMap:
    return generate(3, Modality.MR, (14, 17, 12))[1]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_exported_folder_gives_the_same_volume(tmp_path: Path, run_folder: Path, labels: SemanticMap, layout: str):
    card = LAYOUTS[layout](run_folder, tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out")
    volumes = [Synthesiser(c).synthesise(labels, seed=5, steps=2) for c in (load_checkpoint(run_folder), loaded)]
    assert np.array_equal(volumes[0].array, volumes[1].array)
    assert volumes[0].provenance == volumes[1].provenance
    assert loaded.card.digest == card.digest == load_checkpoint(run_folder).card.digest


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_nothing_but_weights_card_and_words_goes_along(tmp_path: Path, run_folder: Path, layout: str):
    LAYOUTS[layout](run_folder, tmp_path / "out")
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    weights = {"autoencoder.safetensors", "denoiser.safetensors", CARD}
    expected = {
        "hf": weights | {"README.md", "config.json"},
        "monai": {f"models/{name}" for name in weights}
        | {"configs/inference.json", "configs/metadata.json", "docs/README.md"},
    }
    assert names == expected[layout]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_what_the_card_says_of_privacy_travels_in_words_too(tmp_path: Path, run_folder: Path, layout: str):
    card = LAYOUTS[layout](run_folder, tmp_path / "out")
    readme = next((tmp_path / "out").rglob("README.md")).read_text()
    assert all(words in readme for words in (*PRIVACY_WORDS, card.digest, card.limits, "Made-up patients."))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_an_export_can_be_exported_again(tmp_path: Path, run_folder: Path, layout: str):
    LAYOUTS[layout](run_folder, tmp_path / "first")
    for other, export in LAYOUTS.items():
        card = export(tmp_path / "first", tmp_path / other)
        assert from_pretrained(str(tmp_path / other)).card == card


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_refuses_a_folder_that_holds_something(tmp_path: Path, run_folder: Path, layout: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(BusyError):
        LAYOUTS[layout](run_folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["note.txt"]


def test_refuses_what_cannot_synthesise_or_was_changed(tmp_path: Path, run_folder: Path, checkpoint: Checkpoint):
    with pytest.raises(DataError, match="stage 1"):
        export_hugging_face(saved(tmp_path / "half", checkpoint, both=False), tmp_path / "out")
    with pytest.raises(DataError, match="missing"):
        export_hugging_face(tmp_path / "half" / "nowhere", tmp_path / "out")
    with (run_folder / "denoiser.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(IntegrityError):
        export_hugging_face(run_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_weight_in_an_export_is_found(tmp_path: Path, run_folder: Path):
    export_hugging_face(run_folder, tmp_path / "out")
    path = tmp_path / "out" / "autoencoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        from_pretrained(tmp_path / "out")


def test_the_hubs_front_matter_and_config_can_be_read(tmp_path: Path, run_folder: Path):
    card = export_hugging_face(run_folder, tmp_path / "out", licence="cc-by-4.0")
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc-by-4.0"
    assert fields["library_name"] == "medlsdm"
    assert {"ct", "mr"} <= set(fields["tags"])
    assert body.startswith(f"# {card.model_id}")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["preset"] == card.preset.model_dump(mode="json")
    assert config["weights"] == card.files


def test_the_bundles_program_makes_what_the_library_makes(tmp_path: Path, run_folder: Path, labels: SemanticMap):
    export_monai_bundle(run_folder, tmp_path / "out")
    write_nifti(tmp_path / "maps" / "a.nii.gz", labels.array, labels.geometry)
    synthesiser = Synthesiser(from_pretrained(tmp_path / "out"))
    (written,) = FolderSynthesis(synthesiser, tmp_path / "maps", tmp_path / "made", seed=4, steps=2).run()
    array, geometry = read_nifti(written)
    assert np.array_equal(array, synthesiser.synthesise(labels, seed=4, steps=2).array)
    assert geometry.matches(labels.geometry)
    with pytest.raises(DataError):
        FolderSynthesis(synthesiser, tmp_path / "made" / "none", tmp_path / "more").run()


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("monai") and importlib.util.find_spec("fire")),
    reason="needs MONAI: pip install 'medlsdm[bench]'",
)
def test_monai_itself_runs_the_bundle(tmp_path: Path, run_folder: Path, labels: SemanticMap):
    export_monai_bundle(run_folder, tmp_path / "out")
    write_nifti(tmp_path / "out" / "labels" / "a.nii.gz", labels.array, labels.geometry)
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json",
        "--meta_file", "configs/metadata.json", "--bundle_root", ".", "--seed", "9", "--steps", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path / "out", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    array, _ = read_nifti(tmp_path / "out" / "eval" / "a.nii.gz")
    expected = Synthesiser(load_checkpoint(run_folder)).synthesise(labels, seed=9, steps=2)
    np.testing.assert_allclose(array, expected.array, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*get_.*_stream.*:DeprecationWarning")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_command_exports_and_says_what_of_privacy(
    capsys, monkeypatch, tmp_path: Path, run_folder: Path, layout: str
):
    from medlsdm import cli

    words = ["medlsdm", "export", str(run_folder), "--format", layout, "--out", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code in (0, None)
    assert json.loads(captured.out)["card_digest"] == from_pretrained(tmp_path / "out").card.digest
    assert "No formal guarantee" in captured.err


@pytest.mark.filterwarnings("ignore:.*get_.*_stream.*:DeprecationWarning")
def test_the_command_refuses_a_layout_that_it_does_not_know(capsys, monkeypatch, tmp_path: Path, run_folder: Path):
    from medlsdm import cli

    monkeypatch.setattr(
        sys, "argv", ["medlsdm", "export", str(run_folder), "--format", "onnx", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "hf or monai" in capsys.readouterr().err
