"""The door for a PACS: a C-STORE SCP that acknowledges an instance only when the disk has it, sealed.

pynetdicom speaks DICOM; here is what it leaves open. An address that is not on the list is closed before it says a
word, a TLS handshake blocks nobody else, a PDU has a limit, no byte of an instance lies on the disk in clear or
grows in memory, and nothing that a sender says reaches a log.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pynetdicom import AE, AllStoragePresentationContexts, _config, dimse_messages, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

from medlsdm.errors import BusyError
from medlsdm_node.door import UNKNOWN, Door
from medlsdm_node.part10 import SYNTAXES
from medlsdm_node.receive_settings import ReceiveSettings
from medlsdm_node.spool import Spool
from medlsdm_node.taking import Taking

if TYPE_CHECKING:
    from pynetdicom.events import Event

SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
MAX_COMMAND_BYTES = 1 << 20  # a command, or the data set of anything but a C-STORE
MIN_PDU_LIMIT = 1 << 17  # room for an association request with many presentation contexts
HANDSHAKE_SECONDS, ACSE_SECONDS = 15.0, 30.0
READ_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class _Store:
    """Stand for the temporary file of pynetdicom's chunked receive; refuses once a limit is passed."""

    taking: Taking
    association: _Traffic
    quota: int
    name: str

    @property
    def file(self) -> Self:
        return self

    def write(self, content: bytes) -> int:
        """Add bytes, or let them go once the instance is refused: the sender gets its answer at the end."""
        self.association.bytes += len(content)
        if self.association.bytes > self.quota:
            self.taking.refuse("the association's quota is spent")
        return self.taking.write(content)

    def discard(self) -> None:
        """Let go of what is not acknowledged."""
        self.taking.discard()

    def flush(self) -> None:
        """Do nothing: a chunk is written when it is full, and what counts is ``finish``."""

    def close(self) -> None:
        """Let go of what the handler did not take."""
        self.discard()


@dataclass(slots=True, eq=False)
class _Traffic:
    """Follow one association: bytes received, and its instances that are not acknowledged yet."""

    bytes: int = 0
    stores: list[_Store] = field(default_factory=list)
    studies: set[str] = field(default_factory=set)


class Receiver(Door):
    """Listen for a PACS and keep what it sends in the spool. One in a process: pynetdicom's settings are global.

    Args:
        spool: Where instances go.
        settings: Who may send, and how much.
    """

    def __init__(self, spool: Spool, settings: ReceiveSettings) -> None:
        super().__init__(spool)
        self.settings = settings
        self._traffic: dict[Any, _Traffic] = {}
        self.server: _Server | None = None

    def start(self) -> None:
        """Bind the port and serve in threads of its own.

        Raises:
            BusyError: The port cannot be had.
        """
        _configure(self)
        settings = self.settings
        ae = AE(ae_title=settings.ae_title)
        ae.require_called_aet, ae.require_calling_aet = True, list(settings.calling)
        ae.maximum_associations, ae.maximum_pdu_size = settings.max_associations, settings.max_pdu_bytes
        ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = (
            ACSE_SECONDS,
            settings.idle_seconds,
            settings.idle_seconds,
        )
        ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            assert context.abstract_syntax is not None
            ae.add_supported_context(context.abstract_syntax, SYNTAXES)
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        try:
            self.server = _Server(self, ae, handlers)
        except OSError as error:
            raise BusyError(
                f"Port {settings.port} of {settings.host} cannot be had.",
                "Stop what listens there, or change receive.yaml.",
            ) from error
        ae._servers.append(self.server)
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    @property
    def port(self) -> int:
        """Return the port that was bound."""
        assert self.server is not None
        return self.server.server_address[1]

    @property
    def announcement(self) -> str:
        """Say where it listens."""
        tls = "over TLS" if self.settings.tls else "without TLS"
        return f"{self.settings.ae_title} listens on {self.settings.host}:{self.port} {tls}"

    def stop(self) -> None:
        """Close the port and end every association."""
        if self.server is not None:
            self.server.shutdown()
            for association in self.server.active_associations:
                association.abort()
            self.server = None

    def busy_with(self, study: str) -> bool:
        """Tell whether an association that is open sent to this study."""
        with self._lock:
            gone = [association for association in self._traffic if not association.is_alive()]
            left = [self._traffic.pop(association) for association in gone]
            busy = any(study in traffic.studies for traffic in self._traffic.values())
        for store in [store for traffic in left for store in traffic.stores]:
            store.discard()
        return busy

    def traffic(self, association: Any) -> _Traffic:
        """Return what is followed of an association."""
        with self._lock:
            return self._traffic.setdefault(association, _Traffic())

    def open_store(self, *_: Any, **__: Any) -> _Store:
        """Stand in for ``NamedTemporaryFile`` where pynetdicom begins to receive an instance."""
        traffic = self.traffic(threading.current_thread().assoc)  # type: ignore[attr-defined]
        taking = Taking(self.spool, self.settings)
        name = str(taking.arrival.writer.path if taking.arrival else self.spool.incoming / "refused")
        store = _Store(taking, traffic, self.settings.max_association_bytes, name)
        traffic.stores.append(store)
        return store

    def _store(self, event: Event) -> int:
        request: Any = event.request
        caller, store = event.assoc.requestor.ae_title, request._dataset_file
        if not isinstance(store, _Store):
            self.count(caller, "without data")
            return CANNOT_UNDERSTAND
        store.association.stores.remove(store)
        taken = store.taking.keep(str(request.AffectedSOPInstanceUID), str(event.context.transfer_syntax))
        if taken.outcome is None:
            self.count(caller, f"refused: {taken.refused}")
            return OUT_OF_RESOURCES
        store.association.studies.add(taken.study)
        self.count(caller, taken.outcome.value)
        return SUCCESS

    def _rejected(self, event: Event) -> None:
        caller = event.assoc.requestor.ae_title
        self.count(caller if caller in self.settings.calling else UNKNOWN, "association rejected")

    def _closed(self, event: Event) -> None:
        with self._lock:
            traffic = self._traffic.pop(event.assoc, _Traffic())
        for store in list(traffic.stores):
            store.discard()


def _configure(receiver: Receiver) -> None:
    """Set pynetdicom up, for this process: chunked receive into the spool, and silence."""
    _config.STORE_RECV_CHUNKED_DATASET = True
    _config.LOG_HANDLER_LEVEL = "none"
    dimse_messages.NamedTemporaryFile = receiver.open_store  # type: ignore[assignment]
    logging.getLogger("pynetdicom").disabled = True
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("pynetdicom."):
            logging.getLogger(name).disabled = True  # their lines quote what senders say


class _Socket(AssociationSocket):
    """Read with a limit: a PDU of 4 GiB is announced in six bytes."""

    def _shutdown_socket(self) -> None:
        """Close even where the peer went first: the library would leave the socket to the garbage collector."""
        given = self.socket
        super()._shutdown_socket()
        if given is not None:
            given.close()

    def recv(self, nr_bytes: int) -> bytearray:
        """Return ``nr_bytes``, or fewer if the peer went away; more than the limit ends the association."""
        assert self.socket is not None
        message = self.assoc.dimse.message
        held = (
            sum(buffer.tell() for buffer in (message.data_set, message.encoded_command_set) if buffer) if message else 0
        )
        if nr_bytes > max(self.assoc.ae.maximum_pdu_size, MIN_PDU_LIMIT) or held > MAX_COMMAND_BYTES:
            raise OSError("too much at once")
        received = bytearray()
        while len(received) < nr_bytes:
            piece = self.socket.recv(min(nr_bytes - len(received), READ_BYTES))
            if not piece:
                break
            received += piece
        return received


class _Handler(RequestHandler):
    def _create_association(self) -> Any:
        association = super()._create_association()
        given = association.dul.socket
        assert given is not None
        given.__class__ = _Socket
        return association


class _Server(ThreadedAssociationServer):
    """Accept connections; who may not connect is closed at once, and handshakes wait in threads of their own."""

    daemon_threads = True

    def __init__(self, receiver: Receiver, ae: AE, handlers: list[Any]) -> None:
        settings = receiver.settings
        self.receiver, self.tls = receiver, settings.tls.context() if settings.tls else None
        super().__init__(
            ae,
            (settings.host, settings.port),
            settings.ae_title,
            ae.supported_contexts,
            evt_handlers=handlers,
            request_handler=_Handler,
        )

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuse an address that is not on the list, and more connections than associations could use."""
        crowded = threading.active_count() > 32 + 8 * self.receiver.settings.max_associations
        if crowded or not self.receiver.settings.allows(client_address[0]):
            self.receiver.count(UNKNOWN, "connection refused")
            return False
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands if TLS is on, then hand over to the association."""
        request.settimeout(HANDSHAKE_SECONDS)
        if self.tls is not None:
            request = self.tls.wrap_socket(request, server_side=True)
        request.settimeout(self.receiver.settings.idle_seconds)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count a connection that failed, where the library would print a trace."""
        self.receiver.count(UNKNOWN, "connection failed")
