"""Start one of Flower's app programs so that it is not given up while it starts, and does not outlive its parent.

``python -I -S starter.py PROGRAM ARGUMENT...``, run in place of ``flwr-serverapp`` or ``flwr-clientapp``. Flower gives
such a program 30 s from the moment it was sent for until its first sign of life; on a busy machine the imports alone
take longer, and Flower then starts another and another. So a light child sends the signs of life until the program
does, and both end with the process that started them. Only the standard library is imported, for speed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request

BEAT_SECONDS, START_SECONDS = 8.0, 600.0
PID_FILE_VARIABLE = "MEDLSDM_APP_PID_FILE"
PR_SET_PDEATHSIG = 1


def option(arguments: list[str], name: str) -> str:
    """Return what follows an option, or ''."""
    return arguments[arguments.index(name) + 1] if name in arguments[:-1] else ""


def end_with_parent(number: int) -> None:
    """Ask Linux for a signal when the parent dies, and go at once if it is dead already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def beat(arguments: list[str], until: float) -> None:
    """Send signs of life to the Runtime API until it takes no more, or the time is over."""
    plain = "--insecure" in arguments
    address = option(arguments, "--runtime-api-address") or option(arguments, "--appio-api-address")
    certificates = option(arguments, "--root-certificates")
    context = None if plain else ssl.create_default_context(cafile=certificates or None)
    request = urllib.request.Request(  # noqa: S310  # the scheme is stated here
        f"{'http' if plain else 'https'}://{address}/v1/runtime/send-task-heartbeat",
        data=b"",
        headers={"flwr-task-token": option(arguments, "--token"), "content-type": "application/protobuf"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    while time.monotonic() < until:
        try:
            with opener.open(request, timeout=BEAT_SECONDS):
                pass
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return  # the task is done, or another has it
        except OSError:
            time.sleep(BEAT_SECONDS / 4)  # not now: the next beat will tell
            continue
        time.sleep(BEAT_SECONDS)


def start(program: str, arguments: list[str]) -> None:
    """Become the program; the child that is forked before sends the signs of life."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() == 1:
        raise SystemExit(1)  # the parent was gone before we asked
    if os.fork() == 0:
        end_with_parent(signal.SIGKILL)
        beat(arguments, time.monotonic() + START_SECONDS)
        os._exit(0)
    if where := os.environ.get(PID_FILE_VARIABLE):
        draft = f"{where}.draft"
        with open(draft, "w") as stream:  # pathlib costs a third of the start
            stream.write(str(os.getpid()))
        os.replace(draft, where)
    os.execv(program, [program, *arguments])  # noqa: S606


if __name__ == "__main__":
    start(sys.argv[1], sys.argv[2:])
