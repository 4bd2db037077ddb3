"""Train, go on, synthesise and evaluate as a user would, on procedural anatomy and very few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from medlsdm.anatomy import generate
from medlsdm.config import load_preset
from medlsdm.types import Modality
from medlsdm.volumes import read_nifti, write_nifti


def medlsdm(*arguments: object, expect: int = 0) -> tuple[dict, str]:
    command = [sys.executable, "-m", "medlsdm.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("single")
    for seed in range(6):
        scan, labels = generate(seed, Modality.MR, (17, 19, 14))
        write_nifti(root / "data/images" / f"p{seed}.nii.gz", scan.array, scan.geometry)
        write_nifti(root / "data/labels" / f"p{seed}.nii.gz", labels.array, labels.geometry)
    preset = load_preset("tiny").model_dump(mode="json")
    preset["name"] = "moment"
    preset["stage1"] |= {"steps": 6, "save_every": 4}
    preset["stage2"] |= {"steps": 5, "save_every": 4}
    preset["texture"] |= {"steps": 3, "save_every": 4}
    (root / "moment.yaml").write_text(yaml.safe_dump(preset))
    return root


def test_from_pairs_to_an_evaluated_synthetic_set(workplace):
    train = (
        "train", "--data", workplace / "data", "--out", workplace / "run", "--preset", workplace / "moment.yaml",
        "--schema", "procedural", "--threads", 1,
    )  # fmt: skip
    made, _ = medlsdm(*train)
    assert made["steps"] == {"stage 1": 6, "stage 2": 5, "texture": 3}
    again, err = medlsdm(*train)
    assert again["card_digest"] == made["card_digest"]
    assert "step" not in err
    assert len((workplace / "run/losses.csv").read_text().splitlines()) == 15
    medlsdm(*train, "--seed", 1, expect=4)

    made, _ = medlsdm(
        "synthesise", "--checkpoint", workplace / "run", "--labels", workplace / "data/labels", "--out",
        workplace / "synthetic", "--threads", 1,
    )  # fmt: skip
    assert [row["file"] for row in made["volumes"]] == [f"p{seed}.nii.gz" for seed in range(6)]
    for seed in range(6):
        array, geometry = read_nifti(workplace / "synthetic" / f"p{seed}.nii.gz")
        _, expected = read_nifti(workplace / "data/labels" / f"p{seed}.nii.gz")
        assert geometry.matches(expected)
        assert np.isfinite(array).all()
        assert array.std() > 0

    found, _ = medlsdm("evaluate", "--real", workplace / "data/images", "--synthetic", workplace / "synthetic")
    assert found["real_count"] == found["synthetic_count"] == 6
    assert found["fid"] > found["fid_floor"]

    weights = workplace / "run/denoiser.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    medlsdm(
        "synthesise", "--checkpoint", workplace / "run", "--labels", workplace / "data/labels", "--out",
        workplace / "more", expect=8,
    )  # fmt: skip
