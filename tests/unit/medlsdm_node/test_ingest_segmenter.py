"""Scans without label maps come in labelled by the segmenter that the site chooses."""

from __future__ import annotations

import numpy as np
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.config import load_schema
from medlsdm.errors import ConfigError, QuarantineError
from medlsdm.types import Geometry, Modality, SemanticMap
from medlsdm.volumes import write_nifti
from medlsdm_node.home import NodeHome, NodeSettings
from medlsdm_node.ingest import ingest
from medlsdm_node.vault import Vault


@pytest.fixture
def unlabelled(tmp_path, without_tesseract):
    grid = Geometry(np.diag([2.0, 2.0, 4.0, 1.0]), (24, 22, 5))
    array = np.full(grid.shape, -1000.0)
    array[4:20, 4:18] = 40
    array[10:14, 8:12] = 500
    values = np.zeros(grid.shape, np.uint8)
    values[5, 5, 2] = 1
    labels = SemanticMap(values, grid, load_schema("procedural"))
    write_planted_study(array, grid, Modality.CT, labels, tmp_path / "in", seed=4, hospital="Eastgate")
    next((tmp_path / "in").rglob("*SEG.dcm")).unlink()
    home = NodeHome(tmp_path / "node")
    home.create(NodeSettings(site="site-a", labels=load_schema("tissues").to_json()))
    return home, tmp_path / "in"


def test_a_segmenter_labels_what_came_without_labels(unlabelled):
    home, folder = unlabelled
    with pytest.raises(QuarantineError, match="no label map"):
        ingest(home, folder)
    assert ingest(home, folder, segmenter="hu-thresholds").pairs == 1
    ((scan, labels),) = Vault(home).pairs()
    assert (labels.array == 5).sum() == 4 * 4 * 5
    np.testing.assert_array_equal(labels.array == 4, scan.array == 40)
    last = (home.root / "audit.jsonl").read_text().splitlines()[-1]
    assert "hu-thresholds" in last


def test_no_segmenter_stands_in_for_a_label_map_that_is_held(unlabelled):
    home, folder = unlabelled
    grid = Geometry(np.diag([2.0, 2.0, 4.0, 1.0]), (24, 22, 5))
    scan = np.full(grid.shape, 77, np.uint8)  # a value that the schema does not know
    write_nifti(next(folder.rglob("*.dcm")).parent / "labels.nii.gz", scan, grid)
    with pytest.raises(QuarantineError, match="own label map is held"):
        ingest(home, folder, segmenter="hu-thresholds")
    assert list(Vault(home).pairs()) == []


def test_an_unknown_segmenter_stops_before_anything_is_read(unlabelled):
    home, folder = unlabelled
    with pytest.raises(ConfigError, match="no segmenter 'nnunet'"):
        ingest(home, folder, segmenter="nnunet")
