"""End a process group once the program that it works for is gone, even by SIGKILL.

``python -I -S guard.py LEADER GROUP``, as process numbers. Flower's helpers notice by themselves, but not while
they start: one that has not loaded our app yet would go on calling a node that is gone. Only the standard library is
imported, so that a guard costs little.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

POLL_SECONDS, LAST_SECONDS = 2.0, 8.0


def guard(leader: int, group: int) -> None:
    """Wait until the leader or the whole group is gone; what is left of the group then gets some seconds."""
    try:
        handle = os.pidfd_open(leader)
    except ProcessLookupError:
        handle = None
    while handle is not None and not select.select([handle], [], [], POLL_SECONDS)[0]:
        if not lives(group):
            return
    end = time.monotonic() + LAST_SECONDS
    while lives(group):
        number = signal.SIGTERM if time.monotonic() < end else signal.SIGKILL
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.5)


def lives(group: int) -> bool:
    """Tell whether a group has a process that is not dead; in a container without an init the dead may stay listed."""
    for name in os.listdir("/proc"):  # pathlib costs a third of the start
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stream:
                    fields = stream.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in (b"Z", b"X"):
                return True
    return False


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]))
