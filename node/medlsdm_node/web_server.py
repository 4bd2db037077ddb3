"""HTTP on the hospital's network, as little of it as a door needs: one request a connection, then it closes.

h11 speaks HTTP; here is what it leaves open. An address that is not on the list is closed before it says a word, a TLS
handshake blocks nobody else, threads are counted, a sender that stalls or trickles is let go, and nothing that it says
reaches a log.
"""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import h11

HANDSHAKE_SECONDS = 15.0
MAX_HEAD_BYTES = 16_384
READ_BYTES = 1 << 16
MIN_BYTES_PER_SECOND = 16_384  # on average, once the first moments are over
LINGER_BYTES, LINGER_SECONDS = 1 << 20, 2.0


class Pace:
    """Count how long we waited for the other side, and how much came of it.

    Args:
        grace: Seconds that we wait in any case; also the longest silence.
    """

    def __init__(self, grace: float) -> None:
        self.grace, self.waited, self.bytes = grace, 0.0, 0

    def patience(self) -> float:
        """Return how long to wait for the next bytes.

        Raises:
            TimeoutError: The other side is too slow on the whole.
        """
        left = self.grace + self.bytes / MIN_BYTES_PER_SECOND - self.waited
        if left <= 0:
            raise TimeoutError("the other side is too slow")
        return min(left, self.grace)

    def note(self, seconds: float, size: int) -> None:
        """Add what came, and how long it took."""
        self.waited += seconds
        self.bytes += size


class Exchange:
    """Hold one connection: a request and its answer."""

    def __init__(self, connection: socket.socket, idle_seconds: float) -> None:
        self.connection = connection
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._pace, self._idle_seconds = Pace(idle_seconds), idle_seconds

    def request(self) -> h11.Request | None:
        """Return the request's head, or None where nobody asks anything.

        Raises:
            h11.RemoteProtocolError: It is not HTTP, or its head is too long.
            OSError: The connection broke off, or is too slow.
        """
        event = self._event()
        return event if isinstance(event, h11.Request) else None

    def body(self, limit: int) -> Iterator[bytes]:
        """Yield the request's body; it is asked for only now if the sender waits to be asked.

        Raises:
            OverflowError: It is longer than ``limit``.
            h11.RemoteProtocolError: It is framed wrongly, or ends too early.
            OSError: The connection broke off, or is too slow.
        """
        length = 0
        while isinstance(event := self._event(), h11.Data):
            length += len(event.data)
            if length > limit:
                raise OverflowError
            yield bytes(event.data)

    def answer(self, status: HTTPStatus, headers: dict[str, str], content: bytes) -> None:
        """Send the answer, and wait a moment for the sender to hear it before the connection closes."""
        lines = {"content-length": str(len(content)), "connection": "close", "cache-control": "no-store"} | headers
        said = self._http.send(
            h11.Response(status_code=int(status), reason=status.phrase.encode(), headers=list(lines.items()))
        )
        self.connection.settimeout(self._idle_seconds)
        self.connection.sendall((said or b"") + (self._http.send(h11.Data(content)) or b""))
        with suppress(OSError):  # the answer is out; whether its reader said goodbye changes nothing
            self._linger()

    def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                asked = self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
                self.connection.settimeout(self._idle_seconds)
                self.connection.sendall(asked or b"")
            self._http.receive_data(self._receive())
        return event

    def _receive(self) -> bytes:
        self.connection.settimeout(self._pace.patience())
        since = time.monotonic()
        received = self.connection.recv(READ_BYTES)
        self._pace.note(time.monotonic() - since, len(received))
        return received

    def _linger(self) -> None:
        """Read on for a little: a connection closed on unread bytes is reset, and the answer with it."""
        self.connection.shutdown(socket.SHUT_WR)
        end, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
        while left > 0 and (patience := end - time.monotonic()) > 0:
            self.connection.settimeout(patience)
            received = self.connection.recv(READ_BYTES)
            if not received:
                return
            left -= len(received)


class WebServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Accept connections and hand each to ``serve`` in a thread of its own.

    Args:
        address: Host and port; port 0 takes any.
        tls: The context of a server that speaks TLS.
        allows: Tells whether an address may connect.
        most: How many connections may be open.
        idle_seconds: How long to wait for a sender that says nothing.
        serve: Called with each connection; what it raises ends the connection.
        failed: Called with what went wrong with a connection, in words that nobody else chose.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 32

    def __init__(
        self,
        address: tuple[str, int],
        tls: ssl.SSLContext | None,
        *,
        allows: Callable[[str], bool],
        most: int,
        idle_seconds: float,
        serve: Callable[[Exchange], None],
        failed: Callable[[str], None],
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._tls, self._allows, self._most, self._idle_seconds = tls, allows, most, idle_seconds
        self._serve, self._failed = serve, failed
        self._open: dict[int, tuple[socket.socket, threading.Thread]] = {}
        self._lock = threading.Lock()
        super().__init__(address, socketserver.BaseRequestHandler)

    @property
    def port(self) -> int:
        """Return the port that was bound."""
        return self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse an address that is not on the list, and more connections than could be served."""
        if self._allows(client_address[0]) and len(self._open) < self._most:
            return True
        self._failed("connection refused")
        return False

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands if TLS is on, then serve."""
        request.settimeout(HANDSHAKE_SECONDS)
        number = id(request)
        self._follow(number, request)
        try:
            connection = self._tls.wrap_socket(request, server_side=True) if self._tls else request
            with connection:
                self._follow(number, connection)
                self._serve(Exchange(connection, self._idle_seconds))
        finally:
            with self._lock:
                del self._open[number]

    def _follow(self, number: int, connection: socket.socket) -> None:
        with self._lock:
            self._open[number] = connection, threading.current_thread()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count a connection that failed, where the library would print a trace."""
        self._failed("connection failed")

    def close(self) -> None:
        """Listen no more, and break off what is under way."""
        self.shutdown()
        self.server_close()
        with self._lock:
            left = list(self._open.values())
        for connection, thread in left:
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                self._failed("connection failed")
            thread.join(self._idle_seconds)
