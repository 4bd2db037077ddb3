"""The one door that hospitals see: TLS, Flower's fleet calls, enrolment, models, a status page. Nothing else.

Flower serves all its APIs on one port, and the one that starts runs has no login. So exactly the fleet
calls that a SuperNode makes are forwarded to loopback; every other path is answered with 404 here.
"""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from medlsdm.errors import EnrolmentError, MedlsdmError
from medlsdm.federation.identity import SITE_HEADER, EnrolReply, EnrolRequest, verify_request
from medlsdm_server import models
from medlsdm_server.home import ServerHome
from medlsdm_server.registry import ADMITTED, Registry, Site
from medlsdm_server.status import server_status
from medlsdm_server.superlink import SuperLink, _context, register

log = logging.getLogger(__name__)

FLEET_CALLS = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "pull-object", "push-object", "confirm-message-received",
    )
)  # fmt: skip
HOP_HEADERS = frozenset({"host", "connection", "keep-alive", "transfer-encoding", "te", "upgrade", "content-length"})
MAX_ENROL_BYTES = 4096
MAX_FLEET_BYTES = 64 * 1024 * 1024  # Flower cuts arrays into pieces of 5 MB


class Gateway:
    """Answer the hospitals. One instance for one running coordinator."""

    def __init__(self, home: ServerHome, link: SuperLink) -> None:
        self.home, self.link = home, link
        self.registry = Registry(home.registry)
        self._client: httpx.AsyncClient | None = None
        self._registering = asyncio.Lock()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/", self._page),
            Route("/v1/ca", self._ca),
            Route("/v1/enrol", self._guard(self._enrol), methods=["POST"]),
            Route("/v1/site", self._guard(self._site)),
            Route("/v1/models", self._guard(self._models)),
            Route("/v1/models/{model}/{name}", self._guard(self._model_file)),
            Route("/v1/fleet/{call}", self._fleet, methods=["POST"]),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan)
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(verify=_context(self.home), timeout=120) as client:
            self._client = client
            yield

    def _guard(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turn our errors into answers: what is wrong with an enrolment in full, else the public words only."""

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except MedlsdmError as error:
                status = 403 if isinstance(error, EnrolmentError) else 400
                log.warning("refused %s: %s", request.url.path.split("/")[2], error.code)
                told = (error.message, error.hint) if status == 403 else (error.public_text, "Ask the coordinator.")
                return JSONResponse({"error": error.code, "message": told[0], "hint": told[1]}, status)

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
        body = await _bounded(request, MAX_ENROL_BYTES)
        try:
            wanted = EnrolRequest.model_validate_json(body)
        except ValueError as error:
            raise EnrolmentError("The enrolment request cannot be read.", "Install the same release.") from error
        _check_node_key(wanted.node_key)
        verify_request(wanted.identity, request.headers, "POST", request.url.path, body)
        site = await asyncio.to_thread(self.registry.enrol, wanted)
        site = await self._connect(site)
        log.info("site %s is %s", site.name, site.status)
        return JSONResponse(EnrolReply(site=site.name, status=site.status).model_dump())

    async def _connect(self, site: Site) -> Site:
        """Register an admitted site's SuperNode key with Flower, once."""
        async with self._registering:
            site = self.registry.site(site.name) or site
            if site.status == ADMITTED and not site.node_id:
                node_id = await asyncio.to_thread(register, self.home, site.name, site.node_key)
                self.registry.set_node_id(site.name, node_id)
        return site

    def _known(self, request: Request) -> Site:
        site = self.registry.site(request.headers.get(SITE_HEADER, ""))
        if site is None:
            raise EnrolmentError("This site is not enrolled here.", "Join with an invitation first.")
        verify_request(site.identity, request.headers, request.method, request.url.path)
        self.registry.touch(site.name)
        return site

    async def _site(self, request: Request) -> Response:
        site = await self._connect(self._known(request))
        return JSONResponse({"site": site.name, "status": site.status})

    def _admitted(self, request: Request) -> Site:
        site = self._known(request)
        if site.status != ADMITTED:
            raise EnrolmentError("The coordinator has not admitted this site yet.", "Wait, or ask the coordinator.")
        return site

    async def _models(self, request: Request) -> Response:
        self._admitted(request)
        return JSONResponse([m.to_json() for m in models.list_models(self.home.models)])

    async def _model_file(self, request: Request) -> Response:
        self._admitted(request)
        return FileResponse(
            models.file_of(self.home.models, request.path_params["model"], request.path_params["name"]),
            media_type="application/octet-stream",
        )

    async def _fleet(self, request: Request) -> Response:
        if request.url.path not in FLEET_CALLS:
            return PlainTextResponse("Not Found", 404)
        assert self._client is not None
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_HEADERS}
        try:
            content = await _bounded(request, MAX_FLEET_BYTES)
            forwarded = self._client.build_request(
                "POST", self.link.url + request.url.path, headers=headers, content=content
            )
            answer = await self._client.send(forwarded, stream=True)
        except EnrolmentError:
            return PlainTextResponse("Content Too Large", 413)
        except httpx.TransportError:
            return PlainTextResponse("Service Unavailable", 503)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_HEADERS}
        return StreamingResponse(_relay(answer), answer.status_code, kept)


def _check_node_key(text: str) -> None:
    """Raise EnrolmentError unless this is the public key that a SuperNode of ours has."""
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError("The node's key cannot be read.", "Make a new node with 'init'.") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EnrolmentError("The node's key is not of the curve P-384.", "Make a new node with 'init'.")


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()


async def _bounded(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise EnrolmentError("The request is too large.", "Install the same release.")
    return bytes(body)
