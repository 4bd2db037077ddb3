"""Flower's programs as we start them: watched, started again, ended with all that they started."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from medlsdm.federation import helpers, starter
from medlsdm.federation.helpers import Helper, stop

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]
FAMILY = """
import subprocess, sys, time, signal
for number in (2, 15):
    signal.signal(number, lambda *_: None)
deaf = "import signal, time; signal.signal(15, lambda *_: None); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print(child.pid, flush=True)
time.sleep(300)
"""


def helper(tmp_path, command):
    return Helper(lambda: command, log=tmp_path / "log", cwd=tmp_path, environment=lambda: os.environ)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def until(ready, seconds=20):
    end = time.monotonic() + seconds
    while not (answer := ready()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


def test_a_program_that_ends_is_started_again_after_a_pause_that_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers, "FIRST_PAUSE_S", 0.1)
    watched = helper(tmp_path, [sys.executable, "-c", "raise SystemExit(7)"])
    watched.pause = 0.1
    pauses, starts = [], 0
    end = time.monotonic() + 6
    while time.monotonic() < end and len(pauses) < 3:
        before = watched.process
        if watched.tend() == 7:
            pauses.append(watched.pause)
        starts += watched.process is not before and watched.process is not None
        time.sleep(0.02)
    assert pauses == [0.2, 0.4, 0.8]
    assert starts >= 3
    stop([watched])


def test_stopping_ends_a_program_and_its_children_that_hear_no_signal(tmp_path):
    watched = helper(tmp_path, [sys.executable, "-c", FAMILY])
    watched.start()
    child = int(until(lambda: (tmp_path / "log").read_text().strip()))
    started = time.monotonic()
    stop([watched], patience_s=1.0)
    assert time.monotonic() - started < 5
    assert not watched.alive
    until(lambda: gone(child))


def test_many_programs_are_ended_in_the_time_of_one(tmp_path):
    watched = [helper(tmp_path, [sys.executable, "-c", FAMILY]) for _ in range(4)]
    for one in watched:
        one.start()
    until(lambda: len((tmp_path / "log").read_text().split()) == 4)
    started = time.monotonic()
    stop(watched, patience_s=1.0)
    assert time.monotonic() - started < 4


def test_a_program_and_its_children_end_when_we_are_killed(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from medlsdm.federation.helpers import Helper
log = Path({str(tmp_path / "log")!r})
h = Helper(lambda: [sys.executable, "-c", {FAMILY!r}], log=log, cwd=Path("/"), environment=lambda: os.environ)
h.start()
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as us:
        child = int(until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip()))
        time.sleep(1)
        us.kill()
        us.wait()
        started = time.monotonic()
        until(lambda: gone(child), 15)
        assert time.monotonic() - started < 15


def test_logs_are_kept_small(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100)
    helpers.rotate(log, most_bytes=1000)
    assert log.exists()
    helpers.rotate(log, most_bytes=10)
    assert not log.exists()
    assert (tmp_path / "log.old").read_bytes() == b"x" * 100


@pytest.fixture
def runtime():
    """Answer signs of life as Flower's Runtime API does; the token 'done' is not known any more."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append((self.path, self.headers["flwr-task-token"], self.headers["content-type"]))
            self.send_response(401 if self.headers["flwr-task-token"] == "done" else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, seen
        server.shutdown()
        thread.join()


def run_starter(port, program, token="t", **extra):
    arguments = ["--runtime-api-address", f"127.0.0.1:{port}", "--token", token, "--insecure"]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", starter.__file__, str(program), *arguments], env=os.environ | extra
    )


def test_a_slow_program_shows_signs_of_life_under_its_own_process_number(runtime, tmp_path):
    port, seen = runtime
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\necho $$ "$@" > "$(dirname "$0")/said"\nexec sleep 300\n')
    slow.chmod(0o755)
    with run_starter(port, slow, **{starter.PID_FILE_VARIABLE: str(tmp_path / "pid")}) as process:
        until(lambda: seen and (tmp_path / "said").exists() and (tmp_path / "said").read_text())
        assert seen[0] == ("/v1/runtime/send-task-heartbeat", "t", "application/protobuf")
        said = (tmp_path / "said").read_text().split()
        assert said == [str(process.pid), "--runtime-api-address", f"127.0.0.1:{port}", "--token", "t", "--insecure"]
        assert (tmp_path / "pid").read_text() == str(process.pid)
        process.kill()


def test_the_signs_of_life_end_with_the_program_and_with_its_task(runtime, tmp_path):
    port, seen = runtime
    brief = tmp_path / "brief"
    brief.write_text("#!/bin/sh\nexec sleep 2\n")
    brief.chmod(0o755)
    with run_starter(port, brief, token="done") as process:
        until(lambda: seen)
        assert process.wait(10) == 0
    count = len(seen)
    time.sleep(0.5)
    assert len(seen) == count


def test_a_program_ends_with_the_one_that_started_it(tmp_path, runtime):
    port, _ = runtime
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nexec sleep 300\n')
    slow.chmod(0o755)
    code = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", {starter.__file__!r}, {str(slow)!r}, "--insecure", "--token", "x",
                  "--runtime-api-address", "127.0.0.1:{port}"])
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        until(lambda: gone(pid), 5)
