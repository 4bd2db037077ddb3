from __future__ import annotations

import ast
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medlsdm.anatomy import generate
from medlsdm.checkpoints import load_checkpoint
from medlsdm.config import AdversarialConfig, StageConfig
from medlsdm.errors import ConfigError, DataError, IntegrityError, ResourceError, SchemaError
from medlsdm.models.perceptual import load_features
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.devices import memory_advice, recomputed_blocks
from medlsdm.training.loop import fit
from medlsdm.training.patients import TrainingSet, prepare
from medlsdm.training.run import RESUME, TrainingRun
from medlsdm.training.stage1 import on_device
from medlsdm.training.watch import likeness
from medlsdm.types import Modality, SemanticMap

WEIGHTS = ("autoencoder.safetensors", "denoiser.safetensors")


def short(preset, steps1: int = 5, steps2: int = 5, every: int = 2):
    return preset.model_copy(
        update={
            "stage1": preset.stage1.model_copy(update={"steps": steps1, "save_every": every}),
            "stage2": preset.stage2.model_copy(update={"steps": steps2, "save_every": every}),
            "texture": preset.texture.model_copy(update={"steps": 0}),
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
from medlsdm.types import Modality, SemanticMap
import json
torch.set_num_threads(1)
folder, preset, stop = Path(sys.argv[1]), parse_preset(json.loads(Path(sys.argv[2]).read_text())), sys.argv[3]
kinds = [Modality.CT, Modality.MR, Modality.CT, Modality.MR]
data = prepare([generate(seed, kind, (18, 22, 17)) for seed, kind in enumerate(kinds)], preset)
def note(progress):
    if f"{progress.stage} {progress.step}" == stop:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingRun(folder, preset, data, seed=4, progress=note, pictures=False).train()
"""


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, preset, data):
    settings = short(preset).for_few_steps(2)
    whole = TrainingRun(tmp_path / "whole", settings, data, seed=4, pictures=False)
    whole.train()
    (tmp_path / "preset.json").write_text(settings.model_dump_json())
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), str(tmp_path / "preset.json")]
    # Within the second slice; on the last step of a slice, before it is saved; then on and to the end.
    for stop in ("stage 1 3", "stage 2 2", "reflow 3", "never"):
        done = subprocess.run([*words, stop], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == (0 if stop == "never" else -signal.SIGKILL)
    for name in (*WEIGHTS, RESUME):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    rows = [rows_of(tmp_path / run / "losses.csv") for run in ("whole", "killed")]
    assert len(rows[0]) == 14
    assert [row[:5] for row in rows[0]] == [row[:5] for row in rows[1]]


def test_the_optimiser_state_holds_every_step_counter(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 3, 2), data, seed=0).train()
    again = TrainingRun(tmp_path, short(preset, 3, 2), data, seed=0)
    for name, steps in (("stage 1", 3), ("stage 2", 2)):
        states = again.parts[f"optimiser of {name}"].state_dict()["state"].values()
        assert {int(state["step"]) for state in states if "step" in state} == {steps}
        assert any(state["average"].any() for state in states)


def test_few_steps_are_what_the_checkpoint_then_draws_by(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 2, 3).for_few_steps(2), data, seed=0, pictures=False).train()
    sampling = load_checkpoint(tmp_path).preset.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance) == ("euler", 2, 1.0)
    assert load_checkpoint(tmp_path).card.steps["reflow"] == 2


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


def test_running_out_of_memory_gives_advice(tmp_path, preset, data):
    run = TrainingRun(tmp_path, short(preset, 1, 0), data, seed=0)
    model = run.autoencoder
    model.register_forward_pre_hook(lambda *_: torch.empty(2**55))  # the allocator's own error
    with pytest.raises(ResourceError, match=r"Memory ran out in stage 1\. Lower batch") as caught:
        run.train()
    assert caught.value.exit_status == 12
    with pytest.raises(RuntimeError, match="must match"), memory_advice("x", "y"):
        torch.zeros(2) + torch.zeros(3)
    with pytest.raises(ResourceError), memory_advice("x", "y"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_recomputing_blocks_changes_no_gradient(preset, data):
    torch.manual_seed(0)
    model = build_autoencoder(preset, len(data.schema.classes))
    volumes, labels, _ = on_device(data.crops([0], None), model.n_classes, torch.device("cpu"))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with recomputed_blocks(model, enabled):
            torch.manual_seed(1)
            model(volumes, labels).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_adversary_texture_and_average_resume_too(tmp_path, preset, data):
    losses = preset.stage1.losses
    adversarial = losses.adversarial.model_copy(
        update={"weight": 0.1, "start": 0.0, "warmup": 1, "channels": 4, "discriminators": ("3d",)}
    )
    full = short(preset, 4, 2).model_copy(
        update={
            "autoencoder": preset.autoencoder.model_copy(update={"texture_channels": 8}),
            "denoiser": preset.denoiser.model_copy(update={"ema": 0.9}),
            "texture": preset.stage2.model_copy(update={"steps": 3, "save_every": 2}),
        }
    )
    full = full.model_copy(
        update={
            "stage1": full.stage1.model_copy(update={"losses": losses.model_copy(update={"adversarial": adversarial})})
        }
    )
    whole = TrainingRun(tmp_path / "whole", full, data, seed=0, pictures=False)
    whole.train()
    assert {"adversary", "average of the denoiser", "optimiser of texture"} <= whole.parts.keys()
    for _ in range(8):  # a fresh process in effect: one slice, then all is read from the file
        run = TrainingRun(tmp_path / "parts", full, data, seed=0, pictures=False)
        run.phases = [
            replace(phase, stage=phase.stage.model_copy(update={"steps": first + steps}))
            for phase in run.phases
            for first, steps in phase.slices(run.position[phase.name])[:1]
        ][:1]
        if run.phases:
            run.train()
    one, other = (load_file(tmp_path / folder / RESUME) for folder in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    weights = load_checkpoint(tmp_path / "whole").denoiser
    assert weights is not None
    assert any(not torch.equal(weights[key], value) for key, value in whole.denoiser.state_dict().items())


def test_pictures_and_measures_come_with_every_save(tmp_path, preset):
    patients = prepare([generate(seed, Modality.MR, (18, 22, 17)) for seed in range(13)], preset)
    TrainingRun(tmp_path, short(preset, 2, 2), patients, seed=0, hold_out=0.4).train()
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["stage1-000002.png", "stage2-000002.png"]
    measures = {(row[0], row[2]) for row in rows_of(tmp_path / "validation.csv")[1:]}
    assert {
        ("stage 1", "held-out psnr"),
        ("stage 2", "held-out loss"),
        ("stage 2", "copy rate"),
        ("stage 2", "memorisation rate"),
    } <= measures


def with_losses(preset, **losses):
    stage = preset.stage1.model_copy(update={"losses": preset.stage1.losses.model_copy(update=losses)})
    return preset.model_copy(update={"stage1": stage})


def test_discriminators_tell_how_well_they_do_in_the_log(tmp_path, preset, data):
    pushed = AdversarialConfig(weight=0.5, start=0.0, warmup=0)
    TrainingRun(tmp_path, with_losses(short(preset, 2, 1), adversarial=pushed), data, seed=0).train()
    rows = [row for row in rows_of(tmp_path / "validation.csv") if row[2] == "hinge loss"]
    assert [row[:2] for row in rows] == [["stage 1", "2"]]
    assert 0 < float(rows[0][3]) < 8


def test_a_feature_network_is_part_of_the_run(tmp_path, preset, data):
    path = tmp_path / "vgg.safetensors"
    save_file({"features.0.weight": torch.randn(4, 1, 3, 3), "features.0.bias": torch.zeros(4)}, path)
    with pytest.raises(ConfigError, match="no perceptual loss"):
        TrainingRun(tmp_path / "none", short(preset), data, seed=0, features=load_features(path))
    settings = with_losses(short(preset, 2, 1), perceptual=0.5)
    TrainingRun(tmp_path / "with", settings, data, seed=0, features=load_features(path), pictures=False).train()
    with pytest.raises(ConfigError, match="other data"):
        TrainingRun(tmp_path / "with", settings, data, seed=0, pictures=False)
    TrainingRun(tmp_path / "without", settings, data, seed=0, pictures=False).train()
    one, other = (load_file(tmp_path / run / "autoencoder.safetensors") for run in ("with", "without"))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_without_pictures_none_are_saved_though_patients_are_held_out(tmp_path, preset):
    patients = prepare([generate(seed, Modality.MR, (18, 22, 17)) for seed in range(5)], preset)
    TrainingRun(tmp_path, short(preset, 1, 1), patients, seed=0, hold_out=0.4, pictures=False).train()
    assert not (tmp_path / "pictures").exists()
    assert any(row[2] == "held-out loss" for row in rows_of(tmp_path / "validation.csv"))


def test_pictures_of_patients_are_for_their_owner_alone(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 1, 0), data, seed=0).train()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "pictures").iterdir()} == {0o600}
    assert (tmp_path / RESUME).stat().st_mode & 0o777 == 0o600


def test_fine_tuning_without_stage_2_keeps_the_denoiser(tmp_path, preset, data):
    TrainingRun(tmp_path / "first", short(preset, 1, 2), data, seed=0, pictures=False).train()
    start = load_checkpoint(tmp_path / "first")
    TrainingRun(tmp_path / "tuned", short(preset, 1, 0), data, seed=0, start=start, pictures=False).train()
    tuned = load_checkpoint(tmp_path / "tuned").denoiser
    assert tuned is not None
    assert all(torch.equal(tuned[name], value) for name, value in start.denoiser.items())


def test_few_steps_can_be_taught_to_a_finished_model(tmp_path, preset, data):
    TrainingRun(tmp_path / "first", short(preset, 1, 4), data, seed=0, pictures=False).train()
    start = load_checkpoint(tmp_path / "first")
    settings = start.preset.for_few_steps(2).only_few_steps()
    card = TrainingRun(tmp_path / "few", settings, data, seed=0, start=start, pictures=False).train()
    assert card.steps["reflow"] == 2
    few = load_checkpoint(tmp_path / "few")
    assert any(not torch.equal(few.denoiser[name], value) for name, value in start.denoiser.items())
    assert all(torch.equal(few.autoencoder[name], value) for name, value in start.autoencoder.items())
    with pytest.raises(ConfigError, match="half of"):
        settings.for_few_steps(2)


def test_a_run_does_not_go_on_with_other_voxels_under_equal_names(tmp_path, preset, data):
    TrainingRun(tmp_path, short(preset, 1, 1), data, seed=0, pictures=False).train()
    first, *others = data.patients
    changed = replace(data, patients=(replace(first, image=first.image + np.float32(1e-3)), *others))
    with pytest.raises(ConfigError, match="other data"):
        TrainingRun(tmp_path, short(preset, 1, 1), changed, seed=0, pictures=False)


def test_thin_volumes_train_to_the_end_without_texture(tmp_path, preset):
    thin = prepare([generate(seed, Modality.MR, (20, 20, 5)) for seed in range(2)], preset)
    settings = short(preset, 2, 2).model_copy(update={"texture": preset.texture.model_copy(update={"steps": 2})})
    card = TrainingRun(tmp_path, settings, thin, seed=0, pictures=False).train()
    assert "texture" not in card.steps
    assert not load_checkpoint(tmp_path).build_autoencoder().draws_texture


def test_crops_are_not_flipped_where_a_class_is_named_after_its_side(data, preset):
    scan, labels = generate(0, Modality.MR, (18, 22, 17))
    classes = [replace(c, name="left kidney") if n == 1 else c for n, c in enumerate(labels.schema.classes)]
    sided = SemanticMap(labels.array, labels.geometry, replace(labels.schema, classes=tuple(classes)))
    assert data.mirrored
    assert not prepare([(scan, sided)], preset).mirrored


def test_copies_are_told_from_chance():
    rng = np.random.default_rng(0)
    held_out = rng.normal(size=16)
    assert not likeness(rng.normal(size=16), held_out).alarming
    found = likeness(rng.normal(size=16) + 3, held_out)
    assert found.alarming
    assert found.copy_rate > 0.5


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path, preset, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrainingRun(tmp_path, short(preset, 20, 10, 10), data, seed=0)
    run.train()
    assert "tensorboard/" in run.log.description
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("stage 1/loss")] == [10, 20]
    assert [event.step for event in events.Scalars("stage 2/loss")] == [30]
    assert events.Images("stage 2/cases")


TOGETHER = """
import os, sys
from pathlib import Path
import torch
from torch import distributed, nn
from medlsdm.config import StageConfig
from medlsdm.training.loop import fit
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Linear(6, 1)
model.register_buffer("seen", torch.zeros(()))
def loss(rng):
    rows = torch.from_numpy(rng.random((8, 6), dtype="float32"))
    model.seen.copy_(rows.sum())
    return model(rows).square().mean()
fit(
    model, loss,
    StageConfig(steps=5), "together", steps=5, first_step=0, total_steps=None, seed=7, progress=None, optimiser=None,
)
(folder / str(rank)).write_text(repr([p.tolist() for p in model.state_dict().values()]))
distributed.destroy_process_group()
"""


def test_two_processes_take_the_step_of_one_with_the_double_batch(tmp_path):
    words = [sys.executable, "-c", TOGETHER, str(tmp_path)]
    both = [subprocess.Popen([*words, str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    first, second = (ast.literal_eval((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first == second
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    steps = itertools.count()

    def double(rng: np.random.Generator) -> torch.Tensor:
        other = np.random.default_rng([7, next(steps), 1])
        rows = np.concatenate([generator.random((8, 6), dtype="float32") for generator in (rng, other)])
        return model(torch.from_numpy(rows)).square().mean()

    stage = StageConfig(steps=5)
    fit(
        model, double, stage, "alone", steps=5, first_step=0, total_steps=None, seed=7, progress=None, optimiser=None
    )  # fmt: skip
    for found, expected in zip(first[:2], model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found), expected.detach())
