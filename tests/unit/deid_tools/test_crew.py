from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deid_tools.admit import Refusal
from deid_tools.crew import Crew, chunks, time_limit


def times(made: int, job: int) -> int:
    if job == -1:
        os._exit(3)
    if job == -2:
        raise Refusal("odd")
    return made * job


def test_jobs_come_back_in_order_from_any_number_of_processes():
    expected = [3 * n for n in range(20)]
    for workers in (1, 2):
        crew = Crew(workers, 3, int, ("3",))
        assert list(crew.map(times, range(20), seconds=300)) == expected
        crew.close()


def where(made: int, job: int) -> int:
    return os.getpid()


def slowly_where(made: int, job: int) -> int:
    time.sleep(0.01)
    return os.getpid()


def test_this_process_begins_only_with_what_may_run_here():
    crew = Crew(2, 3, int, ("3",))
    assert os.getpid() not in set(crew.map(where, range(20), seconds=300))
    crew.close()
    found = list(crew.map(slowly_where, range(500), seconds=300, early=True))
    assert found[0] == os.getpid() != found[-1]
    crew.close()


def test_a_process_that_dies_and_a_refusal_come_back_as_refusals():
    crew = Crew(2, 3, int, ("3",))
    with pytest.raises(Refusal, match="died"):
        list(crew.map(times, [1, -1, 2], seconds=300))
    with pytest.raises(Refusal, match="odd"):
        list(crew.map(times, [1, -2, 2], seconds=300))
    assert list(crew.map(times, [1, 2, 3], seconds=300)) == [3, 6, 9]
    crew.close()


def test_a_job_that_is_isolated_cannot_end_this_process():
    crew = Crew(1, 3, int, ("3",))
    with pytest.raises(Refusal, match="died"):
        list(crew.map(times, [-1], seconds=300, isolate=True))
    assert list(crew.map(times, [1, 2], seconds=300)) == [3, 6]
    crew.close()


def test_a_file_that_takes_too_long_is_a_refusal():
    with pytest.raises(Refusal, match="takes longer"), time_limit(0.05):
        time.sleep(30)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_chunks_lose_nothing():
    assert [list(c) for c in chunks(list(range(5)), 2)] == [[0, 1], [2, 3], [4]]
    assert chunks([], 2) == []


def test_two_workers_write_what_one_writes(study, tmp_path: Path, keys, monkeypatch):
    from deid_tools import crew, pipeline

    for module in ("run", "run_images"):
        monkeypatch.setattr(f"deid_tools.{module}.chunks", lambda jobs, size=3: crew.chunks(jobs, 3))
    monkeypatch.setenv("PATH", "/nonexistent")
    for workers in (1, 2):
        report = pipeline.deidentify(study.source, tmp_path / f"out{workers}", keys, workers=workers)
        assert [s.images for s in report.series] == [8]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").rglob("*.dcm")} for n in (1, 2))
    assert one == two
    assert len(one) >= 8
