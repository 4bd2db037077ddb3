import numpy as np
import pytest
from pydantic import ValidationError

from medlsdm.errors import DataError, GateError, NotSyntheticError
from medlsdm.sharing.gate import COPY, audit
from medlsdm.sharing.gate_policy import GatePolicy
from medlsdm.types import Modality, SemanticMap

from .conftest import (
    GEOMETRY,
    SCHEMA,
    batch,
    keys_of,
    painted,
    reference_pairs,
    semantic,
    synthetic,
    texture,
)


def verdict_on(volume, labels, **policy):
    return audit([volume], [labels], reference_pairs, GatePolicy(plants=20, min_plant_recall=0.5, **policy)).verdicts[0]


def test_fresh_volumes_that_follow_their_labels_pass():
    volumes, labels = batch(4)
    report = audit(volumes, labels, reference_pairs)
    assert (report.made, report.passed, report.blocked) == (4, 4, 0)
    assert report.refusal is None
    assert report.planted == 60
    assert report.caught >= 58
    assert report.raise_if_refused() is report


def test_a_copy_of_a_patient_is_blocked_and_counted():
    volumes, labels = batch(5)
    scan, own = list(reference_pairs())[7]
    volumes[2], labels[2] = synthetic(own, scan.array * 1.1 + texture(9)), own
    report = audit(volumes, labels, reference_pairs)
    assert [v.passed for v in report.verdicts] == [True, True, False, True, True]
    assert report.reasons == {COPY: 1}
    assert report.refusal is None


def test_a_new_texture_on_a_patients_own_label_map_is_no_copy():
    own = list(reference_pairs())[7][1]
    assert verdict_on(synthetic(own, painted(own, 4000)), own).passed


def test_too_many_blocked_volumes_refuse_the_whole_batch():
    volumes, labels = batch(1)
    scan, own = next(reference_pairs())
    volumes, labels = [*volumes, synthetic(own, scan.array)], [*labels, own]
    quick = {"plants": 20, "min_plant_recall": 0.5}
    report = audit(volumes, labels, reference_pairs, GatePolicy(max_blocked_fraction=0.5, **quick))
    assert report.refusal is None
    report = audit(volumes, labels, reference_pairs, GatePolicy(max_blocked_fraction=0.4, **quick))
    with pytest.raises(GateError, match="memorised"):
        report.raise_if_refused()


def test_missed_plants_refuse_the_whole_batch():
    volumes, labels = batch(2)
    report = audit(volumes, labels, reference_pairs, GatePolicy(plants=20, min_plant_recall=0.99))
    assert report.caught == report.planted == 20  # all caught, yet too few to show 99 %
    with pytest.raises(GateError, match="planted"):
        report.raise_if_refused()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full(GEOMETRY.shape, np.nan), "not finite"),
        (np.full(GEOMETRY.shape, 4.0), "constant"),
        (300 - painted(semantic(60), 60), "does not follow its labels"),
        (texture(77), "does not follow its labels"),
    ],
)
def test_senseless_volumes_are_blocked_with_a_reason(array: np.ndarray, reason: str):
    labels = semantic(60)
    verdict = verdict_on(synthetic(labels, array), labels)
    assert not verdict.passed
    assert any(reason in r for r in verdict.reasons)


def test_ct_beyond_what_a_scanner_measures_is_blocked():
    labels = semantic(60)

    def references():
        return reference_pairs(modality=Modality.CT)

    policy = GatePolicy(plants=20, min_plant_recall=0.5)
    for gain, reason in ((1000.0, "can measure"), (8.0, "outside the range of the site's own scans")):
        volume = synthetic(labels, painted(labels, 61) * gain, modality=Modality.CT)
        verdict = audit([volume], [labels], references, policy).verdicts[0]
        assert any(reason in r for r in verdict.reasons)


def test_a_map_that_is_not_the_one_it_was_made_from_is_blocked():
    made_from, other = semantic(60), semantic(61)
    volume = synthetic(made_from, painted(made_from, 62))
    assert verdict_on(volume, made_from).passed
    verdict = verdict_on(volume, other)
    assert any("not the one it was made from" in r for r in verdict.reasons)


def test_a_map_on_another_grid_is_blocked_not_compared():
    labels = semantic(60)
    small = SemanticMap(labels.array[:-1], type(GEOMETRY)(GEOMETRY.affine, (25, 28, 24)), SCHEMA)
    verdict = verdict_on(synthetic(labels, painted(labels, 62)), small)
    assert not verdict.passed
    assert verdict.similarity is None


def test_public_json_holds_no_distance_and_no_patient_count():
    volumes, labels = batch(2)
    report = audit(volumes, labels, reference_pairs)
    public = keys_of(report.to_public_json())
    assert not public & {"similarity", "gap", "verdicts", "volume_digest", "patients", "kinds"}
    local = report.to_local_json()
    assert local["verdicts"][0]["similarity"] > 0
    assert local["planted"] == 60


def test_too_few_patients_fail_closed():
    volumes, labels = batch(1)
    with pytest.raises(GateError, match="too few patients"):
        audit(volumes, labels, lambda: reference_pairs(4))
    with pytest.raises(GateError, match="too few patients"):
        audit(volumes, labels, lambda: reference_pairs(12), GatePolicy(min_patients=13))
    with pytest.raises(GateError, match="too few"):
        audit(volumes, labels, lambda: reference_pairs(12, Modality.CT))


def test_refuses_an_empty_batch_and_missing_maps():
    volumes, labels = batch(2)
    with pytest.raises(DataError):
        audit([], [], reference_pairs)
    with pytest.raises(DataError):
        audit(volumes, labels[:1], reference_pairs)


def test_refuses_what_is_not_synthetic():
    scan, labels = next(reference_pairs())
    with pytest.raises(NotSyntheticError, match="Scan"):
        audit([scan], [labels], reference_pairs)  # type: ignore[list-item]


@pytest.mark.parametrize("bad", [{"min_patients": 1}, {"plants": 0}, {"max_blocked_fraction": 1.0}, {"typo": 1}])
def test_policy_refuses_settings_that_switch_the_gate_off(bad: dict):
    with pytest.raises(ValidationError):
        GatePolicy(**bad)
