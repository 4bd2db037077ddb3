"""What hospitals may ask of the coordinator: Flower's fleet calls, enrolment, models, a status page. Nothing else.

Flower serves all its APIs on one port, and the one that starts runs has no login. So exactly the fleet
calls that a SuperNode makes are forwarded to loopback; every other path is answered with 404 here. Fleet calls
and models ask for two proofs before their body is read: the site's certificate (TLS) and its signed headers.
"""

from __future__ import annotations

import asyncio
import html
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from medlsdm.errors import EnrolmentError, MedlsdmError
from medlsdm.federation.identity import (
    ACTIVITY_HEADER,
    CLOCK_HEADER,
    SITE_HEADER,
    TIME_HEADER,
    EnrolReply,
    EnrolRequest,
    NonceCache,
    OddRequestError,
    check_body,
    check_form,
    verify_request,
)
from medlsdm_server import models
from medlsdm_server.activity import read_activity
from medlsdm_server.authority import issue_site_certificate, site_of_certificate
from medlsdm_server.contacts import Contacts
from medlsdm_server.fleet import FLEET_CALLS, check_sender, has_work, most_bytes, sign_off, stored_now, stored_object
from medlsdm_server.home import ServerHome
from medlsdm_server.registry import ADMITTED, Registry, Site
from medlsdm_server.status import server_status
from medlsdm_server.superlink import SuperLink, register, trust, unregister

log = logging.getLogger(__name__)

HOP_HEADERS = frozenset({"host", "connection", "keep-alive", "transfer-encoding", "te", "upgrade", "content-length"})
MAX_ENROL_BYTES = 4096
BODY_SECONDS, ENROL_SECONDS = 600, 10
TEND_SECONDS = 1.0
WORK_CALLS = {"get-run", "get-fab", "pull-object", "push-messages", "push-object", "confirm-message-received"}


class Gateway:
    """Answer the hospitals. One instance for one running coordinator."""

    def __init__(self, home: ServerHome, link: SuperLink) -> None:
        self.home, self.link = home, link
        self.registry, self.contacts, self.nonces = Registry(home.registry), Contacts(home), NonceCache()
        self.sites: dict[str, Site] = {}
        self.end_connections: Callable[[set[str]], None] = lambda admitted: None
        self._version = -1
        self._client: httpx.AsyncClient | None = None
        self._registering = asyncio.Lock()
        self._handed: dict[str, bytes] = {}  # work that a site was given and has not begun to fetch
        self._stored: dict[str, set[tuple[str, str]]] = {}  # objects of a site's newest message that have arrived
        self.refresh()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/", self._page),
            Route("/v1/ca", self._ca),
            Route("/v1/enrol", self._guard(self._enrol), methods=["POST"]),
            Route("/v1/site", self._guard(self._site)),
            Route("/v1/models", self._guard(self._models)),
            Route("/v1/models/{model}/{name}", self._guard(self._model_file)),
            Route("/v1/fleet/{call}", self._guard(self._fleet), methods=["POST"]),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan)
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(verify=trust(self.home), timeout=120) as client:
            self._client = client
            tending = asyncio.create_task(self._tend())
            try:
                yield
            finally:
                tending.cancel()
                with suppress(asyncio.CancelledError):
                    await tending

    def certified(self, certificate: bytes) -> str:
        """Return the admitted site whose certificate (DER) this is, or ''."""
        try:
            name, node_key = site_of_certificate(certificate)
        except EnrolmentError:
            return ""
        site = self.sites.get(name)
        return name if site is not None and site.status == ADMITTED and _same_key(site.node_key, node_key) else ""

    async def _tend(self) -> None:
        """Once a second: read what changed in the registry, cut off who is out, write the contacts down."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            try:
                await asyncio.to_thread(self.refresh)
                admitted = {s.name for s in self.sites.values() if s.status == ADMITTED}
                self.end_connections(admitted)
                for site in [s for s in self.sites.values() if s.node_id and s.name not in admitted]:
                    await self._disconnect(site)
                await asyncio.to_thread(self.contacts.save)
            except (OSError, MedlsdmError) as error:
                log.warning("the registry or the contacts could not be kept up to date: %s", type(error).__name__)

    def refresh(self) -> None:
        """Read the registry anew if somebody changed it."""
        version = self.registry.version()
        if version != self._version:
            self.sites = {s.name: s for s in self.registry.sites()}
            self._version = version

    def _guard(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turn our errors into answers: what is wrong with an enrolment in full, else the public words only."""

        async def guarded(request: Request) -> Response:
            try:
                answer = await handler(request)
            except MedlsdmError as error:
                status = 403 if isinstance(error, EnrolmentError) and not isinstance(error, OddRequestError) else 400
                log.warning("refused %s: %s", "/".join(request.url.path.split("/")[2:4])[:60], error.code)
                told = (error.message, error.hint) if status == 403 else (error.public_text, "Ask the coordinator.")
                answer = JSONResponse({"error": error.code, "message": told[0], "hint": told[1]}, status)
                answer.headers["connection"] = "close"  # nobody reads what is left of the body
            answer.headers[CLOCK_HEADER] = f"{time.time():.3f}"
            return answer

        return guarded

    async def _ca(self, request: Request) -> Response:
        return PlainTextResponse(self.home.ca_cert.read_text())

    async def _page(self, request: Request) -> Response:
        status = await asyncio.to_thread(server_status, self.home)
        launch = status["launch"] or {}
        rows = {
            "sites admitted": sum(s["status"] == ADMITTED for s in status["sites"]),
            "state": launch.get("state", "no round was launched yet"),
            "stage": launch.get("stage", "-"),
            "round": f"{launch.get('round', 0)} of {launch.get('rounds', 0)}",
        }
        body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        return HTMLResponse(
            f"<!doctype html><meta charset=utf-8><title>medlsdm coordinator</title>"
            f"<style>body{{font:16px system-ui;margin:3rem}}th{{text-align:left;padding-right:2rem}}</style>"
            f"<h1>medlsdm coordinator</h1><table>{body}</table>"
        )

    async def _enrol(self, request: Request) -> Response:
        body = await _bounded(request, MAX_ENROL_BYTES, ENROL_SECONDS)
        try:
            wanted = EnrolRequest.model_validate_json(body)
        except ValueError as error:
            raise EnrolmentError("The enrolment request cannot be read.", "Install the same release.") from error
        _check_node_key(wanted.node_key)
        verify_request(wanted.identity, request.headers, "POST", request.url.path, body=body, seen=self.nonces)
        address = request.client.host if request.client else ""
        site = await asyncio.to_thread(self.registry.enrol, wanted, address)
        await asyncio.to_thread(self.refresh)
        log.info("site %s is %s", site.name, site.status)
        return JSONResponse(EnrolReply(**self._standing(site)).model_dump())

    def _standing(self, site: Site) -> dict[str, str]:
        admitted = site.status == ADMITTED
        certificate = issue_site_certificate(self.home, site.name, site.node_key) if admitted else ""
        return {"site": site.name, "status": site.status, "certificate": certificate}

    async def _connect(self, site: Site) -> Site:
        """Register an admitted site's SuperNode key with the SuperLink that runs now, once."""
        async with self._registering:
            site = self.sites.get(site.name, site)
            if not site.node_id:
                node_id = await asyncio.to_thread(register, self.home, site.name, site.node_key)
                await self._know(site.name, node_id)
        return self.sites[site.name]

    async def _disconnect(self, site: Site) -> None:
        """Take a site that is admitted no more out of Flower's registry."""
        async with self._registering:
            await asyncio.to_thread(unregister, self.home, site.node_id)
            await self._know(site.name, "")
        self._handed.pop(site.name, None)
        log.info("site %s is cut off", site.name)

    async def _know(self, name: str, node_id: str) -> None:
        await asyncio.to_thread(self.registry.set_node_id, name, node_id)
        self.sites = {s.name: s for s in await asyncio.to_thread(self.registry.sites)}

    def forget_nodes(self) -> None:
        """Begin anew with a SuperLink that was started again: it knows no node."""
        self.registry.clear_node_ids()
        self.sites = {s.name: s for s in self.registry.sites()}

    def _known(self, request: Request) -> tuple[Site, str]:
        """Return who asks and the digest of the body to come; nothing of the body was read."""
        check_form(request.headers)
        site = self.sites.get(request.headers[SITE_HEADER])
        if site is None:
            raise EnrolmentError("This site is not enrolled here.", "Join with an invitation first.")
        digest = verify_request(site.identity, request.headers, request.method, request.url.path, seen=self.nonces)
        contact = self.contacts.of(site.name)
        contact.at = time.time()
        contact.clock_s = round(int(request.headers[TIME_HEADER]) - contact.at, 1)
        if ACTIVITY_HEADER in request.headers:
            contact.activity = read_activity(request.headers[ACTIVITY_HEADER])
        return site, digest

    async def _site(self, request: Request) -> Response:
        return JSONResponse(self._standing(self._known(request)[0]))

    def _admitted(self, request: Request) -> tuple[Site, str]:
        site, digest = self._known(request)
        if site.status != ADMITTED:
            raise EnrolmentError(f"The coordinator lists this site as {site.status}.", "Wait, or ask the coordinator.")
        if self.certified(request.scope.get("state", {}).get("certificate", b"")) != site.name:
            raise EnrolmentError("The connection shows no valid certificate of this site.", "Start the node again.")
        return site, digest

    async def _models(self, request: Request) -> Response:
        self._admitted(request)
        return JSONResponse([m.to_json() for m in await asyncio.to_thread(models.list_models, self.home.models)])

    async def _model_file(self, request: Request) -> Response:
        self._admitted(request)
        return FileResponse(
            models.file_of(self.home.models, request.path_params["model"], request.path_params["name"]),
            media_type="application/octet-stream",
        )

    async def _fleet(self, request: Request) -> Response:
        if request.url.path not in FLEET_CALLS:
            return PlainTextResponse("Not Found", 404)
        call = request.path_params["call"]
        if SITE_HEADER not in request.headers:
            return PlainTextResponse("Join through medlsdm-node", 401, {"connection": "close"})  # a bare SuperNode ends
        site, digest = self._admitted(request)
        body = await _bounded(request, most_bytes(call), BODY_SECONDS)
        check_body(digest, body)
        if call == "activate-node":
            site = await self._connect(site)
        elif not site.node_id:
            return PlainTextResponse("Sign on first", 401)  # the SuperNode ends, and the node starts it again
        check_sender(call, body, site.node_id, site.node_key)
        if call == "pull-messages" and site.name in self._handed:
            return Response(self._handed[site.name], media_type="application/protobuf")
        if call in WORK_CALLS:
            self._handed.pop(site.name, None)
        if call == "push-object" and stored_object(body) in self._stored.get(site.name, ()):
            return Response(stored_now(), media_type="application/protobuf")  # our answer was lost on the way
        if call == "activate-node":  # one that was killed is taken for online still, and would be turned away
            await self._forward(request, "deactivate-node", site, sign_off(site.node_id))
        return await self._forward(request, call, site, body)

    async def _forward(self, request: Request, call: str, site: Site, body: bytes) -> Response:
        """Hand a call to the SuperLink. What goes wrong there is 503 here, which a SuperNode tries again."""
        assert self._client is not None
        headers = {k: v for k, v in request.headers.items() if k not in HOP_HEADERS and not k.startswith("x-medlsdm")}
        try:
            answer = await self._client.post(f"{self.link.url}/v1/fleet/{call}", headers=headers, content=body)
        except httpx.TransportError as error:
            log.warning("the SuperLink did not answer %s: %s", call, type(error).__name__)
            return PlainTextResponse("Service Unavailable", 503)
        if answer.status_code >= 500:
            log.warning("the SuperLink answered %s to %s", answer.status_code, call)
            return PlainTextResponse("Service Unavailable", 503)
        if answer.status_code == 200:
            self._note(call, site, body, answer.content)
        kept = {k: v for k, v in answer.headers.items() if k not in HOP_HEADERS | {"content-encoding"}}
        return Response(answer.content, answer.status_code, kept)

    def _note(self, call: str, site: Site, body: bytes, answer: bytes) -> None:
        contact = self.contacts.of(site.name)
        if call == "activate-node":
            contact.activated = time.time()
        elif call == "pull-messages":
            contact.pulled = time.time()
            if has_work(answer):
                self._handed[site.name] = answer
        elif call == "push-messages":
            self._stored[site.name] = set()
        elif call == "push-object" and answer == stored_now():
            self._stored.setdefault(site.name, set()).add(stored_object(body))


def _same_key(one: str, other: str) -> bool:
    return one.split()[:2] == other.split()[:2]  # a comment may follow


def _check_node_key(text: str) -> None:
    """Raise EnrolmentError unless this is the public key that a SuperNode of ours has."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError("The node's key cannot be read.", "Make a new node with 'init'.") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EnrolmentError("The node's key is not of the curve P-384.", "Make a new node with 'init'.")


async def _bounded(request: Request, limit: int, seconds: float) -> bytes:
    """Read a body of at most so many bytes in at most so much time."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise EnrolmentError("The request is too large.", "Install the same release.")
    except TimeoutError as error:
        raise EnrolmentError("The request took too long.", "Try again.") from error
    return bytes(body)
