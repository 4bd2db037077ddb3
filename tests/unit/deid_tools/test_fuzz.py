"""A few hundred cases of ``make fuzz-deid``, on made-up files: the real ones are not needed for these."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from deid_tools.answers import AnswerKey, plant_series

REPO = Path(__file__).resolve().parents[3]
CASES = 200


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_deid", REPO / "tests" / "benchmarks" / "fuzz_deid.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_deid"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz_deid"]


@pytest.fixture
def pool(fuzz, study, tmp_path):
    key = AnswerKey()
    files = sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)[:1]
    plant_series(files, tmp_path / "pool", key, patient="one", study="1", series="1", script="latin")
    planted = next((tmp_path / "pool").rglob("*.dcm")).read_bytes()
    segmentation = next(study.source.rglob("*SEG.dcm")).read_bytes()
    tokens = tuple(p.token for p in key.plants)
    return [
        fuzz.Seed(".dcm", planted, tokens),
        fuzz.Seed(".dcm", files[0].read_bytes(), tuple(study.tokens)),
        fuzz.Seed(".dcm", segmentation, tuple(study.tokens)),
        fuzz._nifti(),
    ]


@pytest.mark.usefixtures("without_tesseract")
def test_no_mutated_file_crashes_leaks_or_is_lost(fuzz, pool, tmp_path):
    (tmp_path / "cases").mkdir()
    ends = set()
    for number in range(CASES):
        ended, wrong = fuzz.run_case(number, 7, pool, tmp_path / "cases")
        assert wrong == "", f"case {number}"
        ends.add(ended)
    assert "accepted" in ends
    assert len(ends) > 8
    assert os.listdir(tmp_path / "cases") == []


def test_equal_seeds_give_equal_cases(fuzz, pool):
    assert [fuzz.case(n, 3, pool) for n in range(30)] == [fuzz.case(n, 3, pool) for n in range(30)]
    assert fuzz.case(1, 3, pool) != fuzz.case(1, 4, pool)


def test_every_mutation_is_drawn(fuzz, pool):
    done = {name for n in range(300) for name in fuzz.case(n, 1, pool)[0].split("+")}
    assert done == {m.__name__ for m in fuzz.MUTATIONS}


@pytest.mark.usefixtures("without_tesseract")
def test_the_fuzzer_sees_what_is_wrong(fuzz, pool, tmp_path, monkeypatch):
    def plain(number, seed, pool):
        return "plain", b"a.dcm", pool[0].content, pool[0].tokens

    monkeypatch.setattr(fuzz, "case", plain)
    assert fuzz.run_case(0, 1, pool, tmp_path) == ("accepted", "")
    monkeypatch.setattr(fuzz, "leaks_in", lambda content, tokens: {"x"})
    assert "came through" in fuzz.run_case(1, 1, pool, tmp_path)[1]
    monkeypatch.setattr(fuzz, "deidentify", lambda *a: 1 / 0)
    assert "ZeroDivisionError" in fuzz.run_case(2, 1, pool, tmp_path)[1]
