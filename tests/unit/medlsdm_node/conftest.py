from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.config import load_schema
from medlsdm.types import SYNTHESIS_SEAL, Geometry, Modality, Provenance, Scan, SemanticMap, SyntheticVolume
from medlsdm_node.home import NodeHome, NodeSettings
from medlsdm_node.vault import Vault

GRID = Geometry(np.diag([1.0, 1.0, 2.0, 1.0]), (9, 8, 7))


def new_home(root: Path, site: str = "site-a") -> NodeHome:
    home = NodeHome(root)
    home.create(NodeSettings(site=site, labels=load_schema("procedural").to_json()))
    return home


@pytest.fixture
def home(tmp_path: Path) -> NodeHome:
    return new_home(tmp_path / "node")


@pytest.fixture
def vault(home: NodeHome) -> Vault:
    return Vault(home)


@pytest.fixture
def pair() -> tuple[Scan, SemanticMap]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 11, GRID.shape).astype(np.uint8)
    scan = Scan(rng.normal(0, 500, GRID.shape), GRID, Modality.MR, "P-0123")
    return scan, SemanticMap(labels, GRID, load_schema("procedural"))


@pytest.fixture
def synthetic(pair: tuple[Scan, SemanticMap]) -> SyntheticVolume:
    array = np.random.default_rng(4).normal(0, 1, GRID.shape).astype(np.float32)
    origin = Provenance("c" * 64, "d" * 64, pair[1].digest, 5)
    return SyntheticVolume(array, GRID, Modality.MR, origin, seal=SYNTHESIS_SEAL)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> list[pydicom.Dataset]:
    """One patient's series of eight images and its DICOM SEG, full of identifiers."""
    folder = tmp_path_factory.mktemp("study")
    scan, labels = generate(5, Modality.MR, (16, 20, 8))
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=5, hospital="Northgate")
    read = [pydicom.dcmread(p) for p in sorted(folder.rglob("*")) if p.is_file()]
    return sorted(read, key=lambda ds: (ds.Modality, int(ds.get("InstanceNumber") or 0)))


def content(ds: pydicom.Dataset) -> bytes:
    """Return a data set as a DICOM file."""
    with io.BytesIO() as stream:
        ds.save_as(stream)
        return stream.getvalue()


def changed(ds: pydicom.Dataset) -> pydicom.Dataset:
    """Return a copy with one bit of its pixels turned."""
    other = copy.deepcopy(ds)
    other.PixelData = bytes([ds.PixelData[0] ^ 1]) + ds.PixelData[1:]
    return other
