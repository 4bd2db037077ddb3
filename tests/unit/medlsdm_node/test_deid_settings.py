"""deid.yaml: strict by default, checked when it is read, and what is weaker is never silent."""

from __future__ import annotations

import stat

import pytest

from medlsdm.errors import ConfigError
from medlsdm_node.deid_settings import DEFAULT_DEID, FILE_NAME, DeidSettings, load_deid
from medlsdm_node.home import NodeHome
from medlsdm_node.status import node_status


def write(home: NodeHome, **changes: str) -> None:
    lines = [f"{line.split(':')[0]}: {changes.get(line.split(':')[0], line.split(':', 1)[1])}"
             for line in DEFAULT_DEID.splitlines() if not line.startswith("#")]  # fmt: skip
    (home.root / FILE_NAME).write_text("\n".join(lines))


def test_init_writes_the_strict_choices(home):
    path = home.root / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rules = load_deid(home)
    assert rules.settings == DeidSettings()
    assert rules.weaker == ()
    policy = rules.policy()
    assert (policy.text, policy.faces, policy.rules, policy.pictures) == ("blank", True, None, None)
    path.unlink()
    assert load_deid(home) == rules
    assert path.read_text() == DEFAULT_DEID


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "everything"}, "no de-identification recipe"),
        ({"options": "[modified-dates]"}, "Options belong to the recipe basic"),
        ({"recipe": "basic", "options": "[birthday]"}, "no such option"),
        ({"recipe": "own.dicom"}, "no de-identification recipe"),
        ({"text": "leave"}, r"deid.yaml cannot be read \(text\)"),
        ({"faces": "blur"}, r"deid.yaml cannot be read \(faces\)"),
        ({"device_rules": "rules.yaml"}, "device rules cannot be read"),
        ({"workers": "0"}, r"deid.yaml cannot be read \(workers\)"),
        ({"workers": "2\ncolour: red"}, r"deid.yaml cannot be read \(colour\)"),
        ({"workers": "["}, "it is not YAML"),
    ],
)
def test_a_mistake_is_one_clear_line(home, changes, words):
    write(home, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        load_deid(home)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "recipe: allow-list\ntext: blank\n", "- recipe\n"])
def test_a_file_cut_short_does_not_become_another(home, text):
    (home.root / FILE_NAME).write_text(text)
    with pytest.raises(ConfigError, match=r"deid\.yaml cannot be read"):
        load_deid(home)


def test_the_digest_follows_what_changes_the_result(home):
    before = load_deid(home).digest
    write(home, workers="4")
    assert load_deid(home).digest == before
    digests = {before}
    rule = "- {name: a, modality: CT, action: blank, boxes: [[0, 0, 9, 9]]}\n"
    (home.root / "rules.yaml").write_text(rule)
    for changes in ({"faces": "keep"}, {"text": "quarantine"}, {"recipe": "basic"}, {"device_rules": "rules.yaml"}):
        write(home, **changes)
        digests.add(load_deid(home).digest)
    (home.root / "rules.yaml").write_text(rule.replace("9, 9", "9, 8"))
    digests.add(load_deid(home).digest)
    assert len(digests) == 6


def test_what_is_weaker_shows_in_the_status(home):
    assert node_status(home)["deidentification"]["weaker"] == []
    write(home, recipe="basic", options="[modified-dates, safe-private]", faces="keep")
    found = node_status(home)["deidentification"]
    assert found["recipe"] == "basic + modified-dates + safe-private"
    assert len(found["weaker"]) == 4
    assert "faces in head scans stay" in found["weaker"]
    write(home, faces="blur")
    assert "faces" in node_status(home)["deidentification"]["error"]
