"""The door itself: how many may stand in it, how long a request may take to come, and whose certificate was shown.

All of it happens before a handler runs, so that who has not said who they are costs little: at most
``MOST_STRANGERS`` connections without a site's certificate, ``MOST_OF_ADDRESS`` of one address, each with
``HEAD_SECONDS`` for its handshake and for the head of a request. When there are too many the oldest ends, so that
a crowd of idle connections keeps nobody out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_STRANGERS, MOST_OF_ADDRESS = 100, 32  # asyncio keeps 256 KiB for each TLS connection
HEAD_SECONDS, SILENCE_SECONDS = 10.0, 60.0
STRANGER_IDLE_SECONDS, SITE_IDLE_SECONDS = 5, 90


class _Connection(socket.socket):
    """Hold an accepted connection that tells the listener when it ends."""

    gone: Callable[[_Connection], object] | None = None
    address = ""

    def close(self) -> None:
        if self.gone is not None:
            self.gone(self)
            self.gone = None
        super().close()


class Listener(socket.socket):
    """Accept connections and count those of strangers; asyncio calls ``accept`` as on any socket."""

    def open(self, address: tuple[str, int]) -> None:
        """Begin to listen at ``address``."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.bind(address)
        self.listen(128)
        self.strangers: dict[Any, _Connection] = {}  # by the other end's address and port, oldest first

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection; the oldest one gives way where there are too many."""
        raw, peer = super().accept()
        connection = _Connection(fileno=raw.detach())
        connection.address = str(peer[0])
        connection.gone = lambda _: self.strangers.pop(peer, None)
        self.strangers[peer] = connection
        same = [c for c in self.strangers.values() if c.address == connection.address]
        if len(same) > MOST_OF_ADDRESS:
            _end(same[0])
        elif len(self.strangers) > MOST_STRANGERS:
            _end(next(iter(self.strangers.values())))
        asyncio.get_running_loop().call_later(HEAD_SECONDS, self._expire, peer, connection)
        return connection, peer

    def _expire(self, peer: Any, connection: _Connection) -> None:
        """End a connection whose handshake has not come to an end."""
        if self.strangers.get(peer) is connection and not getattr(connection, "_greeted", False):
            _end(connection)

    def greeted(self, peer: Any, *, known: bool) -> None:
        """Note that a handshake is done; who shows a site's certificate is a stranger no more."""
        connection = self.strangers.get(peer)
        if connection is not None:
            connection._greeted = True  # type: ignore[attr-defined]
            if known:
                del self.strangers[peer]


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def door(listener: Listener, site_of: Callable[[bytes], str]) -> type[H11Protocol]:
    """Return the HTTP protocol of this door.

    Args:
        listener: Where the connections come from.
        site_of: Names the admitted site whose certificate (DER) was shown, or returns ''.
    """

    class Door(H11Protocol):
        """Serve one connection under deadlines, and tell the application whose certificate it showed."""

        open_now: set[Door] = set()  # noqa: RUF012  # shared on purpose: revoking a site ends its connections
        site = ""
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            tls = transport.get_extra_info("ssl_object")
            certificate = tls.getpeercert(binary_form=True) if tls else None
            self.site = site_of(certificate) if certificate else ""
            listener.greeted(transport.get_extra_info("peername"), known=bool(self.site))
            self.app_state = {**self.app_state, "certificate": certificate or b"", "certified": self.site}
            self.timeout_keep_alive = SITE_IDLE_SECONDS if self.site else STRANGER_IDLE_SECONDS
            self.open_now.add(self)
            self._arm(HEAD_SECONDS)

        def connection_lost(self, exc: Exception | None) -> None:
            self.open_now.discard(self)
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            body = self.conn.their_state is h11.SEND_BODY
            super().data_received(data)
            if self.conn.their_state is h11.SEND_BODY:
                self._arm(SILENCE_SECONDS if self.site else HEAD_SECONDS, anew=body and bool(self.site))
            elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
                self._arm(HEAD_SECONDS)  # a head has begun; more bytes of it give no more time
            else:
                self._disarm()

        def _arm(self, seconds: float, *, anew: bool = False) -> None:
            if anew or self.deadline is None:
                self._disarm()
                self.deadline = self.loop.call_later(seconds, self._late)

        def _disarm(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def _late(self) -> None:
            self.deadline = None
            if self.flow.read_paused:  # it is we who do not read
                self._arm(SILENCE_SECONDS)
            else:
                self.transport.abort()

    return Door
