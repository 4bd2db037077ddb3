from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from medlsdm.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from medlsdm.errors import ConfigError, DataError, IntegrityError
from medlsdm.model_card import ModelCard


@pytest.fixture
def folder(checkpoint, tmp_path):
    save_checkpoint(
        tmp_path / "run",
        preset=checkpoint.preset,
        schema=checkpoint.schema,
        modalities=checkpoint.modalities,
        autoencoder=checkpoint.autoencoder,
        denoiser=checkpoint.denoiser,
        sites=["north", "south"],
        rounds=3,
    )
    return tmp_path / "run"


def test_loads_what_was_saved(checkpoint, folder):
    loaded = load_checkpoint(folder)
    assert loaded.card.sites == ("north", "south")
    assert loaded.schema.digest == checkpoint.schema.digest
    assert loaded.preset == checkpoint.preset
    assert loaded.card.checkpoint_digest == checkpoint.card.checkpoint_digest
    assert all(loaded.autoencoder[key].equal(value) for key, value in checkpoint.autoencoder.items())
    loaded.build_autoencoder(), loaded.build_denoiser()
    assert "No formal guarantee" in (folder / "card.md").read_text()


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "denoiser.safetensors", "card.json"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_finds_one_changed_byte(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "denoiser.safetensors", "card.json"])
def test_names_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match="is missing"):
        load_checkpoint(folder)


def test_refuses_weights_of_another_schema(checkpoint):
    fewer = type(checkpoint.schema)("fewer", checkpoint.schema.classes[:3])
    other = Checkpoint(
        checkpoint.preset, fewer, checkpoint.modalities, checkpoint.autoencoder, checkpoint.denoiser, checkpoint.card
    )
    with pytest.raises(ConfigError, match="do not fit"):
        other.build_autoencoder()


def test_a_whole_card_of_an_unknown_architecture_is_no_damage(checkpoint):
    data = checkpoint.card.model_dump(mode="json") | {"preset": {"name": "of a later version"}}
    text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    data["digest"] = hashlib.sha256(text).hexdigest()
    content = json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(ConfigError, match="does not know"):
        ModelCard.from_json_bytes(content)


def test_a_site_s_own_names_do_not_travel_in_a_card(checkpoint, tmp_path):
    first, *rest = checkpoint.schema.classes
    schema = replace(checkpoint.schema, classes=(replace(first, aliases=("Dr Meier 3", "*")), *rest))
    save_checkpoint(
        tmp_path / "run",
        preset=checkpoint.preset,
        schema=replace(schema, priority=(rest[0].name,)),
        modalities=checkpoint.modalities,
        autoencoder=checkpoint.autoencoder,
    )
    assert load_checkpoint(tmp_path / "run").schema == checkpoint.schema
    assert b"Meier" not in b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
