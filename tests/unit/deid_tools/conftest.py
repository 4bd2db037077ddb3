from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deid_tools.keys import SiteKeys
from deid_tools.plant import write_planted_study
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, SemanticMap

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
OBLIQUE = np.array([[0.9, 0.1, 0.0, -20.0], [-0.1, 0.9, 0.0, 3.0], [0.0, 0.0, 2.5, 7.0], [0.0, 0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Study:
    source: Path
    tokens: list[str]
    labels: SemanticMap
    schema: LabelSchema
    array: np.ndarray


@pytest.fixture
def data() -> Path:
    if not (DATA / "dicom").is_dir():
        pytest.skip("the real data folder is not beside the checkout")
    return DATA


@pytest.fixture(scope="session")
def keys() -> SiteKeys:
    return SiteKeys.derive(bytes(range(32)), "test")


@pytest.fixture(scope="session")
def schema() -> LabelSchema:
    return LabelSchema(
        "organs", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004"), LabelClass(2, "Geschwür"))
    )


@pytest.fixture
def study(tmp_path: Path, schema: LabelSchema) -> Study:
    return plant(tmp_path / "hospital", schema)


def plant(folder: Path, schema: LabelSchema, *, seed: int = 1, modality: Modality = Modality.CT) -> Study:
    geometry = Geometry(OBLIQUE, (20, 16, 8))
    array = np.random.default_rng(seed).normal(0, 300, geometry.shape).round().astype(np.float32)
    values = np.zeros(geometry.shape, np.uint8)
    values[4:9, 5:10, 3:7] = 1
    values[10:14, 5:10, 3:8] = 2
    labels = SemanticMap(values, geometry, schema)
    tokens = write_planted_study(array, geometry, modality, labels, folder, seed=seed, hospital="Northgate")
    return Study(folder, tokens, labels, schema, array)
