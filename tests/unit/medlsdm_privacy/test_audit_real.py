"""The copy detector on real MR crops. The bounds are what was measured, less some room for other machines.

Measured with 40 references: plants 120 of 120 here, held-out patients 1 of 90; the table is in medlsdm.privacy.audit.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medlsdm.privacy.audit import PLANTS, CopyDetector, plant_recall
from medlsdm.types import LabelClass, LabelSchema, Modality, Scan, SemanticMap
from medlsdm.volumes import read_nifti

REPO = Path(__file__).parents[3]
FOLDER = REPO.parent / "shared" / "data" / "hippocampus"
SCHEMA = LabelSchema("h", (LabelClass(0, "background"), LabelClass(1, "anterior"), LabelClass(2, "posterior")))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data folder is not beside the checkout"),
]


def pairs(start: int, stop: int) -> Iterator[tuple[Scan, SemanticMap]]:
    names = sorted(name for site in json.loads((FOLDER / "sites.json").read_text()).values() for name in site)
    np.random.default_rng(0).shuffle(names)
    for name in names[start:stop]:
        array, geometry = read_nifti(FOLDER / "images" / f"{name}.nii.gz")
        labels, grid = read_nifti(FOLDER / "labels" / f"{name}.nii.gz")
        yield Scan(array, geometry, Modality.MR, name), SemanticMap(labels, grid, SCHEMA)


@pytest.fixture(scope="module")
def detector() -> CopyDetector:
    return CopyDetector.fit(pairs(0, 40))


def test_every_kind_of_plant_is_caught(detector: CopyDetector):
    result = plant_recall(detector, pairs(0, 40), seed=3, planted=120)
    assert result.planted == 120
    for kind in PLANTS:
        planted, caught = result.kinds[kind]
        assert caught / planted >= 0.95, kind
    assert result.recall_bound >= 0.93


def test_held_out_patients_are_rarely_called_copies(detector: CopyDetector):
    verdicts = detector.check_all(
        (scan.array, scan.geometry, scan.modality, labels.array) for scan, labels in pairs(40, 70)
    )
    assert sum(v.is_copy for v in verdicts) / len(verdicts) <= 0.10
