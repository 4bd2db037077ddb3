from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deid_tools.keys import SiteKeys
from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.plant import write_planted_study
from deid_tools.series import build_scan
from deid_tools.uids import new_uid
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
from medlsdm.volumes import to_ras

KEYS = SiteKeys.derive(b"k" * 32, "p")
SCHEMA = LabelSchema("s", (LabelClass(0, "background"), LabelClass(1, "liver", "10200004"), LabelClass(2, "other")))


@st.composite
def grids(draw: st.DrawFn) -> Geometry:
    spacing = [draw(st.floats(0.4, 3.0)) for _ in range(3)]
    angles = [draw(st.floats(-180, 180)) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    if draw(st.booleans()):
        affine[:3, 0] *= -1
    return Geometry(affine, tuple(draw(st.integers(3, 9)) for _ in range(3)))


@settings(max_examples=30, deadline=None)
@given(geometry=grids(), modality=st.sampled_from(list(Modality)), seed=st.integers(0, 9999))
def test_a_synthetic_series_reads_back_on_any_right_angled_grid(geometry, modality, seed):
    array = np.random.default_rng(seed).normal(0, 500, geometry.shape).astype(np.float32)
    volume = SyntheticVolume(array, geometry, modality, Provenance("a", "b", "c", seed), seal=SYNTHESIS_SEAL)
    with tempfile.TemporaryDirectory() as folder:
        found = [pydicom.dcmread(p) for p in write_synthetic_series(volume, Path(folder) / "out")]
        scan = build_scan(found, "P")
    expected, grid = to_ras(array, geometry)
    assert scan.geometry.matches(grid, 1e-2)
    step = float(found[0].get("RescaleSlope", 1))
    assert np.abs(scan.array - expected).max() <= 0.51 * step + 1e-3


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), modality=st.sampled_from([Modality.CT, Modality.MR]), geometry=grids())
def test_no_planted_token_leaks(monkeypatch: pytest.MonkeyPatch, seed, modality, geometry):
    monkeypatch.setattr("deid_tools.pixels.shutil.which", lambda name: None)
    random = np.random.default_rng(seed)
    labels = SemanticMap(random.integers(0, 3, geometry.shape).astype(np.uint8), geometry, SCHEMA)
    array = random.normal(0, 200, geometry.shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_planted_study(array, geometry, modality, labels, folder / "in", seed=seed, hospital="Southport")
        report = deidentify(folder / "in", folder / "out", KEYS, schema=SCHEMA)
        assert report.held == ()
        for path in (p for p in (folder / "out").rglob("*") if p.is_file()):
            content = str(path.relative_to(folder)).encode() + path.read_bytes()
            assert not [t for t in tokens if t.encode() in content]
        (pair,) = read_pairs(folder / "out", SCHEMA)
    assert pair.reason == ""
    assert pair.labels is not None
    np.testing.assert_array_equal(pair.labels.array, to_ras(labels.array, geometry)[0])


@given(uid=st.from_regex(r"[0-2](\.(0|[1-9][0-9]{0,8})){2,6}", fullmatch=True))
def test_every_new_uid_is_valid_and_stable(uid):
    new = new_uid(KEYS, uid)
    assert pydicom.uid.UID(new).is_valid
    assert new == new_uid(KEYS, uid + "\0")
    assert uid.startswith("1.2.840.10008.") or new.startswith("2.25.")
