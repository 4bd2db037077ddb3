"""The way from Flower's SuperNode to the coordinator: a door on loopback, with the site's certificate behind it.

Flower's SuperNode knows no client certificate and signs the time of a call alone. So it speaks to this door, which
checks that the caller is our own SuperNode, signs each call with the site's identity, body included, and sends it over
mutual TLS. What the SuperNode must not see or say is mended on the way: any fault of the line or of the server is 503,
which it tries again; error texts that are not ours are replaced before they leave.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import hashlib
import json
import logging
import ssl
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from medlsdm.errors import RoundError
from medlsdm.federation.identity import ACTIVITY_HEADER, CLOCK_HEADER, sign_request
from medlsdm_node.coordinator import Coordinator
from medlsdm_node.home import NodeHome
from medlsdm_node.loopback import loopback_certificate
from medlsdm_node.status import ROUND_ACTIVITIES, read_activity
from medlsdm_node.words import Words

log = logging.getLogger(__name__)

PUBLIC_KEY, SIGNATURE, TIMESTAMP = "flwr-public-key", "flwr-signature", "flwr-timestamp"
LOCAL_SECONDS = 120
SHORT_SECONDS, LONG_SECONDS = 25.0, 90.0  # of silence on the line
MOST_BYTES = 16 << 20
KEPT = ("content-type", "accept", "user-agent")
SHOWN = ("activity", "model", "stage", "round")


class Forwarder:
    """Run the door in a thread. ``contact`` and ``pull`` are the moments (monotonic) of the last good calls."""

    def __init__(self, home: NodeHome, coordinator: Coordinator) -> None:
        self.home, self.coordinator = home, coordinator
        self.port = 0
        self.contact = self.pull = time.monotonic()
        self.busy = False  # a message was handed over and has not been answered
        self.handed = 0.0  # when, seconds since 1970
        self.refusal = ""  # the coordinator's words when it refuses this site
        self.node_id = 0
        key = load_ssh_private_key(home.node_key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self._under_way: dict[str, asyncio.Task[Response]] = {}
        self._words = Words()
        self._client: httpx.AsyncClient | None = None
        self._certificate = 0
        self._closing: asyncio.Task[None] | None = None
        self.asked = time.monotonic()  # the last call of the SuperNode, whatever became of it
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()

    @property
    def certificate(self) -> Any:
        """Return the file with the certificate that the SuperNode shall trust."""
        return self.home.run / "loopback.crt"

    def start(self) -> None:
        """Begin to listen on a free port of loopback.

        Raises:
            RoundError: It did not come up.
        """
        loopback_certificate(self.certificate, self.home.run / "loopback.key")
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        self._thread.start()
        if not self._ready.wait(60) or not self.port:
            raise RoundError("The way to the coordinator could not be opened on loopback.", "Is the machine full?")

    def begin_again(self) -> None:
        """Forget what a SuperNode did that is started anew."""
        self.asked = self.pull = time.monotonic()
        self.busy = False

    def stop(self) -> None:
        """End it."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(5)

    def _run(self) -> None:
        import socket

        import uvicorn

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            routes = [Route("/v1/fleet/{call}", self._call, methods=["POST"])]
            app = Starlette(routes=routes, lifespan=self._lifespan)
            config = uvicorn.Config(
                app, loop="asyncio", http="h11", ws="none", log_config=None, access_log=False,
                ssl_certfile=str(self.certificate), ssl_keyfile=str(self.home.run / "loopback.key"),
                timeout_keep_alive=90, timeout_graceful_shutdown=1,
            )  # fmt: skip
            self._server = uvicorn.Server(config)
            self.port = listener.getsockname()[1]
            self._ready.set()
            self._server.run(sockets=[listener])

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        if self._client is not None:
            await self._client.aclose()

    async def _call(self, request: Request) -> Response:
        """Take one call of the SuperNode; the same call again, while the first is under way, shares its answer."""
        if not self._is_ours(request):
            return PlainTextResponse("Unauthorized", 401)
        self.asked = time.monotonic()
        body = await request.body()
        if len(body) > MOST_BYTES:
            return PlainTextResponse("Content Too Large", 413)
        call = request.path_params["call"]
        kept = {k: request.headers[k] for k in request.headers if k in KEPT or k.startswith("flwr-")}
        if call in ("pull-messages", "send-node-heartbeat"):
            return await self._forward(call, kept, body)
        name = f"{call} {hashlib.sha256(body).hexdigest()}"
        if (task := self._under_way.get(name)) is None:
            task = self._under_way[name] = asyncio.create_task(self._forward(call, kept, body))
            task.add_done_callback(lambda _: self._under_way.pop(name, None))
        return _copy(await asyncio.shield(task))

    def _is_ours(self, request: Request) -> bool:
        """Tell whether the caller holds this node's key: others on this machine may reach the port too."""
        try:
            moment = request.headers[TIMESTAMP]
            age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(moment)
            if base64.b64decode(request.headers[PUBLIC_KEY], validate=True) != self._public:
                return False
            signature = base64.b64decode(request.headers[SIGNATURE], validate=True)
            self._key.public_key().verify(signature, moment.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature):
            return False
        return abs(age.total_seconds()) < LOCAL_SECONDS

    async def _forward(self, call: str, headers: dict[str, str], body: bytes) -> Response:
        sent = self._words.outgoing(call, body)
        path = f"/v1/fleet/{call}"
        answer: httpx.Response | None = None
        for _ in range(2):  # the second time with the coordinator's clock
            offset = self.coordinator.clock_offset
            signed = headers | self._flower_headers(offset) | self._our_headers(path, sent, offset)
            try:
                seconds = LONG_SECONDS if call in ("push-object", "pull-object", "get-fab") else SHORT_SECONDS
                answer = await self._line().post(path, content=sent, headers=signed, timeout=seconds)
            except (httpx.HTTPError, ssl.SSLError, OSError) as error:
                log.warning("%s did not reach the coordinator: %s", call, type(error).__name__)
                return PlainTextResponse("Service Unavailable", 503)
            if not (answer.status_code == 403 and self.coordinator.learn_clock(answer.headers.get(CLOCK_HEADER))):
                break
        assert answer is not None
        return self._answer(call, body, answer)

    def _answer(self, call: str, body: bytes, answer: httpx.Response) -> Response:
        self.coordinator.learn_clock(answer.headers.get(CLOCK_HEADER))
        if answer.status_code == 403 and (said := _refused(answer)):
            self.refusal = said
            return PlainTextResponse("Service Unavailable", 503)
        if answer.status_code >= 500:
            return PlainTextResponse("Service Unavailable", 503)
        content = answer.content
        if answer.status_code == 200:
            self._note(call, content)
            content = self._words.incoming(call, content)
        kept = {k: v for k, v in answer.headers.items() if k == "content-type" or k.startswith("flwr-")}
        return Response(content, answer.status_code, kept)

    def _note(self, call: str, answer: bytes) -> None:
        from flwr.proto import fleet_pb2

        self.contact, self.refusal = time.monotonic(), ""
        if call == "activate-node":
            self.node_id, self.busy = fleet_pb2.ActivateNodeResponse.FromString(answer).node_id, False
        elif call == "pull-messages":
            self.pull = time.monotonic()
            self.busy = bool(fleet_pb2.PullMessagesResponse.FromString(answer).messages_list)
            self.handed = time.time() if self.busy else self.handed

    def _line(self) -> httpx.AsyncClient:
        """Return the connections to the coordinator, new ones when the certificate is new."""
        shown = self.home.tls_file.stat().st_mtime_ns
        if self._client is None or shown != self._certificate:
            self._certificate, old = shown, self._client
            if old is not None:
                self._closing = asyncio.create_task(old.aclose())
            self._client = httpx.AsyncClient(
                verify=self.coordinator.context(),
                base_url=f"https://{self.coordinator.address}",
                limits=httpx.Limits(max_connections=8, keepalive_expiry=60),
                trust_env=False,
            )
        return self._client

    def _flower_headers(self, offset: float) -> dict[str, str]:
        """Sign Flower's way, at the coordinator's time: the SuperLink takes a clock that is 5 s ahead for a fault."""
        moment = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset)).isoformat()
        signature = self._key.sign(moment.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        return {
            TIMESTAMP: moment,
            SIGNATURE: base64.b64encode(signature).decode("ascii"),
            PUBLIC_KEY: base64.b64encode(self._public).decode("ascii"),
        }

    def _our_headers(self, path: str, body: bytes, offset: float) -> dict[str, str]:
        site = self.home.settings.site
        now = read_activity(self.home)
        if now["activity"] not in ROUND_ACTIVITIES:
            now = {"activity": "receiving" if self.busy else "waiting"}
        shown = json.dumps({k: now[k] for k in SHOWN if now.get(k)})
        signed = sign_request(self.home.identity, site, "POST", path, body, now=time.time() + offset)
        return signed | {ACTIVITY_HEADER: shown}


def _copy(answer: Response) -> Response:
    """Return an answer of its own for each caller that waited for the same call."""
    again = Response(bytes(answer.body), answer.status_code)
    again.raw_headers = list(answer.raw_headers)
    return again


def _refused(answer: httpx.Response) -> str:
    """Return the gateway's own words in a refusal, or '' where Flower refused."""
    try:
        said = json.loads(answer.content)
        return " ".join(f"{said['message']} {said['hint']}".split())[:300] if said["error"] == "enrolment" else ""
    except (ValueError, KeyError, TypeError):
        return ""
