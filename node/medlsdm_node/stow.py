"""The door for DICOMweb: STOW-RS into the same spool as C-STORE, with the same promises.

``POST /studies`` and ``POST /studies/{uid}`` with multipart/related of application/dicom, answered in DICOM JSON;
everything else is refused. An instance named in the answer as referenced is on the disk, sealed. Sent again, it
changes nothing, so a sender that got no answer sends the request again. Source: DICOM PS3.18, section 10.5.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from http import HTTPStatus
from typing import Any

import h11

from medlsdm.errors import BusyError, DataError, MedlsdmError
from medlsdm_node import taking
from medlsdm_node.door import UNKNOWN, Door
from medlsdm_node.multipart import MultipartReader, Part, boundary_of
from medlsdm_node.part10 import Identity, is_uid
from medlsdm_node.receive_settings import ReceiveSettings, WebSettings, allows
from medlsdm_node.spool import Spool
from medlsdm_node.taking import Taken, Taking
from medlsdm_node.web_server import Exchange, WebServer

CALLER = "DICOMweb"  # who sent, in counts: one token or CA stands for all
CONNECTIONS_PER_UPLOAD = 4
PROCESSING_FAILURE, OUT_OF_RESOURCES, CANNOT_UNDERSTAND, SYNTAX_NOT_SUPPORTED = 0x0110, 0xA700, 0xC000, 0xC122
FAILURES = {  # PS3.18, table I.2-2
    taking.LOW: OUT_OF_RESOURCES,
    taking.FULL: OUT_OF_RESOURCES,
    taking.TOO_LARGE: OUT_OF_RESOURCES,
    taking.NOT_DICOM: CANNOT_UNDERSTAND,
    taking.SYNTAX: SYNTAX_NOT_SUPPORTED,
    taking.UIDS: CANNOT_UNDERSTAND,
    taking.CONTRADICTS: CANNOT_UNDERSTAND,
    taking.OTHER_STUDY: PROCESSING_FAILURE,
}
JSON_TYPES = ("*/*", "application/*", "application/json", "application/dicom+json")
Answer = tuple[HTTPStatus, dict[str, Any]]


class WebDoor(Door):
    """Listen for senders of DICOMweb and keep what they send in the spool.

    Args:
        spool: Where instances go.
        settings: Limits that hold for every door.
        web: Who may send to this one, and how much at once.
    """

    def __init__(self, spool: Spool, settings: ReceiveSettings, web: WebSettings) -> None:
        super().__init__(spool)
        self.settings, self.web = settings, web
        self.server: WebServer | None = None
        self._uploads: dict[threading.Thread, set[str]] = {}
        self._slots = threading.BoundedSemaphore(web.max_uploads)
        self._token = b""

    def start(self) -> None:
        """Bind the port and serve in threads of its own.

        Raises:
            BusyError: The port cannot be had.
            ConfigError: It would be open to anybody, or a file that it needs cannot be used.
        """
        self.web.check()
        token = self.web.token()
        self._token = hashlib.sha256(token).digest() if token else b""
        try:
            self.server = WebServer(
                (self.web.host, self.web.port),
                self.web.tls.context("web.tls") if self.web.tls else None,
                allows=lambda address: allows(self.web.addresses, address),
                most=self.web.max_uploads * CONNECTIONS_PER_UPLOAD,
                idle_seconds=self.settings.idle_seconds,
                serve=self._serve,
                failed=lambda what: self.count(UNKNOWN, what),
            )
        except OSError as error:
            raise BusyError(
                f"Port {self.web.port} of {self.web.host} cannot be had.",
                "Stop what listens there, or change 'web' in receive.yaml.",
            ) from error
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and break off every upload; what was not acknowledged leaves nothing."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def busy_with(self, study: str) -> bool:
        """Tell whether an upload that is under way sent to this study."""
        with self._lock:
            return any(study in studies for studies in self._uploads.values())

    @property
    def announcement(self) -> str:
        """Say where it listens."""
        assert self.server is not None
        host = f"[{self.web.host}]" if ":" in self.web.host else self.web.host
        return f"DICOMweb listens on http{'s' if self.web.tls else ''}://{host}:{self.server.port}/studies"

    def _serve(self, exchange: Exchange) -> None:
        """Answer one request. What goes wrong is told by a status, in words of our own."""
        caller = UNKNOWN
        try:
            request = exchange.request()
            if request is None:
                return
            refusal = self._refusal(request)
            caller = UNKNOWN if refusal and refusal[0] is HTTPStatus.UNAUTHORIZED else CALLER
            status, said = refusal or self._receive(exchange, request)
        except h11.RemoteProtocolError as error:
            status, said = HTTPStatus(error.error_status_hint), {}
        except OverflowError:
            status, said = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {}
        except DataError as error:
            status, said = HTTPStatus.BAD_REQUEST, {"error": error.message}
        except MedlsdmError as error:
            status, said = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": error.public_text}
        if "00081190" not in said:
            self.count(caller, f"request refused ({int(status)})")
        headers = {"content-type": "application/dicom+json" if "00081190" in said else "application/json"}
        headers |= {"www-authenticate": "Bearer"} if status is HTTPStatus.UNAUTHORIZED else {}
        headers |= {"allow": "POST"} if status is HTTPStatus.METHOD_NOT_ALLOWED else {}
        headers |= {"retry-after": "30"} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}
        exchange.answer(status, headers, json.dumps(said).encode())

    def _refusal(self, request: h11.Request) -> Answer | None:
        """Return the answer to a request whose body we do not want to see; who asks comes first."""
        headers = {name.lower(): value for name, value in request.headers}
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(hashlib.sha256(shown.strip()).digest(), self._token or b"\0" * 32)
        if self._token and not (right and scheme.lower() == b"bearer"):
            return HTTPStatus.UNAUTHORIZED, {}
        if _study(request) is None:
            return HTTPStatus.NOT_FOUND, {}
        if request.method != b"POST":
            return HTTPStatus.METHOD_NOT_ALLOWED, {}
        accepted = headers.get(b"accept", b"*/*").decode("latin-1").lower().split(",")
        if not any(kind.partition(";")[0].strip() in JSON_TYPES for kind in accepted):
            return HTTPStatus.NOT_ACCEPTABLE, {}
        if b"transfer-encoding" in headers and b"content-length" in headers:
            return HTTPStatus.BAD_REQUEST, {}  # a proxy before us may believe the other one (RFC 9112, section 6.1)
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {}
        if int(headers.get(b"content-length", b"0")) > self.web.max_request_bytes:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {}
        return None

    def _receive(self, exchange: Exchange, request: h11.Request) -> Answer:
        """Keep the instances of a request's body, one by one as they come, and say of each what became of it."""
        kind = next((value for name, value in request.headers if name.lower() == b"content-type"), b"")
        try:
            boundary = boundary_of(kind.decode("latin-1"))
        except DataError as error:
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": error.message}
        if not self._slots.acquire(blocking=False):
            return HTTPStatus.SERVICE_UNAVAILABLE, {}
        me = threading.current_thread()
        with self._lock:
            self._uploads[me] = set()
        try:
            body = exchange.body(self.web.max_request_bytes)
            parts = MultipartReader(body, boundary, self.web.max_parts).parts()
            taken = [self._take(part, _study(request) or "") for part in parts]
            for _ in body:  # after the last boundary nothing counts, but the request has an end
                continue
            return _answer(taken)
        finally:
            with self._lock:
                del self._uploads[me]
            self._slots.release()

    def _take(self, part: Part, study: str) -> Taken:
        """Keep one instance, or say why not."""
        instance = Taking(self.spool, self.settings)
        try:
            if not part.is_dicom:
                instance.refuse(taking.NOT_DICOM)
            for piece in part.content:
                instance.write(piece)
            taken = instance.finish(study)
        finally:
            instance.discard()
        if taken.outcome is None:
            self.count(CALLER, f"refused: {taken.refused}")
            return taken
        with self._lock:
            self._uploads[threading.current_thread()].add(taken.study)
        self.count(CALLER, taken.outcome.value)
        return taken


def _study(request: h11.Request) -> str | None:
    """Return the study that a request names, "" where it names none, or None where we have nothing of that name."""
    path = request.target.partition(b"?")[0].decode("latin-1").rstrip("/").split("/")
    if path[:2] != ["", "studies"] or len(path) > 3:
        return None
    return "" if len(path) == 2 else path[2] if is_uid(path[2]) else None


def _answer(taken: list[Taken]) -> Answer:
    """Return the Store Instances Response of PS3.18, table 10.5.3-1 and annex I.2."""
    kept = [_item(one.identity) for one in taken if one.outcome is not None]
    failed = [
        _item(one.identity) | {"00081197": {"vr": "US", "Value": [FAILURES[one.refused]]}}
        for one in taken
        if one.outcome is None
    ]
    said: dict[str, Any] = {"00081190": {"vr": "UR"}}
    said |= {"00081198": {"vr": "SQ", "Value": failed}} if failed else {}
    said |= {"00081199": {"vr": "SQ", "Value": kept}} if kept else {}
    if not taken:
        return HTTPStatus.BAD_REQUEST, {"error": "The multipart body has no part."}
    if not failed:
        return HTTPStatus.OK, said
    return HTTPStatus.ACCEPTED if kept else HTTPStatus.CONFLICT, said


def _item(identity: Identity) -> dict[str, Any]:
    uids = {"00081150": identity.sop_class, "00081155": identity.sop}
    return {tag: {"vr": "UI"} | ({"Value": [uid]} if uid else {}) for tag, uid in uids.items()}
