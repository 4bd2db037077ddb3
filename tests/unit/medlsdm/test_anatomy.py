from __future__ import annotations

import numpy as np
import pytest

from medlsdm.anatomy import AORTA, BODY, BONE, FLUID, GREY, HIPPOCAMPUS, LIVER, LUNG, SKULL, WHITE, generate
from medlsdm.types import Modality


@pytest.mark.parametrize("modality", list(Modality))
def test_one_seed_makes_one_patient_and_another_another(modality):
    (scan, labels), (again, same), (other, differs) = (generate(seed, modality) for seed in (1, 1, 2))
    assert np.array_equal(scan.array, again.array)
    assert labels.digest == same.digest
    assert labels.digest != differs.digest
    assert abs(np.corrcoef(scan.array.ravel(), other.array.ravel())[0, 1]) < 0.98
    assert np.mean(labels.array != differs.array) > 0.05


@pytest.mark.parametrize("seed", range(6))
def test_every_patient_has_its_organs(seed):
    torso, head = generate(seed, Modality.CT)[1].array, generate(seed, Modality.MR)[1].array
    for organ in (BODY, LUNG, LIVER, BONE, AORTA):
        assert np.sum(torso == organ) > 50
    for organ in (BODY, SKULL, GREY, WHITE, FLUID, HIPPOCAMPUS):
        assert np.sum(head == organ) > 20


def test_ct_is_in_hounsfield_units_and_mr_follows_contrast():
    scan, labels = generate(0, Modality.CT)
    means = {organ: scan.array[labels.array == organ].mean() for organ in (0, LUNG, LIVER, BONE)}
    assert means[0] < -900 < means[LUNG] < -600 < 0 < means[LIVER] < means[BONE]
    scan, labels = generate(0, Modality.MR)
    assert scan.array[labels.array == WHITE].mean() > 1.2 * scan.array[labels.array == GREY].mean()


@pytest.mark.parametrize(("modality", "organ"), [(Modality.CT, LUNG), (Modality.CT, LIVER), (Modality.CT, BODY)])
def test_labels_do_not_tell_the_texture(modality, organ):
    scan, labels = generate(0, modality)
    inside = scan.array[labels.array == organ]
    assert inside.std() > 15  # HU; both scales are far wider


def test_size_and_spacing_are_as_asked():
    scan, _ = generate(0, Modality.CT, (20, 30, 25), (1.5, 2.0, 3.0))
    assert scan.geometry.shape == (20, 30, 25)
    assert scan.geometry.spacing == pytest.approx((1.5, 2.0, 3.0))
    assert scan.geometry.orientation == "RAS"
