"""The guard ends what outlives the program that it works for, and itself."""

import os
import signal
import subprocess
import sys
import time

import pytest

from medlsdm.federation import guard as module

DEAF = "import signal, time; [signal.signal(s, lambda *_: None) for s in (2, 15)]; time.sleep(300)"


@pytest.mark.parametrize("gone", ["leader", "group"])
def test_the_guard_ends_what_is_left_of_a_group_and_itself(gone):
    with (
        subprocess.Popen([sys.executable, "-c", DEAF]) as leader,
        subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True) as group,
        subprocess.Popen([sys.executable, "-I", "-S", module.__file__, str(leader.pid), str(group.pid)]) as guard,
    ):
        time.sleep(0.5)
        assert (leader.poll(), group.poll(), guard.poll()) == (None, None, None)
        started = time.monotonic()
        (leader if gone == "leader" else group).kill()
        (leader if gone == "leader" else group).wait(10)
        assert guard.wait(30) == 0
        if gone == "leader":
            assert group.wait(10) == -signal.SIGKILL
            assert 5 < time.monotonic() - started < 14  # Flower's own way out comes first
        else:
            assert leader.poll() is None
            os.kill(leader.pid, signal.SIGKILL)


def test_a_group_of_dead_processes_that_nobody_waits_for_does_not_live():
    with subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert not module.lives(process.pid)
    with subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True) as process:
        assert module.lives(process.pid)
        process.kill()
