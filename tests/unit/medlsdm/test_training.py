from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from medlsdm.anatomy import generate
from medlsdm.config import Preset, load_preset
from medlsdm.errors import DataError, GeometryError, SchemaError
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.training.loop import Progress, learning_rate, make_optimiser
from medlsdm.training.patients import class_indices, denormalise, mirror_to, normalise, prepare
from medlsdm.training.stage1 import reconstruction_loss, train_stage1
from medlsdm.training.stage2 import encode_latents, train_stage2
from medlsdm.types import Geometry, LabelSchema, Modality, Scan, SemanticMap


def test_the_ct_window_is_undone_exactly():
    hu = np.linspace(-1024, 1650, 2675, dtype=np.float32).reshape(25, 107, 1)
    np.testing.assert_allclose(denormalise(normalise(hu, Modality.CT), Modality.CT), hu, atol=1e-3)
    assert np.array_equal(np.round(denormalise(normalise(hu, Modality.CT), Modality.CT)), hu)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1.7e6, 0.0), (13.0, -4000.0)])
def test_mr_intensity_does_not_depend_on_the_raw_scale(scale, offset):
    raw = np.random.default_rng(0).gamma(2.0, 40.0, (12, 13, 14))
    np.testing.assert_allclose(
        normalise(raw * scale + offset, Modality.MR), normalise(raw, Modality.MR), atol=1e-5
    )  # fmt: skip


def test_eight_bit_and_large_mr_scales_meet():
    raw = np.random.default_rng(0).integers(0, 256, (12, 13, 14))
    large = (raw * 6666).astype(np.float32)  # up to 1.7 million
    np.testing.assert_allclose(normalise(large, Modality.MR), normalise(raw.astype(np.uint8), Modality.MR), atol=1e-5)


def test_suv_comes_back_and_means_the_same_in_every_scan():
    suv = np.linspace(0, 40, 4001, dtype=np.float32).reshape(-1, 1, 1)
    np.testing.assert_allclose(denormalise(normalise(suv, Modality.PT), Modality.PT), suv, atol=1e-4)
    assert np.array_equal(normalise(suv[:2000], Modality.PT), normalise(suv, Modality.PT)[:2000])
    assert (np.diff(normalise(suv, Modality.PT), axis=0) > 0).all()


def test_what_lies_outside_a_fixed_window_is_clipped():
    for modality, values, ends in ((Modality.CT, (-3000, 9000), (-1024, 1650)), (Modality.PT, (-2, 70), (0, 40))):
        array = np.array(values, dtype=np.float32).reshape(2, 1, 1)
        np.testing.assert_allclose(denormalise(normalise(array, modality), modality).ravel(), ends, atol=1e-3)


def test_refuses_pet_that_is_not_in_suv():
    becquerel = np.random.default_rng(0).gamma(2.0, 4000.0, (8, 8, 8))
    with pytest.raises(DataError, match="not in SUV"):
        normalise(becquerel, Modality.PT)


def test_a_patient_keeps_how_its_intensities_were_mapped(preset):
    scan, labels = generate(0, Modality.MR, (16, 20, 12))
    (patient,) = prepare([(scan, labels)], preset).patients
    low, high = np.percentile(scan.array, (0.5, 99.5))
    np.testing.assert_allclose(
        patient.intensity.invert(patient.image), np.clip(scan.array, low, high), rtol=1e-4, atol=1e-4 * high
    )  # fmt: skip


def test_a_sparse_volume_still_spans_the_range():
    hot = np.zeros((20, 20, 20))
    hot[10, 10, 10] = 5
    found = normalise(hot, Modality.MR)
    assert (found.min(), found.max()) == (-1, 1)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_refuses_a_constant_or_nan_volume(value):
    with pytest.raises(DataError):
        normalise(np.full((4, 4, 4), value), Modality.MR)


def test_labels_become_channels_in_the_order_of_their_ids():
    schema = LabelSchema.from_json({"name": "s", "classes": [{"id": i, "name": f"c{i}"} for i in (0, 300, 17)]})
    labels = SemanticMap(np.array([[[0, 17, 300]]]), Geometry(np.eye(4), (1, 1, 3)), schema)
    assert class_indices(labels).ravel().tolist() == [0, 1, 2]


def test_padding_mirrors_and_invents_no_value():
    grown = mirror_to(np.arange(1, 4).reshape(3, 1, 1), (5, 1, 2))
    assert grown[:, 0, 0].tolist() == [1, 2, 3, 3, 2]


def test_masked_voxels_neither_cost_nor_teach():
    volumes, mask = torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4)
    mask[..., 3:] = 0
    rebuilt = torch.full_like(volumes, 0.1)
    rebuilt[..., 3:] = 50
    rebuilt.requires_grad_()
    loss = reconstruction_loss(rebuilt, volumes, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.1)
    assert rebuilt.grad is not None
    assert not rebuilt.grad[..., 3:].any()


def test_prepare_turns_to_ras_and_keeps_pairs_together(preset):
    scan, labels = generate(3, Modality.MR, (16, 20, 12))
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned = Geometry(scan.geometry.affine @ flip, scan.geometry.shape)
    pair = (
        Scan(scan.array[::-1, ::-1], turned, Modality.MR, "turned"),
        SemanticMap(labels.array[::-1, ::-1], turned, labels.schema),
    )
    plain, back = prepare([(scan, labels), pair], preset).patients
    assert np.array_equal(plain.image, back.image)
    assert np.array_equal(plain.labels, back.labels)


def test_prepare_names_what_is_wrong(preset):
    scan, labels = generate(0, Modality.CT, (16, 16, 16))
    moved = Geometry(scan.geometry.affine * [1, 1, 1, 2], scan.geometry.shape)
    other = LabelSchema("other", labels.schema.classes[:-1])
    with pytest.raises(DataError, match="no pair"):
        prepare([], preset)
    with pytest.raises(GeometryError, match="another grid"):
        prepare(
            [(scan, SemanticMap(labels.array, moved, labels.schema))],
            preset,
        )
    with pytest.raises(SchemaError, match="one schema"):
        prepare([(scan, labels), (scan, SemanticMap(labels.array % 2, scan.geometry, other))], preset)


def test_crops_have_one_size_and_mask_the_padding(data):
    batch = data.crops([0, 1, 2], np.random.default_rng(0))
    assert batch.images.shape == (3, 1, 16, 20, 16)
    assert batch.mask.all()
    big = prepare([generate(0, Modality.CT, (18, 6, 17))], load_preset("tiny"))
    padded = big.crops([0], None)
    assert padded.images.shape == (1, 1, 20, 8, 20)
    assert padded.mask.sum() == 18 * 6 * 17


def test_the_schedule_of_slices_is_the_schedule_of_the_whole():
    stage = load_preset("tiny").stage1
    rates = [learning_rate(stage, step, 300) for step in range(300)]
    assert rates[0] < rates[stage.warmup] == max(rates) <= stage.learning_rate
    assert rates[-1] < 0.01 * stage.learning_rate


def test_training_in_slices_equals_training_at_once(preset, data):
    torch.manual_seed(0)
    whole = build_autoencoder(preset, len(data.schema.classes))
    sliced = copy.deepcopy(whole)
    stage = preset.stage1
    train_stage1(whole, data, stage, steps=4, total_steps=6, seed=3, optimiser=make_optimiser(whole, stage))
    kept = make_optimiser(sliced, stage)
    for first in (0, 2):
        train_stage1(sliced, data, stage, steps=2, first_step=first, total_steps=6, seed=3, optimiser=kept)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(sliced.state_dict()[name], value, msg=name)


def test_both_stages_learn_and_report(preset, data):
    torch.manual_seed(0)
    model = build_autoencoder(preset, len(data.schema.classes))
    seen: list[Progress] = []
    state = torch.get_rng_state()
    train_stage1(model, data, preset.stage1, steps=40, seed=0, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.step for p in seen] == list(range(1, 41))
    assert np.mean([p.loss for p in seen[-5:]]) < 0.8 * np.mean([p.loss for p in seen[:5]])
    latents = encode_latents(model, data, variants=2)
    assert len(latents) == 2 * len(data)
    assert latents.latents.mean() == pytest.approx(0, abs=0.2)
    assert latents.latents.std() == pytest.approx(1, abs=0.2)
    assert sorted(set(latents.modality.tolist())) == [0, 1]
    denoiser = build_denoiser(preset, len(data.schema.classes))
    seen.clear()
    train_stage2(denoiser, latents, preset.stage2, steps=60, seed=0, progress=seen.append)
    assert np.mean([p.loss for p in seen[-10:]]) < 0.95 * np.mean([p.loss for p in seen[:10]])


def test_crops_tell_where_they_lie(preset: Preset):
    data = prepare([generate(3, Modality.MR, (32, 24, 24))], preset)
    image = data.patients[0].image
    seen = set()
    for seed in range(30):
        batch = data.crops([0], np.random.default_rng(seed), (16, 20, 16))
        x, y, z, *extents = batch.position[0]
        assert extents == pytest.approx([16 / 32, 20 / 24, 16 / 24])
        at = [round(float(a) * n) for a, n in zip((x, y, z), (32, 24, 24), strict=True)]
        plain = image[:, at[1] : at[1] + 20, at[2] : at[2] + 16]
        turned = not np.array_equal(batch.images[0, 0], plain[at[0] : at[0] + 16])
        # A crop that was turned left to right lies where its mirror image does.
        mirrored = plain[::-1][at[0] : at[0] + 16]
        assert np.array_equal(batch.images[0, 0], mirrored if turned else plain[at[0] : at[0] + 16])
        seen.add(turned)
    assert seen == {True, False}
    whole = data.crops([0], None, (64, 64, 64)).position[0]
    assert whole[3:].tolist() == pytest.approx([16 / 32, 20 / 24, 16 / 24])
