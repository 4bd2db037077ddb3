"""The thin Flower app: both sides build the same archive and compare its digest.

The archive names ``medlsdm_server.serverapp:app`` and ``medlsdm_node.clientapp:app``, which each side
has installed; it carries no code. ``flwr build`` writes equal bytes for equal files.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

from medlsdm.errors import ConfigError, RoundError

APP_FOLDER = Path(__file__).parent / "flower_app"

HELPER_SECONDS = 3.0
CHUNK_BYTES = 2 << 20  # of an array that travels: what a broken transfer sends twice at most
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def die_with_parent() -> None:
    """Ask Linux, in a child before it starts, to end it when its parent dies, even by SIGKILL."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def obey_file_modes() -> None:
    """Take from root, in a child before it starts, the power to write where file modes forbid it."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        _prctl(PR_CAPBSET_DROP, capability)


def end_group(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """End a program that leads its own process group, gently at first, and the helpers that outlive it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + HELPER_SECONDS
        while time.monotonic() < end:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def free_port() -> int:
    """Return a loopback port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def program(name: str) -> str:
    """Return the path of a console script that was installed with us (``flwr``, ``flower-supernode``)."""
    path = Path(sysconfig.get_path("scripts")) / name
    if path.exists():
        return str(path)
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"The program {name} is not installed.", "Install medlsdm again, with its dependencies.")
    return found


def flower_environment(flwr_home: Path, *first: Path, **extra: str) -> dict[str, str]:
    """Return the environment for any Flower process: no telemetry, no update check, own home, our programs first.

    ``first`` are folders whose programs go before the installed ones.
    """
    folders = [*map(str, first), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(flwr_home),
        "PATH": os.pathsep.join(folders),  # Flower starts its own
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES),
        "PYTHONWARNINGS": "ignore",
        "NO_COLOR": "1",
        **extra,
    }


def build_archive(folder: Path, flwr_home: Path) -> Path:
    """Build the app's archive (FAB) in ``folder`` and return its path; its name ends in its digest."""
    source = folder / "federation"  # flwr wants the folder named like a project
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(APP_FOLDER, source, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [program("flwr"), "build", "--app", str(source)],
        cwd=folder,
        env=flower_environment(flwr_home),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    archives = sorted(folder.glob("medlsdm.federation.*.fab"))
    if done.returncode != 0 or not archives:
        said = " ".join(done.stderr.split())[-200:]
        raise RoundError("The Flower app could not be built.", f"flwr build said: {said}")
    return archives[-1]
