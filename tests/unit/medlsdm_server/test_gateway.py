"""The gateway by itself: nobody listens where the SuperLink would be, so whatever is forwarded gives 503."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from medlsdm.federation.identity import EnrolRequest, Invitation, fingerprint, public_hex, sign_request
from medlsdm_server.authority import issue_site_certificate
from medlsdm_server.fleet import most_bytes, public_pem
from medlsdm_server.gateway import FLEET_CALLS, MAX_ENROL_BYTES, Gateway
from medlsdm_server.superlink import SuperLink

KEY = Ed25519PrivateKey.generate()


def ssh_key(curve: ec.EllipticCurve | None = None) -> str:
    public = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


NODE_KEY = ssh_key()


@pytest.fixture
def gateway(home):
    return Gateway(home, SuperLink(home))


class Client:
    """Ask the application in this process; one event loop for all of a test."""

    def __init__(self, app: Any, runner: asyncio.Runner) -> None:
        self.inner, self.runner = app, runner
        self.certificate = b""  # what the connection shows, DER

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.inner(scope | {"state": {"certificate": self.certificate}}, receive, send)

    def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        return self.runner.run(self._request(method, path, **how))

    async def _request(self, method: str, path: str, **how: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="https://gateway") as client:
            return await client.request(method, path, **how)

    def get(self, path: str, **how: Any) -> httpx.Response:
        return self.request("GET", path, **how)

    def post(self, path: str, **how: Any) -> httpx.Response:
        return self.request("POST", path, **how)


@pytest.fixture
def client(gateway):
    app = gateway.app()
    with asyncio.Runner() as runner:
        lifespan = app.router.lifespan_context(app)
        runner.run(lifespan.__aenter__())
        yield Client(app, runner)
        runner.run(lifespan.__aexit__(None, None, None))


def certificate(home, site="site-a", node_key=NODE_KEY) -> bytes:
    pem = issue_site_certificate(home, site, node_key).encode()
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


@pytest.fixture
def site(gateway, client, home):
    """Enrol and admit a site that Flower is said to know already, and show its certificate."""
    gateway.registry.enrol(EnrolRequest(site="site-a", node_key=NODE_KEY, identity=public_hex(KEY)))
    gateway.registry.admit("site-a")
    gateway.registry.set_node_id("site-a", "7")
    gateway.refresh()
    client.certificate = certificate(home)
    return "site-a"


NODE = Node(node_id=7)
BODIES = {
    "activate-node": fleet_pb2.ActivateNodeRequest(public_key=public_pem(NODE_KEY)),
    "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=7),
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=NODE),
    "pull-messages": fleet_pb2.PullMessagesRequest(node=NODE),
    "push-messages": fleet_pb2.PushMessagesRequest(
        node=NODE, messages_list=[Message(metadata=Metadata(src_node_id=7))]
    ),
    "get-run": run_pb2.GetRunRequest(node=NODE),
    "get-fab": GetFabRequest(node=NODE),
    "pull-object": message_pb2.PullObjectRequest(node=NODE),
    "push-object": message_pb2.PushObjectRequest(node=NODE),
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(node=NODE),
}


def fleet(client, call, body: bytes | None = None, **how):
    content = BODIES[call].SerializeToString() if body is None else body
    path = f"/v1/fleet/{call}"
    return client.post(path, content=content, headers=signed(path, method="POST", body=content, **how))


def signed(path: str, *, key=KEY, site="site-a", method="GET", body=b"") -> dict[str, str]:
    return sign_request(key, site, method, path, body)


def enrol(client, *, key=KEY, body: bytes | None = None, headers: dict[str, str] | None = None, **fields):
    request = {"site": "site-b", "node_key": NODE_KEY, "identity": public_hex(key)} | fields
    content = json.dumps(request).encode() if body is None else body
    sign = signed("/v1/enrol", key=key, site=request["site"], method="POST", body=content)
    return client.post("/v1/enrol", content=content, headers=sign if headers is None else headers)


def model(home, name="a.stage2-0001"):
    folder = home.models / name
    folder.mkdir()
    (folder / "card.json").write_text('{"created": "2026"}')
    (folder / "denoiser.safetensors").write_bytes(b"weights")
    (folder / "private.key").write_bytes(b"secret")
    return name


def test_every_fleet_call_of_a_site_is_forwarded(client, site):
    assert {f"/v1/fleet/{call}" for call in BODIES} == FLEET_CALLS
    assert {fleet(client, call).status_code for call in BODIES} == {503}


def test_nobody_else_makes_a_fleet_call(client, site, home, gateway):
    for call in BODIES:
        assert client.post(f"/v1/fleet/{call}", content=BODIES[call].SerializeToString()).status_code == 401
        assert fleet(client, call, key=Ed25519PrivateKey.generate()).status_code == 403
    shown = client.certificate
    for other in (b"", certificate(home, "site-b"), certificate(home, node_key=ssh_key())):
        client.certificate = other
        assert {fleet(client, call).status_code for call in BODIES} == {403}
    client.certificate = shown
    gateway.registry.revoke("site-a")
    gateway.refresh()
    assert {fleet(client, call).status_code for call in BODIES} == {403}


def test_a_call_is_good_once_and_for_its_own_body(client, site):
    body = BODIES["pull-messages"].SerializeToString()
    headers = signed("/v1/fleet/pull-messages", method="POST", body=body)
    assert client.post("/v1/fleet/pull-messages", content=body, headers=headers).status_code == 503
    again = client.post("/v1/fleet/pull-messages", content=body, headers=headers)
    assert (again.status_code, "used before" in again.json()["message"]) == (403, True)
    other = signed("/v1/fleet/pull-messages", method="POST", body=body)
    assert client.post("/v1/fleet/pull-messages", content=body + b"x", headers=other).status_code == 403


def test_a_site_speaks_for_no_other_node(client, site):
    theirs = fleet_pb2.PushMessagesRequest(node=NODE, messages_list=[Message(metadata=Metadata(src_node_id=8))])
    assert fleet(client, "push-messages", theirs.SerializeToString()).status_code == 403
    assert (
        fleet(
            client, "pull-messages", fleet_pb2.PullMessagesRequest(node=Node(node_id=8)).SerializeToString()
        ).status_code
        == 403
    )


def test_a_node_that_flower_does_not_know_yet_signs_on_first(client, site, gateway):
    gateway.forget_nodes()
    assert fleet(client, "pull-messages").status_code == 401


def test_answers_tell_the_time_so_that_a_clock_that_is_off_can_be_corrected(client, site):
    late = {**sign_request(KEY, "site-a", "GET", "/v1/site", now=time.time() - 640)}
    answer = client.get("/v1/site", headers=late)
    assert answer.status_code == 403
    assert re.search(r"6(39|4[0-9]) s behind", answer.json()["message"])
    assert abs(float(answer.headers["x-medlsdm-clock"]) - time.time()) < 5


@pytest.mark.parametrize("odd", ["9" * 400, "-1", "1e3", "", "\u0661", "0x10", " 1"])
def test_odd_times_are_refused_and_nothing_breaks(client, site, odd):
    headers = signed("/v1/site") | {"x-medlsdm-time": odd.encode()}
    assert client.get("/v1/site", headers=headers).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/redoc",
        "/openapi.json", "/health", "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/create-node",
        "/v1/fleet", "/v1/fleet/", "/v1/fleet/activate-node/", "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol%2fstart-run", "//v1/control/start-run",
        "/V1/fleet/activate-node", "/v1/fleet/activate-node%00", "/v1/models/x/y/z", "/v1/registry", "/registry.db",
    ],
)  # fmt: skip
def test_nothing_else_is_there(client, path):
    methods = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
    assert {client.request(method, path).status_code for method in methods} <= {404, 405}


def test_fleet_calls_are_posts(client):
    for path in FLEET_CALLS:
        assert {client.request(m, path).status_code for m in ("GET", "PUT", "DELETE")} == {405}


def test_a_body_that_is_too_large_is_not_forwarded(client, site):
    assert fleet(client, "push-object", bytes(most_bytes("push-object") + 1)).status_code == 403


def test_the_ca_is_public_and_its_key_is_not(client, home):
    answer = client.get("/v1/ca")
    assert fingerprint(answer.content) == fingerprint(home.ca_cert.read_bytes())
    assert "PRIVATE" not in answer.text


def test_the_page_names_no_site(client, site):
    page = client.get("/")
    assert "sites admitted</th><td>1" in page.text
    assert site not in page.text
    assert public_hex(KEY) not in page.text


def test_a_site_without_an_invitation_waits(client, gateway):
    answer = enrol(client)
    assert (answer.status_code, answer.json()) == (200, {"site": "site-b", "status": "pending", "certificate": ""})
    path = "/v1/models"
    refused = client.get(path, headers=signed(path, site="site-b"))
    assert refused.status_code == 403
    assert "pending" in refused.json()["message"]
    assert client.get("/v1/site", headers=signed("/v1/site", site="site-b")).json()["status"] == "pending"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/site", "/v1/models/a.stage2-0001/card.json"])
def test_what_is_not_signed_by_a_site_is_refused(client, home, site, path):
    model(home)
    assert client.get(path, headers=signed(path)).status_code == 200
    bad = [
        {},
        signed(path, key=Ed25519PrivateKey.generate()),
        signed("/v1/other"),
        signed(path, method="POST"),
        signed(path, site="site-z"),
        signed(path) | {"x-medlsdm-time": "1"},
        {k: v for k, v in signed(path).items() if "signature" not in k},
    ]
    for headers in bad:
        answer = client.get(path, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"] == "enrolment"


def test_models_are_listed_and_sent_to_a_site(client, home, site):
    name = model(home)
    assert [m["id"] for m in client.get("/v1/models", headers=signed("/v1/models")).json()] == [name]
    path = f"/v1/models/{name}/denoiser.safetensors"
    assert client.get(path, headers=signed(path)).content == b"weights"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/a.stage2-0001/private.key", "/v1/models/a.stage2-0001/autoencoder.safetensors",
        "/v1/models/b.stage2-0001/card.json", "/v1/models/../registry.db", "/v1/models/..%2f../registry.db",
        "/v1/models/..%2f..%2fkeys/ca.key", "/v1/models/%2e%2e/card.json", "/v1/models/a.stage2-0001%0a/card.json",
        "/v1/models/a.stage2-0001/..%2f..%2fkeys%2fca.key", "/v1/models/.%2fa.stage2-0001/card.json",
    ],
)  # fmt: skip
def test_no_other_file_is_sent(client, home, site, path):
    from urllib.parse import unquote

    model(home)
    answer = client.get(path, headers=signed(unquote(path)))
    assert answer.status_code in (400, 403, 404)
    assert b"PRIVATE" not in answer.content
    assert b"secret" not in answer.content


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"\xff", b'{"site": "site-b"}', json.dumps({"site": "Site", "node_key": "k"}).encode()],
)
def test_an_enrolment_that_cannot_be_read_is_refused(client, gateway, body):
    answer = enrol(client, body=body)
    assert answer.status_code == 403
    assert gateway.registry.sites() == []


def test_an_oversized_enrolment_is_refused(client, gateway):
    body = json.dumps({"site": "site-b", "node_key": NODE_KEY, "identity": public_hex(KEY)}).encode()
    assert enrol(client, body=body.ljust(MAX_ENROL_BYTES + 1)).status_code == 403
    assert gateway.registry.sites() == []
    assert enrol(client, body=body.ljust(MAX_ENROL_BYTES)).status_code == 200


@pytest.mark.parametrize("key", ["", "ssh-ed25519 AAAA", "-----BEGIN", "x" * 900, ssh_key(ec.SECP256R1())])
def test_a_node_key_that_flower_would_not_take_is_refused(client, gateway, key):
    answer = enrol(client, node_key=key)
    assert answer.status_code == 403
    assert "key" in answer.json()["message"]
    assert gateway.registry.sites() == []


def test_an_enrolment_signed_by_another_key_is_refused(client, gateway):
    assert enrol(client, identity=public_hex(Ed25519PrivateKey.generate())).status_code == 403
    assert enrol(client, headers={}).status_code == 403
    assert gateway.registry.sites() == []


def test_error_answers_carry_no_token_and_nothing_of_the_machine(client, gateway, home):
    ca = fingerprint(home.ca_cert.read_bytes())
    late, right = Invitation.new("site-b", ca, -1), Invitation.new("site-b", ca, 1)
    gateway.registry.invite(late)
    gateway.registry.invite(right)
    answers = [
        enrol(client, token=late.token),
        enrol(client, token="x" * 43),
        enrol(client, site="site-c", token=right.token),
    ]
    assert [a.status_code for a in answers] == [403, 403, 403]
    for answer in answers:
        assert set(answer.json()) == {"error", "message", "hint"}
        for secret in (late.token, right.token, "x" * 43, NODE_KEY, str(home.root), "Traceback", "flwr"):
            assert secret not in answer.text


def test_logs_carry_no_token(client, gateway, home, caplog):
    invitation = Invitation.new("site-b", "0" * 64, 1)
    caplog.set_level("DEBUG")
    enrol(client, token=invitation.token)
    assert "refused" in caplog.text
    assert invitation.token not in caplog.text
