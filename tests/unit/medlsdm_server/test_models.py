from __future__ import annotations

import json

import pytest

from medlsdm.checks import file_digest
from medlsdm.errors import DataError
from medlsdm_server import models
from medlsdm_server.status import launch_status, server_status


def write(home, name, created, weights=b"1234"):
    folder = home.models / name
    folder.mkdir()
    (folder / "card.json").write_text(json.dumps({"created": created}))
    (folder / "denoiser.safetensors").write_bytes(weights)
    return folder


def test_models_are_listed_oldest_first(home):
    write(home, "b.stage2-0001", "2026-01-03")
    write(home, "a.stage1-0002", "2026-01-02")
    write(home, "a.stage1-0001", "2026-01-01")
    found = models.list_models(home.models)
    assert [m.id for m in found] == ["a.stage1-0001", "a.stage1-0002", "b.stage2-0001"]
    assert (found[-1].launch, found[-1].stage, found[-1].round) == ("b", "stage2", 1)
    assert found[-1].digest == file_digest(home.models / "b.stage2-0001/card.json")
    assert found[-1].size_bytes == 4 + len('{"created": "2026-01-03"}')


def test_what_is_not_finished_is_not_listed(home):
    (write(home, "a.stage2-0001", "2026") / "card.json").unlink()
    write(home, ".a.stage2-0002", "2026")
    write(home, "other", "2026")
    (home.models / "a.stage2-0003").write_text("a file")
    assert models.list_models(home.models) == []
    assert models.latest(home.models) is None


def test_the_newest_of_stage_2_is_the_model(home):
    write(home, "a.stage2-0001", "2026-01-01")
    write(home, "a.stage2-0002", "2026-01-02")
    write(home, "b.stage1-0001", "2026-01-03")
    assert models.latest(home.models).id == "a.stage2-0002"
    assert server_status(home)["model"]["id"] == "a.stage2-0002"


@pytest.mark.parametrize("number", [1, 9999, 10_000])
def test_the_name_of_every_round_is_found_again(home, number):
    write(home, models.checkpoint_id("a", "stage2", number), "2026")
    assert models.latest(home.models).round == number


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("a.stage2-0001", "../../server.json"), ("..", "server.json"), ("a.stage2-0001/../..", "server.json"),
        ("a.stage2-0001", "autoencoder.safetensors"), ("a.stage2-0001", ""), ("", "card.json"),
        ("a.stage2-0001\n", "card.json"), ("a.stage2-\u0660\u0660\u0660\u0661", "card.json"), ("/etc", "card.json"),
    ],
)  # fmt: skip
def test_no_other_file_has_a_path(home, model, name):
    folder = write(home, "a.stage2-0001", "2026")
    assert models.file_of(home.models, "a.stage2-0001", "card.json") == folder / "card.json"
    with pytest.raises(DataError):
        models.file_of(home.models, model, name)


def test_a_new_coordinator_has_no_launch(home):
    assert server_status(home) == {"running": None, "sites": [], "launch": None, "model": None}
    assert launch_status(home, "none")["state"] == "interrupted"
