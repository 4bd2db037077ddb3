"""Our volumes against dcm2niix's on real series, clean and damaged: right or refused, never wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / "shared" / "data" / "dicom"

spec = importlib.util.spec_from_file_location("geometry_benchmark", REPO / "tests" / "benchmarks" / "geometry.py")
assert spec is not None
assert spec.loader is not None
geometry = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = geometry
spec.loader.exec_module(geometry)


@pytest.mark.real_data
@pytest.mark.parametrize("case", geometry.cases(), ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_agrees_with_dcm2niix_or_refuses(case):
    if not DATA.is_dir():
        pytest.skip("the real data folder is not beside the checkout")
    row = geometry.compare(case, DATA)
    assert row.good, f"{row.verdict}: ours {row.ours}; dcm2niix {row.dcm2niix}"
