"""Originals in clear: gone when the work ends, and gone at the next start when the process was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pydicom
import pytest

from deid_tools.plant import write_planted_study
from medlsdm.anatomy import generate
from medlsdm.errors import BusyError, ResourceError
from medlsdm.federation.app import program
from medlsdm.types import Modality
from medlsdm_node import quarantine
from medlsdm_node.home import NodeHome
from medlsdm_node.intake import INTAKE, expire, take_study
from medlsdm_node.part10 import identify
from medlsdm_node.receive_settings import ReceiveSettings
from medlsdm_node.spool import Spool
from medlsdm_node.status import node_status
from medlsdm_node.taking import Taking
from medlsdm_node.working import INGEST, STUDY, leftovers, wipe_leftovers, working_folder

HOLDER = """
import sys, time
from pathlib import Path
from medlsdm_node.home import NodeHome
from medlsdm_node.working import STUDY, working_folder
with working_folder(NodeHome(Path(sys.argv[1])), STUDY) as folder:
    (folder / "in.dcm").write_bytes(b"DOE^JANE")
    print(folder, flush=True)
    time.sleep(60)
"""


def holding(home: NodeHome) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that works in a folder, and return both."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(home.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_and_gone_when_the_block_ends(home):
    seen: list[Path] = []

    def stopped() -> None:
        with working_folder(home, INGEST) as folder:
            seen.append(folder)
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "in").mkdir()
            (folder / "in/x").write_bytes(b"DOE^JANE")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not seen[0].exists()
    assert leftovers(home) == 0


def test_what_a_killed_process_left_is_counted_and_then_wiped_and_a_living_one_keeps_its_own(home):
    process, folder = holding(home)
    try:
        assert (folder / "in.dcm").exists()
        assert leftovers(home) == 0
        assert wipe_leftovers(home) == 0
        with working_folder(home, INGEST):
            assert (folder / "in.dcm").exists()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert (folder / "in.dcm").exists()
    assert node_status(home)["left_in_clear"] == 1
    with working_folder(home, STUDY) as other:
        assert not folder.exists()
        assert other.exists()
    assert node_status(home)["left_in_clear"] == 0
    assert [r["fields"] for r in home.audit.records() if r["event"] == "leftovers-wiped"] == [{"folders": 1}]


def test_a_folder_left_by_an_earlier_version_goes_and_nothing_else_does(home, tmp_path):
    for name in ("ingest-old/clean", "study-old/in", "other"):
        (home.run / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").write_bytes(b"x")
    (home.run / "study-link").symlink_to(tmp_path / "elsewhere")
    (home.run / "study-file").write_bytes(b"x")
    assert leftovers(home) == 2
    assert wipe_leftovers(home) == 2
    assert (tmp_path / "elsewhere/kept").exists()
    assert (home.run / "other").is_dir()


def test_what_cannot_be_deleted_stops_the_next_run_and_says_so(home, monkeypatch):
    (home.run / "study-old").mkdir()

    def refuse(path: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("medlsdm_node.working.shutil.rmtree", refuse)
    with pytest.raises(ResourceError, match="in clear"), working_folder(home, INGEST):
        raise AssertionError("it began")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "in"
    scan, labels = generate(5, Modality.MR, (64, 64, 40))
    write_planted_study(scan.array, scan.geometry, scan.modality, labels, folder, seed=5, hospital="Northgate")
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_ingest_that_is_ended_leaves_nothing_and_one_that_is_killed_until_the_next_start(
    home, files, number, status
):
    command = [program("medlsdm-node"), "ingest", str(files), "--home", str(home.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not any(p.is_file() for p in home.run.glob("ingest-*/clean/.working-*/**/*.dcm")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(120) == status
    assert len(list(home.run.glob("ingest-*"))) == (number == signal.SIGKILL)
    said = subprocess.run([program("medlsdm-node"), "status", "--home", str(home.root)], capture_output=True, text=True)
    assert ("IN CLEAR: 1 " in said.stdout) == (number == signal.SIGKILL)
    wipe_leftovers(home)
    assert not list(home.run.glob("ingest-*"))


def received(home: NodeHome, files: Path) -> tuple[Spool, str]:
    """Put a study into the spool as a door would."""
    spool = Spool(home)
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        taking = Taking(spool, ReceiveSettings(min_free_bytes=0))
        taking.write(path.read_bytes())
        assert identify(path.read_bytes()).study
        assert taking.finish().outcome is not None
    (study,) = spool.studies()
    return spool, study


def test_a_study_is_taken_released_purged_or_let_go_of_by_one_process_at_a_time(home, files):
    spool, study = received(home, files)
    record = spool.record(study)
    record.held = {path.stem: "a reason" for path in spool.files(study)}
    spool.put_record(study, record)
    (item,) = quarantine.items(home)
    with home.locked(INTAKE):  # as ``receive`` does while it takes a study in
        for act in (quarantine.release, quarantine.purge):
            with pytest.raises(BusyError):
                act(home, item.id)
        with pytest.raises(BusyError):
            take_study(spool, study)
        assert not expire(spool, study, 0.0)
    assert spool.record(study) == record, "an attempt was counted, or something was forgotten"
    assert list(home.run.glob("study-*")) == []
    assert quarantine.release(home, item.id)["pairs"] == 1
    assert expire(spool, study, 0.0)


def test_a_start_of_the_receiver_wipes_nothing_under_a_release_that_runs(home):
    process, folder = holding(home)
    try:
        wipe_leftovers(home)
        Spool(home).recover()
        assert (folder / "in.dcm").exists()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


LISTENING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, filename=sys.argv.pop(), format="%(message)s")
from medlsdm_node.cli import main
main()
"""


def test_what_libraries_say_of_an_original_is_heard_by_nobody(home, files, tmp_path):
    path = next(p for p in sorted(files.rglob("*")) if p.is_file())
    spoilt = path.read_bytes()
    uid = str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_bytes(spoilt.replace(uid, b"Dekeloza^Anna".ljust(len(uid), b"x")))
    spool, study = received(home, tmp_path / "in")
    record = spool.record(study)
    record.held = {path.stem: "a reason" for path in spool.files(study)}
    spool.put_record(study, record)
    (item,) = quarantine.items(home)
    asked = ["quarantine", "show", item.id, "--identify", "--home", str(home.root), "--json", str(tmp_path / "log")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LISTENING, *asked], capture_output=True, text=True, check=False
    )
    assert "Dekeloza" in json.loads(done.stdout)["uids"][0]["SeriesInstanceUID"], "who asks for it sees it"
    assert done.stderr == ""
    assert "Dekeloza" not in (tmp_path / "log").read_text()


def test_a_crash_writes_no_image_of_the_memory():
    code = (
        "import resource, sys\nfrom medlsdm_node import cli\ncli.run = lambda *_: None\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"
        "cli.main()\nprint(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "0\n", done.stderr
