"""The guard ends what outlives the program that it works for, and itself."""

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("gone", ["leader", "group"])
def test_the_guard_ends_what_is_left_of_a_group_and_itself(gone):
    sleeper = "import signal, time; signal.signal(signal.SIGINT, lambda *_: None); time.sleep(300)"
    with (
        subprocess.Popen([sys.executable, "-c", sleeper]) as leader,
        subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True) as group,
        subprocess.Popen([sys.executable, "-m", "medlsdm_node.guard", str(leader.pid), str(group.pid)]) as guard,
    ):
        time.sleep(0.5)
        assert (leader.poll(), group.poll(), guard.poll()) == (None, None, None)
        started = time.monotonic()
        (leader if gone == "leader" else group).kill()
        (leader if gone == "leader" else group).wait(10)
        assert guard.wait(30) == 0
        if gone == "leader":
            assert group.wait(10) == -signal.SIGKILL
            assert time.monotonic() - started > 5  # Flower's own way out comes first
        else:
            assert leader.poll() is None
            os.kill(leader.pid, signal.SIGKILL)
