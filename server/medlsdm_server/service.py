"""The running coordinator: SuperLink on loopback, gateway in front, until it is told to stop."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError
from medlsdm_server.gateway import Gateway
from medlsdm_server.home import ServerHome
from medlsdm_server.superlink import SuperLink


def serve(home: ServerHome, bind: str, port: int, ready: Callable[[], None]) -> None:
    """Run until SIGTERM or Ctrl-C.

    Raises:
        BusyError: It runs already, or the port is taken.
        RoundError: The SuperLink does not start.
    """
    import uvicorn

    logging.basicConfig(filename=home.logs / "gateway.log", level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _stop)  # uvicorn ends itself and raises the signal again: so the rest ends too
    with _only_one(home), _listening(bind, port) as listener:
        link = SuperLink(home)
        try:
            link.start()
            write_atomic(home.run / "address.json", json.dumps({"port": port, "pid": os.getpid()}).encode())
            config = uvicorn.Config(
                Gateway(home, link).app(),
                ssl_certfile=str(home.server_cert),
                ssl_keyfile=str(home.server_key),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
            ready()
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            link.stop()
            (home.run / "address.json").unlink(missing_ok=True)
            (home.flwr / "config.toml").unlink(missing_ok=True)


def _stop(*_: object) -> None:
    raise SystemExit(0)


@contextmanager
def _only_one(home: ServerHome) -> Iterator[None]:
    with (home.run / "server.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"The coordinator in {home.root} is running already.", "Stop it first.") from error
        yield


@contextmanager
def _listening(bind: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((bind, port))
            listener.listen(128)
        except OSError as error:
            raise BusyError(
                f"Port {port} on {bind} cannot be used ({error.strerror}).", "Free it, or give --port."
            ) from error
        yield listener
