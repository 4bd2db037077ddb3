from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from deid_tools.pipeline import deidentify, read_pairs
from deid_tools.segmenters import BUILT_IN, Segments, apply, load_segmenter, segmenter_names
from medlsdm.config import load_schema
from medlsdm.errors import ConfigError, DataError, SchemaError
from medlsdm.types import Geometry, LabelClass, LabelSchema, Modality, Scan

GRID = Geometry(np.diag([2.0, 2.0, 4.0, 1.0]), (40, 36, 6))
BOXES = LabelSchema("boxes", (LabelClass(0, "background"), LabelClass(1, "bright box", "10200004")))


def phantom() -> Scan:
    """Return a body of soft tissue in air, with fat, lung, bone, gas, and a couch beside it."""
    array = np.full(GRID.shape, -1000.0, np.float32)
    array[6:32, 6:28] = 40
    array[6:9, 6:28] = -100
    array[12:18, 10:20] = -800
    array[22:26, 10:14] = 600
    array[22:26, 18:22] = -990
    array[4:36, 32:34] = 100
    return Scan(array, GRID, Modality.CT, "P")


def test_thresholds_find_the_tissues_inside_the_body():
    labels = apply(load_segmenter("hu-thresholds"), phantom(), load_schema("tissues"), Path("/tmp"))
    expected = np.zeros(GRID.shape, np.uint8)
    expected[6:32, 6:28] = 4
    expected[6:9, 6:28] = 3
    expected[12:18, 10:20] = 2
    expected[22:26, 10:14] = 5
    expected[22:26, 18:22] = 1
    np.testing.assert_array_equal(labels.array, expected)


def test_thresholds_refuse_what_is_not_ct_and_leave_air_alone():
    mr = Scan(phantom().array, GRID, Modality.MR, "P")
    with pytest.raises(DataError, match="CT only"):
        apply(load_segmenter("hu-thresholds"), mr, load_schema("tissues"), Path("/tmp"))
    air = Scan(np.full(GRID.shape, -1000), GRID, Modality.CT, "P")
    assert not apply(load_segmenter("hu-thresholds"), air, load_schema("tissues"), Path("/tmp")).array.any()


def test_structures_that_the_schema_lacks_are_listed_unless_the_background_takes_them(tmp_path):
    lung = LabelSchema("lungs", (LabelClass(0, "background"), LabelClass(1, "lungs", "39607008")))
    with pytest.raises(SchemaError, match=r"4 structures .* air, fat, soft tissue, bone"):
        apply(load_segmenter("hu-thresholds"), phantom(), lung, tmp_path)
    rest = LabelSchema("lungs", (LabelClass(0, "background", aliases=("*",)), lung.classes[1]))
    found = apply(load_segmenter("hu-thresholds"), phantom(), rest, tmp_path).array
    assert found.sum() == 6 * 10 * 6


PLUG_IN = """\
import numpy as np
from deid_tools.segmenters import Segments

class Bright:
    def __init__(self, argument):
        if argument == "broken":
            raise RuntimeError("Anna")
        self.argument = argument

    def segment(self, scan, folder):
        (folder / "scratch").write_text("x")
        if self.argument == "fail":
            raise RuntimeError("Anna's scan is odd")
        if self.argument == "shape":
            return Segments(np.zeros((2, 2, 2), int), {})
        if self.argument == "nameless":
            return Segments((scan.array > 0).astype(int), {})
        return Segments((scan.array > 0).astype(int) * 7, {7: ("Bright_Box", "")})
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a distribution that offers a segmenter, as pip would."""
    site = tmp_path / "site"
    (site / "bright-1.0.dist-info").mkdir(parents=True)
    (site / "bright_segmenter.py").write_text(PLUG_IN)
    (site / "bright-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: bright\nVersion: 1.0\n")
    (site / "bright-1.0.dist-info" / "entry_points.txt").write_text(
        "[medlsdm.segmenters]\nbright = bright_segmenter:Bright\nhu-thresholds = bright_segmenter:Bright\n"
    )
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("bright_segmenter", None)


@pytest.mark.usefixtures("plug_in")
def test_a_plug_in_is_found_by_its_entry_point(tmp_path):
    assert set(segmenter_names()) >= {"bright", *BUILT_IN}
    work = tmp_path / "work"
    work.mkdir()
    labels = apply(load_segmenter("bright"), phantom(), BOXES, work)
    np.testing.assert_array_equal(labels.array, phantom().array > 0)
    assert list(work.iterdir()) == []


@pytest.mark.usefixtures("plug_in")
def test_a_plug_in_cannot_take_a_built_in_name_or_quote_what_it_saw(tmp_path):
    assert type(load_segmenter("hu-thresholds")).__name__ == "HuThresholds"
    with pytest.raises(ConfigError) as loading:
        load_segmenter("bright=broken")
    with pytest.raises(DataError, match="failed on this scan") as running:
        apply(load_segmenter("bright=fail"), phantom(), BOXES, tmp_path)
    for caught in (loading, running):
        assert "Anna" not in str(caught.value)
        assert caught.value.__suppress_context__
    with pytest.raises(DataError, match="on the scan's grid"):
        apply(load_segmenter("bright=shape"), phantom(), BOXES, tmp_path)
    with pytest.raises(SchemaError, match="value 1"):
        apply(load_segmenter("bright=nameless"), phantom(), BOXES, tmp_path)


def test_an_unknown_name_says_what_is_known():
    with pytest.raises(ConfigError, match="hu-thresholds, monai-bundle, totalsegmentator"):
        load_segmenter("nnunet")
    with pytest.raises(ConfigError, match="takes no folder"):
        load_segmenter("hu-thresholds=/tmp")


def test_only_a_series_without_labels_is_segmented(study, tmp_path, keys, schema):
    next(study.source.rglob("*SEG.dcm")).unlink()
    report = deidentify(study.source, tmp_path / "out", keys, schema=schema)

    class Halves:
        def segment(self, scan, folder):
            return Segments((np.indices(scan.array.shape)[0] > 9).astype(np.uint8), {1: ("liver", "")})

    (pair,) = read_pairs(tmp_path / "out", schema, segmenter=Halves())
    assert pair.reason == ""
    assert pair.labels is not None
    assert (pair.labels.array[10:] == 1).all()
    assert not pair.labels.array[:10].any()
    (kept,) = read_pairs(tmp_path / "out", schema, segmenter=Halves(), held={report.series[0].token})
    assert kept.labels is None


def test_adapters_refuse_in_one_line_where_something_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(ConfigError, match=r"not installed\. Run: pip install 'medlsdm\[totalsegmentator\]'"):
        load_segmenter("totalsegmentator=/weights")
    for text in ("monai-bundle", f"monai-bundle={tmp_path}"):
        with pytest.raises(ConfigError, match="no MONAI bundle to use"):
            load_segmenter(text)
    write_bundle(tmp_path / "bundle", channels={})
    with pytest.raises(ConfigError, match=r"what its numbers mean|not installed"):
        load_segmenter(f"monai-bundle={tmp_path / 'bundle'}")


STAND_IN = """\
#!{python}
import json, os, sys
import nibabel as nib
import numpy as np
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
settings = json.load(open(os.path.join(os.environ["TOTALSEG_HOME_DIR"], "config.json")))
assert settings["send_usage_stats"] is False
assert os.listdir(os.environ["TOTALSEG_WEIGHTS_PATH"]) == ["Dataset297"]
assert os.environ["HTTPS_PROXY"].endswith(":9")
assert sys.argv[5:] == ["--ml", "--task", "total", "--quiet"], sys.argv
image = nib.load(options["-i"])
answer = nib.Nifti1Image((image.get_fdata() > 0).astype(np.uint8) * 5, image.affine)
answer.header.extensions.append(nib.nifti1.Nifti1Extension(0, {extension!r}))
nib.save(answer, options["-o"])
"""
EXTENSION = (
    b'<LabelTable><Label Key="5" Red="1.0" Green="0" Blue="0" Alpha="1"><![CDATA[bright_box]]></Label></LabelTable>'
)


def test_totalsegmentator_is_run_offline_on_the_sites_weights(tmp_path, monkeypatch):
    """A stand-in keeps to TotalSegmentator 2's command line, settings and answer; the adapter must serve it."""
    programs, weights, work = tmp_path / "bin", tmp_path / "weights", tmp_path / "work"
    for folder in (programs, weights, work, weights / "Dataset297"):
        folder.mkdir()
    program = programs / "TotalSegmentator"
    program.write_text(STAND_IN.format(python=sys.executable, extension=EXTENSION))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    labels = apply(load_segmenter(f"totalsegmentator={weights}"), phantom(), BOXES, work)
    np.testing.assert_array_equal(labels.array, phantom().array > 0)
    assert list(work.iterdir()) == []
    with pytest.raises(ConfigError, match="no weights"):
        load_segmenter(f"totalsegmentator={work}")
    with pytest.raises(DataError, match="CT and MR only"):
        apply(load_segmenter(f"totalsegmentator={weights}"), Scan(phantom().array, GRID, Modality.PT, "P"), BOXES, work)


def write_bundle(root: Path, channels: dict[str, str]) -> None:
    """Write a small bundle that MONAI runs: a convolution whose second channel wins where the scan is above 0."""
    config = {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "/nowhere",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": [],
        "load": {"_target_": "LoadImage", "image_only": True, "ensure_channel_first": True},
        "network": {
            "_target_": "torch.nn.Conv3d",
            "in_channels": 1,
            "out_channels": 2,
            "kernel_size": 1,
            "bias": False,
        },
        "weights": "$@network.weight.data.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))",
        "choose": {"_target_": "AsDiscrete", "argmax": True},
        "save": {
            "_target_": "SaveImage",
            "output_dir": "@output_dir",
            "output_postfix": "trans",
            "output_dtype": "uint8",
        },
        "infer": "$lambda path: @save(@choose(@network(@load(path)[None])[0].detach()))",
        "run": ["$@weights", "$list(map(@infer, @datalist))"],
    }
    metadata = {"version": "0.1.0", "network_data_format": {"outputs": {"pred": {"channel_def": channels}}}}
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))


@pytest.mark.slow
def test_a_real_monai_bundle_labels_a_scan(tmp_path):
    pytest.importorskip("monai")
    write_bundle(tmp_path / "bundle", {"0": "background", "1": "bright box"})
    work = tmp_path / "work"
    work.mkdir()
    labels = apply(load_segmenter(f"monai-bundle={tmp_path / 'bundle'}"), phantom(), BOXES, work)
    np.testing.assert_array_equal(labels.array, phantom().array > 0)
    assert list(work.iterdir()) == []
