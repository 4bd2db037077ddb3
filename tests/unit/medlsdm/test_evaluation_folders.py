from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medlsdm.errors import DataError, GeometryError
from medlsdm.evaluation.folders import compare_folders
from medlsdm.types import Geometry, Modality
from medlsdm.volumes import write_nifti

# click warns about itself when streams are captured.
pytestmark = pytest.mark.filterwarnings("ignore:.*get_.*_stream.*:DeprecationWarning")

RAS, LPS = np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])


def fill(folder: Path, seed: int, count: int = 6, affine: np.ndarray = RAS, follow: bool = True) -> Path:
    """Write volumes with a bright ball, and label maps that show it (or, unless ``follow``, another)."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        shape = (30, 34, 28)
        balls = [
            np.sqrt(sum((g - rng.integers(11, n - 11)) ** 2 for g, n in zip(np.indices(shape), shape, strict=True))) < 8
            for _ in range(2)
        ]
        image = 700.0 * balls[0] + rng.normal(200, 60, shape)
        geometry = Geometry(affine, shape)
        write_nifti(folder / "images" / f"v{index}.nii.gz", image.astype(np.float32), geometry)
        write_nifti(folder / "labels" / f"v{index}.nii.gz", 5 * balls[not follow].astype(np.uint8), geometry)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("real"), 0)


def test_a_segmenter_sees_whether_volumes_follow_their_maps(real: Path, tmp_path: Path):
    follows = fill(tmp_path / "follows", 1, affine=LPS)
    strays = fill(tmp_path / "strays", 2, follow=False)
    one, other = (
        compare_folders(
            real / "images", made / "images", Modality.MR, labels=made / "labels", real_labels=real / "labels", steps=30
        )
        for made in (follows, strays)
    )
    assert one.dice is not None
    assert other.dice is not None
    assert one.dice > other.dice + 0.3
    assert one.dice_real_count == 1
    assert one.fid_segmenter is not None
    assert "fid_segmenter" in one.to_json()


def test_the_command_prints_every_measure(real: Path, capsys, monkeypatch):
    from medlsdm.cli import main

    arguments = ["medlsdm", "evaluate", "--real", str(real / "images"), "--synthetic", str(real / "images"), "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["told_apart_auc"] == pytest.approx(0.5)
    assert found["told_apart_low"] <= 0.5 <= found["told_apart_high"]
    assert found["real_count"] == found["synthetic_count"] == 6
    assert found["gradient_energy_ratio"] == pytest.approx(1)
    assert "dice" not in found


def test_refuses_maps_of_one_set_only(real: Path):
    with pytest.raises(DataError, match="one set only"):
        compare_folders(real / "images", real / "images", Modality.MR, labels=real / "labels")


def test_refuses_a_volume_without_map(real: Path, tmp_path: Path):
    fewer = fill(tmp_path, 3, count=5)
    with pytest.raises(DataError, match="1 of 6 volumes have no label map"):
        compare_folders(
            real / "images", fewer / "images", Modality.MR, labels=fewer / "labels", real_labels=fewer / "labels"
        )


def test_refuses_a_map_on_another_grid(real: Path, tmp_path: Path):
    moved = fill(tmp_path, 4, affine=LPS)
    with pytest.raises(GeometryError, match="another grid"):
        compare_folders(
            real / "images", moved / "images", Modality.MR, labels=real / "labels", real_labels=real / "labels", steps=1
        )


@pytest.mark.parametrize("value", [np.nan, 3.0])
def test_a_volume_without_contrast_is_named(real: Path, tmp_path: Path, value: float):
    made = fill(tmp_path, 6)
    write_nifti(made / "images" / "v2.nii.gz", np.full((9, 9, 9), value, np.float32), Geometry(RAS, (9, 9, 9)))
    with pytest.raises(DataError, match=r"^v2\.nii\.gz of the synthetic volumes: "):
        compare_folders(real / "images", made / "images", Modality.MR)


def test_two_volumes_of_one_name_are_refused(real: Path, tmp_path: Path):
    made = fill(tmp_path, 7)
    write_nifti(made / "images" / "v2.nii", np.zeros((9, 9, 9), np.float32), Geometry(RAS, (9, 9, 9)))
    with pytest.raises(DataError, match=r"v2\.nii and v2\.nii\.gz"):
        compare_folders(real / "images", made / "images", Modality.MR)


def test_too_few_volumes_are_refused_before_anything_is_trained(real: Path, tmp_path: Path):
    few = fill(tmp_path, 5, count=3)
    with pytest.raises(DataError, match="only 3 synthetic"):
        compare_folders(
            real / "images", few / "images", Modality.MR, labels=few / "labels", real_labels=real / "labels"
        )
