"""End a process group once the program that it works for is gone, even by SIGKILL.

``python -m medlsdm_node.guard LEADER GROUP``, as process numbers. Flower's helpers notice by themselves, but not while
they start: one that has not loaded our app yet would go on calling a node that is gone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress

POLL_SECONDS, LAST_SECONDS = 2.0, 10.0


def guard(leader: int, group: int) -> None:
    """Wait until the leader or the whole group is gone; what is left of the group then gets some seconds."""
    with suppress(ProcessLookupError, PermissionError):  # the group is gone
        try:
            handle = os.pidfd_open(leader)
        except ProcessLookupError:
            handle = None
        while handle is not None and not select.select([handle], [], [], POLL_SECONDS)[0]:
            os.killpg(group, 0)
        time.sleep(LAST_SECONDS)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]))
