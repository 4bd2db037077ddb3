from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medlsdm.anatomy import generate
from medlsdm.config import load_schema
from medlsdm.errors import DataError, NotSyntheticError, SchemaError
from medlsdm.synthesis import Synthesiser, restore, to_bytes
from medlsdm.types import Geometry, Modality, SemanticMap, SyntheticVolume
from medlsdm.volumes import from_ras


@pytest.fixture(scope="module")
def synthesiser(checkpoint):
    return Synthesiser(checkpoint, threads=1)


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
