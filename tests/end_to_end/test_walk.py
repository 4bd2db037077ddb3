"""The whole walk on real pairs: DICOM with planted identifiers, three nodes over TLS, rounds, gate, export."""

import json
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from medlsdm.volumes import list_nifti, read_nifti
from medlsdm_node.demo.leaks import search

REPO = Path(__file__).parents[2]
FOLDER = REPO.parent / "shared" / "data" / "hippocampus"
PROGRAMS = Path(sysconfig.get_path("scripts"))
PER_SITE = 12

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data folder is not beside the checkout"),
]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """Deal 36 real pairs to three hospitals and run the demo on them, briefly trained."""
    root = tmp_path_factory.mktemp("walk")
    data = root / "hippocampus"
    sites = {site: names[:PER_SITE] for site, names in json.loads((FOLDER / "sites.json").read_text()).items()}
    for kind in ("images", "labels"):
        (data / kind).mkdir(parents=True)
        for name in (n for names in sites.values() for n in names):
            (data / kind / f"{name}.nii.gz").symlink_to(FOLDER / kind / f"{name}.nii.gz")
    (data / "sites.json").write_text(json.dumps(sites))
    plan = root / "brief.yaml"
    plan.write_text("preset: tiny\nstage1: {rounds: 1, steps: 400}\nstage2: {rounds: 1, steps: 250}\n")
    done = subprocess.run(
        [PROGRAMS / "medlsdm-node", "demo", "--data", data, "--plan", plan, "--out", root / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(p for p in (root / "out").iterdir() if p.is_dir())


def test_every_site_trained_and_some_volumes_left(walked):
    result = json.loads((walked / "demo.json").read_text())
    assert {g["site"] for g in result["gates"]} == {"site-a", "site-b", "site-c"}
    assert sum(g["passed"] for g in result["gates"]) > 0
    assert result["leaks"] == 0


def test_what_left_is_marked_synthetic_on_the_label_maps_grid_and_verifies(walked):
    import pydicom

    checked = 0
    for hospital in sorted((walked / "hospitals").iterdir()):
        export = hospital / "export"
        if not export.exists():
            continue
        for path in list_nifti(export / "volumes"):
            volume, geometry = read_nifti(path)
            labels, grid = read_nifti(export / "labels" / path.name)
            assert geometry.matches(grid)
            assert np.isfinite(volume).all()
            assert volume.std() > 0
            assert set(np.unique(labels)) <= {0, 1, 2}
            checked += 1
        for path in (export / "dicom").rglob("*.dcm"):
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            assert ds.SyntheticData == "YES"
            assert str(ds.PatientName).startswith("SYNTHETIC")
        node = ["--home", hospital / "node", "--json"]
        done = subprocess.run([PROGRAMS / "medlsdm-node", "audit", export, *node], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert checked > 0


def test_no_planted_identifier_is_anywhere_but_in_the_pacs(walked):
    hospitals = sorted((walked / "hospitals").iterdir())
    tokens = [t for h in hospitals for t in json.loads((h / "planted.json").read_text())]
    assert len(tokens) > 500
    roots = [walked / "coordinator", walked / "logs", *(h / p for h in hospitals for p in ("node", "export"))]
    assert search([r for r in roots if r.exists()], tokens).found == ()
    assert search([hospitals[0] / "incoming"], tokens).found, "the search must find what was planted"


def test_report_and_picture_are_there_and_stand_alone(walked):
    page = (walked / "report.html").read_text()
    assert (walked / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
