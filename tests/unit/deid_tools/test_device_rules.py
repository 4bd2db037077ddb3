from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from deid_tools.admit import Refusal
from deid_tools.device_rules import DeviceRules
from medlsdm.errors import ConfigError

RULE = """
- name: banner
  manufacturer: acme
  model: scan 9
  modality: CT
  rows: 64
  action: blank
  boxes: [[0, 0, 10, 100], [60, 0, 70, 20]]
"""


def header(**changes) -> Dataset:
    ds = Dataset()
    ds.Manufacturer, ds.ManufacturerModelName, ds.Modality = "ACME Medical", "Scan 9 plus", "CT"
    ds.Rows, ds.Columns, ds.ImageType = 64, 48, ["ORIGINAL", "PRIMARY"]
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.yaml").write_text(RULE)
    return DeviceRules(tmp_path / "rules.yaml")


def test_a_rule_names_its_boxes_cut_to_the_image(rules):
    assert rules.boxes(header()) == [(0, 0, 10, 48), (60, 0, 64, 20)]


@pytest.mark.parametrize("other", [{"Manufacturer": "Other"}, {"Modality": "MR"}, {"Rows": 128}])
def test_a_rule_needs_every_condition(rules, other):
    assert rules.boxes(header(**other)) == []


def test_the_built_in_rules_hold_captures_and_let_plain_slices_be():
    rules = DeviceRules()
    assert rules.boxes(header()) == []
    with pytest.raises(Refusal, match="device rule"):
        rules.boxes(header(ImageType=["DERIVED", "SECONDARY", "OTHER", "CSA FUSED MPR"]))


@pytest.mark.parametrize(
    "text",
    [
        "name: x",
        "- {name: x, action: blank, modality: CT}",
        "- {name: x, action: blank, boxes: [[0, 0, 1, 1]]}",
        "- {name: x, action: blank, modality: CT, boxes: [[5, 0, 1, 1]]}",
        "- {name: x, action: delete, modality: CT}",
        "- {name: x, action: quarantine, colour: red}",
        "- {action: quarantine, modality: CT}",
        "- [",
    ],
)
def test_rules_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ConfigError):
        DeviceRules(tmp_path / "rules.yaml")
