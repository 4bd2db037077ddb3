from __future__ import annotations

import subprocess
import sys

import pytest

from medlsdm.config import load_preset, load_schema, parse_preset, schema_of_values
from medlsdm.errors import ConfigError, SchemaError


def test_importing_config_anatomy_and_cli_leaves_torch_out():
    code = "import sys, medlsdm.cli, medlsdm.config, medlsdm.anatomy, medlsdm.model_card; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tiny_loads_and_its_digest_follows_its_settings():
    tiny = load_preset("tiny")
    assert tiny.autoencoder.latent_channels == 6
    assert tiny.digest == load_preset("tiny").digest
    assert tiny.digest != tiny.scaled(0.5).digest


def test_refuses_unknown_names_with_the_known_ones():
    with pytest.raises(ConfigError, match="tiny"):
        load_preset("huge")
    with pytest.raises(ConfigError, match="no preset"):
        load_preset("../presets/tiny")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surplus",), 1),
        (("autoencoder", "strides"), (4, 4, 3)),
        (("autoencoder", "channels"), (32,)),
        (("window",), (41, 56, 40)),
        (("stage1", "batch"), 0),
        (("window",), (0, 0, 0)),
        (("window",), (40, -56, 40)),
        (("stage1", "crop"), (0, 8, 8)),
        (("autoencoder", "channels"), ()),
        (("autoencoder", "channels"), (32, 0)),
        (("denoiser", "channels"), ()),
        (("denoiser", "channels"), (0, 64)),
        (("sampling", "guidance"), float("inf")),
        (("stage1", "learning_rate"), float("nan")),
    ],
)
def test_refuses_settings_that_do_not_fit(path, value):
    data = load_preset("tiny").model_dump()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError):
        parse_preset(data)


def test_refuses_attention_that_cannot_be_built_and_no_other():
    from medlsdm.models.attention import Attention

    for width in range(8, 200, 4):
        for place, channels in ((1, (width, 64)), (2, (64, width))):
            data = load_preset("tiny").model_dump()
            data["denoiser"] |= {"channels": channels, "attention": 1}
            try:
                Attention(width)
                fits = True
            except ValueError:
                fits = False
            if fits or place == 1:
                assert parse_preset(data).denoiser.channels == channels
            else:
                with pytest.raises(ConfigError, match=f"attention over {width} channels"):
                    parse_preset(data)


def test_schemas_load_and_values_make_one():
    assert load_schema("hippocampus").ids == (0, 1, 2)
    assert len(load_schema("procedural").ids) == 12
    assert schema_of_values({0, 3, 7}).by_id(7).name == "label 7"
    with pytest.raises(SchemaError):
        schema_of_values({0})
