"""The running coordinator: SuperLink on loopback, gateway in front, launches led, until it is told to stop."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from typing import Any

from medlsdm.checks import write_atomic
from medlsdm.errors import BusyError, MedlsdmError
from medlsdm_server.authority import check_certificates
from medlsdm_server.door import Listener, door
from medlsdm_server.gateway import Gateway
from medlsdm_server.home import ServerHome
from medlsdm_server.launcher import Launcher
from medlsdm_server.superlink import SuperLink

log = logging.getLogger(__name__)

LOG_BYTES, LOGS_KEPT = 5 << 20, 3
WATCH_SECONDS, CERTIFICATE_SECONDS = 1.0, 86_400.0


def serve(home: ServerHome, bind: str, port: int, say: Callable[[str], None], *, resume: bool = True) -> None:
    """Run until SIGTERM or Ctrl-C.

    Args:
        home: The coordinator's folder.
        bind: Address to listen on.
        port: Port to listen on.
        say: Tells the operator a line.
        resume: Lead launches on that an earlier run left unfinished.

    Raises:
        BusyError: It runs already, or the port is taken.
        ConfigError: The certificate has expired.
        RoundError: The SuperLink does not start.
    """
    if warning := check_certificates(home):
        say(warning)
    _log(home)
    signal.signal(signal.SIGTERM, _stop)  # uvicorn ends itself and raises the signal again: so the rest ends too
    with _only_one(home), _listening(bind, port) as listener:
        link, ended = SuperLink(home), threading.Event()
        watching: list[threading.Thread] = []
        try:
            link.start()
            gateway = Gateway(home, link)
            gateway.forget_nodes()
            write_atomic(home.run / "address.json", json.dumps({"port": port, "pid": os.getpid()}).encode())
            server = _server(home, gateway, listener)
            watching = [
                threading.Thread(target=_watch, args=(home, link, gateway, server.config.ssl, ended, say)),
                threading.Thread(target=Launcher(home, resume=resume).run, args=(ended,)),
            ]
            for thread in watching:
                thread.start()
            say(f"Coordinator ready on port {port}.")
            server.run(sockets=[listener])
        finally:
            ended.set()
            link.stop()
            for thread in watching:
                thread.join(5)
            (home.run / "address.json").unlink(missing_ok=True)
            (home.flwr / "config.toml").unlink(missing_ok=True)


def _log(home: ServerHome) -> None:
    handler = RotatingFileHandler(home.logs / "gateway.log", maxBytes=LOG_BYTES, backupCount=LOGS_KEPT)
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _server(home: ServerHome, gateway: Gateway, listener: Listener) -> Any:
    import uvicorn

    protocol: Any = door(listener, gateway.certified)

    def end_connections(admitted: set[str]) -> None:
        for connection in list(protocol.open_now):
            if connection.site and connection.site not in admitted:
                connection.transport.abort()

    gateway.end_connections = end_connections
    config = uvicorn.Config(
        gateway.app(),
        loop="asyncio",  # another loop would not ask the listener
        http=protocol,
        ws="none",
        ssl_certfile=str(home.server_cert),
        ssl_keyfile=str(home.server_key),
        ssl_ca_certs=str(home.ca_cert),
        ssl_cert_reqs=ssl.CERT_OPTIONAL,  # who enrols has none yet; fleet and models ask for one
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    config.load()
    return uvicorn.Server(config)


def _watch(
    home: ServerHome, link: SuperLink, gateway: Gateway, tls: ssl.SSLContext, ended: threading.Event,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Once a second: supervise Flower's programs, take up a renewed certificate, warn of one that will expire."""
    shown, left = home.server_cert.stat().st_mtime_ns, CERTIFICATE_SECONDS
    while not ended.wait(WATCH_SECONDS):
        try:
            if link.tend():
                gateway.forget_nodes()
            if (now := home.server_cert.stat().st_mtime_ns) != shown:
                tls.load_cert_chain(home.server_cert, home.server_key)
                shown = now
                log.info("the server shows its renewed certificate")
            left -= WATCH_SECONDS
            if left <= 0:
                left = CERTIFICATE_SECONDS
                if warning := check_certificates(home):
                    log.warning(warning)
                    say(warning)
        except (OSError, MedlsdmError) as error:
            log.warning("%s", error)


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
def _listening(bind: str, port: int) -> Iterator[Listener]:
    import socket

    with Listener(socket.AF_INET6 if ":" in bind else socket.AF_INET) as listener:
        try:
            listener.open((bind, port))
        except OSError as error:
            raise BusyError(
                f"Port {port} on {bind} cannot be used ({error.strerror}).", "Free it, or give --port."
            ) from error
        yield listener
