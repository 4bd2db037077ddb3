from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import medlsdm.synthesis
from medlsdm.anatomy import generate
from medlsdm.checkpoints import make_checkpoint
from medlsdm.config import load_schema
from medlsdm.drawing import LabelSource, TileDecoder, decode_tiles, tile_decoder
from medlsdm.errors import ConfigError, DataError, NotSyntheticError, ResourceError, SchemaError, UsageError
from medlsdm.memory import Plan
from medlsdm.models.unet import build_denoiser
from medlsdm.models.vqgan import build_autoencoder
from medlsdm.synthesis import Synthesiser, restore, to_bytes
from medlsdm.training.loop import sums_depend_on_shape
from medlsdm.training.patients import mirror_to
from medlsdm.types import Geometry, Modality, SemanticMap, SyntheticVolume
from medlsdm.volumes import from_ras, to_ras

CT_RANGE = 1650 + 1024


def altered(checkpoint, *, autoencoder=None, denoiser=None):
    """Return a checkpoint of random weights, no layer at zero, with some settings of its networks changed."""
    preset = checkpoint.preset
    preset = preset.model_copy(
        update={
            "window": (16, 24, 16),
            "stage1": preset.stage1.model_copy(update={"crop": None}),
            "texture": preset.texture.model_copy(update={"crop": None}),
            "autoencoder": preset.autoencoder.model_copy(update=autoencoder or {}),
            "denoiser": preset.denoiser.model_copy(update=denoiser or {}),
        }
    )
    torch.manual_seed(1)
    count = len(checkpoint.schema.classes)
    parts = build_autoencoder(preset, count), build_denoiser(preset, count)
    for part in parts:
        for parameter in part.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.05)
    if parts[0].texture is not None:
        parts[0].texture.trained.fill_(1)
    made, _ = make_checkpoint(
        preset=preset, schema=checkpoint.schema, modalities=checkpoint.modalities,
        autoencoder=parts[0].state_dict(), denoiser=parts[1].state_dict(),
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def synthesiser(checkpoint):
    return Synthesiser(checkpoint, threads=1)


@pytest.fixture(scope="module")
def exact(checkpoint):
    """Draw with a denoiser that sees no farther than its receptive field, and with texture."""
    return Synthesiser(
        altered(checkpoint, autoencoder={"texture_channels": 8, "texture_blocks": 1}, denoiser={"norm": "voxel"}), 1
    )


@pytest.fixture
def precision(request, monkeypatch):
    """Draw in bfloat16 or in float32, whatever this machine would choose."""
    monkeypatch.setattr("medlsdm.training.loop.bfloat16_pays", lambda: request.param == "bfloat16")
    monkeypatch.setattr("medlsdm.synthesis.bfloat16_pays", lambda: request.param == "bfloat16")


both_precisions = pytest.mark.parametrize("precision", ["bfloat16", "float32"], indirect=True)


@pytest.fixture(scope="module")
def labels():
    return generate(1, Modality.CT, (19, 14, 11))[1]


def test_one_seed_makes_one_volume_in_any_order(synthesiser, labels):
    first = synthesiser.synthesise(labels, seed=5)
    synthesiser.synthesise(generate(2, Modality.CT, (9, 30, 12))[1], seed=6)
    again = synthesiser.synthesise(labels, seed=5)
    assert np.array_equal(first.array, again.array)
    assert not np.array_equal(first.array, synthesiser.synthesise(labels, seed=6).array)


def test_the_volume_lies_on_the_label_maps_grid(synthesiser, labels):
    volume = synthesiser.synthesise(labels, seed=0)
    assert volume.array.shape == (19, 14, 11)
    assert np.array_equal(volume.geometry.affine, labels.geometry.affine)
    assert volume.array.dtype == np.float32
    assert volume.array.min() >= -1024
    assert volume.array.max() <= 1650


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_orientation_of_the_map_turns_the_volume_and_nothing_else(synthesiser, labels, order):
    plain = synthesiser.synthesise(labels, seed=3)
    affine = labels.geometry.affine.copy()
    affine[:, :3] = affine[:, order]
    shape = tuple(labels.geometry.shape[i] for i in order)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[0, 3], flip[1, 3] = shape[0] - 1, shape[1] - 1
    turned = Geometry(affine @ flip, shape)
    other = synthesiser.synthesise(SemanticMap(from_ras(labels.array, turned), turned, labels.schema), seed=3)
    assert np.array_equal(other.geometry.affine, turned.affine)
    assert np.array_equal(other.array, from_ras(plain.array, turned))


def test_labels_steps_guidance_and_modality_all_matter(synthesiser, labels):
    plain = synthesiser.synthesise(labels, seed=0)
    empty = SemanticMap(np.zeros_like(labels.array), labels.geometry, labels.schema)
    others = [
        synthesiser.synthesise(empty, seed=0),
        synthesiser.synthesise(labels, seed=0, steps=2),
        synthesiser.synthesise(labels, seed=0, guidance=2.0),
    ]
    assert all(np.abs(other.array - plain.array).max() > 1 for other in others)
    head = synthesiser.synthesise(labels, seed=0, modality=Modality.MR)
    assert head.modality is Modality.MR
    assert head.array.min() >= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_volume(checkpoint, labels, value):
    broken = altered(checkpoint)
    assert broken.denoiser is not None
    broken.denoiser["out.bias"] = torch.full_like(broken.denoiser["out.bias"], value)
    with pytest.raises(DataError, match="seed 7 is not finite"):
        Synthesiser(broken, 1).synthesise(labels, seed=7)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_refuses_seeds_out_of_range(synthesiser, labels, seed):
    with pytest.raises(UsageError, match=str(seed)):
        synthesiser.synthesise(labels, seed=seed)


def test_the_largest_seed_draws(synthesiser, labels):
    assert np.isfinite(synthesiser.synthesise(labels, seed=2**63 - 1, steps=1).array).all()


def test_refuses_another_schema_and_an_untrained_modality(synthesiser, labels):
    foreign = SemanticMap(labels.array % 3, labels.geometry, load_schema("hippocampus"))
    with pytest.raises(SchemaError):
        synthesiser.synthesise(foreign, seed=0)
    with pytest.raises(DataError, match="PT"):
        synthesiser.synthesise(labels, seed=0, modality=Modality.PT)


def test_refuses_a_checkpoint_without_stage_2(checkpoint):
    with pytest.raises(DataError, match="stage 1"):
        Synthesiser(replace(checkpoint, denoiser=None))


def test_provenance_tells_card_map_and_seed(synthesiser, checkpoint, labels):
    origin = synthesiser.synthesise(labels, seed=9).provenance
    assert (origin.card_digest, origin.labels_digest, origin.seed) == (checkpoint.card.digest, labels.digest, 9)


def test_only_synthesis_makes_a_synthetic_volume(synthesiser, labels):
    made = synthesiser.synthesise(labels, seed=0)
    with pytest.raises(NotSyntheticError):
        SyntheticVolume(made.array, made.geometry, made.modality, made.provenance)
    with pytest.raises(NotSyntheticError):
        replace(made, seal=object())


def test_bytes_bring_the_volume_back(synthesiser, labels):
    made = synthesiser.synthesise(labels, seed=4)
    back = restore(to_bytes(made))
    assert np.array_equal(back.array, made.array)
    assert np.array_equal(back.geometry.affine, made.geometry.affine)
    assert (back.provenance, back.modality) == (made.provenance, made.modality)


@pytest.mark.parametrize("cut", [slice(0, 2), slice(0, 40), slice(0, -4), slice(5, None)])
def test_damaged_bytes_are_refused(synthesiser, labels, cut):
    with pytest.raises(DataError):
        restore(to_bytes(synthesiser.synthesise(labels, seed=4))[cut])


@both_precisions
@pytest.mark.usefixtures("precision")
def test_a_volume_does_not_depend_on_its_batch(checkpoint):
    drawer = Synthesiser(altered(checkpoint, autoencoder={"texture_channels": 8, "texture_blocks": 1}), threads=1)
    arrays = [generate(seed, Modality.CT, (21, 26, 18))[1].array for seed in range(8)]
    maps = [SemanticMap(array, Geometry(np.eye(4), array.shape), checkpoint.schema) for array in arrays]
    together = list(drawer.synthesise_many(maps, seeds=range(8), guidance=1.5))
    assert drawer.last_plan is not None
    alone = medlsdm.synthesis.bfloat16_pays() and sums_depend_on_shape()
    assert drawer.last_plan.batch == (1 if alone else 8)
    for seed, (labels, volume) in enumerate(zip(maps, together, strict=True)):
        alone = drawer.synthesise(labels, seed=seed, guidance=1.5)
        assert np.abs(alone.array - volume.array).max() / CT_RANGE <= 1e-5
        assert alone.provenance == volume.provenance


def test_maps_of_many_sizes_come_back_in_order(synthesiser):
    shapes = [(19, 14, 11), (19, 14, 11), (20, 16, 12), (9, 9, 9), (19, 14, 11)]
    maps = [generate(seed, Modality.CT, shape)[1] for seed, shape in enumerate(shapes)]
    volumes = list(synthesiser.synthesise_many(iter(maps), seeds=range(5)))
    assert [volume.array.shape for volume in volumes] == shapes
    assert [volume.provenance.seed for volume in volumes] == [0, 1, 2, 3, 4]
    assert np.array_equal(volumes[2].array, synthesiser.synthesise(maps[2], seed=2).array)


@both_precisions
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("cached", [True, False])
def test_windows_and_tiles_give_the_whole(checkpoint, cached):
    made = altered(checkpoint, autoencoder={"texture_channels": 8, "texture_blocks": 1}, denoiser={"norm": "voxel"})
    drawer = Synthesiser(made, threads=1)
    labels = generate(3, Modality.CT, (150, 41, 34))[1]
    whole = drawer.synthesise(labels, seed=2, steps=2, guidance=1.5, memory=Plan())
    plan = Plan(sampling_parts=(3, 1, 2), decoding_parts=(4, 2, 2), cached=cached)
    tiled = drawer.synthesise(labels, seed=2, steps=2, guidance=1.5, memory=plan)
    assert whole.array.std() > 0.03 * CT_RANGE
    assert np.abs(tiled.array - whole.array).max() / CT_RANGE * 2 <= 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"texture_channels": 8, "texture_blocks": 2},
        {"strides": (4, 4, 1)},
        {"strides": (2, 2, 2), "channels": (8,), "encoder_blocks": (1,), "decoder_blocks": (2,)},
        {"strides": (8, 4, 2), "channels": (8, 8, 8), "encoder_blocks": (1, 1, 1), "decoder_blocks": (1, 1, 2)},
    ],
)
def test_tiles_need_the_decoders_whole_receptive_field_and_no_more(checkpoint, settings):
    made = altered(checkpoint, autoencoder=settings)
    autoencoder, strides = made.build_autoencoder(), made.preset.autoencoder.strides
    decoder = tile_decoder(autoencoder)
    cells = (4, 3, 2 * decoder.halo + 5)
    shape = tuple(n * s for n, s in zip(cells, strides, strict=True))
    labels = SemanticMap(
        np.random.default_rng(0).choice(made.schema.ids, shape), Geometry(np.eye(4), shape), made.schema
    )
    latents = torch.randn(1, made.preset.autoencoder.latent_channels, *cells)

    def volume(halo: int, parts: tuple[int, int, int]) -> np.ndarray:
        out = np.empty(shape, np.float32)

        def write(_, box, values):
            out[box] = values

        with torch.inference_mode():
            narrow = TileDecoder(decoder.decode, halo, decoder.noisy)
            decode_tiles(narrow, latents, [LabelSource(labels, strides)], [5], strides, parts, write)
        return out

    whole, parts = volume(decoder.halo, (1, 1, 1)), (1, 1, cells[2])
    assert np.abs(volume(decoder.halo, parts) - whole).max() <= 1e-5 * whole.std()
    assert np.abs(volume(decoder.halo - 4, parts) - whole).max() > 1e-5 * whole.std()


def gradient_energy(array: np.ndarray, planes: list[int]) -> float:
    """Return the mean squared step across the planes named, along the first axis."""
    return float(np.mean([(array[p] - array[p - 1]) ** 2 for p in planes]))


def test_no_seam_where_windows_are_blended(checkpoint):
    drawer = Synthesiser(altered(checkpoint, denoiser={"norm": "group"}), threads=1)
    labels = generate(3, Modality.CT, (256, 64, 64))[1]
    whole = drawer.synthesise(labels, seed=2, steps=3, memory=Plan())
    plan = Plan(sampling_parts=(4, 1, 1), decoding_parts=(4, 1, 1), blended=True)
    blended = drawer.synthesise(labels, seed=2, steps=3, memory=plan)
    assert not np.array_equal(blended.array, whole.array)
    borders = [64, 128, 192]
    inside = [plane for plane in range(16, 256, 16) if plane not in borders]
    across, within = (
        gradient_energy(blended.array, planes) / gradient_energy(whole.array, planes) for planes in (borders, inside)
    )
    assert across / within == pytest.approx(1, abs=0.02)


def test_texture_differs_by_seed_and_can_be_left_out(exact):
    labels = generate(1, Modality.CT, (16, 16, 12))[1]
    rough = exact.synthesise(labels, seed=1)
    smooth = Synthesiser(exact.checkpoint, 1, smooth=True).synthesise(labels, seed=1)
    assert np.abs(rough.array - smooth.array).max() > 1
    assert np.array_equal(rough.array, exact.synthesise(labels, seed=1).array)


def test_what_is_unknown_is_left_to_the_model(exact):
    _, labels = generate(1, Modality.CT, (16, 16, 12))
    value = int(np.bincount(labels.array.ravel()).argmax())
    partly = Synthesiser(exact.checkpoint, 1, unknown=[value])
    source = partly._draft(labels, 1).source
    whole = tuple(slice(0, n) for n in source.shape)
    unlabelled = source.read(whole) == len(labels.schema.classes)
    assert np.array_equal(unlabelled, to_ras(labels.array, labels.geometry)[0] == value)
    assert not np.array_equal(partly.synthesise(labels, seed=1).array, exact.synthesise(labels, seed=1).array)
    with pytest.raises(SchemaError, match="no label 999"):
        Synthesiser(exact.checkpoint, 1, unknown=[999])


def test_a_budget_chooses_the_windows_and_a_tiny_one_is_refused(exact, monkeypatch):
    monkeypatch.setattr(exact, "_used_bytes", lambda: 300 * 2**20)  # this process grows and shrinks as tests go
    labels = generate(1, Modality.CT, (240, 48, 40))[1]
    free = exact.synthesise(labels, seed=1, steps=1, memory=64 * 2**30)
    assert exact.last_plan.whole
    tight = exact.synthesise(labels, seed=1, steps=1, memory=430 * 2**20)
    assert not exact.last_plan.whole
    assert exact.last_plan.estimate_bytes <= 430 * 2**20
    assert np.abs(tight.array - free.array).max() / CT_RANGE * 2 <= 1e-3
    with pytest.raises(ResourceError, match="MB at least"):
        exact.synthesise(labels, seed=1, memory=50 * 2**20)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 30), (2, 3, 5), (33, 1, 1)])
def test_sizes_that_divide_by_nothing(exact, shape):
    labels = SemanticMap(
        np.ones(shape, np.uint8), Geometry(np.diag([0.4, 3.0, 1.0, 1.0]), shape), exact.checkpoint.schema
    )
    volume = exact.synthesise(labels, seed=0)
    assert volume.array.shape == shape
    assert np.isfinite(volume.array).all()


def test_a_tilted_affine_is_kept_exactly(exact):
    turn = np.array([[0.9, -0.3, 0.1, -7], [0.3, 0.8, -0.2, 5], [0, 0.25, 1.7, 3], [0, 0, 0, 1]])
    source = generate(1, Modality.CT, (14, 12, 9))[1]
    volume = exact.synthesise(SemanticMap(source.array, Geometry(turn, (14, 12, 9)), source.schema), seed=0)
    assert np.array_equal(volume.geometry.affine, turn)


def test_labels_read_box_by_box_are_the_mirrored_map(labels):
    source = LabelSource(labels, (4, 4, 4))
    places = np.searchsorted(np.array(labels.schema.ids), labels.array)
    whole = mirror_to(places, source.padded)
    assert whole.shape == (20, 16, 12)
    for box in ((slice(0, 20), slice(0, 16), slice(0, 12)), (slice(3, 7), slice(0, 5), slice(2, 9)),
                (slice(17, 20), slice(12, 16), slice(0, 12))):  # fmt: skip
        assert np.array_equal(source.read(box), whole[box])


def test_running_out_of_memory_is_one_line_with_advice(checkpoint, labels):
    drawer = Synthesiser(checkpoint, threads=1)
    drawer._decoder = TileDecoder(lambda *_: torch.empty(2**52), 1, False)
    with pytest.raises(ResourceError, match="--memory"):
        drawer.synthesise(labels, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="GPU"):
        Synthesiser(checkpoint, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_gpu_draws_what_the_cpu_draws(exact, labels):
    on_gpu = Synthesiser(exact.checkpoint, device="cuda").synthesise(labels, seed=1, memory=4 * 2**30)
    on_cpu = Synthesiser(exact.checkpoint, device="cpu").synthesise(labels, seed=1)
    assert np.corrcoef(on_gpu.array.ravel(), on_cpu.array.ravel())[0, 1] > 0.99
