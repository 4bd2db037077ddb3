"""An output folder that is not as the last run left it, that two runs share, or that was made under other settings."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pydicom
import pytest

from deid_tools import crew, run_images
from deid_tools.folders import alone
from deid_tools.pipeline import deidentify
from deid_tools.silence import silence_for_good
from deid_tools.treatment import PixelPolicy
from deid_tools.uids import new_uid
from deid_tools.verify import Finding, verify_folder
from deid_tools.verify_report import UNFINISHED
from medlsdm.errors import DataError, ResourceError

pytestmark = pytest.mark.usefixtures("without_tesseract")


def run(study, tmp_path, keys, **options):
    return deidentify(study.source, tmp_path / "out", keys, schema=study.schema, **options)


def series(out: Path) -> Path:
    return min(out.rglob("0001.dcm")).parent


@pytest.mark.parametrize("second", [PixelPolicy(), PixelPolicy(text="quarantine", faces=False)])
def test_refuses_to_go_on_under_another_policy_for_pixels(second, study, tmp_path, keys):
    run(study, tmp_path, keys, policy=PixelPolicy(faces=False))
    with pytest.raises(DataError, match="other settings for text and faces"):
        run(study, tmp_path, keys, policy=second)


def test_refuses_to_go_on_where_text_could_not_be_searched_before(study, tmp_path, keys, monkeypatch):
    run(study, tmp_path, keys)
    monkeypatch.setattr("deid_tools.pixels.shutil.which", lambda name: "/usr/bin/tesseract")
    with pytest.raises(DataError, match="tesseract"):
        run(study, tmp_path, keys)


def test_refuses_a_folder_that_another_run_writes_into(study, tmp_path, keys):
    with alone(tmp_path / "out"), pytest.raises(DataError, match="Another run"):
        run(study, tmp_path, keys)
    assert run(study, tmp_path, keys).series


def test_a_link_in_place_of_leftovers_or_of_a_series_is_not_followed(study, tmp_path, keys):
    run(study, tmp_path, keys)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (tmp_path / "out" / ".working-x").symlink_to(precious)
    there = series(tmp_path / "out")
    there.rename(tmp_path / "elsewhere")
    there.symlink_to(tmp_path / "elsewhere")
    report = run(study, tmp_path, keys)
    assert "something else lies where its series belongs" in report.reasons()
    assert report.series == ()
    assert (precious / "file").exists()
    assert not (tmp_path / "out" / ".working-x").is_symlink()


def test_nothing_is_written_through_a_link_in_place_of_a_patients_folder(study, tmp_path, keys):
    first = run(study, tmp_path, keys).series[0].token.split("/")[0]
    shutil.rmtree(tmp_path / "out" / first)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / first).symlink_to(tmp_path / "elsewhere")
    report = run(study, tmp_path, keys)
    assert "something else lies where its series belongs" in report.reasons()
    assert report.series == ()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_series_that_was_changed_since_does_not_pass_again(study, tmp_path, keys):
    run(study, tmp_path, keys)
    path = series(tmp_path / "out") / "0002.dcm"
    ds = pydicom.dcmread(path)
    ds.PatientName = study.tokens[0]
    ds.save_as(path)
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert any("not a pseudonym" in reason for reason in report.reasons())


def test_files_that_were_renamed_since_keep_their_numbers(study, tmp_path, keys, monkeypatch):
    run(study, tmp_path, keys)
    files = sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)
    for number, path in enumerate(files):
        path.rename(path.with_name(f"renamed-{len(files) - number:02d}.dcm"))
    seen = []
    make = run_images.Series
    monkeypatch.setattr(run_images, "Series", lambda *a, **k: seen.append(a[7]) or make(*a, **k))
    assert run(study, tmp_path, keys).series[0].already
    written = [str(pydicom.dcmread(p).SOPInstanceUID) for p in sorted(series(tmp_path / "out").glob("0*.dcm"))]
    assert [new_uid(keys, uid) for uid in seen[0]] == written


def test_a_series_of_which_an_image_was_not_written_is_held(study, tmp_path, keys, monkeypatch):
    real = run_images._clean_series

    def lose_one(run, instances, staging, originals):
        done = real(run, instances, staging, originals)
        (staging / "0003.dcm").unlink()
        return done

    monkeypatch.setattr(run_images, "_clean_series", lose_one)
    report = run(study, tmp_path, keys)
    assert "not every image of its series was written" in report.reasons()
    assert not [*(tmp_path / "out").rglob("*.dcm")]


def test_a_worker_that_dies_while_headers_are_read_ends_the_run_in_words(study, tmp_path, keys, monkeypatch):
    def broken(self, work, job):
        raise crew.BrokenProcessPool

    for number in range(20):
        (study.source / f"more-{number}").write_bytes(b"no image")
    monkeypatch.setattr(crew.Crew, "_submit", broken)
    monkeypatch.setattr(crew.Crew, "_is_ready", lambda self: True)  # else this process reads them all
    with pytest.raises(ResourceError, match="a process that worked on it died"):
        run(study, tmp_path, keys, workers=2)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_crash_leaves_no_picture_of_the_memory():
    before = resource.getrlimit(resource.RLIMIT_CORE)
    silence_for_good()
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_a_stop_that_reaches_all_processes_at_once_is_for_the_first_one_alone(tmp_path):
    """As a terminal's Ctrl-C and a service manager's stop do, from the moment on when the processes start."""
    (tmp_path / "slow.py").write_text("import time\ndef slow(made, job):\n    time.sleep(0.1)\n    return job\n")
    program = (
        "import signal; from slow import slow; from deid_tools.crew import Crew\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: None)\n"
        "crew = Crew(2, None, int, ()); print('ready', flush=True)\n"
        "print(sum(crew.map(slow, range(60), seconds=60))); crew.close()"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as leader:  # fmt: skip
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        for _ in range(12):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.killpg(leader.pid, number)
            time.sleep(0.2)
        said, complaints = leader.communicate(timeout=60)
    assert (said, complaints) == (f"{sum(range(60))}\n", "")


def test_workers_end_with_a_program_that_is_killed(tmp_path):
    code = "import os, sys, time; from deid_tools.crew import Crew\n"
    code += "crew = Crew(2, None, int, ())\n"
    code += "print(*[f.result() for f in [crew._submit(pid, n) for n in range(2)]], flush=True); time.sleep(60)"
    (tmp_path / "who.py").write_text("import os\ndef pid(made, job):\n    return os.getpid()\n")
    program = "from who import pid\n" + code
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        workers = {int(word) for word in leader.stdout.readline().split()}
        leader.kill()
    until = time.monotonic() + 30
    while any(_alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers
    assert not [worker for worker in workers if _alive(worker)]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_is_told_to_end_takes_its_working_files_with_it(study, tmp_path):
    out = tmp_path / "out"
    code = "import time; from deid_tools import run; run.Run.admit_all = lambda self: time.sleep(60)\n"
    code += "from deid_tools.cli import main; main()"
    arguments = ["run", str(study.source), str(out)]
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "home")}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE) as program:
        until = time.monotonic() + 60
        while not [*out.glob(".working-*")] and time.monotonic() < until:
            time.sleep(0.05)
        assert [p.stat().st_mode & 0o077 for p in out.glob(".working-*")] == [0]
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=30) == 130
    assert [p.name for p in out.iterdir()] == ["report.json"]
    assert verify_folder(out) == [Finding("report.json", UNFINISHED)]


def test_a_second_run_that_is_stopped_leaves_no_finished_report(study, tmp_path, keys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    run(study, tmp_path, keys)
    assert verify_folder(tmp_path / "out") == []
    with monkeypatch.context() as patched:
        patched.setattr("deid_tools.run.Run.admit_all", stop)
        with pytest.raises(KeyboardInterrupt):
            run(study, tmp_path, keys)
    assert verify_folder(tmp_path / "out") == [Finding("report.json", UNFINISHED)]
    assert run(study, tmp_path, keys).series
    assert verify_folder(tmp_path / "out") == []


def test_two_people_under_one_patient_id_are_held(study, tmp_path, keys):
    files = sorted(p for p in study.source.rglob("*.dcm") if "SEG" not in p.name)
    other = tmp_path / "hospital" / "other"
    other.mkdir()
    for path in files:
        ds = pydicom.dcmread(path)
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientBirthDate = "1.2.3.91", "1.2.3.92", "19310708"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID}.9"
        ds.save_as(other / path.name)
    report = run(study, tmp_path, keys)
    assert report.series == ()
    assert report.reasons()["its patient ID stands for people with different birth dates"] == 2 * len(files) + 1
