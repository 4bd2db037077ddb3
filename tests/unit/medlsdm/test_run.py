from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medlsdm.checkpoints import load_checkpoint
from medlsdm.errors import ConfigError, DataError, IntegrityError, SchemaError
from medlsdm.training.patients import TrainingSet
from medlsdm.training.run import RESUME, TrainingRun

WEIGHTS = ("autoencoder.safetensors", "denoiser.safetensors")


def short(preset, steps1: int = 5, steps2: int = 5, every: int = 2):
    return preset.model_copy(
        update={
            "stage1": preset.stage1.model_copy(update={"steps": steps1, "save_every": every}),
            "stage2": preset.stage2.model_copy(update={"steps": steps2, "save_every": every}),
        }
    )


def rows_of(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from medlsdm.anatomy import generate
from medlsdm.config import parse_preset
from medlsdm.training.patients import prepare
from medlsdm.training.run import TrainingRun
from medlsdm.types import Modality
import json
torch.set_num_threads(1)
folder, preset, stop = Path(sys.argv[1]), parse_preset(json.loads(Path(sys.argv[2]).read_text())), sys.argv[3]
kinds = [Modality.CT, Modality.MR, Modality.CT, Modality.MR]
data = prepare([generate(seed, kind, (18, 22, 17)) for seed, kind in enumerate(kinds)], preset)
def note(progress):
    if f"{progress.stage} {progress.step}" == stop:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingRun(folder, preset, data, seed=4, progress=note).train()
"""


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, preset, data):
    settings = short(preset)
    whole = TrainingRun(tmp_path / "whole", settings, data, seed=4)
    whole.train()
    (tmp_path / "preset.json").write_text(settings.model_dump_json())
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), str(tmp_path / "preset.json")]
    # Within the first slice; on a slice's last step, before it is saved; on the first after a save; in stage 2.
    for stop in ("stage 1 1", "stage 1 4", "stage 2 1", "stage 2 5", "never"):
        done = subprocess.run([*words, stop], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == (0 if stop == "never" else -signal.SIGKILL)
    for name in (*WEIGHTS, RESUME):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    rows = [rows_of(tmp_path / run / "losses.csv") for run in ("whole", "killed")]
    assert len(rows[0]) == 11
    assert [row[:5] for row in rows[0]] == [row[:5] for row in rows[1]]


def test_the_optimiser_state_holds_every_step_counter(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 3, 2), data, seed=0).train()
    again = TrainingRun(tmp_path, short(preset, 3, 2), data, seed=0)
    for name, steps in (("stage 1", 3), ("stage 2", 2)):
        states = again.parts[f"optimiser of {name}"].state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {steps}
        assert any(state["exp_avg"].any() for state in states)


def test_a_kill_between_the_files_of_a_save_is_healed(tmp_path, preset, data):
    settings = short(preset, 4, 2)
    run = TrainingRun(tmp_path, settings, data, seed=0)
    run.train()
    expected = load_file(tmp_path / WEIGHTS[1])
    early = TrainingRun(tmp_path / "early", short(preset, 4, 2), data, seed=0)
    early.phases = early.phases[:1]
    early.train()
    (tmp_path / RESUME).write_bytes((tmp_path / "early" / RESUME).read_bytes())  # the checkpoint is newer
    card = TrainingRun(tmp_path, settings, data, seed=0).train()
    assert card.steps == {"stage 1": 4, "stage 2": 2}
    assert all(torch.equal(expected[key], value) for key, value in load_file(tmp_path / WEIGHTS[1]).items())


def test_another_run_in_the_folder_is_refused(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0).train()
    for other in ({"seed": 1}, {"hold_out": 0.3}):
        with pytest.raises(ConfigError, match="another --out"):
            TrainingRun(tmp_path, short(preset, 1, 1), data, **{"seed": 0} | other)
    with pytest.raises(ConfigError):
        TrainingRun(tmp_path, short(preset, 2, 1), data, seed=0)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"", lambda b: b[:8] + b"x" + b[9:]])
def test_a_damaged_state_gives_one_line(tmp_path, preset, data, damage):
    TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0).train()
    (tmp_path / RESUME).write_bytes(damage((tmp_path / RESUME).read_bytes()))
    with pytest.raises(IntegrityError, match="cannot go on"):
        TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0)


def test_fine_tuning_starts_from_the_weights_given(tmp_path, preset, data, checkpoint):
    run = TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0, start=checkpoint)
    for part, expected in (("autoencoder", checkpoint.autoencoder), ("denoiser", checkpoint.denoiser)):
        state = run.parts[part].state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    run.train()
    trained = load_checkpoint(tmp_path).autoencoder
    assert any(not torch.equal(trained[key], value) for key, value in checkpoint.autoencoder.items())


def test_fine_tuning_refuses_what_does_not_fit(tmp_path, preset, data, checkpoint):
    wider = preset.model_copy(update={"denoiser": preset.denoiser.model_copy(update={"channels": (16, 32)})})
    with pytest.raises(ConfigError, match="another denoiser"):
        TrainingRun(tmp_path, wider, data, seed=0, start=checkpoint)
    fewer = TrainingSet(data.patients, type(data.schema)("few", data.schema.classes[:2]), data.window, data.strides)
    with pytest.raises(SchemaError, match="label schema 'procedural'"):
        TrainingRun(tmp_path, preset, fewer, seed=0, start=checkpoint)


def test_patients_held_out_are_never_trained_on(tmp_path, preset, data):
    run = TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0, hold_out=0.3)
    assert run.held_out is not None
    trained, held = ({p.subject for p in part.patients} for part in (run.data, run.held_out))
    assert not trained & held
    assert len(trained) == 3
    assert len(held) == 1
    with pytest.raises(DataError, match="left to train on"):
        TrainingRun(tmp_path / "other", preset, data, seed=0, hold_out=0.9)


def test_logs_are_csv_with_rates_and_norms(tmp_path: Path, preset, data):
    TrainingRun(tmp_path, short(preset, 3, 1), data, seed=0).train()
    columns, *rows = rows_of(tmp_path / "losses.csv")
    assert columns == ["stage", "step", "loss", "learning_rate", "gradient_norm", "seconds"]
    assert [row[:2] for row in rows] == [["stage 1", "1"], ["stage 1", "2"], ["stage 1", "3"], ["stage 2", "1"]]
    assert all(float(value) > 0 for row in rows for value in row[2:])
    assert float(rows[1][3]) > float(rows[0][3])
