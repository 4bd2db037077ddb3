import json
import math
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlsdm.errors import DataError, IntegrityError, PolicyError
from medlsdm.privacy.ledger import PrivacyLedger


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "ledger.jsonl")


def test_an_empty_ledger_has_spent_nothing(ledger: PrivacyLedger):
    spent = ledger.spent()
    assert (spent.epsilon, spent.delta, spent.charges) == (0.0, 0.0, 0)
    assert spent.statement == "No training has been charged."


def test_training_without_dp_is_charged_as_unbounded_and_says_so(ledger: PrivacyLedger, tmp_path: Path):
    head = ledger.charge("run-1", 1, "none", "ab" * 32)
    assert head == ledger.head
    assert math.isinf(ledger.spent().epsilon)
    assert "without differential privacy" in ledger.spent().statement
    record = json.loads((tmp_path / "ledger.jsonl").read_text())
    assert record["fields"] == {
        "run": "run-1", "round": 1, "mechanism": "none", "patients": "ab" * 32, "epsilon": "infinite", "delta": 0.0,
    }  # fmt: skip


def test_a_charge_is_permanent_and_every_repetition_counts(ledger: PrivacyLedger):
    for _ in range(3):
        ledger.charge("run-1", 1, "dp-sgd", "ab", epsilon=0.5, delta=1e-6)
    assert ledger.spent().epsilon == pytest.approx(1.5)
    assert ledger.spent().delta == pytest.approx(3e-6)


def test_a_finite_budget_refuses_training_without_dp(ledger: PrivacyLedger):
    with pytest.raises(PolicyError, match="unbounded"):
        ledger.check(8.0)
    with pytest.raises(PolicyError):
        ledger.charge("run-1", 1, "none", "ab", max_epsilon=8.0)
    assert ledger.spent().charges == 0
    ledger.check(None)


def test_a_budget_is_refused_once_anything_was_trained_without_dp(ledger: PrivacyLedger):
    ledger.charge("run-1", 1, "none", "ab")
    with pytest.raises(PolicyError, match="no budget holds"):
        ledger.charge("run-2", 1, "dp-sgd", "ab", epsilon=0.1, max_epsilon=8.0)


@given(st.lists(st.floats(0.01, 3.0), max_size=12), st.floats(0.0, 10.0))
@settings(max_examples=15, deadline=None)
def test_the_spend_never_exceeds_the_budget(tmp_path_factory, steps: list[float], budget: float):
    ledger = PrivacyLedger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    taken = []
    for number, step in enumerate(steps):
        try:
            ledger.charge("run", number, "dp-sgd", "ab", epsilon=step, max_epsilon=budget)
        except PolicyError:
            assert sum(taken) + step > budget
        else:
            taken.append(step)
    assert ledger.spent().epsilon == pytest.approx(sum(taken))
    assert ledger.spent().epsilon <= budget


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_refuses_an_epsilon_that_makes_no_sense(ledger: PrivacyLedger, epsilon: float):
    with pytest.raises(DataError):
        ledger.charge("run", 1, "dp-sgd", "ab", epsilon=epsilon)


def test_refuses_a_finite_epsilon_for_training_without_dp(ledger: PrivacyLedger):
    with pytest.raises(DataError, match="no finite epsilon"):
        ledger.charge("run", 1, "none", "ab", epsilon=1.0)


@pytest.mark.parametrize("budget", [math.nan, math.inf, -1.0])
def test_refuses_a_budget_that_is_no_number(ledger: PrivacyLedger, budget: float):
    with pytest.raises(PolicyError):
        ledger.check(budget, epsilon=0.1)


@pytest.mark.parametrize("budget", [None, 8.0])
def test_a_damaged_ledger_stops_everything(ledger: PrivacyLedger, tmp_path: Path, budget: float | None):
    ledger.charge("run", 1, "dp-sgd", "ab", epsilon=1.0)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"epsilon": 1.0', b'"epsilon": 0.1'))
    with pytest.raises(IntegrityError):
        ledger.spent()
    with pytest.raises(IntegrityError):
        ledger.check(budget, epsilon=0.1)
    with pytest.raises(IntegrityError):
        ledger.charge("run", 2, "dp-sgd", "ab", epsilon=0.1)


def _race(path: Path) -> None:
    ledger = PrivacyLedger(path)
    for number in range(10):
        try:
            ledger.charge("run", number, "dp-sgd", "ab", epsilon=1.0, max_epsilon=5.0)
        except PolicyError:
            return


def test_two_processes_together_stay_within_the_budget(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_race, args=(path,)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert PrivacyLedger(path).spent().epsilon == 5.0
