"""Receive from a PACS while the node serves rounds: a process of its own, watched, started again when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medlsdm.federation.app import die_with_parent, end_group, program
from medlsdm_node.deid_settings import load_deid
from medlsdm_node.home import NodeHome
from medlsdm_node.receive_settings import load_receive

FIRST_PAUSE_S, LONGEST_PAUSE_S, STOP_SECONDS = 2.0, 60.0, 30.0


@contextmanager
def beside(home: NodeHome, say: Callable[[str], None]) -> Iterator[None]:
    """Keep ``medlsdm-node receive`` running for as long as the block does.

    Raises:
        ConfigError: receive.yaml does not read, or allows nobody; or deid.yaml does not read.
    """
    load_receive(home)
    load_deid(home).check_segmenter()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(home, say, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(STOP_SECONDS + 10)


def _watch(home: NodeHome, say: Callable[[str], None], done: threading.Event) -> None:
    pause = FIRST_PAUSE_S
    while not done.is_set():
        process = subprocess.Popen(
            [program("medlsdm-node"), "receive", "--home", str(home.root)],
            env=dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        while process.poll() is None and not done.wait(1.0):
            pause = max(pause / 1.05, FIRST_PAUSE_S)
        end_group(process, STOP_SECONDS)
        if not done.is_set():
            say(f"The receiver ended with status {process.returncode}; again in {pause:.0f} s.")
            done.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
